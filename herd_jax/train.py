"""`python -m herd_jax.train --config FILE [--config.FIELD=VALUE ...]`: trains a Llama, or continues an interrupted run."""

import dataclasses

from herd_jax.config import read_command_line
from herd_jax.errors import command_line
from herd_jax.interop.initial import InitialWeights
from herd_jax.mesh import request_cpu_devices
from herd_jax.training.loop import train
from herd_jax.training.run import RunConfig


@command_line
def main(argv: list[str]) -> None:
    config = read_command_line(RunConfig, argv)
    request_cpu_devices(config.mesh)
    if config.init_from:
        initial = InitialWeights.open(config.init_from)
        train(dataclasses.replace(config, model=initial.model_config), initial)
    else:
        train(config)


if __name__ == "__main__":
    main()
