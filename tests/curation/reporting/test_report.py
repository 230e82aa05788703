"""The report of a small run of real blocks: counts, samples, tables, hostile text, unfinished runs, the fate of single documents."""

import json
import shutil
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from hypothesis import given, settings
from hypothesis import strategies as st

from herd_jax.curation import parquet
from herd_jax.curation.block import Block, DropLog
from herd_jax.curation.deduplication import exchange
from herd_jax.curation.deduplication.duplicates import DUPLICATE, Duplicates
from herd_jax.curation.execution import CurationPhase, LocalExecutor
from herd_jax.curation.parquet import Load, Store, document_number
from herd_jax.curation.reporting.data import SAMPLES, collect
from herd_jax.curation.reporting.formats import printable, short
from herd_jax.curation.reporting.report import inspect
from herd_jax.data.streams import StreamWriter
from herd_jax.errors import UserError
from herd_jax.page.markup import element

TASKS, PER_TASK = 2, 20
HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\x1b[31m\ud800&amp;"
STRINGS = ("url", "date", "source", "media_type", "language", "category", "topic", "stream")
COLUMNS = {name: "string" for name in STRINGS} | {"quality": "float64"}


class Read(PipelineStep):
    """Document i of a task: every tenth hostile, odd ones German, all with i letters of text in a frame of markup."""

    type, name = "reader", "read"

    def run(self, data=None, rank=0, world_size=1):
        for i in range(PER_TASK):
            url = f"https://example.org/{rank}/{i}"
            metadata = {"url": url, "date": "2024-01-01", "source": f"crawl-{rank}.warc.gz", "media_type": "text/html"}
            yield Document(f"<p>{'x' * i}</p>", f"crawl-{rank}#{i}", metadata=metadata | {"language": "de" if i % 2 else "en"})


class UrlSafety(Block):
    name = "url_safety"

    def filter(self, doc):
        return True


class Extraction(Block):
    name = "extraction"

    def filter(self, doc):
        doc.text = doc.text[3:-4] or HOSTILE
        return True if doc.text != HOSTILE else (False, "no_content")


class Short(Block):
    name = "short"

    def filter(self, doc):
        doc.metadata |= {"category": "web" if doc.metadata["language"] == "en" else "multilingual", "quality": len(doc.text) / 20}
        doc.metadata["stream"] = {"web": "web-high"}.get(doc.metadata["category"], doc.metadata["category"])
        return len(doc.text) > 9 or (False, "one_letter" if len(doc.text) == 1 else "few_letters")


class Last(Block):
    name = "last"

    def filter(self, doc):
        return len(doc.text) != 19 or (False, "longest")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Of 20 documents a task: 0 has no content; 12 of task 0 is a near duplicate of 14 of task 1; 1 to 9 are short; 19 goes last."""
    workdir = tmp_path_factory.mktemp("curation") / "run"
    read, filtered, near = workdir / "documents" / "read", workdir / "documents" / "filter", workdir / "near_duplicates"
    exchange.write(near, 0, np.array([(document_number(0, 11), document_number(1, 13))], DUPLICATE))
    pipelines = {
        "read": [Read(), UrlSafety(), Extraction(), Store(read, COLUMNS)],
        "filter": [Load(read), Duplicates(near, "near_duplicate"), Short(), Store(filtered, COLUMNS)],
        "publish": [Load(filtered), Last(), Store(workdir / "clean", COLUMNS, by="stream")],
    }
    config = {"language": {"min_score": 0.5, "languages": ["en", "de"]}}
    (workdir / "config.json").write_text(json.dumps({"config": config, "inputs": {"a": 3, "b": 4}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "BATCH_CHARACTERS", 50)  # so that a file has several row groups
        for name, steps in pipelines.items():
            steps.append(DropLog(workdir / "dropped" / name, steps))
            for rank in range(TASKS):
                LocalExecutor(CurationPhase(name, steps, TASKS), workdir / "phases" / name).run_task(rank)
    (workdir / "phases" / "tasks.json").write_text(json.dumps(dict.fromkeys(("read", "filter", "publish"), TASKS)))
    return workdir


@pytest.fixture
def workdir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def add_stream(workdir, category, part, lengths):
    directory = workdir / "streams" / category / part
    directory.parent.mkdir(parents=True, exist_ok=True)
    with StreamWriter(directory, vocab_size=10) as writer:
        writer.append(np.zeros(sum(lengths), np.int32), np.array(lengths), 100)


def test_waterfall_counts_each_block(workdir):
    steps = collect(workdir).steps
    assert [(step.phase, step.block, step.documents, step.dropped) for step in steps] == [
        ("read", "url_safety", 40, 0),
        ("read", "extraction", 40, 2),
        ("filter", "near_duplicates", 38, 1),
        ("filter", "short", 37, 18),
        ("publish", "last", 19, 2),
    ]
    assert [dict(step.reasons) for step in steps][2:4] == [{"near_duplicate": 1}, {"few_letters": 16, "one_letter": 2}]
    kept = [2 * sum(range(20)), 2 * sum(range(20)) - 12, 2 * sum(range(10, 20)) - 12, 2 * sum(range(10, 19)) - 12]
    assert [step.characters for step in steps] == [2 * sum(range(20)) + 7 * 40, *kept]
    assert [step.characters_in for step in steps] == [None, None, *kept[:3]]  # before extraction it was markup
    assert [step.has_text for step in steps] == [False, True, True, True, True]


def test_text_and_files_agree(workdir):
    text = inspect(workdir)
    report = json.loads((workdir / "report.json").read_text())
    assert report["num_inputs"] == 2 and report["input_bytes"] == 7
    assert report["phases"] == [{"name": name, "completed": 2, "unfinished": 0} for name in ("read", "filter", "publish")]
    rows = [line.split() for line in text.splitlines()]
    for step in report["steps"]:
        (line,) = [row for row in rows if step["block"] in row and str(step["documents"]) in row]
        assert str(step["dropped"]) in line and str(step["kept"]) in line
    assert "few_letters" in text and "report.html" in text
    page = (workdir / "report.html").read_bytes()
    inspect(workdir)
    assert (workdir / "report.html").read_bytes() == page


def test_a_run_is_finished_with_its_mix(workdir):
    assert not collect(workdir).is_finished
    (workdir / "mix.json").write_text(json.dumps({"table": ""}))
    assert collect(workdir).is_finished
    (workdir / "phases" / "publish" / "completions" / "00000").unlink()
    assert not collect(workdir).is_finished


def test_tables_and_histograms_count_all_clean_documents(workdir):
    report = collect(workdir)
    clean = report.clean
    assert {(group.stream, group.category, group.language, group.source_type): group.documents for group in clean.groups} == {
        ("web-high", "web", "en", ".warc.gz"): 9,  # 10 to 18 without the duplicate
        ("multilingual", "multilingual", "de", ".warc.gz"): 8,
    }
    assert sum(group.characters for group in clean.groups) == report.steps[-1].characters
    assert report.read == {"language": {"de": 20, "en": 18}, "source_type": {".warc.gz": 38}}
    web = next(lengths for lengths in clean.lengths if lengths.stream == "web-high")
    assert (web.edges, web.counts) == ([8.0, 16.0, 32.0], [5, 4])  # 10 12 14 of one task, 10 14 of the other; 16 18 of both
    quality = {histogram.stream: histogram for histogram in clean.qualities}["web-high"]
    assert (quality.edges[0], quality.edges[-1], sum(quality.counts)) == (0, 1, 9)


def test_samples_are_few_and_the_same_in_any_order_of_tasks(workdir):
    samples = collect(workdir).samples
    per_reason = Counter((sample.block, sample.reason) for sample in samples)
    assert per_reason == {
        ("extraction", "no_content"): 2,
        ("near_duplicates", "near_duplicate"): 1,
        ("short", "few_letters"): SAMPLES,
        ("short", "one_letter"): 2,
        ("last", "longest"): 2,
    }
    (duplicate,) = [sample for sample in samples if sample.duplicate_of]
    assert duplicate.id == "crawl-0#12"
    assert duplicate.duplicate_of == {"id": "crawl-1#14", "url": "https://example.org/1/14", "text": "x" * 14}
    first, second = sorted((workdir / "dropped" / "filter").iterdir())
    swapped = second.read_text()
    second.write_text(first.read_text())
    first.write_text(swapped)
    assert collect(workdir).samples == samples


class Page(HTMLParser):
    """Elements that are open must be closed in turn; collects tags, attributes and texts."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], set(), [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_page_obeys_no_text_and_loads_nothing(workdir):
    (workdir / "problems").mkdir()
    (workdir / "problems" / "00000.json").write_text(json.dumps([{"file": "<b>a.warc", "reason": HOSTILE}]))
    rows = [["general", "50.0%", "12.5%", "3K", "<i>", "0.1"], ["  streams/general-en", "", "12.5%", "3K", "24K", "0.1"]]
    phase = {"from_tokens": 0, "to_tokens": 4000, "rows": rows, "remarks": [f"short\n{HOSTILE}"]}
    (workdir / "mix.json").write_text(json.dumps({"phases": [phase], "unused": ["the run reads 3K"], "table": "a table for terminals"}))
    contamination = [{"benchmark": "<i>mmlu", "items": 12345, "items_at": {"20%": 7, "<i>": HOSTILE}}]
    (workdir / "contamination.json").write_text(json.dumps(contamination))
    text = inspect(workdir)
    html = (workdir / "report.html").read_text()
    page = Page(html)
    assert not page.tags & {"script", "img", "b onerror", "link", "iframe", "i", "object"}
    assert {name for name, _ in page.attributes if name.startswith("on") or name == "src"} == set()
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    shown = [text for text in page.texts if "alert(2)" in text]
    assert len(shown) == 5 and all("<script>alert(1)</script>" in text and "&amp;" in text for text in shown)
    assert {"general-en", "there are", "24K", "the run reads 3K", "From 0 to 4,000 tokens"} <= set(page.texts) and "a table for terminals" not in page.texts
    assert "12,345" in page.texts and "items_at 20%" in page.texts and "<i>mmlu" in page.texts and "language.min_score" in page.texts
    assert "\x1b" not in html + text and "\u202e" not in text


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_escaped_text_comes_back(text):
    page = Page(element("p", text, title=text))
    assert "".join(page.texts) == page.attributes[0][1]
    read = page.attributes[0][1]
    assert len(read) == len(text) and all(a == b or b == "\ufffd" for a, b in zip(text, read))
    assert printable(text).isprintable()


@pytest.mark.parametrize(
    "number, written", [(0, "0"), (99_949, "99,949"), (99_950, "100k"), (999_499, "999k"), (999_500, "1.0M"), (12_345_678, "12.3M")]
)
def test_short_numbers(number, written):
    assert short(number) == written


def test_tokens_come_from_streams_and_are_estimated_for_blocks(workdir):
    before = collect(workdir)
    assert before.characters_per_token is None and before.tokens_of(before.steps[-1]) is None
    characters = sum(group.characters for group in before.clean.groups if group.category == "web")
    assert characters % 2 == 0
    add_stream(workdir, "web-high", "train", [characters // 2 - 10, 3])
    add_stream(workdir, "web-high", "validation", [7])
    add_stream(workdir, "multilingual", "validation", [])
    report = collect(workdir)
    assert report.tokens == {"web-high": {"train": characters // 2 - 7, "validation": 7}, "multilingual": {"validation": 0}}
    assert report.remarks == []
    assert report.tokens_by_category() == {"web": report.tokens["web-high"], "multilingual": {"validation": 0}}
    assert report.characters_per_token == 2  # of web alone: nothing else is tokenized
    assert report.tokens_of(report.steps[-1]) == report.steps[-1].characters / 2 and report.tokens_of(report.steps[0]) is None
    assert "~" in inspect(workdir)
    (workdir / "streams" / "web-high" / "train" / "shard-00000.tokens").write_bytes(b"")
    damaged = collect(workdir)
    assert "train" not in damaged.tokens["web-high"] and "shard-00000.tokens" in damaged.remarks[0]


def test_unfinished_run(workdir):
    shutil.rmtree(workdir / "phases" / "publish")
    (workdir / "phases" / "filter" / "completions" / "00001").unlink()
    (workdir / "phases" / "filter" / "stats" / "00001.json").write_text('[{"name": "filter: sh')  # killed while it was written
    for path in (workdir / "clean", workdir / "dropped" / "publish"):
        shutil.rmtree(path)
    (workdir / "dropped" / "filter" / "00001.jsonl").unlink()
    text = inspect(workdir)
    assert "read done, filter unfinished (1 of 2 tasks done), publish unfinished (0 of 2 tasks done)" in text
    report = collect(workdir)
    assert not report.is_finished
    assert [(step.block, step.documents) for step in report.steps[1:]] == [("extraction", 40), ("near_duplicates", 19), ("short", 18)]
    assert report.steps[2].characters_in is None  # of one task, where the phase before had two
    assert "not finished" in (workdir / "report.html").read_text()
    assert "waits" in inspect(workdir, "crawl-1#15")
    with pytest.raises(UserError, match="has the id or URL 'nowhere' yet .filter unfinished"):
        inspect(workdir, "nowhere")


def test_a_run_that_has_not_begun(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"config": {}, "inputs": {}}))
    assert "nothing has run yet" in inspect(tmp_path)
    assert not collect(tmp_path).is_finished


@pytest.mark.parametrize("name, said", [("", "has no config.json"), ("absent", "does not exist")])
def test_a_directory_of_something_else(tmp_path, name, said):
    for document in (None, "x"):
        with pytest.raises(UserError, match=said):
            inspect(tmp_path / name, document)
    assert list(tmp_path.iterdir()) == []


def test_fate_of_a_document(workdir):
    files = set(workdir.rglob("*"))
    dropped_early = inspect(workdir, "crawl-0#0")
    assert "by extraction in phase read: no_content" in dropped_early and "passed      url_safety\n" in dropped_early
    duplicate = inspect(workdir, "https://example.org/0/12").splitlines()
    assert duplicate[0] == "crawl-0#12"
    assert "place 00000:11" in duplicate[2] and "source crawl-0.warc.gz" in duplicate[2]
    assert [line.split(maxsplit=1) for line in duplicate[3:]] == [
        ["passed", "url_safety, extraction"],
        ["dropped", "by near_duplicates in phase filter: near_duplicate"],
        ["duplicates", "crawl-1#14  https://example.org/1/14"],
    ]
    clean = inspect(workdir, "crawl-1#14")
    assert "passed      url_safety, extraction, near_duplicates, short, last" in clean
    assert "in clean/web-high/00001.parquet: language en, category web, quality 0.7" in clean
    with pytest.raises(UserError, match="no document of .* has the id or URL 'crawl-1#140'"):
        inspect(workdir, "crawl-1#140")
    assert set(workdir.rglob("*")) == files
    shutil.rmtree(workdir / "documents")  # they take room, and may be removed
    assert "place 00001:13, whose file is gone" in inspect(workdir, "crawl-0#12")


def test_fate_of_all_documents_of_a_url(workdir):
    log = workdir / "dropped" / "read" / "00001.jsonl"
    entry = {"id": "old#0", "url": "https://example.org/1/14", "block": "extraction", "reason": "no_content\x1b[31m"}
    log.write_text(log.read_text() + json.dumps(entry) + "\n")
    text = inspect(workdir, "https://example.org/1/14")
    assert "crawl-1#14" in text and "old#0" in text and "\x1b" not in text


def test_a_page_that_cannot_be_written(workdir):
    (workdir / "report.html.unfinished").mkdir()
    with pytest.raises(UserError, match="report.html cannot be written"):
        inspect(workdir)
