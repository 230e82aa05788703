"""Meta's own code loads what we write and computes the same; what it holds, we read. Runs where torch, llama-models and fairscale are."""

import dataclasses
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from herd_jax.inference.weights import Weights
from herd_jax.interop.load import load_params, open_source
from herd_jax.interop.mesh_reader import MeshReader
from herd_jax.interop.save import save
from herd_jax.models.rope import RopeScaling

torch = pytest.importorskip("torch")
pytest.importorskip("fairscale", reason="Meta's reference model is built on it")
reference = pytest.importorskip("llama_models.llama3.model")
checkpoint = pytest.importorskip("llama_models.checkpoint")
args = pytest.importorskip("llama_models.llama3.args")
parallel = pytest.importorskip("fairscale.nn.model_parallel.initialize")

# 700 tokens are long enough for the scaling of RoPE to be seen. Meta's code scales by 8, whatever params.json says.
CONFIG = dataclasses.replace(
    tiny.CONFIG, dim=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=37, rope_theta=5e5, rope_scaling=RopeScaling(8.0)
)
IDS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 700)


@pytest.fixture(scope="module", autouse=True)
def world_of_one():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel.initialize_model_parallel(1)
    yield
    parallel.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def load_with_meta(directory):
    """As `Llama3.build` does, but in FP32 and without its tokenizer."""
    values = json.loads((directory / "params.json").read_text())
    model_args = args.ModelArgs(max_seq_len=1024, max_batch_size=1, **values)
    tensors = checkpoint.maybe_reshard_state_dict(sorted(directory.glob("*.pth")), n_kv_heads=model_args.n_kv_heads)
    torch.set_default_dtype(torch.float32)  # which the loader changed
    model = reference.Transformer(model_args)
    model.load_state_dict(tensors, strict=True)
    return model


def logits_of_meta(model):
    return model(torch.tensor(IDS)[None], 0)[0].numpy()


def logits_of_ours(params, config):
    rows = {"tokens": IDS[None], "segment_ids": np.ones((1, len(IDS)), np.int32), "positions": np.arange(len(IDS))[None]}
    return np.asarray(tiny.plain_logits(params, rows, config)[0])


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"rope_scaling": None, "num_kv_heads": 4}], ids=str)
def test_our_export_gives_our_logits_in_metas_code(tmp_path, changes):
    config = dataclasses.replace(CONFIG, **changes)
    steps = tiny.make_steps(config=config)
    read = MeshReader(Weights.of(steps.plan.init(0).params, steps.model, steps.layout, jnp.float32))
    save(tmp_path / "meta", "meta", config, read, "float32")
    expected = logits_of_ours(tiny.canonical_params(steps), config)
    np.testing.assert_allclose(logits_of_meta(load_with_meta(tmp_path / "meta")), expected, atol=1e-3)


RANK = """
import json, os, sys
import numpy as np, torch
from fairscale.nn.model_parallel import initialize as parallel
from llama_models.llama3.args import ModelArgs
from llama_models.llama3.model import Transformer

directory, ids, rank, size = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=size)
parallel.initialize_model_parallel(size)
model = Transformer(ModelArgs(max_seq_len=1024, max_batch_size=1, **json.load(open(f"{directory}/params.json"))))
model.load_state_dict(torch.load(f"{directory}/consolidated.{rank:02}.pth", weights_only=True), strict=True)
np.save(f"{directory}/logits.{rank}.npy", model(torch.tensor(ids)[None], 0)[0].numpy())
torch.distributed.barrier()  # a rank that ends while the other still talks to it aborts
parallel.destroy_model_parallel()
torch.distributed.destroy_process_group()
"""


def test_each_rank_of_metas_code_loads_its_own_file(tmp_path):
    config = dataclasses.replace(CONFIG, vocab_size=64, ffn_dim=36)
    steps = tiny.make_steps(config=config, tp=2, pp=2)
    read = MeshReader(Weights.of(steps.plan.init(0).params, steps.model, steps.layout, jnp.float32))
    save(tmp_path / "meta", "meta", config, read, "float32", tp=2)
    command = [sys.executable, "-c", RANK, tmp_path / "meta", json.dumps(IDS.tolist())]
    ranks = [subprocess.Popen([*command, str(rank), "2"]) for rank in range(2)]
    assert [rank.wait(300) for rank in ranks] == [0, 0]
    expected = logits_of_ours(tiny.canonical_params(steps), config)
    for rank in range(2):
        np.testing.assert_allclose(np.load(tmp_path / "meta" / f"logits.{rank}.npy"), expected, atol=1e-3)


def test_what_metas_code_holds_gives_its_logits(tmp_path):
    """With params.json as Meta writes it."""
    values = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 61, "ffn_dim_multiplier": 1.3, "multiple_of": 16,
              "norm_eps": 1e-5, "rope_theta": 5e5, "use_scaled_rope": True}  # fmt: skip
    torch.manual_seed(0)
    model = reference.Transformer(args.ModelArgs(max_seq_len=1024, max_batch_size=1, **values))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    (tmp_path / "params.json").write_text(json.dumps(values))
    torch.save(model.state_dict(), tmp_path / "consolidated.00.pth")
    source = open_source(tmp_path)
    steps = tiny.make_steps(config=source.config)
    params = load_params(source, steps.layout, steps.model.declared, jnp.float32)
    np.testing.assert_allclose(logits_of_ours(params, source.config), logits_of_meta(model), atol=1e-3)
