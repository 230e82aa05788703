"""Files and directories appear whole or not at all; paths are what their user means."""

import os
from pathlib import Path

import pytest

from herd_jax.errors import UserError
from herd_jax.files import unfinished, user_path, whole_directory, whole_file, write_whole


def test_a_home_directory_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/runs/a") == tmp_path / "runs" / "a" and user_path("runs/~") == Path("runs/~")
    with pytest.raises(UserError, match="~nobody-of-this-name/runs names a home directory that does not exist"):
        user_path("~nobody-of-this-name/runs")


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "file"
    with whole_file(path, "w") as file:
        file.write("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(ZeroDivisionError), whole_file(path, "w") as file:
        file.write("two")
        1 / 0
    assert path.read_text() == "one" and os.listdir(path.parent) == ["file"]


def test_what_a_killed_writer_left_is_written_over(tmp_path):
    unfinished(tmp_path / "file").write_text("half of a much longer text")
    write_whole(tmp_path / "file", "all")
    assert (tmp_path / "file").read_text() == "all" and os.listdir(tmp_path) == ["file"]


def test_two_writers_of_a_shared_file_do_not_meet(tmp_path, monkeypatch):
    path = tmp_path / "file"
    with whole_file(path, "w", shared=True) as one:
        one.write("one")
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with whole_file(path, "w", shared=True) as other:
            other.write("other")
        assert path.read_text() == "other"
    assert path.read_text() == "one"


def test_text_that_utf8_cannot_hold_is_written_and_a_file_that_cannot_be_is_named(tmp_path):
    write_whole(tmp_path / "file", "half an emoji: \ud83d")
    assert (tmp_path / "file").read_text() == "half an emoji: ?"
    with pytest.raises(UserError, match="file/below cannot be written .*: make room"):
        write_whole(tmp_path / "file" / "below", "")


def test_a_directory_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "directory"
    unfinished(path).mkdir(parents=True)
    (unfinished(path) / "left").touch()
    with whole_directory(path) as directory:
        (directory / "a").touch()
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), whole_directory(path, overwrite=True) as directory:
        1 / 0
    with pytest.raises(OSError), whole_directory(path) as directory:
        (directory / "b").touch()
    assert os.listdir(path) == ["a"] and os.listdir(path.parent) == ["directory"]
    with whole_directory(path, overwrite=True) as directory:
        (directory / "c").touch()
    assert os.listdir(path) == ["c"]
