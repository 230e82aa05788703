"""A small run's config, with any of its fields replaced."""

from herd_jax.config import parse
from herd_jax.data.tokenization import tokenize_files
from herd_jax.training.config import RunConfig

BASE = {
    "workdir": "runs/test",
    "data": {"sources": "data/test"},
    "model": {"name": "llama-tiny"},  # dim 64, 4 heads of 2 kv heads, ffn 128
    "train": {"global_batch_size": 8, "seq_len": 32},
}


def config(**overrides):
    """The base with dotted fields replaced, `__` for the dot; one device unless the mesh says otherwise."""
    mapping = {section: dict(value) if isinstance(value, dict) else value for section, value in BASE.items()}
    mapping["mesh"] = {"dp": 1}
    for key, value in overrides.items():
        *section, name = key.split("__")
        (mapping.setdefault(section[0], {}) if section else mapping)[name] = value
    return parse(RunConfig, mapping)


def numbered_streams(base):
    """Makes token streams of bytes of a few texts of numbers below the directory `base`; returns theirs."""
    (base / "text").mkdir()
    for i in range(8):
        (base / "text" / f"{i}.txt").write_text(" ".join(str(j * (i + 7) % 101) for j in range(400)))
    tokenize_files([str(base / "text")], "bytes", base / "data", validation_fraction=0.3, processes=1)
    return base / "data"


PHASES = ({"from_tokens": 0, "global_batch_size": 8, "seq_len": 32}, {"from_tokens": 999, "global_batch_size": 8, "seq_len": 64})


def phases(**second):
    return (PHASES[0], {**PHASES[1], **second})
