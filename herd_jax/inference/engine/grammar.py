"""Answers that follow a grammar: a JSON schema, a regular expression, or one of several texts (llguidance).

A grammar is compiled before its request is admitted. Then, at each step, it says which tokens may come next, while the device is at work.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from herd_jax.errors import UserError
from herd_jax.text.protocol import import_extra
from herd_jax.text.tokenizer import Tokenizer

CACHED = 64  # compiled grammars that are kept


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What an answer must look like: of `kind` "json_schema", "regex" or "choice"; `text` is the schema, the expression, or a JSON list of texts."""

    kind: str
    text: str

    @classmethod
    def json_schema(cls, schema: dict[str, Any] | bool) -> "Grammar":
        """Returns the grammar of the JSON texts that a schema allows, written without needless space."""
        return cls("json_schema", json.dumps(schema))

    @classmethod
    def regex(cls, expression: str) -> "Grammar":
        """Returns the grammar of the texts that match an expression from beginning to end."""
        return cls("regex", expression)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> "Grammar":
        """Returns the grammar of a few texts."""
        return cls("choice", json.dumps(list(texts)))


class GrammarCompiler:
    """Compiles grammars for a tokenizer, whose stop tokens end what follows one. Masks have a bit for each of the model's `vocab_size` ids."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._library = import_extra("llguidance", "a grammar", "serve")
        if not tokenizer.stop_ids:
            raise UserError("the model's tokenizer has no token that ends an answer, so none can follow a grammar: name one in its files")
        self.num_words = -(-vocab_size // 32)
        self._num_own_words = -(-tokenizer.vocab_size // 32)
        wrapper = self._library.TokenizerWrapper(_Vocabulary(tokenizer))
        self._tokenizer = self._library.LLTokenizer(wrapper, n_vocab=tokenizer.vocab_size, eos_token=list(tokenizer.stop_ids))
        self._compiled = functools.lru_cache(CACHED)(self._compile)

    def compile(self, grammar: Grammar) -> "Guide":
        """Returns a guide for one answer. Raises UserError for what is no grammar, and for one that no answer can follow to its end."""
        return Guide(self._compiled(grammar).deep_copy(), self.num_words, self._num_own_words)

    def _compile(self, grammar: Grammar):
        matcher = self._library.LLMatcher
        names = {"json_schema": "the JSON schema", "regex": "the regular expression", "choice": "the choice"}
        name = names[grammar.kind]
        match grammar.kind:
            case "json_schema":
                options = {"whitespace_flexible": False}
                try:
                    _refuse_endless(json.loads(grammar.text))
                    text = matcher.grammar_from_json_schema(grammar.text, overrides=options)
                except UserError:
                    raise
                except ValueError as error:
                    raise UserError(f"{name} cannot be used ({_first_line(error)}): correct it") from error
            case "regex":
                text = matcher.grammar_from_regex(grammar.text)
            case "choice":
                texts = json.loads(grammar.text)
                if not texts or not all(texts):
                    raise UserError("the choice must be among one or more texts, none of them empty: give them")
                text = matcher.grammar_from_lark("start: " + " | ".join(json.dumps(one) for one in texts))
        compiled = matcher(self._tokenizer, text, log_level=0)
        if compiled.is_error():
            raise UserError(f"{name} cannot be used ({_first_line(compiled.get_error())}): correct it")
        if not any(compiled.deep_copy().compute_bitmask()):
            raise UserError(f"{name} allows no text at all: correct it")
        return compiled


class Guide:
    """Follows one answer."""

    def __init__(self, matcher, num_words: int, num_own_words: int) -> None:
        self._matcher, self._num_words, self._num_own_words = matcher, num_words, num_own_words

    @property
    def has_ended(self) -> bool:
        """Returns whether nothing may follow."""
        return self._matcher.is_stopped()

    def take(self, token: int) -> bool:
        """Goes on with a token; returns whether it was allowed."""
        return self._matcher.consume_token(token)

    def mask(self) -> np.ndarray:
        """Returns the bits of the ids that may come next, uint32 [V / 32]."""
        found = np.zeros(self._num_words, np.uint32)
        own = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._num_own_words]
        found[: len(own)] = own
        return found


class _Vocabulary:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        names = {i: name for name, i in tokenizer.special_ids.items()}
        self.eos_token_id, self.bos_token_id = tokenizer.stop_ids[0], tokenizer.bos_id
        self.tokens = [names[i].encode() if i in names else tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(names)
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text.decode(errors="replace") if isinstance(text, bytes) else text)


def _first_line(error) -> str:
    return str(error).strip().splitlines()[0][:200]


def _refuse_endless(schema: Any) -> None:
    """Raises UserError for a schema that only texts without end follow, such as a list of one or more such lists."""
    definitions: dict[str, bool] = {}

    def resolve(reference: str):
        node = schema
        for part in reference.removeprefix("#").strip("/").split("/") if reference not in ("#", "") else ():
            part = part.replace("~1", "/").replace("~0", "~")
            node = node[int(part)] if isinstance(node, list) else node[part]
        return node

    def ends(node) -> bool:
        """Returns whether a text of finite length follows a part, as far as is known of those that it refers to."""
        if not isinstance(node, dict) or "enum" in node or "const" in node:
            return node is not False
        if "$ref" in node and not definitions.get(node["$ref"], False):
            return False
        if any(not ends(part) for part in node.get("allOf", ())):
            return False
        if any(name in node and not any(map(ends, node[name])) for name in ("anyOf", "oneOf")):
            return False
        kinds = node.get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if kinds and not {*kinds} <= {"object", "array"}:
            return True
        properties = node.get("properties", {})
        object_ends = all(ends(properties.get(name, True)) for name in node.get("required", ()))
        first = node.get("prefixItems", [])[: node.get("minItems", 0)]
        array_ends = all(map(ends, first)) and (node.get("minItems", 0) <= len(first) or ends(node.get("items", True)))
        if not kinds:  # a plain value will do where it is not said that it must be an object or an array
            return ("required" not in node or object_ends) and ("minItems" not in node or array_ends)
        return any({"object": object_ends, "array": array_ends}[kind] for kind in kinds)

    references = {found for found in _references(schema) if found.startswith("#")}
    try:
        changed = True
        while changed:  # what ends is found from the parts that refer to nothing upwards
            new = {reference: ends(resolve(reference)) for reference in references}
            changed, definitions = new != definitions, new
        endless = isinstance(schema, dict) and not ends(schema) and bool(references)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError):  # no schema, or a reference to nothing: the compiler says what is wrong
        return
    if endless:
        raise UserError("the JSON schema can end nowhere: what it requires requires itself; make one of the parts optional")


def _references(node) -> list[str]:
    if isinstance(node, list):
        return [found for part in node for found in _references(part)]
    if not isinstance(node, dict):
        return []
    own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
    return own + [found for part in node.values() for found in _references(part)]
