"""Every document of every format once, with its metadata; whatever the encoding; past damage; counted where it is left out."""

import datetime
import gzip
import io
import json
import pickle
from pathlib import Path

import pytest

from herd_jax.curation.block import DropLog
from herd_jax.curation.input.decoding import decode
from herd_jax.curation.input.reading import CODE, HTML, PLAIN, Reader, ReadingConfig, find_inputs, plan_tasks
from herd_jax.data import documents
from herd_jax.errors import UserError

warcio_writer = pytest.importorskip("warcio.warcwriter")
from warcio.statusandheaders import StatusAndHeaders  # noqa: E402


def read(path, config=ReadingConfig()):
    """Documents and the reader of every task."""
    tasks = plan_tasks(find_inputs((str(path),), path / "work"))
    found, readers = [], []
    for rank in range(len(tasks)):
        reader = pickle.loads(pickle.dumps(Reader(tasks, config)))
        reader.problems = path / "work" / "problems"
        found += reader.run(None, rank, len(tasks))
        readers.append(reader)
    return found, readers


def read_one(path, config=ReadingConfig()):
    """Documents, counts by reason and problems (file name, reason) of sources that make one task."""
    found, (reader,) = read(path, config)
    counts = {name.removeprefix("dropped_"): value.total for name, value in reader.stats.stats.items() if name.startswith("dropped_")}
    assert reader.stats["total"].total == len(found) + sum(counts.values())
    assert reader.stats["forwarded"].total == len(found)
    problems = json.loads((path / "work" / "problems" / "00000.json").read_text())
    return found, counts, [(Path(problem["file"]).name, problem["reason"]) for problem in problems]


def page(i, words=500):
    return f"<html><body><p>page {i} " + " ".join(str((i + 1) * n * 7919 % 10007) for n in range(words)) + "</p></body></html>"


def warc(records, compress):
    """The bytes of a WARC, and where each of its records begins. A record is (body, HTTP headers, status, WARC headers)."""
    out = io.BytesIO()
    writer = warcio_writer.WARCWriter(out, gzip=compress)
    starts = []
    for i, (body, http, status, extra) in enumerate(records):
        starts.append(out.tell())
        body = body.encode() if isinstance(body, str) else body
        http = http if any(name == "Content-Type" for name, _ in http) else [("Content-Type", "text/html"), *http]
        writer.write_record(
            writer.create_warc_record(
                f"http://example.org/{i}",
                "response",
                payload=io.BytesIO(body),
                http_headers=StatusAndHeaders(status, http, protocol="HTTP/1.1"),
                warc_headers_dict={"WARC-Date": f"2024-01-{i + 1:02d}T00:00:00Z", **extra},
            )
        )
    return out.getvalue(), starts


def plain_warc(count, compress):
    return warc([(page(i), [], "200 OK", {}) for i in range(count)], compress)


