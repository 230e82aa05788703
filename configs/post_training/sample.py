"""Rejection sampling: 10 answers to each prompt from the newest model, the best by reward among those that are verified (section 4.2.2)."""

from herd_jax.post_training.sampling import SampleConfig


def get_config():
    return SampleConfig(
        workdir="runs/samples",
        policies=("runs/sft",),
        prompts=("data/prompts.jsonl",),
        num_samples=10,
        temperatures=(0.6,),
        verifier="exact",
        reward_model="runs/reward",
    )
