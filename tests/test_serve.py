"""The server, spoken to by OpenAI's own client and by httpx, and by clients that leave, stall or lie."""

import asyncio
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading

import httpx
import openai
import pytest

from refimpl import serve
from refimpl.errors import ResourceError
from refimpl.generate import Sampling, Session
from refimpl.loading import hub
from refimpl.server.answering import Telling
from refimpl.server.app import make_app
from refimpl.server.asked import ChatRequest, Wrong, parse
from refimpl.server.engine import Busy, End, Engine, Token, Turn
from refimpl.server.guard import Limits
from refimpl.server.room import Room
from refimpl.talk.conversation import Conversation
from refimpl.text.tokenizer import Tokenizer
from tests.serving import make, served, settles

QUESTION = [{"role": "user", "content": "What is 123 + 456?"}]
# So long that a busy machine keeps them, and so short that a test waits for them.
HASTY = Limits(body_bytes=100_000, body_seconds=2, reader_seconds=2)


@pytest.fixture(scope="module")
def running():
    with served(limits=HASTY, header_seconds=2) as found:
        yield found


@pytest.fixture
def client(running):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{running[0]}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture
def http(running):
    with httpx.Client(base_url=f"http://127.0.0.1:{running[0]}", timeout=30) as found:
        yield found


def direct(question: str) -> Conversation:
    """A conversation without a server, after its greedy answer."""
    server = make()
    try:
        s = server.served
        chat = Conversation(
            Session(server.engine.model, server.engine.banned), s.tokenizer, s.template, Sampling(), None
        )
        for _ in chat.ask(question):
            pass
        return chat
    finally:
        server.engine.close()


# --- the protocol -------------------------------------------------------------------------------------------


def test_an_answer_is_the_direct_one(client):
    answer = client.chat.completions.create(model="gpt-5", messages=QUESTION, temperature=0)
    last = direct(QUESTION[0]["content"]).last
    choice = answer.choices[0]
    assert choice.message.content == last.text == "579"
    assert choice.message.reasoning_content == last.reasoning
    assert (choice.finish_reason, answer.model) == ("stop", "refimpl-tiny")
    assert answer.usage.completion_tokens == len(last.token_ids)
    assert 0 < answer.usage.completion_tokens_details.reasoning_tokens < len(last.token_ids)


def test_a_stream_says_the_same_piece_by_piece(client):
    whole = client.chat.completions.create(model="m", messages=QUESTION, temperature=0)
    said, thought, ends, usage, pieces = "", "", [], None, 0
    stream = client.chat.completions.create(
        model="m", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            said += choice.delta.content or ""
            thought += getattr(choice.delta, "reasoning_content", None) or ""
            ends += [choice.finish_reason] * bool(choice.finish_reason)
            pieces += 1
    assert said.strip() == whole.choices[0].message.content
    assert thought.strip() == whole.choices[0].message.reasoning_content
    assert ends == ["stop"] and pieces > 10
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_the_last_event_is_done(http):
    asked = {"messages": QUESTION, "stream": True, "max_tokens": 2}
    lines = [x for x in http.post("/v1/chat/completions", json=asked).text.split("\n\n") if x]
    assert lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(x[6:]) for x in lines[:-1])


def test_the_next_turn_goes_on_with_the_cache(client):
    # Reasoning is left out of the history, so what is kept ends where it began.
    asked = [{"role": "developer", "content": "Be brief."}, *QUESTION]
    first = client.chat.completions.create(model="m", messages=asked, temperature=0)
    message = first.choices[0].message.model_dump()
    again = client.chat.completions.create(
        model="m", messages=[*asked, message, {"role": "user", "content": "What is 1 + 1?"}], temperature=0
    )
    assert again.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 3


def test_stop_seed_and_length(client):
    def said(**given):
        return client.chat.completions.create(model="m", messages=QUESTION, **given).choices[0]

    assert said(temperature=0, stop=["9"]).message.content == "57"
    cut = said(temperature=0, max_tokens=3)
    assert cut.finish_reason == "length" and cut.message.content == ""
    assert said(temperature=0, max_completion_tokens=3).message == cut.message
    one, two = (said(temperature=2, seed=5, max_tokens=20).message for _ in range(2))
    assert one == two
    others = {
        client.completions.create(model="m", prompt="a", temperature=2, seed=n, max_tokens=20).choices[0].text
        for n in range(6)
    }
    assert len(others) > 1


