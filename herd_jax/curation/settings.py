"""The configuration of a curation run: what each block owns, put together."""

import dataclasses

from herd_jax.curation.classification.categories import CATEGORIES, CategoriesConfig
from herd_jax.curation.classification.quality import QualityConfig
from herd_jax.curation.decontamination import DecontaminationConfig
from herd_jax.curation.deduplication.duplicates import DeduplicationConfig
from herd_jax.curation.execution import ClusterConfig
from herd_jax.curation.heuristics.code_rules import CodeRulesConfig
from herd_jax.curation.heuristics.outliers import OutliersConfig
from herd_jax.curation.heuristics.rules import RULES, Rules
from herd_jax.curation.input.extraction import ExtractionConfig
from herd_jax.curation.input.reading import ReadingConfig
from herd_jax.curation.language import LanguageConfig
from herd_jax.curation.mix import MixConfig
from herd_jax.curation.safety.pii import PiiConfig
from herd_jax.curation.safety.urls import UrlSafetyConfig
from herd_jax.errors import UserError

SMALLEST_VOCABULARY = 260


@dataclasses.dataclass(frozen=True)
class CurationConfig:
    """Everything that `python -m herd_jax.curate` reads. A section that is none switches its block off.

    `tokenizer` is a name or path for `load_tokenizer`, or the size of a vocabulary to train on the result. Documents of `high_quality` or more
    become streams of their own (CATEGORY-high), for the mix to upsample. `topic_caps` are largest shares of topics. `workers` 0: as many as there are cores.
    """

    workdir: str  # directory of the run: everything it writes; the same command continues what is there
    input: tuple[str, ...]  # files, directories or globs
    executor: str = "local"  # local | slurm | ray
    workers: int = 0  # tasks at once; 0: as many as there are cores
    cluster: ClusterConfig = ClusterConfig()
    reading: ReadingConfig = ReadingConfig()
    urls: UrlSafetyConfig | None = UrlSafetyConfig()
    extraction: ExtractionConfig = ExtractionConfig()
    language: LanguageConfig = LanguageConfig()
    pii: PiiConfig | None = PiiConfig()
    deduplication: DeduplicationConfig = DeduplicationConfig()
    rules: tuple[Rules, ...] = RULES  # limits for prose, by language
    code_rules: CodeRulesConfig | None = CodeRulesConfig()
    outliers: OutliersConfig | None = OutliersConfig()
    decontamination: DecontaminationConfig = DecontaminationConfig()
    quality: QualityConfig | None = None
    categories: CategoriesConfig = CategoriesConfig()
    topic_caps: dict[str, float] = dataclasses.field(default_factory=dict)  # largest share of the documents that a topic may have
    tokenizer: str = "8192"  # name or path, or the size of a vocabulary to train on the result
    validation_fraction: float = 0.01  # of the documents, held out
    high_quality: float | None = None  # quality from which documents become streams of their own, CATEGORY-high
    mix: MixConfig = MixConfig()

    def __post_init__(self):
        if not self.workdir or not self.input:
            raise UserError("workdir or input is empty: give --config.workdir=DIR and --config.input=GLOB")
        if self.workers < 0:
            raise UserError(f"workers is {self.workers}: it must be 1 or more, or 0 for as many as there are cores")
        if not 0 < self.validation_fraction < 1:  # training validates on each stream
            raise UserError(f"validation_fraction is {self.validation_fraction}: it must be more than 0 and less than 1")
        if self.tokenizer.isdecimal() and int(self.tokenizer) < SMALLEST_VOCABULARY:
            raise UserError(f"tokenizer is {self.tokenizer}: a vocabulary to train needs {SMALLEST_VOCABULARY} or more, for all bytes")
        if self.high_quality is not None and not self.quality:
            raise UserError("high_quality is set, but no document gets a quality: set quality.linear.path, or leave high_quality out")
        caps = self.mix.max_epochs if isinstance(self.mix.max_epochs, dict) else {}
        for name in (*caps, *(name for target in self.mix.targets for name in target.shares)):
            if name not in CATEGORIES:
                raise UserError(f"the mix names '{name}', which is no category: take {', '.join(CATEGORIES)}")
