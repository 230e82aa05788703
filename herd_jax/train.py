"""`python -m herd_jax.train --config FILE [--config.FIELD=VALUE ...]`: trains a Llama, or continues an interrupted run.

On several hosts it is the same command on each (see launch/); with --preflight it checks them and trains nothing.
"""

from herd_jax.config import read_command_line, to_dict
from herd_jax.errors import command_line
from herd_jax.evaluation.needles.gate import StageGate
from herd_jax.interop.initial import initial_weights
from herd_jax.machines.place import joined
from herd_jax.machines.xla_flags import apply_flags
from herd_jax.mesh import request_cpu_devices
from herd_jax.reliability.preflight import preflight
from herd_jax.training.config import RunConfig
from herd_jax.training.next_token import NEXT_TOKEN
from herd_jax.training.stages.stages import devices_of, stage_configs, train_stages


@command_line
def main(argv: list[str]) -> None:
    config = read_command_line(RunConfig, [argument for argument in argv if argument != "--preflight"])
    apply_flags()
    with joined(to_dict(config)) as num_processes:
        request_cpu_devices(devices_of(config), num_processes)
        if "--preflight" in argv:
            for mesh in dict.fromkeys(stage.mesh for stage in stage_configs(config)):
                preflight(mesh, config.directory)
        else:
            config, initial = initial_weights(config)
            train_stages(config, NEXT_TOKEN, StageGate(), initial)


if __name__ == "__main__":
    main()
