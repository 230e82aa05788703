"""Compiled programs kept on disk, so that a restarted run does not compile again (jax's persistent compilation cache)."""

import contextlib
import platform
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def kept_compilations(workdir: Path, enabled: bool) -> Iterator[None]:
    """Keeps compiled programs under WORKDIR/compilation_cache, which all processes share: jax has process 0 write, and all of them read.
    Several processes of CPUs use none: a program that XLA's CPU backend loads from a cache runs its collectives in an order that may differ
    between processes (jaxlib 0.10.2), and over a network gloo then takes one collective's message for another's, and ends the process.

    A cache that JAX_COMPILATION_CACHE_DIR already names is used instead.
    """
    kind = jax.default_backend()
    if kind == "cpu" and jax.process_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
    if not enabled or not jax.config.jax_enable_compilation_cache or jax.config.jax_compilation_cache_dir is not None:
        yield
        return
    jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "compilation_cache" / (_cpu() if kind == "cpu" else kind)))
    compilation_cache.reset_cache()  # jax looks at the directory only once
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


def _cpu() -> str:
    """Returns a name for the processor's set of instructions: jax would load a program compiled for another set, and crash."""
    try:
        features = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"cpu-{zlib.crc32(features.encode()):08x}"
