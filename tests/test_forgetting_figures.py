"""Forgetting figures: the definitions on sequences done by hand, and the held-out loss against a float64 reference."""

from __future__ import annotations

import copy
import json
import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_pretrain_ext.checkpoint import read_state, write_state
from hf_pretrain_ext.forgetting import WEIGHT, History, heldout_loss, is_probe_step, summarise

PROPERTY = settings(max_examples=80, derandomize=True, deadline=None)
CPU = torch.device("cpu")

# --- figures ----------------------------------------------------------------------------------------


def figures(
    initial: float, worst: float, worst_step: int, recovery: int | None, final: float, best: float, last: int
) -> dict[str, Any]:
    return {
        "initial": initial,
        "worst": worst,
        "worst_step": worst_step,
        "gap_depth": worst - initial,
        "recovery_step": recovery,
        "final": final,
        "final_step": last,
        "best": best,
        "forgetting": final - best,
        "gain": initial - final,
    }


@pytest.mark.parametrize(
    ("steps", "losses", "expected"),
    [
        # The stability gap of the papers: up, then slowly back below the start.
        ([0, 1, 2, 4, 8], [2.0, 2.5, 2.25, 2.0, 1.75], figures(2.0, 2.5, 1, 4, 1.75, 1.75, 8)),
        # Never recovered.
        ([0, 1, 2, 4], [2.0, 3.0, 2.5, 2.25], figures(2.0, 3.0, 1, None, 2.25, 2.0, 4)),
        # Only ever better: worst at step 0, hence no gap, "recovered" at the next probe, nothing forgotten.
        ([0, 5, 10], [3.0, 2.5, 2.0], figures(3.0, 3.0, 0, 5, 2.0, 2.0, 10)),
        # Only ever worse: all of the loss is forgetting, and the gain is negative.
        ([0, 5, 10], [2.0, 2.5, 3.0], figures(2.0, 3.0, 10, None, 3.0, 2.0, 10)),
        # Exactly at the margin counts (0 and 0.01 are exact in the comparison); just above does not.
        ([0, 1, 2], [0.0, 1.0, 0.01], figures(0.0, 1.0, 1, 2, 0.01, 0.0, 2)),
        ([0, 1, 2], [0.0, 1.0, math.nextafter(0.01, 1)], figures(0.0, 1.0, 1, None, math.nextafter(0.01, 1), 0.0, 2)),
        # Of equal worst losses the first is the worst; a recovery between them counts.
        ([0, 1, 2, 3, 4], [1.0, 2.0, 1.0, 2.0, 1.5], figures(1.0, 2.0, 1, 2, 1.5, 1.0, 4)),
        # Below the start before the worst is no recovery: it has to come after it.
        ([0, 1, 2, 3], [1.0, 0.5, 2.0, 1.5], figures(1.0, 2.0, 2, None, 1.5, 0.5, 3)),
        # The best lies in the middle: forgetting counts from there, not from the start.
        ([0, 10, 20, 30], [4.0, 3.0, 2.0, 3.5], figures(4.0, 4.0, 0, 10, 3.5, 2.0, 30)),
        # One probe, and a flat line.
        ([0], [2.0], figures(2.0, 2.0, 0, None, 2.0, 2.0, 0)),
        ([0, 1, 2], [2.0, 2.0, 2.0], figures(2.0, 2.0, 0, 1, 2.0, 2.0, 2)),
        # Diverged: infinities go through.
        ([0, 1, 2], [2.0, math.inf, 2.0], figures(2.0, math.inf, 1, 2, 2.0, 2.0, 2)),
    ],
)
def test_figures_by_hand(steps: list[int], losses: list[float], expected: dict[str, Any]) -> None:
    assert summarise(steps, losses) == expected