def test_logprobs_are_the_models(client):
    answer = client.chat.completions.create(
        model="m", messages=QUESTION, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    for entry in answer.choices[0].logprobs.content:
        tops = [t.logprob for t in entry.top_logprobs]
        assert len(tops) == 3 and tops == sorted(tops, reverse=True)
        assert entry.logprob == tops[0] <= 0
        assert bytes(entry.bytes).decode() == entry.token
    server = make()
    try:
        import numpy as np

        prompt = server.served.turn(
            parse(ChatRequest, json.dumps({"messages": QUESTION}).encode()), ""
        ).prompt
        logits = server.engine.model.logits(prompt)[-1].astype(np.float64)
    finally:
        server.engine.close()
    logits[server.engine.banned] = -np.inf
    wanted = logits.max() - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert answer.choices[0].logprobs.content[0].logprob == pytest.approx(wanted, abs=1e-3)


def test_experts_are_those_of_the_trace(http):
    asked = {"messages": QUESTION, "temperature": 0, "max_tokens": 3, "experts": True}
    choice = http.post("/v1/chat/completions", json=asked).json()["choices"][0]
    assert len(choice["experts"]) == 2  # the last token goes nowhere
    server = make()
    try:
        turn = server.served.turn(parse(ChatRequest, json.dumps(asked).encode()), "")
        ids = [t.id for t in _tokens(server.engine, turn)]
        from refimpl.tracing import trace

        steps = [s for s in trace(server.engine.model, turn.prompt + ids[:1], decode=0) if s.name == "route"]
        layers = sorted(server.engine.routes.layers)
    finally:
        server.engine.close()
    wanted = {str(i): [int(e) for e in s.output[0][-1]] for i, s in zip(layers, steps)}
    assert choice["experts"][0] == wanted


def _tokens(engine: Engine, turn: Turn) -> list[Token]:
    found, over = [], threading.Event()

    def emit(what):
        over.set() if isinstance(what, End) else found.append(what)

    engine.submit(turn, emit)
    assert over.wait(30)
    return found


def test_plain_completions(client):
    answer = client.completions.create(model="m", prompt="What is", max_tokens=4, temperature=0, logprobs=2)
    choice = answer.choices[0]
    assert choice.finish_reason == "length" and answer.usage.completion_tokens == 4
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset[0] == 0 and len(choice.logprobs.top_logprobs[0]) == 2
    ids = client.completions.create(model="m", prompt=[0, 5, 6], max_tokens=2, temperature=0)
    assert ids.usage.prompt_tokens == 3
    said = "".join(
        c.choices[0].text
        for c in client.completions.create(
            model="m", prompt="What is", max_tokens=4, temperature=0, stream=True
        )
    )
    assert said == choice.text


def test_models_health_and_metrics(client, http):
    assert [m.id for m in client.models.list()] == ["refimpl-tiny"]
    assert client.models.retrieve("refimpl-tiny").owned_by == "refimpl"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    assert http.get("/health").json() == {"status": "ok"}
    client.completions.create(model="m", prompt="What is", max_tokens=2)
    text = http.get("/metrics").text
    assert re.search(r"^refimpl_generated_tokens_total [1-9]", text, re.M)
    assert "refimpl_active_turns 0.0" in text


def test_text_parts_and_neutral_fields_are_taken(http):
    message = {"role": "user", "content": [{"type": "text", "text": "Hi"}], "tool_calls": None, "name": None}
    asked = {"messages": [message], "n": 1, "tools": [], "response_format": {"type": "text"}, "user": "u"}
    asked |= {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": None, "max_tokens": 1}
    assert http.post("/v1/chat/completions", json=asked).status_code == 200


def _examples() -> list[str]:
    """The openai package's own examples of chat, from its README: all but those of other firms' clouds."""
    text = importlib.metadata.metadata("openai").get_payload()
    blocks = re.findall(r"^```py(?:thon)?\n(.*?)^```", text, re.M | re.S)
    return [b for b in blocks if "chat.completions" in b and not re.search("workload_id|Azure|Bedrock", b)]


@pytest.mark.parametrize("example", _examples(), ids=lambda b: b.strip().splitlines()[-1].strip())
def test_the_openai_package_s_own_examples_run_unchanged(running, example):
    if "DefaultAioHttpClient" in example:
        pytest.importorskip("aiohttp", reason="the example is about it")
    # Some go on with the client of an example above them, and one awaits outside a function.
    before = "import asyncio, openai\nclient = openai.OpenAI()\n"
    if waits := re.search(r"^ {4}\w+ = await", example, re.M) and "asyncio.run" not in example:
        before = "import asyncio, openai\nclient = openai.AsyncOpenAI()\nasync def main():\n"
        example = textwrap.indent(example, "    ") + "    print(completion)\nasyncio.run(main())\n"
    given = {"OPENAI_BASE_URL": f"http://127.0.0.1:{running[0]}/v1", "OPENAI_API_KEY": "none"}
    # A process of its own: most examples leave their client open.
    done = subprocess.run(
        [sys.executable, "-c", before + example], env=os.environ | given, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not (waits or "print" in example) or done.stdout.strip()


def test_the_examples_are_found():
    assert len(_examples()) >= 5


def test_every_answer_has_a_number_of_its_own(client):
    one, two = (client.models.list() for _ in range(2))
    with pytest.raises(openai.NotFoundError) as refused:
        client.responses.create(model="m", input="Hi")  # the other protocol of OpenAI is not there
    assert len({one._request_id, two._request_id, refused.value.request_id} - {None}) == 3


# --- refusals -----------------------------------------------------------------------------------------------

WRONG = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    ({"messages": QUESTION, "n": 2}, "n"),
    ({"messages": QUESTION, "n": True}, "n"),
    ({"messages": QUESTION, "tools": [{"type": "function"}]}, "tools"),
    ({"messages": QUESTION, "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": QUESTION, "frequency_penalty": 1}, "frequency_penalty"),
    ({"messages": QUESTION, "store": 0.0}, "store"),
    ({"messages": QUESTION, "logit_bias": {"1": 5}}, "logit_bias"),
    ({"messages": QUESTION, "temperatur": 1}, "temperatur"),
    ({"messages": QUESTION, "temperature": 3}, "temperature"),
    ({"messages": QUESTION, "temperature": "1"}, "temperature"),
    ({"messages": QUESTION, "top_p": 0}, "top_p"),
    ({"messages": QUESTION, "max_tokens": 0}, "max_tokens"),
    ({"messages": QUESTION, "max_tokens": 10**9}, "max_tokens"),
    ({"messages": QUESTION, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    ({"messages": QUESTION, "top_logprobs": 2}, "top_logprobs"),
    ({"messages": QUESTION, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"messages": QUESTION, "stop": [""]}, "stop"),
    ({"messages": QUESTION, "stop": ["a"] * 5}, "stop"),
    ({"messages": QUESTION, "stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": QUESTION, "chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
    ({"messages": QUESTION, "chat_template_kwargs": {"bos_token": 1}}, "chat_template_kwargs"),
    ({"messages": [{"role": "user", "content": "7 " * 6000}]}, "messages"),
]


@pytest.mark.parametrize("asked,param", WRONG, ids=lambda v: str(v)[:40])
def test_what_is_wrong_is_said_in_one_object(http, asked, param):
    response = http.post("/v1/chat/completions", json=asked)
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b'{"a":NaN}',
        b"\xff",
        b'{"\\ud800":1}',
        b"[" * 5000,
        b'{"messages":' + b"9" * 5000 + b"}",
        b'{"messages":null}',
        b'{"prompt":"a","temperature":0,"temperature":1}',
        b'{"prompt":"a","metadata":{"a":1,"a":1}}',
    ],
)
def test_what_is_no_request_is_refused(http, body):
    response = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_other_refusals_of_http(http):
    for response, status in [
        (http.get("/docs"), 404),
        (http.get("/openapi.json"), 404),
        (http.get("/v1/chat/completions"), 405),
        (http.post("/v1/completions/", json={"prompt": "a"}), 404),
        (http.get("/page/..%2f..%2f..%2fetc/passwd"), 404),
        (http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}), 415),
        (http.post("/v1/completions", json={"prompt": "a" * 200_000}), 413),
        (http.get("/health", headers={"host": "evil.example"}), 403),
    ]:
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_a_field_of_the_other_endpoint_may_be_null(http):
    asked = {"prompt": "What", "messages": None, "max_tokens": 1}
    assert http.post("/v1/completions", json=asked).status_code == 200


CHUNKED = "POST {} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {}\r\ntransfer-encoding: chunked\r\n\r\n"


def test_a_body_without_an_end_is_told_too_large_as_soon_as_it_is(running):
    with socket.create_connection(("127.0.0.1", running[0]), 20) as client:
        head = CHUNKED.format("/v1/completions", "application/json").encode()
        client.sendall(head + b"30d40\r\n" + b" " * 200_000 + b"\r\n")
        assert b" 413 " in _rest(client)


@pytest.mark.parametrize(
    "path,kind", [("/nowhere", "application/json"), ("/v1/completions", "text/plain"), ("/", "")]
)
def test_what_is_no_http_behind_a_refused_head_leaves_no_traceback(running, caplog, path, kind):
    with socket.create_connection(("127.0.0.1", running[0]), 20) as client:
        client.sendall(CHUNKED.format(path, kind).encode() + b"nonsense\r\n")
        assert b'"error"' in _rest(client)
    assert settles(lambda: not running[1].engine.active) and not caplog.records


def test_a_body_without_a_length_is_bounded(http):
    response = http.post(
        "/v1/completions",
        content=(b" " * 10_000 for _ in range(50)),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 413


def _asgi(app, **given):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", **given)


def test_keys_and_origins():
    server = make()
    try:

        async def ask() -> None:
            app = make_app(server, ("one", "two"), cors=("https://mine.example",))
            async with _asgi(app) as c:
                for header in ({}, {"authorization": "Bearer three"}, {"authorization": "Basic one"}):
                    response = await c.get("/v1/models", headers=header)
                    assert response.status_code == 401
                    assert response.json()["error"]["type"] == "authentication_error"
                assert (await c.get("/metrics")).status_code == 401
                assert (await c.get("/health")).status_code == (await c.get("/")).status_code == 200
                good = {"authorization": "Bearer two", "origin": "https://mine.example"}
                response = await c.get("/v1/models", headers=good)
                assert response.headers["access-control-allow-origin"] == "https://mine.example"
                response = await c.get("/v1/models", headers=good | {"origin": "https://other.example"})
                assert "access-control-allow-origin" not in response.headers
            async with _asgi(make_app(server)) as c:
                response = await c.get("/v1/models", headers={"origin": "https://other.example"})
                assert "access-control-allow-origin" not in response.headers

        asyncio.run(ask())
    finally:
        server.engine.close()


def test_prefixes_are_shared_within_a_key_and_not_beyond():
    with served(keys=("one", "two")) as (port, _):

        def cached(key: str, **given) -> int:
            asked = {"messages": QUESTION, "max_tokens": 2, **given}
            response = httpx.post(
                f"http://127.0.0.1:{port}/v1/chat/completions",
                json=asked,
                headers={"authorization": f"Bearer {key}"},
                timeout=30,
            )
            return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert cached("one") == 0
        assert cached("two") == 0  # or one could ask what another has asked
        assert cached("one") > 5
        assert cached("one", prompt_cache_key="a") == 0


def _as_key(port: int, key: str, number: int) -> dict:
    """A sampled answer with its probabilities; all questions begin alike."""
    asked = {
        "messages": [{"role": "system", "content": "Be brief. " * 9}],
        "seed": number,
        "temperature": 1.3,
    }
    asked["messages"].append({"role": "user", "content": f"{key} asks: what is {number} + 456?"})
    asked |= {"logprobs": True, "top_logprobs": 5, "max_tokens": 30}
    response = httpx.post(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json=asked,
        headers={"authorization": f"Bearer {key}"},
        timeout=60,
    )
    found = response.json()
    return {"choices": found["choices"], "usage": found["usage"]}


def test_a_key_s_answers_are_to_the_bit_those_of_a_server_of_its_own():
    with served(keys=("one",)) as (port, _):
        alone = [_as_key(port, "one", n) for n in range(8)]
    with served(keys=("one", "two", "six")) as (port, _):
        _as_key(port, "two", 0)  # a cache with the same beginning is there before the first of "one"
        over = threading.Event()

        def others(key: str) -> None:
            for n in itertools.count():
                if over.is_set():
                    return
                _as_key(port, key, n)

        threads = [threading.Thread(target=others, args=(key,)) for key in ("two", "six")]
        for thread in threads:
            thread.start()
        try:
            among = [_as_key(port, "one", n) for n in range(8)]
        finally:
            over.set()
            for thread in threads:
                thread.join()
    assert among == alone
    assert all(a["usage"]["prompt_tokens_details"]["cached_tokens"] > 20 for a in alone[1:])


# --- clients that misbehave ---------------------------------------------------------------------------------


def _raw(port: int, body: bytes, length: int | None = None) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), 20)
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    client.sendall(head.encode() + b"content-length: %d\r\n\r\n" % (length or len(body)) + body)
    return client


def _rest(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(4096), b""))


