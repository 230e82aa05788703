"""What each operation of the pipeline multiplies, moves through memory and sends, and how long that takes.

Each cost is an array [3]: seconds, seconds that are hidden behind other work, and bytes that a device sends.
"""

import math

import numpy as np

from herd_jax.planning.job import Job

# Shares of the hardware's rates that are reached, the same for all jobs. The first two are fitted to the three rows of table 4 of the
# paper, whose schedule and kernels are not published. They lie at the upper end of what such kernels reach, since the pipeline that is
# simulated here, whose ranks exchange messages at every tick, waits more than one whose ranks send only what is needed, when it is there.
MATMUL_EFFICIENCY = 0.75  # large BF16 matmuls on an H100 within its 700 W: 0.6 to 0.8
ATTENTION_EFFICIENCY = 0.60  # FlashAttention-3 on an H100 (figures of its paper): 0.65 forward, about 0.55 backward
MEMORY_EFFICIENCY = 0.8  # what element-wise kernels reach of the memory's bandwidth; ours
LINK_EFFICIENCY = 0.8  # nccl-tests show about 360 of 450 GB/s for gather and scatter within a node of H100s

KINDS = ("matmul", "attention", "memory", "tp", "cp", "dp")
GRADIENT_BYTES = 4  # accumulated and reduced in FP32
OPTIMIZER_BYTES = 32  # of a parameter: gradient read for the norm and the update, weight and two moments read and written, all FP32

Work = dict[str, np.ndarray]  # kind -> [seconds, hidden seconds, bytes]


def keys_seen(job: Job) -> float:
    """Returns how many keys a query sees on average: those of its document up to itself.

    Documents count as equally long; where they are not, more keys are seen.
    """
    return (min(job.seq_len, job.mean_document_length or job.seq_len) + 1) / 2


def operations(job: Job) -> dict[str, Work]:
    """Returns what each operation on one micro-batch takes: those of one layer, and those of the ends."""
    model, value_bytes = job.model, job.hardware.value_bytes
    layer, head = model.layer_matrices, model.head_matrix
    qkv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    tokens = _tokens(job)

    def matmul(matrices: int, passes: int = 1) -> np.ndarray:
        return _seconds(2 * passes * tokens * matrices / job.tp / (job.hardware.peak_flops * MATMUL_EFFICIENCY))

    def memory(elements: float) -> np.ndarray:
        """Returns what it takes a tp group to read or write so many values of each token."""
        return tokens * elements / job.tp * value_bytes * _memory(job)

    def accumulate(matrices: int) -> np.ndarray:
        """Returns what it takes to read and write an FP32 gradient."""
        return 2 * GRADIENT_BYTES * matrices / job.tp * _memory(job)

    attention = _seconds(_attention_flops(job) / (job.hardware.peak_flops * ATTENTION_EFFICIENCY))
    # Two norms and two sums with the residual stream; rotations; the gated product.
    elements = 10 * model.dim + 2 * qkv + 3 * model.ffn_dim
    # Cotangents that wait for the weights' half of a split backward, written in the inputs' half and read in the weights'.
    kept = memory(qkv + 2 * model.ffn_dim + 2 * model.dim)
    product = matmul(layer)
    hidden, keys = _hidden(job), _keys(job)
    fetch, finish = (_behind(_by_layer(job, layer, size), product) for size in (value_bytes, GRADIENT_BYTES))
    fetch_ends, finish_ends = (_by_layer(job, head, size) for size in (value_bytes, GRADIENT_BYTES))

    forward = _work(matmul=product, attention=attention, memory=memory(elements), tp=4 * hidden, cp=keys, dp=fetch)
    recomputed = {
        "none": _work(),
        "attention": _work(matmul=matmul(model.dim * qkv), attention=attention, memory=memory(elements / 2), tp=hidden, cp=keys),
        "layer": {**forward, "tp": 3 * hidden, "dp": _NOTHING},  # all but the last sum, which no gradient needs
    }[job.remat]
    # Flash attention multiplies 5 times where its forward does twice. The gradients of keys and values are summed in FP32.
    into_input = _add(recomputed, _work(
        matmul=product, attention=2.5 * attention, memory=memory(3 * elements), cp=_keys(job, GRADIENT_BYTES), dp=fetch,
    ))  # fmt: skip
    into_weight = _work(matmul=product, memory=accumulate(layer), dp=finish)
    # For each block the cotangent of its output is gathered, that of its input summed, and its input gathered once more for the gradient of
    # the weights. The last two run beside the matmuls of the weights' gradients. Where these are split off, they gather the cotangents too.
    return {
        "forward": forward,
        "backward": _add(into_input, into_weight, _work(tp=2 * hidden + _behind(4 * hidden, product))),
        "backward_input": _add(into_input, _work(memory=kept, tp=4 * hidden)),
        "backward_weight": _add(into_weight, _work(memory=kept, tp=_behind(4 * hidden, product), dp=fetch)),
        "embed": _work(memory=memory(2 * model.dim), tp=hidden, dp=fetch_ends),
        "embed_backward": _work(memory=memory(2 * model.dim) + 2 * accumulate(head), tp=hidden, dp=fetch_ends + finish_ends),
        # Forward and backward at once. FP32 logits are written and read about three times.
        "head": _work(
            matmul=matmul(head, 3), memory=memory(6 * 4 / value_bytes * model.vocab_size) + accumulate(head), tp=2 * hidden,
            dp=fetch_ends + finish_ends,
        ),
    }  # fmt: skip