@PROPERTY
@given(st.lists(st.integers(0, 64).map(lambda k: k / 16), min_size=1, max_size=20), st.integers(1, 9))
def test_figures_follow_their_definitions(losses: list[float], stride: int) -> None:
    """Definition by definition, by walking through the sequence."""
    steps = [stride * k for k in range(len(losses))]
    found = summarise(steps, losses)
    worst, worst_step = losses[0], 0
    for step, loss in zip(steps, losses, strict=True):
        if loss > worst:
            worst, worst_step = loss, step
    recovery = None
    for step, loss in zip(steps, losses, strict=True):
        if recovery is None and step > worst_step and loss - losses[0] <= 0.01:
            recovery = step
    assert (found["worst"], found["worst_step"], found["recovery_step"]) == (worst, worst_step, recovery)
    assert found["gap_depth"] == worst - losses[0]
    assert found["forgetting"] == losses[-1] - sorted(losses)[0]
    assert found["gain"] == losses[0] - losses[-1]
    assert (found["initial"], found["final"], found["final_step"]) == (losses[0], losses[-1], steps[-1])
    for name in ("gap_depth", "forgetting"):
        assert (found[name] or 0) >= 0


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_loss_that_is_not_a_number_is_never_reported_as_harmless(where: int) -> None:
    """A probe that gave NaN is the worst there is, wherever it stands."""
    losses = [2.0, 2.5, 1.5]
    losses[where] = math.nan
    found = summarise([0, 1, 2], losses)
    assert math.isnan(float(found["worst"] or 0)) or found["worst"] == math.inf


# --- history ----------------------------------------------------------------------------------------


def history_of(losses: list[float]) -> History:
    history = History()
    for step, loss in enumerate(losses):
        history.add("general", step, loss, tokens=100)
        history.add("domain", step, loss / 2, tokens=50)
    return history


def test_history_by_hand() -> None:
    history = history_of([2.0, 2.5, 1.5])
    assert history.last_step() == 2 and History().last_step() == -1
    assert history.rise("general") == -0.5 and history.rise("domain") == -0.25
    assert history.scalars() == {
        "eval_general_loss": 1.5,
        "eval_general_perplexity": pytest.approx(4.4816890703),
        "eval_domain_loss": 0.75,
        "eval_domain_perplexity": pytest.approx(2.1170000166),
    }
    assert history_of([1000.0]).scalars()["eval_general_perplexity"] == math.inf
    assert history.summary() == {
        "general": figures(2.0, 2.5, 1, 2, 1.5, 1.5, 2),
        "domain": figures(1.0, 1.25, 1, 2, 0.75, 0.75, 2),
    }
    written = json.loads(json.dumps(history.to_json(), allow_nan=False))
    assert written["sets"]["general"]["losses"] == [2.0, 2.5, 1.5] and written["sets"]["general"]["steps"] == [0, 1, 2]
    assert written["sets"]["domain"]["summary"] == history.summary()["domain"]
    assert "nats" in written["unit"] and written["recovery_margin"] == 0.01


def test_the_table_says_what_the_figures_are() -> None:
    head, general, domain = history_of([2.0, 2.5, 1.5]).table()
    assert head.split() == ["set", "step", "0", "worst", "at", "gap", "recovered", "final", "gain"]
    assert general.split() == ["general", "2.000", "2.500", "1", "0.500", "2", "1.500", "+0.500"]
    assert domain.split() == ["domain", "1.000", "1.250", "1", "0.250", "2", "0.750", "+0.250"]
    assert history_of([2.0, 2.5, 2.4]).table()[1].split()[5:] == ["never", "2.400", "-0.400"]
    assert history_of([2.0, 1.5]).table()[1].split()[4:] == ["0.000", "1", "1.500", "+0.500"]


