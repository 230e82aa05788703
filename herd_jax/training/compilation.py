"""Compiled programs kept on disk, so that a restarted run does not compile again (jax's persistent compilation cache)."""

import contextlib
import platform
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def kept_compilations(workdir: Path, enabled: bool) -> Iterator[None]:
    """Keeps compiled programs under WORKDIR/compilation_cache, which all processes share: jax has process 0 write, and all of them read.
    Several CPU devices use none: a program that XLA's CPU backend loads from a cache runs its collectives in an order that may differ between
    devices (jaxlib 0.10.2). Those of one process then wait for each other until XLA gives up; between processes, gloo takes one collective's
    message for another's, and ends the process.

    A cache that JAX_COMPILATION_CACHE_DIR already names is used instead.
    """
    kind = jax.default_backend()
    if kind == "cpu" and jax.device_count() > 1:
        settings = {"jax_enable_compilation_cache": False}
    elif enabled and jax.config.jax_compilation_cache_dir is None:
        settings = {"jax_compilation_cache_dir": str(workdir.absolute() / "compilation_cache" / (_cpu() if kind == "cpu" else kind))}
    else:
        yield
        return
    before = {name: getattr(jax.config, name) for name in settings}
    _set(settings)
    try:
        yield
    finally:
        _set(before)


def _set(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # jax looks at these only once


def _cpu() -> str:
    """Returns a name for the processor's set of instructions: jax would load a program compiled for another set, and crash."""
    try:
        features = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"cpu-{zlib.crc32(features.encode()):08x}"
