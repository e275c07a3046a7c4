"""Chromium without a window, driven over its DevTools protocol: what a person sees and does, and what the browser asks
for and complains about meanwhile."""

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
_KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35}
_PATIENCE_S = 20


class Page:
    """A tab. requested: every URL that it asked for; complaints: errors of the console and exceptions;
    choosers: nodes of the inputs that would have opened a window to choose files."""

    def __init__(self, address: str):
        self.socket = connect(address, max_size=None)
        self.numbers = itertools.count(1)
        self.requested: list[str] = []
        self.complaints: list[str] = []
        self.choosers: list[int] = []
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command's result; events that come meanwhile are noted."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=_PATIENCE_S))
            if message.get("id") != number:
                self._note(message)
            elif "error" in message:
                raise RuntimeError(f"{method}: {message['error']}")
            else:
                return message["result"]

    def _note(self, message: dict[str, Any]) -> None:
        told = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requested.append(told["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(told["exceptionDetails"]))
            case "Log.entryAdded" if told["entry"]["level"] == "error":
                self.complaints.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
            case "Page.fileChooserOpened":
                self.choosers.append(told["backendNodeId"])
            case "Runtime.consoleAPICalled" if told["type"] in ("error", "assert"):
                self.complaints.append(json.dumps(told["args"]))

    def open(self, url: str) -> None:
        """Go there, and forget what was noted elsewhere."""
        self.send("Page.navigate", url="about:blank")
        self.wait("location.href === 'about:blank'")
        self.requested.clear()
        self.complaints.clear()
        self.send("Page.navigate", url=url)

    def run(self, expression: str) -> Any:
        """The value of some JavaScript, waited for where it is a promise."""
        found = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until some JavaScript is true."""
        end = time.monotonic() + _PATIENCE_S
        while not self._holds(expression):
            if time.monotonic() > end:
                text = self.run("document.body.innerText")
                raise AssertionError(f"never true: {expression}. The page says: {text} {self.complaints}")
            time.sleep(0.02)

    def _holds(self, expression: str) -> bool:
        with contextlib.suppress(RuntimeError):  # of what is not there yet
            return self.run(f"Boolean({expression})")
        return False

    def text(self, selector: str) -> str:
        """What an element says; "" where there is none or it is hidden."""
        shown = "(element) => element?.checkVisibility() ? element.innerText : ''"
        return self.run(f"({shown})(document.querySelector({json.dumps(selector)}))").strip()

    def click(self, selector: str) -> None:
        """Where the middle of an element is, as a mouse does."""
        place = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{place}.scrollIntoView({{block: 'center'}})")
        box = self.run(f"{place}.getBoundingClientRect().toJSON()")
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, **at)

    def press(self, key: str) -> None:
        """A key of the keyboard."""
        text = {"Enter": "\r", " ": " "}.get(key, "")
        named = {"key": key, "code": {" ": "Space"}.get(key, key), "windowsVirtualKeyCode": _KEYS[key]}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **named)
        self.send("Input.dispatchKeyEvent", type="keyUp", **named)

    def write(self, text: str) -> None:
        """As if typed where the focus is."""
        self.send("Input.insertText", text=text)

    def choose_files(self, selector: str, files: list[Path]) -> None:
        """Give files to an input."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def select(self, selector: str, value: str) -> None:
        """An option, as if chosen."""
        self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.value = {json.dumps(value)};"
            " e.dispatchEvent(new Event('input', {bubbles: true}));"
            " e.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )

    def size(self, width: int, height: int, dark: bool = False) -> None:
        """Of the window, and whether the system is dark."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        value = "dark" if dark else "light"
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def picture(self, path: Path, whole: bool = False) -> None:
        """A screenshot as PNG."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A tab of a browser of its own. folder: where its profile may lie."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield Page(_tab(folder / "DevToolsActivePort"))
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _tab(port_file: Path) -> str:
    """Address of the first tab's socket, once the browser is there."""
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError, StopIteration):
            port = int(port_file.read_text().splitlines()[0])
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=5) as answer:
                return next(tab["webSocketDebuggerUrl"] for tab in json.load(answer) if tab["type"] == "page")
        time.sleep(0.05)
    raise AssertionError("the browser did not start")
