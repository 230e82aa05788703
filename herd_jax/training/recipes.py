"""Pieces of run configs, for the files in `configs/` to put together: the paper's pre-training recipe (facts: sections E and D.2)."""

from ml_collections import ConfigDict

MIX = "data/general:0.50,data/math_and_reasoning:0.25,data/code:0.17,data/multilingual:0.08"  # section 3.1.2
NUM_STEPS = 1_100_929  # 15.6T tokens by the ramp


def batch_ramp(dp: int, seq_len: int = 8192) -> tuple[dict, ...]:
    """4M, 8M and 16M tokens a step; a micro-batch is one sequence on each dp rank."""
    phases = ((0, 4, seq_len // 2), (252_000_000, 8, seq_len), (2_870_000_000_000, 16, seq_len))
    return tuple(
        {
            "from_tokens": from_tokens,
            "global_batch_size": (mega * 1024 * 1024) // length,
            "seq_len": length,
            "num_micro_batches": (mega * 1024 * 1024) // length // dp,
        }
        for from_tokens, mega, length in phases
    )


def pretraining(model: str, peak_learning_rate: float, tp: int, pp: int, dp: int, num_chunks: int = 1, gather: str = "step") -> ConfigDict:
    """The 405B's recipe, which the 8B and the 70B share but for the peak learning rate.

    Not disclosed, and ours: b1, b2, weight decay, clipping, the meshes of the 8B and the 70B, the number of chunks of a pipeline rank (the
    405B's 126 layers, embedding and head make 16 x 8).
    """
    return ConfigDict(
        {
            "seed": 0,
            "workdir": f"runs/{model}",
            "model": {"name": model, "rope_scaling": {"factor": 1.0}},  # scaling comes with long context (section 3.4.2)
            "mesh": {"tp": tp, "cp": 1, "pp": pp, "dp": dp},
            "pipeline": {"schedule": "interleaved" if num_chunks > 1 else "1f1b", "num_chunks": num_chunks},
            "data": {"sources": MIX},
            "train": {"num_steps": NUM_STEPS, "phases": batch_ramp(dp), "gather": gather},
            "optimizer": {
                "peak_learning_rate": peak_learning_rate,
                "final_learning_rate": peak_learning_rate / 100,
                "warmup_steps": 8000,
                "decay_steps": 1_200_000,
                "weight_decay": 0.1,
                "clip_norm": 1.0,
                "b1": 0.9,
                "b2": 0.95,
            },
            "checkpoint": {"every_steps": 500, "keep": 5},
            "eval": {"every_steps": 2000, "num_batches": 4},
        }
    )
