"""Batches: a function of (seed, step), the same on any mesh and any number of processes, through phases; validation filled up."""

import itertools

import chex
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from herd_jax.data.batches import TOKENS, read_batch, stream_batches, validation_batches
from herd_jax.data.ramp import Phase, Ramp
from herd_jax.data.rows import DataConfig, validation_rows
from herd_jax.data.streams import StreamWriter, TokenStream
from herd_jax.mesh import MeshConfig, make_mesh
from herd_jax.parallel.context import zigzag_order
from herd_jax.training.next_token import NEXT_TOKEN

DATA = DataConfig({"first": 2.0, "second": 1.0})
PHASE = Phase(0, 8, 16, 2)
RAMP = Ramp((PHASE, Phase(300, 4, 32, 1), Phase(600, 8, 32, 2)))  # phases begin at steps 0, 3 and 5
MESHES = [(1, 1, 1, 1), (1, 2, 1, 1), (1, 4, 1, 2), (2, 2, 1, 2), (1, 1, 2, 4), (1, 2, 2, 2)]


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """Two streams of documents of many lengths; tokens count up, so that a token tells its place."""
    made = []
    for name, first in (("first", 0), ("second", 5000)):
        path = tmp_path_factory.mktemp("batches") / name
        lengths = np.random.default_rng(first).integers(2, 40, 60)
        with StreamWriter(path, 50_000) as writer:
            writer.append(first + np.arange(lengths.sum()), lengths, int(lengths.sum()))
        made.append(TokenStream(path))
    return made


def sharding(tp=1, cp=1, pp=1, dp=1):
    return NamedSharding(make_mesh(MeshConfig(tp, cp, pp, dp), jax.devices()[: tp * cp * pp * dp]), TOKENS)


def training(streams, where, seed=0, num_steps=8, ramp=RAMP):
    return stream_batches(DATA, streams, ramp, seed, num_steps, where)


def in_row_order(host_batch, where):
    """The global batch on the mesh, as rows [global batch, S] with the zigzag undone."""
    arrays = host_batch.to_devices(where)
    assert set(arrays) == set(NEXT_TOKEN.fields)
    assert all(array.sharding.is_equivalent_to(where, 3) for array in arrays.values())
    arrays = {field: np.asarray(array) for field, array in arrays.items()}
    seq_len = arrays["tokens"].shape[2]
    back = np.argsort(zigzag_order(seq_len, where.mesh.shape["cp"]))
    return {field: array[:, :, back].reshape(-1, seq_len) for field, array in arrays.items()}


def assert_same(got, expected):
    chex.assert_trees_all_equal(got, expected)


def test_rows_in_order(streams):
    """Row i of a batch is row first_row + i of the data, cut in micro-batches one after another."""
    where, batches = sharding(), training(streams, sharding())
    for step, first, size, seq_len in ((0, 0, 8, 16), (2, 16, 8, 16), (3, 0, 4, 32), (4, 4, 4, 32), (6, 16, 8, 32)):
        got = in_row_order(batches[step], where)
        assert got["tokens"].shape == (size, seq_len)
        for i in range(size):
            assert_same({field: array[i] for field, array in got.items()}, batches.rows[seq_len][first + i])
    assert batches[0].shape == (2, 4, 16) and batches[3].shape == (1, 4, 32)


@pytest.mark.parametrize("mesh", MESHES[1:], ids=str)
def test_the_same_batch_on_any_mesh(streams, mesh):
    for step in (1, 4, 6):
        expected = in_row_order(training(streams, sharding())[step], sharding())
        assert_same(in_row_order(training(streams, sharding(*mesh))[step], sharding(*mesh)), expected)


def test_each_cp_rank_holds_its_two_chunks(streams):
    where = sharding(cp=2)
    tokens = training(streams, where)[0].to_devices(where)["tokens"]
    row = in_row_order(training(streams, where)[0], where)["tokens"][0]
    parts = {shard.device: shard.data[0, 0] for shard in tokens.addressable_shards}
    for rank, device in enumerate(where.mesh.devices[0, :, 0, 0]):
        chunks = np.split(row, 4)
        np.testing.assert_array_equal(parts[device], np.concatenate([chunks[rank], chunks[3 - rank]]))


