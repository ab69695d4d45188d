"""Several requests are answered at the same time: who asks for a word does not wait for somebody's page of text."""

import asyncio
import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest


pytest.importorskip("fastapi")

from inference_vlm import serve  # noqa: E402
from inference_vlm.answering import Answerer  # noqa: E402
from inference_vlm.serving import app, running  # noqa: E402
from inference_vlm.serving.errors import ApiError  # noqa: E402
from inference_vlm.serving.settings import ServingSettings  # noqa: E402
from inference_vlm.serving.worker import Job, Worker  # noqa: E402
from tests import tiny  # noqa: E402
from tests.serving import ask, said, serving, until  # noqa: E402
from tests.test_at_once import Remembers  # noqa: E402
from tests.test_conversing import talkative  # noqa: E402
from tests.test_serving import stream  # noqa: E402


@pytest.fixture
def answerer(folders):
    model, processor = tiny.compose(*folders("siglip-llama"), "patch")
    model.generation_config.eos_token_id = None
    return Answerer(talkative(model), processor)


def test_a_short_answer_is_there_while_a_long_one_is_being_written(answerer):
    answerer.model.register_forward_pre_hook(lambda *given: time.sleep(0.01))
    with serving(answerer) as server:
        connection = stream(server, "a long one, please", max_tokens=200)
        long = connection.getresponse()
        assert long.status == 200 and long.readline()
        body = {"model": "tiny", "messages": [said("a short one")], "max_tokens": 3}
        assert ask(f"{server.url}/v1/chat/completions", body)[0] == 200
        assert server.service.worker.inside == 1 and b"[DONE]" not in long.read1()  # it is being written still
        long.close()
        connection.close()
        assert until(lambda: not server.service.worker._running, 2)


def test_many_clients_at_once_get_to_the_byte_what_each_gets_alone(answerer, image):
    """Pictures, seeds, stop strings, and turns whose cache is kept."""
    words = "what cat red circle picture left User colour square blue objects large".split()

    def talk(url, number):
        first = f"{words[number]} and a {words[-number]}"  # so that nobody goes on with what another began
        messages = [said(first, *[image(number)] * (number % 3))]
        body = {"model": "tiny", "max_tokens": 6 + number, "temperature": number % 2 * 1.2, "seed": number}
        body |= {"stop": [["a"], None][number % 2]}
        found = []
        for _ in range(2):
            status, answer = ask(f"{url}/v1/chat/completions", {**body, "messages": messages})
            assert status == 200
            found.append((answer["choices"], answer["usage"]))
            text = answer["choices"][0]["message"]["content"]
            messages = [*messages, said(text or ".", role="assistant"), said("and then?")]
        return found

    with serving(answerer, at_once=1, conversations=20) as server:
        alone = [talk(server.url, number) for number in range(12)]
    assert any(usage["prompt_tokens_details"]["cached_tokens"] for _, (_, usage) in alone)
    with serving(answerer, at_once=4, conversations=20) as server, ThreadPoolExecutor(12) as clients:
        assert answerer.turns.at_once == 4
        assert list(clients.map(lambda number: talk(server.url, number), range(12))) == alone


def test_whoever_asks_much_leaves_a_place_for_others_and_no_more_are_answered_than_have_one():
    async def jobs():
        worker, go, begun = Worker(4), threading.Event(), []
        made = []

        def add(client):
            def work(job):
                begun.append(client)
                go.wait(10)
                job.tell(client)

            made.append(Job(work, client, time.monotonic() + 30))
            worker.add(made[-1], 9, ApiError("full", 503))

        async def settled():
            await asyncio.sleep(0.1)
            return sorted(begun)

        for client in "aaaaaa":
            add(client)
        assert await settled() == ["a"] * 3 and worker.waiting == 3 and worker.inside == 6
        add("b")
        add("c")
        assert await settled() == ["a"] * 3 + ["b"] and worker.inside == 8
        go.set()
        assert [await job.next() for job in made] == [*"aaaaaabc"]
        worker.close()
        assert not worker.is_alive
        return begun

    begun = asyncio.run(jobs())
    assert begun.index("c") in (4, 5)  # before all but one of the first client's others


def test_the_line_is_full_when_all_places_and_it_are_taken():
    async def jobs():
        worker, go = Worker(2), threading.Event()
        try:
            for number in range(5):
                worker.add(Job(lambda job: go.wait(10), str(number), time.monotonic() + 30), 3, ApiError("full", 503))
                await asyncio.sleep(0.05)
            with pytest.raises(ApiError):
                worker.add(Job(lambda job: None, "more", time.monotonic() + 30), 3, ApiError("full", 503))
        finally:
            go.set()
            worker.close()

    asyncio.run(jobs())


