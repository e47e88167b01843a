"""The report of runs that go on: a page on this machine that is made anew as their traces grow.

The server listens on the loopback address alone and gives out this one page. A request that names another host is
refused: a page of the web whose name was made to point here (DNS rebinding) cannot read it.
"""

from __future__ import annotations

import errno
import hashlib
import html
import http.server
import json
import math
import socketserver
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path
from typing import Any

from hf_pretrain_ext._version import __version__
from hf_pretrain_ext.report.drawing import clean
from hf_pretrain_ext.report.html import Live, labels_of, need_extra, render
from hf_pretrain_ext.report.reading import RunRecord
from hf_pretrain_ext.trace import TRACE_NAME, read_trace
from hf_pretrain_ext.values import is_number, is_whole, shown

__all__ = ["EVERY", "HOST", "PORT", "LivePage", "Server", "watch"]

HOST = "127.0.0.1"
PORT = 8765
EVERY = 5.0
_SHARE = 4
"""Making pages takes at most one part in so many of a processor's time: training has it first."""


@dataclass(frozen=True)
class Made:
    """A page as it is given out. `changed`: when the newest trace was written to, None without one."""

    body: bytes
    tag: str
    policy: str
    changed: float | None


class LivePage:
    """
    The page of some runs, made anew when it is asked for and a trace has changed.

    Args:
        runs (`list` of `str` or `Path`): folders of runs, or their `trace.jsonl`; those that are not there yet are
            waited for.
        labels (`list[str]`, *optional*): what to call the runs; defaults to the names of their folders.
        every (`float`, *optional*, defaults to 5): seconds between two looks of a browser, and between two pages at
            least.

    Raises:
        `ImportError`: jinja2 or matplotlib is missing; they come with the extra `report`.
        `ValueError`: no runs, another number of labels than of runs, or `every` is no positive number.

    Example:

    >>> page = LivePage(["runs/not-begun"])
    >>> b"not begun" in page.get().body, page.get() is page.get()
    (True, True)
    """

    def __init__(self, runs: Sequence[str | Path], labels: Sequence[str] | None = None, every: float = EVERY):
        need_extra()
        if not is_number(every) or not 0 < every < math.inf:
            raise ValueError(f"every must be a positive number of seconds, got {shown(every)}")
        runs = [runs] if isinstance(runs, str | Path) else list(runs)
        self.every = float(every)
        self.runs = [Path(run) for run in runs]
        self.labels = [clean(label) for label in labels_of(self.runs, labels)]
        self._lock = threading.Lock()
        self._made: Made | None = None
        self._not_before = 0.0

    def get(self) -> Made:
        """The newest page; one thread at a time makes it."""
        with self._lock:
            seen = [_state(run) for run in self.runs]
            tag = self._tag(seen)
            if self._made is None or (tag != self._made.tag and time.monotonic() >= self._not_before):
                began = time.thread_time()
                self._made = self._make(tag, [state[0] for state in seen if state])
                took = time.thread_time() - began
                self._not_before = time.monotonic() + max(self.every / 2, (_SHARE - 1) * took)
            return self._made

    def _tag(self, seen: list[tuple[float, int, int] | None]) -> str:
        known = json.dumps([seen, self.labels, self.every, __version__])
        return f'"{hashlib.sha256(known.encode("utf-8", "replace")).hexdigest()[:32]}"'

    def _make(self, tag: str, times: list[float]) -> Made:
        records, notes = [], []
        for run, label in zip(self.runs, self.labels, strict=True):
            events: list[dict[str, Any]] = []
            try:
                events = read_trace(run)
            except FileNotFoundError:
                notes.append(f"{label} has not begun: there is no {TRACE_NAME} in {run} yet. This page waits for it.")
            except (OSError, ValueError) as error:
                notes.append(f"{label} cannot be read: {error}")
            records.append(RunRecord(label, clean(run), events, live=True))
        page, policy = render(records, Live(self.every, tag, clean(" ".join(notes))))
        return Made(page.encode("utf-8"), tag, policy, max(times, default=None))


