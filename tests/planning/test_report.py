import json

import pytest

from herd_jax import plan
from herd_jax.errors import UserError
from herd_jax.machines.hardware import HARDWARE
from herd_jax.models.config import MODELS
from herd_jax.parallel.schedule import PipelineConfig
from herd_jax.planning import report
from herd_jax.planning.job import Job

ROW_1 = "--model llama3-405b --hardware h100 --tp 8 --cp 1 --pp 16 --dp 64 --seq-len 8192 --batch-per-dp 32".split()
main = plan.main.__wrapped__  # without the exit of the command line


def test_the_papers_layout_as_json(capsys):
    main([*ROW_1, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["num_parameters"] == 405_853_388_800 and found["fits"] and found["num_devices"] == 8192
    assert found["memory_bytes_per_device"]["total"] < 80e9
    assert found["mfu"] == pytest.approx(0.43, abs=0.03) and found["tflops_per_device"] == pytest.approx(430, abs=30)
    assert found["tokens_per_step"] == 16_777_216 and found["empty_layer_slots"] == 2
    assert found["tokens_per_second"] == pytest.approx(found["tokens_per_step"] / found["step_time_s"])
    assert sum(found["time_s"].values()) == pytest.approx(found["step_time_s"])
    assert found["bubble_fraction"] == pytest.approx(15 / (8 * 32))


def test_text_says_what_fits_and_what_does_not(capsys):
    main(ROW_1)
    text = capsys.readouterr().out
    assert "405,853,388,800 parameters" in text and "to spare" in text and "interleaved x 8" in text and "MWh" in text
    main("--model llama3-405b --tp 8 --pp 2 --dp 2 --batch-per-dp 8".split())
    assert "does not fit: " in capsys.readouterr().out


def test_schedule_is_printed_and_drawn(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    main(f"schedule --pp 4 --micro-batches 10 --chunks 2 --contiguous 5 --plot {tmp_path / 'schedule.svg'}".split())
    text = capsys.readouterr().out
    assert "rank 0 | 0a 1a 2a 3a 4a 0b 1b" in text and "rank 0: stages 0, 4; peak in flight 9" in text and "bubble 15.0%" in text
    assert (tmp_path / "schedule.svg").read_text().startswith("<?xml")
    main(f"schedule --pp 2 --micro-batches 3 --json --plot {tmp_path / 'schedule.png'}".split())
    assert json.loads(capsys.readouterr().out)["peak_in_flight"] == [2, 1]


def test_goodput_over_90_percent(capsys):
    main("goodput --gpus 16384 --days 54 --seeds 3 --json".split())
    assert json.loads(capsys.readouterr().out)["effective_fraction"]["mean"] > 0.9


def test_search_ranks_what_fits(capsys):
    main("--model llama3-8b --gpus 16 --global-batch-tokens 1M --search --json".split())
    found = json.loads(capsys.readouterr().out)
    assert all(layout["fits"] and layout["num_devices"] == 16 for layout in found["ranked"])
    assert found["ranked"] == sorted(found["ranked"], key=lambda layout: layout["step_time_s"])
    assert sum(rejection["count"] for rejection in found["rejections"]) > 0


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    files = [tmp_path / "memory.svg", tmp_path / "mfu.png"]
    main(f"--model llama3-8b --dp 8 --batch-per-dp 4 --gather layer --plot-memory {files[0]} --plot-mfu {files[1]}".split())
    assert all(file.stat().st_size > 1000 for file in files)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--model llama3-9b", "model.name 'llama3-9b' is not known"),
        ("--model llama3-8b --hardware h1000", "hardware 'h1000' is not known"),
        ("--model llama3-8b --tp 3", "does not divide by mesh.tp 3"),
        ("--model llama3-8b --tp 0", "tp is 0: it must be 1 or more"),
        ("--model llama3-8b --dp -2", "dp is -2"),
        ("--model llama3-8b --batch-per-dp 3 --micro-batch-size 2", "does not divide by micro_batch_size 2"),
        ("--model llama3-8b --search", "give it with --gpus"),
        ("--model llama3-8b --search --gpus 8 --global-batch-tokens many", "'many' is not a number of tokens"),
        ("--model llama3-8b --gpus 16", "--gpus goes with --search"),
        ("--model llama3-8b --global-batch-tokens 1M", "--global-batch-tokens goes with --search"),
        ("--model llama3-8b --pp 2 --schedule 1f1b --chunks 2", "choose 'interleaved' or 'zero_bubble'"),
        ("--model llama3-8b --schedule interleaved --chunks 2", "set mesh.pp to 2 or more"),
        ("schedule --pp 0 --micro-batches 4", "both must be 1 or more"),
        ("schedule --pp 4 --micro-batches 4 --chunks 0", "pipeline.num_chunks is 0"),
        ("schedule --pp 4 --micro-batches 4 --contiguous -1", "contiguous_micro_batches is -1"),
        ("goodput --gpus 0", "gpus is 0"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        main(arguments.split())
    assert "\n" not in str(error.value)


def test_stages_are_filled_evenly_where_they_can_be():
    base = dict(seq_len=8192, batch_per_dp=8)
    chosen = lambda model, pp: report.with_chosen_schedule(Job(model, MODELS[model], HARDWARE["h100"], tp=8, pp=pp, **base)).pipeline
    assert chosen("llama3-405b", 16) == PipelineConfig("interleaved", 8)
    assert chosen("llama3-405b", 1) == PipelineConfig()
    assert chosen("llama3-8b", 2) == PipelineConfig()  # 34 = 2 x 17: no even number of chunks fills stages equally


def test_mfu_falls_where_the_same_batch_is_spread_over_more_devices():
    job = Job("llama3-405b", MODELS["llama3-405b"], HARDWARE["h100"], 8, 1, 16, 64, 8192, 32, pipeline=PipelineConfig("interleaved", 8))
    points = sorted((devices, mfu) for devices, mfu, label in report.mfu_over_devices(job) if label == "the same tokens a step")
    assert [devices for devices, _ in points] == [1024, 2048, 4096, 8192, 16384, 32768, 65536]
    assert [mfu for _, mfu in points] == sorted((mfu for _, mfu in points), reverse=True)
