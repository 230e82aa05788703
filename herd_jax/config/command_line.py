"""Reading a run's config: a python file and command line overrides become one frozen dataclass."""

import dataclasses
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from herd_jax.config.help import help_of
from herd_jax.config.values import Config, parse, to_dict
from herd_jax.errors import UserError
from herd_jax.files import user_path

USAGE = "--config FILE [--config.KEY=VALUE ...]"


def read_command_line(cls: type[Config], argv: list[str]) -> Config:
    """Reads `--config FILE`, then overrides `--config.a.b=VALUE` or `--config.a.b VALUE`, into an instance of `cls`.

    FILE is python with a function `get_config()` that returns a `cls`, or a ConfigDict or dict, which may leave keys to their defaults.
    `--help` prints what each key is and exits with 0. Raises UserError for a wrong file, key, value or argument.
    """
    file, overrides, arguments = None, [], list(argv)
    while arguments:
        flag, has_value, value = arguments.pop(0).partition("=")
        if flag in ("--help", "-h"):
            print(help_of(cls, USAGE))
            sys.exit(0)
        if flag != "--config" and not flag.startswith("--config."):
            raise UserError(f"unknown argument '{flag}': the arguments are {USAGE}")
        if not has_value:
            if not arguments or arguments[0].startswith("--"):
                raise UserError(f"{flag} needs a value: give {flag}=VALUE")
            value = arguments.pop(0)
        if flag == "--config":
            file = value
        else:
            overrides.append((flag.removeprefix("--config."), value))
    if file is None:
        raise UserError(f"no config file is named: give {USAGE}")
    mapping = _read_file(user_path(file))
    for key, value in overrides:
        _set(mapping, key, value)
    return parse(cls, mapping)


def kind_of_file(file: str) -> type | None:
    """Returns the class of the config that FILE gives; None where that is a ConfigDict or a dict. Raises UserError for a wrong file."""
    config = _config_of(user_path(file))
    return type(config) if dataclasses.is_dataclass(config) else None


def _config_of(file: Path) -> Any:
    if not file.is_file():
        raise UserError(f"the config file {file} does not exist: give the path of a python file with get_config()")
    get_config = runpy.run_path(str(file)).get("get_config")
    if not callable(get_config):
        raise UserError(f"the config file {file} has no function get_config(): define one that returns a ConfigDict")
    return get_config()


def _read_file(file: Path) -> dict[str, Any]:
    config = _config_of(file)
    mapping = to_dict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else _plain(config)
    if not isinstance(mapping, dict):
        raise UserError(f"get_config() of {file} returned {type(mapping).__name__}: return a config, a ConfigDict or a dict")
    return mapping


def _plain(value: Any) -> Any:
    """The value with every ConfigDict and mapping in it as a new dict."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def _set(mapping: dict[str, Any], key: str, value: str) -> None:
    *sections, name = key.split(".")
    for depth, section in enumerate(sections, start=1):
        if mapping.get(section) is None:
            mapping[section] = {}
        mapping = mapping[section]
        if not isinstance(mapping, dict):
            raise UserError(f"unknown config key '{key}': '{'.'.join(sections[:depth])}' is a value, not a section")
    mapping[name] = value
