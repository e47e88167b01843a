"""`report --watch`: the page follows its runs, on this machine alone."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest

from hf_pretrain_ext.cli import main
from hf_pretrain_ext.report.html import report
from hf_pretrain_ext.report.watch import LivePage, Server, watch
from tests import report_traces as traces
from tests.report_chromium import BROWSER, Chromium
from tests.report_traces import Page

FAST = 0.05


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No long wait between two pages; figures are written where a browser looks at them."""
    monkeypatch.setattr("hf_pretrain_ext.report.watch._SHARE", 1)
    if request.function not in (test_the_page_keeps_its_place_while_it_changes,):
        traces.cheap(monkeypatch)


@contextmanager
def serving(*runs: Path, labels: list[str] | None = None, every: float = FAST) -> Iterator[Server]:
    with Server(LivePage(list(runs), labels, every), port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server: Server, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    body = answer.read().decode("utf-8")
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body


def until(check: Callable[[], bool], seconds: float = 60) -> None:
    """Pages follow at a distance: the next is not made before this one's time has passed several times."""
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def append(folder: Path, *found: dict[str, Any], torn: str = "") -> None:
    with (folder / "trace.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(event) + "\n" for event in found) + torn)


def glance(body: str, run: str = "run") -> Any:
    return Page(body).row("glance", run)[0]


# --- the page follows -------------------------------------------------------------------------------


def test_a_trace_that_grows(tmp_path: Path) -> None:
    found = traces.events()
    half = next(k for k, event in enumerate(found) if event["step"] == 20)
    folder = traces.write(tmp_path / "run", found[:half])
    with serving(folder) as server:
        status, first, body = ask(server)
        assert status == 200 and glance(body) == "not ended, at step 16 of 40"
        assert "interrupted" not in body and "The trace has no end" not in body

        # Nothing new: no page, but what is known of it.
        status, headers, body = ask(server, If_None_Match=first["etag"])
        assert (status, body, headers["etag"]) == (304, "", first["etag"]) and "content-length" not in headers
        assert ask(server, If_None_Match=f'"other", W/{first["etag"]}')[0] == 304
        assert ask(server, If_None_Match='"other"')[0] == 200
        written = (folder / "trace.jsonl").stat().st_mtime
        assert abs(parsedate_to_datetime(headers["last-modified"]).timestamp() - written) < 1

        # Half a line is not read, and does not hide what stands before it.
        line = json.dumps(found[half])
        append(folder, torn=line[: len(line) // 2])
        until(lambda: ask(server, If_None_Match=first["etag"])[0] == 200)
        _, second, body = ask(server)
        assert glance(body) == "not ended, at step 16 of 40" and second["etag"] != first["etag"]

        append(folder, torn=line[len(line) // 2 :] + "\n")
        append(folder, *found[half + 1 :])
        until(lambda: glance(ask(server)[2]) == "finished, 40 of 40 steps")
        page = Page(ask(server)[2])
        assert page.row("losses", "run", "training loss")[-1] == 3.0625


def test_runs_that_have_not_begun_are_waited_for(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    with serving(one, two) as server:
        _, headers, body = ask(server)
        page = Page(body)
        assert "one has not begun" in page.texts["head"] and "two has not begun" in page.texts["head"]
        assert page.of("section") == [] and "last-modified" not in headers
        traces.write(two, traces.events(until=12))
        until(lambda: "has not begun" in ask(server)[2] and Page(ask(server)[2]).of("section") != [])
        page = Page(ask(server)[2])
        assert "one has not begun" in page.texts["head"] and "two has not begun" not in page.texts["head"]
        assert page.row("glance", "one")[0] == "not begun yet"
        assert page.row("glance", "two")[0] == "not ended, at step 12 of 40"
        traces.write(one, traces.events())
        until(lambda: "has not begun" not in ask(server)[2])
        assert glance(ask(server)[2], "one") == "finished, 40 of 40 steps"


def test_a_run_begun_anew_takes_the_place_of_the_last(tmp_path: Path) -> None:
    folder = traces.write(tmp_path / "run", traces.events())
    with serving(folder) as server:
        assert glance(ask(server)[2]) == "finished, 40 of 40 steps"
        append(folder, *traces.events(until=4))
        until(lambda: glance(ask(server)[2]) == "not ended, at step 4 of 40")


def test_a_trace_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    folder = traces.write(tmp_path / "run", traces.events(until=4))
    with serving(folder) as server:
        append(folder, {"no": "event <b>"}, *traces.events(until=2)[2:])
        until(lambda: "is not an event of a trace" in ask(server)[2])
        status, _, body = ask(server)
        assert status == 200 and "<b>" not in body
        traces.write(folder, traces.events(until=8))
        until(lambda: "is not an event" not in ask(server)[2])
        assert glance(ask(server)[2]) == "not ended, at step 8 of 40"


def test_a_page_is_made_once_for_all_who_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_pretrain_ext.report import watch as module

    made, render = [], module.render
    monkeypatch.setattr(module, "render", lambda *given: (made.append(1), time.sleep(0.2), render(*given))[-1])
    page = LivePage([traces.write(tmp_path / "run", traces.events(until=2))], every=1000)
    threads = [threading.Thread(target=page.get) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    append(tmp_path / "run", traces.events(until=4)[-1])
    page.get()  # too soon after the last
    assert len(made) == 1


def test_a_real_run_is_followed(tmp_path: Path) -> None:
    """Asked for all the time while a Trainer writes: every answer is a whole page, steps only rise."""
    from hf_pretrain_ext import extend
    from hf_pretrain_ext.callbacks import ForgettingCallback, RewarmCallback
    from tests import tiny

    trainer = extend(
        tiny.trainer(
            tmp_path / "run",
            RewarmCallback(peak_lr=1e-2, warmup=2),
            ForgettingCallback({"old": tiny.rows(8, seed=6)}),
            max_steps=30,
        )
    )
    seen: list[str] = []
    with serving(tmp_path / "run") as server:
        going = threading.Event()

        def look() -> None:
            tag = ""
            while not going.is_set():
                status, headers, body = ask(server, If_None_Match=tag or '""')
                assert status in (200, 304)
                if status == 200:
                    tag = headers["etag"]
                    seen.append(glance(body) if "<section" in body else "waiting")
                time.sleep(0.02)

        assert "has not begun" in ask(server)[2]
        watcher = threading.Thread(target=look)
        watcher.start()
        trainer.train()
        until(lambda: glance(ask(server)[2]) == "finished, 30 of 30 steps")
        until(lambda: bool(seen) and seen[-1] == "finished, 30 of 30 steps")
        going.set()
        watcher.join()
    steps = [int(found.group(1)) for words in seen if (found := re.match(r"not ended, at step (\d+) of 30", words))]
    assert steps == sorted(steps) and seen[-1] == "finished, 30 of 30 steps"


# --- what it is closed against ----------------------------------------------------------------------


def test_it_listens_on_the_loopback_address_alone(tmp_path: Path) -> None:
    with serving(traces.write(tmp_path / "run", traces.events(until=2))) as server:
        assert server.address == f"http://127.0.0.1:{server.server_port}/"
        assert server.socket.getsockname()[0] == "127.0.0.1"
        others = ["127.0.0.2"] if sys.platform == "linux" else []
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # sends nothing, but finds the address that others know
                others.append(probe.getsockname()[0])
            except OSError:
                pass  # no network at all
        for other in others:
            with pytest.raises(OSError):
                socket.create_connection((other, server.server_port), timeout=5)
        socket.create_connection(("127.0.0.1", server.server_port), timeout=5).close()


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example:{port}", "127.0.0.1:1", "127.0.0.1", ""]
)
def test_another_host_is_refused(host: str, tmp_path: Path) -> None:
    """A name of the web that was made to point here: its page must not read this one."""
    with serving(traces.write(tmp_path / "run", traces.events(until=2)), labels=["a secret"]) as server:
        status, headers, body = ask(server, Host=host.format(port=server.server_port))
        assert status == 403 and "secret" not in body and "etag" not in headers
        for good in (f"127.0.0.1:{server.server_port}", f"LOCALHOST:{server.server_port}"):
            assert ask(server, Host=good)[0] == 200


@pytest.mark.parametrize("lines", [[], ["Host: 127.0.0.1:{port}", "Host: evil.example"]])
def test_no_host_or_two_are_refused(lines: list[str], tmp_path: Path) -> None:
    with serving(traces.write(tmp_path / "run", traces.events(until=2))) as server:
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as raw:
            head = "\r\n".join(["GET / HTTP/1.1", *(line.format(port=server.server_port) for line in lines), "", ""])
            raw.sendall(head.encode())
            assert raw.makefile("rb").readline().split()[1] == b"403"


def test_no_other_file_is_served(tmp_path: Path) -> None:
    folder = traces.write(tmp_path / "run", traces.events(until=2))
    with serving(folder) as server:
        for path in ("/trace.jsonl", "/run/trace.jsonl", "/../trace.jsonl", f"{folder}/trace.jsonl", "/?", "*"):
            status, _, body = ask(server, path)
            assert status == 404 and '"event"' not in body, path
        here = f"127.0.0.1:{server.server_port}"
        assert ask(server, "http://evil.example/", Host=here)[0] == 404
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(server, method=method)[0] == 501
        status, headers, body = ask(server, method="HEAD")
        assert status == 200 and body == "" and int(headers["content-length"]) > 10_000


def test_what_the_page_may_do(tmp_path: Path) -> None:
    """The one script is allowed by its hash and may ask this server alone; a page that is kept holds none at all."""
    import base64
    import hashlib

    folder = traces.write(tmp_path / "run", traces.events(until=2))
    with serving(folder) as server:
        _, headers, body = ask(server)
    page = Page(body)
    assert len(page.of("script")) == 1 and page.of("script")[0] == {}
    script = re.search(r"<script>(.*?)</script>", body, re.DOTALL)
    assert script
    rules = dict(rule.strip().split(" ", 1) for rule in headers["content-security-policy"].split(";"))
    digest = base64.b64encode(hashlib.sha256(script.group(1).encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'" and rules["connect-src"] == "'self'"
    assert rules["default-src"] == rules["frame-ancestors"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff" and headers["cross-origin-resource-policy"] == "same-origin"
    kept = report([folder], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in kept and "connect-src" not in kept and "fetch(" not in kept and "<button" not in kept


# --- the command ------------------------------------------------------------------------------------


def started(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hf_pretrain_ext", "report", *map(str, arguments)]

    def interruptible() -> None:
        # Where tests run in the background, SIGINT is ignored, and Python would leave it so.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=interruptible
    )


@pytest.mark.skipif(os.name == "nt", reason="signals as POSIX has them")
def test_ctrl_c_ends_it(tmp_path: Path) -> None:
    """While it waits for a run, and after it has shown one; the port is free again at once."""
    process = started(tmp_path / "run", "--watch", "--port", 0, "--every", 0.1)
    try:
        assert process.stdout
        line = process.stdout.readline()
        found = re.fullmatch(r"following run at http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends\)\n", line)
        assert found, line
        port = int(found.group(1))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/")
        assert b"run has not begun" in connection.getresponse().read()
        connection.close()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (0, "ended\n", "")
    with Server(LivePage([tmp_path / "run"]), port=port):
        pass


def test_a_port_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as ended:
            main(["report", str(tmp_path), "--watch", "--port", str(port)])
        words = f"port {port} of 127.0.0.1 is taken: give another one with --port, or --port 0 for any free one"
        assert ended.value.code == f"hf-pretrain-ext: {words}"
        with pytest.raises(OSError, match=re.escape(words)):
            watch([tmp_path], port=port)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "80"], "--port is for --watch, which is not given"),
        (["--every", "2"], "--every is for --watch, which is not given"),
        (["--watch", "--output", "page.html"], "--watch serves the page and writes no file"),
        (["--watch", "--port", "65536"], "port must be an int in 0..65535, got 65536"),
        (["--watch", "--port", "-1"], "port must be an int in 0..65535, got -1"),
        (["--watch", "--every", "0"], "every must be a positive number of seconds, got 0.0"),
        (["--watch", "--every", "nan"], "every must be a positive number of seconds, got nan"),
        (["--watch", "--label", "a", "--label", "b"], "2 labels for 1 runs"),
    ],
)
def test_arguments_that_cannot_be(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path), *arguments])
    assert words in f"{ended.value.code} {capsys.readouterr().err}"


# --- in a browser -----------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed, so no page was looked at")


@needs_browser
def test_the_page_keeps_its_place_while_it_changes(tmp_path: Path) -> None:
    """Scrolled down, a fold open, the focus on a box that was moved: all of it is as it was, with new figures."""
    found = traces.events()
    half = next(k for k, event in enumerate(found) if event["step"] == 20)
    folder = traces.write(tmp_path / "run", found[:half])
    place = """(() => { const fold = document.querySelector('#environment details');
      const box = document.activeElement;
      return [scrollY, fold.open, box.ariaLabel, box.scrollLeft, fold.getBoundingClientRect().top]; })()"""
    with serving(folder, every=0.2) as server, Chromium(tmp_path / "profile") as browser:
        browser.open(server.address, 390)
        browser.wait_for("document.getElementById('live-status').textContent.includes('Last change')")
        browser.evaluate("""(() => {
          document.querySelector('#environment details').open = true;
          const box = document.querySelector('#losses .scroll:has(table)');
          box.focus(); box.scrollLeft = 40;
          window.marked = document.querySelector('main');
          window.scrollTo({top: box.getBoundingClientRect().top + scrollY, behavior: 'instant'}); })()""")
        before = browser.evaluate(place)
        assert before[0] > 1000 and before[1:4] == [True, "Table: Losses", 40]
        append(folder, *found[half:])
        browser.wait_for("document.querySelector('#glance').textContent.includes('finished, 40 of 40 steps')")
        assert browser.evaluate("document.querySelector('main') !== window.marked")
        after = browser.evaluate(place)
        assert after[:4] == before[:4]
        for focus in ("document.querySelector('nav li:nth-child(5) a')", "document.querySelector('main')"):
            browser.evaluate(f"{focus}.focus()")
            browser.evaluate("window.marked = document.querySelector('main')")
            append(folder, traces.usage(40))
            browser.wait_for("document.querySelector('main') !== window.marked")
            assert browser.evaluate(f"document.activeElement === {focus}")
        across, screen = browser.evaluate("[document.scrollingElement.scrollWidth, innerWidth]")
        assert across <= screen == 390
        assert browser.console == []


@needs_browser
def test_pausing_and_the_end_of_the_server(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    status = "document.getElementById('live-status').textContent"
    with Chromium(tmp_path / "profile") as browser:
        with serving(folder, every=0.1) as server:
            browser.open(server.address)
            assert "has not begun" in browser.evaluate("document.querySelector('main').textContent")
            browser.wait_for(f"{status} === 'Waiting.'")
            # By keyboard: the link to the content first, then the one button.
            browser.press("Tab")
            browser.press("Tab")
            browser.press("Enter")
            browser.wait_for(f"{status} === 'Paused.'")
            traces.write(folder, traces.events(until=4))
            until(lambda: "<section" in ask(server)[2])
            time.sleep(0.5)
            assert browser.evaluate("document.querySelectorAll('section').length") == 0
            browser.press("Enter")
            browser.wait_for("document.querySelectorAll('section').length > 8")
            browser.wait_for(f"{status}.startsWith('Following. Last change at')")
            assert browser.console == []
        browser.wait_for(f"{status}.includes('has ended')")
        assert browser.evaluate("document.querySelectorAll('section').length") > 8


@needs_browser
def test_an_answer_under_way_changes_nothing_after_the_pause(tmp_path: Path) -> None:
    """The button is pressed while an answer is awaited: what comes back then is not shown, but asked for again."""
    folder = tmp_path / "run"
    status = "document.getElementById('live-status').textContent"
    sections = "document.querySelectorAll('section').length"
    # From here on an answer waits until it is let go; `asked` counts the questions, `most` those at one time.
    gate = """(() => { const real = window.fetch; let now = 0; window.asked = 0; window.most = 0; window.held = [];
      window.fetch = async (...given) => {
        window.asked += 1; now += 1; window.most = Math.max(window.most, now);
        const answer = await real(...given);
        if (window.held) await new Promise(go => window.held.push(go));
        now -= 1;
        return answer; }; })()"""
    click = "document.getElementById('live-pause').click()"
    with Chromium(tmp_path / "profile") as browser, serving(folder, every=0.1) as server:
        browser.open(server.address)
        browser.wait_for(f"{status} === 'Waiting.'")
        browser.evaluate(gate)
        browser.wait_for("window.held.length === 1")  # no question from before the gate is under way any more
        traces.write(folder, traces.events(until=4))
        until(lambda: "<section" in ask(server)[2])
        browser.evaluate("window.held.shift()()")
        browser.wait_for("window.asked === 2 && window.held.length === 1")
        browser.evaluate(click)
        browser.evaluate("window.held.forEach(go => go())")
        time.sleep(0.5)
        assert browser.evaluate(f"[{status}, {sections}, window.asked]") == ["Paused.", 0, 2]
        # Paused and gone on while one answer is held: one line of questions goes on, not two.
        browser.evaluate("window.held = []")
        browser.evaluate(click)
        browser.wait_for("window.held.length === 1")
        browser.evaluate(f"{click}; {click}")
        browser.wait_for("window.held.length === 2")
        browser.evaluate("const held = window.held; window.held = null; window.most = 0; held.forEach(go => go())")
        browser.wait_for(f"{sections} > 8")
        browser.wait_for(f"{status}.startsWith('Following. Last change at')")
        asked = browser.evaluate("window.asked")
        browser.wait_for(f"window.asked > {asked + 3}")
        assert browser.evaluate("window.most") == 1
        assert browser.console == []
