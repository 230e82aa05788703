"""The configuration of a run: every combination that cannot work is refused in one sentence that names its fields."""

import jax
import jax.numpy as jnp
import pytest

from herd_jax.config import parse, to_dict
from herd_jax.errors import UserError
from herd_jax.mesh import make_mesh
from herd_jax.models.config import MODELS
from herd_jax.training.run import RunConfig, build_steps, contradictions, parse_saved

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


def build(**overrides):
    run = config(**overrides)
    num_devices = run.mesh.tp * run.mesh.cp * run.mesh.pp * run.mesh.dp
    return build_steps(run, make_mesh(run.mesh, jax.devices()[:num_devices]))


PHASES = ({"from_tokens": 0, "global_batch_size": 8, "seq_len": 32}, {"from_tokens": 999, "global_batch_size": 8, "seq_len": 64})


def phases(**second):
    return (PHASES[0], {**PHASES[1], **second})


@pytest.mark.parametrize(
    "overrides, words",
    [
        # the mesh
        ({"mesh__tp": 4}, ["model.num_kv_heads 2", "mesh.tp 4"]),
        ({"mesh__tp": 2, "model__ffn_dim": 129}, ["model.ffn_dim 129", "mesh.tp 2"]),
        ({"mesh__dp": 4, "model__dim": 66}, ["model.dim 66", "mesh.dp x mesh.cp = 4"]),
        ({"mesh__cp": 2, "mesh__dp": 4, "model__dim": 12}, ["model.dim 12", "mesh.dp x mesh.cp = 8"]),
        ({"mesh__tp": 0}, ["mesh.tp is 0", "1 or more"]),
        # batches
        ({"mesh__dp": 8, "train__num_micro_batches": 2}, ["train.global_batch_size 8", "train.num_micro_batches 2", "mesh.dp 8"]),
        ({"train__num_micro_batches": 3}, ["train.global_batch_size 8", "train.num_micro_batches 3"]),
        ({"train__seq_len": 33, "mesh__tp": 2}, ["train.seq_len 33", "mesh.tp 2", "a multiple of 2"]),
        ({"train__seq_len": 34, "mesh__cp": 2}, ["train.seq_len 34", "mesh.cp 2", "zigzag", "a multiple of 4"]),
        ({"train__seq_len": 36, "mesh__cp": 2, "mesh__tp": 2}, ["train.seq_len 36", "mesh.tp 2", "mesh.cp 2", "a multiple of 8"]),
        ({"train__seq_len": 0}, ["train.seq_len is 0"]),
        ({"train__global_batch_size": 0}, ["train.global_batch_size is 0"]),
        ({"train__num_steps": 0}, ["train.num_steps is 0"]),
        # phases
        ({"train__phases": PHASES[1:]}, ["train.phases", "[999]", "the first must start from 0"]),
        ({"train__phases": phases(from_tokens=0)}, ["train.phases", "[0, 0]"]),
        ({"train__phases": phases(seq_len=66), "mesh__cp": 2}, ["train.seq_len 66", "mesh.cp 2"]),
        ({"train__phases": phases(global_batch_size=6), "mesh__dp": 4}, ["train.global_batch_size 6", "mesh.dp 4"]),
        ({"train__phases": phases(num_micro_batches=5)}, ["train.global_batch_size 8", "train.num_micro_batches 5"]),
        # names
        ({"model__name": "llama-tinny"}, ["model.name 'llama-tinny'", "llama-tiny", "llama3-405b"]),
        ({"train__remat": "full"}, ["train.remat is 'full'", "none, attention, layer"]),
        ({"train__gather": "never"}, ["train.gather is 'never'", "step, layer"]),
        ({"train__attention": "flash"}, ["train.attention", "'flash'", "dense", "blockwise"]),
        ({"train__attention": "cudnn"}, ["train.attention", "cudnn"]),
        ({"train__attention": "tokamax"}, ["train.attention", "tokamax"]),
        ({"train__compute_dtype": "float16"}, ["train.compute_dtype is 'float16'", "auto, float32, bfloat16"]),
        # the model
        ({"model__num_heads": 3}, ["model.num_heads 3", "model.num_kv_heads 2"]),
        ({"model__head_dim": 15}, ["model.head_dim 15", "even"]),
        ({"model__num_layers": 0}, ["model.num_layers is 0"]),
        # the rest
        ({"eval__every_steps": 0}, ["eval.every_steps is 0"]),
        ({"eval__num_batches": 0}, ["eval.num_batches is 0"]),
        ({"log__every_steps": 0}, ["log.every_steps is 0"]),
        ({"checkpoint__keep": 0}, ["checkpoint.keep is 0"]),
        ({"seed": -1}, ["seed is -1"]),
        ({"workdir": ""}, ["workdir is empty"]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items() if k != "train__phases") if isinstance(value, dict) else "",
)  # fmt: skip
def test_refused(overrides, words):
    with pytest.raises(UserError) as error:
        build(**overrides)
    text = str(error.value)
    assert all(word in text for word in words), text
    assert "\n" not in text and not text.endswith(".") and ". " not in text, f"not one sentence: {text}"


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"mesh__tp": 2, "mesh__cp": 2, "mesh__pp": 2},
        {"mesh__pp": 8},  # more ranks than layers
        {"mesh__dp": 8},
        {"mesh__cp": 8, "train__seq_len": 48},
        {"mesh__tp": 2, "model__vocab_size": 257},
        {"train__phases": phases(), "train__seq_len": 33, "mesh__cp": 2},  # phases replace seq_len
    ],
    ids=str,
)
def test_accepted(overrides):
    steps = build(**overrides)
    assert steps.compute_dtype == jnp.float32  # auto on a CPU


