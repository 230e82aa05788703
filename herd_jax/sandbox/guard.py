"""The first program in a sandbox: it takes the limits upon itself, writes the files it is given, and becomes the command.

It runs alone, as `python -c`, with the number of the user to become (or 0), the limits, and the command as arguments, and the files and the input as JSON on
its own input; so it imports nothing of the house.
"""

import json
import os
import resource
import sys


def main() -> None:
    user, limits, command = int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
    given = json.load(sys.stdin.buffer)
    if user:  # of root nothing would be refused
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    for name, value in limits.items():
        _, most = resource.getrlimit(getattr(resource, name))
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(getattr(resource, name), (value, value))
    os.umask(0o022)
    for name, content in given["files"].items():
        os.makedirs(os.path.dirname(os.path.join(".", name)), exist_ok=True)
        with open(name, "w", encoding="utf-8", errors="replace") as file:
            file.write(content)
    read, write = os.pipe()
    if given["stdin"]:
        feed(read, write, given["stdin"].encode(errors="replace"))
    os.close(write)
    os.dup2(read, 0)
    os.close(read)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


def feed(read: int, write: int, content: bytes) -> None:
    """Leaves a process behind that writes the input, which may be more than a pipe holds."""
    if os.fork():
        return
    os.close(read)
    os.close(1)
    os.close(2)
    try:
        with os.fdopen(write, "wb") as pipe:
            pipe.write(content)
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
