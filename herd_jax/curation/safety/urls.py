"""Documents of blocked sites go: lists of domains, whole URLs and words in the URL (section 3.1.1 of the paper, PII and safety filtering).

A list of domains may have millions of lines. It becomes a sorted array of 64-bit hashes in a file that every worker maps (8 bytes a line,
in memory once a machine). With n lines, a host that is not listed is taken for one that is with odds of n / 2**64 for each of its
parent domains: 2.5e-13 for the 4.6 million of datatrove.
"""

import dataclasses
import functools
import hashlib
import importlib.resources
import itertools
import re
import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import xxhash
from datatrove.data import Document

from herd_jax.curation.block import Block
from herd_jax.curation.web_address import WebAddress, host_of
from herd_jax.errors import UserError
from herd_jax.files import user_path, whole_file

URL_CHARACTERS = 8192  # of a longer URL the beginning is judged
_FORMAT = 2  # of the cached hashes: to be raised whenever `host_of` or `_address` changes
_PACKAGED = "url_filterblacklistsv0_3_0.tar.gz"  # members "domains" and "urls"
_NOT_ALPHANUMERIC = re.compile(r"[^a-z0-9]+")


@dataclasses.dataclass(frozen=True)
class UrlSafetyConfig:
    """Lists are files of one entry a line ("#" begins a comment line); a domain also stands for its subdomains.

    `use_datatrove_lists` adds the lists that datatrove packages to `blocked_domains`, `blocked_urls`, `hard_words`, `soft_words` and
    `subwords`. A URL goes for one hard word, `soft_word_threshold` different soft words, or one subword in its letters and digits.
    """

    use_datatrove_lists: bool = True  # adds the lists that datatrove packages
    adult_domains: tuple[str, ...] = ()  # files of domains, one a line
    high_pii_domains: tuple[str, ...] = ()  # files of domains, one a line
    unsafe_domains: tuple[str, ...] = ()  # files of domains, one a line
    blocked_domains: tuple[str, ...] = ()  # files of domains, one a line
    blocked_urls: tuple[str, ...] = ()  # files of URLs, one a line
    hard_words: tuple[str, ...] = ()  # files of words of which one in a URL is enough
    soft_words: tuple[str, ...] = ()  # files of words of which several in a URL are enough
    soft_word_threshold: int = 2  # different soft words that are enough
    subwords: tuple[str, ...] = ()  # files of words that are enough anywhere in a URL's letters and digits
    cache_dir: str = "~/.cache/herd_jax/url_lists"  # of the hashed lists: about 8 bytes a line

    def __post_init__(self):
        if self.soft_word_threshold < 1:
            raise UserError(f"curation urls.soft_word_threshold is {self.soft_word_threshold}: it must be 1 or more")


