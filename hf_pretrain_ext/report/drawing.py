"""How the figures of the report look, and how they get into the page: one file, sharp, safe, in light and dark.

Figures are drawn with explicit colours; for dark screens the SVG carries a style sheet that exchanges them. Text is
drawn as outlines, so that nothing in a name can become markup, and mathematics in names is not interpreted.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["COLOURS", "FAINT", "INK", "clean", "data_uri", "name_text", "new_figure", "save_png", "style"]

# Okabe and Ito's palette, distinct for colour-blind readers; the line patterns tell runs apart without colour.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
PAPER, INK, FAINT, GRID, SHADE = "#ffffff", "#1f2328", "#57606a", "#d9dee3", "#f1f3f5"
_DARK = {
    PAPER: "#15191e",
    INK: "#e6edf3",
    FAINT: "#a3adb8",
    GRID: "#333b44",
    SHADE: "#20262d",
    "#0072b2": "#4aa8e0",
    "#d55e00": "#f2813a",
    "#009e73": "#2fc39a",
    "#cc79a7": "#dd9abf",
}
_RC: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "axes.facecolor": PAPER,
    "axes.formatter.use_mathtext": False,
    "axes.grid": True,
    "axes.labelcolor": FAINT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.unicode_minus": True,
    "figure.facecolor": PAPER,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.facecolor": "auto",
    "svg.fonttype": "path",
    "svg.hashsalt": "hf-pretrain-ext",
    "text.color": INK,
    "text.parse_math": False,
    "text.usetex": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
}
WIDTH = 9.0
"""Inches of a figure: 900 px wide at 100 dots an inch."""
_LARGE = 120_000
# Control characters, which XML forbids, what turns the direction of text, and halves of characters.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def clean(text: Any) -> str:
    """`text` without characters that a page or an SVG file cannot hold or that would disturb what stands around."""
    return _UNSAFE.sub("\ufffd", str(text))


def name_text(name: Any, longest: int = 36) -> str:
    """A name from a trace as text of a figure: on one line, shortened, and never hidden from a legend.

    Example:

    >>> name_text("a long name", longest=6), name_text("_hidden")
    ('a lon…', ' _hidden')
    """
    text = clean(name).replace("\n", " ").replace("\t", " ")
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    # matplotlib leaves labels that begin with an underscore out of legends.
    return " " + text if text.startswith("_") else text


@contextmanager
def style() -> Iterator[None]:
    """The look of all figures, in force while they are made and written; the user's own settings come back."""
    import matplotlib

    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn with boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def new_figure(height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Any, path: Any) -> None:
    """Writes the figure twice as fine as the screens of 900 px that it is laid out for."""
    figure.savefig(path, format="png", dpi=200)


def data_uri(figure: Any) -> str:
    """The figure as SVG, or as PNG if that is smaller, in the form that stands in an `<img>`."""
    svg = _svg(figure)
    if len(svg) > _LARGE:
        png = io.BytesIO()
        save_png(figure, png)
        if len(png.getvalue()) < len(svg):
            return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _svg(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue().decode("utf-8")
    text = text[text.index("<svg") :]
    # Comments repeat the names that are drawn; nobody reads them there.
    text = re.sub(r"<!--.*?-->\n?|<metadata>.*?</metadata>\n?", "", text, flags=re.DOTALL)
    text = re.sub(r">\s+<", "><", text)
    # A hundredth of a point is finer than any screen; more digits are half of the file.
    text = re.sub(r' (?:d|x|y)="[^"]*"|translate\([^)]*\)', lambda found: _rounded(found.group()), text)
    at = text.index(">") + 1
    return (text[:at] + f"<style>{_dark_style()}</style>" + text[at:]).encode("utf-8")


def _rounded(text: str) -> str:
    return re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found.group()):.2f}", text).replace("\n", "")


def _dark_style() -> str:
    rules = [
        f'[style*="{what}: {light}"]{{{what}:{dark}!important}}'
        for light, dark in _DARK.items()
        for what in ("fill", "stroke")
    ]
    return "@media (prefers-color-scheme: dark){" + "".join(rules) + "}"
