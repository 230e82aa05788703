"""Config reading: files, overrides, coercion by type, and one clear sentence for each wrong input."""

import dataclasses
import json
import math

import pytest
import run_configs
from hypothesis import given
from hypothesis import strategies as st

from herd_jax.config import NOT_GIVEN, NotGiven, differences, number, parse, read_command_line, to_dict
from herd_jax.config.help import field_comments
from herd_jax.config.values import sections_of
from herd_jax.curation.settings import CurationConfig
from herd_jax.errors import UserError
from herd_jax.training.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Phase:
    tokens: float
    batch: int = 8


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Sizes of the mesh. And more of it."""

    tp: int = 1  # devices that share a matrix
    cp: int = 1

    def __post_init__(self):
        if self.tp < 1:
            raise UserError(f"mesh.tp is {self.tp}: set it to 1 or more")


@dataclasses.dataclass(frozen=True)
class Data:
    sources: dict[str, float]
    tokenizer: str = "bytes"
    packed: bool = True


@dataclasses.dataclass(frozen=True)
class Optimizer:
    weight_decay: float = 0.1
    phases: tuple[Phase, ...] = ()
    sizes: tuple[int, ...] = (1, 2)
    seq_len: int | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    workdir: str
    data: Data
    mesh: Mesh = Mesh()
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    scaling: Phase | None = None


MINIMAL = {"workdir": "w", "data": {"sources": {"a": 1}}}


def with_value(key, value):
    """MINIMAL with the dotted key set."""
    mapping = {section: dict(item) if isinstance(item, dict) else item for section, item in MINIMAL.items()}
    *sections, name = key.split(".")
    node = mapping
    for section in sections:
        node = node.setdefault(section, {})
    return {**mapping, name: value} if not sections else node.update({name: value}) or mapping


def value_of(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return config


def test_defaults_fill_a_partial_mapping():
    assert parse(Run, MINIMAL) == Run("w", Data({"a": 1.0}))


@pytest.mark.parametrize(
    "key, given, expected",
    [
        ("mesh.tp", "2", 2),
        ("mesh.tp", "1e6", 1_000_000),
        ("mesh.tp", "16_777_216", 16_777_216),
        ("mesh.tp", 4.0, 4),
        ("optimizer.weight_decay", "3e-4", 3e-4),
        ("optimizer.weight_decay", 1, 1.0),
        ("data.packed", "false", False),
        ("data.packed", "True", True),
        ("data.tokenizer", "12", "12"),
        ("optimizer.seq_len", "none", None),
        ("optimizer.seq_len", None, None),
        ("optimizer.seq_len", "128", 128),
        ("optimizer.sizes", "1, 2,3", (1, 2, 3)),
        ("optimizer.sizes", "(4,)", (4,)),
        ("optimizer.sizes", [5.0, "6"], (5, 6)),
        ("optimizer.sizes", "", ()),
        ("optimizer.phases", "[{'tokens': 1e9}, {'tokens': 2, 'batch': 16}]", (Phase(1e9), Phase(2.0, 16))),
        ("optimizer.phases", [Phase(1.0), {"tokens": "2e3"}], (Phase(1.0), Phase(2000.0))),
        ("data.sources", "text/a.bin", {"text/a.bin": 1.0}),
        ("data.sources", "a:0.3,/b c/d:0.7", {"a": 0.3, "/b c/d": 0.7}),
        ("data.sources", "gs://bucket/a:2,other", {"gs://bucket/a": 2.0, "other": 1.0}),
        ("data.sources", "{'x:1': 0.5}", {"x:1": 0.5}),
        ("mesh", "{'tp': 2}", Mesh(tp=2)),
        ("scaling", {"tokens": 3}, Phase(3.0)),
    ],
)
def test_values_become_their_fields_type(key, given, expected):
    value = value_of(parse(Run, with_value(key, given)), key)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "key, given, message",
    [
        ("mesh.tp", "two", "config key 'mesh.tp' must be int, got 'two' (str)"),
        ("mesh.tp", 1.5, "config key 'mesh.tp' must be int, got 1.5 (float)"),
        ("mesh.tp", True, "config key 'mesh.tp' must be int, got True (bool)"),
        ("mesh.tp", "inf", "config key 'mesh.tp' must be int, got 'inf' (str)"),
        ("mesh.tp", None, "config key 'mesh.tp' must be int, got None (NoneType)"),
        ("optimizer.weight_decay", False, "config key 'optimizer.weight_decay' must be float, got False (bool)"),
        ("optimizer.seq_len", "x", "config key 'optimizer.seq_len' must be int | None, got 'x' (str)"),
        ("optimizer.sizes", "1,b", "config key 'optimizer.sizes' must be tuple[int, ...], got '1,b' (str)"),
        ("optimizer.phases", [3], "config key 'optimizer.phases' must be tuple[Phase, ...], got [3] (list)"),
        ("optimizer.phases", [{"batch": 1}], "config key 'optimizer.phases[0].tokens' is required"),
        (
            "optimizer.phases",
            [{"tokens": 1, "bach": 1}],
            "unknown config key 'optimizer.phases[0].bach': did you mean 'optimizer.phases[0].batch'?",
        ),
        ("data.sources", {"a": "b"}, "config key 'data.sources' must be dict[str, float], got {'a': 'b'} (dict)"),
        ("data.packed", 1, "config key 'data.packed' must be bool, got 1 (int)"),
        ("workdir", 3, "config key 'workdir' must be str, got 3 (int)"),
        ("mesh", 3, "config key 'mesh' must be Mesh, got 3 (int)"),
        ("mesh.tp", 0, "mesh.tp is 0: set it to 1 or more"),
        ("mesh.tq", 1, "unknown config key 'mesh.tq': did you mean 'mesh.tp'?"),
        ("mehs.tp", 1, "unknown config key 'mehs': did you mean 'mesh'?"),
        ("mesh.weight_decay", 1, "unknown config key 'mesh.weight_decay': did you mean 'optimizer.weight_decay'?"),
        ("optimizer.cp", 1, "unknown config key 'optimizer.cp': did you mean 'mesh.cp'?"),
        ("weight_decay", 1, "unknown config key 'weight_decay': did you mean 'optimizer.weight_decay'?"),
        ("zzzz", 1, "unknown config key 'zzzz': the keys are workdir, data, mesh"),
    ],
)
def test_wrong_keys_and_values_are_named(key, given, message):
    with pytest.raises(UserError) as error:
        parse(Run, with_value(key, given))
    assert str(error.value).startswith(message)


def test_missing_required_keys_are_named():
    with pytest.raises(UserError, match="^config key 'workdir' is required.*--config.workdir=VALUE$"):
        parse(Run, {"data": {"sources": "a"}})
    with pytest.raises(UserError, match="^config key 'data.sources' is required"):
        parse(Run, {"workdir": "w"})


@dataclasses.dataclass(frozen=True)
class Ramp:
    phases: tuple[Phase, ...]


def test_a_missing_tuple_of_sections_is_named():
    with pytest.raises(UserError, match="^config key 'phases' is required"):
        parse(Ramp, {})


def test_path_starts_the_names():
    with pytest.raises(UserError, match="unknown config key 'run.mesh.tq': did you mean 'run.mesh.tp'"):
        parse(Run, with_value("mesh.tq", 1), path="run")


@given(
    st.builds(
        Run,
        workdir=st.text(),
        data=st.builds(
            Data, sources=st.dictionaries(st.text(min_size=1), st.floats(0, 1)), tokenizer=st.text(), packed=st.booleans()
        ),
        mesh=st.builds(Mesh, tp=st.integers(1, 10**9), cp=st.integers()),
        optimizer=st.builds(
            Optimizer,
            weight_decay=st.floats(allow_nan=False),
            phases=st.lists(st.builds(Phase, tokens=st.floats(0, 1), batch=st.integers())).map(tuple),
            sizes=st.lists(st.integers()).map(tuple),
            seq_len=st.none() | st.integers(),
        ),
        scaling=st.none() | st.builds(Phase, tokens=st.floats(0, 1)),
    )
)
def test_a_config_survives_its_dict_as_json(config):
    written = json.loads(json.dumps(to_dict(config)))
    assert parse(Run, written) == config
    assert differences(written, to_dict(config)) == []


def test_differences_name_the_leaves():
    old = to_dict(parse(Run, MINIMAL))
    new = to_dict(parse(Run, {**MINIMAL, "mesh": {"tp": 2}, "data": {"sources": {"a": 1, "b": 2}}, "scaling": {"tokens": 1}}))
    assert set(differences(old, new)) == {"data.sources.b", "mesh.tp", "scaling", "scaling.tokens", "scaling.batch"}
    assert differences({"a": {}}, {}) == ["a"] and differences({"a": {}}, {"a": {"b": 1}}) == ["a", "a.b"]
    del old["mesh"]
    assert {"mesh.tp", "mesh.cp"} <= set(differences(old, new))


CONFIG_FILE = """
from ml_collections import ConfigDict

