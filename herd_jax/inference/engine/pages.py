"""Who holds which page: a count of holders a page, and an index of pages by the text that they hold, so that equal beginnings are kept once.

A page can be found by the hash of all ids up to its end (SHA-256 of the hash before it and its own ids), begun with a salt: requests of different
salts share nothing. Pages that nobody holds stay findable until others need them; of those the one that was unused longest goes first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class PagePool:
    """Pages 1 to `num_pages` - 1 of `page_size` tokens each; page 0 is nobody's."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, 0, -1))
        self._holders = [0] * num_pages
        self._found: dict[bytes, tuple[int, bytes]] = {}  # by hash: the page and its ids
        self._hash_of: dict[int, bytes] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # findable and held by nobody, the one unused longest first

    @property
    def num_available(self) -> int:
        """Returns the number of pages that can be had: those that are free, and those that are only kept to be found."""
        return len(self._free) + len(self._unused)

    @property
    def num_held(self) -> int:
        return self.num_pages - 1 - self.num_available

    def holders(self, page: int) -> int:
        return self._holders[page]

    def take(self, number: int) -> list[int]:
        """Returns pages that nobody else holds; there must be as many."""
        assert number <= self.num_available
        pages = [self._free.pop() if self._free else self._forget_oldest() for _ in range(number)]
        self.hold(pages)
        return pages

    def hold(self, pages: Sequence[int]) -> None:
        """Makes the caller one more holder of each page."""
        for page in pages:
            self._holders[page] += 1
            self._unused.pop(page, None)

    def give_back(self, pages: Sequence[int]) -> None:
        """Makes the caller no longer a holder. Of a sequence's pages the last is the first to be forgotten."""
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0
            if not self._holders[page]:
                if page in self._hash_of:
                    self._unused[page] = None
                else:
                    self._free.append(page)

    def find(self, ids: Sequence[int], salt: str) -> list[int]:
        """Returns the pages that hold the beginning of `ids`, as long a beginning as there is, whole pages only. The caller does not hold them yet."""
        pages = []
        for digest, content in self._chain(ids, salt):
            page, held = self._found.get(digest, (0, b""))
            if not page or held != content:
                break
            pages.append(page)
        return pages

    def keep(self, ids: Sequence[int], salt: str, pages: Sequence[int]) -> None:
        """Makes pages, which hold `ids` in order, findable as far as they are full. A text that is found already stays where it is."""
        for (digest, content), page in zip(self._chain(ids, salt), pages):
            if digest not in self._found and page not in self._hash_of:
                self._found[digest] = page, content
                self._hash_of[page] = digest

    def _forget_oldest(self) -> int:
        page, _ = self._unused.popitem(last=False)
        del self._found[self._hash_of.pop(page)]
        return page

    def _chain(self, ids: Sequence[int], salt: str):
        """Yields the hash and the content of each full page."""
        digest = hashlib.sha256(salt.encode()).digest()
        whole = np.asarray(ids[: len(ids) // self.page_size * self.page_size], np.int64)
        for content in (row.tobytes() for row in whole.reshape(-1, self.page_size)):
            digest = hashlib.sha256(digest + content).digest()
            yield digest, content
