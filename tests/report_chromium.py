"""A Chromium without a window, driven through its debugging pipe: sizes of screens, keys, printing, its console."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
KEYS = {"Tab": 9, "Enter": 13, "ArrowRight": 39, " ": 32}


def options(profile: Path) -> list[str]:
    """No network but this machine, nothing of the user's."""
    return [
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
        "--allow-pre-commit-input",  # else keys that come before the first paint are dropped
        *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
        *("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={profile}"),
    ]


class Chromium:
    """One page of one browser. `console` holds what it wrote there, errors that nobody caught, and refused loads."""

    def __init__(self, profile: Path):
        ours, theirs = os.pipe(), os.pipe()  # to the browser, from it
        os.set_inheritable(ours[0], True)
        os.set_inheritable(theirs[1], True)
        # The browser reads commands at descriptor 3 and answers at 4.
        shell = f'exec "$0" "$@" 3<&{ours[0]} 4>&{theirs[1]}'
        command = ["bash", "-c", shell, str(BROWSER), *options(profile), "--remote-debugging-pipe", "about:blank"]
        self.process = subprocess.Popen(
            command, pass_fds=(ours[0], theirs[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(ours[0])
        os.close(theirs[1])
        self.to, self.back = ours[1], theirs[0]
        self.left, self.number, self.session = b"", 0, ""
        self.console: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *error: object) -> None:
        self.session = ""
        try:
            self.call("Browser.close")
        except (OSError, RuntimeError):
            self.process.kill()
        self.process.wait(timeout=30)
        os.close(self.to)
        os.close(self.back)

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        until = time.monotonic() + seconds
        while b"\0" not in self.left:
            if not select.select([self.back], [], [], max(0.0, until - time.monotonic()))[0]:
                return None
            data = os.read(self.back, 1 << 20)
            if not data:
                raise RuntimeError("the browser has ended")
            self.left += data
        message, _, self.left = self.left.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        told = found.get("params", {})
        if found.get("method") == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(each.get("value")) for each in told["args"]))
        elif found.get("method") == "Runtime.exceptionThrown":
            self.console.append(told["exceptionDetails"]["text"])
        elif found.get("method") == "Log.entryAdded":
            self.console.append(f"{told['entry']['level']}: {told['entry']['text']}")
        return found

    def call(self, method: str, **given: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": given}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive(60)
            if answer is None:
                raise RuntimeError(f"no answer to {method}")
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def evaluate(self, script: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description"))
        return answer["result"].get("value")

    def wait_for(self, script: str, seconds: float = 30) -> None:
        until = time.monotonic() + seconds
        while not self.evaluate(script):
            if time.monotonic() > until:
                raise AssertionError(f"still not so after {seconds} s: {script}")
            time.sleep(0.1)

    def open(self, address: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """The page, loaded, with all its images; screens below 600 px are those of a phone."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=address)
        self.wait_for(f"location.href.startsWith({json.dumps(address)}) && document.readyState === 'complete'")
        self.evaluate("Promise.all([...document.images].map(image => image.decode().catch(() => {}))).then(() => 1)")

    def press(self, key: str) -> None:
        given: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"Enter": "\r", " ": " "}.get(key)
        self.call(
            "Input.dispatchKeyEvent",
            type="keyDown" if text else "rawKeyDown",
            **given,
            **({"text": text} if text else {}),
        )
        self.call("Input.dispatchKeyEvent", type="keyUp", **given)

    def print(self, path: Path) -> bytes:
        """On A4, with no header or footer."""
        paper = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": True, "preferCSSPageSize": False}
        data = base64.b64decode(self.call("Page.printToPDF", **paper)["data"])
        path.write_bytes(data)
        return data

    def shot(self, path: Path, whole: bool = False) -> Path:
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))
        return path
