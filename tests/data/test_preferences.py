"""Dialogs and preferences as examples: every mask against what a plain reading of the dialog says, and what is refused."""

import json

import numpy as np
import pytest
import small_tokenizers

from herd_jax.data.dialogs import Refused, check_problems, dialog_example, read_dialogs, render
from herd_jax.data.packing import join
from herd_jax.data.preferences import preference_example, read_preference
from herd_jax.errors import UserError
from herd_jax.text import chat
from herd_jax.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    return small_tokenizers.make_llama3(tmp_path_factory.mktemp("llama3"))


ASK, SAY = {"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}
TWO_TURNS = [{"role": "system", "content": "s"}, ASK, SAY, {"role": "user", "content": "three?"}, {"role": "assistant", "content": "four"}]


def spelled(tokenizer, ids):
    names = {i: name for name, i in tokenizer.special_ids.items()}
    return "".join(names.get(i) or tokenizer.decode([i]) for i in map(int, ids))


def test_the_assistant_s_turns_and_their_ends_are_targets_and_nothing_else(llama3):
    example = dialog_example(*render({"messages": TWO_TURNS}, llama3))
    assert spelled(llama3, example["targets"][example["loss_mask"]]) == "two<|eot_id|>four<|eot_id|>"
    first = int(np.argmax(example["loss_mask"]))
    assert spelled(llama3, example["tokens"][: first + 1]).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")  # what predicts the first token
    assert (example["tokens"][1:] == example["targets"][:-1]).all() and (example["tokens"] == llama3.bos_id).sum() == 1
    same = {"conversations": [{"from": {"user": "human", "assistant": "gpt"}.get(m["role"], "system"), "value": m["content"]} for m in TWO_TURNS]}
    assert render(same, llama3) == render({"messages": TWO_TURNS}, llama3)
    assert render({"prompt": "one?", "completion": "two"}, llama3) == render({"messages": [ASK, SAY]}, llama3)


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"messages": [ASK]}, "no token of the assistant"),
        ({"messages": [ASK, SAY, SAY]}, "two assistant turns in a row"),
        ({"messages": []}, "dialog is empty"),
        ({"messages": "hello"}, "its messages are a str"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "must be one of"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "from none of"),
        ({"text": "hello"}, "it has none of messages"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(llama3, record, reason):
    with pytest.raises(Refused, match=reason):
        render(record, llama3)


def test_bad_records_are_named_and_counted_and_too_many_end_it(llama3, tmp_path):
    path = tmp_path / "dialogs.jsonl"
    long = {"messages": [ASK, {"role": "assistant", "content": "x" * 500}]}
    path.write_text("\n".join(map(json.dumps, [{"messages": TWO_TURNS}] * 8 + [{"messages": [ASK]}, long])))
    examples, problems = read_dialogs(path, llama3, 128)
    assert len(examples) == 8 and [problem.place for problem in problems] == [f"{path}:9", f"{path}:10"]
    assert "takes" in problems[1].reason and "train.seq_len is 128" in problems[1].reason
    assert "left out 2 of 10" in check_problems(path, 8, problems, 0.2)
    with pytest.raises(UserError, match="2 of 10 records of .*dialogs.jsonl:9: it has no token of the assistant.*examples.most_bad"):
        check_problems(path, 8, problems, 0.1)
    path.write_text("{not json")
    with pytest.raises(UserError, match="dialogs.jsonl:1 is not JSON"):
        read_dialogs(path, llama3, 128)
    with pytest.raises(UserError, match="no JSONL file"):
        read_dialogs(tmp_path / "absent.jsonl", llama3, 128)


RECORD = {"prompt": TWO_TURNS[:4], "chosen": "four", "rejected": "five, perhaps", "edited": "four.", "level": "better"}


def parts_of(example):
    """The runs of equal (segment, branch): index arrays."""
    key = example["segment_ids"] * 10 + example["branch_ids"]
    return np.split(np.arange(len(key)), np.flatnonzero(np.diff(key)) + 1)


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_preference_as_an_example(llama3, share_prompt, order):
    preference = read_preference(RECORD, llama3)
    assert [spelled(llama3, response.ids) for response in preference.responses] == ["four.<|eot_id|>", "four<|eot_id|>", "five, perhaps<|eot_id|>"]
    example = preference_example(preference, order, share_prompt, llama3.stop_ids)
    responses = parts_of(example)[1 if share_prompt else 0 :]
    prompt = chat.render(TWO_TURNS[:4], llama3, add_assistant_header=True).ids
    assert [int(example["response_ids"][part[-1]]) - 1 for part in responses] == list(order)
    for part, number in zip(responses, order, strict=True):
        row = {name: values[part] for name, values in example.items()}
        text = ["four.", "four", "five, perhaps"][number]
        assert row["targets"][row["scored"]].tolist() == llama3.encode(text)  # the end of turn is not scored
        assert row["loss_mask"].sum() == (len(llama3.encode(text)) + 1 if number == 0 else 0)  # but it is learned, of the best alone
        assert row["tokens"][row["levels"] > 0].tolist() == [llama3.special_ids["<|eot_id|>"]] and row["levels"].max() == 3 - number
        before = [*example["tokens"][parts_of(example)[0]], *row["tokens"]] if share_prompt else row["tokens"]
        assert list(before) == [*prompt, *preference.responses[number].ids]
        assert row["positions"].tolist() == list(range(len(before)))[-len(part) :]
    joined = join([example, example], 2 * len(example["tokens"]) + 5)
    assert sorted(set(joined["response_ids"].tolist())) == list(range(7)) and sorted(set(joined["prompt_ids"].tolist())) == [0, 1, 2]


def test_preferences_in_the_common_forms(llama3):
    dialogs = {"chosen": [*TWO_TURNS[:4], {"role": "assistant", "content": "four"}], "rejected": [*TWO_TURNS[:4], {"role": "assistant", "content": "five, perhaps"}]}
    plain = {name: RECORD[name] for name in ("prompt", "chosen", "rejected")}
    assert read_preference(dialogs, llama3) == read_preference(plain, llama3)
    assert read_preference(plain | {"level": "slightly better"}, llama3) is None
    both = read_preference(RECORD, llama3)
    assert both.pair.responses == (both.responses[0], both.responses[2]) and both.key != both.pair.key
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    acts = read_preference({"prompt": [ASK], "chosen": [call, {"role": "tool", "content": "7"}, SAY], "rejected": "no"}, llama3)
    written = [i for i, wrote in zip(acts.responses[0].ids, acts.responses[0].mask) if wrote]
    assert "7" not in spelled(llama3, written) and spelled(llama3, written).endswith("two<|eot_id|>")  # what the tool gave is no target


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"chosen": "five, perhaps"}, "two of its responses are equal"),
        ({"chosen": ""}, "chosen response is empty"),
        ({"rejected": None}, "rejected response is empty or missing"),
        ({"chosen": [{"role": "assistant", "content": ""}]}, "chosen response is empty"),
        ({"level": "great"}, "level is 'great', which is none of significantly better"),
        ({"prompt": [ASK, SAY]}, "ends with one of the assistant's"),
        ({"prompt": []}, "the dialog is empty"),
        ({"chosen": [ASK, SAY]}, "does not begin with a message of the assistant"),
        ({"chosen": 7}, "its messages are a int"),
    ],
)
def test_preferences_that_are_refused(llama3, change, reason):
    with pytest.raises(Refused, match=reason):
        read_preference(RECORD | change, llama3)


def test_a_template_that_rewrites_the_prompt_is_noticed(tmp_path):
    """Its header for the assistant depends on whether an answer follows, so the first token of the answer could not be told."""
    small_tokenizers.make_huggingface(tmp_path / "hf")
    template = "{% for m in messages %}<|im_start|>{{ m.role }}{{ '!' if loop.last and m.role == 'assistant' }}\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (tmp_path / "hf/chat_template.jinja").write_text(template)
    with pytest.raises(Refused, match="in another way when an answer follows"):
        read_preference({"prompt": "a", "chosen": "b", "rejected": "c"}, load_tokenizer(tmp_path / "hf"))
