"""The phases of a curation run (section 3.1 of the paper): maps over the tasks of the input, and exchanges between them.

Tasks depend on the input files alone, and what a task writes on what it reads alone; so the bytes that come out depend neither on the number
of workers nor on interruptions.

    WORKDIR/documents/read        after URLs, extraction, language and PII          (phase read)
    WORKDIR/exchange/...          hashes on their way between tasks
    WORKDIR/documents/filtered    after deduplication, heuristics and classifiers, where topics are to be rebalanced (phase filter)
    WORKDIR/clean/STREAM          the result as text                                (phase publish, or filter)
    WORKDIR/streams/STREAM        the result as token streams, beside them tokenizer, mix.json and train.py
"""

from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from herd_jax.curation.block import DropLog
from herd_jax.curation.classification.categories import Categories
from herd_jax.curation.classification.quality import Quality
from herd_jax.curation.classification.rebalance import Rebalance, TopicRates
from herd_jax.curation.decontamination import BuildIndex, Decontaminate, ReportContamination
from herd_jax.curation.deduplication.duplicates import URL, Duplicates, Emit, Reduce, older_versions, url_records
from herd_jax.curation.deduplication.lines import LINE, Bucket, CountSurvivors, DuplicateLines, FrequentLines, line_records
from herd_jax.curation.deduplication.minhash import BAND, MinHash, near_duplicates
from herd_jax.curation.deduplication.passages import PASSAGE, PassageRecords, RepeatedPassages, repeated_passages
from herd_jax.curation.execution import CurationPhase
from herd_jax.curation.heuristics.code_rules import CodeRules
from herd_jax.curation.heuristics.outliers import Outliers
from herd_jax.curation.heuristics.rules import prose_blocks
from herd_jax.curation.heuristics.word_counts import CountWords, SumWords
from herd_jax.curation.input.extraction import Extraction
from herd_jax.curation.input.reading import Reader
from herd_jax.curation.language import Language
from herd_jax.curation.parquet import Load, Number, Store
from herd_jax.curation.safety.pii import Pii
from herd_jax.curation.safety.urls import UrlSafety
from herd_jax.curation.settings import CurationConfig
from herd_jax.curation.streams import Join, MakeTokenizer, NameStream, Tokenize
from herd_jax.curation.write_mix import PlanMix

READ_COLUMNS = {name: "string" for name in ("url", "date", "source", "media_type", "language")} | {"language_score": "float64"}
CLEAN_COLUMNS = READ_COLUMNS | {"category": "string", "topic": "string", "quality": "float64"}
MAX_REDUCERS = 1024
JOINERS = 16  # tasks that join parts to streams, of which there is one a category and language


