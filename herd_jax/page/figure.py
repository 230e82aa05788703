"""A file with a drawing: the one place that knows matplotlib may be missing."""

import contextlib
from pathlib import Path

from herd_jax.errors import UserError
from herd_jax.files import user_path


@contextlib.contextmanager
def figure_file(path: str | Path, width: float, height: float):
    """Yields a figure of so many inches, written to `path` (.png or .svg) when the block is left.

    Raises UserError where matplotlib is missing or the file cannot be.
    """
    path = user_path(path)
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"{path} has a suffix that cannot be drawn: choose a file that ends in .png or .svg")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib, which is not installed: pip install -e '.[plot]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    try:
        with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text, to be searched and selected
            figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose a folder that exists and may be written to") from None
