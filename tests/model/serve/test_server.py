"""The HTTP server as real processes: the openai client, plain HTTP, a client that leaves, a full queue, SIGTERM."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from jobs.main import main
from model.network.generate import SamplingConfig, generate
from model.registry.load import load
from tests.model.serve.process import CONTEXT, DEADLINE, NAME, Process, make_lake

LONG = 120_000  # tokens: minutes of work, so that a request of this length is running until it is cancelled


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_lake(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def servers(lake: str) -> Iterator[dict[str, Process]]:
    """All that the file needs, started at once: importing MLflow and torch is most of a start."""
    limits = ["--serve.queue", "1", "--serve.max-prompts", "2", "--serve.max-body", "200000"]
    started = {
        "server": Process(lake, *limits),
        "hurried": Process(lake, "--serve.timeout", "3", "--serve.drain", "0"),
    }
    try:
        for process in started.values():
            process.wait_ready()
        yield started
    finally:
        for process in started.values():
            process.process.kill()
            process.process.communicate()


@pytest.fixture(scope="module")
def server(servers: dict[str, Process]) -> Process:
    return servers["server"]


def complete(server: Process, **fields: Any) -> Any:
    return server.client.completions.create(**{"model": NAME, "prompt": "def ", "max_tokens": 24, "seed": 5, **fields})


def post(server: Process, **fields: Any) -> httpx.Response:
    return server.http.post("/v1/completions", json={"model": NAME, "prompt": "def ", **fields})


@contextlib.contextmanager
def long_stream(server: Process, max_tokens: int = LONG) -> Iterator[Iterator[str]]:
    """A stream whose first event has come, so that it is running; the body leaves when it likes."""
    body = {"model": NAME, "prompt": "a", "max_tokens": max_tokens, "stream": True, "seed": 1}
    with (
        httpx.Client(base_url=server.address, timeout=DEADLINE) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        assert response.status_code == 200
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        yield lines


def test_health_and_the_models_say_what_is_served(server: Process) -> None:
    assert f"{NAME} version 1" in server.headline
    health = server.http.get("/health")
    assert health.status_code == 200
    assert health.json() == {"status": "ok", "model": NAME, "version": "1", "alias": "champion", "requests": 0}
    assert [(m.id, m.object) for m in server.client.models.list()] == [(NAME, "model")]
    assert server.client.models.retrieve(NAME).id == NAME
    assert server.client.models.retrieve(f"models:/{NAME}@champion").created > 1_700_000_000
    with pytest.raises(openai.NotFoundError, match="There is no model 'other'"):
        server.client.models.retrieve("other")


def test_the_printed_curl_line_works(server: Process) -> None:
    done = subprocess.run(
        [*shlex.split(server.curl), "-sS", "--fail"], capture_output=True, text=True, check=False, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 32


def test_a_completion_is_the_networks_text_with_its_usage(server: Process, lake: str) -> None:
    loaded = load(f"models:/{NAME}@champion", lake=lake)
    sampling = SamplingConfig(max_tokens=24, seed=5, temperature=0.9, top_p=0.8)
    wanted = "".join(p.text for p in generate(loaded.transformer, loaded.tokenizer, "def ", sampling))
    for model in (NAME, f"models:/{NAME}@champion", f"models:/{NAME}/1"):
        got = complete(server, model=model, temperature=0.9, top_p=0.8)
        assert (got.object, got.model, got.system_fingerprint) == ("text_completion", NAME, f"{NAME}/1")
        assert [(c.index, c.text, c.finish_reason) for c in got.choices] == [(0, wanted, "length")]
        assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (4, 24, 28)
    assert complete(server, temperature=0.9, top_p=0.8, seed=6).choices[0].text != wanted


def test_several_prompts_echo_and_stop(server: Process) -> None:
    alone = [complete(server, prompt=p).choices[0].text for p in ("def ", "class ")]
    both = complete(server, prompt=["def ", "class "], echo=True)
    assert [c.text for c in both.choices] == ["def " + alone[0], "class " + alone[1]]
    assert (both.usage.prompt_tokens, both.usage.completion_tokens) == (10, 48)
    at = alone[0][10:12]
    for stop in (at, ["\n\n", at]):
        stopped = complete(server, stop=stop).choices[0]
        assert (stopped.text, stopped.finish_reason) == (alone[0][: alone[0].index(at)], "stop")


def test_a_stream_joins_to_the_text_of_the_answer(server: Process) -> None:
    plain = complete(server, prompt=["def ", "class "], echo=True)
    chunks = list(complete(server, prompt=["def ", "class "], echo=True, stream=True))
    for index in (0, 1):
        mine = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert len(mine) > 2
        assert "".join(c.text for c in mine) == plain.choices[index].text
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + ["length"]
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)
    *_, last = complete(server, prompt=["def ", "class "], stream=True, stream_options={"include_usage": True})
    assert (last.choices, last.usage) == ([], plain.usage)


def test_the_stream_on_the_wire(server: Process) -> None:
    answer = post(server, max_tokens=3, stream=True, temperature=0, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events.pop() == ""
    assert all(e.startswith("data: ") and "\n" not in e for e in events)
    assert events.pop() == "data: [DONE]"
    bodies = [json.loads(e.removeprefix("data: ")) for e in events]
    assert [b["object"] for b in bodies] == ["text_completion"] * 4
    assert [b["usage"] for b in bodies[:3]] == [None] * 3
    assert bodies[3]["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    assert "usage" not in json.loads(post(server, stream=True).text.split("\n\n")[0].removeprefix("data: "))


def test_defaults_that_clients_send_are_taken(server: Process) -> None:
    extra = {
        "n": 1, "best_of": 1, "logprobs": None, "suffix": None, "presence_penalty": 0, "frequency_penalty": 0.0,
        "logit_bias": None, "user": "u", "echo": False, "stream_options": None,
    }  # fmt: skip
    assert post(server, seed=5, **extra).json()["choices"] == post(server, seed=5).json()["choices"]


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"n": 2}, "n", "not supported"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"logprobs": 0}, "logprobs", "not supported"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"prompt": [1, 2]}, "prompt", "token ids are not supported"),
        ({"prompt": [[1, 2]]}, "prompt", "token ids are not supported"),
        ({"prompt": []}, "prompt", "send 1 to 2"),
        ({"prompt": ["a"] * 3}, "prompt", "send 1 to 2"),
        ({"prompt": ["a", 1]}, "prompt", "valid string"),
        ({"prompt": None}, "prompt", "valid string"),
        ({"prompt": "a" * CONTEXT}, "prompt", "do not fit"),
        ({"max_tokens": CONTEXT}, "max_tokens", "do not fit"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "9"}, "max_tokens", "valid integer"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"seed": 2**70}, "seed", "less than"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": 3}, "stop", "valid string"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "not permitted"),
        ({"temperatur": 1}, "temperatur", "no field"),
    ],
)
def test_a_wrong_field_is_400_and_named(server: Process, fields: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(says)) as caught:
        complete(server, extra_body=fields)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.response.json()["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "not JSON"),
        (b"[]", 400, "must be a JSON object"),
        (b"\xff", 400, "not JSON"),
        (b'{"model": "small", "prompt": "\\ud800"}', 400, "not JSON"),
        (b'{"model": "small", "prompt": "a", "temperature": NaN}', 400, "not JSON"),
        (b"[" * 50_000, 400, "not JSON"),
        (b" " * 200_001, 413, "larger than 200000 bytes"),
        (b'{"prompt": "a"}', 400, "model: field required"),
    ],
)
def test_a_body_that_is_no_request_is_refused(server: Process, body: bytes, status: int, says: str) -> None:
    answer = server.http.post("/v1/completions", content=body)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]


def test_an_unknown_model_path_or_method_has_openais_shape(server: Process) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        complete(server, model="other")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    for answer, status in ((server.http.get("/v1/none"), 404), (server.http.get("/v1/completions"), 405)):
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_worker(server: Process, stream: bool) -> None:
    host, port = server.address.removeprefix("http://").split(":")
    body = json.dumps({"model": NAME, "prompt": "a", "max_tokens": LONG, "stream": stream})
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        while server.http.get("/health").json()["requests"] == 0:
            pass
    # Were the first still running, it would run for longer than this client waits.
    assert complete(server, timeout=30).usage.completion_tokens == 24


def test_a_full_queue_is_429_with_retry_after_and_the_event_loop_goes_on(server: Process) -> None:
    with long_stream(server) as lines:
        second = threading.Thread(target=complete, args=[server])
        second.start()
        while server.http.get("/health").json()["requests"] < 2:
            pass
        refused = post(server)
        assert next(line for line in lines if line).startswith("data: {")
    second.join(DEADLINE)
    assert not second.is_alive()
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"


def test_a_request_that_takes_too_long_is_ended(servers: dict[str, Process]) -> None:
    with long_stream(servers["hurried"]) as lines:
        late = post(servers["hurried"], max_tokens=LONG)
        rest = [line for line in lines if line]
    assert late.status_code == 504
    assert json.loads(rest[-1].removeprefix("data: "))["error"] == late.json()["error"]
    assert "longer than 3 s" in late.json()["error"]["message"]


def test_a_drain_is_bounded(servers: dict[str, Process]) -> None:
    with long_stream(servers["hurried"]) as lines:
        servers["hurried"].terminate()
        rest = [line for line in lines if line]
    assert "shutting down" in json.loads(rest[-1].removeprefix("data: "))["error"]["message"]
    assert servers["hurried"].end() == (0, "")


@pytest.mark.parametrize(
    ("host", "code", "says"),
    [("127.0.0.1", 75, "is taken; end what listens there"), ("256.0.0.1", 2, "Cannot listen on 256.0.0.1")],
)
def test_an_address_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], host: str, code: int, says: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--lake", str(tmp_path), "--serve.host", host, "--serve.port", port]) == code
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert says in printed.err


def test_without_the_extra_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--lake", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "Serving needs the extra: pip install 'lakemoe[serve]'.\n"


def test_sigterm_lets_a_stream_finish_refuses_new_requests_and_exits_0(server: Process) -> None:
    # The last test of the file: it ends the server.
    tokens = 3000  # seconds of work, against the milliseconds that the requests below take
    with long_stream(server, tokens) as lines:
        server.terminate()
        while (health := server.http.get("/health")).status_code == 200:
            pass
        refused = post(server)
        rest = [line.removeprefix("data: ") for line in lines if line]
    assert (health.status_code, health.json()["status"]) == (503, "draining")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert rest.pop() == "[DONE]"
    assert len(rest) == tokens - 1
    assert json.loads(rest[-1])["choices"][0]["finish_reason"] == "length"
    assert server.end() == (0, "")
