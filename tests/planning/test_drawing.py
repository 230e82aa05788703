import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd_jax.errors import UserError
from herd_jax.parallel.schedule import BACKWARD_INPUT, BACKWARD_UPPER, BACKWARD_WEIGHT, FORWARD, PipelineConfig
from herd_jax.planning.drawing import draw_memory, draw_mfu, draw_schedule, schedule_text

FIGURE_6 = PipelineConfig("interleaved", num_chunks=2, contiguous_micro_batches=5)


def test_1f1b_in_full():
    assert schedule_text(PipelineConfig().build(2, 3)) == [
        "tick      0              5             10",
        "rank 0 | 0a 1a  .  . 0A=== 2a 1A===  . 2A===",
        "rank 1 |  . 0a 0A=== 1a 1A=== 2a 2A===  .  .",
        "",
        "0a    forward of micro-batch 0",
        "0A=== its backward, two ticks: the upper half of the layers, then the lower",
        ".     idle",
        "",
        "12 ticks, bubble 33.3% (idle over busy)",
        "rank 0: stage 0; peak in flight 2",
        "rank 1: stage 1; peak in flight 1",
        "in flight: micro-batches whose activations a rank holds, each counted once for each of its chunks",
    ]


def test_figure_6_of_the_paper():
    lines = schedule_text(FIGURE_6.build(4, 10))
    assert lines[1].startswith("rank 0 | 0a 1a 2a 3a 4a 0b 1b 2b 3b  .  .  .  .  .  . 0B=== 4b 1B=== 5a")
    assert lines[4].startswith("rank 3 |  .  .  . 0a 1a 2a 3a 4a 0b 0B=== 1b")
    assert "rank 0: stages 0, 4; peak in flight 9" in lines and "rank 3: stages 3, 7; peak in flight 6" in lines
    assert "69 ticks, bubble 15.0% (idle over busy)" in lines


def test_weight_gradients_are_marked():
    lines = schedule_text(PipelineConfig("zero_bubble").build(2, 3))
    assert lines[1:3] == ["rank 0 | 0a  1a   .  0A  0A* 2a  1A  1A* 2A  2A*", "rank 1 |  .  0a  0A  1a  1A  0A* 2a  2A  1A* 2A*"]
    assert "0A*   gradient of the weights" in lines


@given(st.sampled_from(["1f1b", "interleaved", "zero_bubble"]), st.integers(2, 12), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_text_holds_the_whole_schedule_in_order(name, num_ranks, num_micro_batches):
    """What the lines of a rank say, read back, is what the schedule says."""
    schedule = PipelineConfig(name, num_chunks=2 if name == "interleaved" else 1).build(num_ranks, num_micro_batches)
    lines = schedule_text(schedule)
    assert max(map(len, lines)) <= 120
    picture = lines[: next(i for i, line in enumerate(lines) if line.startswith("0a "))]
    for rank in range(num_ranks):
        row = " ".join(line.split("|")[1] for line in picture if re.match(rf"rank {rank} +\|", line))
        cells = re.findall(r"(\d+)([a-zA-Z])(\*?)", row)
        begins = [
            (str(schedule.micro_batch[tick, rank]), "ab"[schedule.chunk[tick, rank]], int(operation))
            for tick, operation in enumerate(schedule.operation[:, rank])
            if operation in (FORWARD, BACKWARD_UPPER, BACKWARD_INPUT, BACKWARD_WEIGHT)
        ]
        assert [(number, letter.lower()) for number, letter, _ in cells] == [(number, letter) for number, letter, _ in begins]
        assert [letter.islower() for _, letter, _ in cells] == [operation == FORWARD for *_, operation in begins]
        assert [star == "*" for *_, star in cells] == [operation == BACKWARD_WEIGHT for *_, operation in begins]


def test_more_chunks_than_letters():
    with pytest.raises(UserError, match="pipeline.num_chunks is 27 .* choose fewer"):
        schedule_text(PipelineConfig("interleaved", num_chunks=27).build(2, 2))


@pytest.mark.parametrize("config, num_blocks", [(FIGURE_6, 2), (PipelineConfig("zero_bubble", 2, 5), 3)])
def test_schedule_as_svg(tmp_path, config, num_blocks):
    """A number in each block: 10 micro-batches x 2 chunks x 4 ranks, the two ticks of a whole backward being one block."""
    pytest.importorskip("matplotlib")
    draw_schedule(config.build(4, 10), tmp_path / "schedule.svg")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "schedule.svg").read_text())
    assert sum(texts.count(str(m)) for m in range(1, 10)) == 9 * 2 * 4 * num_blocks
    for text in ("rank 0: stages 0, 4", "9 in flight", "forward, chunk 0", "forward, chunk 1"):
        assert text in texts
    assert ("weight gradient, chunk 1" in texts) == (config.schedule == "zero_bubble")


