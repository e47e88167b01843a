"""Reptile steps: against the equation, over other types than 32 bits, through a reload, in a Trainer."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import tiny
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_pretrain_ext import PluginError, extend
from hf_pretrain_ext.callbacks import GradNormLoRPCallback, L2InitCallback, ReplayCallback, ReptileCallback
from hf_pretrain_ext.reptile import ANCHOR, Reptile, anchor_bytes


def train(model: nn.Module, optimizer: Any, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(8, 6, generator=generator)
        targets = torch.randn(8, 3, generator=generator)
        optimizer.zero_grad()
        weights = next(model.parameters())
        (model(inputs.to(weights.dtype)).float() - targets).square().mean().backward()
        optimizer.step()


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2),
    "8bit": lambda params: bitsandbytes.optim.AdamW8bit(params, lr=1e-2, min_8bit_size=8),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_interval_is_the_equation(make: Any) -> None:
    """By hand: the bare optimizer for three steps, then the interpolation, three times."""
    model, by_hand = network(), network()
    train(model, Reptile(make(model.parameters()), every=3, epsilon=0.3), 9)
    bare = make(by_hand.parameters())
    for interval in range(3):
        begin = copy.deepcopy(list(by_hand.parameters()))
        train(by_hand, bare, 3, first=3 * interval)
        with torch.no_grad():
            for param, start in zip(by_hand.parameters(), begin, strict=True):
                param.copy_(start + 0.3 * (param - start))
    for param, expected in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(param, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_whole_way_kept_changes_no_bit(dtype: torch.dtype) -> None:
    models = [network().to(dtype) for _ in range(2)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
    train(models[0], Reptile(optimizers[0], every=2, epsilon=1.0), 5)
    train(models[1], optimizers[1], 5)
    assert all(torch.equal(*pair) for pair in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_the_step_after_an_interpolation_starts_from_it() -> None:
    """What the released code fails: with weights that an optimizer holds elsewhere, the next step undoes it."""
    model = network()
    optimizer = Reptile(torch.optim.AdamW(model.parameters(), lr=1e-2), every=100, epsilon=0.1)
    begin = copy.deepcopy(list(model.parameters()))

    def distance() -> float:
        pairs = zip(model.parameters(), begin, strict=True)
        return float(sum((param.detach() - start).square().sum() for param, start in pairs) ** 0.5)

    train(model, optimizer, 99)
    far = distance()
    train(model, optimizer, 1, first=99)
    near = distance()
    train(model, optimizer, 1, first=100)
    assert near == pytest.approx(0.1 * far, rel=0.05)
    assert distance() == pytest.approx(near, rel=0.2)


def test_it_does_not_fire_at_the_first_step() -> None:
    model, bare = network(), network()
    train(model, Reptile(torch.optim.SGD(model.parameters(), lr=0.1), every=2, epsilon=0.5), 1)
    train(bare, torch.optim.SGD(bare.parameters(), lr=0.1), 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), bare.parameters(), strict=True))


@pytest.mark.parametrize("reload", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_displacements_are_kept(dtype: torch.dtype, reload: bool) -> None:
    """20 intervals of 0.5 % each, a tenth of them kept: 1 % in all, which weights of 16 bits alone round away."""
    weight = nn.Parameter((torch.rand(4096) + 0.5).to(dtype))
    start = weight.detach().double()
    size = 0.005 * start.norm()
    direction = torch.randn(4096, dtype=torch.float64)
    direction *= size / direction.norm()
    optimizer = Reptile(torch.optim.SGD([weight], lr=1.0), every=1, epsilon=0.1)
    moved = torch.zeros(4096, dtype=torch.float64)
    for interval in range(20):
        before = weight.detach().double()
        # What a step of an interval adds, as the weights can hold it.
        weight.grad = (before - (before + direction).to(dtype).double()).to(dtype)
        moved += (before - (before - weight.grad.double()).to(dtype).double()) * -1
        optimizer.step()
        if reload and interval % 5 == 2:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = Reptile(torch.optim.SGD([weight], lr=1.0), every=1, epsilon=0.1)
            optimizer.load_state_dict(saved)
    anchor = optimizer.state_dict()["state"][0][ANCHOR]
    assert anchor.dtype == torch.float32
    kept = float((anchor.double() - start) @ direction / (0.1 * moved @ direction))
    assert 0.95 <= kept <= 1.05
    wanted = float((anchor.double() - start) @ direction / (20 * 0.1 * direction @ direction))
    assert 0.95 <= wanted <= 1.05


def in_8_bits(values: torch.Tensor) -> torch.Tensor:
    blocks = values.view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    return ((blocks / scale).round() * scale).view(-1)


@pytest.mark.parametrize(
    "rounded", [lambda values: values.to(torch.bfloat16).double(), in_8_bits], ids=["bfloat16", "8 bits"]
)
def test_a_negative_control_of_that_test(rounded: Any) -> None:
    """An anchor of 16 bits or 8 loses nearly all of the same way."""
    torch.manual_seed(0)
    start = anchor = rounded((torch.rand(4096) + 0.5).double())
    direction = torch.randn(4096, dtype=torch.float64)
    direction *= 0.005 * start.norm() / direction.norm()
    for _ in range(20):
        weight = anchor.to(torch.bfloat16).double()
        fast = (weight + direction).to(torch.bfloat16).double()
        anchor = rounded(anchor + 0.1 * (fast - weight))
    assert float((anchor - start) @ direction / (20 * 0.1 * direction @ direction)) < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sgd", "adamw", "8bit"])
def test_a_reload_in_the_middle_of_an_interval_is_exact(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    whole, parts = network(dtype), network(dtype)
    settings = {"every": 4, "epsilon": 0.2}
    train(whole, Reptile(OPTIMIZERS[name](whole.parameters()), **settings), 11)
    optimizer = Reptile(OPTIMIZERS[name](parts.parameters()), **settings)
    train(parts, optimizer, 6)
    torch.save({"optimizer": optimizer.state_dict(), "model": parts.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    parts.load_state_dict(saved["model"])
    reloaded = Reptile(OPTIMIZERS[name](parts.parameters()), **settings)
    reloaded.load_state_dict(saved["optimizer"])
    assert {state[ANCHOR].dtype for state in reloaded.state_dict()["state"].values()} == {torch.float32}
    train(parts, reloaded, 5, first=6)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_where_the_anchor_lies_changes_nothing() -> None:
    models = [network(), network()]
    for model, device in zip(models, ["weights", "cpu"], strict=True):
        optimizer = Reptile(torch.optim.AdamW(model.parameters()), every=2, epsilon=0.5, anchor_device=device)
        train(model, optimizer, 5)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_what_is_told_is_what_happened() -> None:
    """Displacement and inner product of two SGD steps, from the gradients."""
    model = network()
    optimizer = Reptile(torch.optim.SGD(model.parameters(), lr=0.1), every=2, epsilon=0.5)
    gradients = []
    for step in range(2):
        train(model, optimizer, 1, first=step)
        gradients.append(torch.cat([param.grad.flatten() for param in model.parameters()]).double())
    first, second = gradients
    assert optimizer.last is not None and optimizer.last.step == 2
    assert optimizer.last.displacement == pytest.approx(float(0.1 * (first + second).norm()), rel=1e-5)
    assert optimizer.last.inner_product == pytest.approx(float(0.1 * first @ second), rel=1e-4)
    assert optimizer.last.cosine == pytest.approx(float(first @ second / first.norm() / second.norm()), rel=1e-4)


def test_parameters_without_gradients_and_later_ones() -> None:
    """A frozen one stays where it is, and one that gets its first gradient late has its moments made then."""
    model = network()
    optimizer = Reptile(torch.optim.AdamW(model.parameters(), lr=1e-2), every=2, epsilon=0.5)
    late = model[0].weight
    late.requires_grad_(False)
    before = late.detach().clone()
    train(model, optimizer, 3)
    assert torch.equal(late, before)
    late.requires_grad_(True)
    train(model, optimizer, 3, first=3)
    assert not torch.equal(late, before) and "exp_avg" in optimizer.state[late]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"every": 0}, "every must be an integer from 1 on, got 0"),
        ({"every": 2.5}, "every must be an integer from 1 on, got 2.5"),
        ({"epsilon": 0}, "epsilon must be above 0"),
        ({"epsilon": 1.5}, "epsilon must be above 0, where nothing would be learned, and up to 1, got 1.5"),
        ({"epsilon": float("nan")}, "epsilon must be above 0"),
        ({"anchor_device": "disk"}, "anchor_device must be one of"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], said: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=said):
        Reptile(torch.optim.SGD(model.parameters(), lr=0.1), **settings)


def test_what_is_no_optimizer() -> None:
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got Linear"):
        Reptile(nn.Linear(1, 1))  # type: ignore[arg-type]
    once = Reptile(torch.optim.SGD(network().parameters(), lr=0.1))
    with pytest.raises(TypeError, match="makes Reptile steps already"):
        Reptile(once)


def test_a_state_of_another_model_is_refused() -> None:
    model, other = network(), nn.Linear(6, 3)
    optimizer = Reptile(torch.optim.SGD(model.parameters(), lr=0.1))
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="belongs to another model"):
        Reptile(torch.optim.SGD(other.parameters(), lr=0.1)).load_state_dict(saved)
    cut = {**saved, "state": {0: saved["state"][0]}}
    with pytest.raises(ValueError, match="holds θ₀ for 1 of 4 parameters"):
        Reptile(torch.optim.SGD(model.parameters(), lr=0.1)).load_state_dict(cut)


def test_state_of_a_bare_optimizer_begins_an_interval() -> None:
    model = network()
    bare = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, bare, 3)
    optimizer = Reptile(torch.optim.AdamW(model.parameters(), lr=1e-2), every=2, epsilon=0.5)
    optimizer.load_state_dict(bare.state_dict())
    begin = copy.deepcopy(list(model.parameters()))
    train(model, optimizer, 2, first=3)
    moved = sum((p - b).square().sum() for p, b in zip(model.parameters(), begin, strict=True)).sqrt()
    assert optimizer.last is not None
    assert float(moved) == pytest.approx(0.5 * optimizer.last.displacement, rel=1e-4)


# In a Trainer


class ByHand(TrainerCallback):
    """Interpolates the weights of a bare Trainer, a quarter of the way kept."""

    def __init__(self, every: int = 2):
        self.every = every

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.begin = [param.detach().clone() for param in model.parameters()]

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            with torch.no_grad():
                for param, start in zip(model.parameters(), self.begin, strict=True):
                    param.copy_(start + 0.25 * (param - start))
            self.begin = [param.detach().clone() for param in model.parameters()]


@pytest.mark.parametrize("bf16", [False, True], ids=["32 bits", "autocast to bfloat16"])
def test_in_a_trainer_it_is_the_equation(bf16: bool, tmp_path: Path) -> None:
    """Against a bare Trainer whose weights a callback interpolates by hand."""
    ours = extend(tiny.trainer(tmp_path / "ours", ReptileCallback(every=2, epsilon=0.25), bf16=bf16))
    ours.train()
    by_hand = tiny.trainer(tmp_path / "hand", ByHand(), bf16=bf16)
    by_hand.train()
    for name, weight in tiny.weights(ours).items():
        torch.testing.assert_close(weight, tiny.weights(by_hand)[name], rtol=0, atol=1e-6)


def with_sgd(folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    """A Trainer that was given its optimizer."""
    model = tiny.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return tiny.trainer(
        folder, *callbacks, cls=partial(Trainer, optimizers=(optimizer, None)), model=model, **settings
    )


def test_an_optimizer_that_was_given_is_wrapped_anew_by_every_train(tmp_path: Path) -> None:
    """Two train() calls, as by hand: an interval begins with each; without the plug-in the optimizer is bare again."""
    ours = extend(with_sgd(tmp_path / "ours", plugin := ReptileCallback(every=4, epsilon=0.25)))
    by_hand = with_sgd(tmp_path / "hand", callback := ByHand(every=4))
    for last in (False, False, True):
        if last:
            ours.remove_callback(plugin)
            by_hand.remove_callback(callback)
        ours.train()
        by_hand.train()
        for name, weight in tiny.weights(ours).items():
            torch.testing.assert_close(weight, tiny.weights(by_hand)[name], rtol=0, atol=1e-6)
    assert isinstance(ours.optimizer.optimizer, torch.optim.SGD)


def test_a_resume_with_an_optimizer_that_was_given(tmp_path: Path) -> None:
    """Inside an interval: bit for bit."""
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole = extend(with_sgd(tmp_path, ReptileCallback(every=4, epsilon=0.25), **settings))
    whole.train()
    resumed = extend(with_sgd(tmp_path, ReptileCallback(every=4, epsilon=0.25), **settings))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert tiny.same_weights(resumed, whole)


def test_a_trainer_that_trained_before_it_was_extended(tmp_path: Path) -> None:
    """The host goes on with the optimizer of the first train(); so does the wrapped one."""
    runs = [tiny.trainer(tmp_path / name) for name in ("ours", "hand")]
    for trained in runs:
        trained.train()
    extend(runs[0], ReptileCallback(every=4, epsilon=0.25)).train()
    runs[1].add_callback(ByHand(every=4))
    runs[1].train()
    for name, weight in tiny.weights(runs[0]).items():
        torch.testing.assert_close(weight, tiny.weights(runs[1])[name], rtol=0, atol=1e-6)
    assert isinstance(runs[0].optimizer.optimizer, Reptile)


def test_an_optimizer_of_some_weights_is_refused(tmp_path: Path) -> None:
    model = tiny.model()
    some = torch.optim.SGD(model.lm_head.parameters(), lr=0.1)
    trainer = tiny.trainer(tmp_path, cls=partial(Trainer, optimizers=(some, None)), model=model)
    with pytest.raises(ValueError, match=r"holds 1 of the 20 trained weights of the model, and not 'model.layers.0"):
        extend(trainer, ReptileCallback(every=2)).train()


def test_updates_in_the_backward_pass_are_no_steps() -> None:
    class Lomo(torch.optim.SGD):
        """By the method that LOMO's optimizers have besides `step`."""

        def fused_backward(self, loss: Any, rate: float) -> None: ...

    with pytest.raises(ValueError, match="updates the weights in the backward pass"):
        Reptile(Lomo(network().parameters(), lr=0.1))


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "apollo_adamw_layerwise", "lomo", "adalomo"])
@pytest.mark.parametrize("make", [lambda: ReptileCallback(every=2), L2InitCallback], ids=["reptile", "l2_init"])
def test_layer_wise_optimizers_of_the_host_are_refused(make: Any, optim: str, tmp_path: Path) -> None:
    """Unless they are not made: where the Trainer was given another."""
    targets = {} if "lomo" in optim else {"optim_target_modules": "all-linear"}
    with pytest.raises(PluginError, match=f"optim='{optim}' updates the weights in the backward pass"):
        extend(tiny.trainer(tmp_path, make(), optim=optim, **targets))
    extend(with_sgd(tmp_path, make(), optim=optim))


