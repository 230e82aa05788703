"""Supervised fine-tuning: the next token of dialogs, where the assistant wrote it (section 4.1.3 of the paper)."""

import dataclasses

from herd_jax.data.dialogs import read_dialogs
from herd_jax.post_training.config import SftConfig
from herd_jax.post_training.packed_data import PackedData
from herd_jax.training.next_token import NEXT_TOKEN
from herd_jax.training.step import Steps


def open_dialogs(config: SftConfig, steps: Steps) -> PackedData:
    """Returns the dialogs of a run. Raises UserError for sources that are missing or of which too many records cannot be trained on."""
    return PackedData(config, steps, read_dialogs)


SFT = dataclasses.replace(NEXT_TOKEN, name="SFT", open=open_dialogs)
