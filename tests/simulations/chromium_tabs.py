"""A headless Chromium that tests drive as a person would: tabs, keys, what is on the screen; over DevTools."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--disable-background-timer-throttling", "--disable-renderer-backgrounding",
    "--disable-backgrounding-occluded-windows", "--remote-debugging-port=0",
)  # fmt: skip
_CODES = {" ": "Space", "Backspace": "Backspace", "?": "Slash", "Enter": "Enter"}


def wait_for(
    look: Callable[[], Any], seconds: float = 20, what: str = "it", seen: Callable[[], str] = str
) -> Any:
    """The first truthy answer of `look`; `seen` tells what there was instead."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}; {seen()}"
        time.sleep(0.02)
    return found


class Tab:
    """One tab, over its own connection."""

    def __init__(self, address: str) -> None:
        from websockets.sync.client import connect

        self._open = contextlib.ExitStack()
        self._socket = self._open.enter_context(connect(address, max_size=None, proxy=None))
        self._numbers = itertools.count(1)
        self.failed: list[str] = []
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            told = json.loads(self._socket.recv(timeout=30))
            if told.get("method") == "Runtime.exceptionThrown":
                self.failed.append(json.dumps(told["params"])[:500])
            if told.get("id") == number:
                assert "error" not in told, told["error"]
                return dict(told["result"])

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, address: str) -> None:
        self.call("Page.bringToFront")
        self.call("Page.navigate", url=address)
        wait_for(lambda: self.run("document.readyState") == "complete", what=address)

    def key(self, key: str, held: int = 0) -> None:
        """Press a key, as if held for `held` repeats, and let it go."""
        code = _CODES.get(key) or (f"Key{key.upper()}" if key.isalpha() else f"Digit{key}")
        text = {} if len(key) > 1 else {"text": key}
        for number in range(held + 1):
            self.call(
                "Input.dispatchKeyEvent", type="keyDown", key=key, code=code, autoRepeat=number > 0, **text
            )
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=code)

    def text(self, selector: str) -> str:
        return str(self.run(f"document.querySelector({json.dumps(selector)}).textContent"))

    def seen(self) -> str:
        """What the page shows, and whether its script failed."""
        return f"the page says {self.run('document.body.innerText')!r}; {self.failed}"

    def token(self) -> str:
        """The question that can be answered now; waits until its pictures are on the screen."""
        return str(
            wait_for(
                lambda: self.run("document.body.dataset.token"), what="the next question", seen=self.seen
            )
        )

    def answer(self, key: str, held: int = 0) -> None:
        """Answer with a key, and wait for what follows."""
        before = self.token()
        self.key(key, held)
        look = f"document.body.dataset.phase === 'done' || (document.body.dataset.token || {before!r}) !== {before!r}"
        wait_for(lambda: self.run(look), what="the question after it", seen=self.seen)

    def practise(self) -> None:
        """Go through the practice, right or wrong."""
        while self.run("document.body.dataset.phase") == "practice":
            before = self.token()
            self.key("y")
            wait_for(lambda: self.run("keys.has(' ')"), what="feedback", seen=self.seen)
            self.key(" ")
            wait_for(lambda b=before: self.token() != b, what="the screen after practice", seen=self.seen)

    def picture(self) -> bytes:
        """What is on the screen, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def screen(
        self, width: int, height: int, ratio: float = 1, dark: bool = False, phone: bool = False
    ) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=ratio,
            mobile=phone,
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        if phone:
            features += [{"name": "hover", "value": "none"}, {"name": "pointer", "value": "coarse"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def close(self) -> None:
        self._open.close()


class Chromium:
    """A running browser; :meth:`tab` opens one more tab."""

    def __init__(self, port: int) -> None:
        self._port = port

    def tab(self, address: str) -> Tab:
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}/json/new?about:blank", method="PUT")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as reply:
            tab = Tab(json.load(reply)["webSocketDebuggerUrl"])
        tab.open(address)
        return tab


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Chromium]:
    """A browser of its own profile in `folder`; skips the test where there is none."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    pytest.importorskip(
        "websockets.sync.client", reason="websockets is not installed (it is among the dev extras)"
    )
    command = [binary, *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        told = folder / "DevToolsActivePort"
        wait_for(lambda: told.is_file() and told.read_text().count("\n"), 60, "chromium to start")
        yield Chromium(int(told.read_text().split()[0]))
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
