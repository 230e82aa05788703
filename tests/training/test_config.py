"""The configuration of a run: every combination that cannot work is refused in one sentence that names its fields."""

import jax
import jax.numpy as jnp
import pytest
from run_configs import PHASES, config, phases

from herd_jax.config import parse, to_dict
from herd_jax.errors import UserError
from herd_jax.mesh import make_mesh
from herd_jax.models.config import MODELS
from herd_jax.training.config import RunConfig, build_steps
from herd_jax.training.next_token import NEXT_TOKEN


def build(**overrides):
    run = config(**overrides)
    num_devices = run.mesh.tp * run.mesh.cp * run.mesh.pp * run.mesh.dp
    return build_steps(run, make_mesh(run.mesh, jax.devices()[:num_devices]), NEXT_TOKEN)


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