@pytest.fixture
def endless(running, monkeypatch):
    """The model never ends by itself."""
    monkeypatch.setattr(running[1].served.tokenizer, "stop_ids", frozenset())


def _long(**given) -> bytes:
    """A request whose answer has hundreds of tokens."""
    asked = {"messages": QUESTION, "temperature": 2, "seed": 3, "max_tokens": 2000, "stream": True, **given}
    return json.dumps(asked).encode()


def test_a_half_sent_body_and_a_half_sent_header_are_given_up(running, http):
    port, _ = running
    with _raw(port, b'{"messages"', 100) as client:
        answer = _rest(client)
        assert b" 408 " in answer and b"did not come within" in answer
    with socket.create_connection(("127.0.0.1", port), 20) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: loc")
        assert client.recv(4096) == b""
    with socket.create_connection(("127.0.0.1", port), 20) as client:
        client.sendall(b"nonsense\r\n\r\n")
        assert b'"error"' in _rest(client)
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(running, stream, endless):
    port, server = running
    before = server.engine.tokens
    with _raw(port, _long(stream=stream)):
        assert settles(lambda: server.engine.active)
    assert settles(lambda: not server.engine.active, 20)
    assert server.engine.tokens - before < 1000  # of 2000


def test_a_reader_that_stalls_holds_nobody_up(running, client, monkeypatch):
    port, server = running
    with socket.socket() as stalled:
        monkeypatch.setattr(server.served.tokenizer, "stop_ids", frozenset())
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(("127.0.0.1", port))
        body = _long(logprobs=True, top_logprobs=20, max_tokens=800)
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        stalled.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert settles(lambda: server.engine.active)
        monkeypatch.undo()
        answer = client.chat.completions.create(model="m", messages=QUESTION, temperature=0)
        assert answer.choices[0].message.content == "579"
        assert settles(lambda: not server.engine.active, 20)


