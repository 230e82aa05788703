"""Post-training: from a pre-trained model to one that follows instructions (section 4 of the paper).

    python -m herd_jax.post_train COMMAND --config FILE [--config.FIELD=VALUE ...]

reward  trains a reward model on preferences
sft     fine-tunes the pre-trained model on dialogs
dpo     fits a fine-tuned model to preferences
sample  draws several answers to each prompt, scores them, and chooses the best
"""

from herd_jax.config import read_command_line, to_dict
from herd_jax.errors import UserError, command_line
from herd_jax.machines.place import joined
from herd_jax.machines.xla_flags import apply_flags
from herd_jax.mesh import request_cpu_devices
from herd_jax.post_training.config import STAGES
from herd_jax.post_training.sampling import SampleConfig, sample
from herd_jax.post_training.stages import train_stage


@command_line
def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    command, *rest = argv
    if command not in (*STAGES, "sample"):
        raise UserError(f"there is no command '{command}': it must be one of {', '.join(STAGES)}, sample")
    if command == "sample":
        config = read_command_line(SampleConfig, rest)
        apply_flags()
        if config.mesh:
            request_cpu_devices(config.mesh)
        sample(config)
        return
    config = read_command_line(STAGES[command], rest)
    apply_flags()
    with joined(to_dict(config)) as num_processes:
        request_cpu_devices(config.mesh, num_processes)
        train_stage(config)


if __name__ == "__main__":
    main()