@pytest.mark.parametrize(
    "losses", [[2.0, 2.5, 1.5], [2.0, math.inf, 1.0], [2.0, math.nan, 1.0], [2.0, 1.0, math.nan]], ids=str
)
def test_history_survives_a_checkpoint(losses: list[float], tmp_path: Any) -> None:
    """Saved and resumed, a history goes on as it would have: the diverged losses of a run included."""
    folder = tmp_path / "checkpoint-3"
    history = history_of(losses)
    write_state(folder, {"sets": history.sets})
    resumed = History(read_state(folder)["sets"])
    for each in (history, resumed):
        each.add("general", 3, 1.25, tokens=100)
    same = np.array_equal(resumed.sets["general"]["losses"], history.sets["general"]["losses"], equal_nan=True)
    assert same and resumed.sets["general"]["tokens"] == 100
    assert resumed.rise("general") == -0.75
    assert repr(resumed.summary()) == repr(history.summary())
    assert resumed.table() == history.table()
    assert repr(resumed.scalars()) == repr(history.scalars())


def test_a_history_owns_its_lists() -> None:
    history = history_of([2.0])
    copied = History(history.sets)
    copied.add("general", 1, 3.0, tokens=100)
    assert history.sets["general"]["losses"] == [2.0]


# --- when to probe ----------------------------------------------------------------------------------


@PROPERTY
@given(st.integers(1, 400), st.integers(1, 500))
def test_probe_steps_are_those_of_the_design(total: int, every: int) -> None:
    """0, the end, every `every`; densely also 1 to 20 and the powers of two."""
    sparse = {0, total, *range(0, total + 1, every)}
    dense = sparse | set(range(1, 21)) | {2**k for k in range(10)}
    for step in range(total + 1):
        assert is_probe_step(step, total, every, dense=False) == (step in sparse)
        assert is_probe_step(step, total, every, dense=True) == (step in dense)


# --- held-out loss ----------------------------------------------------------------------------------


def batches_of(rows: torch.Tensor, labels: torch.Tensor, size: int) -> list[dict[str, Any]]:
    return [{"input_ids": rows[at : at + size], "labels": labels[at : at + size]} for at in range(0, len(rows), size)]


@pytest.fixture(scope="module")
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Ten rows whose labels are ignored here and there: first places, last places, whole rows, runs."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, tiny.VOCABULARY, (10, tiny.LENGTH), generator=generator)
    labels = ids.clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    labels[1, :] = -100
    labels[2, :5] = -100
    labels[3, -4:] = -100
    labels[9, 2:] = -100
    return ids, labels