def test_what_is_logged(tmp_path: Path) -> None:
    trained = extend(tiny.trainer(tmp_path, ReptileCallback(every=2, epsilon=0.25)))
    trained.train()
    seen = {line["step"]: line for line in trained.state.log_history if "reptile_displacement" in line}
    assert sorted(seen) == [2, 4, 6]
    assert all(line["reptile_displacement"] > 0 and -1 <= line["reptile_cosine"] <= 1 for line in seen.values())


def test_pure_bf16_weights_in_a_trainer(tmp_path: Path) -> None:
    """The anchor outlives checkpoints in 32 bits."""
    callback = ReptileCallback(every=2, epsilon=0.25)
    model = tiny.model().to(torch.bfloat16)
    trained = extend(tiny.trainer(tmp_path, callback, model=model, save_strategy="steps", save_steps=3))
    trained.train()
    held = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert {state[ANCHOR].dtype for state in held["state"].values()} == {torch.float32}
    assert held["param_groups"][0]["reptile_steps"] == 3


def test_with_an_adapter_only_its_weights_are_kept(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["q_proj"]))
    trained = extend(tiny.trainer(tmp_path, ReptileCallback(every=2), model=model))
    trained.train()
    anchors = [s[ANCHOR] for s in trained.optimizer.state_dict()["state"].values()]
    assert 4 * sum(anchor.numel() for anchor in anchors) == anchor_bytes(model)


