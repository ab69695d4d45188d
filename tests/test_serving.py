"""A served model answers as it does in this process, to OpenAI's own client, to many at once, turn after turn."""

import asyncio
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest


pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

from inference_vlm.answering import Answerer  # noqa: E402
from inference_vlm.serve import main  # noqa: E402
from inference_vlm.serving import app  # noqa: E402
from inference_vlm.serving.errors import ApiError  # noqa: E402
from inference_vlm.serving.settings import ServingSettings  # noqa: E402
from inference_vlm.serving.worker import Job, Worker  # noqa: E402
from tests import tiny  # noqa: E402
from tests.serving import ask, said, serving, until  # noqa: E402


@pytest.fixture(scope="module")
def answerer(folders):
    return Answerer(*tiny.compose(*folders("siglip-llama"), "patch"))


@pytest.fixture(scope="module")
def server(answerer):
    examples = [{"question": "which colour?", "expected": "red"}]
    with serving(answerer, examples, max_new_tokens=40) as server:
        yield server


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=30)


def parts(text, *images):
    return {"role": "user", "content": [*({"type": "image", "image": image} for image in images), text_part(text)]}


def text_part(text):
    return {"type": "text", "text": text}


def written(answerer, messages, stop=(), **settings):
    """What the model says without a server."""
    prepared = answerer.read(messages)
    pieces = []
    finish = answerer.write(prepared, answerer.settings(**settings), stop=stop, tell=pieces.append)
    return "".join(pieces), finish


def test_the_official_client_gets_what_the_model_says(answerer, client, image):
    text, finish = written(answerer, [parts("what is it?", image(1), image(2))], max_new_tokens=12, temperature=0)
    answer = client.chat.completions.create(
        model="tiny", messages=[said("what is it?", image(1), image(2))], max_tokens=12, temperature=0
    )
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (text, "assistant", finish.reason)
    assert text and answer.model == "tiny" and answer.object == "chat.completion"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (finish.prompt_tokens, finish.completion_tokens)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.image_tokens == finish.image_tokens == 32


def test_a_stream_gives_the_same_answer_in_pieces_and_its_usage(answerer, client, image):
    text, finish = written(answerer, [parts("what is it?", image(1))], max_new_tokens=12, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=[said("what is it?", image(1))], max_completion_tokens=12, temperature=0,
            stream=True, stream_options={"include_usage": True},
        )
    )  # fmt: skip
    *pieces, last, usage = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content for piece in pieces) == text and len(pieces) > 3
    assert last.choices[0].finish_reason == finish.reason == "length"
    assert not usage.choices and usage.usage.completion_tokens == 12
    assert usage.usage.prompt_tokens_details.image_tokens == 16
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_that_option_has_no_chunk_without_a_choice(client):
    stream = client.chat.completions.create(model="tiny", messages=[said("hi")], max_tokens=3, stream=True)
    assert all(chunk.choices and chunk.usage is None for chunk in stream)


