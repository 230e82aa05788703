"""A mix as a config for training, and both made of the streams of a run."""

import json
import pprint
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from herd_jax.curation.mix import Mix, MixConfig, MixSource, cells, left_out, plan, shortfalls
from herd_jax.curation.streams import HIGH
from herd_jax.data.ramp import Phase, Ramp
from herd_jax.data.streams import HEADER
from herd_jax.files import write_whole
from herd_jax.text.tokenizer import load_tokenizer


def training_config(mix: Mix, file: Path, run: Mapping[str, Any]) -> None:
    """Writes a config for `python -m herd_jax.train --config FILE`: the mix, and in `run` everything else (workdir, model, train, ...).

    `train.num_steps` is set to what the tokens of the mix take, unless `run` has it; for that, its train section must have either phases
    or global_batch_size and seq_len.
    """
    train = dict(run["train"])
    if "num_steps" not in train:
        phases = train.get("phases") or [{"from_tokens": 0, **train}]
        ramp = Ramp(tuple(Phase(phase["from_tokens"], phase["global_batch_size"], phase["seq_len"], 1) for phase in phases))
        train["num_steps"] = ramp.step_at(mix.total_tokens)
    config = {**run, "train": train, "data": mix.data()}
    table = str(mix).replace("\\", "\\\\").replace('"""', r"\"\"\"")
    literal = pprint.pformat(config, width=120, sort_dicts=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'"""A training run on this mix:\n\n{table}\n"""\n\nCONFIG = {literal}\n\n\ndef get_config():\n    return CONFIG\n')


class PlanMix(PipelineStep):
    """Writes `mix.json` and `train.py`, a config for `python -m herd_jax.train`, of the streams that can be trained on and validated; no
    `train.py` where there are none."""

    type = "mix"
    name = "mix"

    def __init__(self, config: MixConfig, streams: Path, high_quality: float | None, workdir: Path):
        super().__init__()
        self._config, self._streams, self._high_quality, self._workdir = config, streams, high_quality, workdir

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        sources = []
        for directory in sorted(self._streams.glob("*")):
            quality = self._high_quality if directory.name.endswith(HIGH) else None
            if all(_num_tokens(directory / split) for split in ("train", "validation")):  # a single document leaves one empty
                sources.append(MixSource.open(str(directory), directory.name.split("-")[0], quality))
        if not sources:
            table = "no mix: no category has two documents, one to train and one to validate on"
            write_whole(self._workdir / "mix.json", json.dumps({"phases": [], "epochs": {}, "table": table}, indent=1))
            return
        mix = plan(sources, self._config)
        phases = [
            {
                "from_tokens": p.from_tokens, "to_tokens": p.to_tokens, "shares": p.shares, "drawn": {source.path: n for source, n in p.drawn.items()},
                "rows": cells(p), "remarks": [*left_out(p), *shortfalls(p)],
            }
            for p in mix.phases
        ]  # fmt: skip
        epochs = {source.path: value for source, value in mix.epochs().items()}
        write_whole(self._workdir / "mix.json", json.dumps({"phases": phases, "epochs": epochs, "unused": mix.unused(), "table": str(mix)}, indent=1))
        model = {"name": "llama-5m", "vocab_size": load_tokenizer(self._streams.parent / "tokenizer").vocab_size}
        run = {"workdir": str(self._workdir / "model"), "model": model, "train": {"global_batch_size": 8, "seq_len": 256}}
        training_config(mix, self._workdir / "train.py", run)


def _num_tokens(stream: Path) -> int:
    return sum(json.loads((stream / HEADER).read_text())["shard_tokens"])