class CurationPlan:
    """The phases of a run."""

    def __init__(self, config: CurationConfig, workdir: Path, tasks: list):
        self.config, self.workdir, self.tasks = config, workdir, tasks
        self.exchange = workdir / "exchange"
        self.read, self.filtered, self.clean = workdir / "documents" / "read", workdir / "documents" / "filtered", workdir / "clean"
        self.dropped = [self.exchange / "duplicate_urls"] * config.deduplication.urls + [self.exchange / "near_duplicates"] * (config.deduplication.bands > 0)

    def phases(self) -> list[CurationPhase]:
        return [*self._reading(), *self._deduplication(), *self._filtering(), *self._tokenizing()]

    def _reading(self) -> list[CurationPhase]:
        config = self.config
        steps = [
            Reader(self.tasks, config.reading),
            *([UrlSafety(config.urls)] if config.urls else []),
            Extraction(config.extraction),
            Language(config.language),
            *([Pii(config.pii)] if config.pii else []),
            Number(),
            *([Emit(self.exchange / "urls", URL, url_records)] if config.deduplication.urls else []),
            Store(self.read, READ_COLUMNS),
        ]
        steps[0].problems = self.workdir / "problems"
        return [self._judging("read", steps)]

    def _deduplication(self) -> list[CurationPhase]:
        config, phases = self.config.deduplication, []
        if config.urls:
            phases.append(self._reducing("duplicate_urls", "urls", older_versions))
        if config.bands:
            minhash = MinHash(config.bands, config.rows, config.fold_digits)
            steps = [Load(self.read), *self._duplicates()[: config.urls], Emit(self.exchange / "bands", BAND, minhash.records)]
            phases += [self._mapping("signatures", steps), self._reducing("near_duplicates", "bands", near_duplicates)]
        survivors = self.exchange / "survivors.npy"
        count = CountSurvivors(self.read, tuple(self.dropped), len(self.tasks), survivors)
        lines = [Emit(self.exchange / "lines", LINE, line_records)] if config.lines else []
        words = [CountWords(self.exchange / "words")] if self.config.outliers else []
        phases += [CurationPhase("survivors", [count], 1), self._mapping("lines", [*self._survivors(), *lines, *words])]
        if config.lines:
            frequent = FrequentLines(self.exchange / "lines", self.exchange / "frequent_lines", config.max_line_documents)
            phases.append(CurationPhase("frequent_lines", [frequent], self._num_reducers))
        if self.config.outliers:
            phases.append(CurationPhase("words", [SumWords(self.exchange / "words", self.exchange / "words.npz")], 1))
        if config.passage_words:
            emit = Emit(self.exchange / "passages", PASSAGE, PassageRecords(config.passage_words))
            phases.append(self._mapping("passages", [*self._survivors(), *self._without_lines(), emit]))
            phases.append(self._reducing("repeated_passages", "passages", repeated_passages))
        return phases

    def _filtering(self) -> list[CurationPhase]:
        config = self.config
        passages = config.deduplication.passage_words
        steps = [
            *self._survivors(),
            *self._without_lines(),
            *([RepeatedPassages(self.exchange / "repeated_passages", passages)] if passages else []),
            *prose_blocks(config.rules),
            *([CodeRules(config.code_rules)] if config.code_rules else []),
            *([Outliers(config.outliers, self.exchange / "words.npz")] if config.outliers else []),
        ]
        phases, index, hits = [], self.exchange / "benchmarks.npz", self.exchange / "benchmark_hits"
        if config.decontamination.benchmarks:
            phases.append(CurationPhase("benchmarks", [BuildIndex(config.decontamination, index)], 1))
            steps.append(Decontaminate(config.decontamination, index, hits))
        steps += [*([Quality(config.quality)] if config.quality else []), Categories(config.categories)]
        if not config.topic_caps:
            phases.append(self._judging("filter", [*steps, *self._publishing()]))
        else:
            rates = self.exchange / "topic_rates.json"
            phases.append(self._judging("filter", [*steps, Store(self.filtered, CLEAN_COLUMNS)]))
            phases.append(CurationPhase("topics", [TopicRates(config.topic_caps, self.filtered, rates)], 1))
            phases.append(self._judging("publish", [Load(self.filtered), Rebalance(rates), *self._publishing()]))
        if config.decontamination.benchmarks:
            phases.append(CurationPhase("contamination", [ReportContamination(index, hits, self.workdir / "contamination.json")], 1))
        return phases

    def _tokenizing(self) -> list[CurationPhase]:
        config, tokenizer, parts, streams = self.config, self.workdir / "tokenizer", self.workdir / "parts", self.workdir / "streams"
        return [
            CurationPhase("tokenizer", [MakeTokenizer(config.tokenizer, self.clean, tokenizer)], 1),
            self._mapping("tokenize", [Tokenize(self.clean, tokenizer, parts)]),
            CurationPhase("streams", [Join(parts, tokenizer, streams, config.validation_fraction)], JOINERS),
            CurationPhase("mix", [PlanMix(config.mix, streams, config.high_quality, self.workdir)], 1),
        ]

    def _mapping(self, name: str, steps: list[PipelineStep]) -> CurationPhase:
        """Returns a phase over the tasks of the input."""
        return CurationPhase(name, steps, len(self.tasks))

    def _judging(self, name: str, steps: list[PipelineStep]) -> CurationPhase:
        """Returns a mapping whose blocks log what they drop."""
        return self._mapping(name, [*steps, DropLog(self.workdir / "dropped" / name, steps)])

    def _reducing(self, target: str, source: str, function) -> CurationPhase:
        return CurationPhase(target, [Reduce(self.exchange / source, self.exchange / target, function)], self._num_reducers)

    @property
    def _num_reducers(self) -> int:
        return min(len(self.tasks), MAX_REDUCERS)

    def _duplicates(self) -> list[PipelineStep]:
        reasons = {"duplicate_urls": "newer_version_exists", "near_duplicates": "near_duplicate"}
        return [Duplicates(directory, reasons[directory.name]) for directory in self.dropped]

    def _survivors(self) -> list[PipelineStep]:
        return [Load(self.read), *self._duplicates(), Bucket(self.exchange / "survivors.npy", self.config.deduplication.line_bucket)]

    def _without_lines(self) -> list[PipelineStep]:
        return [DuplicateLines(self.exchange / "frequent_lines")] if self.config.deduplication.lines else []

    def _publishing(self) -> list[PipelineStep]:
        return [NameStream(self.config.high_quality), Store(self.clean, CLEAN_COLUMNS, by="stream")]
