"""The training mix: how many tokens of each source to train on, when, and how often that repeats them (sections 3.1.2 and 3.1.3).

`plan` fits the tokens that there are to the shares that are wanted; `herd_jax.curation.write_mix` makes a config of it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from herd_jax.data.streams import TokenStream
from herd_jax.errors import UserError
from herd_jax.files import user_path

SHARES = {"general": 0.50, "math_and_reasoning": 0.25, "code": 0.17, "multilingual": 0.08}  # section 3.1.2
MAX_EPOCHS = 4.0  # ours: repeats up to here are worth about as much as new text (Muennighoff et al., 2023)


@dataclasses.dataclass(frozen=True)
class MixSource:
    """A token stream of one category: `tokens` of its training split, and the `quality` that its documents have at least, where known."""

    path: str  # as data.sources of training names it
    category: str
    tokens: int
    quality: float | None = None

    @classmethod
    def open(cls, path: str, category: str, quality: float | None = None) -> "MixSource":
        """Opens a token stream. Raises UserError where no readable token stream is there."""
        return cls(path, category, TokenStream(user_path(path) / "train").num_tokens, quality)


@dataclasses.dataclass(frozen=True)
class MixTarget:
    """What is wanted from `from_tokens` tokens of training on: the share of each category (relative).

    Within a category all tokens are drawn equally often, but `upsample` times as often where the source's quality is `min_quality` or more:
    an annealing set is the last target, with shares of its own.
    """

    from_tokens: int = 0  # tokens trained on before this target holds
    shares: dict[str, float] = dataclasses.field(default_factory=lambda: dict(SHARES))  # wanted of each category (relative)
    min_quality: float | None = None  # sources of this quality or more are upsampled
    upsample: float = 1.0  # times as often as others a token of such a source is drawn

    def __post_init__(self):
        if not self.shares:
            raise UserError("curation mix shares is empty: give each category a share")
        for name, share in self.shares.items():
            if not (math.isfinite(share) and share > 0):
                raise UserError(f"curation mix shares gives {name} {share}: it must be positive and finite, or leave the category out")
        if not (math.isfinite(self.upsample) and self.upsample > 0):
            raise UserError(f"curation mix upsample is {self.upsample}: it must be positive and finite")

    def weight(self, source: MixSource) -> float:
        """Returns the weight of the source within its category."""
        is_good = self.min_quality is not None and source.quality is not None and source.quality >= self.min_quality
        return source.tokens * (self.upsample if is_good else 1.0)


@dataclasses.dataclass(frozen=True)
class MixConfig:
    """`max_epochs` is how often a token is read at most in the whole run, for all categories or by category (one not named has no limit).

    Without `total_tokens` the run goes on until categories that hold half of all that can be read are used up: what one cannot give the others
    give, so a little of a further category changes little.
    """

    targets: tuple[MixTarget, ...] = (MixTarget(),)  # what is wanted, as the tokens trained on grow
    max_epochs: float | dict[str, float] = MAX_EPOCHS  # times that a token is read at most, for all categories or by category
    total_tokens: int | None = None  # of the run; none: until categories that hold half of all tokens are used up

    def __post_init__(self):
        starts = [target.from_tokens for target in self.targets]
        if starts[:1] != [0] or any(later <= earlier for earlier, later in zip(starts, starts[1:])):
            raise UserError(f"curation mix targets start from {starts} tokens: the first must start from 0, each later one from more")
        if self.total_tokens is not None and self.total_tokens <= starts[-1]:
            raise UserError(f"curation mix total_tokens is {self.total_tokens}: it must be more than the last from_tokens {starts[-1]}")
        caps = self.max_epochs.values() if isinstance(self.max_epochs, Mapping) else [self.max_epochs]
        for cap in caps:
            if not cap > 0:
                raise UserError(f"curation mix max_epochs is {cap}: it must be positive")

    def cap(self, category: str) -> float:
        return self.max_epochs.get(category, math.inf) if isinstance(self.max_epochs, Mapping) else self.max_epochs


@dataclasses.dataclass(frozen=True)
class PlannedPhase:
    """What is drawn from `from_tokens` to `to_tokens`: tokens of each source, and the `shares` wanted (they sum to 1)."""

    from_tokens: int
    to_tokens: int
    shares: dict[str, float]
    drawn: dict[MixSource, float]

    @property
    def tokens(self) -> int:
        return self.to_tokens - self.from_tokens

    def drawn_of(self, category: str) -> float:
        return sum(tokens for source, tokens in self.drawn.items() if source.category == category)

    def weights(self) -> dict[str, float]:
        """Returns each source's share of the tokens, by path."""
        return {source.path: float(f"{tokens / self.tokens:.6g}") for source, tokens in self.drawn.items() if tokens > 0}

    def short(self) -> dict[str, float]:
        """Returns the tokens by which categories miss their shares of what is trained on in this phase."""
        missing = {name: share * self.tokens - self.drawn_of(name) for name, share in self.shares.items()}
        return {name: tokens for name, tokens in missing.items() if tokens > 0.5}


