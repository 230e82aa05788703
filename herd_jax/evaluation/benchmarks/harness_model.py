"""A model of this house as one of lm-evaluation-harness's: log-likelihoods and greedy or sampled text, each result noted as it comes."""

import collections
import json
from collections.abc import Iterator, Sequence

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from herd_jax.errors import UserError
from herd_jax.inference.scoring.continuations import ContinuationScorer
from herd_jax.model import Model, load
from herd_jax.text import chat
from herd_jax.training.checkpoints.checksums import checksums

UNKNOWN_LENGTH = 4096  # tokens that are looked at together where the model's context is not known
DEFAULT_NEW_TOKENS = 256  # where a task does not say, as the harness's own backends have it
SAMPLING = {"do_sample", "temperature", "top_p", "until", "max_gen_toks"}  # of a task's generation_kwargs


@register_model("herd_jax")
class HarnessModel(TemplateLM):
    """Answers what the harness asks with `model`: a loaded one or the path of one. `batch_size`: texts generated at once. `chats`: whether
    prompts are in the chat format, so that the special tokens they spell are read as such."""

    def __init__(self, model: Model | str, batch_size: int | str | None = None, chats: bool = False, **_):
        super().__init__()
        self.loaded = load(model) if isinstance(model, str) else model
        if self.loaded.tokenizer is None:
            raise UserError("the model has no tokenizer beside it, and tasks are text: put the tokenizer's files into its directory")
        if self.prefix_token_id is None:
            raise UserError("the model's tokenizer has neither a begin nor an end token to stand before a text: name one in its files")
        self.batch_size, self.chats = int(16 if batch_size is None else batch_size), chats
        if self.batch_size < 1:
            raise UserError(f"--batch-size is {batch_size}: it must be 1 or more")
        self.scorer = ContinuationScorer(self.loaded.llama, self.loaded.layout, self.loaded.dtype)
        self.num_cut = 0  # prompts that lost their beginning, too long for the context

    @property
    def fingerprint(self) -> str:
        """Returns what is equal for models that answer alike: made of their weights, dtype, tokenizer, and how special tokens are read."""
        loaded = self.loaded
        parts = [checksums(loaded.params), str(loaded.dtype), repr(loaded.config), self.max_length]
        parts += [loaded.tokenizer.fingerprint, loaded.tokenizer.stop_ids, self.chats]
        return utils.hash_string(json.dumps(parts))[:16]

    @property
    def eot_token_id(self) -> int | None:
        return self.loaded.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int | None:
        return self.eot_token_id if self.loaded.tokenizer.bos_id is None else self.loaded.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        return self.loaded.context_length or UNKNOWN_LENGTH

    @property
    def tokenizer_name(self) -> str:
        return self.loaded.tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.loaded.tokenizer.chat_template or ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the dialog as text; without `add_generation_prompt` its last message is one that the assistant is to go on with."""
        tokenizer = self.loaded.tokenizer
        if add_generation_prompt:
            return chat.render_text(chat_history, tokenizer, add_assistant_header=True)
        return chat.render_text(chat_history[:-1], tokenizer, add_assistant_header=True) + chat_history[-1]["content"]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        tokenizer = self.loaded.tokenizer
        return tokenizer.encode(string, bos=tokenizer.adds_bos and add_special_tokens is not False, allow_special=self.chats)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """Returns, for each (texts, ids of the context, ids of the continuation), the log-likelihood and whether it is the greedy one; the
        context loses its beginning where both are too long."""
        found = {}
        for i, result in self._scores([(context, continuation) for _, context, continuation in requests], disable_tqdm):
            found[i] = result
            self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each whole text, in windows of the model's context that each predict what the one before did not."""
        windows, text_of = [], []
        for text, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            cut = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            windows += map(utils.make_disjoint_window, cut)
            text_of += [text] * (len(windows) - len(text_of))
        waiting, sums = collections.Counter(text_of), [0.0] * len(requests)
        for window, (log_likelihood, _) in self._scores(windows, disable_tqdm):
            text = text_of[window]
            sums[text] += log_likelihood
            waiting[text] -= 1
            if not waiting[text]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[text].args, sums[text])
        return sums

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]], quiet: bool) -> Iterator[tuple[int, tuple[float, bool]]]:
        room = self.max_length + 1  # the last token of a continuation is predicted and not looked at
        fitting = []
        for context, continuation in pairs:
            if not 0 < len(continuation) < room:
                raise UserError(
                    f"a continuation is {len(continuation)} tokens long and the model's context holds {self.max_length}: "
                    "leave the task out, or evaluate a model of a longer context"
                )
            if not context:  # as TemplateLM.loglikelihood does it, which has seen the text and not the ids
                begins = continuation[0] == self.prefix_token_id and len(continuation) > 1
                context, continuation = (continuation[:1], continuation[1:]) if begins else ([self.prefix_token_id], continuation)
            whole = [*context, *continuation][-room:]
            self.num_cut += len(whole) < len(context) + len(continuation)
            fitting.append((whole[: len(whole) - len(continuation)], continuation))
        waiting = dict.fromkeys(range(len(fitting)))
        try:
            for i, score in tqdm(self.scorer.score(self.loaded.params, fitting), "scored", len(fitting), disable=quiet):
                del waiting[i]
                yield i, tuple(score)
        except UserError as error:  # a score is not finite
            context, continuation = fitting[next(iter(waiting))]
            text = self.loaded.tokenizer.decode([*context, *continuation])[-60:]
            raise UserError(
                f"the model's log-likelihoods are not finite, first of the item that ends in {text!r}: its weights are damaged; "
                "give another checkpoint"
            ) from error

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns what follows each request, up to one of the task's `until` strings, a stop token or `max_gen_toks`; those of one kind and
        similar length are computed together."""
        kinds = collections.defaultdict(list)
        for i, request in enumerate(requests):
            kinds[json.dumps(request.args[1], sort_keys=True)].append(i)
        found: dict[int, str] = {}
        repeats: collections.Counter = collections.Counter()  # of equal requests, which are samples of one
        if requests:  # of a damaged model any text could come
            first = self.tok_encode(requests[0].args[0])[-self.max_length :]
            list(self._scores([([self.prefix_token_id, *first[:-1]], first[-1:] or [self.prefix_token_id])], quiet=True))
        with tqdm(total=len(requests), desc="generated", disable=disable_tqdm) as progress:
            for kind, members in kinds.items():
                options = self._options(json.loads(kind))
                room = self.max_length - options["max_new_tokens"]
                rows = {i: self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in members}
                self.num_cut += sum(len(row) > room for row in rows.values())
                rows = {i: row[-room:] for i, row in rows.items()}
                members.sort(key=lambda i: len(rows[i]))
                for some in (members[first : first + self.batch_size] for first in range(0, len(members), self.batch_size)):
                    samples = [repeats.update([key]) or repeats[key] - 1 for key in ((kind, *rows[i]) for i in some)]
                    texts = self.loaded.complete([rows[i] for i in some], samples=samples, **options)
                    for i, text in zip(some, texts, strict=True):
                        found[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    progress.update(len(some))
        return [found[i] for i in range(len(requests))]

    def _options(self, task: dict) -> dict:
        if unknown := sorted(set(task) - SAMPLING):
            known = ", ".join(sorted(SAMPLING))
            raise UserError(f"a task asks for the generation options {', '.join(unknown)}: there are {known}; leave it out")
        new_tokens, until = task.get("max_gen_toks", DEFAULT_NEW_TOKENS), task.get("until") or []
        if new_tokens >= self.max_length:
            raise UserError(
                f"a task asks for {new_tokens} new tokens, and the model's context of {self.max_length} leaves no room for a prompt: "
                "leave the task out, or evaluate a model of a longer context"
            )
        temperature = task.get("temperature", 1.0) if task.get("do_sample") else 0.0
        stop = [text for text in ([until] if isinstance(until, str) else until) if text]
        return {"max_new_tokens": new_tokens, "temperature": temperature, "top_p": task.get("top_p", 1.0), "stop": stop}
