"""The command under load: streams from many clients, some of which go or send nonsense, and a SIGTERM in the middle."""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys

import httpx
import pytest
import servers

CLIENTS = 200


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    servers.tiny_model().save(path)
    return path


def start(saved, *options) -> tuple[subprocess.Popen, str]:
    """Starts the command, and returns it with its address once it serves."""
    arguments = ("--model", str(saved), "--port", "0", "--max-tokens-in-cache", "8192", "--max-sequences", "16", "--strict", "--no-warm-up", *options)
    process = subprocess.Popen([sys.executable, "-m", "herd_jax.serve", *arguments], stderr=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    for line in process.stderr:
        if found := re.search(r"serving tiny at (http\S+)", line):
            return process, found[1]
    raise AssertionError("the server did not start")


async def client(address: str, http: httpx.AsyncClient, rng: random.Random, counts: dict[str, int], until) -> None:
    """Sends requests one after the other, and counts how each of them ended."""
    while not until():
        kind = rng.choice(["stream"] * 6 + ["leaves"] * 2 + ["nonsense", "giant"])
        body = {"prompt": "a" * rng.randint(1, 60), "max_tokens": rng.randint(1, 40), "temperature": 1, "stream": True, "ignore_eos": True}
        content = {"nonsense": b'{"prompt": ', "giant": json.dumps({"prompt": "a" * 100_000}).encode()}.get(kind, json.dumps(body).encode())
        begun = False
        try:
            async with http.stream("POST", f"{address}/v1/completions", content=content, headers={"content-type": "application/json"}) as answer:
                begun = True
                if answer.status_code != 200:
                    await answer.aread()
                    assert answer.status_code in (400, 429, 503), answer.text
                    counts[str(answer.status_code)] += 1
                    await asyncio.sleep(0.05 * rng.random())
                    continue
                lines, last = 0, ""
                async for line in answer.aiter_lines():
                    lines, last = lines + 1, line or last
                    if kind == "leaves" and lines > 2:
                        break
                counts["left" if kind == "leaves" and lines <= 3 else "whole" if last == "data: [DONE]" else "cut"] += 1
        except httpx.HTTPError:  # a request that the server never took: its socket is closed
            counts["cut" if begun else "closed"] += 1
            return


@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_load_and_the_end(saved, seconds):
    """Every request that is taken is answered whole, also while the server ends; it leaves no page held, and goes with status 0."""
    process, address = start(saved, "--max-requests", "100", "--drain-timeout", "30")
    lines: list[str] = []

    async def run() -> dict[str, int]:
        counts = dict.fromkeys(("whole", "left", "cut", "closed", "400", "429", "503"), 0)
        over = asyncio.Event()
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(timeout=60, limits=limits) as http:
            await http.post(f"{address}/v1/completions", json={"prompt": "warm", "max_tokens": 4})
            tasks = [asyncio.create_task(client(address, http, random.Random(i), counts, over.is_set)) for i in range(CLIENTS)]
            loop = asyncio.get_running_loop()
            reading = loop.run_in_executor(None, lambda: lines.extend(process.stderr))
            await asyncio.sleep(seconds)
            async with asyncio.timeout(120):  # on a slow machine it takes longer until there is something to see
                while min(counts["whole"] - 30, counts["left"] - 1, counts["400"] - 1) < 0:
                    await asyncio.sleep(0.1)
            assert counts["closed"] == 0
            figures = (await http.get(f"{address}/metrics")).text
            assert "vllm:num_requests_running" in figures and counts["cut"] == 0
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(1)
            over.set()
            await asyncio.gather(*tasks)
            await reading
        return counts

    counts = asyncio.run(run())
    assert process.wait(timeout=60) == 0
    assert counts["cut"] == 0, counts
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(logged) > 50 and not [line for line in lines if "Traceback" in line or "never retrieved" in line], lines[-5:]
    assert {line["status"] for line in logged} <= {200, 400, 429, 499, 503}
    taken = [line for line in logged if line["status"] == 200 and line["path"] == "/v1/completions"]
    assert all(line["model"] == "tiny" and line["prompt_tokens"] for line in taken)
    assert len(taken) == 1 + counts["whole"] + counts["left"]  # none was taken and not answered


def test_nothing_is_held_when_all_have_gone():
    """After a load like that the engine is as it was."""
    with servers.running(max_sequences=8) as (address, server):

        async def run() -> None:
            counts = dict.fromkeys(("whole", "left", "cut", "closed", "400", "429", "503"), 0)
            over = asyncio.Event()
            async with httpx.AsyncClient(timeout=60) as http:
                tasks = [asyncio.create_task(client(address, http, random.Random(i), counts, over.is_set)) for i in range(40)]
                await asyncio.sleep(2)
                over.set()
                await asyncio.gather(*tasks)
            assert counts["whole"] and counts["left"] and not counts["cut"]

        asyncio.run(run())
        servers.wait_until(lambda: servers.is_idle(server))
        runner = server.models["tiny"].runner
        servers.wait_until(lambda: not runner.engine.has_work and not runner._listeners)
        assert not runner.engine._samples and not runner.engine._progress and len(runner.engine.scheduler._left) + runner.engine.scheduler.num_slots >= 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "nowhere"), "nowhere does not exist"),
        (("--max-requests", "0"), "max_requests is 0: it must be more than 0"),
        (("--max-length", "5000"), "max_length is 5000: the model's context holds 1024"),
        (("--max-tokens-in-cache", "99999999999999"), "the cache takes .* too little: give a smaller max_tokens_in_cache"),
        (("--model", "{model}"), "two models have the same name"),
        (("--port", "99999"), "port is 99999: it must be from 0"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(saved, options, message):
    options = [option.format(model=saved) for option in options]
    given = ["--model", str(saved)] if options[1] != "nowhere" else []
    command = [sys.executable, "-m", "herd_jax.serve", "--port", "0", *given, *options]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert found.returncode == 1 and re.search(f"^error: .*{message}", found.stderr, re.MULTILINE) and "Traceback" not in found.stderr, found.stderr