@dataclasses.dataclass(frozen=True)
class Mix:
    config: MixConfig
    phases: tuple[PlannedPhase, ...]

    @property
    def total_tokens(self) -> int:
        return self.phases[-1].to_tokens

    def epochs(self) -> dict[MixSource, float]:
        """Returns how often the whole run reads each source."""
        return {source: sum(phase.drawn[source] for phase in self.phases) / source.tokens for source in self.phases[0].drawn}

    def unused(self) -> list[str]:
        """Returns how much of what there is the run reads, in sentences."""
        there = sum(source.tokens for source in self.epochs())
        read = sum(min(epochs, 1.0) * source.tokens for source, epochs in self.epochs().items())
        lines = [f"the run reads {_count(read)} of the {_count(there)} tokens that there are at least once ({read / there:.1%})"]
        if read < there / 2:
            lines += ["most of what there is stays unused: raise total_tokens, or give the categories that there is much of larger shares"]
        return lines

    def data(self) -> dict[str, Any]:
        """Returns `data.sources` and `data.phases` of training."""
        first, *later = self.phases
        phases = tuple({"from_tokens": phase.from_tokens, "sources": phase.weights()} for phase in later)
        return {"sources": first.weights(), "phases": phases}

    def __str__(self) -> str:
        """Returns a table for each phase, what could not be met, and how often the run reads each source."""
        lines = []
        for phase in self.phases:
            lines += [f"from {_count(phase.from_tokens)} to {_count(phase.to_tokens)} tokens", *_rows(phase), *shortfalls(phase), ""]
        if self.config.total_tokens and self.total_tokens < self.config.total_tokens:
            lines += [f"the sources give {_count(self.total_tokens)} of {_count(self.config.total_tokens)} tokens within max_epochs", ""]
        lines += [*self.unused(), "", "epochs of the whole run"]
        for source, epochs in self.epochs().items():
            cap = self.config.cap(source.category)
            lines.append(f"  {source.path}: {epochs:.2f}" + (f" of at most {cap:g}" if math.isfinite(cap) else ""))
        return "\n".join(lines)


def plan(sources: Sequence[MixSource], config: MixConfig) -> Mix:
    """Plans the tokens of each source in each phase: the shares wanted as far as `max_epochs` allows; what a category, or a source, cannot give
    the others give in proportion to their shares.

    Raises UserError for a source named twice, where there is nothing to draw from, or where a phase that is not the last cannot be filled.
    """
    paths = [source.path for source in sources]
    if len(set(paths)) < len(paths):
        raise UserError(f"curation mix has a source twice among {', '.join(paths)}: name each once")
    left = {source: source.tokens * config.cap(source.category) for source in sources if source.tokens}
    phases = []
    ends = [*(target.from_tokens for target in config.targets[1:]), config.total_tokens]
    for target, end in zip(config.targets, ends, strict=True):
        shares = {name: share / sum(target.shares.values()) for name, share in target.shares.items()}
        can_give = {name: sum(tokens for source, tokens in left.items() if source.category == name) for name in shares}
        if not any(can_give.values()):
            raise UserError(f"curation mix has no tokens left for {', '.join(shares)}: give sources of these or raise max_epochs")
        tokens = _until_half_is_used(shares, can_give) if end is None else end - target.from_tokens
        drawn = dict.fromkeys(left, 0.0)
        for name, amount in _fill(tokens, shares, can_give).items():
            of_category = {source: tokens_left for source, tokens_left in left.items() if source.category == name}
            drawn |= _fill(amount, {source: target.weight(source) for source in of_category}, of_category)
        filled = min(tokens, round(sum(drawn.values())))
        if filled < tokens and end != config.total_tokens:
            raise UserError(
                f"curation mix needs {_count(tokens)} tokens from {_count(target.from_tokens)} on and max_epochs allows {_count(filled)}: "
                "raise max_epochs or let the next target begin earlier"
            )
        phases.append(PlannedPhase(target.from_tokens, target.from_tokens + filled, shares, drawn))
        left = {source: max(0.0, tokens_left - drawn[source]) for source, tokens_left in left.items()}
    return Mix(config, tuple(phases))