def test_an_asynchronous_client_streams_too(server):
    async def talk():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            stream = await client.chat.completions.create(
                model="tiny", messages=[said("hi")], max_tokens=5, stream=True, temperature=0
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(talk())


def test_a_stop_string_ends_the_answer_before_it(answerer, client):
    text, _ = written(answerer, [parts("hello")], max_new_tokens=20, temperature=0)
    middle = text[len(text) // 2 :][:2]
    answer = client.chat.completions.create(
        model="tiny", messages=[said("hello")], max_tokens=20, temperature=0, stop=[middle, "never"]
    )
    assert answer.choices[0].message.content == text[: text.index(middle)].rstrip()
    assert answer.choices[0].finish_reason == "stop"


def test_a_seed_draws_the_same_answer_again(client):
    def drawn(seed, **settings):
        answer = client.chat.completions.create(
            model="tiny", messages=[said("hello")], max_tokens=20, seed=seed, **{"temperature": 1.5, **settings}
        )
        return answer.choices[0].message.content

    assert drawn(7) == drawn(7)
    assert len({drawn(seed) for seed in range(4)}) > 1
    assert len({drawn(seed, top_p=0.0) for seed in range(3)}) == 1  # the likeliest alone is left


def test_a_second_turn_runs_what_is_new_and_says_what_it_said_without_the_first(answerer, image):
    first = [said("what is it?", image(3))]
    asked = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    with serving(answerer) as server:
        url = f"{server.url}/v1/chat/completions"
        _, one = ask(url, {**asked, "messages": first})
        answer = one["choices"][0]["message"]["content"]
        more = [*first, said(answer, role="assistant"), said("and where?")]
        _, two = ask(url, {**asked, "messages": more})
    with serving(answerer) as server:
        _, alone = ask(f"{server.url}/v1/chat/completions", {**asked, "messages": more})
    cached = [one, two, alone]
    cached = [found["usage"]["prompt_tokens_details"]["cached_tokens"] for found in cached]
    assert cached[0] == cached[2] == 0 and cached[1] >= one["usage"]["prompt_tokens"] - 1
    assert two["choices"][0]["message"] == alone["choices"][0]["message"]


def test_conversations_in_memory_are_bounded_in_number_and_in_bytes(answerer):
    for bounds, most in (({"conversations": 2}, 2), ({"conversations_mb": 0}, 0), ({"conversations": 0}, 0)):
        with serving(answerer, **bounds) as server:
            for text in ("one", "two and more", "quite another three"):
                body = {"model": "tiny", "messages": [said(text * 5)], "max_tokens": 2}
                assert ask(f"{server.url}/v1/chat/completions", body)[0] == 200
            assert len(server.service.completing._kept) == most


def test_a_temperature_may_be_a_whole_number_and_near_nothing(server):
    body = {"model": "tiny", "messages": [said("hi")], "max_tokens": 4, "seed": 3}
    drawn, also = (ask(f"{server.url}/v1/chat/completions", {**body, "temperature": t}) for t in (2, 2.0))
    assert drawn[0] == 200 and drawn[1]["choices"] == also[1]["choices"]
    likeliest, nearly = (ask(f"{server.url}/v1/chat/completions", {**body, "temperature": t}) for t in (0, 1e-300))
    assert nearly[1]["choices"] == likeliest[1]["choices"]


def test_what_many_clients_send_with_every_request_is_taken(server):
    body = {
        "model": "tiny", "messages": [{**said("hi"), "name": None}], "max_tokens": 2, "n": 1, "user": "me",
        "presence_penalty": 0.0, "frequency_penalty": 0, "logprobs": False, "tools": [], "stop": None,
        "response_format": {"type": "text"},
        "logit_bias": {}, "top_p": 1, "seed": None, "stream_options": None,
    }  # fmt: skip
    assert ask(f"{server.url}/v1/chat/completions", body)[0] == 200


def test_an_answer_can_be_given_back_as_the_client_got_it(client):
    first = said("hi")
    answer = client.chat.completions.create(model="tiny", messages=[first], max_tokens=3).choices[0].message
    messages = [first, answer.model_dump(), said("more?")]
    assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=3).choices


REFUSED = {
    "no model": ({"model": None}, 400, "missing_required_parameter", "model"),
    "another model": ({"model": "gpt-4o"}, 404, "model_not_found", "model"),
    "a path as a model": ({"model": "/etc"}, 404, "model_not_found", "model"),
    "no messages": ({"messages": []}, 400, "invalid_type", "messages"),
    "a message that is none": ({"messages": ["hi"]}, 400, "invalid_type", "messages[0]"),
    "another role": ({"messages": [{"role": "tool", "content": "a"}]}, 400, "invalid_value", "messages[0].role"),
    "no content": ({"messages": [{"role": "user"}]}, 400, "invalid_type", "messages[0].content"),
    "a part of another kind": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        400, "invalid_value", "messages[0].content[0].type",
    ),
    "an image of the assistant's": (
        {"messages": [{"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
        400, "invalid_value", "messages[0].content[0].type",
    ),
    "two answers": ({"n": 2}, 400, "unsupported_parameter", "n"),
    "true for one": ({"n": True}, 400, "unsupported_parameter", "n"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "unsupported_parameter", "tools"),
    "logprobs": ({"logprobs": True}, 400, "unsupported_parameter", "logprobs"),
    "json": ({"response_format": {"type": "json_object"}}, 400, "unsupported_parameter", "response_format"),
    "a penalty": ({"presence_penalty": 0.5}, 400, "unsupported_parameter", "presence_penalty"),
    "a bias": ({"logit_bias": {"5": 1}}, 400, "unsupported_parameter", "logit_bias"),
    "what nobody knows": ({"colour": 1}, 400, "unknown_parameter", None),
    "too hot": ({"temperature": 3}, 400, "invalid_value", "temperature"),
    "words for numbers": ({"temperature": "warm"}, 400, "invalid_type", "temperature"),
    "half a token": ({"max_tokens": 1.5}, 400, "invalid_type", "max_tokens"),
    "no token": ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    "more tokens than allowed": ({"max_tokens": 41}, 400, "invalid_value", "max_tokens"),
    "two lengths": ({"max_tokens": 2, "max_completion_tokens": 3}, 400, None, "max_completion_tokens"),
    "an empty stop": ({"stop": ["a", ""]}, 400, "invalid_type", "stop"),
    "many stops": ({"stop": list(map(str, range(17)))}, 400, "invalid_value", "stop"),
    "options of no stream": ({"stream_options": {"include_usage": True}}, 400, None, "stream_options"),
    "a stream that is a word": ({"stream": "yes"}, 400, "invalid_type", "stream"),
    "half a character": ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, None, "messages[0].content"),
    "a prompt beyond the context": (
        {"messages": [{"role": "user", "content": "a red circle " * 300}]}, 400, "context_length_exceeded", "messages"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_done_is_refused_by_its_name(server, kind):
    change, status, code, param = REFUSED[kind]
    body = {"model": "tiny", "messages": [said("hi")], **change}
    for stream in (False, True) if "stream" not in change and "stream_options" not in change else (None,):
        found, answer = ask(f"{server.url}/v1/chat/completions", {**body, "stream": stream} if stream else body)
        error = answer["error"]
        assert (found, error["code"], error["param"]) == (status, code, param), error
        assert error.keys() == {"message", "type", "param", "code"} and "\n" not in error["message"]


def test_a_prompt_beyond_the_context_is_counted(server, answerer, image):
    messages = [{"role": "user", "content": "a red circle " * 300}]
    _, answer = ask(f"{server.url}/v1/chat/completions", {"model": "tiny", "messages": messages})
    message = answer["error"]["message"]
    assert "has 256" in message and "leave out" in message


def test_what_the_chat_template_refuses_is_said(folders, tmp_path):
    """By the code that the model came with, whose errors are classes of its own."""
    model, processor = tiny.compose(*folders("siglip-llama"), "patch")
    processor.chat_template = tiny.GEMMA
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with serving(Answerer.load(str(tmp_path), device="cpu")) as server:
        body = {"model": "tiny", "messages": [said("be kind", role="system"), said("hi")], "max_tokens": 2}
        status, answer = ask(f"{server.url}/v1/chat/completions", body)
    assert status == 400 and "System role not supported" in answer["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"null", b'{"a": NaN}', b"[" * 100_000, b"1" * 5000])
def test_what_is_no_json_object_gets_an_error_object(server, body):
    status, answer = ask(f"{server.url}/v1/chat/completions", body)
    assert status == 400 and answer["error"]["code"] == "invalid_json"


def test_the_official_client_raises_its_own_errors(server, client):
    with pytest.raises(openai.NotFoundError, match="does not exist here"):
        client.chat.completions.create(model="other", messages=[said("hi")])
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(model="tiny", messages=[said("hi")], tools=[{"type": "function"}])
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_the_models_are_the_one_with_its_context(client, answerer):
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.max_model_len == answerer.max_positions == 256
    assert client.models.retrieve("tiny") == model


def test_a_page_learns_what_it_may_send_and_what_to_ask(server, answerer):
    status, info = ask(f"{server.url}/info")
    assert status == 200 and info["model"] == "tiny" and info["positions"] == answerer.max_positions
    assert info["limits"]["max_tokens"] == 40 and info["examples"] == [{"question": "which colour?", "expected": "red"}]
    assert ask(f"{server.url}/health") == (200, {"status": "ok"})


def test_another_path_or_method_gets_an_error_object(server):
    assert ask(f"{server.url}/v1/embeddings", {})[0] == 404
    status, answer = ask(f"{server.url}/v1/chat/completions")
    assert status == 405 and answer["error"]["message"]
    assert ask(f"{server.url}/docs")[0] == ask(f"{server.url}/openapi.json")[0] == 404


def test_transformers_chat_talks_to_it(server):
    command = [sys.executable, "-m", "transformers.cli.transformers", "chat", "tiny", f"{server.url}/v1"]
    ran = subprocess.run(
        [*command, "max_new_tokens=3"], input="hello\nn\n!exit\n", capture_output=True, text=True, timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "0"},  # or the library asks nobody, this machine neither
    )  # fmt: skip
    if "No module named 'requests'" in ran.stderr:  # that of transformers 5.17 imports it
        pytest.skip("requests is not installed")
    assert ran.returncode == 0, ran.stderr
    assert "tiny was already loaded" in ran.stdout and "Generation stopped" in ran.stdout


def test_fifty_clients_at_once_are_all_answered(server, answerer):
    texts = {f"{number} objects": None for number in range(50)}
    answers = {text: written(answerer, [parts(text)], max_new_tokens=4, temperature=0)[0] for text in texts}

    def talk(text):
        body = {"model": "tiny", "messages": [said(text)], "max_tokens": 4, "temperature": 0}
        status, answer = ask(f"{server.url}/v1/chat/completions", body)
        return text, status, answer["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(50) as clients:
        found = list(clients.map(talk, texts))
    assert [status for _, status, _ in found] == [200] * 50
    assert {text: said for text, _, said in found} == answers


class Slow:
    """An answerer that writes until it is told to end, or let go on."""

    def __init__(self, answerer):
        self.answerer, self.go, self.order = answerer, threading.Event(), []

    def __getattr__(self, name):
        return getattr(self.answerer, name)

    def write(self, prepared, settings, *, cancelled, tell, **options):
        self.order.append(prepared.prompt_tokens)
        tell("begun ")
        while not self.go.wait(0.01):
            if cancelled.is_set():
                break
        return self.answerer.write(prepared, settings, cancelled=cancelled, tell=tell, **options)


def stream(server, text, source=None, **options):
    """A connection that has asked for a stream."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20, source_address=source)
    body = {"model": "tiny", "messages": [said(text)], "stream": True, "max_tokens": 5, **options}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    return connection


def test_a_client_that_goes_away_frees_its_place_at_once(answerer):
    slow = Slow(answerer)
    with serving(slow, at_once=1) as server:
        first, second = stream(server, "first"), None
        response = first.getresponse()
        assert response.status == 200 and response.readline()
        second = stream(server, "second", stream=False)
        assert until(lambda: server.service.worker.inside == 2)
        second.close()  # it waits for its turn
        assert until(lambda: server.service.worker.inside == 1)
        response.close()
        first.close()
        assert until(lambda: server.service.worker.inside == 0 and server.service.bodies.held == 0, 2)
        assert until(lambda: not server.service.worker._running, 2)
        slow.go.set()
        body = {"model": "tiny", "messages": [said("third")], "max_tokens": 2}
        assert ask(f"{server.url}/v1/chat/completions", body)[0] == 200
        assert len(slow.order) == 2  # nobody answered the second


def test_who_comes_when_the_line_is_full_is_told_when_to_come_again(answerer):
    slow = Slow(answerer)
    with serving(slow, max_waiting=1, at_once=1) as server:
        waiting = [stream(server, "one")]
        assert waiting[0].getresponse().readline()
        waiting.append(stream(server, "two"))
        assert until(lambda: server.service.worker.inside == 2)
        connection = stream(server, "three")
        response = connection.getresponse()
        error = json.load(response)["error"]
        assert (response.status, error["code"]) == (503, "server_overloaded") and response.headers["Retry-After"]
        slow.go.set()
        assert waiting[1].getresponse().status == 200
        for one in (*waiting, connection):
            one.close()


def test_who_fills_the_line_keeps_nobody_out(answerer):
    """A client is an address; of this machine there are many."""
    slow = Slow(answerer)
    with serving(slow, max_waiting=3, at_once=1) as server:
        first = stream(server, "first")
        assert first.getresponse().readline()
        flood = []
        for number in range(3):
            flood.append(stream(server, f"flood {number}"))
            assert until(lambda: sum(map(len, server.service.worker._line.values())) == len(flood))
        other = stream(server, "other", source=("127.0.0.9", 0))
        responses = [flood[2].getresponse()]
        assert responses[0].status == 503  # its last
        another = stream(server, "flood again")
        assert another.getresponse().status == 503
        slow.go.set()
        responses = [one.getresponse() for one in (other, flood[0], flood[1])]
        assert [response.status for response in responses] == [200] * 3
        for one in (first, *flood, other, another):
            one.close()


def test_clients_take_turns():
    """Whoever asks many things at once waits behind those who ask one."""

    async def jobs():
        worker, go, order = Worker(), threading.Event(), []
        made = []
        for number, client in enumerate(["first", "a", "a", "a", "b", "c", "c"]):

            def work(job, number=number, client=client):
                go.wait(10)
                order.append(client)
                job.tell(number)

            job = Job(work, client, time.monotonic() + 30)
            worker.add(job, 7, ApiError("full", 503))
            made.append(job)
            while number == 0 and worker._line:  # it is being answered
                await asyncio.sleep(0.01)
        go.set()
        assert [await job.next() for job in made] == list(range(7))
        worker.close()
        assert not worker.is_alive
        return order

    assert asyncio.run(jobs()) == ["first", "a", "b", "c", "a", "c", "a"]


def test_a_stream_that_nobody_reads_takes_no_place_and_ends(answerer, monkeypatch):
    monkeypatch.setattr(app, "SEND_SECONDS", 0)
    made = app.create_app(answerer, ServingSettings("tiny", request_seconds=2))
    body = json.dumps({"model": "tiny", "messages": [said("hi")], "stream": True, "max_tokens": 2}).encode()
    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"", "query_string": b"",
        "headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 1), "http_version": "1.1", "scheme": "http",
    }  # fmt: skip

    async def unread():
        service, arrived, sent = made.state.service, [{"type": "http.request", "body": body}], []

        async def receive():
            return arrived.pop() if arrived else await asyncio.Event().wait()

        async def send(message):
            sent.append(message)
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        answer = asyncio.ensure_future(made(scope, receive, send))
        while not sent or service.worker.inside:
            assert not answer.done()
            await asyncio.sleep(0.01)
        assert not answer.done()
        await asyncio.wait_for(answer, 10)
        assert not service.bodies.held and not service.bodies.of
        service.close()

    asyncio.run(unread())


def test_a_request_that_takes_too_long_gets_what_there_is(answerer):
    slow = Slow(answerer)
    with serving(slow, request_seconds=0.5) as server:
        body = {"model": "tiny", "messages": [said("one")], "max_tokens": 5}
        status, answer = ask(f"{server.url}/v1/chat/completions", body)
    (choice,) = answer["choices"]
    assert status == 200 and choice["finish_reason"] == "length" and choice["message"]["content"].startswith("begun")


def test_a_request_whose_turn_does_not_come_is_told_so(answerer):
    slow = Slow(answerer)
    with serving(slow, request_seconds=1, at_once=1) as server:
        first = stream(server, "one")
        assert first.getresponse().readline()
        time.sleep(0.5)  # so that the first ends before the second does
        server.service.settings = server.service.settings.__class__(name="tiny", request_seconds=0.2)
        body = {"model": "tiny", "messages": [said("two")], "max_tokens": 5}
        status, answer = ask(f"{server.url}/v1/chat/completions", body)
        assert status == 503 and "did not get its turn" in answer["error"]["message"]
        first.close()


def test_a_failure_of_one_request_costs_the_others_nothing(answerer, caplog):
    class Failing(Slow):
        def write(self, prepared, settings, *, tell, **options):
            if prepared.prompt_tokens == self.fails_at:
                tell("some")
                raise RuntimeError("out of memory, say")
            return self.answerer.write(prepared, settings, tell=tell, **options)

    failing = Failing(answerer)
    failing.fails_at = answerer.read([parts("one")]).prompt_tokens
    body = {"model": "tiny", "max_tokens": 2, "messages": [said("one")]}
    with serving(failing) as server:
        url = f"{server.url}/v1/chat/completions"
        status, answer = ask(url, body)
        assert status == 500 and answer["error"]["code"] == "server_error" and "memory" not in str(answer)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.APIError, match="had an error"):
            list(client.chat.completions.create(**body, stream=True))
        assert ask(url, {**body, "messages": [said("another")]})[0] == 200
    assert "out of memory, say" in caplog.text


@pytest.fixture(scope="module")
def saved(answerer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "tiny-sft"
    answerer.model.save_pretrained(folder)
    answerer.processor.save_pretrained(folder)
    return folder


def test_a_port_in_use_is_one_line(server, saved, capsys):
    assert main([str(saved), "--port", str(server.port)]) == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"error: port {server.port} of 127.0.0.1 is in use") and err.count("\n") == 1


@pytest.mark.parametrize(
    "options", [["nowhere"], ["."], ["--host", "no.such.host.invalid", "x"], ["--port", "70000", "x"]]
)
def test_what_cannot_be_served_is_one_line(tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    assert main(["--port", "0", "--device", "cpu", *options]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


BAD = ["--max_images -1", "--body_seconds nan", "--api_key ", "--api_key ü", "--port x", "--max_new_tokens 0"]
BAD += ["--allow_origins *", "--allow_origins https://app.example/"]


@pytest.mark.parametrize("options", BAD)
def test_options_that_cannot_be_meant_are_refused(options):
    with pytest.raises(SystemExit) as error:
        main(["x", *options.split(" ")])
    assert error.value.code == 2


def test_the_command_serves_a_folder_until_it_is_told_to_end(saved, image):
    asked = ("which colour?", "which colour?", "where?")
    rows = [{"question": question, "expected": ["red"], "generated": "?"} for question in asked]
    (saved / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "-m", "inference_vlm.serve", str(saved), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen([*command, "--max_new_tokens", "6"], stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("tiny-sft answers at http://127.0.0.1:")
        url = line.split()[3].removesuffix("/v1;")
        assert f"; chat with it at {url}/; " in line
        assert until(lambda: answers(url), 20)
        _, info = ask(f"{url}/info")
        assert [example["question"] for example in info["examples"]] == ["which colour?", "where?"]
        body = {"model": "tiny-sft", "messages": [said("what is it?", image(1))]}
        status, answer = ask(f"{url}/v1/chat/completions", body)
        assert status == 200 and answer["usage"]["completion_tokens"] <= 6
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        process.stdout.close()


def answers(url):
    try:
        return ask(f"{url}/health")[0] == 200
    except OSError:
        return False