def test_each_format_with_its_metadata(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(documents, "BATCH_BYTES", 1)  # one row after the other
    stamp = datetime.datetime(2024, 5, 1, 12, 30)
    rows = [{"text": f"row {i} é", "url": f"http://r/{i}", "date": "2024-02-03", "n": i} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "gz", "id": "own id", "media_type": "text/html"}) + "\n")
    with pyarrow.output_stream(str(tmp_path / "c.jsonl.zst"), compression="zstd") as file:
        file.write(b'{"text": "first"}\n{"text": "second"}\n')
    table = pyarrow.table({"text": ["p0", "p1", "p2"], "url": ["u0", None, "u2"], "date": [stamp] * 3, "other": [[1]] * 3})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=2)
    (tmp_path / "e.html").write_text("<p>page")
    (tmp_path / "f.py").write_text("x = 1\n")
    (tmp_path / "g.txt").write_bytes("\ufeffprose".encode())
    (tmp_path / "README").write_text("no suffix")
    (tmp_path / "h.warc.gz").write_bytes(plain_warc(1, True)[0])
    found, counts, problems = read_one(tmp_path)
    assert counts == {} and problems == []
    by_id = {doc.id.replace(f"{tmp_path}/", ""): doc for doc in found}
    assert len(by_id) == len(found) == 5 + 1 + 2 + 3 + 5
    positions = [sum(len(json.dumps(row)) + 1 for row in rows[:i]) for i in range(5)]
    for row, position in zip(rows, positions, strict=True):
        doc = by_id[f"a.jsonl#{position}"]
        assert doc.text == row["text"]
        source = str(tmp_path / "a.jsonl")
        assert doc.metadata == {"url": row["url"], "date": "2024-02-03T00:00:00Z", "source": source, "media_type": PLAIN}
    assert (by_id["own id"].text, by_id["own id"].metadata["media_type"]) == ("gz", HTML)
    assert [by_id[f"c.jsonl.zst#{position}"].text for position in (0, 18)] == ["first", "second"]
    assert [by_id[f"d.parquet#{i}"].text for i in range(3)] == ["p0", "p1", "p2"]
    assert [by_id[f"d.parquet#{i}"].metadata["url"] for i in range(3)] == ["u0", "", "u2"]
    assert by_id["d.parquet#0"].metadata["date"] == "2024-05-01T12:30:00Z"
    media_types = {name: by_id[f"{name}#0"].metadata["media_type"] for name in ("e.html", "f.py", "g.txt", "README", "h.warc.gz")}
    assert media_types == {"e.html": HTML, "f.py": CODE, "g.txt": PLAIN, "README": PLAIN, "h.warc.gz": HTML}
    assert by_id["g.txt#0"].text == "prose"
    assert by_id["h.warc.gz#0"].text == page(0)
    assert by_id["h.warc.gz#0"].metadata["url"] == "http://example.org/0"
    assert by_id["h.warc.gz#0"].metadata["date"] == "2024-01-01T00:00:00Z"


def test_tasks_depend_on_the_files_alone_and_cut_them_without_loss(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(50)))
    whole, _ = read(tmp_path)
    monkeypatch.setattr(documents, "UNIT_BYTES", (37, 37))
    cut, readers = read(tmp_path)
    assert len(readers) > 10
    assert [(doc.id, doc.text) for doc in cut] == [(doc.id, doc.text) for doc in whole]
    assert len({doc.id for doc in cut}) == 50


@pytest.mark.parametrize("compress", [True, False])
def test_only_whole_pages_with_status_200(tmp_path, compress):
    body = page(1)
    records = [
        (body, [], "200 OK", {}),
        (body, [], "404 Not Found", {}),
        (body, [], "301 Moved", {}),
        (body, [], "200 OK", {"WARC-Truncated": "length"}),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), [("Content-Type", "image/png")], "200 OK", {}),
        ("just text", [("Content-Type", "text/plain; charset=utf-8")], "200 OK", {}),
        (gzip.compress(body.encode()), [("Content-Encoding", "gzip")], "200 OK", {}),
        (body, [("Content-Encoding", "gzip")], "200 OK", {}),  # the header stayed, the encoding went
        (bytes(range(256)) * 20, [], "200 OK", {}),
        ("été".encode("cp1252"), [("Content-Type", "text/html; charset=ISO-8859-1")], "200 OK", {}),
        (body, [("Content-Type", "application/octet-stream")], "200 OK", {"WARC-Identified-Payload-Type": "text/html"}),
        ("", [], "200 OK", {}),
    ]
    (tmp_path / ("a.warc.gz" if compress else "a.warc")).write_bytes(warc(records, compress)[0])
    found, counts, problems = read_one(tmp_path)
    assert [doc.text for doc in found] == [body, "just text", body, body, "été", body, ""]
    assert [doc.metadata["media_type"] for doc in found] == [HTML, PLAIN, HTML, HTML, HTML, HTML, HTML]
    assert [int(doc.id.rpartition("#")[2]) for doc in found] == [0, 5, 6, 7, 9, 10, 11]
    assert counts == {"status_not_200": 2, "truncated": 1, "not_html_or_plain": 1, "not_text": 1}
    assert problems == []