def _fill(total: float, weights: Mapping[Any, float], caps: Mapping[Any, float]) -> dict[Any, float]:
    """Shares `total` out by weight, to none more than its cap; what one cannot take goes to the others in proportion."""
    amounts, takers = {}, list(weights)
    while takers:
        each = (total - sum(amounts.values())) / sum(weights[name] for name in takers)
        full = [name for name in takers if weights[name] * each >= caps[name]]
        if not full:
            return amounts | {name: weights[name] * each for name in takers}
        amounts |= {name: caps[name] for name in full}
        takers = [name for name in takers if name not in full]
    return amounts


def _until_half_is_used(shares: Mapping[str, float], can_give: Mapping[str, float]) -> int:
    """Returns the tokens at which categories that hold half of all that can be given, of those that have an end, are used up.

    A category is used up when all together would be its tokens divided by its share, so the half is a median of these totals, weighted by tokens.
    """
    finite = sorted((tokens / shares[name], tokens) for name, tokens in can_give.items() if math.isfinite(tokens))
    half, used = sum(tokens for _, tokens in finite) / 2, 0.0
    if not half:
        raise UserError("curation mix has neither total_tokens nor max_epochs for any category: give one of them")
    for total, tokens in finite:
        used += tokens
        if used >= half:
            break
    return int(sum(min(tokens, shares[name] * total) for name, tokens in can_give.items()))


HEADINGS = ("", "wanted", "reached", "tokens", "there are", "epochs")


def cells(phase: PlannedPhase) -> list[tuple[str, ...]]:
    """Returns a row below HEADINGS for each category and, indented, for each source."""
    rows = []
    for name, share in phase.shares.items():
        sources = [source for source in phase.drawn if source.category == name]
        for label, wanted, tokens, there in [
            (name, f"{share:.1%}", phase.drawn_of(name), sum(source.tokens for source in sources)),
            *(("  " + source.path, "", phase.drawn[source], source.tokens) for source in sources),
        ]:
            epochs = f"{tokens / there:.2f}" if there else "-"
            rows.append((label, wanted, f"{tokens / phase.tokens:.1%}", _count(tokens), _count(there), epochs))
    return rows


def _rows(phase: PlannedPhase) -> list[str]:
    table = [HEADINGS, *cells(phase)]
    width = max(len(label) for label, *_ in table)
    rows = [f"{label:<{width}} {wanted:>8} {reached:>8} {tokens:>9} {there:>9} {epochs:>7}" for label, wanted, reached, tokens, there, epochs in table]
    return [*rows, *left_out(phase)]


def left_out(phase: PlannedPhase) -> list[str]:
    """Returns what the phase has no share for, in sentences."""
    return [f"{name}: not in this mix" for name in sorted({source.category for source in phase.drawn} - phase.shares.keys())]


def shortfalls(phase: PlannedPhase) -> list[str]:
    """Returns which shares cannot be met, in sentences."""
    reason = "short of its share: the others give more, in proportion to theirs"
    return [f"{name} is {_count(tokens)} tokens {reason}" for name, tokens in phase.short().items()]


def _count(tokens: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if tokens >= size:
            return f"{tokens / size:.4g}{unit}"
    return f"{tokens:.0f}"
