"""herd_jax: the system of "The Llama 3 Herd of Models" in JAX and Flax."""

__all__ = ["load"]


def load(path, mesh=None, dtype=None):
    """Loads the model at `path`; see `herd_jax.model.load`."""
    from herd_jax import model  # not before it is needed: entry points choose the number of CPU devices first

    return model.load(path, mesh, dtype)
