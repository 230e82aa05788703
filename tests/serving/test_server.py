"""The server as its clients see it: openai's own, unmodified, and bare requests."""

import concurrent.futures
import json
import socket

import httpx
import openai
import pytest
import servers

from starlette.testclient import TestClient

from herd_jax.errors import UserError
from herd_jax.serving.app import Server
from herd_jax.serving.limits import Keys, Limits
from herd_jax.serving.metrics import Metrics
from herd_jax.serving.run import listen
from herd_jax.serving.served import Served

DIALOG = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather", "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"], "additionalProperties": False},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def running():
    with servers.running() as (address, server):
        yield address, server


@pytest.fixture
def client(running):
    with openai.OpenAI(base_url=f"{running[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(running, path, body, **options):
    return httpx.post(running[0] + path, json=body, timeout=60, **options)


def test_models_and_health(running, client):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    assert httpx.get(running[0] + "/health").json() == {"status": "ok"}
    assert httpx.get(running[0] + "/openapi.json").json()["openapi"] == "3.1.0"
    page = httpx.get(running[0] + "/")
    assert "New dialog" in page.text and "default-src 'none'" in page.headers["content-security-policy"]


def test_a_completion_is_what_the_model_generates(running, client):
    model = servers.tiny_model()
    for options in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 7, "top_p": 0.9}, {"temperature": 1.0, "seed": 8, "presence_penalty": 0.5}):
        found = client.completions.create(model="tiny", prompt="abc", max_tokens=12, **options)
        assert found.choices[0].text == model.generate(["abc"], max_new_tokens=12, **options)[0]
        assert found.usage.prompt_tokens == 4 and 0 < found.usage.completion_tokens <= 12


def test_prompts_of_every_kind(client):
    ask = lambda prompt, **options: [choice.text for choice in client.completions.create(model="tiny", prompt=prompt, max_tokens=5, temperature=0, **options).choices]
    texts = ask(["abc", "de"])
    assert ask("abc") == texts[:1] and ask([[256, 97, 98, 99], [256, 100, 101]]) == texts and ask([256, 97, 98, 99]) == texts[:1]
    assert ask(["abc", "de"], n=2) == [texts[0], texts[0], texts[1], texts[1]]
    assert ask("abc", echo=True) == ["abc" + texts[0]] and ask([256, 97, 98, 99], echo=True) == ["abc" + texts[0]]


def test_samples_differ_and_a_seed_repeats_them(client):
    ask = lambda **options: [c.text for c in client.completions.create(model="tiny", prompt="abc", max_tokens=8, n=3, **options).choices]
    assert len({*ask(seed=5)}) == 3 and ask(seed=5) == ask(seed=5) != ask(seed=6)
    assert ask() != ask()
    best = client.completions.create(model="tiny", prompt="abc", max_tokens=8, n=1, best_of=3, seed=5).choices[0]
    assert best.text in ask(seed=5)


def test_echoed_log_probabilities_are_those_of_the_model(client):
    model = servers.tiny_model()
    text = "some text whose loss is known"
    found = client.completions.create(model="tiny", prompt=text, max_tokens=1, echo=True, logprobs=2, temperature=0).choices[0].logprobs
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None and "".join(found.tokens[1:-1]) == text
    (loss,) = model.loss([text])
    assert -sum(found.token_logprobs[1:-1]) / len(text) == pytest.approx(loss.nats_per_token, rel=1e-5)
    for token, value, top in zip(found.tokens[1:], found.token_logprobs[1:], found.top_logprobs[1:]):
        assert top[token] == value and len(top) in (2, 3) and max(top.values()) >= value
    assert found.text_offset[:3] == [0, 17, 18]
    none = client.completions.create(model="tiny", prompt=text, max_tokens=0, echo=True, logprobs=1).choices[0]
    assert none.text == text and none.logprobs.token_logprobs == found.token_logprobs[:-1]


