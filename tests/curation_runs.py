"""Texts for curation runs, their settings, and what they made."""

import hashlib
import random
import re
from pathlib import Path
from pydoc_data.topics import topics

from herd_jax.config import parse
from herd_jax.curation.settings import CurationConfig

FRENCH = (
    "La bibliothèque de la ville a été fondée par un groupe de marchands qui voulaient que les enfants du quartier puissent lire. Au début, elle ne "
    "contenait que quelques centaines de livres, rangés dans une salle prêtée par la mairie. Les habitants ont ensuite donné des ouvrages, et une "
    "partie du fonds vient encore de ces dons. Pendant la guerre, le bâtiment a été fermé et les livres ont été cachés dans la cave d'une école. "
    "Depuis la réouverture, elle prête des livres à tous ceux qui en font la demande et organise des lectures pour les plus jeunes."
)
VOCABULARY = sorted(set(re.findall(r"\b[a-z]{4,9}\b", " ".join(topics.values()))))
SETTINGS = {
    "urls": {"use_datatrove_lists": False},
    "tokenizer": "bytes",
    "validation_fraction": 0.1,
    "workers": 1,
}


def prose(seed: int) -> str:
    """Twenty-five sentences of words from the Python documentation: English to every rule, and unlike any other seed's."""
    chance = random.Random(seed)
    form = "The {} {} of the {} and a {} have to {} that {} with {} to {}."
    sentences = [form.format(*chance.choices(VOCABULARY, k=8)) for _ in range(25)]
    return "\n".join(" ".join(sentences[i : i + 5]) for i in range(0, 25, 5))


def configured(inputs: Path, workdir: Path, **changes) -> CurationConfig:
    return parse(CurationConfig, {**SETTINGS, "workdir": str(workdir), "input": (str(inputs),), **changes})


def results(workdir: Path) -> dict[str, str]:
    """Checksums of everything that a run makes, but for its statistics of time."""
    kept = ("clean", "streams", "tokenizer", "documents", "dropped", "exchange")
    files = [file for name in kept for file in sorted((workdir / name).rglob("*")) if file.is_file()]
    assert files and not [file for file in files if "unfinished" in file.name]
    return {str(file.relative_to(workdir)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