def test_the_process_can_be_killed_and_started_again():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "refimpl.serve", "--port", str(port), "--cpu_infer", "1"]

    def start() -> subprocess.Popen:
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert "at http://127.0.0.1" in child.stderr.readline()
        return child

    child = start()
    try:
        with httpx.Client(timeout=30) as c, pytest.raises(httpx.HTTPError):
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            headers = {"content-type": "application/json"}
            with c.stream("POST", url, content=_long(), headers=headers) as stream:
                for n, _ in enumerate(stream.iter_lines()):
                    if n == 5:
                        os.kill(child.pid, signal.SIGKILL)
        child.wait(10)
        child.stderr.close()
        child = start()
        assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=30).status_code == 200
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) in (0, -signal.SIGTERM)
        assert child.stderr.read() == ""
    finally:
        child.kill()
        child.wait()
        child.stderr.close()


# --- the engine ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    server = make()
    server.engine.close()
    return server.engine.model, server.engine.banned


def _turn(prompt=(0, 5, 6), n=5, scope="", **given) -> Turn:
    return Turn(list(prompt), Sampling(), n, scope=scope, **given)


class Listener:
    """What the engine says of several turns, in order."""

    def __init__(self):
        self.said, self.over = [], threading.Semaphore(0)

    def of(self, name):
        def emit(what):
            self.said.append((name, what))
            if isinstance(what, End):
                self.over.release()

        return emit

    def wait(self, n):
        for _ in range(n):
            assert self.over.acquire(timeout=30)

    def ends(self):
        return {name: what for name, what in self.said if isinstance(what, End)}


