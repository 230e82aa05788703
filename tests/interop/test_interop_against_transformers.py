"""What we write, transformers loads and computes the same from; what it writes, we read. Runs where torch and transformers are installed: `.[peer]`."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from herd_jax.interop.load import load_params, open_source
from herd_jax.interop.mapping import parameters
from herd_jax.interop.save import save
from herd_jax.models.rope import RopeScaling

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GRID = [
    dataclasses.replace(tiny.CONFIG, dim=36, num_heads=n, num_kv_heads=k, head_dim=h, ffn_dim=f, tie_embeddings=tied, rope_scaling=scaling, rope_theta=5e5)
    for (n, k, h, f), tied, scaling in [
        ((6, 2, 10, 52), False, RopeScaling(8.0, 1.0, 4.0, 16)),
        ((4, 4, 6, 33), True, RopeScaling(32.0, 1.0, 4.0, 16)),
        ((3, 1, 8, 48), False, None),
    ]
]  # fmt: skip
IDS = np.random.default_rng(0).integers(0, tiny.CONFIG.vocab_size, 24)


def our_logits(path, ids=IDS):
    """FP32 [S, V], by the plain forward."""
    source = open_source(path)
    steps = tiny.make_steps(config=source.config)
    params = load_params(source, steps.layout, steps.model.declared, jnp.float32)
    rows = {"tokens": ids[None], "segment_ids": np.ones((1, len(ids)), np.int32), "positions": np.arange(len(ids))[None]}
    return np.asarray(tiny.plain_logits(params, rows, source.config)[0])


def peer_logits(model, ids=IDS):
    with torch.no_grad():
        return model(torch.tensor(ids)[None]).logits[0].numpy()


@pytest.mark.parametrize("config", GRID)
def test_our_export_gives_our_logits_in_transformers(tmp_path, config):
    steps = tiny.make_steps(config=config)
    canonical = tiny.canonical_params(steps)

    def read(name, layer):
        leaf = canonical
        for key in name.split("."):
            leaf = leaf[key]
        return leaf if layer is None else leaf[layer]

    save(tmp_path / "hf", "huggingface", config, read, "float32")
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert model.dtype == torch.float32 and not any(loading.values())
    np.testing.assert_allclose(our_logits(tmp_path / "hf"), peer_logits(model), atol=1e-4)


@pytest.mark.parametrize("config", GRID)
def test_what_transformers_saves_gives_its_logits(tmp_path, config):
    save(tmp_path / "hf", "huggingface", config, lambda name, layer: np.zeros(parameters(config)[name].shape, np.float32), "float32")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path / "hf"), dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    np.testing.assert_allclose(our_logits(tmp_path / "theirs"), peer_logits(model), atol=1e-4)