def sizes():
    return (3, 4)

def get_config():
    config = ConfigDict({"workdir": "w", "data": {"sources": "a:0.5"}})
    config.scaling = None
    config.optimizer = ConfigDict({"sizes": sizes(), "phases": [ConfigDict({"tokens": 5})]})
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(CONFIG_FILE)
    return str(file)


def test_command_line(config_file):
    config = read_command_line(
        Run, ["--config", config_file, "--config.mesh.tp=2", "--config.data.tokenizer", "x=y", "--config.mesh.cp", "-1"]
    )
    assert config == Run("w", Data({"a": 0.5}, "x=y"), Mesh(2, -1), Optimizer(sizes=(3, 4), phases=(Phase(5.0),)))
    assert read_command_line(Run, [f"--config={config_file}", "--config.mesh.tp=2", "--config.mesh.tp=3"]).mesh.tp == 3
    assert read_command_line(Run, [f"--config={config_file}", "--config.scaling.tokens=3"]).scaling == Phase(3.0)


def test_a_plain_dict_may_have_dots_in_its_keys(tmp_path):
    file = tmp_path / "config.py"
    file.write_text("def get_config():\n    return {'workdir': 'w', 'data': {'sources': {'a.txt': 2}}}")
    assert read_command_line(Run, ["--config", str(file)]).data.sources == {"a.txt": 2.0}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.mesh.tq=1"], "unknown config key 'mesh.tq': did you mean 'mesh.tp'?"),
        (["--config.workdir.x=1"], "unknown config key 'workdir.x': 'workdir' is a value, not a section"),
        (["--mesh.tp=1"], "unknown argument '--mesh.tp'"),
        (["stray"], "unknown argument 'stray'"),
        (["--config.mesh.tp"], "--config.mesh.tp needs a value"),
        (["--config.mesh.tp", "--config.mesh.cp=1"], "--config.mesh.tp needs a value"),
    ],
)
def test_wrong_arguments(config_file, arguments, message):
    with pytest.raises(UserError) as error:
        read_command_line(Run, ["--config", config_file, *arguments])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "does not exist"),
        ("x = 1", "has no function get_config()"),
        ("def get_config(): return 3", "returned int"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    file = tmp_path / "config.py"
    if text:
        file.write_text(text)
    with pytest.raises(UserError, match="config.py") as error:
        read_command_line(Run, ["--config", str(file)])
    assert message in str(error.value)


def test_no_file():
    with pytest.raises(UserError, match="no config file is named"):
        read_command_line(Run, ["--config.workdir=w"])


def test_help_says_what_every_key_is(capsys):
    with pytest.raises(SystemExit) as exit_:
        read_command_line(Run, ["--help"])
    assert exit_.value.code == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "usage: --config FILE [--config.KEY=VALUE ...]"
    assert "--config.workdir str, required" in lines
    assert "--config.data.sources dict[str, float], required" in lines
    assert lines.index("config.mesh: Sizes of the mesh.") + 1 == lines.index("--config.mesh.tp int, default 1")
    assert lines[lines.index("--config.mesh.tp int, default 1") + 1] == "devices that share a matrix"
    assert "--config.optimizer.phases tuple[Phase, ...], default ()" in lines
    assert "config.optimizer.phases[].tokens float, required" in lines
    assert "--config.optimizer.seq_len int | None, default None" in lines


@pytest.mark.parametrize("config", [RunConfig, CurationConfig])
def test_every_field_of_a_config_says_what_it_is(config):
    def unsaid(cls):
        meanings, sections = field_comments(cls), sections_of(cls)
        for field in dataclasses.fields(cls):
            if field.name in sections:
                yield from unsaid(sections[field.name])
            elif not meanings[field.name]:
                yield f"{cls.__name__}.{field.name}"

    assert not list(unsaid(config))


@dataclasses.dataclass(frozen=True)
class Scaled:
    scaling: Phase | None | NotGiven = NOT_GIVEN
    depth: int | None = None


def test_none_is_a_value_where_a_field_can_be_left_out():
    assert parse(Scaled, {}).scaling is NOT_GIVEN and "scaling" not in to_dict(parse(Scaled, {}))
    for none in ("none", None, "null"):
        assert parse(Scaled, {"scaling": none}).scaling is None
        assert to_dict(parse(Scaled, {"scaling": none})) == {"scaling": "none", "depth": None}
    given = parse(Scaled, {"scaling": {"tokens": 3.0}})
    assert given.scaling == Phase(3.0) and parse(Scaled, to_dict(given)) == given


def test_nan_is_no_setting():
    for value in ("nan", math.nan, "NaN"):
        with pytest.raises(UserError, match="config key 'depth' must be"):
            parse(Scaled, {"depth": value})
    with pytest.raises(ValueError):
        number("nan")
    assert number("inf") == math.inf and number("1e-3") == 0.001


def test_a_name_given_two_weights():
    with pytest.raises(UserError, match="data.sources names a more than once"):
        run_configs.config(data__sources="a:1,b,a:2")


def test_suggestions_stay_in_their_section():
    for key, words in (("optimizer.betas", "the keys of optimizer are peak_learning_rate"), ("optimizer.lr", "the keys of optimizer are"),
                       ("optimizer.weight_deca", "did you mean 'optimizer.weight_decay'"), ("train.seqlen", "did you mean 'train.seq_len'")):  # fmt: skip
        section, name = key.split(".")
        with pytest.raises(UserError, match=f"unknown config key '{key}': {words}"):
            run_configs.config(**{f"{section}__{name}": 1})


def test_a_path_with_a_comma_is_one(tmp_path):
    """Where it exists; a list of others is a list."""
    name = str(tmp_path / "one, two.txt")
    assert parse(Named, {"paths": name}).paths == (str(tmp_path / "one"), "two.txt")
    (tmp_path / "one, two.txt").touch()
    assert parse(Named, {"paths": name}).paths == (name,)


@dataclasses.dataclass(frozen=True)
class Named:
    paths: tuple[str, ...] = ()
