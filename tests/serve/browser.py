"""Debian's Chromium, driven by the DevTools protocol over two pipes."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_SECONDS = 60.0
_KEYS = {" ": 32, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Escape": 27, "Tab": 9}


class Tab:
    """One page. complaints: what its console said, and what it failed by. asked: the addresses that it asked for."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.complaints: list[str] = []
        self.asked: list[str] = []
        browser.tabs[session] = self
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **options: Any) -> dict[str, Any]:
        return self._browser.send(method, self._session, **options)

    def heard(self, method: str, given: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.asked.append(given["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(given["exceptionDetails"].get("exception", {}).get("description", str(given)))
        elif method == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(given["args"]))
        elif method == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{given['entry']['text']} {given['entry'].get('url', '')}")

    def look(self, width: int, height: int, *, dark: bool = False, scale: float = 1, still: bool = False) -> None:
        """The window's size, what the person prefers, and whether it is a phone: what is narrow is one."""
        phone = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Emulation.setTouchEmulationEnabled", enabled=phone)
        prefers = {
            "color-scheme": "dark" if dark else "light",
            "reduced-motion": "reduce" if still else "no-preference",
        }
        features = [{"name": f"prefers-{name}", "value": value} for name, value in prefers.items()]
        self.send("Emulation.setEmulatedMedia", features=features)

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.until(f"document.readyState === 'complete' && location.href === {json.dumps(url)}")

    def reload(self) -> None:
        self.run("window.isOld = true")
        self.send("Page.reload")
        self.until("!window.isOld && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """What an expression is, as JSON; a promise is waited for."""
        done = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, script: str, seconds: float = _SECONDS) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < end, f"never true: {script}; {self.complaints}"
            time.sleep(0.03)

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of what is there."""
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, x, y)

    def middle(self, selector: str) -> tuple[float, float]:
        x, y, width, height = self.box(selector)
        return x + width / 2, y + height / 2

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Where an element is in the window, once it was brought there: left, top, width, height."""
        script = f"""(async () => {{ const found = document.querySelector({json.dumps(selector)});
            found.scrollIntoView({{block: 'center', behavior: 'instant'}});
            for (let i = 0; i < 2; i++) await new Promise(requestAnimationFrame);
            const box = found.getBoundingClientRect(); return [box.x, box.y, box.width, box.height]; }})()"""
        left, top, width, height = self.run(script)
        return left, top, width, height

    def mouse(self, kind: str, x: float, y: float) -> None:
        button = {"button": "left", "buttons": 1, "clickCount": 1} if kind != "mouseMoved" else {"buttons": 1}
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def touch(self, points: list[tuple[float, float]]) -> None:
        """A finger along these points."""
        for i, (x, y) in enumerate(points):
            kind = "touchMove" if i else "touchStart"
            self.send("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, *keys: str, modifiers: int = 0) -> None:
        for key in keys:
            code = {"windowsVirtualKeyCode": _KEYS[key], "key": key, "code": "Space" if key == " " else key}
            text = {" ": " ", "Enter": "\r"}.get(key) if not modifiers else None
            self.send(
                "Input.dispatchKeyEvent",
                type="keyDown",
                modifiers=modifiers,
                **code,
                **({"text": text} if text else {}),
            )
            self.send("Input.dispatchKeyEvent", type="keyUp", modifiers=modifiers, **code)

    def write(self, selector: str, text: str) -> None:
        """In the place of what a field holds."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        self.send("Input.insertText", text=text)

    def choose(self, selector: str, path: Path) -> None:
        """A file, for an input of files."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def shot(self, path: Path, **options: Any) -> None:
        data = self.send("Page.captureScreenshot", format="png", **options)["data"]
        path.write_bytes(base64.b64decode(data))


class Browser:
    """The process. tabs: by the numbers of their sessions."""

    def __init__(self, process: subprocess.Popen[bytes], reading: int, writing: int) -> None:
        self._process, self._reading, self._writing = process, reading, writing
        self._last, self._rest, self.tabs = 0, b"", {}

    def send(self, method: str, session: str | None = None, **options: Any) -> dict[str, Any]:
        """The answer to a call; what is heard meanwhile goes to the tabs."""
        self._last += 1
        call = {"id": self._last, "method": method, "params": options, **({"sessionId": session} if session else {})}
        data = json.dumps(call).encode() + b"\0"
        while data:
            data = data[os.write(self._writing, data) :]
        while True:
            said = self._said()
            if said.get("id") == self._last:
                assert "error" not in said, (method, said["error"])
                return dict(said["result"])
            if said.get("sessionId") in self.tabs:
                self.tabs[said["sessionId"]].heard(said.get("method", ""), said.get("params", {}))

    def tab(self) -> Tab:
        """A page with a profile of its own."""
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        return Tab(self, self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])

    def _said(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._reading], [], [], _SECONDS)
            assert ready, "Chromium says nothing"
            data = os.read(self._reading, 1 << 20)
            assert data, f"Chromium ended by {self._process.wait()}"
            self._rest += data
        said, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(said))


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser without a window for the time of the block."""
    (its_reading, writing), (reading, its_writing) = _pipe(), _pipe()

    def inherit() -> None:  # the two numbers that it knows
        os.dup2(its_reading, 3)
        os.dup2(its_writing, 4)

    line = [
        *(
            str(PROGRAM),
            "--headless=new",
            "--remote-debugging-pipe",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
        ),
        *("--no-first-run", "--disable-dev-shm-usage", "--disable-background-networking", f"--user-data-dir={profile}"),
    ]
    process = subprocess.Popen(line, preexec_fn=inherit, pass_fds=(3, 4), stderr=subprocess.DEVNULL)
    os.close(its_reading)
    os.close(its_writing)
    browser = Browser(process, reading, writing)
    try:
        yield browser
        browser.send("Browser.close")
        process.wait(20)
    finally:
        process.kill()
        process.wait()
        os.close(reading)
        os.close(writing)


def _pipe() -> tuple[int, int]:
    """The ends of a pipe for reading and writing, with numbers above those that the browser knows."""
    ends = os.pipe()
    reading, writing = (fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 20) for each in ends)
    for each in ends:
        os.close(each)
    return reading, writing