@pytest.mark.parametrize("config", [FIGURE_6, PipelineConfig("zero_bubble", 2, 5)])
def test_blocks_cover_the_busy_ticks(tmp_path, monkeypatch, config):
    axes = pytest.importorskip("matplotlib.axes").Axes
    drawn, draw = [], axes.broken_barh
    monkeypatch.setattr(axes, "broken_barh", lambda self, spans, *rest, **style: drawn.append(spans) or draw(self, spans, *rest, **style))
    schedule = config.build(4, 10)
    draw_schedule(schedule, tmp_path / "schedule.png")
    for rank, (lane, blocks) in enumerate(zip(drawn[::2], drawn[1::2])):
        assert lane == [(0, len(schedule.operation))]
        busy = [tick for start, length in blocks for tick in range(start, start + length)]
        assert busy == np.flatnonzero(schedule.operation[:, rank]).tolist()
        assert len(blocks) == 10 * 2 * (3 if config.schedule == "zero_bubble" else 2)


def test_pictures_are_png(tmp_path):
    pytest.importorskip("matplotlib")
    draw_schedule(PipelineConfig("gpipe").build(1, 1), tmp_path / "schedule.png")
    draw_memory({"weights": 3e9, "total": 3e9}, 80e9, tmp_path / "memory.png")
    draw_mfu([(8, 0.4, "predicted")], tmp_path / "mfu.png")
    for name in ("schedule", "memory", "mfu"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_memory_says_whether_it_fits(tmp_path):
    pytest.importorskip("matplotlib")
    gib = 2**30
    for capacity, verdict in ((10 * gib, "8.0 of 10.0 GiB, 2.0 GiB to spare"), (5 * gib, "8.0 of 5.0 GiB, 3.0 GiB too much")):
        draw_memory({"weights": 3 * gib, "activations": 5 * gib, "total": 8 * gib}, capacity, tmp_path / "memory.svg")
        drawn = (tmp_path / "memory.svg").read_text()
        assert verdict in drawn and "activations 5.0 GiB" in drawn and "total" not in drawn


def test_mfu_over_gpus(tmp_path):
    pytest.importorskip("matplotlib")
    draw_mfu([(8192, 0.43, "paper"), (16384, 0.41, "paper"), (16384, 0.38, "131K tokens")], tmp_path / "mfu.svg")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "mfu.svg").read_text())
    assert {"8,192", "16,384", "43.0%", "41.0%", "38.0%", "paper", "131K tokens"} <= set(texts)


def test_files_that_cannot_be(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match=r"schedule.pdf .* ends in .png or .svg"):
        draw_schedule(PipelineConfig().build(2, 2), tmp_path / "schedule.pdf")
    with pytest.raises(UserError, match="cannot be written .* choose a folder"):
        draw_mfu([(8, 0.4, "predicted")], tmp_path / "nowhere" / "mfu.png")


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[plot\]'"):
        draw_memory({"weights": 1.0}, 2.0, tmp_path / "memory.png")
    assert schedule_text(PipelineConfig().build(2, 2))
