"""The report of evaluations: every number of every command in page and JSON, hostile names harmless, nothing loaded from elsewhere."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest

from herd_jax.errors import UserError
from herd_jax.evaluate import main
from herd_jax.evaluation.comparison.compare import compare
from herd_jax.evaluation.contamination.gain import estimate
from herd_jax.evaluation.report.report import report
from herd_jax.evaluation.results import half_interval, write_items, write_results
from herd_jax.evaluation.robustness import robustness
from herd_jax.evaluation.robustness.variants import studies

HOSTILE = "</title><script>alert(1)</script>"
TASKS = ("boolq", "human_eval", "mmlu", HOSTILE)


class Page(HTMLParser):
    """Its text, and every element's tag and attributes."""

    def __init__(self, markup):
        super().__init__()
        self.texts, self.elements = [], []
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


def add_workdir(path, seed):
    """Of a run with two stages, at the second of which the gate once made it train on."""
    rng = np.random.default_rng(seed)
    for stage, (first, loss) in {"1-256": (0, 3.0), "2-1024": (0, 2.6)}.items():
        directory = path / "stages" / stage
        directory.mkdir(parents=True)
        lines = [{"step": first + 10 * n, "loss": 1.0} for n in range(20)]
        for n in range(1, 20, 2):
            values = {f"val_bits_per_byte/{name}": loss - 0.04 * n + rng.normal(0, 0.02) for name in ("web", "code")}
            lines[n] |= values | {"val_loss": loss, "val_bits_per_byte": sum(values.values()) / 2}
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 200, "val')
    gate = {"tokens": 10_000, "short_loss": 2.5, "gate": {}}
    decisions = [
        gate | {"stage": 1, "seq_len": 256, "steps": 190, "short_loss_before": None, "needle_recall": {},
                "verdict": "passed", "reason": "short-context loss 2.5"},
        gate | {"stage": 2, "seq_len": 1024, "steps": 190, "short_loss_before": 2.5, "needle_recall": {"256": {"0.0": 1, "1.0": 0.25}},
                "verdict": "trains on", "reason": "needles: 25% found at 256 tokens, depth 1"},
        gate | {"stage": 2, "seq_len": 1024, "steps": 230, "short_loss_before": 2.5, "needle_recall": {"256": {"0.0": 1, "1.0": 1}},
                "verdict": "passed", "reason": "needles: 100% found"},
    ]  # fmt: skip
    (path / "stages.jsonl").write_text("".join(json.dumps(line) + "\n" for line in decisions))


def add_model(directory, workdir, seed):
    """What every command writes of a model, with numbers at random."""
    rng = np.random.default_rng(seed)
    add_workdir(workdir, seed)
    found = {}
    for task in TASKS:
        scores = rng.random(200) < 0.3 + 0.1 * seed
        write_items(directory, task, ({"id": f"{n}", "score": int(score)} for n, score in enumerate(scores)))
        acc = {"value": scores.mean(), "stderr": 0.03, "interval": half_interval(scores.mean(), 200)}
        found[task] = {"metrics": {"acc": acc, "acc_norm": acc}, "items": 200, "shots": 5, "version": 1}
    perplexity = {"value": 12.345, "stderr": None, "interval": None}
    metrics = {"word_perplexity": perplexity, "nan": perplexity | {"value": np.nan}}
    found["wikitext"] = {"metrics": metrics, "items": 20, "shots": None, "version": 1}
    write_results(directory, "run", workdir, {"tasks": TASKS, "limit": 200}, found)
    recall = np.clip(rng.random((4, 11)) + 0.3, 0, 1).round(2)
    lengths, depths = (256, 1024, 8192, 131_072), np.arange(11) / 10
    needle = {"lengths": lengths, "depths": depths, "recall": recall, "mean": recall.mean(), "half_interval": 0.01, "num_items": 176}
    write_results(directory, "needle", workdir, {"num_samples": 4}, needle)
    multi = {"lengths": lengths, "depths": (), "recall": recall[:, 0], "mean": recall[:, 0].mean(), "half_interval": 0.01, "num_items": 40}
    write_results(directory, "multi-needle", workdir, {"num_samples": 10}, multi)
    answers = rng.integers(0, 4, 100)
    measured = {}
    for study, variants in studies().items():
        picks = np.where(rng.random((len(variants), 100)) < 0.3 + 0.1 * seed, answers, rng.integers(0, 4, (len(variants), 100)))
        measured[study] = robustness.compare(variants, picks, answers)
    write_results(directory, "robustness", workdir, {"limit": None}, {"mmlu": {"num_items": 100, "studies": measured}})
    write_results(directory, "dataset-value", workdir, {}, {"gain": 0.25})


@pytest.fixture
def evaluated(tmp_path):
    """Directories of two models, their comparison and their contamination."""
    for seed, name in ((1, "ant"), (3, "whale")):
        add_model(tmp_path / "evaluation" / name, tmp_path / "runs" / name, seed)
    directories = [str(tmp_path / "evaluation" / name) for name in ("ant", "whale", "both", "contamination")]
    compare(*directories[:3])
    coverage = {f"{n}": n % 2 for n in range(200)}
    score = {"whale": {f"{n}": n % 2 for n in range(200)}, "ant": {f"{n}": n % 3 == 0 for n in range(200)}}
    results = {"mmlu": estimate(coverage, score), "boolq": estimate(coverage, {})}
    settings = {"streams": ["web/train"], "scores": {"ant": directories[0], "whale": directories[1]}}
    write_results(directories[3], "contamination", "", settings, results)
    return directories