def flip(content, start, stop):
    return content[:start] + bytes(byte ^ 0xFF for byte in content[start:stop]) + content[stop:]


DAMAGES = {  # name: (what is done to the bytes given where records start, pages lost)
    "altered inside": (lambda b, s: flip(b, s[2] + 700, s[2] + 720), {2}),
    "start lost": (lambda b, s: flip(b, s[2], s[2] + 4), {2}),
    "first start lost": (lambda b, s: flip(b, 0, 4), {0}),
    "rubbish between": (lambda b, s: b[: s[2]] + b"rubbish " * 50 + b[s[2] :], set()),
    "a piece cut out": (lambda b, s: b[: s[2] + 600] + b[s[3] :], {2}),
    "two in a row": (lambda b, s: flip(flip(b, s[2] + 700, s[2] + 720), s[3] + 700, s[3] + 720), {2, 3}),
    "cut at the end": (lambda b, s: b[: s[5] + 600], {5}),
}


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_reading_goes_on_after_damage(tmp_path, damage, compress):
    content, starts = plain_warc(6, compress)
    change, lost = DAMAGES[damage]
    file = tmp_path / ("a.warc.gz" if compress else "a.warc")
    file.write_bytes(change(content, starts))
    found, counts, problems = read_one(tmp_path)
    assert [doc.text for doc in found] == [page(i) for i in range(6) if i not in lost]
    assert counts == {} and problems == [(file.name, "damaged stretches: 1")]


def test_a_cut_record_without_a_digest(tmp_path):
    content, starts = plain_warc(3, False)
    (tmp_path / "a.warc").write_bytes(content[: starts[2] + 900].replace(b"-Digest:", b"-Nothing:"))
    found, _, problems = read_one(tmp_path)
    assert [doc.text for doc in found] == [page(0), page(1)]
    assert problems == [("a.warc", "damaged stretches: 1")]


def test_a_warc_compressed_as_a_whole(tmp_path):
    (tmp_path / "a.warc.gz").write_bytes(gzip.compress(plain_warc(4, False)[0]))
    found, _, problems = read_one(tmp_path)
    assert [doc.text for doc in found] == [page(i) for i in range(4)] and problems == []
    assert len({doc.id for doc in found}) == 4


def test_rubbish_with_the_name_of_a_format_is_a_problem(tmp_path):
    for name in ("a.warc", "b.warc.gz", "c.jsonl", "d.jsonl.gz", "e.jsonl.zst", "f.parquet"):
        (tmp_path / name).write_bytes(b"rubbish")
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "g.txt").symlink_to(tmp_path / "gone")
    found, counts, problems = read_one(tmp_path)
    assert [doc.text for doc in found] == ["good"]
    assert [name for name, _ in problems] == ["a.warc", "b.warc.gz", "c.jsonl", "d.jsonl.gz", "e.jsonl.zst", "f.parquet"]
    assert counts == {}


def test_long_documents_are_dropped_unread_and_their_neighbours_kept(tmp_path):
    import pyarrow
    import pyarrow.parquet

    long = "x" * 2000
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("before", long, "after")))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["before", long, "after"]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text(long)
    records = [(text, [], "200 OK", {}) for text in ("before", "x" * 100_000, long, "after")]
    content, starts = warc(records, False)
    (tmp_path / "d.warc").write_bytes(flip(content, starts[1] + 5000, starts[1] + 5001))  # not noticed, as it is not read
    found, counts, problems = read_one(tmp_path, ReadingConfig(max_document_bytes=1000))
    assert [doc.text for doc in found] == ["before", "after"] * 3
    assert counts == {"too_long": 5} and problems == []


