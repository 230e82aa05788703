"""Rejection sampling: K answers to each prompt from one policy or several, kept on disk with their scores, and what is chosen of them (section 4.2.2).

An answer is keyed by (seed, prompt, k): its draws depend on nothing else, so a set that was interrupted is completed as it would have been, in any order
of batches.
"""

import dataclasses
import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from herd_jax.data.dialogs import Refused, messages_of, read_records
from herd_jax.errors import UserError
from herd_jax.files import user_path, whole_file
from herd_jax.inference.engine.build import EngineConfig
from herd_jax.inference.engine.requests import Request
from herd_jax.inference.sampling import Sampling
from herd_jax.interop.load import open_source
from herd_jax.mesh import MeshConfig
from herd_jax.model import Model, load
from herd_jax.post_training.reference import content_of
from herd_jax.post_training.verifiers import find_verifier
from herd_jax.reliability.lock import only_writer
from herd_jax.text.messages import Message

SELECT = ("verifier", "reward", "both", "random")
SAMPLES, SCORES, SELECTED, PREFERENCES = "samples.jsonl", "scores.jsonl", "selected.jsonl", "preferences.jsonl"


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """What `python -m herd_jax.post_train sample` reads. The K answers of a prompt are shared out in equal runs over policies, then system prompts, then
    temperatures."""

    workdir: str  # directory of the set; the same command completes what is there
    policies: tuple[str, ...]  # the best models so far
    prompts: tuple[str, ...]  # JSONL: "messages" or "prompt", and what the verifier needs
    num_samples: int = 10  # K: the paper's is 10 to 30
    max_new_tokens: int = 512
    temperatures: tuple[float, ...] = (0.6,)
    top_p: float = 1.0
    system_prompts: tuple[str, ...] = ("",)  # for style; "": none beside the prompt's own
    reward_model: str = ""
    verifier: str = ""  # exact, number, pattern, json, python, or MODULE:FUNCTION
    unsafe_execution: bool = False  # run programs also where the machine cannot contain them
    select: str = ""  # verifier | reward | both (the best reward of those verified) | random; empty: what there are scores for
    seed: int = 0
    mesh: MeshConfig | None = None  # none: one device
    engine: EngineConfig = EngineConfig()

    def __post_init__(self):
        if not self.policies or not self.prompts or not self.system_prompts or not self.temperatures:
            raise UserError("policies, prompts, system_prompts and temperatures each need one or more")
        if self.num_samples < 1:
            raise UserError(f"num_samples is {self.num_samples}: it must be 1 or more; the paper's is 10 to 30")
        if self.choice not in SELECT:
            raise UserError(f"select is '{self.select}': it must be one of {', '.join(SELECT)}")
        if self.choice in ("verifier", "both") and not self.verifier or self.choice in ("reward", "both") and not self.reward_model:
            raise UserError(f"select is '{self.choice}' and there is no {'verifier' if not self.verifier else 'reward_model'}: name one")

    @property
    def choice(self) -> str:
        """Returns by what answers are chosen."""
        by = ("both" if self.reward_model else "verifier") if self.verifier else ("reward" if self.reward_model else "random")
        return self.select or by


class Prompt(NamedTuple):
    """A prompt: `key` is the same for the same messages and tools."""

    key: str
    messages: list[Message]
    record: Mapping[str, Any]


class Run(NamedTuple):
    """Answers first .. stop - 1 of each prompt: from which policy, with which system prompt, at which temperature."""

    policy: int
    system: str
    temperature: float
    first: int
    stop: int


def sample(config: SampleConfig, say=print) -> dict[str, float]:
    """Draws what is missing of the set, scores it, and writes what is chosen; returns figures of the set. Raises UserError for prompts, models and verifiers
    that cannot be used."""
    directory = user_path(config.workdir)
    prompts = read_prompts(config.prompts)
    verifier = find_verifier(config.verifier, config.unsafe_execution) if config.verifier else None
    with only_writer(directory):
        _check_same(config, directory)
        draw(config, prompts, directory, say)
        score(config, prompts, directory, verifier, say)
        return choose(config, prompts, directory, say)


def read_prompts(paths: Sequence[str]) -> list[Prompt]:
    """Returns the prompts of JSONL files, each once. Raises UserError for a record that is none."""
    found: dict[str, Prompt] = {}
    for path in paths:
        for place, record in read_records(path):
            try:
                messages = messages_of(record.get("messages", record.get("prompt")), "user")
                if messages[-1].role == "assistant":
                    raise Refused("it ends with a message of the assistant")
            except Refused as reason:
                raise UserError(f"{place} is no prompt: {reason}; give messages, or a prompt") from reason
            written = json.dumps([[dataclasses.asdict(message) for message in messages], record.get("tools")], sort_keys=True)
            key = hashlib.sha256(written.encode()).hexdigest()[:32]
            found.setdefault(key, Prompt(key, messages, record))
    return list(found.values())


