"""Packing: nothing cut, lost or mixed; rows are a function of (seed, epoch); sources as often as asked."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd_jax.data.packing import OPEN_ROWS, PackedRows, join, pack


def example(name: int, length: int, responses: int = 0):
    """An example whose tokens say which it is."""
    tokens = np.full(length, name, np.int32)
    return {
        "tokens": tokens, "loss_mask": np.arange(length) % 2 == 0, "segment_ids": np.ones(length, np.int32),
        "response_ids": np.minimum(np.arange(length), responses).astype(np.int32),
    }  # fmt: skip


def names_of(row) -> list[int]:
    tokens = row["tokens"][row["segment_ids"] > 0]
    return [int(tokens[i]) for i in range(len(tokens)) if i == 0 or row["segment_ids"][i] != row["segment_ids"][i - 1]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 3)), min_size=1, max_size=300))
def test_each_example_is_in_one_row_that_has_room_for_it(sizes):
    sizes, room = np.array(sizes), np.array([20, 3])
    rows = pack(sizes, room)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all((sizes[row].sum(0) <= room).all() for row in rows)
    half_empty = sum(2 * sizes[row].sum(0)[0] <= 20 and 2 * sizes[row].sum(0)[1] <= 3 for row in rows)
    assert half_empty <= max(1, OPEN_ROWS)  # a row is closed only where nothing that is open has room


def test_rows_are_filled():
    lengths = np.random.default_rng(0).integers(1, 400, 5000)[:, None]
    rows = pack(lengths, np.array([512]))
    assert lengths.sum() / (512 * len(rows)) > 0.97


def test_an_epoch_has_each_source_as_often_as_asked_and_depends_on_nothing_else():
    sources = [[example(i, 3 + i % 5) for i in range(40)], [example(100 + i, 4) for i in range(10)], [example(200 + i, 9) for i in range(20)]]
    rows, again = (PackedRows(sources, [1, 2.5, 0.3], 32, seed=7) for _ in range(2))
    starts = [0]
    for epoch in range(3):
        plan = rows.plan(epoch)
        found = Counter(name for i in range(len(plan)) for name in names_of(rows[starts[-1] + i]))
        assert [found[i] for i in range(40)] == [1] * 40
        assert Counter(found[100 + i] for i in range(10)) == {2: 5, 3: 5}
        assert Counter(found[200 + i] for i in range(20)) == {0: 14, 1: 6}
        starts.append(starts[-1] + len(plan))
    assert rows.plan(0) != rows.plan(1) != PackedRows(sources, [1, 2.5, 0.3], 32, seed=8).plan(1)
    for index in (starts[2] + 1, 3, starts[1] - 1):  # in another order
        for field, values in again[index].items():
            np.testing.assert_array_equal(values, rows[index][field])
    assert again.locate(starts[2]) == (2, starts[2]) and again.locate(starts[2] - 1) == (1, starts[1])


def test_threads_read_the_same_rows():
    sources = [[example(i, 3 + i % 5) for i in range(40)]]
    for seed in range(5):
        one, many = (PackedRows(sources, [1], 16, seed=seed) for _ in range(2))
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda i: names_of(many[i]), range(120)))
        assert found == [names_of(one[i]) for i in range(120)]


def test_numbered_fields_go_on_and_rows_hold_no_more_of_them_than_asked():
    row = join([example(1, 4, 2), example(2, 3, 0), example(3, 5, 3)], 16)
    assert row["segment_ids"].tolist() == [1] * 4 + [2] * 3 + [3] * 5 + [0] * 4
    assert row["response_ids"].tolist() == [0, 1, 2, 2, 0, 0, 0, 0, 3, 4, 5, 5, 0, 0, 0, 0]
    assert row["loss_mask"].dtype == bool and not row["loss_mask"][12:].any()
    rows = PackedRows([[example(i, 4, 2) for i in range(12)]], [1], 64, seed=0, most={"response_ids": 6})
    assert [int(rows[i]["response_ids"].max()) for i in range(4)] == [6] * 4


def test_an_example_longer_than_a_row_is_no_example():
    with pytest.raises(AssertionError):
        pack(np.array([[5]]), np.array([4]))
