"""Lists the commands: `python -m herd_jax`."""

import ast
from pathlib import Path

from herd_jax.errors import UserError, command_line


class UnknownArgument(UserError):
    status = 2


@command_line
def main(argv: list[str]) -> None:
    found = commands(Path(__file__).parent)
    if wrong := [argument for argument in argv if argument not in ("-h", "--help")]:
        hint = f"write python -m herd_jax.{wrong[0]}" if wrong[0] in found else "python -m herd_jax lists the commands and takes none"
        raise UnknownArgument(f"unknown argument '{wrong[0]}': {hint}")
    print("Commands, each as python -m herd_jax.NAME; with --help it shows its arguments:\n")
    for name, text in found.items():
        print(f"  {name:<{max(map(len, found))}}  {text}")


def commands(directory: Path) -> dict[str, str]:
    """Returns name -> what it does, for each module in `directory` with a function `main`: the first line of its docstring.
    Nothing is imported."""
    found = {}
    for path in sorted(directory.glob("[!_]*.py")):
        module = ast.parse(path.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in module.body):
            line = (ast.get_docstring(module) or "").partition("\n")[0]
            text = line.rpartition("`: ")[2] if line.startswith("`python -m ") else line  # what it does, without how it is called
            assert text, f"{path} is a command without a docstring"
            found[path.stem] = text[0].upper() + text[1:]
    return found


if __name__ == "__main__":
    main()
