"""Answers of a random model follow a grammar, whatever it would rather say."""

import dataclasses
import json
import re

import jax.numpy as jnp
import pytest
import tiny

pytest.importorskip("llguidance")

from herd_jax.errors import UserError  # noqa: E402
from herd_jax.inference.engine.grammar import Grammar, GrammarCompiler  # noqa: E402
from herd_jax.inference.engine.requests import Request  # noqa: E402
from herd_jax.inference.sampling import Sampling  # noqa: E402
from herd_jax.model import Model  # noqa: E402
from herd_jax.models.llama import Llama  # noqa: E402
from herd_jax.text.tokenizer import load_tokenizer  # noqa: E402

CONFIG = dataclasses.replace(tiny.CONFIG, vocab_size=261, init_std=0.4)
SCHEMA = {
    "type": "object", "properties": {"name": {"enum": ["Ann", "Bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"], "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    steps = tiny.make_steps(config=CONFIG)
    model = Model.of(Llama.make(CONFIG, "blockwise"), steps.layout, steps.plan.init(0).params, load_tokenizer("bytes"), 64, jnp.float32)
    return model.engine(max_sequences=4, page_size=16, chunk_tokens=16, strict=True, guesses=2)


def test_each_answer_follows_its_own_grammar(engine):
    grammars = [Grammar.json_schema(SCHEMA), Grammar.regex(r"[0-9]{4}-[0-9]{2}"), Grammar.choice(["yes", 'n"o', "maybe"]), None]
    options = {"temperature": 1.0, "seed": 3}
    requests = [Request([65, 66, 67 + i], Sampling(48, **options), num_samples=2, grammar=grammar) for i, grammar in enumerate(grammars)]
    texts = [[] for _ in requests]
    for answer in engine.generate(requests):
        texts[answer.ticket].append(answer.text)
        assert answer.finish_reason == "stop" or grammars[answer.ticket] is None
    for text in texts[0]:
        assert json.loads(text)["name"] in ("Ann", "Bob") and 0 <= json.loads(text)["age"] <= 99 and " " not in text
    assert all(re.fullmatch(r"[0-9]{4}-[0-9]{2}", text) for text in texts[1])
    assert {*texts[2]} <= {"yes", 'n"o', "maybe"}
    alone = [answer.text for answer in engine.generate([dataclasses.replace(requests[3], speculates=False)])]
    assert alone == texts[3]  # of those beside it nothing is seen


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("json_schema", "{"), "the JSON schema cannot be used"),
        (Grammar.json_schema({"type": "nosuch"}), "the JSON schema cannot be used .*nosuch"),
        (Grammar.json_schema({"$ref": "http://example.org/x"}), "the JSON schema cannot be used"),
        (Grammar.json_schema({"$ref": "#/$defs/missing"}), "the JSON schema cannot be used"),
        (Grammar.json_schema({"type": "array", "minItems": 1, "items": {"$ref": "#"}}), "the JSON schema can end nowhere"),
        (
            Grammar.json_schema({"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "properties": {"b": {"$ref": "#/$defs/a"}}, "required": ["b"]}}}),
            "the JSON schema can end nowhere",
        ),
        (Grammar.regex("("), "the regular expression cannot be used"),
        (Grammar.choice([]), "the choice must be among one or more texts"),
    ],
)
def test_what_is_no_grammar(engine, grammar, message):
    with pytest.raises(UserError, match=message):
        engine.submit(Request([65], Sampling(8), grammar=grammar))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"$ref": "#"}},
        {"anyOf": [{"type": "array", "minItems": 1, "items": {"$ref": "#"}}, {"type": "null"}]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "properties": {"b": {"$ref": "#/$defs/a"}}}}},
    ],
)
def test_schemas_that_refer_to_themselves_and_end(engine, schema):
    engine.check(Request([65], Sampling(8), grammar=Grammar.json_schema(schema)))


def test_masks_have_the_width_of_the_model():
    compiler = GrammarCompiler(load_tokenizer("bytes"), 300)
    guide = compiler.compile(Grammar.choice(["a"]))
    bits = [i for i in range(320) if guide.mask()[i // 32] >> (i % 32) & 1]
    assert bits == [ord("a")] and guide.take(ord("a"))
    assert guide.has_ended or [i for i in range(320) if guide.mask()[i // 32] >> (i % 32) & 1] == [257]