@pytest.mark.parametrize(
    "encoding, text",
    [
        ("utf-8", "Съешь ещё этих мягких французских булок, да выпей чаю. "),
        ("cp1251", "Съешь ещё этих мягких французских булок, да выпей чаю. "),
        ("koi8-r", "Съешь ещё этих мягких французских булок, да выпей чаю. "),
        ("shift_jis", "いろはにほへと ちりぬるを わかよたれそ つねならむ。"),
        ("iso2022_jp", "いろはにほへと ちりぬるを わかよたれそ つねならむ。"),
        ("cp949", "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. "),
        ("gb18030", "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心。"),
        ("cp1255", "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. "),
        ("cp1252", "Été comme hiver, où êtes-vous né, à Genève ou ailleurs ? "),
    ],
)
def test_encodings_declared_and_guessed(encoding, text):
    text = text * 20
    assert decode(text.encode(encoding)) == text
    assert decode(text.encode(encoding), charset=encoding) == text
    meta = f'<html><head><meta charset="{encoding.replace("_", "-")}"></head><p>{text}'
    assert decode(meta.encode(encoding), is_html=True) == meta


def test_declarations_that_lie_and_bytes_that_are_no_text():
    assert decode("é è à".encode(), charset="iso-8859-1") == "é è à"
    assert decode("é".encode("utf-16")) == decode("é".encode("utf-8-sig")) == "é"
    assert decode("hé".encode("utf-16-le"), charset="utf-16le") == "hé"
    assert decode(b"caf\xe9", charset="no such charset") == "café"
    assert decode(b"\xff\xfe\x41") is not None and decode(b"") == ""
    assert decode(b"a nul \0 in a long text" + b" " * 100) == "a nul  in a long text" + " " * 100
    for content in (bytes(range(256)), b"\x89PNG\r\n\x1a\n" + bytes(50), b"\x7fELF\x01\0\0\0\0", gzip.compress(bytes(range(256)) * 9)):
        assert decode(content) is None and decode(content, charset="latin1") is None


def test_values_of_rows_that_are_not_what_they_should_be(tmp_path):
    rows = [
        {"text": "a\0b", "url": 3, "date": "yesterday", "id": ["x"]},
        {"text": "t", "url": "\ud800", "date": 1700000000, "media_type": "image/png"},
        {"text": "t", "date": "2024-01-01T02:00:00+02:00", "id": 7},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, counts, _ = read_one(tmp_path)
    assert [doc.text for doc in found] == ["ab", "t", "t"]
    assert [doc.metadata["url"] for doc in found] == ["", "?", ""]
    assert [doc.metadata["date"] for doc in found] == ["", "", "2024-01-01T00:00:00Z"]
    assert found[2].id == "7" and {doc.metadata["media_type"] for doc in found} == {PLAIN}
    assert counts == {}


def test_problems_and_drops_are_written_down(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "good"}\n{\n{"other": 1}\n')
    (tmp_path / "in" / "b.png").write_bytes(bytes(100))
    reader = Reader(plan_tasks(find_inputs((str(tmp_path / "in"),), tmp_path / "work")))
    reader.problems = tmp_path / "problems"
    log = DropLog(tmp_path / "drops", [reader])
    assert [doc.text for doc in log.run(reader.run())] == ["good"]
    assert [problem["reason"] for problem in json.loads((tmp_path / "problems" / "00000.json").read_text())] == [
        "lines that are not JSON: 1",
        "lines without a text in field 'text': 1",
    ]
    (line,) = (tmp_path / "drops" / "00000.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "not_text" and json.loads(line)["id"].endswith("b.png#0")


def test_refusals(tmp_path):
    (tmp_path / "image.png").write_bytes(bytes(100))
    with pytest.raises(UserError, match="image.png is of an unknown format"):
        find_inputs((str(tmp_path / "image.png"),), tmp_path / "work")
    with pytest.raises(UserError, match="matches no files"):
        find_inputs((str(tmp_path / "nothing*"),), tmp_path / "work")
    for wrong in (dict(text_field=""), dict(max_document_bytes=0)):
        with pytest.raises(UserError, match=f"curation {next(iter(wrong))}"):
            ReadingConfig(**wrong)