def test_a_batch_depends_on_seed_and_step_alone(streams):
    """Read in order from any step, at random, or in a run of another length."""
    where = sharding()
    expected = [in_row_order(batch, where) for batch in itertools.islice(training(streams, where).iterate(0), 8)]
    assert len(expected) == 8
    for first in (0, 2, 5):
        for step, batch in enumerate(training(streams, where).iterate(first), start=first):
            assert_same(in_row_order(batch, where), expected[step])
    assert step == 7
    longer = training(streams, where, num_steps=1000)
    for step in (6, 0, 3):
        assert_same(in_row_order(longer[step], where), expected[step])
    other = in_row_order(training(streams, where, seed=1)[0], where)
    assert not (other["tokens"] == expected[0]["tokens"]).all()


def test_phases_of_one_length_go_on(streams):
    """Rows of 32 tokens are read on through the third phase without one twice."""
    where, batches = sharding(), training(streams, sharding())
    long_rows = np.concatenate([in_row_order(batches[step], where)["tokens"][:, 0] for step in range(3, 7)])
    assert len(set(long_rows.tolist())) == len(long_rows) == 24


class Process:
    """The sharding as one of several processes sees it: it addresses some of the devices."""

    def __init__(self, whole, devices):
        self.mesh, self._whole, self._devices = whole.mesh, whole, devices

    def addressable_devices_indices_map(self, shape):
        return {device: index for device, index in self._whole.devices_indices_map(shape).items() if device in self._devices}


class Recording:
    """Rows that note which of them are read."""

    def __init__(self, rows, read):
        self._rows, self._read = rows, read

    def __getitem__(self, index):
        self._read.append(index)
        return self._rows[index]


@pytest.mark.parametrize("mesh", [(1, 1, 1, 4), (2, 1, 1, 2), (1, 2, 1, 4), (1, 4, 2, 1)], ids=str)
@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_processes_read_only_their_own_rows(streams, mesh, num_processes):
    """What they read together is the batch; each reads the rows of its dp ranks (all of its cp ranks' at once) and no others."""
    whole = sharding(*mesh)
    data_rows = training(streams, whole).rows[16]
    expected = in_row_order(read_batch(data_rows, 24, PHASE, whole), whole)
    order, num_dp = zigzag_order(16, mesh[1]), mesh[3]
    seen = np.zeros((2, 4), bool)
    for devices in np.array_split(np.array(whole.mesh.devices.transpose().flat), num_processes):
        read = []
        batch = read_batch(Recording(data_rows, read), 24, PHASE, Process(whole, set(devices)))
        ranks = {int(dp) for (_, _, _, dp), device in np.ndenumerate(whole.mesh.devices) if device in devices}
        per_rank = 4 // num_dp
        mine = [24 + m * 4 + dp * per_rank + i for m in range(2) for dp in ranks for i in range(per_rank)]
        assert sorted(read) == sorted(mine)
        for first, block in batch.blocks.items():
            for field, array in block.items():
                rows_of_block = slice(first, first + array.shape[1])
                np.testing.assert_array_equal(array, expected[field].reshape(2, 4, 16)[:, rows_of_block][:, :, order])
            seen[:, rows_of_block] = True
    assert seen.all()


@pytest.mark.parametrize("mesh", [MESHES[0], MESHES[3]], ids=str)
def test_validation_batches_are_filled_up(streams, mesh):
    """As many rows as there are, each once; what fills the last batch is masked and of no document."""
    where, streams = sharding(*mesh), streams[:1]
    num_rows = sum(-(-(stream.num_tokens - 1) // 16) for stream in streams)
    assert num_rows % 8
    found = [in_row_order(batch, where) for rows in validation_rows(streams, 16, 1000) for batch in validation_batches(rows, PHASE, where)]
    assert len(found) == -(-num_rows // 8)
    whole = {field: np.concatenate([batch[field] for batch in found]) for field in NEXT_TOKEN.fields}
    tokens, segments, mask = whole["tokens"], whole["segment_ids"], whole["loss_mask"]
    assert len(set(tokens[:num_rows, 0].tolist())) == num_rows
    assert not mask[num_rows:].any() and not segments[num_rows:].any() and not tokens[num_rows:].any()
    num_documents = sum(stream.num_documents for stream in streams)
    assert mask.sum() == sum(stream.num_tokens for stream in streams) - num_documents


def test_validation_batches_are_few_and_always_the_same(streams):
    where = sharding()
    rows = lambda: validation_rows(streams[:1], 16, 3 * PHASE.global_batch_size)[0]
    found = [[in_row_order(batch, where) for batch in validation_batches(rows(), PHASE, where)] for _ in range(2)]
    assert len(found[0]) == 3 and all(batch["loss_mask"].any(1).all() for batch in found[0])
    assert_same(*found)
