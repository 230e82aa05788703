"""The files that globs, files and directories name."""

import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from herd_jax.errors import UserError
from herd_jax.files import user_path


def find_files(sources: Sequence[str], leave_out: Path) -> list[Path]:
    """Returns the files that globs, files and directories (everything below) name: sorted, each once, not hidden, not under `leave_out`.

    Raises UserError where a source names no file.
    """
    found: dict[str, Path] = {}
    for source in sources:
        pattern = str(user_path(source))
        if os.path.isdir(pattern):
            pattern = os.path.join(glob.escape(pattern), "**")
        elif os.path.exists(pattern):
            pattern = glob.escape(pattern)
        files = {os.path.realpath(name): Path(name) for name in sorted(_expand(pattern))}
        if not files:
            raise UserError(f"source {source} matches no files: name files, directories or quoted globs such as 'texts/**/*.txt'")
        found = files | found
    inside = os.path.realpath(leave_out) + os.sep
    return sorted(path for real, path in found.items() if not real.startswith(inside))


def _expand(pattern: str) -> Iterator[str]:
    """Yields the files that a glob names, as `glob.iglob` does, but in links that lead back it goes round once."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        yield from filter(os.path.isfile, glob.iglob(pattern))
        return
    first = parts.index("**")
    for root in glob.iglob(os.sep.join(parts[:first]) + os.sep) if first else [""]:
        yield from _walk(root, [*parts[first:], *(["*"] if parts[-1] == "**" else [])])


def _walk(root: str, parts: list[str]) -> Iterator[str]:
    """Yields the files below a directory whose path from there has these parts, of which "**" is any number of directories."""
    rules = [None if part == "**" else re.compile(fnmatch.translate(part)) for part in parts]

    def after(places: frozenset[int], name: str) -> frozenset[int]:
        """Returns the numbers of the parts that may come next, if those in `places` might have come now."""
        found = set()
        for place in _with_none(places, rules):
            is_hidden = name.startswith(".") and not parts[place].startswith(".")
            if not is_hidden and (rules[place] is None or rules[place].match(name)):
                found.add(place if rules[place] is None else place + 1)
        return frozenset(found)

    left, links, visited = [(root, frozenset([0]))], [], set()
    while left or links:
        directory, places = left.pop() if left else links.pop()  # links last, so that a directory is met under its own name
        mark = (os.path.realpath(directory or "."), places)
        if mark in visited:
            continue
        visited.add(mark)
        try:
            entries = sorted(os.scandir(directory or "."), key=lambda entry: entry.name)
        except OSError:  # it cannot be read
            continue
        for entry in entries:
            path, following = os.path.join(directory, entry.name), after(places, entry.name)
            if following and entry.is_dir():
                (links if entry.is_symlink() else left).append((path, following))
            elif len(parts) in following and entry.is_file():
                yield path


def _with_none(places: frozenset[int], rules: list) -> set[int]:
    """Returns the places, and those after each "**" that stands for no directory."""
    found = set(places) - {len(rules)}
    for place in sorted(found):
        while place < len(rules) - 1 and rules[place] is None:
            place += 1
            found.add(place)
    return found
