"""Long context in gated stages, small enough for a laptop: from 256 tokens to 2,048, with cp 2 at the two longest lengths. `launch/long_context.sh`
makes the data and runs this.

Each stage begins only when the loss on short rows is back and needles are found at every depth of every length so far: three of four before the
last stage, which has to find all.
"""

from ml_collections import ConfigDict

DATA = "runs/long-context-data"


def get_config():
    return ConfigDict(
        {
            "workdir": "runs/long-context",
            "seed": 0,
            "model": {
                "name": "llama-5m", "dim": 192, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "ffn_dim": 512, "vocab_size": 2048,
                "rope_theta": 500_000.0, "init_std": 0.07,
            },
            "data": sources(256),
            "train": {
                "global_batch_size": 16,
                "stages": [
                    {"seq_len": 256, "tokens": 5_820_416, "gate": gate(tokens=300_000, needle_recall=0.75)},
                    longer(512, tokens=1_000_000, mesh={"dp": 2}),
                    longer(1024, tokens=2_000_000, mesh={"cp": 2, "dp": 1}),
                    longer(2048, tokens=5_000_000, mesh={"cp": 2, "dp": 1}, final_learning_rate=1e-4, needle_recall=1.0),
                ],
            },
            "mesh": {"dp": 2},
            "optimizer": {
                "peak_learning_rate": 4e-3, "final_learning_rate": 3e-4, "warmup_steps": 60, "decay_steps": 976, "weight_decay": 0.1,
                "clip_norm": 1.0, "b1": 0.9, "b2": 0.95,
            },
            "checkpoint": {"every_steps": 250, "keep": 1},
            "eval": {"every_steps": 100, "num_batches": 8},
            "log": {"every_steps": 25},
        }
    )  # fmt: skip


def sources(length):
    """Plain text, which has no records in it, and documents with records, in the long stages also short ones. The gate takes its haystack from the
    first: a string keeps their order."""
    shares = {256: 0.7} if length == 256 else {256: 0.3, length: 0.6}
    text = 1 - sum(shares.values())
    return {"sources": ",".join([f"{DATA}/text:{text:.1f}", *(f"{DATA}/needles-{of}:{share}" for of, share in shares.items())])}


def gate(tokens, needle_recall):
    """`tokens` is how long a stage that fails trains on before it is asked again."""
    return {"short_margin": 0.05, "needle_recall": needle_recall, "num_depths": 11, "num_samples": 4, "template": "record",
            "round_tokens": tokens, "max_rounds": 6}  # fmt: skip


def longer(length, tokens, mesh, final_learning_rate=3e-4, needle_recall=0.75):
    """A stage of 4,096 tokens a step, with RoPE scaled as Llama 3.1's, from the 256 tokens of the first."""
    return {
        "seq_len": length, "tokens": tokens, "global_batch_size": 4096 // length, "mesh": mesh, "data": sources(length),
        "rope_scaling": {"factor": length / 256, "original_max_position": 256},
        "learning_rate": 2e-3, "final_learning_rate": final_learning_rate, "warmup_steps": 10,
        "gate": gate(tokens=200_000, needle_recall=needle_recall),
    }  # fmt: skip
