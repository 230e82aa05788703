"""Models with random parameters, to write and to compare with what is read."""

import ml_dtypes
import numpy as np
import tiny

from herd_jax.interop.formats.mapping import parameters
from herd_jax.interop.load import open_source
from herd_jax.interop.save import save

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)


def random_model(config, dtype=BFLOAT16, seed=0):
    """`read` of a model with random parameters."""
    rng = np.random.default_rng(seed)
    return read_from({name: rng.standard_normal(d.canonical_shape).astype(dtype) for name, d in parameters(config).items()})


def read_from(values):
    """`read` of canonical parameters by name."""
    return lambda name, layer=None: values[name] if layer is None else values[name][layer]


def save_random(path, config=tiny.CONFIG, to="huggingface", dtype=BFLOAT16, **more):
    read = random_model(config, dtype)
    save(path, to, config, read, dtype, **more)
    return read


def assert_same_model(path, config, read, dtype=BFLOAT16):
    source = open_source(path)
    assert source.config == config and source.dtype == dtype
    for name, d in parameters(config).items():
        for layer in d.layers or [None]:
            got = source.read(name, layer)
            assert got.dtype == dtype and got.shape == d.shape
            np.testing.assert_array_equal(got, read(name, layer).astype(dtype), name)
