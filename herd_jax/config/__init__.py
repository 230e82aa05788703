"""Configs: python files and command lines that become frozen dataclasses, each declared by the room that reads it."""

from herd_jax.config.command_line import kind_of_file, read_command_line
from herd_jax.config.values import NOT_GIVEN, NotGiven, check_name, differences, number, parse, to_dict

__all__ = ["NOT_GIVEN", "NotGiven", "check_name", "differences", "number", "parse", "kind_of_file", "read_command_line", "to_dict"]
