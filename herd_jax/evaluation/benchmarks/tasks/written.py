"""Tasks whose answers a model writes."""

from collections.abc import Sequence


def written(rows: Sequence[dict], num_shots: int, max_new_tokens: int, until: Sequence[str] = ()) -> dict:
    """Returns lm-eval's configuration of a task in which greedy decoding writes up to `max_new_tokens`, or up to one of `until`.

    The first `num_shots` of the rows are examples, which are then not asked. How answers are scored is left to the task.
    """
    generation = {"until": list(until), "max_gen_toks": max_new_tokens, "do_sample": False}
    examples = {"dev": rows[:num_shots], "test": rows[num_shots:], "num_fewshot": num_shots}
    return examples | {"output_type": "generate_until", "generation_kwargs": generation}
