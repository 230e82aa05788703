"""Source files are known by their bytes, whatever they are called; links that lead back are followed once; damage ends one file."""

import bz2
import glob
import gzip
import json
import lzma
import os
from collections import Counter

import pytest

from herd_jax.data.documents import read_documents, read_rows, work_units
from herd_jax.data.formats import Format, find_format
from herd_jax.data.source_files import _expand, find_files

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS = [{"text": f"document {i} é \u2028 of a few words", "n": i} for i in range(9)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
COMPRESS = {"": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True)}


def read(path):
    skipped = Counter()
    return [text for unit in work_units([path]) for piece in unit for text in read_documents(piece, "text", skipped)], dict(skipped)


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonlines", "a.log", "a", "a.txt"])
def test_json_lines_by_any_name(tmp_path, name, ending):
    path = tmp_path / (f"{name}.{ending}" if ending else name)
    path.write_bytes(COMPRESS[ending](LINES))
    assert find_format(path) == Format("lines", ending)
    assert read(path) == ([row["text"] for row in ROWS], {})
    path = path.rename(tmp_path / "without.compression.in.its.name.jsonl")
    assert read(path) == ([row["text"] for row in ROWS], {})


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_is_its_entries(tmp_path, ending, indent, monkeypatch):
    (tmp_path / "a.json").write_bytes(COMPRESS[ending](b"\xef\xbb\xbf" + json.dumps(ROWS, indent=indent).encode()))
    assert read(tmp_path / "a.json") == ([row["text"] for row in ROWS], {})
    (tmp_path / "b.json").write_text(json.dumps([*ROWS, 7, {"body": "x"}, ["text"]], indent=indent))
    assert read(tmp_path / "b.json") == ([row["text"] for row in ROWS], {"entries without a text in field 'text'": 3})


def test_other_shapes_of_json(tmp_path):
    one = tmp_path / "one.json"
    one.write_text(json.dumps(ROWS[0], indent=4))
    assert read(one) == ([ROWS[0]["text"]], {})
    one.write_text("\n".join(json.dumps(row, indent=4) for row in ROWS[:3]))  # one after the other
    assert read(one) == ([row["text"] for row in ROWS[:3]], {})
    one.write_text(json.dumps({"data": ROWS}))
    assert read(one) == ([], {"lines without a text in field 'text'": 1})
    one.write_text(json.dumps(ROWS, indent=1)[:-40])
    assert read(one) == ([row["text"] for row in ROWS[:8]], {"entries that are not JSON": 1})
    one.write_text("[]")
    assert read(one) == ([], {})
    prose = tmp_path / "prose.txt"
    for text in ('{"a": 1} is an object, and this is prose.\nSo is this.', "[1] A reference.\n[2] Another.", "{ braces }\n{ more }", "[{] a"):
        prose.write_text(text)
        assert read(prose) == ([text], {})


def test_entries_longer_than_what_is_read_at_once(tmp_path):
    rows = [{"text": "x" * 3_000_000}, {"text": "y" * 10}, {"text": "z" * 2_500_000}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    assert read(tmp_path / "a.json") == ([row["text"] for row in rows], {})
    skipped = Counter()
    (piece,) = work_units([tmp_path / "a.json"])[0]
    found = [row["text"] for _, row in read_rows(piece, "text", (), skipped, max_bytes=4_000_000)]
    assert found == [row["text"] for row in rows] and not skipped


def test_odd_parquet_goes_on(tmp_path):
    path = tmp_path / "a.parquet"
    schema = pyarrow.schema([("text", pyarrow.string()), ("url", pyarrow.string())])
    parquet.ParquetWriter(path, schema).close()  # no row group
    assert read(path) == ([], {})
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    assert read(path) == ([], {})
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 3, pyarrow.array([b"good", b"\xff\xfe", b"better"], pyarrow.binary()).buffers())
    parquet.write_table(pyarrow.table({"text": broken, "url": ["u"] * 3}), path)
    assert read(path) == (["good", "better"], {"rows whose column 'text' cannot be read": 1})
    parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "url": broken}), path)
    assert read(path) == (["a", "b", "c"], {})
    skipped = Counter()
    rows = list(read_rows(work_units([path])[0][0], "text", ("url",), skipped))
    assert [row["url"] for _, row in rows] == ["good", None, "better"] and skipped == {"values of column 'url' that cannot be read": 1}
    parquet.write_table(pyarrow.table({"text": [[1], None, [2]]}), path)
    assert read(path) == ([], {"rows without a text in column 'text'": 3})
    path.rename(tmp_path / "table.bin")
    parquet.write_table(pyarrow.table({"text": ["by its bytes"]}), tmp_path / "table.bin")
    assert read(tmp_path / "table.bin") == (["by its bytes"], {})


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
def test_damage_ends_one_file(tmp_path, ending):
    whole = COMPRESS[ending](LINES * 50)
    for name, data in (("cut", whole[:-20]), ("altered", whole[:40] + b"????" + whole[44:]), ("start", b"\0" * 8 + whole[8:])):
        (tmp_path / f"{name}.jsonl.{ending}").write_bytes(data)
        texts, skipped = read(tmp_path / f"{name}.jsonl.{ending}")
        assert skipped, name
        assert set(texts) <= {row["text"] for row in ROWS}
        (tmp_path / f"{name}.txt.{ending}").write_bytes(data)
        assert read(tmp_path / f"{name}.txt.{ending}")[1], name


def test_links_that_lead_back_are_followed_once(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "one.txt").write_text("one")
    for name in ("l1", "l2", "l3"):
        os.symlink(".", tmp_path / "a" / name)
        os.symlink(tmp_path, tmp_path / "a" / "b" / name)
    for source in (tmp_path, tmp_path / "**", tmp_path / "**" / "*.txt", tmp_path / "a" / "**" / "one.*", tmp_path / "*" / "**"):
        assert find_files([str(source)], tmp_path / "work") == [tmp_path / "a" / "b" / "one.txt"]


PATTERNS = ["**", "a/**", "**/*.txt", "a/**/*.txt", "a/**/c/*", "**/b/**/*.txt", "*/**/c*", "a/**/**/*.txt", "**/.h/*", "a/**/link/*", "**/[[]z].txt",
            "./**/*.txt", "**/", "a/*/**", "nope/**", "a/**/b", "a/b/**/c/**", "?/**/*.txt", "a/**/.*", "**/[!a]*.md"]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_name_the_files_that_glob_names(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.txt", "a/b/2.txt", "a/b/c/3.md", "a/.h/4.txt", "a/.5.txt", "x y/6.txt", "a/b/d/c.txt", "7.txt", "a/e/[z].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for link, target in (("a/e/link", "../b"), ("a/file.txt", "b/2.txt"), ("a/broken.txt", "gone")):
        os.symlink(target, link)
    expected = {os.path.realpath(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)}
    assert {os.path.realpath(name) for name in _expand(pattern)} == expected
    assert {os.path.realpath(name) for name in _expand(f"{tmp_path}/{pattern}")} == expected
