"""The report in a real browser: it is drawn, runs no script, asks for nothing, and fits its screen.

Needs Chromium (Debian: `apt-get install chromium`); skipped, with the reason, where there is none.
"""

from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_pretrain_ext.report.html import report
from tests import report_traces as traces

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser: none of {', '.join(BROWSERS)} is installed, so no page was looked at"
)

# What the page cannot do itself, having no scripts: tell whether its images were decoded and whether it overflows.
MEASURE = """<script>addEventListener("load", () => { document.title = JSON.stringify({
  page: document.documentElement.scrollWidth, screen: document.documentElement.clientWidth,
  images: [...document.images].map(image => [image.complete, image.naturalWidth]),
  ink: getComputedStyle(document.body).color }); });</script>"""


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Chromium without a window or a network; what pages write to their console goes to stderr."""
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--enable-logging=stderr", *options, page.as_uri()]
    command.insert(1, "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, list[str]]]:
    """An address on this machine, and the requests that reach it."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}", asked
        running.shutdown()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, server: tuple[str, list[str]]) -> Path:
    """A page in which a trace tries to add an image and a script."""
    folder, (address, _) = tmp_path_factory.mktemp("browser"), server
    evil = f"<img src={address}/name><script>document.title='ran'</script>" + "w" * 200
    start = traces.start(describe=[evil], plugins={evil: {"ratio": evil}})
    runs = [
        traces.write(folder / "one", traces.events(**start)),
        traces.write(folder / "two", traces.events(until=21)),
    ]
    return report(runs, folder / "report.html", labels=["first run", evil])


def changed(page: Path, name: str, *replacements: tuple[str, str]) -> Path:
    text = page.read_text(encoding="utf-8")
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new, 1)
    path = page.with_name(name)
    path.write_text(text, encoding="utf-8")
    return path


def test_the_page_says_what_it_holds_and_asks_for_nothing(page: Path, server: tuple[str, list[str]]) -> None:
    done = browse(page, "--dump-dom")
    text = unescape(re.sub(r"<[^>]*>", " ", done.stdout))
    for words in ("At a glance", "Learning rate", "What could not be known", "finished, 40 of 40 steps", "2.5000"):
        assert words in text
    assert "<title>Report: first run, &lt;img src=" in done.stdout
    assert console(done) == [] and server[1] == []


def test_the_policy_holds_where_escaping_would_not(page: Path, server: tuple[str, list[str]]) -> None:
    """The control of the test above: markup put into the page by hand. Without the policy it works, with it not."""
    address, asked = server
    added = f"<main><img src='{address}/added'><script>document.title = 'ran'</script>"
    guarded = browse(changed(page, "guarded.html", ("<main>", added)), "--dump-dom")
    assert "<title>ran" not in guarded.stdout and asked == []
    assert any("Content Security Policy" in line for line in console(guarded))
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', page.read_text(encoding="utf-8"))
    assert policy
    free = browse(changed(page, "free.html", ("<main>", added), (policy.group(), "")), "--dump-dom")
    assert "<title>ran" in free.stdout and asked == ["/added"]
    asked.clear()


@pytest.mark.parametrize("width", [1400, 500])
def test_every_image_is_drawn_and_nothing_overflows(width: int, page: Path) -> None:
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', page.read_text(encoding="utf-8"))
    assert policy
    measured = changed(page, f"measured-{width}.html", (policy.group(), MEASURE))
    done = browse(measured, "--dump-dom", f"--window-size={width},900")
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title
    found = json.loads(unescape(title.group(1)))
    assert len(found["images"]) == 5  # the plan of both, rate, losses, mixture, forgetting
    assert all(complete and natural > 600 for complete, natural in found["images"])
    assert found["page"] <= found["screen"] <= width


def shot(page: Path, name: str, *options: str) -> np.ndarray:
    path = page.with_name(name)
    browse(page, f"--screenshot={path}", "--window-size=1000,2000", *options)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)[::3, ::3]


def test_light_and_dark(page: Path) -> None:
    """Both are drawn, and in the dark the figures are dark too."""
    light, dark = shot(page, "light.png"), shot(page, "dark.png", "--blink-settings=preferredColorScheme=0")
    assert (light[0, 0] == 255).all() and (dark[0, 0] < 40).all()
    for picture in (light, dark):
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 200
    assert (light.sum(axis=2) > 600).mean() > 0.7 and (dark.sum(axis=2) < 200).mean() > 0.6
    assert (dark == 255).all(axis=2).mean() < 0.001
