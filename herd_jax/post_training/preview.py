"""Shows examples as a run would train on them: each token in the colour of its role, and marked where it counts, so that a wrong mask is seen first."""

import itertools
from collections.abc import Iterator, Sequence

from rich.text import Text

from herd_jax.data.dialogs import Refused, dialog_of, read_records, render
from herd_jax.data.preferences import CHOSEN, EDITED, REJECTED, read_preference
from herd_jax.errors import UserError
from herd_jax.post_training.config import DpoConfig, PostTrainConfig, SftConfig
from herd_jax.post_training.packed_data import find_tokenizer
from herd_jax.text import chat
from herd_jax.text.tokenizer import Tokenizer

COLOURS = {"system": "magenta", "user": "cyan", "assistant": "green", "ipython": "yellow", "": "white"}
OPEN, CLOSE = "⟦", "⟧"  # around tokens that count, also where there are no colours
RANKS = {REJECTED: "rejected", CHOSEN: "chosen", EDITED: "edited"}


def preview(config: PostTrainConfig, number: int) -> Iterator[Text]:
    """Yields the first `number` examples of each source of a run, as text to print. Raises UserError for sources and tokenizers that the run itself would
    refuse."""
    if number < 1:
        raise UserError(f"--examples is {number}: it must be 1 or more")
    tokenizer = find_tokenizer(config)
    show = _dialog if isinstance(config, SftConfig) else _preference
    for path in config.data.paths:
        for place, record in itertools.islice(read_records(path), number):
            yield Text(f"{place}", style="bold")
            try:
                yield from show(record, tokenizer, config)
            except Refused as reason:
                yield Text(f"left out: {reason}", style="red")


def legend() -> Text:
    """Returns what the colours and the marks mean."""
    text = Text("roles: ")
    for role in ("system", "user", "assistant", "ipython"):
        text.append(f"{role} ", COLOURS[role])
    return text.append(f"; {OPEN}counts in the loss{CLOSE}")


def _dialog(record, tokenizer: Tokenizer, config: PostTrainConfig) -> Iterator[Text]:
    render(record, tokenizer)  # refuses what a run would
    rendered = chat.render(dialog_of(record), tokenizer, tools=record.get("tools") or ())
    targets = sum(rendered.loss_mask[1:])
    yield coloured(rendered.ids, rendered.roles, rendered.loss_mask, tokenizer)
    yield Text(f"{len(rendered.ids)} tokens, {targets} of them targets", style="dim")


def _preference(record, tokenizer: Tokenizer, config: PostTrainConfig) -> Iterator[Text]:
    preference = read_preference(record, tokenizer)
    if preference is None:
        yield Text(f"left out: only the two highest levels are trained on, and it is {record['level']}", style="dim")
        return
    is_dpo = isinstance(config, DpoConfig)
    unscored = tokenizer.stop_ids if is_dpo and config.dpo.masks_format else ()
    yield coloured(preference.prompt, ["user"] * len(preference.prompt), [False] * len(preference.prompt), tokenizer)
    for response in (preference.pair if is_dpo else preference).responses:
        counts = [wrote and i not in unscored for i, wrote in zip(response.ids, response.mask)]
        if not is_dpo:  # the reward is read at the last token that the assistant wrote
            counts = [at == max(i for i, wrote in enumerate(response.mask) if wrote) for at in range(len(response.ids))]
        yield Text(f"{RANKS[response.rank]}: ", style="bold") + coloured(response.ids, ["assistant" if w else "ipython" for w in response.mask], counts, tokenizer)


def coloured(ids: Sequence[int], roles: Sequence[str], counts: Sequence[bool], tokenizer: Tokenizer) -> Text:
    """Returns the tokens as text, special ones spelled, in the colours of their roles, with marks around those that count."""
    names = {i: name for name, i in tokenizer.special_ids.items()}
    text = Text()
    for (role, count), run in itertools.groupby(zip(ids, roles, counts, strict=True), key=lambda token: (token[1], token[2])):
        parts = itertools.groupby((i for i, _, _ in run), key=names.__contains__)
        spelled = "".join("".join(map(names.get, part)) if special else tokenizer.decode(list(part)) for special, part in parts)
        text.append(f"{OPEN}{spelled}{CLOSE}" if count else spelled, f"bold {COLOURS[role]}" if count else f"dim {COLOURS[role]}")
    return text
