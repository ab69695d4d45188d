"""A URL that data names is fetched in good time, in good size, from the internet at large, and with nothing of ours."""

import gzip
import io
import shutil
import socket
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from processing import image_urls_vlm as urls
from processing.image_files_vlm import NOT_FETCHED, TOO_LARGE, BadImage, ImagePolicy, load_image, resolve_reference
from tests import tiny


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), "red").save(file, "PNG")
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, dict(self.headers)))
        name = self.path.partition("?")[0].rpartition("/")[2].partition(".")[0]
        try:
            getattr(self, f"_{name}", self._gone)()
        except OSError:  # the client has left
            pass

    def _answer(self, status=200, content=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def _gone(self):
        self._answer(404)

    def _image(self):
        self._answer(200, png(), Set_Cookie="a=b")

    def _packed(self):
        self._answer(200, gzip.compress(png()), Content_Encoding="gzip")

    def _bomb(self):
        self._answer(200, gzip.compress(bytes(3_000_000)), Content_Encoding="gzip")

    def _endless(self):
        self._answer(200, Content_Length=str(10**15))
        self._write_on(self.wfile)

    def _moved(self):  # where the part behind the question mark says, with an answer that has no end
        self._answer(302, Location=self.path.partition("?")[2], Set_Cookie="a=b")

    def _moved_endless(self):
        self._answer(302, Location="/image.png")
        self._write_on(self.wfile)

    def _round(self):
        self._answer(302, Location="/round")

    def _headers(self):
        self.wfile.write(b"HTTP/1.0 200 OK\r\n")
        for number in range(100):
            self.wfile.write(b"X-%d: a\r\n" % number)
            time.sleep(0.2)

    def _write_on(self, file, content=bytes(10_000)):
        for _ in range(20_000):
            file.write(content)

    def log_message(self, *args):
        pass


def serve(address, port=0, context=None):
    server = ThreadingHTTPServer((address, port), Handler)
    server.asked = []
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


@pytest.fixture
def server(monkeypatch):
    """A server that stands for one of the internet at large, and its names; at the same port one of this machine."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urls, "FETCH_SECONDS", 1)
    monkeypatch.setattr(urls, "FETCH_BYTES", 1_000_000)
    is_public, lookup = urls._is_public, socket.getaddrinfo
    monkeypatch.setattr(urls, "_is_public", lambda address: address == "127.0.0.1" or is_public(address))
    names = {
        "public.example": ["127.0.0.1"],
        "inner.example": ["127.0.0.2"],
        "both.example": ["127.0.0.1", "127.0.0.2"],
    }

    def found(host, port, *args, **kwargs):
        hosts = names.get(host, host)
        hosts = [hosts] if isinstance(hosts, str) else hosts() if callable(hosts) else hosts
        return [place for one in hosts for place in lookup(one, port, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    server = serve("127.0.0.1")
    inner = serve("127.0.0.2", server.server_port)
    server.names, server.inner = names, inner
    yield server
    for one in (server, inner):
        one.shutdown()
        one.server_close()


def load(url: str, **policy) -> Image.Image:
    return load_image(resolve_reference(url, ImagePolicy(allow_urls=True, **policy)))


def refused(url: str, reason: str = NOT_FETCHED, **policy) -> str:
    started = time.monotonic()
    with pytest.raises(BadImage) as caught:
        load(url, **policy)
    assert time.monotonic() - started < 2.5 and caught.value.reason == reason
    line = str(caught.value)
    assert "\n" not in line and len(line) < 500
    return line


@pytest.mark.parametrize("name", ["image.png", "image.é .png", "packed.png", "moved?/image.png", "moved?image.png"])
def test_an_image_is_fetched(server, name):
    assert load(f"http://public.example:{server.server_port}/{name}").size == (6, 4)


@pytest.mark.parametrize("name", ["headers", "moved?/headers"])
def test_no_server_holds_a_worker_beyond_the_deadline(server, name):
    assert "not there within 1 seconds" in refused(f"http://public.example:{server.server_port}/{name}")


def test_no_resolver_holds_a_worker_beyond_the_deadline(server):
    server.names["slow.example"] = lambda: time.sleep(3) or []
    assert "not there within 1 seconds" in refused("http://slow.example/a.png")


@pytest.mark.parametrize("name", ["bomb", "endless", "moved_endless"])
def test_nothing_unpacks_or_comes_beyond_the_bound(server, name):
    assert "more than 1,000,000 bytes" in refused(f"http://public.example:{server.server_port}/{name}", TOO_LARGE)


LOCAL = ["127.0.0.2", "127.1.1.1", "[::1]", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254"]
LOCAL += ["0.0.0.0", "[::]", "[::ffff:10.0.0.1]", "[::ffff:a9fe:a9fe]", "[fe80::1]", "[fc00::1]", "[64:ff9b::a00:1]"]
LOCAL += ["[2002:a00:1::]", "[::10.0.0.1]", "[fec0::1]", "100.64.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"]
LOCAL += ["2130706434", "0x7f000002", "0177.0.0.2", "127.2", "inner.example", "both.example", "user@127.0.0.2"]


@pytest.mark.parametrize("host", LOCAL)
def test_no_address_of_a_network_of_ones_own_is_asked(server, host):
    for url in (f"{host}:{server.server_port}/image.png", f"{host}/image.png"):
        line = refused(f"http://{url}")
        if "@" not in host:
            assert "no address of the internet at large); fetch the image yourself, or add --allow_local_urls" in line
    assert not server.asked and not server.inner.asked


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::"])
def test_the_internet_at_large_may_be_asked(address):
    assert urls._is_public(address)


@pytest.mark.parametrize("host", ["127.0.0.2", "inner.example", "2130706434"])
def test_no_redirect_leads_into_a_network_of_ones_own(server, host):
    here, there = f"http://public.example:{server.server_port}", f"http://{host}:{server.server_port}/image.png"
    assert "no address of the internet at large" in refused(f"{here}/moved?{there}")
    assert "no address of the internet at large" in refused(f"{here}/moved?/moved?{there}")
    assert not server.inner.asked
    assert load(f"{here}/moved?{there}", allow_local_urls=True).size == (6, 4) and server.inner.asked


@pytest.mark.parametrize("to", ["file:///etc/hostname", "ftp://127.0.0.1/a", "data:,a", "gopher://a/b", "/round"])
def test_no_redirect_leads_to_anything_but_the_web_or_for_ever(server, to):
    assert "could not be fetched" in refused(f"http://public.example:{server.server_port}/moved?{to}")
    assert len(server.asked) < 15


def test_a_name_is_asked_once_and_what_was_found_is_what_is_connected_to(server):
    """A name that answers differently the second time would else lead to an address that nobody looked at."""
    answers = iter(["127.0.0.1", "127.0.0.2"])
    server.names["changing.example"] = lambda: [next(answers)]
    assert load(f"http://changing.example:{server.server_port}/image.png").size == (6, 4)
    assert server.asked and not server.inner.asked and next(answers) == "127.0.0.2"
    assert server.asked[0][1]["Host"] == f"changing.example:{server.server_port}"


def test_nothing_of_ours_is_sent(server, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("default login me password secret\n")
    load(f"http://public.example:{server.server_port}/moved?/image.png")
    assert len(server.asked) == 2
    for _, headers in server.asked:
        assert {name.lower() for name in headers} <= {"host", "user-agent", "accept-encoding", "connection"}
        assert "secret" not in str(headers)


def test_a_proxy_is_used_and_asked_for_nothing_local(server, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.2:{server.server_port}")
    monkeypatch.setenv("https_proxy", f"http://127.0.0.2:{server.server_port}")
    assert load("http://only-the-proxy-knows.invalid/image.png").size == (6, 4)
    assert server.inner.asked[0][0] == "http://only-the-proxy-knows.invalid/image.png"
    for url in ("http://10.0.0.1/image.png", "https://10.0.0.1/image.png", "http://inner.example/image.png"):
        assert "no address of the internet at large" in refused(url)
    assert len(server.inner.asked) == 1
    refused("https://only-the-proxy-knows.invalid/image.png")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_https_is_spoken_to_whom_the_certificate_names(server, monkeypatch, tmp_path):
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=public.example"]
        + ["-addext", "subjectAltName=DNS:public.example", "-keyout", tmp_path / "key", "-out", tmp_path / "cert"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    secure = serve("127.0.0.1", context=context)
    assert "certificate" in refused(f"https://public.example:{secure.server_port}/image.png").lower()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert"))
    urls._tls.cache_clear()
    server.names["other.example"] = ["127.0.0.1"]
    try:
        assert load(f"https://public.example:{secure.server_port}/image.png").size == (6, 4)
        assert "other.example" in refused(f"https://other.example:{secure.server_port}/image.png")
        assert "not there within" in refused(f"https://public.example:{secure.server_port}/headers")
    finally:
        urls._tls.cache_clear()
        secure.shutdown()
        secure.server_close()


def test_the_processor_fetches_by_the_same_rules(server):
    processor = tiny.processor_of("byte-level", "chatml")
    here, there = f"http://public.example:{server.server_port}", f"http://127.0.0.2:{server.server_port}/image.png"

    def ask(url):
        part = {"type": "image", "url": url}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}]
        return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")

    assert len(ask(f"{here}/image.png")["pixel_values"]) == 1
    for url in (there, f"{here}/moved?{there}", f"{here}/endless", f"{here}/bomb", f"{here}/headers"):
        with pytest.raises(ValueError, match=r"more than 1,000,000 bytes|of the internet at large|not there within"):
            ask(url)
    assert not server.inner.asked
    processor.allow_local_urls = True
    assert len(ask(there)["pixel_values"]) == 1