def message(job: Job) -> np.ndarray:
    """Returns what the messages of one tick take: an activation to the next rank and a cotangent to the one before, which leave a device by
    one port."""
    if job.pp == 1:
        return _NOTHING
    num_bytes = 2 * _tokens(job) * job.model.dim / job.tp * job.hardware.value_bytes
    link = job.hardware.inside if _in_node(job, "pp") == job.pp else job.hardware.across
    return np.array([num_bytes / (link.bandwidth * LINK_EFFICIENCY) + link.latency, 0.0, num_bytes])


def once_a_step(job: Job) -> Work:
    """Returns what is done before the first tick and after the last: FSDP's weights and gradients, the sum over pp of the ends' gradients
    (every rank has these weights), and the optimizer's update."""
    fsdp, exchanged = job.dp * job.cp, _NOTHING
    if job.gather == "step":
        exchanged = _fsdp(job, _parameters(job), job.hardware.value_bytes) + _fsdp(job, _parameters(job), GRADIENT_BYTES)
    summed = 2 * _ring(job, _ends(job) / job.tp / fsdp * GRADIENT_BYTES, "pp")
    return {"dp": exchanged, "pp": summed, "optimizer": _parameters(job) / job.tp / fsdp * OPTIMIZER_BYTES * _memory(job)}


def least_memory(job: Job) -> float:
    """Returns the bytes that a device needs at least: FP32 weights, two moments, and gradients, which are whole where they are reduced once a
    step."""
    fsdp = job.dp * job.cp
    return _parameters(job) / job.tp * (12 / fsdp + GRADIENT_BYTES / (1 if job.gather == "step" else fsdp))


_NOTHING = np.zeros(3)


def _parameters(job: Job) -> int:
    """Returns the number of parameters of one pp rank: its slots for layers, and the ends, which every rank has."""
    slots = max(1, *job.layers_per_stage) * job.pipeline.num_chunks
    return slots * job.model.layer_matrices + _ends(job)


def _ends(job: Job) -> int:
    return job.model.head_matrix * (1 if job.model.tie_embeddings else 2)


def _seconds(seconds: float) -> np.ndarray:
    return np.array([seconds, 0.0, 0.0])


def _behind(sent: np.ndarray, work: np.ndarray) -> np.ndarray:
    """Returns the cost of `sent` while `work` is done, which hides it for as long as the work takes."""
    hidden = min(sent[0], work[0])
    return sent + [-hidden, hidden, 0]


def _work(**kinds: np.ndarray) -> Work:
    return {kind: kinds.get(kind, _NOTHING) for kind in KINDS}


def _add(*works: Work) -> Work:
    return {kind: sum(work[kind] for work in works) for kind in KINDS}


def _memory(job: Job) -> np.ndarray:
    """Returns what a byte read or written takes."""
    return _seconds(1 / (job.hardware.memory_bandwidth * MEMORY_EFFICIENCY))


def _tokens(job: Job) -> int:
    """Returns the number of tokens of a micro-batch in a tp group."""
    return job.micro_batch_size * job.seq_len // job.cp


def _attention_flops(job: Job) -> float:
    """Returns attention's FLOPs in a layer's forward: two products of each head, query and key seen. Zigzag chunks give each cp rank the same
    share."""
    return 4 * _tokens(job) * keys_seen(job) * job.model.num_heads * job.model.head_dim / job.tp


def _hidden(job: Job) -> np.ndarray:
    """Returns what it takes to gather, or to sum and scatter, the residual stream over tp."""
    return _ring(job, _tokens(job) * job.model.dim * job.hardware.value_bytes, "tp")


def _keys(job: Job, value_bytes: int | None = None) -> np.ndarray:
    """Returns what it takes to gather a layer's keys and values of the row over cp, or to sum and scatter their gradients."""
    num_values = 2 * job.micro_batch_size * job.seq_len * job.model.num_kv_heads * job.model.head_dim / job.tp
    return _ring(job, num_values * (value_bytes or job.hardware.value_bytes), "cp")


def _fsdp(job: Job, num_parameters: int, value_bytes: int) -> np.ndarray:
    """Returns what it takes to gather, or to sum and scatter, a tp rank's part of parameters over dp and cp."""
    return _ring(job, num_parameters / job.tp * value_bytes, "dp", "cp")


def _by_layer(job: Job, num_parameters: int, value_bytes: int) -> np.ndarray:
    return _fsdp(job, num_parameters, value_bytes) if job.gather == "layer" else _NOTHING


def _ring(job: Job, num_bytes: float, *axes: str) -> np.ndarray:
    """Returns what an all-gather to, or a reduce-scatter of, `num_bytes` on each device takes: a ring sends all but a device's own part."""
    size = math.prod(getattr(job, axis) for axis in axes)
    if size == 1:
        return _NOTHING
    link = job.hardware.ring(size, math.prod(_in_node(job, axis) for axis in axes))
    sent = num_bytes * (size - 1) / size
    return np.array([sent / (link.bandwidth * LINK_EFFICIENCY) + link.latency, 0.0, sent])


def _in_node(job: Job, axis: str) -> int:
    """Returns how many devices along a mesh axis one node holds: ranks are numbered tp first, then cp, pp and dp."""
    stride = {"tp": 1, "cp": job.tp, "pp": job.tp * job.cp, "dp": job.tp * job.cp * job.pp}[axis]
    return min(getattr(job, axis), max(1, job.hardware.devices_per_node // stride))
