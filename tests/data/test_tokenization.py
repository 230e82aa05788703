"""From files to streams: every document exactly once, the same bytes for any number of processes, what is skipped, errors."""

import gzip
import json
import random
from pathlib import Path

import pytest
import small_tokenizers

from herd_jax import tokenize
from herd_jax.data import documents
from herd_jax.data.source_files import find_files
from herd_jax.data.streams import TokenStream
from herd_jax.data.tokenization import tokenize_files
from herd_jax.errors import UserError
from herd_jax.text.tokenizer import load_tokenizer

WORDS = "the quick brown fox jumps over a lazy dog été 日本 \n \t def return ( ) 1 23".split(" ")


def make_texts(count, seed=0):
    rng = random.Random(seed)
    return [f"{i}: " + " ".join(rng.choices(WORDS, k=rng.randrange(1, 60))) for i in range(count)]


def stored_texts(target, split):
    """The documents of a stream as texts; asserts that each has one begin and one end."""
    tokenizer = load_tokenizer(target / "tokenizer")
    stream = TokenStream(target / split)
    ends = [0, *stream.document_ends(0, stream.num_tokens)]
    texts = []
    for start, stop in zip(ends, ends[1:], strict=False):
        begin, *ids, end = stream.read(start, stop).tolist()
        assert (begin, end) == (tokenizer.bos_id, tokenizer.eos_id)
        assert not {begin, end} & set(ids)
        texts.append(tokenizer.decode(ids))
    assert stream.num_bytes == sum(len(text.encode()) for text in texts)
    assert stream.num_documents == len(texts)
    return texts