@pytest.mark.parametrize("options", [{}, {"n": 2, "seed": 3}, {"logprobs": 1}, {"echo": True}, {"stop": ["e", "a"]}], ids=str)
def test_a_whole_completion_is_the_fold_of_its_stream(client, options):
    options = {"model": "tiny", "prompt": "abc", "max_tokens": 10, "temperature": 0.8, "seed": 11} | options
    whole = client.completions.create(**options)
    texts, reasons, tokens = {}, {}, {}
    for event in client.completions.create(stream=True, stream_options={"include_usage": True}, **options):
        if event.usage:
            assert event.usage == whole.usage
        for choice in event.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
            tokens.setdefault(choice.index, []).extend(choice.logprobs.tokens if choice.logprobs else ())
    for choice in whole.choices:
        assert (texts[choice.index], reasons[choice.index]) == (choice.text, choice.finish_reason)
        assert tokens[choice.index] == (choice.logprobs.tokens if choice.logprobs else [])


def test_a_chat_and_its_stream(client):
    model = servers.tiny_model()
    options = {"model": "tiny", "messages": DIALOG, "max_tokens": 12, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**options).choices[0]
    assert whole.message.content == model.chat(DIALOG, max_new_tokens=12) and whole.message.role == "assistant"
    assert all(len(one.top_logprobs) == 2 and one.logprob <= one.top_logprobs[0].logprob for one in whole.logprobs.content)
    assert len(whole.logprobs.content) == client.chat.completions.create(**options).usage.completion_tokens
    deltas = [event.choices[0] for event in client.chat.completions.create(stream=True, **options)]
    assert "".join(one.delta.content or "" for one in deltas) == whole.message.content and deltas[-1].finish_reason == whole.finish_reason
    assert [one.token for delta in deltas if delta.logprobs for one in delta.logprobs.content] == [one.token for one in whole.logprobs.content]


def test_a_call_that_is_asked_for(client):
    """A random model can say nothing but a call, so it makes one; streamed, it comes in one piece."""
    options = {"model": "tiny", "messages": DIALOG, "tools": [WEATHER], "tool_choice": "required", "seed": 1}
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        whole = client.chat.completions.create(**options | {"tool_choice": choice}).choices[0]
        (call,) = whole.message.tool_calls
        assert whole.finish_reason == "tool_calls" and whole.message.content is None
        assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    deltas = [event.choices[0] for event in client.chat.completions.create(stream=True, **options)]
    (streamed,) = [call for one in deltas for call in one.delta.tool_calls or ()]
    assert streamed.function.name == "weather" and json.loads(streamed.function.arguments) and deltas[-1].finish_reason == "tool_calls"
    assert not any(one.delta.content for one in deltas)


def test_answers_that_follow_a_schema(client):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    content = client.chat.completions.create(model="tiny", messages=DIALOG, response_format=form, seed=2).choices[0].message.content
    assert 0 <= json.loads(content)["n"] <= 9
    form = {"type": "json_object", "schema": {"const": 42}}
    assert client.chat.completions.create(model="tiny", messages=DIALOG, response_format=form).choices[0].message.content == "42"
    text = client.completions.create(model="tiny", prompt="a", extra_body={"guided_regex": "(yes|no)!"}).choices[0].text
    assert text in ("yes!", "no!")


def test_what_a_user_types_is_never_a_control_token(running):
    spelled = "<|end_of_text|>"
    found = post(running, "/tokenize", {"prompt": spelled}).json()
    assert found == {"tokens": [256, *spelled.encode()], "count": 16, "max_model_len": servers.LENGTH}
    found = post(running, "/tokenize", {"messages": [{"role": "user", "content": spelled}]}).json()["tokens"]
    assert 257 not in found
    assert post(running, "/detokenize", {"tokens": [256, 97, 98]}).json()["prompt"] == "ab"
    assert post(running, "/tokenize", {"content": "a", "with_pieces": True}).json()["tokens"] == [{"id": 97, "piece": "a"}]