class Held(Engine):
    """An engine that begins when it is let go, so that what is submitted before starts together."""

    def __init__(self, *given, **more):
        self.go = threading.Event()
        super().__init__(*given, **more)

    def _loop(self):
        self.go.wait(30)
        super()._loop()


def test_everybody_gets_a_token_in_turn(model):
    engine, heard = Held(*model), Listener()
    for name in range(8):
        engine.submit(_turn((0, 5, 6 + name), 6), heard.of(name))
    engine.go.set()
    heard.wait(8)
    engine.close()
    tokens = [name for name, what in heard.said if isinstance(what, Token)]
    assert tokens == [*range(8)] * 6


def test_answers_side_by_side_are_those_alone(model):
    prompts = [(0, 5 + i, 40 + i, 90 + 3 * i) for i in range(6)]
    engine, heard = Held(*model), Listener()
    for i, prompt in enumerate(prompts):
        engine.submit(_turn(prompt, 12), heard.of(i))
    engine.go.set()
    heard.wait(6)
    engine.close()
    for i, prompt in enumerate(prompts):
        alone = list(Session(*model).generate(prompt, Sampling(), 12))
        assert [w.id for name, w in heard.said if name == i and isinstance(w, Token)] == alone


def test_places_are_bounded_and_the_line_too(model):
    engine, heard = Held(*model, places=2, waiting=3), Listener()
    for name in range(3):
        engine.submit(_turn(), heard.of(name))
    with pytest.raises(Busy) as busy:
        engine.submit(_turn(), heard.of("no"))
    assert busy.value.retry_after >= 1
    most = 0
    step = engine._step

    def counted(job):
        nonlocal most
        most = max(most, len(engine.active))
        step(job)

    engine._step = counted
    engine.go.set()
    heard.wait(3)
    engine.close()
    assert most == 2
    with pytest.raises(Busy):
        engine.submit(_turn(), heard.of("closed"))


