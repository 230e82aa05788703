"""Files and directories that appear whole or not at all, and the paths that a user gives.

What is being written has another name, which ends in `.unfinished`, beside the one that it gets at the end. So whatever has its own name is
whole, also after a crash, and the next attempt writes over what a killed one left.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from herd_jax.errors import UserError

UNFINISHED = ".unfinished"
_POINTER = b"version https://git-lfs.github.com/spec/"


def user_path(path: str | os.PathLike) -> Path:
    """Returns the path that a user means: `~` is the home directory. Raises UserError where `~NAME` is nobody's."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} names a home directory that does not exist: write the path out, or begin it with ./") from error


def refuse_pointer(path: Path) -> None:
    """Raises UserError where a file is only the pointer that Git LFS leaves in its place."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{path} is a pointer of Git LFS in place of the file: fetch it with git lfs pull, or download the file")


def unfinished(path: Path, shared: bool = False) -> Path:
    """Returns the name under which `path` is written; where it is `shared`, it is this process's own."""
    return path.with_name(path.name + (f".{os.uname().nodename}.{os.getpid()}" if shared else "") + UNFINISHED)


@contextlib.contextmanager
def whole_file(
    path: Path, mode: str = "wb", *, encoding: str | None = None, errors: str | None = None, sync: bool = False, shared: bool = False
) -> Iterator[IO]:
    """Opens a file that gets its name when the block ends well, and is removed when it does not. Makes its directory.

    `sync`: the name waits until the data is on the disk, for what a power cut must not take. `shared`: other processes may write the same
    file at the same time. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    under_way = unfinished(path, shared)
    try:
        with under_way.open(mode, encoding=encoding, errors=errors) as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        under_way.replace(path)
    except BaseException:
        under_way.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str, *, sync: bool = False) -> Path:
    """Writes a whole file in UTF-8 (half an emoji becomes "?"). Raises UserError where it cannot be written."""
    try:
        with whole_file(path, "w", encoding="utf-8", errors="replace", sync=sync) as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): make room and see that its directory may be written to") from error
    return path


@contextlib.contextmanager
def whole_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Makes a directory to fill, which becomes `path` when the block ends well, and is removed when it does not.

    Raises OSError, also where `path` exists by then and `overwrite` does not allow to replace it.
    """
    directory = unfinished(path)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        yield directory
        if overwrite:
            shutil.rmtree(path, ignore_errors=True)
        directory.rename(path)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