def _state(run: Path) -> tuple[float, int, int] | None:
    """What changes when a trace does."""
    try:
        found = (run / TRACE_NAME if run.is_dir() else run).stat()
    except OSError:
        return None
    return found.st_mtime, found.st_size, found.st_ino


class Server(http.server.ThreadingHTTPServer):
    """Gives out one page on 127.0.0.1; `port` 0 takes a free one.

    Raises:
        `OSError`: the port is taken, or not this user's to take.
    """

    daemon_threads = True

    def __init__(self, page: LivePage, port: int = PORT):
        self.page = page
        super().__init__((HOST, port), _Handler)

    def server_bind(self) -> None:
        # The class between asks the network for this machine's name.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "hf-pretrain-ext", ""
    timeout = 30

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        port = self.server.server_port
        allowed = {f"{name}:{port}" for name in (HOST, "localhost")} | ({HOST, "localhost"} if port == 80 else set())
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or hosts[0].strip().lower() not in allowed:
            self._refuse(HTTPStatus.FORBIDDEN, f"This page answers to {self.server.address} alone.", with_body)
            return
        if self.path != "/":
            self._refuse(HTTPStatus.NOT_FOUND, f"There is one page here: {self.server.address}", with_body)
            return
        made = self.server.page.get()
        asked = [tag.strip().removeprefix("W/") for tag in self.headers.get("If-None-Match", "").split(",")]
        known = made.tag in asked
        self.send_response(HTTPStatus.NOT_MODIFIED if known else HTTPStatus.OK)
        self.send_header("ETag", made.tag)
        if made.changed is not None:
            self.send_header("Last-Modified", formatdate(made.changed, usegmt=True))
        self.send_header("Cache-Control", "no-cache")
        if not known:
            self._send_rest("text/html", made.policy, made.body, with_body)
        else:
            self.end_headers()

    def _refuse(self, status: HTTPStatus, words: str, with_body: bool) -> None:
        self.send_response(status)
        self._send_rest("text/plain", "default-src 'none'", (html.escape(words) + "\n").encode(), with_body)

    def _send_rest(self, kind: str, policy: str, body: bytes, with_body: bool) -> None:
        for name, value in (
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", f"{policy}; frame-ancestors 'none'"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            try:
                self.wfile.write(body)
            except ConnectionError:
                pass  # the browser has gone

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line a look would bury what the terminal shows."""


def watch(
    runs: Sequence[str | Path],
    labels: Sequence[str] | None = None,
    *,
    port: int = PORT,
    every: float = EVERY,
    tell: Callable[[str], Any] = print,
) -> None:
    """
    Serves the report of runs that go on, until Ctrl-C; the page follows them.

    It is on http://127.0.0.1 alone, for this machine (and for whoever may log in to it). From elsewhere:
    `ssh -L 8765:127.0.0.1:8765 MACHINE`.

    Args:
        runs (`list` of `str` or `Path`): folders of runs, or their `trace.jsonl`; those that are not there yet are
            waited for.
        labels (`list[str]`, *optional*): what to call the runs; defaults to the names of their folders.
        port (`int`, *optional*, defaults to 8765): 0 takes a free one.
        every (`float`, *optional*, defaults to 5): seconds between two looks of a browser.
        tell (`Callable`, *optional*, defaults to `print`): takes the lines that say where the page is.

    Raises:
        `ImportError`: jinja2 or matplotlib is missing; they come with the extra `report`.
        `OSError`: the port is taken, or not this user's to take.
        `ValueError`: no runs, another number of labels than of runs, or a port or `every` that cannot be.

    Example:

    ```python
    watch(["runs/replay"], port=0)
    ```
    """
    if not is_whole(port) or not 0 <= port <= 65535:
        raise ValueError(f"port must be an int in 0..65535, got {shown(port)}")
    page = LivePage(runs, labels, every)
    try:
        server = Server(page, port)
    except OSError as error:
        why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise OSError(
            error.errno, f"port {port} of {HOST} {why}: give another one with --port, or --port 0 for any free one"
        ) from error
    with server:
        tell(f"following {', '.join(page.labels)} at {server.address} (Ctrl-C ends)")
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            tell("ended")
