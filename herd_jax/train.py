"""`python -m herd_jax.train --config FILE [--config.FIELD=VALUE ...]`: trains a Llama, or continues an interrupted run.

On several hosts it is the same command on each (see launch/); with --preflight it checks them and trains nothing.
"""

import dataclasses

from herd_jax.cluster import joined
from herd_jax.config import read_command_line, to_dict
from herd_jax.errors import command_line
from herd_jax.interop.initial import InitialWeights
from herd_jax.mesh import request_cpu_devices
from herd_jax.training.loop import train
from herd_jax.training.preflight import preflight
from herd_jax.training.run import RunConfig
from herd_jax.xla_flags import apply_flags


@command_line
def main(argv: list[str]) -> None:
    config = read_command_line(RunConfig, [argument for argument in argv if argument != "--preflight"])
    apply_flags()
    with joined(to_dict(config)) as num_processes:
        request_cpu_devices(config.mesh, num_processes)
        if "--preflight" in argv:
            preflight(config.mesh, config.workdir)
        elif config.init_from:
            initial = InitialWeights.open(config.init_from)
            train(dataclasses.replace(config, model=initial.model_config), initial)
        else:
            train(config)


if __name__ == "__main__":
    main()
