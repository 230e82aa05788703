"""The config that a checkpoint keeps, and whether the run that goes on from it agrees."""

from herd_jax.config import differences, parse
from herd_jax.training.config import RunConfig, TrainConfig

GONE = ("skip_nonfinite",)  # fields of `train` that only earlier checkpoints have in their configs


def parse_saved(config: dict) -> RunConfig:
    """Returns the config that a checkpoint keeps, without fields that exist no longer; newer fields have their defaults."""
    kept = {name: value for name, value in config.get("train", {}).items() if name not in GONE}
    return parse(RunConfig, {**config, "train": kept})


# A resumed run must agree with its checkpoint in these; everything else (mesh, logging, kernels) may change.
SETTLED = ("seed", "model", "data", "optimizer", "train.global_batch_size", "train.seq_len", "train.phases")


def contradictions(saved: dict, config: dict, tokens: int) -> list[str]:
    """Returns the fields of a run's config (as `to_dict` has it) that contradict the config of its checkpoint, made after `tokens` tokens."""

    num_steps = parse(TrainConfig, config["train"]).ramp.step_at(tokens)

    def settled(config: dict) -> dict:
        """Returns the config without what has changed no result so far: numbers of micro-batches, later mixtures, annealing to come."""
        ramp = [{**phase, "num_micro_batches": 0} for phase in config["train"]["phases"]]
        mixtures = [phase for phase in config["data"].get("phases", []) if phase["from_tokens"] < tokens]
        no_annealing = {"anneal_from": 0, "anneal_steps": 0}
        optimizer = no_annealing | config["optimizer"]
        if not optimizer["anneal_steps"] or num_steps <= optimizer["anneal_from"]:
            optimizer |= no_annealing
        train, data = {**config["train"], "phases": ramp}, {**config["data"], "phases": mixtures}
        return {**config, "train": train, "data": data, "optimizer": optimizer}

    differing = differences(settled(saved), settled(config))
    return [name for name in differing if any(name == key or name.startswith(key + ".") for key in SETTLED)]