BAD = [
    ("/v1/completions", {"prompt": "a", "model": "other"}, 404, "model"),
    ("/v1/completions", {}, 400, "prompt"),
    ("/v1/completions", {"prompt": []}, 400, "prompt"),
    ("/v1/completions", {"prompt": [259]}, 400, "prompt"),
    ("/v1/completions", {"prompt": "a" * 1100}, 400, "prompt"),
    ("/v1/completions", {"prompt": "a", "nonsense": 1}, 400, "nonsense"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "max_tokens": -1}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "temperature": 3}, 400, "temperature"),
    ("/v1/completions", {"prompt": "a", "top_p": 0}, 400, "top_p"),
    ("/v1/completions", {"prompt": "a", "n": 3, "best_of": 2}, 400, "best_of"),
    ("/v1/completions", {"prompt": "a", "best_of": 2, "stream": True}, 400, "best_of"),
    ("/v1/completions", {"prompt": "a", "stream_options": {}}, 400, "stream_options"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"999": 1}}, 400, None),
    ("/v1/completions", {"prompt": "a", "stop": [""]}, 400, "stop.0"),
    ("/v1/completions", {"prompt": "a", "guided_regex": "("}, 400, "response_format"),
    ("/v1/completions", {"prompt": "a", "guided_regex": "a", "guided_choice": ["b"]}, 400, "guided_choice"),
    ("/v1/completions", {"prompt": "a", "guided_json": "{"}, 400, "guided_json"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "nobody", "content": "a"}]}, 400, "messages.0.role"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "messages"),
    ("/v1/chat/completions", {"messages": DIALOG, "top_logprobs": 2}, 400, "top_logprobs"),
    ("/v1/chat/completions", {"messages": DIALOG, "tool_choice": "required"}, 400, "tool_choice"),
    ("/v1/chat/completions", {"messages": DIALOG, "max_tokens": 2, "max_completion_tokens": 3}, 400, "max_tokens"),
    (
        "/v1/chat/completions",
        {"messages": DIALOG, "tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, 400, "tool_choice",
    ),
    (
        "/v1/chat/completions",
        {"messages": DIALOG, "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nosuch"}}}},
        400, "response_format",
    ),
    ("/v1/embeddings", {"input": "a"}, 404, None),
    ("/tokenize", {}, 400, "prompt"),
    ("/detokenize", {"tokens": [999]}, 400, "tokens"),
    ("/nowhere", {}, 404, None),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "field"), BAD, ids=lambda value: str(value)[:60])
def test_bad_requests_get_a_sentence_that_names_the_field(running, path, body, status, field):
    for stream in (False, True) if path.startswith("/v1/c") and "stream" not in body and "stream_options" not in body else (False,):
        answer = post(running, path, body | ({"stream": True} if stream else {}))
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (status, field) and error["message"], error
    assert post(running, "/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400), (b"\xff\xfe", {}, 400), (b'{"prompt": NaN}', {}, 400), (b"[1]", {}, 400), (b'"text"', {}, 400), (b"", {}, 400),
        (b'{"prompt": "\\ud800"}', {}, 400), (b"[" * 100_000, {}, 400), (b"{}", {"content-type": "text/plain"}, 415), (b"a" * (9 * 2**20), {}, 413),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_bodies_that_are_none(running, content, headers, status):
    answer = httpx.post(running[0] + "/v1/completions", content=content, headers={"content-type": "application/json"} | headers)
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_other_methods_and_paths(running):
    assert httpx.get(running[0] + "/v1/completions").status_code == 405
    assert httpx.get(running[0] + "/v1/models/other").status_code == 404


def test_a_client_that_goes_frees_its_pages(running):
    address, server = running
    host, port = address.removeprefix("http://").split(":")
    for stream in (True, False):
        body = json.dumps({"prompt": "abc", "max_tokens": 200, "temperature": 0, "ignore_eos": True, "n": 3, "stream": stream}).encode()
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            servers.wait_until(lambda: len(servers.engine_of(server).scheduler.admitted) == 3)
        servers.wait_until(lambda: servers.is_idle(server))


def test_figures_have_the_names_of_vllm(running, client):
    client.completions.create(model="tiny", prompt="abc", max_tokens=3)
    text = httpx.get(running[0] + "/metrics").text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total", "generation_tokens_total", "prefix_cache_hits_total",
                 "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_sum", "e2e_request_latency_seconds_count"):  # fmt: skip
        assert f'vllm:{name}{{model_name="tiny"' in text or f"vllm:{name}{{" in text, name
    assert 'vllm:num_requests_running{model_name="tiny"} 0.0' in text


