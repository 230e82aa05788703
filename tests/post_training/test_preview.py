"""The preview marks what counts, as a reader sees it."""

import json
import sys

import pytest
import small_tokenizers

from herd_jax import preview as command


@pytest.fixture
def shown(tmp_path, capsys, monkeypatch):
    tokenizer = small_tokenizers.make_llama3(tmp_path)
    tokenizer.save(tmp_path / "tokenizer")

    def show(kind, records, *arguments):
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        config = {"workdir": str(tmp_path / "run"), "init_from": "x", "data": {"sources": {str(tmp_path / "data.jsonl"): 1.0}, "tokenizer": str(tmp_path / "tokenizer")}}
        (tmp_path / "config.py").write_text(f"def get_config():\n    return {config!r}\n")
        status = 0
        try:
            monkeypatch.setattr(sys, "argv", ["preview", str(tmp_path / "config.py"), *(["--stage", kind] if kind else []), *arguments])
            command.main()
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        return status, out, err

    return show


def test_a_dialog(shown):
    turns = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]
    status, out, _ = shown("sft", [{"messages": turns}, {"messages": turns[:1]}, {"messages": turns}], "--examples", "2")
    assert status == 0 and out.count("data.jsonl:") == 2
    assert "one?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦two<|eot_id|>⟧" in out and "4 of them targets" in out
    assert "left out: it has no token of the assistant" in out


def test_preferences(shown):
    record = {"prompt": "one?", "chosen": "two", "rejected": "three"}
    weak = record | {"level": "slightly better"}
    _, out, _ = shown("dpo", [record, weak])
    assert "chosen: ⟦two⟧<|eot_id|>" in out and "rejected: ⟦three⟧<|eot_id|>" in out and "left out: only the two highest levels" in out
    _, out, _ = shown("dpo", [record], "--config.dpo.masks_format=false")
    assert "chosen: ⟦two<|eot_id|>⟧" in out
    _, out, _ = shown("reward", [record | {"edited": "two!"}])
    assert "edited: two!⟦<|eot_id|>⟧" in out and "chosen: two⟦<|eot_id|>⟧" in out


def test_mistakes_are_one_sentence(shown):
    status, _, err = shown(None, [])
    assert status and "say of which stage it is with --stage" in err
    status, _, err = shown("sft", [], "--examples", "0")
    assert status and "--examples is 0" in err
