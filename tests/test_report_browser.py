"""The report in a real browser: it is drawn, runs no script, asks for nothing, fits its screen and its paper.

Needs Chromium (Debian: `apt-get install chromium`); skipped, with the reason, where there is none.
"""

from __future__ import annotations

import http.server
import re
import subprocess
import threading
from collections.abc import Iterator
from html import unescape
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_pretrain_ext.report.html import report
from tests import report_traces as traces
from tests.report_chromium import BROWSER, NAMES, Chromium, options

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed, so no page was looked at"
)

SIZE = "[document.scrollingElement.scrollWidth, innerWidth]"


def browse(page: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Chromium without a window or a network; what pages write to their console goes to stderr."""
    command = [str(BROWSER), *options(page.parent / "profile"), "--enable-logging=stderr", *more, page.as_uri()]
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
    main = '<main id="content" tabindex="-1">'
    added = f"{main}<img src='{address}/added'><script>document.title = 'ran'</script>"
    guarded = browse(changed(page, "guarded.html", (main, added)), "--dump-dom")
    assert "<title>ran" not in guarded.stdout and asked == []
    assert any("Content Security Policy" in line for line in console(guarded))
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', page.read_text(encoding="utf-8"))
    assert policy
    free = browse(changed(page, "free.html", (main, added), (policy.group(), "")), "--dump-dom")
    assert "<title>ran" in free.stdout and asked == ["/added"]
    asked.clear()


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


# --- driven through its pipe: sizes of screens, keys, paper -------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("driven") / "profile") as running:
        yield running


@pytest.mark.parametrize("width", [1400, 768, 390, 320])
def test_every_image_is_drawn_and_nothing_overflows(width: int, page: Path, browser: Chromium) -> None:
    browser.open(page.as_uri(), width)
    across, screen = browser.evaluate(SIZE)
    # A phone zooms out of a page that is too wide, so that its own width grows.
    assert across <= screen == width
    drawn = browser.evaluate("[...document.images].map(image => [image.complete, image.naturalWidth])")
    assert len(drawn) == 7  # the plan of both, rate, losses, mixture, forgetting, gap, memory
    assert all(complete and natural > 600 for complete, natural in drawn)
    assert browser.console == []


def test_the_measure_sees_what_overflows(page: Path, browser: Chromium) -> None:
    """The control of the test above: a table out of its box makes the page too wide."""
    browser.open(page.as_uri(), 390)
    browser.evaluate("document.querySelectorAll('.scroll').forEach(box => { box.style.overflow = 'visible'; })")
    assert browser.evaluate(SIZE)[0] > 390


def test_on_a_phone_text_is_readable_and_tables_move_in_their_boxes(page: Path, browser: Chromium) -> None:
    browser.open(page.as_uri(), 390)
    smallest = browser.evaluate(
        "Math.min(...[...document.querySelectorAll('p, td, th, dd, a, li, figcaption, summary')]"
        ".map(node => parseFloat(getComputedStyle(node).fontSize)))"
    )
    assert smallest >= 13
    # Letters of figures are 12 px at 864 px of width.
    assert browser.evaluate("Math.min(...[...document.images].map(image => image.clientWidth))") / 864 * 12 >= 9.9
    wide = "[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth)"
    assert browser.evaluate(f"{wide}.length") > 5
    assert browser.evaluate(f"{wide}.every(box => box.tabIndex === 0 && box.ariaLabel && box.role === 'region')")
    browser.evaluate(f"{wide}[1].focus()")
    browser.press("ArrowRight")
    browser.wait_for(f"{wide}[1].scrollLeft > 0")


def luminance(colour: str) -> float:
    found = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in found]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_paper(dark: bool, page: Path, browser: Chromium) -> None:
    """Contrast of at least 4.5 (WCAG 2.2, AA), for every element that has text of its own."""
    browser.open(page.as_uri(), dark=dark)
    pairs = browser.evaluate("""(() => {
      const ground = node => { for (; node; node = node.parentElement) {
        const colour = getComputedStyle(node).backgroundColor;
        if (colour !== "rgba(0, 0, 0, 0)") return colour; } };
      const found = new Set();
      for (const node of document.body.querySelectorAll("*"))
        if ([...node.childNodes].some(part => part.nodeType === 3 && part.data.trim()))
          found.add(getComputedStyle(node).color + "|" + ground(node));
      return [...found]; })()""")
    assert len(pairs) > 5
    for pair in pairs:
        low, high = sorted(luminance(colour) + 0.05 for colour in pair.split("|"))
        assert high / low >= 4.5, pair


@pytest.mark.parametrize("dark", [False, True])
def test_ink_of_figures_stands_out(dark: bool, page: Path, browser: Chromium) -> None:
    """Each figure on a canvas: most of it is paper, and there is ink with a contrast of at least 4.5."""
    browser.open(page.as_uri(), dark=dark)
    drawn = browser.evaluate("""[...document.images].map(image => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [image.clientWidth, image.clientHeight];
      const pen = canvas.getContext("2d");
      pen.drawImage(image, 0, 0, canvas.width, canvas.height);
      const data = pen.getImageData(0, 0, canvas.width, canvas.height).data, counts = {};
      for (let k = 0; k < data.length; k += 4) {
        const colour = `rgb(${data[k]}, ${data[k + 1]}, ${data[k + 2]})`;
        counts[colour] = (counts[colour] || 0) + 1; }
      return counts; })""")
    assert len(drawn) == 7
    for counts in drawn:
        paper = max(counts, key=lambda colour: counts[colour])
        assert (luminance(paper) < 0.02) if dark else (luminance(paper) > 0.98)
        ratios = [
            (max(luminance(c), luminance(paper)) + 0.05) / (min(luminance(c), luminance(paper)) + 0.05) for c in counts
        ]
        # Lines, letters and marks: more than a thousandth of the figure.
        assert sum(n for n, ratio in zip(counts.values(), ratios, strict=True) if ratio >= 4.5) > 0.001 * sum(
            counts.values()
        )


ACTIVE = "document.activeElement"


def test_the_page_can_be_used_by_keyboard(page: Path, browser: Chromium) -> None:
    browser.open(page.as_uri())
    browser.press("Tab")
    assert browser.evaluate(f"{ACTIVE}.textContent") == "Skip to the content"
    assert browser.evaluate(f"{ACTIVE}.getBoundingClientRect().top") >= 0  # it can be seen now
    for title in ("At a glance", "What was run", "The plan"):
        browser.press("Tab")
        assert browser.evaluate(f"{ACTIVE}.textContent") == title
        assert browser.evaluate(f"getComputedStyle({ACTIVE}).outlineStyle") == "solid"
    browser.press("Enter")
    browser.wait_for("location.hash === '#plan'")
    browser.wait_for("Math.abs(document.getElementById('plan').getBoundingClientRect().top) < 2")
    browser.press("Tab")
    # From there on: the first box of that section.
    assert browser.evaluate(f"{ACTIVE}.closest('section').id") == "plan"
    browser.evaluate("document.querySelector('summary').focus()")
    browser.press("Enter")
    browser.wait_for("document.querySelector('details').open")
    browser.open(page.as_uri() + "?again")
    browser.press("Tab")
    browser.press("Enter")
    browser.wait_for(f"{ACTIVE}.tagName === 'MAIN'")


def test_landmarks_and_names(page: Path, browser: Chromium) -> None:
    """As assistive technology hears the page: the tree that the browser makes of it."""
    browser.open(page.as_uri())
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    kinds = [role for role, _ in roles]
    assert kinds.count("main") == kinds.count("banner") == kinds.count("navigation") == 1
    assert ("navigation", "Sections") in roles
    named = {name for role, name in roles if role == "region"}
    assert {"At a glance", "Stability gap", "Memory and time", "Environment"} <= named and "" not in named
    pictures = [name for role, name in roles if role in ("image", "img")]
    assert len(pictures) == 7 and all(len(name) > 30 for name in pictures)
    levels = browser.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(node => Number(node.tagName[1]))")
    assert levels[0] == 1 and all(after - before <= 1 for before, after in pairwise(levels))


def pages_of(pdf: bytes) -> int:
    return len(re.findall(rb"/Type\s*/Page\b", pdf))


def test_on_paper(page: Path, browser: Chromium, tmp_path: Path) -> None:
    """Light even from a dark screen, folded parts shown, nothing cut off, and a sensible number of pages."""
    browser.open(page.as_uri(), dark=True)
    pdf = browser.print(tmp_path / "report.pdf")
    assert pdf.startswith(b"%PDF") and len(pdf) > 50_000
    assert 5 <= pages_of(pdf) <= 20
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    # A4 less the margins is 182 mm, 688 px.
    browser.call("Emulation.setDeviceMetricsOverride", width=688, height=1000, deviceScaleFactor=1, mobile=False)
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    folded = "document.querySelector('details table')"
    assert browser.evaluate(f"!{folded}.closest('details').open && {folded}.checkVisibility()")
    assert (
        browser.evaluate("Math.max(...[...document.images].map(image => image.getBoundingClientRect().right))") <= 688
    )
    widest = "Math.max(...[...document.querySelectorAll('table')].map(node => node.getBoundingClientRect().right))"
    assert browser.evaluate(widest) <= 688
    assert browser.evaluate("getComputedStyle(document.querySelector('figure')).breakInside") == "avoid"
