"""A real browser in a test: Debian's Chromium, spoken to through a pipe by its own protocol, with nothing in between.

https://chromedevtools.github.io/devtools-protocol
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


PROGRAM = shutil.which("chromium")


class Browser:
    """A browser without a screen, and the page that is looked at."""

    def __init__(self, reads: int, writes: int):
        self.reads, self.writes = reads, writes
        self.held, self.count, self.session = b"", 0, ""
        self.complaints: list[str] = []  # what the page's code complained of, or the policy about it

    def open(self, url: str) -> None:
        """Go to a page, in a tab that knows nothing of those before."""
        self.session, self.complaints = "", []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.send(f"{domain}.enable")
        self.size(1280, 800)
        self.go(url)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command."""
        self.count += 1
        command = {"id": self.count, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.writes, json.dumps(command).encode() + b"\0")
        while (found := self._message()).get("id") != self.count:
            self._note(found)
        assert "error" not in found, f"{method}: {found['error']}"
        return found["result"]

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self.held:
            assert select.select([self.reads], [], [], 30)[0], "the browser says nothing"
            self.held += os.read(self.reads, 1 << 20)
        message, _, self.held = self.held.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"])[:500])
        elif event.get("method") == "Log.entryAdded" and params["entry"]["source"] != "network":
            self.complaints.append(params["entry"]["text"])

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 10) -> Any:
        """The value of an expression, once it is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}\n{self.run('document.body?.innerText')}"
            time.sleep(0.02)
        return value

    def go(self, url: str) -> None:
        """Go to a page in the same tab."""
        self.send("Page.navigate", url=url)
        self.until(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def key(self, key: str, code: int, text: str = "", modifiers: int = 0) -> None:
        """Press a key and let go of it."""
        pressed = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **pressed, text=text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def write(self, text: str) -> None:
        """Write where the cursor is."""
        self.send("Input.insertText", text=text)

    def upload(self, selector: str, *files: Path) -> None:
        """Choose files in a field."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def drop(self, *files: Path) -> None:
        """Drag files onto the page."""
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.send("Input.dispatchDragEvent", type=kind, x=200, y=200, data=data)

    def size(self, width: int, height: int) -> None:
        """Be as large as a screen."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def picture(self, file: Path) -> None:
        """Save what is seen."""
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def browsing(home: Path) -> Iterator[Browser]:
    """A browser that has ended when the test has."""
    to_read, to_write = os.pipe(), os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
    options += ["--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={home}", "about:blank"]
    # The browser reads at 3 and writes at 4.
    command = ["bash", "-c", f'exec "$@" 3<&{to_read[0]} 4>&{to_write[1]}', "bash", str(PROGRAM), *options]
    process = subprocess.Popen(command, pass_fds=[to_read[0], to_write[1]], stderr=subprocess.DEVNULL)
    os.close(to_read[0])
    os.close(to_write[1])
    try:
        browser = Browser(to_write[0], to_read[1])
        yield browser
        browser.session = ""
        browser.send("Browser.close")
        process.wait(10)
    finally:
        process.kill()
        process.wait()
        os.close(to_read[1])
        os.close(to_write[0])