def reference(model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    """Sum over predicted tokens of −log softmax, in float64 and NumPy, position by position."""
    with torch.no_grad():
        logits = copy.deepcopy(model).double().eval()(input_ids=ids).logits.numpy()
    total, tokens = 0.0, 0
    for row in range(len(ids)):
        for place in range(ids.shape[1] - 1):
            target = int(labels[row, place + 1])
            if target != -100:
                scores = logits[row, place]
                top = scores.max()
                total += float(top + np.log(np.exp(scores - top).sum()) - scores[target])
                tokens += 1
    return total, tokens


def loss(model: torch.nn.Module, batches: list[dict[str, Any]], **settings: Any) -> tuple[float, int]:
    options: dict[str, Any] = {"shifts_labels": True, "autocast": nullcontext, "device": CPU, **settings}
    found = heldout_loss(model, [dict(batch) for batch in batches], **options)
    assert found.dtype == torch.float64 and found.shape == (2,)
    return float(found[0]), int(found[1])


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    model = tiny.model(dropout=0.3)
    with torch.no_grad():  # far enough from uniform for a wrong label to show
        for parameter in model.parameters():
            parameter.mul_(4)
    return model.train()


@pytest.mark.parametrize("size", [1, 3, 4, 10])
def test_heldout_loss_is_the_token_sum(
    llama: torch.nn.Module, rows: tuple[torch.Tensor, torch.Tensor], size: int
) -> None:
    """For every batch size, the last batch ragged: dropout off, ignored labels left out, token-weighted."""
    total, tokens = loss(llama, batches_of(*rows, size))
    expected, number = reference(llama, *rows)
    assert tokens == number
    assert total == pytest.approx(expected, rel=1e-6)
    # Negative control: a mean of batch means is another number.
    parts = [reference(llama, rows[0][at : at + size], rows[1][at : at + size]) for at in range(0, 10, size)]
    means = [t / n for t, n in parts if n]
    assert size == 10 or abs(sum(means) / len(means) - total / tokens) > 1e-3


def test_heldout_loss_is_the_models_own(llama: torch.nn.Module, rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    """transformers' mean loss times its number of tokens."""
    evaluated = copy.deepcopy(llama).eval()
    with torch.no_grad():
        mean = evaluated(input_ids=rows[0], labels=rows[1]).loss
    total, tokens = loss(llama, batches_of(*rows, 4))
    assert total / tokens == pytest.approx(float(mean), rel=1e-6)


def test_labels_shifted_beforehand_give_the_same(
    llama: torch.nn.Module, rows: tuple[torch.Tensor, torch.Tensor]
) -> None:
    ids, labels = rows
    shifted = torch.cat([labels[:, 1:], torch.full((len(labels), 1), -100)], dim=1)
    expected = loss(llama, batches_of(ids, labels, 4))
    with_shifted = [{"input_ids": ids, "shift_labels": shifted}]
    both = [{"input_ids": ids, "shift_labels": shifted, "labels": labels}]
    unshifting = [{"input_ids": ids, "labels": shifted}]
    for batches, shifts in ((with_shifted, True), (with_shifted, False), (both, True), (unshifting, False)):
        total, tokens = loss(llama, batches, shifts_labels=shifts)
        assert (total, tokens) == (pytest.approx(expected[0], rel=1e-6), expected[1])


def test_padding_with_an_attention_mask_changes_nothing(
    llama: torch.nn.Module, rows: tuple[torch.Tensor, torch.Tensor]
) -> None:
    ids, labels = rows
    padded = {
        "input_ids": torch.nn.functional.pad(ids, (0, 3)),
        "labels": torch.nn.functional.pad(labels, (0, 3), value=-100),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (0, 3)),
    }
    total, tokens = loss(llama, [padded])
    expected = loss(llama, batches_of(ids, labels, 10))
    assert (total, tokens) == (pytest.approx(expected[0], rel=1e-6), expected[1])


def test_batches_without_weight_count_for_nothing(
    llama: torch.nn.Module, rows: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Ranks that have fewer batches repeat one with weight 0 to keep in step."""
    batches = batches_of(*rows, 4)
    weighted = [{**batch, WEIGHT: 1.0} for batch in batches] + [{**batches[0], WEIGHT: 0.0}]
    assert loss(llama, weighted) == loss(llama, batches)
    assert loss(llama, []) == (0.0, 0)


def test_the_forward_pass_runs_in_the_given_context(
    llama: torch.nn.Module, rows: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Under bf16 autocast the loss is near the exact one and not equal to it; the sums are float64 still."""
    exact = loss(llama, batches_of(*rows, 4))
    half = loss(llama, batches_of(*rows, 4), autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert half[1] == exact[1] and half[0] != exact[0] and half[0] == pytest.approx(exact[0], rel=0.05)


def test_every_module_is_put_back_as_it_was(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Parts frozen in evaluation mode stay there, parts in training mode too, also when the forward pass fails."""
    model = tiny.model(dropout=0.3).train()
    model.model.layers[0].eval()
    model.model.layers[1].mlp.training = False
    before = {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: list[bool] = []
    handle = model.model.layers[1].self_attn.register_forward_hook(lambda module, *_: seen.append(module.training))
    loss(model, batches_of(*rows, 4))
    assert seen == [False, False, False]
    handle.remove()
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(ValueError, match="input_ids"):
        loss(model, [{"labels": rows[1]}])
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_batches_given_are_left_as_they_were(
    llama: torch.nn.Module, rows: tuple[torch.Tensor, torch.Tensor]
) -> None:
    batch = {"input_ids": rows[0], "labels": rows[1]}
    heldout_loss(llama, [batch, batch], shifts_labels=True, autocast=nullcontext, device=CPU)
    assert batch.keys() == {"input_ids", "labels"}
