"""The lock of a run of several processes: process 0 takes it, and all of them learn whether it could."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from herd_jax.errors import Occupied, UserError
from herd_jax.reliability.lock import only_writer


@contextlib.contextmanager
def only_run(directory: Path) -> Iterator[None]:
    """Holds the directory for a run, all of whose processes make this call. Raises on each of them as `only_writer` does."""
    with contextlib.ExitStack() as stack:
        refusal = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(only_writer(directory))
            except UserError as error:
                refusal = error
        if bool(multihost_utils.broadcast_one_to_all(np.array(refusal is not None))):
            raise refusal or Occupied(f"process 0 cannot have {directory} for itself: it says why")
        yield