def test_chosen_names_arrive():
    steps = build(train__compute_dtype="bfloat16", train__remat="layer", train__gather="layer", optimizer__clip_norm=0.5)
    assert (steps.compute_dtype, steps.gather, steps.optimizer.clip_norm) == (jnp.bfloat16, "layer", 0.5)


def test_phases_take_micro_batches_of_train_unless_they_have_their_own():
    train = config(train__phases=phases(num_micro_batches=4), train__num_micro_batches=2).train
    assert [phase.num_micro_batches for phase in train.ramp.phases] == [2, 4]
    assert [phase.seq_len for phase in train.ramp.phases] == [32, 64]
    assert len(config().train.ramp.phases) == 1


def changed(**overrides):
    return contradictions(to_dict(config()), to_dict(config(**overrides)), tokens=0)


def test_the_config_of_an_earlier_checkpoint_is_read():
    """With a field that has become another one, and without one that came later; any other unknown field is an error."""
    run = config(train__num_steps=7)
    saved = to_dict(run)
    saved["train"]["skip_nonfinite"] = True
    del saved["train"]["on_spike"]
    assert parse_saved(saved) == run and not contradictions(saved, to_dict(run), tokens=0)
    saved["model"]["num_heads_of_the_future"] = 3
    with pytest.raises(UserError, match="unknown config key 'model.num_heads_of_the_future'"):
        parse_saved(saved)


