"""Figures of a card: what the rate, the mixture and the held-out losses were, and what each stage read."""

from __future__ import annotations

from pathlib import Path

from hf_pretrain_ext.hub_card.facts import CardFacts

__all__ = ["draw_forgetting", "draw_life", "draw_plan"]


def draw_plan(facts: CardFacts, path: Path) -> bool:
    """Logged learning rates, and the share of each source in what had been read; returns whether there was any."""
    from matplotlib.figure import Figure

    if facts.record is None:
        return False
    rates, counts = facts.record.scalars("learning_rate"), facts.record.counts
    if not rates:
        return False
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True) if len(counts) > 1 else [figure.subplots()]
    axes[0].plot(*zip(*rates, strict=True))
    axes[0].set(ylabel="learning rate", ylim=(0, None))
    if len(counts) > 1:
        names = list(counts[-1][1])
        totals = [sum(each.samples for each in seen.values()) or 1 for _, seen in counts]
        for name in names:
            shares = [
                (seen[name].samples / total if name in seen else 0.0)
                for (_, seen), total in zip(counts, totals, strict=True)
            ]
            axes[1].plot([step for step, _ in counts], shares, label=name)
        axes[1].set(ylabel="share of samples", ylim=(0, 1))
        axes[1].legend(fontsize=8)
    axes[-1].set_xlabel("optimizer step")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return True


def draw_life(facts: CardFacts, path: Path) -> bool:
    """What each stage of several read; returns whether that is known of any."""
    from hf_pretrain_ext.report.drawing import save_png, style
    from hf_pretrain_ext.report.life import life_figure

    stages = [
        {"name": stage.name, "kind": stage.kind, "sources": {source.name: source.tokens for source in stage.sources}}
        for stage in facts.stages
    ]
    with style():
        figure = life_figure({"": stages}) if len(facts.trained) > 1 else None
        if figure is not None:
            save_png(figure, path)
    return figure is not None


def draw_forgetting(facts: CardFacts, path: Path) -> bool:
    """Held-out losses by step; returns whether any were measured."""
    from matplotlib.figure import Figure

    if facts.record is None or not facts.record.probes:
        return False
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for name, points in facts.record.probes.items():
        axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.set(xlabel="optimizer step", ylabel="held-out loss, nats a token")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return True
