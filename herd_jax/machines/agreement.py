"""What the processes of a run tell each other: every one of them makes these calls, in the same order."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from herd_jax.errors import UserError


def tell_all(text: str) -> list[str]:
    """Tells all processes a text; returns what each of them told, in their order."""
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(errors="replace"), np.uint8)
    sizes = np.reshape(multihost_utils.process_allgather(np.array(own.size)), -1)
    padded = np.pad(own, (0, int(sizes.max()) + 1 - own.size))
    texts = np.reshape(multihost_utils.process_allgather(padded), (len(sizes), -1))
    return [row[:size].tobytes().decode() for row, size in zip(texts, sizes, strict=True)]


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Runs a block in every process. Where it raises UserError in one of them, it raises in all."""
    failure = None
    try:
        yield
    except UserError as error:
        failure = error
    reasons = tell_all(str(failure) if failure else "")
    if failure:
        raise failure
    for process, reason in enumerate(reasons):
        if reason:
            raise UserError(f"process {process} could not do its part: {reason}")