class UrlSafety(Block):
    """Drops for "adult_domain", "high_pii_domain", "unsafe_domain", "blocked_domain", "blocked_url", "hard_word", "soft_words", "subword".

    The lists are asked in that order; documents without a URL pass. What datatrove's URLFilter drops is dropped, and more: letter case,
    scheme, port, "www." and a last slash do not matter, addresses count as hosts, and every parent of the host is looked up.
    """

    name = "url_safety"

    def __init__(self, config: UrlSafetyConfig):
        super().__init__()
        self._config = config
        lists = (value for value in dataclasses.asdict(config).values() if isinstance(value, tuple))
        for path in itertools.chain.from_iterable(lists):
            if not user_path(path).is_file():
                raise UserError(f"the URL list {path} does not exist: correct its name in the section urls of the config")

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        url = doc.metadata.get("url", "")[:URL_CHARACTERS]
        if not url:
            return True
        host = host_of(url)
        parents = _hashes(host[index:] for index in [0] + [dot + 1 for dot, char in enumerate(host) if char == "."])
        for reason, listed in self._domains.items():
            if _any_listed(listed, parents):
                return False, reason
        if _any_listed(self._urls, _hashes([_address(url)])):
            return False, "blocked_url"
        url = url.lower()
        words = set(_NOT_ALPHANUMERIC.split(url))
        if not self._hard_words.isdisjoint(words):
            return False, "hard_word"
        if len(self._soft_words & words) >= self._config.soft_word_threshold:
            return False, "soft_words"
        squeezed = _squeeze(url)
        if any(subword in squeezed for subword in self._subwords):
            return False, "subword"
        return True

    @functools.cached_property
    def _domains(self) -> dict[str, np.ndarray]:
        """Returns reason -> sorted hashes of the domains dropped for it: uint64 [n]."""
        config = self._config
        return {
            "adult_domain": self._mapped("adult_domains", config.adult_domains, host_of),
            "high_pii_domain": self._mapped("high_pii_domains", config.high_pii_domains, host_of),
            "unsafe_domain": self._mapped("unsafe_domains", config.unsafe_domains, host_of),
            "blocked_domain": self._mapped("blocked_domains", config.blocked_domains, host_of, packaged="domains"),
        }

    @functools.cached_property
    def _urls(self) -> np.ndarray:
        return self._mapped("blocked_urls", self._config.blocked_urls, _address, packaged="urls")

    @functools.cached_property
    def _hard_words(self) -> frozenset[str]:
        return self._words(self._config.hard_words, "banned_words.txt")

    @functools.cached_property
    def _soft_words(self) -> frozenset[str]:
        return self._words(self._config.soft_words, "soft_banned_words.txt")

    @functools.cached_property
    def _subwords(self) -> frozenset[str]:
        return self._words(self._config.subwords, "banned_subwords.txt")

    def _words(self, paths: tuple[str, ...], packaged: str) -> frozenset[str]:
        packages = [_assets() / packaged] if self._config.use_datatrove_lists else []
        return frozenset(_squeeze(entry.lower()) for path in [*packages, *map(Path, paths)] for entry in _entries(path.open("rb"))) - {""}

    def _mapped(self, name: str, paths: tuple[str, ...], normalize: Callable[[str], str], packaged: str = "") -> np.ndarray:
        """Returns the sorted hashes of the lists' normalized entries, mapped from the cache, where the first to need them writes them."""
        packages = [_assets() / _PACKAGED] if packaged and self._config.use_datatrove_lists else []
        if not packages and not paths:
            return np.empty(0, np.uint64)
        digest = hashlib.sha256(f"{_FORMAT} {name}".encode())
        for path in [*packages, *map(Path, paths)]:
            with path.open("rb") as list_file:
                digest.update(hashlib.file_digest(list_file, "sha256").digest())
        directory = user_path(self._config.cache_dir)
        file = directory / f"{name}-{digest.hexdigest()[:32]}.npy"
        if not file.is_file():
            entries = itertools.chain(
                *(_packaged_entries(path, packaged) for path in packages), *(_entries(user_path(path).open("rb")) for path in paths)
            )
            hashes = _hashes(filter(None, map(normalize, entries)))
            hashes.sort()
            try:
                with whole_file(file, shared=True) as out:
                    np.save(out, hashes)
            except OSError as error:
                raise UserError(
                    f"the hashed URL lists cannot be written to {directory} ({error.strerror}): set urls.cache_dir to a directory with room"
                ) from None
        return np.load(file, mmap_mode="r")


def _hashes(entries: Iterable[str]) -> np.ndarray:
    """Returns the hashes of texts: uint64 [n], the same on every machine."""
    return np.frombuffer(array("Q", (xxhash.xxh3_64_intdigest(entry.encode("utf-8", "surrogatepass")) for entry in entries)), np.uint64)


def _any_listed(listed: np.ndarray, hashes: np.ndarray) -> bool:
    if not len(listed):
        return False
    places = np.minimum(np.searchsorted(listed, hashes), len(listed) - 1)
    return bool((listed[places] == hashes).any())


def _address(url: str) -> str:
    """Returns what a list of URLs tells apart: host, path and query, with no port, "www." and last slash."""
    address = WebAddress.parse(url)
    return address.host.removeprefix("www.") + (address.path + (f"?{address.query}" if address.query else "")).rstrip("/")


def _squeeze(text: str) -> str:
    return _NOT_ALPHANUMERIC.sub("", text)


def _entries(file: Iterable[bytes]) -> Iterator[str]:
    for line in file:
        entry = line.decode("utf-8", "replace").strip()
        if entry and not entry.startswith("#"):
            yield entry


def _packaged_entries(path: Path, member: str) -> Iterator[str]:
    with tarfile.open(path, "r:gz") as tar:
        yield from _entries(tar.extractfile(member))


def _assets() -> Path:
    return Path(str(importlib.resources.files("datatrove"))) / "assets"
