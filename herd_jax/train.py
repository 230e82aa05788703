"""`python -m herd_jax.train --config FILE [--config.FIELD=VALUE ...]`: trains a Llama, or continues an interrupted run."""

from herd_jax.config import read_command_line
from herd_jax.errors import command_line
from herd_jax.mesh import request_cpu_devices
from herd_jax.training.loop import train
from herd_jax.training.run import RunConfig


@command_line
def main(argv: list[str]) -> None:
    config = read_command_line(RunConfig, argv)
    request_cpu_devices(config.mesh)
    train(config)


if __name__ == "__main__":
    main()