def runs_of(config: SampleConfig) -> list[Run]:
    """Returns how the K answers of a prompt are shared out."""
    kinds = [(p, s, t) for p in range(len(config.policies)) for s in config.system_prompts for t in config.temperatures]
    bounds = [i * config.num_samples // len(kinds) for i in range(len(kinds) + 1)]
    return [Run(*kind, first, stop) for kind, first, stop in zip(kinds, bounds, bounds[1:]) if first < stop]


def draw(config: SampleConfig, prompts: Sequence[Prompt], directory: Path, say) -> None:
    """Draws the answers that the set lacks, and appends each to it as it comes."""
    done = {(row["prompt"], row["k"]) for row in read_rows(directory / SAMPLES)}
    for policy, path in enumerate(config.policies):
        own = [run for run in runs_of(config) if run.policy == policy]
        missing = [(p, run, span) for run in own for p in prompts for span in spans([k for k in range(run.first, run.stop) if (p.key, k) not in done])]
        if not missing:
            continue
        model = load(path, config.mesh)
        requests = [(prompt, run, _request(config, model, prompt, run, span)) for prompt, run, span in missing]
        engine = model.engine(**dataclasses.asdict(config.engine))
        start, number, tokens = time.perf_counter(), 0, 0
        with (directory / SAMPLES).open("ab") as file:
            for answer in engine.generate([request for *_, request in requests]):
                if answer.finish_reason == "error":
                    raise UserError(f"the logits of {path} are not finite numbers: its weights are damaged; take another copy of them")
                prompt, run, _ = requests[answer.ticket]
                row = {
                    "prompt": prompt.key, "k": answer.sample, "policy": path, "system": run.system, "temperature": run.temperature,
                    "text": answer.text, "ids": list(answer.ids), "ended": answer.finish_reason == "stop",
                }  # fmt: skip
                file.write(json.dumps(row).encode() + b"\n")
                number, tokens = number + 1, tokens + len(answer.ids)
        seconds = time.perf_counter() - start
        say(f"{path}: {number} answers, {tokens:,} tokens in {seconds:.1f} s: {number / seconds:.1f} answers/s, {tokens / seconds:,.0f} tokens/s")


def spans(numbers: Sequence[int]) -> list[range]:
    """Returns growing numbers as ranges of neighbours: answers of one request, whose prompt is computed once."""
    begins = [i for i, number in enumerate(numbers) if i == 0 or number != numbers[i - 1] + 1]
    return [range(numbers[first], numbers[stop - 1] + 1) for first, stop in zip(begins, [*begins[1:], len(numbers)])]


def _request(config: SampleConfig, model: Model, prompt: Prompt, run: Run, span: range) -> Request:
    seed = int.from_bytes(hashlib.sha256(f"{config.seed} {prompt.key}".encode()).digest()[:8], "big")
    sampling = Sampling(config.max_new_tokens, run.temperature, config.top_p, seed)
    return Request(prompt_ids(model, prompt, run.system), sampling, num_samples=len(span), first_sample=span.start)


def prompt_ids(model: Model, prompt: Prompt, system: str) -> list[int]:
    """Returns the ids of a prompt with a system prompt before it, joined to its own where it has one."""
    messages = prompt.messages
    if system and messages[0].role == "system":
        messages = [dataclasses.replace(messages[0], content=f"{system}\n\n{messages[0].content}"), *messages[1:]]
    elif system:
        messages = [Message("system", system), *messages]
    return model.chat_ids(messages)


def score(config: SampleConfig, prompts: Sequence[Prompt], directory: Path, verifier, say) -> None:
    """Scores the answers that have no score yet. An answer that makes the verifier raise counts as wrong; where all do, the verifier is."""
    by_key, done = {prompt.key: prompt for prompt in prompts}, {(row["prompt"], row["k"]) for row in read_rows(directory / SCORES)}
    rows = [row for row in read_rows(directory / SAMPLES) if (row["prompt"], row["k"]) not in done and row["prompt"] in by_key]
    if not rows or not (verifier or config.reward_model):
        return
    scores: list[dict[str, Any]] = [{"prompt": row["prompt"], "k": row["k"]} for row in rows]
    if verifier:
        failures: Counter = Counter()
        for row, found in zip(rows, scores):
            try:
                found["verified"] = float(verifier(by_key[row["prompt"]].record, row["text"]))
            except UserError:
                raise
            except Exception as error:  # whatever a user's function, or an answer that it did not expect, makes of it
                found["verified"] = 0.0
                failures[f"{type(error).__name__}: {error}"] += 1
        if failures:
            reason, _ = failures.most_common(1)[0]
            if sum(failures.values()) == len(rows):
                raise UserError(f"the verifier {config.verifier} raises for every answer ({reason}): mend it, or what the prompts' records give it")
            say(f"the verifier raised for {sum(failures.values())} of {len(rows)} answers, which count as wrong (most often {reason})")
    if config.reward_model:
        model = load(config.reward_model, config.mesh)
        _check_tokenizer(config, model)
        prompts_of = [prompt_ids(model, by_key[row["prompt"]], row["system"]) for row in rows]
        answers = [row["ids"] or [model.text_tokenizer().stop_ids[0]] for row in rows]
        for found, reward in zip(scores, model.rewards(prompts_of, answers).tolist()):
            found["reward"] = reward
    with (directory / SCORES).open("ab") as file:
        file.write(b"".join(json.dumps(found).encode() + b"\n" for found in scores))


def _check_tokenizer(config: SampleConfig, reward: Model) -> None:
    for path in config.policies:
        policy = open_source(path).tokenizer
        if policy is None or policy.fingerprint != reward.text_tokenizer().fingerprint:
            raise UserError(f"the reward model {config.reward_model} has another tokenizer than {path}, so its scores would be of other text: choose another")


def choose(config: SampleConfig, prompts: Sequence[Prompt], directory: Path, say) -> dict[str, float]:
    """Writes the chosen answer of each prompt as a dialog for SFT, and a pair of each prompt that has a better and a worse answer; returns figures."""
    scores = {(row["prompt"], row["k"]): row for row in read_rows(directory / SCORES)}
    answers = defaultdict(list)
    for row in sorted(read_rows(directory / SAMPLES), key=lambda row: row["k"]):
        if row["k"] < config.num_samples:
            answers[row["prompt"]].append(row | scores.get((row["prompt"], row["k"]), {}))
    chosen, pairs, verified = [], [], []
    for prompt in prompts:
        of_prompt = answers[prompt.key]
        verified.append([row.get("verified", 0.0) for row in of_prompt])
        best = best_of(config, of_prompt)
        if best is None:
            continue
        dialog = [_plain(message) for message in prompt.messages]
        tools = {"tools": prompt.record["tools"]} if prompt.record.get("tools") else {}
        answer = [{"role": "assistant", "content": best["text"]}]
        scored = {name: best[name] for name in ("verified", "reward") if name in best}
        chosen.append({"messages": [*dialog, *answer], **tools, "prompt_key": prompt.key, "policy": best["policy"], **scored})
        worse = [row for row in of_prompt if row["text"] and row["text"] != best["text"] and value(config, row) < value(config, best)]
        if worse:
            worst = min(worse, key=lambda row: (value(config, row), row["policy"] == best["policy"], row["k"]))
            pairs.append({"prompt": dialog, "chosen": answer, "rejected": [{"role": "assistant", "content": worst["text"]}], **tools, "prompt_key": prompt.key})
    for name, rows in ((SELECTED, chosen), (PREFERENCES, pairs)):
        with whole_file(directory / name) as file:
            file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    figures = {"prompts": len(prompts), "chosen": len(chosen), "pairs": len(pairs)}
    if config.verifier:
        share = lambda of: sum(of) / max(1, len(verified))
        figures |= {"pass@1": share(sum(v) / len(v) for v in verified if v), f"pass@{config.num_samples}": share(max(v, default=0) >= 1 for v in verified)}
    say(f"{len(prompts)} prompts: {len(chosen)} answers chosen by {config.choice}, {len(pairs)} pairs" + "".join(f", {k} {v:.3f}" for k, v in figures.items() if "@" in k))
    return figures


def value(config: SampleConfig, row: Mapping[str, Any]) -> tuple[float, ...]:
    """Returns what an answer is worth, to be compared."""
    return tuple(row.get(name, 0.0) for name in {"verifier": ("verified",), "reward": ("reward",), "both": ("verified", "reward"), "random": ()}[config.choice])


def best_of(config: SampleConfig, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Returns the best answer of a prompt, the first of equals; None where none has ended, or none is right though that is asked for."""
    ended = [row for row in rows if row["ended"] and row["text"]]
    if config.choice in ("verifier", "both"):
        ended = [row for row in ended if row.get("verified", 0.0) >= 1]
    if config.choice == "random":
        return ended[0] if ended else None  # the draws themselves are random
    return max(ended, key=lambda row: value(config, row), default=None)


def _plain(message: Message) -> dict[str, Any]:
    fields = {"role": message.role, "content": message.content}
    calls = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
    return fields | ({"tool_calls": calls} if calls else {})


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file that grows; a last line that was cut off is none, and is removed."""
    if not path.is_file():
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)
    for line in whole.splitlines():
        yield json.loads(line)


def _check_same(config: SampleConfig, directory: Path) -> None:
    """Raises UserError where the set was begun with other settings that its answers depend on."""
    names = ("policies", "num_samples", "max_new_tokens", "temperatures", "top_p", "system_prompts", "seed")
    now = json.loads(json.dumps({name: getattr(config, name) for name in names}))
    now["weights of the policies"] = [content_of(open_source(path)) for path in config.policies]
    noted = directory / "set.json"
    if noted.is_file():
        before = json.loads(noted.read_text())
        wrong = [name for name in now if before.get(name) != now[name]]
        if wrong:
            raise UserError(f"{config.workdir} was begun with other values of {', '.join(wrong)}: give those, or another workdir")
        return
    with whole_file(noted) as file:
        file.write(json.dumps(now).encode())
