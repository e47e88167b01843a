"""What the package tells the person at the terminal: few lines, on stderr, clear of progress bars."""

from __future__ import annotations

import logging
import os
import sys

__all__ = ["logger", "say"]

logger = logging.getLogger("hf_pretrain_ext")


class _BarSafeHandler(logging.StreamHandler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        # tqdm.write lifts the bars out of the way; a plain write would leave half a bar on the line.
        tqdm.write(self.format(record), file=sys.stderr)


def _set_up() -> None:
    if logger.handlers:
        return
    handler = _BarSafeHandler()
    handler.setFormatter(logging.Formatter("[hf-pretrain-ext] %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    level = os.environ.get("HF_PRETRAIN_EXT_VERBOSITY", "info").upper()
    logger.setLevel(level if level in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL") else "INFO")


def say(message: str, level: int = logging.INFO) -> None:
    """Prints `message`, one prefixed line a line of text; `HF_PRETRAIN_EXT_VERBOSITY=warning` silences the rest."""
    _set_up()
    for line in message.splitlines():
        logger.log(level, line)
