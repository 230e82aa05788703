"""The whole model against Hugging Face's, in FP32, with odd sizes and scaled RoPE. Runs where torch and transformers are installed: `.[peer]`."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from herd_jax.models.rope import RopeScaling

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim", [(6, 2, 10), (4, 4, 6), (3, 1, 8)])
def test_loss_and_gradients(num_heads, num_kv_heads, head_dim, tie_embeddings):
    c = dataclasses.replace(
        tiny.CONFIG, dim=36, ffn_dim=52, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, rope_theta=5e5,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16), tie_embeddings=tie_embeddings,
    )  # fmt: skip
    steps, rows = tiny.make_steps(config=c, attention="blockwise"), tiny.make_rows(max_documents=1)
    rows["loss_mask"][:] = True
    loss, gradient = tiny.loss_and_gradient(steps, rows, 2)

    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.num_layers,
            num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, head_dim=head_dim, rms_norm_eps=c.norm_eps,
            rope_theta=c.rope_theta, max_position_embeddings=128, tie_word_embeddings=tie_embeddings,
            rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 16},
        )
    )  # fmt: skip
    peer.load_state_dict({k: torch.tensor(v) for k, v in to_transformers(tiny.canonical_params(steps), c).items()}, strict=not tie_embeddings)
    logits = peer(input_ids=torch.tensor(rows["tokens"]).long()).logits
    peer_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(rows["targets"]).long().flatten())
    peer_loss.backward()

    assert loss == pytest.approx(peer_loss.item(), rel=1e-6)
    ours = to_transformers(gradient, c)
    tiny.assert_close({k: p.grad.numpy() for k, p in peer.named_parameters()}, {k: ours[k] for k, _ in peer.named_parameters()})


def to_transformers(params, c) -> dict[str, np.ndarray]:
    """Canonical parameters, or their gradient, by Hugging Face's names and shapes."""
    ends, layers, group = params["ends"], params["layers"], c.num_heads // c.num_kv_heads
    named = {"model.embed_tokens.weight": ends["embed"]["table"], "model.norm.weight": ends["head"]["norm"]}
    if not c.tie_embeddings:
        named["lm_head.weight"] = ends["head"]["output"].T
    for i in range(c.num_layers):
        w = jax.tree.map(lambda leaf: leaf[i], layers)
        split = {"q": w["qkv"][:, :, :group], "k": w["qkv"][:, :, group], "v": w["qkv"][:, :, group + 1]}
        named |= {f"model.layers.{i}.self_attn.{name}_proj.weight": part.reshape(c.dim, -1).T for name, part in split.items()}
        named |= {
            f"model.layers.{i}.self_attn.o_proj.weight": w["out"].reshape(-1, c.dim).T,
            f"model.layers.{i}.mlp.gate_proj.weight": w["gate_up"][:, 0].T,
            f"model.layers.{i}.mlp.up_proj.weight": w["gate_up"][:, 1].T,
            f"model.layers.{i}.mlp.down_proj.weight": w["down"].T,
            f"model.layers.{i}.input_layernorm.weight": w["attention_norm"],
            f"model.layers.{i}.post_attention_layernorm.weight": w["ffn_norm"],
        }
    return {name: np.ascontiguousarray(array) for name, array in named.items()}
