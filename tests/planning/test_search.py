"""The search: what it lists is what trying everything finds, and what it leaves out it counts, with a reason. Memory is a stand-in."""

import dataclasses
import itertools
import random

import pytest

from herd_jax.errors import UserError
from herd_jax.machines.hardware import look_up
from herd_jax.models.config import MODELS
from herd_jax.parallel.schedule import PipelineConfig
from herd_jax.planning import costs, throughput
from herd_jax.planning.job import GATHER, REMAT, Job
from herd_jax.planning.search import MICRO_BATCH_SIZES, search

MODEL = dataclasses.replace(MODELS["llama3-8b"], num_layers=6)
RESIDUALS = {"none": 400_000, "attention": 200_000, "layer": 8_000}  # bytes of a token and layer


def memory_estimate(job):
    """Weights, and the residuals of the micro-batches in flight."""
    tokens = job.micro_batch_size * job.seq_len // job.cp
    activations = int(job.table.schedule.peak_in_flight.max()) * max(job.layers_per_stage) * tokens * RESIDUALS[job.remat] / job.tp
    return {"weights": costs.least_memory(job), "activations": activations, "total": costs.least_memory(job) + activations}


def find(num_devices=4, sequences=8, memory_gb=40, hardware="h100", model=MODEL, seq_len=4096, **options):
    device = dataclasses.replace(look_up(hardware), memory_bytes=memory_gb * 1e9)
    return search("some", model, device, num_devices, sequences * seq_len, seq_len, memory_estimate, **options)


def everything(num_devices, sequences, memory_gb, seq_len=4096):
    """Every layout there is, one by one."""
    device = dataclasses.replace(look_up("h100"), memory_bytes=memory_gb * 1e9)
    sizes = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    for tp, cp, pp, dp in itertools.product(sizes, repeat=4):
        if tp * cp * pp * dp != num_devices or sequences % dp:
            continue
        for size, remat, gather, overlap in itertools.product(MICRO_BATCH_SIZES, REMAT, GATHER, (False, True)):
            for schedule, num_chunks in (("1f1b", 1), ("zero_bubble", 1), *itertools.product(("interleaved", "zero_bubble"), (2, 4))):
                if sequences // dp % size or (pp == 1 and (schedule != "1f1b" or overlap)) or pp * num_chunks > MODEL.num_layers + 2:
                    continue
                pipeline = PipelineConfig(schedule, num_chunks, overlap=overlap)
                yield Job("some", MODEL, device, tp, cp, pp, dp, seq_len, sequences // dp, size, pipeline, remat, gather)


def fits(job):
    return memory_estimate(job)["total"] <= job.hardware.memory_bytes


def lighter(job):
    """With less recomputed; None where nothing is."""
    return None if job.remat == "none" else dataclasses.replace(job, remat=REMAT[REMAT.index(job.remat) - 1])


@pytest.mark.parametrize("memory_gb", [80, 25, 16, 12])
def test_the_fastest_are_what_trying_everything_finds(memory_gb):
    """Nothing is recomputed without need, and where a layout has no room, what recomputes more is tried."""
    result = find(memory_gb=memory_gb)
    tried = [job for job in everything(4, 8, memory_gb) if fits(job) and not (lighter(job) and fits(lighter(job)))]
    times = [candidate.throughput.step_time_s for candidate in result.ranked]
    assert times == pytest.approx(sorted(throughput.estimate(job).step_time_s for job in tried)[:10])
    assert len({candidate.job for candidate in result.ranked}) == 10
    for candidate in result.ranked:
        assert candidate.job in tried and candidate.memory == memory_estimate(candidate.job)
        assert candidate.job.tokens_per_step == 8 * 4096 and candidate.job.num_devices == 4


@pytest.mark.parametrize("tp, pp", [(8, 1), (8, 2), (4, 4)])
def test_half_the_cp_and_half_the_micro_batch_is_faster(tp, pp):
    """Why the search leaves the whole ones out where cp spans nodes."""
    whole = Job("some", MODEL, look_up("h100"), tp, 4, pp, 2, 4096, 8, 2)
    half = dataclasses.replace(whole, cp=2, dp=4, batch_per_dp=4, micro_batch_size=1)
    same = lambda job: (job.num_devices, job.tokens_per_step, job.num_micro_batches)
    assert same(half) == same(whole)
    assert throughput.estimate(half).step_time_s < throughput.estimate(whole).step_time_s
    assert costs.least_memory(half) == costs.least_memory(whole)
    found = find(num_devices=8 * tp * pp, sequences=16, memory_gb=80, num_listed=50).ranked
    assert not any(c.job.cp % 2 == c.job.micro_batch_size % 2 == 0 and c.job.tp * c.job.cp > 8 for c in found)


@pytest.fixture
def vague(monkeypatch):
    """An approximate time that is anything between half of the predicted one and all of it."""
    rng = random.Random(0)
    monkeypatch.setattr(throughput, "approximate", lambda job: rng.uniform(0.5, 1) * throughput.estimate(job).step_time_s)


@pytest.mark.parametrize("num_listed", [1, 10])
def test_the_approximate_time_decides_the_order_of_work_only(num_listed, vague):
    jobs = [job for job in everything(4, 8, 80) if job.remat == "none" and fits(job)]
    best = sorted(throughput.estimate(job).step_time_s for job in jobs)[:num_listed]
    assert [candidate.throughput.step_time_s for candidate in find(memory_gb=80, num_listed=num_listed).ranked] == pytest.approx(best)


def test_where_nothing_fits_the_nearest_is_named(vague):
    result = find(memory_gb=1)
    assert result.ranked == []
    (rejection,) = [rejection for rejection in result.rejections if "memory" in rejection.reason]
    jobs = list(everything(4, 8, 1))
    missing = min(costs.least_memory(job) for job in jobs) / 1e9 - 1
    assert rejection.count == len(jobs)
    assert rejection.distance == pytest.approx(missing) and f"{missing:.1f} GB too much or more" in rejection.example


def test_what_is_left_out_has_a_reason():
    result = find(num_devices=48, sequences=48, memory_gb=80, num_listed=3)
    assert len(result.ranked) == 3
    reasons = {rejection.reason: rejection for rejection in result.rejections}
    assert set(reasons) >= {
        "tp would leave the node, where it is too slow",
        "more pipeline ranks than layers",
        "the model or the sequence does not divide",
        "slower than those listed, whether they fit or not",
    }
    assert all(rejection.count > 0 and rejection.example for rejection in result.rejections)
    assert "a node has 8 devices" in reasons["tp would leave the node, where it is too slow"].example
    assert all(candidate.job.tp <= 8 for candidate in result.ranked)
    short = {rejection.reason: rejection for rejection in find(num_devices=8, sequences=4).rejections}
    assert "4 sequences a step" in short["the batch does not divide by dp"].example


def test_more_devices_are_not_slower():
    times = [find(num_devices=n, sequences=16, memory_gb=80).ranked[0].throughput.step_time_s for n in (2, 4, 8, 16)]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_devices": 0}, "gpus 0, seq_len 4096 and the number of layouts to list 10 must each be 1 or more"),
        ({"seq_len": -1}, "seq_len -1"),
        ({"sequences": 0}, "global_batch_tokens 0 is not a whole number of sequences of seq_len 4096: choose a multiple of it"),
        ({"sequences": 1.5}, "global_batch_tokens 6144.0 is not a whole number of sequences"),
        ({"num_listed": 0}, "layouts to list 0"),
    ],
)
def test_a_search_that_cannot_be_is_one_sentence(arguments, message):
    with pytest.raises(UserError) as error:
        find(**arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
