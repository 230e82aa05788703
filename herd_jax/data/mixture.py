"""Which source each row of training comes from: exact shares, any row found at once, and mixtures that change as the run goes on.

Two sources take turns by rounding: of the first n rows, the one with share p has n p, rounded. More sources are split two by two in a
tree. Only the tree is stored and no table of turns, so shares are never rounded to keep a table short. Reading rows is in `rows.py`.
"""

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction

# A source's index, or (numerator and denominator of the first branch's share of the node's rows, first branch, second branch).
Node = int | tuple[int, int, "Node", "Node"]


class Mixture:
    """Gives row i, for any i >= 0, as a source and a row of that source; each source's rows are taken in order, none twice, none left out.

    `phases` are (first row, a weight for each source), from row 0 on; a source of weight 0 rests and later goes on where it was. Within a phase
    the rows of a source differ from their exact share by less than 1 for up to three sources (and for the paper's four), by less than 1.7
    for any number: half the sum of 1, 1/1, 1/2, 1/3, 1/5, ... over the nodes above a source, since each outweighs the two before it.
    """

    def __init__(self, phases: Sequence[tuple[int, Sequence[float]]]):
        self._firsts = [first for first, _ in phases]
        assert self._firsts[0] == 0 and self._firsts == sorted(self._firsts), self._firsts
        self._trees = [_tree(weights) for _, weights in phases]
        self._taken = [[0] * len(phases[0][1])]  # rows of each source before each phase
        for tree, first, end in zip(self._trees, self._firsts, self._firsts[1:]):
            taken = list(self._taken[-1])
            for source, num_rows in _counts(tree, end - first):
                taken[source] += num_rows
            self._taken.append(taken)

    def locate(self, row: int) -> tuple[int, int]:
        """Returns (source, row of the source)."""
        phase = bisect_right(self._firsts, row) - 1
        node, row = self._trees[phase], row - self._firsts[phase]
        while not isinstance(node, int):
            *_, first_branch, second_branch = node
            before = _rows_of_first_branch(node, row)
            goes_first = _rows_of_first_branch(node, row + 1) > before
            node, row = (first_branch, before) if goes_first else (second_branch, row - before)
        return node, self._taken[phase][node] + row


def _tree(weights: Sequence[float]) -> Node:
    """Returns Huffman's tree: the two lightest join first, so that no source stands so deep that roundings add up."""
    # A weight counts as it is written (0.1 is a tenth); of two equal ones, the earlier source is the first branch.
    heap = [(Fraction(str(weight)), -source, source) for source, weight in enumerate(weights) if weight > 0]
    heapq.heapify(heap)
    while len(heap) > 1:
        (second, i, second_branch), (first, j, first_branch) = heapq.heappop(heap), heapq.heappop(heap)
        share = first / (first + second)
        heapq.heappush(heap, (first + second, min(i, j), (share.numerator, share.denominator, first_branch, second_branch)))
    return heap[0][2]


def _rows_of_first_branch(node: Node, num_rows: int) -> int:
    numerator, denominator, *_ = node
    return (2 * num_rows * numerator + denominator) // (2 * denominator)


def _counts(node: Node, num_rows: int) -> list[tuple[int, int]]:
    """Returns (source, its rows among the first `num_rows`) of each source below the node."""
    if isinstance(node, int):
        return [(node, num_rows)]
    first = _rows_of_first_branch(node, num_rows)
    return _counts(node[2], first) + _counts(node[3], num_rows - first)