def test_a_server_says_where_a_model_writes_one_answer_at_a_time(folders, tmp_path, capsys, monkeypatch):
    model, processor = tiny.compose(*folders("siglip-llama"), "patch")
    layers = model.model.language_model.layers
    layers[1].mlp = Remembers(layers[1].mlp, "attribute")
    monkeypatch.setattr(Answerer, "load", lambda *args, **options: Answerer(model, processor))
    monkeypatch.setattr("inference_vlm.serving.running.server_of", lambda app: Ended())
    serve.serve(str(tmp_path), "127.0.0.1", 0, ServingSettings("tiny"))
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "one at a time" in line and "layers.1.mlp.seen" in line]
    with serving(Answerer(model, processor)) as server:
        assert ask(f"{server.url}/info")[1]["limits"]["at_once"] == 1
        status, answer = ask(
            f"{server.url}/v1/chat/completions", json.dumps({"model": "tiny", "messages": [said("hi")]}).encode()
        )
        assert status == 200 and answer["choices"]


class Ended:
    """A server that was told to end."""

    def run(self, sockets):
        pass


def test_a_place_more_than_there_can_be_threads_is_refused(capsys):
    for many in ("0", "-1", "100000", "x"):
        with pytest.raises(SystemExit) as error:
            serve.main(["x", "--at_once", many])
        assert error.value.code == 2
    assert "--at_once" in capsys.readouterr().err


def test_of_two_servers_that_load_at_the_same_time_for_one_port_the_later_is_told_in_a_line(
    answerer, tmp_path, monkeypatch, capsys
):
    with serve.bound("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        monkeypatch.setattr(Answerer, "load", lambda *args, **options: first.listen() or answerer)
        assert serve.main([str(tmp_path), "--port", str(port)]) == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"error: port {port} of 127.0.0.1 is in use") and err.count("\n") == 1
    assert "answers at" not in out


def clients_of(server, monkeypatch, *said_by):
    """Whose each request is taken for, by what it says of whom it comes from."""
    found, client = [], app._client
    monkeypatch.setattr(app, "_client", lambda request: found.append(client(request)) or found[-1])
    for forwarded in said_by:
        body = {"model": "tiny", "messages": [said("hi")], "max_tokens": 1}
        assert ask(f"{server.url}/v1/chat/completions", body, {"X-Forwarded-For": forwarded})[0] == 200
    return list(dict.fromkeys(found))


def test_nobody_is_taken_for_another_client_on_their_word(answerer, monkeypatch):
    """Or all places were theirs, and what others' conversations left in memory."""
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    with serving(answerer) as server:
        assert clients_of(server, monkeypatch, "8.8.8.8", "127.0.0.9", "me") == ["127.0.0.1"]


def test_a_proxy_that_was_named_tells_clients_apart_and_may_open_as_many_connections_as_they_need(
    answerer, monkeypatch
):
    monkeypatch.setattr(running, "CONNECTIONS", 1)
    with serving(answerer, proxies=("127.0.0.0/30",)) as server:
        assert clients_of(server, monkeypatch, "8.8.8.8", "9.9.9.9, 8.8.4.4") == ["8.8.8.8", "8.8.4.4"]
        several = [stream(server, f"{number}") for number in range(3)]
        assert [one.getresponse().status for one in several] == [200] * 3
        for one in several:
            one.close()
    with pytest.raises(SystemExit):
        serve.main(["x", "--proxies", "nginx"])


def test_what_is_being_answered_ends_with_the_server_and_what_waits_is_told(answerer, caplog):
    answerer.model.register_forward_pre_hook(lambda *given: time.sleep(0.01))
    with serving(answerer, at_once=1) as server:
        connections = [stream(server, "long", max_tokens=200)]
        long = connections[0].getresponse()
        assert long.readline()
        connections += [stream(server, "waits", source=(f"127.0.0.{number}", 0)) for number in (7, 8)]
        assert until(lambda: server.service.worker.waiting == 2)
        started = time.monotonic()
    assert time.monotonic() - started < 3
    assert b'"finish_reason": "length"' in (rest := long.read()) and rest.endswith(b"data: [DONE]\n\n")
    for connection in connections[1:]:
        response = connection.getresponse()
        assert response.status == 503 and json.load(response)["error"]["message"] == "the server is being stopped."
    for connection in connections:
        connection.close()
    assert "Traceback" not in caplog.text


def test_the_head_of_what_tells_something_can_be_asked_for_and_other_methods_are_named(answerer):
    with serving(answerer) as server:
        for path in ("/", "/health", "/info", "/v1/models", "/v1/models/tiny"):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
            connection.request("HEAD", path)
            response = connection.getresponse()
            assert response.status == 200 and response.read() == b""
            connection.request("POST", path)
            response = connection.getresponse()
            assert response.status == 405 and "GET" in response.headers["Allow"] and "error" in json.load(response)
            connection.close()