def test_keys_and_too_much_at_once():
    limits = Limits(max_requests=2, max_tokens=300, max_body=1000)
    with servers.running(limits, keys=["right"], max_sequences=2) as (address, server):
        assert httpx.get(address + "/v1/models").status_code == 401
        assert httpx.get(address + "/v1/models", headers={"Authorization": "Bearer wrong"}).json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(address + "/metrics").status_code == 401 and httpx.get(address + "/health").status_code == 200
        with openai.OpenAI(base_url=f"{address}/v1", api_key="right", max_retries=0, timeout=60) as client:
            ask = lambda: client.completions.with_raw_response.create(model="tiny", prompt="abc", max_tokens=100, temperature=0, extra_body={"ignore_eos": True})
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                futures = [pool.submit(ask) for _ in range(4)]
                found = [future.exception() or future.result() for future in futures]
            refused = [one for one in found if isinstance(one, openai.RateLimitError)]
            assert refused and all(one.response.headers["retry-after"] == "2" for one in refused)
            assert sum(not isinstance(one, Exception) for one in found) == 4 - len(refused) > 0
            with pytest.raises(openai.APIStatusError) as error:
                client.completions.create(model="tiny", prompt="abc", n=3)
            assert error.value.status_code == 413
            with pytest.raises(openai.APIStatusError) as error:
                client.completions.create(model="tiny", prompt="a" * 1000)
            assert error.value.status_code == 413
        servers.wait_until(lambda: servers.is_idle(server))


def test_requests_that_take_too_long_and_an_engine_that_ends():
    with servers.running(Limits(timeout=0.05), max_sequences=2) as (address, server):
        body = {"prompt": "abc", "max_tokens": 240, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(address + "/v1/completions", json=body, timeout=60)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        servers.wait_until(lambda: servers.is_idle(server))
        server.is_draining = True
        assert httpx.post(address + "/v1/completions", json=body).status_code == 503 and httpx.get(address + "/health").status_code == 503
        server.is_draining = False
        server.stop()
        assert httpx.get(address + "/health").json()["error"]["code"] == "engine_stopped"
        assert httpx.post(address + "/v1/completions", json=body).status_code == 503


def test_several_models_in_one_process():
    metrics, model = Metrics(), servers.tiny_model()
    settings = {"max_sequences": 2, "page_size": 16, "chunk_tokens": 32, "max_tokens_in_cache": 512, "strict": True}
    served = [Served.start(name, model, Limits(), metrics, **settings) for name in ("policy", "other")]
    server = Server(served, metrics)
    with TestClient(server.app) as client:
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["policy", "other"]
        answer = client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3, "temperature": 0, "model": "other"})
        assert answer.json()["model"] == "other" and answer.json()["choices"][0]["text"] == model.generate(["abc"], max_new_tokens=3)[0]
        refused = client.post("/v1/completions", json={"prompt": "abc"})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "model"
        assert 'vllm:kv_cache_usage_perc{model_name="policy"}' in client.get("/metrics").text
    server.stop()


def test_settings_that_cannot_be():
    with pytest.raises(UserError, match="timeout is 0: it must be more than 0"):
        Limits(timeout=0)
    with pytest.raises(UserError, match="an API key is empty"):
        Keys([" "])
    bound = listen("127.0.0.1", 0)
    with pytest.raises(UserError, match="cannot listen on 127.0.0.1 port"):
        listen("127.0.0.1", bound.getsockname()[1])
    bound.close()
