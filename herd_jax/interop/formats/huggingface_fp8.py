"""What config.json says of an FP8 model: `quantization_config` of the kind fbgemm_fp8, as transformers and vLLM read it."""

from pathlib import Path
from typing import Any

from herd_jax.errors import UserError
from herd_jax.models.fp8 import Fp8Config

METHOD = "fbgemm_fp8"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def make(fp8: Fp8Config, num_layers: int) -> dict[str, Any]:
    """Returns `quantization_config`. It has the full names of the modules that are not quantized: vLLM compares only full names."""
    return {
        "quant_method": METHOD,
        "activation_scale_ub": fp8.activation_bound,
        "modules_to_not_convert": [*_not_converted(fp8, num_layers), "lm_head"],
    }


def parse(values: dict[str, Any], num_layers: int, path: Path) -> Fp8Config:
    """Returns the Fp8Config. Raises UserError for another kind, or other modules than the feed-forwards of all layers, or of all but the first
    and the last."""
    if (method := values.get("quant_method")) != METHOD:
        raise UserError(f"{path} has quantization_config of the kind {method}: only {METHOD} is read, so take another copy of the model")
    kept = [f".{name}." for name in values.get("modules_to_not_convert") or ()]
    modules = [f"model.layers.{layer}.{module}" for layer in range(num_layers) for module in _modules()]
    found = {module for module in modules if any(name in f".{module}." for name in kept)}
    for skip_ends in (True, False):
        fp8 = Fp8Config(values.get("activation_scale_ub", 1200.0), skip_ends)
        if found == set(_not_converted(fp8, num_layers)):
            return fp8
    raise UserError(
        f"{path} has modules_to_not_convert other than the attention of all layers, and the feed-forward of none or of the first and the last: "
        "only such FP8 models are read, so quantize an unquantized copy with python -m herd_jax.quantize"
    )


def _not_converted(fp8: Fp8Config, num_layers: int) -> list[str]:
    quantized = fp8.layers(num_layers)
    converts = lambda layer, module: layer in quantized and module.startswith("mlp.")
    return [f"model.layers.{layer}.{module}" for layer in range(num_layers) for module in _modules() if not converts(layer, module)]


def _modules() -> list[str]:
    return [f"self_attn.{name}" for name in ATTENTION] + [f"mlp.{name}" for name in FEED_FORWARD]