def test_caches_stay_within_their_memory(model):
    one = sum(Room(model[0]).need(256).values())
    room = Room(model[0], int(2.5 * one))
    engine, heard = Held(*model, room=room), Listener()
    most = 0
    step = engine._step

    def watched(job):
        nonlocal most
        most = max(most, engine.cache_bytes())
        step(job)

    engine._step = watched
    for name in range(8):
        engine.submit(_turn((0, 5 + name, 6), 30), heard.of(name))
    with pytest.raises(ResourceError, match="E9003"):
        engine.submit(_turn(n=1500), heard.of("no"))
    with pytest.raises(ResourceError, match="E6001"):
        engine.submit(_turn(n=5000), heard.of("no"))
    engine.go.set()
    heard.wait(8)
    engine.close()
    assert 0 < most <= room.limit["cpu"]
    assert all(e.reason == "length" for e in heard.ends().values())


def test_a_failure_ends_one_conversation_alone(model, capsys):
    engine, heard = Held(*model), Listener()
    engine.submit(_turn(n=3), heard.of("good"))
    engine.submit(_turn(prompt=(0, 10**6)), heard.of("bad"))  # no such token: the model raises
    engine.go.set()
    heard.wait(2)
    assert engine.alive
    engine.close()
    ends = heard.ends()
    assert ends["good"].reason == "length" and ends["bad"].reason == "error"
    assert "ValueError" in capsys.readouterr().err


