"""The house has floors: a module imports from lower floors and from its own room, never upward, and no modules import in a circle."""

import ast
import graphlib
from pathlib import Path

import pytest

import herd_jax

ROOT = Path(herd_jax.__file__).parent

# From the ground up; rooms of one floor do not import from each other. What is not named here is a command, on top of all.
FLOORS = (
    ("errors",),
    ("files",),
    ("page",),
    ("config", "text"),
    ("mesh",),
    ("machines",),
    ("reliability", "sandbox"),
    ("parallel",),
    ("models", "data"),
    ("training", "inference"),
    ("planning", "interop", "curation"),
    ("model",),
    ("evaluation", "post_training", "serving"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
COMMANDS = len(FLOORS)
LATE = {"herd_jax": {"herd_jax.model"}}  # `herd_jax.load` imports it when it is called: entry points choose the number of devices before


def modules() -> dict[str, Path]:
    paths = {".".join(("herd_jax", *path.relative_to(ROOT).with_suffix("").parts)): path for path in sorted(ROOT.rglob("*.py"))}
    return {name.removesuffix(".__init__"): path for name, path in paths.items()}


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the house that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known else node.module)
    return {module for module in found if module in known} - LATE.get(name, set())


GRAPH = {name: imports(name, path, modules()) for name, path in modules().items()}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("name", GRAPH)
def test_a_module_imports_from_lower_floors_and_its_own_room_only(name):
    own = FLOOR_OF.get(room(name), COMMANDS)
    for imported in GRAPH[name]:
        if room(imported) != room(name):
            assert FLOOR_OF.get(room(imported), COMMANDS) < own, f"{name} imports {imported}, which is not below it"


def test_no_modules_import_each_other_in_a_circle():
    tuple(graphlib.TopologicalSorter(GRAPH).static_order())  # raises CycleError, which names the circle


def test_every_floor_has_its_rooms():
    """A room that is gone or misspelt here would be checked no more."""
    there = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert FLOOR_OF.keys() <= there