def test_everything_is_on_the_page(evaluated, tmp_path):
    printed = report(evaluated, str(tmp_path / "out"))
    assert printed.splitlines() == [f"written: {tmp_path / 'out' / name}" for name in ("report.html", "report.json")]
    page, joined = Page((tmp_path / "out" / "report.html").read_text()), json.loads((tmp_path / "out" / "report.json").read_text())
    titles = ["Benchmarks", "Comparison", "Needles", "Robustness", "Contamination"]
    titles += ["Validation loss", "Stage gates", "Other results", "Settings"]
    assert [attrs["id"] for tag, attrs in page.elements if tag == "section"] == [title.lower().replace(" ", "-") for title in titles]
    for model in joined["models"]:
        *shares, perplexity = model["benchmarks"]
        assert len(shares) == 8 and perplexity["task"] == "wikitext" and "12.35" in page.text
        for row in shares:
            assert f"{100 * row['score']:.1f} ± {100 * row['half_interval']:.1f}" in page.text and row["task"] in page.text
        assert f"{model['records']['needle']['results']['mean']:.1%} of 176 needles" in page.text
        assert all(f"{row['val_bits_per_byte/web']:.4f}" in page.text for rows in model["validation"].values() for row in rows)
        assert [line["verdict"] for line in model["decisions"]] == ["passed", "trains on", "passed"]
        assert list(model["validation"]) == ["1-256", "2-1024"] and len(model["validation"]["1-256"]) == 10
    assert "+50.0*" in page.text and "needles: 25% found at 256 tokens, depth 1" in page.text and "0.25" in page.text
    assert joined["comparisons"][0]["results"]["mmlu"]["num_items"] == 200


def test_one_model_by_itself(evaluated):
    report(evaluated[:1])
    page = Page(open(f"{evaluated[0]}/report.html").read())
    assert "ant" in page.text and "whale" not in page.text
    before = open(f"{evaluated[0]}/report.html").read(), open(f"{evaluated[0]}/report.json").read()
    report(evaluated[:1])  # what a report wrote is no result
    assert before == (open(f"{evaluated[0]}/report.html").read(), open(f"{evaluated[0]}/report.json").read())


def test_a_run_that_was_not_evaluated_has_its_curves(tmp_path):
    add_workdir(tmp_path / "run", 0)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 5, "val_loss": 2.25}\n{"step": 9, "val_loss": null}\n')
    report([str(tmp_path / "run")], str(tmp_path / "out"))
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert [attrs["id"] for tag, attrs in page.elements if tag == "section"] == ["validation-loss", "stage-gates"]
    assert "2.2500" in page.text


def test_nothing_is_loaded_and_no_text_is_obeyed(evaluated, tmp_path):
    report(evaluated, str(tmp_path / "out"))
    markup = (tmp_path / "out" / "report.html").read_text()
    page = Page(markup)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe", "object"} and HOSTILE in page.text
    for _, attrs in page.elements:
        assert not any(name.startswith("on") or name == "src" for name in attrs)
        assert attrs.get("href", "#").startswith("#")
    assert "url(" not in markup and "@import" not in markup
    assert all(attrs.get("aria-label") for tag, attrs in page.elements if tag == "svg")


def test_the_commands(evaluated, tmp_path, monkeypatch, capsys):
    """From the command line, in a directory of one's own: where outputs go by default."""
    monkeypatch.chdir(tmp_path)
    for arguments in (["compare", *evaluated[:2]], ["report", *evaluated[:2], "evaluation/ant-vs-whale"], ["report", evaluated[1]]):
        monkeypatch.setattr("sys.argv", ["evaluate", *arguments])
        main()
    written = [line.removeprefix("written: ") for line in capsys.readouterr().out.splitlines() if line.startswith("written: ")]
    pages = [f"{directory}/report.{kind}" for directory in ("evaluation/report", evaluated[1]) for kind in ("html", "json")]
    assert written == ["evaluation/ant-vs-whale/compare.json", *pages] and all((tmp_path / file).is_file() for file in written)


def test_bad_input(evaluated, tmp_path):
    (tmp_path / "empty").mkdir()
    write_results(tmp_path / "mixed", "run", "a", {}, {})
    write_results(tmp_path / "mixed", "needle", "b", {}, {})
    (tmp_path / "runs" / "ant" / "stages.jsonl").write_text('{"stage": \n{"stage": 2}\n')
    for directories, message in (
        ([tmp_path / "none"], "none is no directory"),
        ([tmp_path / "empty"], "empty holds no results"),
        ([tmp_path / "mixed"], r"mixed holds results of several models \(a, b\)"),
        ([evaluated[0]], "stages.jsonl is damaged in line 1"),
    ):
        with pytest.raises(UserError, match=message) as error:
            report(list(map(str, directories)), str(tmp_path / "out"))
        assert "\n" not in str(error.value)