def test_a_cancelled_turn_ends_and_its_cache_is_sound(model):
    engine, heard = Engine(*model), Listener()
    started = threading.Event()
    emit = heard.of("left")

    def first(what):
        emit(what)
        started.set()

    job = engine.submit(_turn(n=1500), first)
    assert started.wait(30)
    engine.cancel(job)
    heard.wait(1)
    assert heard.ends()["left"].reason == "cancelled"
    engine.submit(_turn(n=4), heard.of("next"))
    heard.wait(1)
    engine.close()
    alone = list(Session(*model).generate([0, 5, 6], Sampling(), 4))
    assert [w.id for n, w in heard.said if n == "next" and isinstance(w, Token)] == alone


# --- text ---------------------------------------------------------------------------------------------------


def test_a_stop_text_over_several_tokens_is_cut():
    tokenizer = Tokenizer(hub.embedded())
    ids = tokenizer.encode("one two three four")
    assert len(ids) > 3
    for stop, said in [("two th", "one "), ("four!", "one two three four"), ("one", ""), ("r", "one two th")]:
        telling = Telling(tokenizer, Turn([0], Sampling(), 9), [stop], chat=False)
        deltas = [d for i in ids for d in telling.push(Token(i))] + [*telling.end()]
        assert "".join(d.text for d in deltas) == said
        assert telling.finished == (stop in "one two three four")


def test_the_parser_takes_no_constants_of_javascript():
    for body in (b'{"messages": NaN}', b'{"temperature": Infinity}'):
        with pytest.raises(Wrong, match="no JSON"):
            parse(ChatRequest, body)


# --- the command --------------------------------------------------------------------------------------------


def test_others_are_let_in_with_a_key_only(refused, monkeypatch, tmp_path):
    monkeypatch.delenv("REFIMPL_API_KEY", raising=False)
    refused("E9001", serve.main, "--host", "0.0.0.0", "--port", "0")
    keys = tmp_path / "keys"
    keys.write_text("\n")
    refused("E9005", serve.main, "--api_key_file", keys)
    keys.write_text("one\n\ntwo\n")
    assert serve.read_keys(keys) == ("one", "two")
    with serve.listen("127.0.0.1", 0) as sock:
        refused("E9004", serve.main, "--port", sock.getsockname()[1])


# --- the page -----------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<img src=x onerror='document.title=\"owned\"'><script>document.title='owned'</script>"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_in_chromium(running):
    api = pytest.importorskip("playwright.sync_api")
    port, _ = running
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(bypass_csp=True)  # what the test itself evaluates
        asked, faults = [], []
        page.on("request", lambda r: asked.append(r.url))
        page.on("pageerror", lambda e: faults.append(str(e)))
        page.goto(f"http://127.0.0.1:{port}/")
        page.click("header summary")
        page.fill("#temperature", "0")
        page.fill("#question", QUESTION[0]["content"])
        page.press("#question", "Enter")
        page.wait_for_selector(".assistant[data-done]", timeout=30_000)
        assert page.inner_text(".assistant .text").strip() == "579"
        assert page.get_attribute(".thinking", "open") is None and "579" in page.text_content(".thinking")
        page.click(".assistant .text .token")
        assert page.inner_text("#probability").endswith("%")
        assert page.locator("#runners tr").count() == 5
        assert page.locator("#experts tr").count() == 3
        assert all(url.startswith(f"http://127.0.0.1:{port}/") for url in asked)  # nothing from the network

        choice = {"index": 0, "delta": {"content": HOSTILE}, "logprobs": None}
        event = "data: " + json.dumps({"choices": [choice]}) + "\n\ndata: [DONE]\n\n"
        page.route(
            "**/v1/chat/completions", lambda r: r.fulfill(body=event, content_type="text/event-stream")
        )
        page.fill("#question", HOSTILE)
        page.click("#send")
        page.wait_for_function("document.querySelectorAll('.assistant[data-done]').length === 2")
        assert page.locator(".assistant .text").nth(1).inner_text() == HOSTILE
        assert page.locator("main img, main script").count() == 0
        assert page.title() == "refimpl" and not faults
        browser.close()