def write_corpus(path, texts):
    """The same texts spread over all formats; returns the path."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    quarter = len(texts) // 4
    parts = [texts[i : i + quarter] for i in (0, quarter, 2 * quarter)] + [texts[3 * quarter :]]
    (path / "deep" / "er").mkdir(parents=True)
    for i, text in enumerate(parts[0]):
        (path / "deep" / "er" / f"{i}.txt").write_bytes(text.encode())
    (path / "a.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in parts[1]))
    with gzip.open(path / "deep" / "b.JSONL.GZ", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in parts[2])
    pyarrow.parquet.write_table(pyarrow.table({"text": parts[3]}), path / "c.parquet", row_group_size=7)
    return path


def files_below(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    texts = make_texts(400)
    return write_corpus(tmp_path_factory.mktemp("corpus"), texts), texts


@pytest.fixture
def small_units(monkeypatch):
    """Many units of work, with cuts inside a JSONL file, from little text."""
    monkeypatch.setattr(documents, "UNIT_BYTES", (1000, 1000))


def test_every_document_of_every_format_once(corpus, small_units, tmp_path):
    path, texts = corpus
    summary = tokenize_files([str(path)], "bytes", tmp_path / "t", validation_fraction=0.1, processes=1)
    train, validation = stored_texts(tmp_path / "t", "train"), stored_texts(tmp_path / "t", "validation")
    assert sorted(train + validation) == sorted(texts)
    assert 10 < len(validation) < 100
    assert summary.num_documents == (len(train), len(validation))
    assert summary.num_bytes == tuple(sum(len(text.encode()) for text in split) for split in (train, validation))
    assert summary.num_tokens[0] == summary.num_bytes[0] + 2 * len(train)
    assert summary.skipped == {}
    assert {path.name for path in (tmp_path / "t").iterdir()} == {"train", "validation", "tokenizer"}


def test_the_number_of_processes_changes_no_byte(corpus, small_units, tmp_path):
    path, _ = corpus
    for processes in (1, 2, 3):
        tokenize_files([str(path)], 350, tmp_path / str(processes), validation_fraction=0.1, processes=processes)
    results = [files_below(tmp_path / str(processes)) for processes in (1, 2, 3)]
    assert results[0] == results[1] == results[2]
    assert len(results[0]) == 7


def test_the_split_follows_the_text_alone(corpus, small_units, tmp_path):
    path, texts = corpus
    tokenize_files([str(path)], "bytes", tmp_path / "a", validation_fraction=0.1, processes=1)
    shuffled = random.Random(1).sample(texts * 2, 2 * len(texts))  # another order, and every text twice
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in shuffled))
    tokenize_files([str(tmp_path / "b.jsonl")], "bytes", tmp_path / "b", validation_fraction=0.1, processes=1)
    for split in ("train", "validation"):
        assert sorted(stored_texts(tmp_path / "a", split) * 2) == sorted(stored_texts(tmp_path / "b", split))


@pytest.mark.parametrize("unit_bytes", [1, 2, 37, 150, 10**6])
def test_cutting_jsonl_anywhere_loses_no_line(monkeypatch, tmp_path, unit_bytes):
    monkeypatch.setattr(documents, "UNIT_BYTES", (unit_bytes, unit_bytes))
    texts = make_texts(8, seed=2)
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:4]) + "\n\n" + "\n".join(lines[4:]))  # a blank line, no last newline
    tokenize_files([str(tmp_path / "a.jsonl")], "bytes", tmp_path / "t", validation_fraction=0, processes=1)
    assert stored_texts(tmp_path / "t", "train") == texts


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_both_splits_get_documents(tmp_path, fraction, count):
    for i, text in enumerate([*make_texts(count), *make_texts(count)]):
        (tmp_path / f"{i}.txt").write_text(text)
    tokenize_files([str(tmp_path / "*.txt")], "bytes", tmp_path / "t", validation_fraction=fraction, processes=1)
    train, validation = stored_texts(tmp_path / "t", "train"), stored_texts(tmp_path / "t", "validation")
    assert train and validation and not set(train) & set(validation)
    assert len(train + validation) == 2 * count


def test_few_documents_hold_out_the_one_of_the_right_size(tmp_path):
    for size in (1, 10, 100, 1000):
        (tmp_path / f"{size}.txt").write_text("x" * size)
    tokenize_files([str(tmp_path)], "bytes", tmp_path / "t", validation_fraction=0.1, processes=1)
    assert stored_texts(tmp_path / "t", "validation") == ["x" * 100]


def test_a_lone_document_is_cut_in_two(tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "book.txt").write_text(text)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\x00\xff")
    tokenize_files([str(tmp_path)], "bytes", tmp_path / "t", validation_fraction=0.05, processes=1)
    (train,), (validation,) = stored_texts(tmp_path / "t", "train"), stored_texts(tmp_path / "t", "validation")
    assert train + validation == text
    assert train.endswith("\n") and 0.04 < len(validation) / len(text) < 0.06


def test_what_is_skipped_is_counted(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "good.txt").write_bytes("\ufeffgood é\r\n".encode())
    (source / "other.md").write_text("other")
    (source / "latin.txt").write_bytes("é".encode("latin-1"))
    (source / "binary.bin").write_bytes(b"a\0b")
    (source / "empty.txt").write_text("")
    (source / ".hidden").write_text("hidden")
    bad_lines = ["{", "1", '{"text": 1}', '{"other": "x"}', '{"text": ""}', r'{"text": "\ud800"}', '{"text": "kept"}']
    (source / "a.jsonl").write_bytes("\n".join(bad_lines).encode() + b'\n{"text": "\xff"}\n')
    whole = gzip.compress(b'{"text": "before the damage"}\n' + b'{"text": "lost"}\n' * 9)
    (source / "b.jsonl.gz").write_bytes(whole[:-9])
    (source / "c.parquet").write_bytes(b"no parquet")
    summary = tokenize_files([str(source)], "bytes", tmp_path / "t", validation_fraction=0, processes=1)
    texts = stored_texts(tmp_path / "t", "train")
    assert {"good é\r\n", "other", "kept", "\ufffd"} <= set(texts)  # the last of half an emoji
    assert not {"hidden", "a\0b"} & set(texts)
    assert summary.skipped == {
        "files that are not UTF-8 text": 2,
        "files that could not be read to their end": 2,
        "empty documents": 2,
        "lines that are not JSON": 2,
        "lines without a text in field 'text'": 3,
    }
    assert "skipped 2 files that are not UTF-8 text" in str(summary)


def test_sources_named_twice_are_read_once_and_the_target_never(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    sources = [str(tmp_path), str(tmp_path / "*.txt"), str(tmp_path / "a.txt")]
    for _ in range(2):
        summary = tokenize_files(sources, "bytes", tmp_path / "t", processes=1, overwrite=True)
        assert sum(summary.num_documents) == 2


def test_files_whose_names_are_patterns(tmp_path):
    (tmp_path / "[x]").mkdir()
    (tmp_path / "[x]" / "a*.txt").write_text("a")
    for source in (tmp_path / "[x]", tmp_path / "[x]" / "a*.txt"):
        assert find_files([str(source)], tmp_path / "t") == [tmp_path / "[x]" / "a*.txt"]


def test_an_existing_target_is_kept_unless_allowed(tmp_path):
    (tmp_path / "a.txt").write_text("first\nsecond")
    arguments = ([str(tmp_path / "a.txt")], "bytes", tmp_path / "t")
    tokenize_files(*arguments, processes=1)
    before = files_below(tmp_path / "t")
    with pytest.raises(UserError, match="already holds tokenizer, validation, train"):
        tokenize_files(*arguments, processes=1)
    assert files_below(tmp_path / "t") == before
    (tmp_path / "a.txt").write_text("other\ntext")
    tokenize_files(*arguments, processes=1, overwrite=True)
    assert stored_texts(tmp_path / "t", "train") == ["other\n"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_run_leaves_what_was_there(monkeypatch, tmp_path, error):
    (tmp_path / "a.txt").write_text("first\nsecond")
    arguments = dict(sources=[str(tmp_path / "a.txt")], tokenizer="bytes", target=tmp_path / "t", processes=1)
    tokenize_files(**arguments)
    before = files_below(tmp_path / "t")

    def fail(*_):
        raise error

    monkeypatch.setattr("herd_jax.data.parts.StreamWriter.append", fail)
    with pytest.raises((KeyboardInterrupt, UserError), match="^$|t cannot be made: .*No space left"):
        tokenize_files(**arguments, overwrite=True)
    assert files_below(tmp_path / "t") == before


def test_text_that_the_tokenizer_loses_is_noticed(tmp_path):
    """A tokenizer.json whose vocabulary lacks a byte, by someone's hand."""
    made = small_tokenizers.make_huggingface(tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer.json"
    content = json.loads(path.read_text())
    (tmp_path / "text.txt").write_text("a b%c")
    assert made.is_lossless
    content["model"]["vocab"]["<gone>"] = content["model"]["vocab"].pop("%")
    path.write_text(json.dumps(content))
    assert load_tokenizer(path.parent).is_lossless
    with pytest.raises(UserError, match="turned a document of 5 bytes into tokens of 4: its files are damaged"):
        tokenize_files([str(tmp_path / "text.txt")], str(path.parent), tmp_path / "data", processes=1)


def test_bad_arguments_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "file").write_text("")
    good = dict(sources=[str(tmp_path / "a.txt")], tokenizer="bytes", target=tmp_path / "t", processes=1)
    for change, message in (
        (dict(sources=[str(tmp_path / "no*")]), "no\\* matches no files"),
        (dict(sources=[str(tmp_path / "a.txt"), "missing"]), "missing matches no files"),
        (dict(sources=[str(tmp_path / "blank.txt")]), r"no text .1 empty documents"),
        (dict(tokenizer="missing"), "tokenizer missing does not exist"),
        (dict(tokenizer=500), "no tokenizer of 500 tokens"),
        (dict(validation_fraction=1.0), "validation_fraction is 1.0"),
        (dict(processes=0), "processes is 0"),
        (dict(target=tmp_path / "file"), "cannot be made"),
    ):
        with pytest.raises(UserError, match=message):
            tokenize_files(**{**good, **change})
        assert not (tmp_path / "t" / "train").exists()


def test_command_line(corpus, tmp_path, capsys):
    path, texts = corpus
    arguments = ["--source", str(path / "deep/**/*.txt"), str(path / "a.jsonl"), "--source", str(path / "c.parquet")]
    tokenize.main([*arguments, "--train-tokenizer", "350", "--target", str(tmp_path / "t"), "--processes", "1"])
    printed = capsys.readouterr().out
    assert "bytes per token" in printed and "validation:" in printed
    stored = stored_texts(tmp_path / "t", "train") + stored_texts(tmp_path / "t", "validation")
    assert sorted(stored) == sorted([*texts[:200], *texts[300:]])
    assert load_tokenizer(tmp_path / "t" / "tokenizer").vocab_size == 350
    assert Path(tmp_path / "t" / "tokenizer" / "tokenizer.model").is_file()
