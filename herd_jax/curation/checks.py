"""What a run would come upon in its last phase, found before its first: models, tokenizers and benchmarks that are not there."""

from collections import deque

from herd_jax.curation.benchmark_items import read_items
from herd_jax.curation.classification.categories import topic_rates
from herd_jax.curation.classification.classifiers import label_number, read_labels
from herd_jax.curation.language import Language
from herd_jax.curation.settings import CurationConfig
from herd_jax.curation.streams import load_ending
from herd_jax.errors import UserError


def check(config: CurationConfig) -> None:
    """Opens what later phases will open. Raises UserError where that fails, or a classifier does not have a label that is asked for."""
    Language(config.language).check()
    if not config.tokenizer.isdecimal():
        load_ending(config.tokenizer)
    for benchmark in config.decontamination.benchmarks:
        deque(read_items(benchmark), maxlen=0)
    quality, categories = config.quality, config.categories
    for classifier in (quality and quality.linear, quality and quality.transformer, categories.code, categories.reasoning):
        if classifier:
            label_number(read_labels(classifier.path), classifier.label, classifier.path)
    if config.topic_caps and not categories.topics:
        raise UserError("topic_caps is set, but categories.topics is not: name the classifier whose labels are the topics")
    topic_rates({}, config.topic_caps)  # refuses caps out of range
    if categories.topics:
        labels = read_labels(categories.topics)
        for topic in config.topic_caps:
            label_number(labels, topic, categories.topics)
