"""Quantizing to FP8: which tensors change, how both formats name them, and what is refused."""

import dataclasses
import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import tiny
from random_models import BFLOAT16, FLOAT32, random_model, read_from, save_random

from herd_jax.errors import UserError
from herd_jax.interop.formats import meta
from herd_jax.interop.formats.mapping import parameters
from herd_jax.interop.formats.safetensors import SafetensorsFiles, write_safetensors
from herd_jax.interop.initial import InitialWeights
from herd_jax.interop.load import open_source
from herd_jax.interop.operations.average import average
from herd_jax.interop.operations.quantize import quantize
from herd_jax.interop.save import convert, save
from herd_jax.models.fp8 import Fp8Config, quantize_rowwise

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
MIDDLE = range(1, tiny.CONFIG.num_layers - 1)


def files(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def tensors(directory):
    opened = SafetensorsFiles([directory / "model.safetensors"])
    return {name: np.array(opened.read(name)) for name in opened.shapes}


@pytest.fixture
def model(tmp_path):
    save_random(tmp_path / "hf")
    return tmp_path / "hf"


def test_three_matrices_of_each_middle_layer_change_and_nothing_else(model, tmp_path):
    quantize(model, tmp_path / "fp8", "huggingface")
    plain, found = tensors(model), tensors(tmp_path / "fp8")
    changed = {name for name, tensor in found.items() if tensor.dtype == E4M3}
    assert changed == {f"model.layers.{i}.mlp.{m}_proj.weight" for i in MIDDLE for m in ("gate", "up", "down")}
    assert set(found) == set(plain) | {f"{name}_scale" for name in changed}
    for name, tensor in plain.items():
        if name not in changed:
            assert found[name].dtype == BFLOAT16
            np.testing.assert_array_equal(found[name].view(np.uint16), tensor.view(np.uint16), name)
            continue
        values, scales = quantize_rowwise(tensor)  # [out, in], as the file has it
        np.testing.assert_array_equal(found[name].view(np.uint8), np.asarray(values).view(np.uint8), name)
        assert found[f"{name}_scale"].shape == (len(tensor), 1) and found[f"{name}_scale"].dtype == FLOAT32
        np.testing.assert_array_equal(found[f"{name}_scale"][:, 0], scales)


def test_the_config_is_what_transformers_and_vllm_read(model, tmp_path):
    quantize(model, tmp_path / "fp8", "huggingface")
    values = json.loads((tmp_path / "fp8" / "config.json").read_text())
    plain = json.loads((model / "config.json").read_text())
    quantization = values.pop("quantization_config")
    assert values == plain
    kept = quantization.pop("modules_to_not_convert")
    assert quantization == {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    assert {f"model.layers.{i}.self_attn.{name}_proj" for i in range(5) for name in "qkvo"} < set(kept) and "lm_head" in kept
    assert [name for name in kept if "mlp" in name] == [f"model.layers.{i}.mlp.{m}_proj" for i in (0, 4) for m in ("gate", "up", "down")]


def test_transformers_names_the_tensors_alike():
    """Its linear layer for FBGEMM has these parameters, and its config these fields."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.FbgemmFp8Config(activation_scale_ub=1200.0, modules_to_not_convert=["lm_head"])
    assert {"quant_method", "activation_scale_ub", "modules_to_not_convert"} <= set(config.to_dict())
    linear = __import__("transformers.integrations.fbgemm_fp8", fromlist=["FbgemmFp8Linear"]).FbgemmFp8Linear(8, 6, bias=False)
    shapes = {name: tuple(value.shape) for name, value in [*linear.named_parameters(), *linear.named_buffers()]}
    assert shapes["weight"] == (6, 8) and shapes["weight_scale"] == (6, 1)


def test_formats_round_trip(model, tmp_path):
    quantize(model, tmp_path / "ours")
    quantize(model, tmp_path / "hf8", "huggingface")
    convert(tmp_path / "ours", tmp_path / "again", "huggingface")
    assert files(tmp_path / "again") == files(tmp_path / "hf8")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "hf8" / "config.json").read_text()
    convert(tmp_path / "hf8", tmp_path / "ours-again")
    assert files(tmp_path / "ours-again") == files(tmp_path / "ours")
    ours, theirs = open_source(tmp_path / "ours"), open_source(tmp_path / "hf8")
    assert ours.config == theirs.config == dataclasses.replace(tiny.CONFIG, fp8=Fp8Config())
    assert ours.dtype == theirs.dtype == BFLOAT16
    for name, declaration in parameters(ours.config).items():
        for layer in declaration.layers or [None]:
            a, b = ours.read(name, layer), theirs.read(name, layer)
            assert a.dtype == b.dtype and a.shape == declaration.shape and a.tobytes() == b.tobytes(), name


def test_other_bounds_and_layers_are_read(model, tmp_path):
    quantize(model, tmp_path / "fp8", "huggingface")
    path = tmp_path / "fp8" / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"]["activation_scale_ub"] = 800.0
    path.write_text(json.dumps(values))
    assert open_source(tmp_path / "fp8").config.fp8 == Fp8Config(activation_bound=800.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "quantization_config of the kind awq: only fbgemm_fp8 is read"),
        ({"modules_to_not_convert": ["lm_head"]}, "modules_to_not_convert other than the attention of all layers"),
        (None, "is stored as float8_e4m3fn and its config says otherwise"),
    ],
)
def test_other_quantization_is_refused(model, tmp_path, change, message):
    quantize(model, tmp_path / "fp8", "huggingface")
    path = tmp_path / "fp8" / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"] = values["quantization_config"] | change if change else None
    if not change:
        kept = {name: tensor for name, tensor in tensors(tmp_path / "fp8").items() if not name.endswith("_scale")}  # they would be named first
        write_safetensors(tmp_path / "fp8", {n: t.shape for n, t in kept.items()}, {n: t.dtype for n, t in kept.items()}, lambda _: iter(kept.values()))
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "fp8")


def test_what_cannot_be_quantized_or_used_so_is_one_sentence(model, tmp_path):
    quantize(model, tmp_path / "fp8")
    with pytest.raises(UserError, match="is quantized to FP8 already: give the model that it was made from"):
        quantize(tmp_path / "fp8", tmp_path / "twice")
    with pytest.raises(UserError, match="init_from .* is quantized to FP8, and such weights are not trained"):
        InitialWeights.open(str(tmp_path / "fp8"))
    with pytest.raises(UserError, match="is quantized to FP8, and such weights are not averaged"):
        average([tmp_path / "fp8", tmp_path / "fp8"], tmp_path / "mean")
    with pytest.raises(UserError, match="Meta's format says nothing of which layers are FP8"):
        meta.make_config(open_source(tmp_path / "fp8").config)
    small = dataclasses.replace(tiny.CONFIG, num_layers=2)
    save_random(tmp_path / "small", small)
    with pytest.raises(UserError, match="num_layers is 2 and the first and the last are never FP8"):
        quantize(tmp_path / "small", tmp_path / "none")
    read = random_model(tiny.CONFIG, FLOAT32)
    values = {name: np.stack([read(name, i) for i in range(5)]) if d.layers else read(name) for name, d in parameters(tiny.CONFIG).items()}
    values["layers.down"][2, 3, 4] = np.nan
    save(tmp_path / "damaged", "herd", tiny.CONFIG, read_from(values), FLOAT32)
    with pytest.raises(UserError, match="layers.down of layer 2 in .*damaged is not finite"):
        quantize(tmp_path / "damaged", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists() and not (tmp_path / "twice").exists()


def test_the_command(model, tmp_path):
    arguments = ["--source", str(model), "--target", str(tmp_path / "fp8"), "--to", "huggingface"]
    done = subprocess.run([sys.executable, "-m", "herd_jax.quantize", *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.endswith(f"wrote {tmp_path / 'fp8'}\n")
    assert open_source(tmp_path / "fp8").config.fp8 == Fp8Config()