def test_meta_experience_replay(tmp_path: Path) -> None:
    """With replay the data is the same, and the weights differ."""
    runs = []
    for name, plugins in {"replay": [], "both": [ReptileCallback(every=2)]}.items():
        trained = extend(tiny.trainer(tmp_path / name, ReplayCallback(tiny.rows(20, seed=5), ratio=0.25), *plugins))
        trained.train()
        runs.append(trained)
    assert runs[0].plugin_run.realised() == runs[1].plugin_run.realised()
    assert not tiny.same_weights(*runs)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ReptileCallback(every=0), "every must be at least 1 step"),
        (lambda: ReptileCallback(every=-3), "every must be an int"),
        (lambda: ReptileCallback(allow_no_effect="no"), "allow_no_effect must be True or False"),
        (lambda: ReptileCallback(epsilon="0.1"), "epsilon must be above 0"),
        (lambda: ReptileCallback(anchor_device="cuda"), "anchor_device must be one of"),
    ],
)
def test_the_callback_refuses(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_an_interval_longer_than_the_run(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"every=500 is 500 of the \d+ steps of the run: it would change nothing"):
        extend(tiny.trainer(tmp_path, ReptileCallback()))


def test_a_share_of_the_run(tmp_path: Path) -> None:
    trained = extend(tiny.trainer(tmp_path, ReptileCallback(every=1 / 3)))
    trained.train()
    assert trained.optimizer.optimizer.every == 2


def test_layer_wise_updates_are_refused(tmp_path: Path) -> None:
    plugins = [GradNormLoRPCallback(rank=2, layerwise=True), ReptileCallback(every=2)]
    with pytest.raises(PluginError, match="updates in the backward pass"):
        extend(tiny.trainer(tmp_path, *plugins, max_grad_norm=0))
