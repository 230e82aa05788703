"""GGUF files, written with the package's own writer: plain and quantized tensors, RoPE in adjacent pairs, its scaling as divisors."""

import dataclasses

import numpy as np
import pytest
import tiny
from random_models import FLOAT32, assert_same_model, random_model

from herd_jax.errors import UserError
from herd_jax.interop.formats.mapping import GGUF, tensor_shapes, walk
from herd_jax.interop.load import open_source
from herd_jax.interop.save import convert
from herd_jax.models.rope import RopeScaling, frequencies
from herd_jax.text.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf")

CONFIG = dataclasses.replace(tiny.CONFIG, dim=32, head_dim=8, ffn_dim=64, init_std=0.02, rope_theta=5e5, rope_scaling=RopeScaling(32.0))


def write(path, config, read, architecture="llama", without=(), quantize=(), **metadata):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(1024)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(metadata.pop("add_head_count_kv", config.num_kv_heads))
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    for key, value in metadata.items():
        getattr(writer, key)(*value if isinstance(value, tuple) else (value,))
    mapping = GGUF.map(config)
    parts = ((mapping[name].pieces, mapping[name].split(read(name, layer))) for name, layer in walk(mapping))
    arrays = [piece.to_file(part) for pair in parts for piece, part in zip(*pair)]
    tensors = {name: array for name, array in zip(tensor_shapes(mapping), arrays) if name not in without}
    if config.rope_scaling:
        scaled = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        tensors["rope_freqs.weight"] = (frequencies(config.head_dim, config.rope_theta, None) / scaled).astype(np.float32)
    for name, array in tensors.items():
        if any(part in name for part in quantize):
            writer.add_tensor(name, gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True, "rope_scaling": None}, {"num_heads": 3, "num_kv_heads": 1}], ids=str)
def test_what_the_writer_writes_is_read(tmp_path, changes):
    config = dataclasses.replace(CONFIG, **changes)
    read = random_model(config, FLOAT32)
    write(tmp_path / "model.gguf", config, read)
    assert_same_model(tmp_path / "model.gguf", config, read, FLOAT32)
    assert_same_model(tmp_path, config, read, FLOAT32)
    assert open_source(tmp_path).context_length == 1024


def test_quantized_tensors_are_dequantized(tmp_path):
    read = random_model(CONFIG, FLOAT32)
    source = open_source(write(tmp_path / "model.gguf", CONFIG, read, quantize=("attn_q.", "ffn_down")))
    for name in ("layers.qkv", "layers.down"):
        got, expected = source.read(name, 2), read(name, 2)
        assert 0 < np.abs(got - expected).max() < 0.02
    np.testing.assert_array_equal(source.read("layers.qkv", 2)[:, :, -2:], read("layers.qkv", 2)[:, :, -2:])


def test_one_number_of_heads_for_each_layer(tmp_path):
    read = random_model(CONFIG, FLOAT32)
    path = write(tmp_path / "model.gguf", CONFIG, read, add_head_count_kv=[CONFIG.num_kv_heads] * CONFIG.num_layers, add_rope_scaling_factor=1.0)
    assert_same_model(path, CONFIG, read, FLOAT32)


def test_a_tokenizer_that_is_not_read_does_not_keep_the_model_from_being_converted(tmp_path, capfd):
    read = random_model(CONFIG, FLOAT32)
    path = write(tmp_path / "model.gguf", CONFIG, read, add_tokenizer_model="gpt2", add_tokenizer_pre="of-tomorrow", add_token_list=["a", "b"])
    assert open_source(path).tokenizer is None
    assert "splits text in the way of-tomorrow, which is not known here" in capfd.readouterr().err
    convert(str(path), str(tmp_path / "herd"))
    load_tokenizer("bytes").save(tmp_path)
    assert open_source(path).tokenizer_path == tmp_path


def test_a_config_beside_the_only_file(tmp_path):
    read = random_model(CONFIG, FLOAT32)
    write(tmp_path / "model.gguf", CONFIG, read)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert_same_model(tmp_path, CONFIG, read, FLOAT32)


def test_refusals(tmp_path):
    read = random_model(CONFIG, FLOAT32)

    def refused(match, config=CONFIG, **changes):
        with pytest.raises(UserError, match=match):
            open_source(write(tmp_path / "model.gguf", config, read, **changes))

    refused("has 8 experts", add_expert_count=8)
    refused("scales RoPE in the way 'linear'", add_rope_scaling_type=gguf.RopeScalingType.LINEAR)
    refused("lacks the tensor blk.1.attn_norm.weight", without=["blk.1.attn_norm.weight"])
    refused("scales RoPE otherwise than Llama 3.1", dataclasses.replace(CONFIG, rope_scaling=RopeScaling(8.0, 1.0, 2.0)))
    refused("has llama.rope.scaling.factor 4.0", add_rope_scaling_factor=4.0)
    refused("has llama.rope.dimension_count 4: only plain Llamas .rope.dimension_count 8", add_rope_dimension_count=4)
    refused("has llama.attention.causal False: only plain Llamas", add_causal_attention=False)
    refused("has llama.attention.sliding_window 512, of which it is not known", add_sliding_window=512)
    refused("has llama.logit_scale 2.0, of which it is not known", add_logit_scale=2.0)
    refused("has llama.rope.scale_linear 4.0", add_float32=("llama.rope.scale_linear", 4.0))
    refused("has a llama.attention.head_count_kv of its own for each layer", add_head_count_kv=[2, 4, 2])
    with pytest.raises(UserError, match="is of the architecture qwen2: only plain Llamas"):
        open_source(write(tmp_path / "qwen.gguf", CONFIG, read, architecture="qwen2"))
    with pytest.raises(UserError, match="holds 2 GGUF files: name one of them"):
        open_source(tmp_path)
    whole = write(tmp_path / "model.gguf", CONFIG, read).read_bytes()
    for size in (10, 300, len(whole) // 2, len(whole) - 100):
        (tmp_path / "model.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match="is truncated or no GGUF file: copy it again"):
            open_source(tmp_path / "model.gguf")
