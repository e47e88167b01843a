"""Installed plug-ins: ours are found, and what cannot be right is an error that names both sides."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

import pytest

from hf_pretrain_ext.callbacks import ForgettingCallback, ReplayCallback, RewarmCallback
from hf_pretrain_ext.cli import main
from hf_pretrain_ext.registry import GROUP, installed_plugins


def point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name=name, value=value, group=GROUP)


def test_ours_are_found() -> None:
    found = installed_plugins()
    for plugin in (ForgettingCallback, ReplayCallback, RewarmCallback):
        assert found[plugin.name] is plugin


def test_a_duplicate_name_is_an_error() -> None:
    ours = list(entry_points(group=GROUP, name="replay"))
    other = point("replay", "hf_pretrain_ext.callbacks.rewarm:RewarmCallback")
    with pytest.raises(ValueError, match=r"two installed packages offer a plug-in named 'replay': .* and .*Uninstall"):
        installed_plugins([*ours, other])


@pytest.mark.parametrize("value", ["json:dumps", "hf_pretrain_ext.callbacks.rewarm:RewarmCallback"])
def test_what_is_not_a_plugin_of_that_name_is_an_error(value: str) -> None:
    with pytest.raises(ValueError, match=r"the entry point 'odd' of .* is not a TrainerPlugin of that name"):
        installed_plugins([point("odd", value)])


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins"]) == 0
    said = capsys.readouterr().out
    assert "replay       hf_pretrain_ext.callbacks.replay.ReplayCallback" in said
    assert "Mixes old data into training at an exact ratio" in said
