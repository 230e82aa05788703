"""Programs that know nothing of this server: the harness through its client, and a fuzzer that reads the description."""

import dataclasses

import pytest
import schemathesis
import servers
from hypothesis import HealthCheck, Phase, given, settings
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from schemathesis.specs.openapi import checks

from herd_jax.evaluation.benchmarks.harness_model import HarnessModel
from herd_jax.serving.limits import Limits
from herd_jax.text.tokenizer import ByteTokenizer

EXCLUDED = [checks.positive_data_acceptance]  # what fits the schema may still be too long, or contradict itself


class WithoutBegin(ByteTokenizer):
    adds_bos = False  # the client sends ids that it got without it


def test_the_harness_gets_the_figures_of_its_own_model():
    """lm-eval's `local-completions`, which takes the tokens from the server, against the same requests to the model in this process."""
    model = dataclasses.replace(servers.tiny_model(), tokenizer=WithoutBegin({}))
    own = HarnessModel(model)
    pairs = [("a question", " one"), ("a question", " another answer"), ("x", "y"), ("it is", " what it is")]
    scored = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    until = {"until": ["e"], "max_gen_toks": 12, "temperature": 0}
    generated = [Instance("generate_until", {}, (text, dict(until)), i) for i, text in enumerate(["abc", "hello you"])]
    with servers.running(model=model) as (address, _):
        url = f"{address}/v1/completions"
        client = LocalCompletionsAPI(base_url=url, model="tiny", tokenizer_backend="remote", max_length=1024, batch_size=2)
        found, texts = client.loglikelihood(scored, disable_tqdm=True), client.generate_until(generated, disable_tqdm=True)
    for (log_p, greedy), (expected, expected_greedy) in zip(found, own.loglikelihood(scored, disable_tqdm=True), strict=True):
        assert log_p == pytest.approx(expected, rel=1e-4) and greedy == expected_greedy
    assert texts == own.generate_until(generated, disable_tqdm=True)


@pytest.mark.parametrize("mode", ["NEGATIVE", pytest.param("POSITIVE", marks=pytest.mark.slow)])
def test_the_description_is_kept_whatever_is_sent(mode):
    """schemathesis makes requests from /openapi.json, bad and good; each answer is one that the description names, and none a fault."""
    mode, statuses = schemathesis.GenerationMode[mode], set()
    limits = Limits(max_tokens=512, max_requests=8)  # more is refused, so that it ends soon
    options = {"max_examples": 12, "deadline": None, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck), "derandomize": True}
    with servers.running(limits) as (address, server):
        for found in schemathesis.openapi.from_url(f"{address}/openapi.json").get_all_operations():
            operation = found.ok()

            @settings(**options)
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case):
                answer = case.call(timeout=60)
                statuses.add(answer.status_code)
                assert answer.status_code < 500, answer.text
                case.validate_response(answer, excluded_checks=EXCLUDED)

            if operation.method == "post" or mode.is_positive:
                ask()
        servers.wait_until(lambda: servers.is_idle(server))
    assert (400 if mode.is_negative else 200) in statuses
