"""A small Llama on text that is on every machine; `launch/quickstart.sh` makes the data and runs this."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "workdir": "runs/quickstart",
            "seed": 0,
            "model": {"name": "llama-5m"},
            "data": {"sources": "runs/quickstart-data"},
            "train": {"num_steps": 400, "global_batch_size": 8, "seq_len": 256},
            "optimizer": {
                "peak_learning_rate": 3e-3,
                "final_learning_rate": 3e-4,
                "warmup_steps": 40,
                "decay_steps": 400,
                "weight_decay": 0.1,
                "clip_norm": 1.0,
                "b1": 0.9,
                "b2": 0.95,
            },
            "checkpoint": {"every_steps": 100, "keep": 2},
            "eval": {"every_steps": 50, "num_batches": 4},
            "log": {"every_steps": 10},
        }
    )