def test_contradictions_are_named():
    assert changed(seed=1, model__dim=32, optimizer__b2=0.9, train__seq_len=64, data__sources="data/other") == [
        "data.sources.data/test", "seed", "model.dim", "train.seq_len", "optimizer.b2", "data.sources.data/other",
    ]  # fmt: skip
    assert changed(train__global_batch_size=16) == ["train.global_batch_size"]
    assert changed(train__phases=phases()) == ["train.phases"]
    assert changed(model__rope_scaling={"factor": 2.0}) == ["model.rope_scaling", *[f"model.rope_scaling.{name}" for name in (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position")]]  # fmt: skip


def test_what_a_resume_may_change():
    assert not changed(
        workdir="runs/moved", mesh__tp=2, mesh__cp=2, mesh__dp=2, train__num_steps=5, train__num_micro_batches=2,
        train__remat="layer", train__gather="layer", train__attention="dense", train__compute_dtype="float32",
        train__on_spike="skip", eval__every_steps=3, log__every_steps=7, checkpoint__every_steps=2, checkpoint__keep=1,
    )  # fmt: skip


def test_a_resume_may_change_the_micro_batches_of_phases():
    saved, run = (to_dict(config(train__phases=phases(num_micro_batches=n))) for n in (2, 4))
    assert saved != run and not contradictions(saved, run, tokens=0)


def test_the_mixture_may_change_in_what_is_to_come():
    """After 500 tokens: phases from 500 on are free, also in a config that knew of none."""

    def mixed(*starts, weight=1.0):
        return to_dict(config(data={"sources": "data/test", "phases": [{"from_tokens": n, "sources": {"data/test": weight}} for n in starts]}))

    assert not contradictions(mixed(100), mixed(100, 500, 900), tokens=500)
    assert contradictions(mixed(100), mixed(100, 499), tokens=500) == ["data.phases"]
    assert contradictions(mixed(100), mixed(100, weight=2.0), tokens=500) == ["data.phases"]
    assert contradictions(mixed(), mixed(100), tokens=500) == ["data.phases"]
    older = {**mixed(), "data": {name: value for name, value in mixed()["data"].items() if name != "phases"}}
    assert not contradictions(older, mixed(500), tokens=500)


def test_annealing_may_change_while_it_is_to_come():
    """A step has 1024 tokens. Checkpoints that are older than annealing know of none."""

    def annealed(anneal_from, anneal_steps=10):
        return to_dict(config(train__num_steps=100, optimizer__warmup_steps=5, optimizer__anneal_from=anneal_from, optimizer__anneal_steps=anneal_steps))

    tokens = config().train.ramp.tokens_before(100)
    assert not contradictions(annealed(0, 0), annealed(100), tokens)
    assert not contradictions(annealed(100, 5), annealed(200), tokens)
    assert contradictions(annealed(0, 0), annealed(99), tokens) == ["optimizer.anneal_from", "optimizer.anneal_steps"]
    assert contradictions(annealed(99, 5), annealed(99, 6), tokens) == ["optimizer.anneal_steps"]
    older = annealed(0, 0)
    older["optimizer"] = {name: value for name, value in older["optimizer"].items() if not name.startswith("anneal")}
    assert not contradictions(older, annealed(100), tokens) and contradictions(older, annealed(99), tokens)


def test_no_training_at_a_rate_of_zero():
    config(train__num_steps=30, optimizer__anneal_from=20, optimizer__anneal_steps=10, optimizer__warmup_steps=5)
    with pytest.raises(UserError, match="train.num_steps is 31 and the learning rate is 0 from step 30 on"):
        config(train__num_steps=31, optimizer__anneal_from=20, optimizer__anneal_steps=10, optimizer__warmup_steps=5)


def test_a_config_goes_through_a_checkpoint():
    run = config(train__phases=phases(num_micro_batches=2), model__rope_scaling={"factor": 8.0}, mesh__tp=2)
    assert parse(RunConfig, to_dict(run)) == run


def test_flops_of_a_token_by_hand():
    """llama-tiny: 6 FLOPs a weight of a matmul, and attention's two products over half the row on average, three times."""
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128  # q, k and v, out, ffn
    attention = 3 * 2 * 2 * 4 * 16 * (100 / 2)
    assert MODELS["llama-tiny"].flops_per_token(100 / 2) == 6 * (4 * layer + 64 * 512) + 4 * attention


def test_flops_of_the_405b():
    """6 N D of the paper (405e9 x 6), within what attention at 8,192 tokens and the embedding change."""
    assert MODELS["llama3-405b"].flops_per_token(8192 / 2) == pytest.approx(6 * 405e9, rel=0.05)
