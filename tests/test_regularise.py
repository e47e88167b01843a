"""The pull to the initial weights and the distances to a teacher: against other libraries and equations by hand."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import bitsandbytes
import distributed_worker
import pytest
import settings
import tiny
import torch
from accelerate import dispatch_model
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from test_distributed import launch, needs_deepspeed, start
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
)

from hf_pretrain_ext import PluginError, extend
from hf_pretrain_ext.callbacks import GradNormLoRPCallback, L2InitCallback, ReptileCallback, SelfDistillationCallback
from hf_pretrain_ext.regularise import (
    CHUNK,
    L2Init,
    feature_distance,
    frozen_copy,
    kl_to_teacher,
    scored_positions,
    weights_digest,
    without_adapter,
)
from hf_pretrain_ext.reptile import Reptile


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def train(model: nn.Module, optimizer: Any, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        inputs, targets = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
        optimizer.zero_grad()
        dtype = next(model.parameters()).dtype
        (model(inputs.to(dtype)).double() - targets).square().mean().backward()
        optimizer.step()


# The pull


def test_from_zero_it_is_the_weight_decay_of_adamw() -> None:
    """Where θ₀ = 0, the equation is AdamW's: torch's own, in 64 bits."""
    ours, theirs = nn.Linear(6, 3).double(), nn.Linear(6, 3).double()
    for model in (ours, theirs):
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
    pulled = L2Init(torch.optim.AdamW(ours.parameters(), lr=0.05, weight_decay=0), strength=0.7)
    decayed = torch.optim.AdamW(theirs.parameters(), lr=0.05, weight_decay=0.7)
    train(ours, pulled, 30)
    train(theirs, decayed, 30)
    for param, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert float(expected.detach().abs().max()) > 0.01
        torch.testing.assert_close(param, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
        lambda params: bitsandbytes.optim.AdamW8bit(params, lr=1e-2, min_8bit_size=8),
    ],
    ids=["sgd", "fused", "8bit"],
)
def test_every_step_is_the_equation(make: Any) -> None:
    """By hand around the bare optimizer, with a rate that changes and one group that has another."""
    ours, by_hand = network(), network()
    start = [param.detach().clone() for param in by_hand.parameters()]

    def groups(model: nn.Module) -> Any:
        first, *rest = model.parameters()
        return [{"params": [first], "lr": 3e-2}, {"params": rest}]

    pulled, bare = L2Init(make(groups(ours)), strength=0.4), make(groups(by_hand))

    class ByHand:
        """The equation, then the bare step."""

        zero_grad = bare.zero_grad

        def step(self) -> None:
            rates = [group["lr"] for group in bare.param_groups for _ in group["params"]]
            params = [param for group in bare.param_groups for param in group["params"]]
            with torch.no_grad():
                for param, rate, begin in zip(params, rates, start, strict=True):
                    param -= rate * 0.4 * (param - begin)
            bare.step()

    for step in range(12):
        for optimizer in (pulled, bare):
            for group in optimizer.param_groups:
                group["lr"] *= 0.95
        train(ours, pulled, 1, step)
        train(by_hand, ByHand(), 1, step)
    for param, expected in zip(ours.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(param, expected, rtol=0, atol=1e-6)
    far = sum((p.detach() - s).square().sum() for p, s in zip(ours.parameters(), start, strict=True)) ** 0.5
    assert pulled.distance() == pytest.approx(float(far), rel=1e-6) and pulled.distance() > 0.1


def test_bfloat16_weights_come_back_as_far_as_they_should() -> None:
    """A pull of 1/5000 a step, which rounding to nearest would lose altogether: the mean way of 4,000 weights."""
    weight = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    optimizer = L2Init(torch.optim.SGD([weight], lr=1e-3), strength=0.2)
    optimizer._take_anchors()
    with torch.no_grad():
        weight += 0.5
    for _ in range(2500):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert float(weight.detach().float().mean()) - 1 == pytest.approx(0.5 * (1 - 2e-4) ** 2500, rel=0.02)
    nearest = torch.tensor(1.5, dtype=torch.bfloat16)
    assert nearest.lerp(torch.ones_like(nearest), 2e-4) == nearest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", ["weights", "cpu"])
def test_state_goes_on_where_it_was(dtype: torch.dtype, device: str, tmp_path: Path) -> None:
    """Saved after 5 steps, loaded with weights_only into other objects, 7 steps more: bit for bit."""

    def made(model: nn.Module) -> L2Init:
        bare = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return L2Init(bare, strength=0.5, seed=3, anchor_device=device)

    whole, parts = network(dtype), network(dtype)
    train(whole, reference := made(whole), 12)
    train(parts, first := made(parts), 5)
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    again = network(dtype)
    again.load_state_dict(parts.state_dict())
    loaded = made(again)
    loaded.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert all(anchor.dtype == dtype for anchor in loaded._anchors.values())
    train(again, loaded, 7, 5)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))
    assert loaded.distance() == reference.distance()


@pytest.mark.parametrize("outer", [Reptile, L2Init])
def test_under_reptile_and_over_it(outer: Any) -> None:
    """Both keep a θ₀, each its own, through a reload."""
    inner = L2Init if outer is Reptile else Reptile
    options: dict[Any, dict[str, Any]] = {Reptile: {"every": 3, "epsilon": 0.5}, L2Init: {"strength": 0.5}}

    def made(model: nn.Module) -> Any:
        return outer(inner(torch.optim.AdamW(model.parameters(), lr=1e-2), **options[inner]), **options[outer])

    whole, parts = network(), network()
    train(whole, made(whole), 11)
    train(parts, first := made(parts), 4)
    loaded = made(parts)
    loaded.load_state_dict(copy.deepcopy(first.state_dict()))
    train(parts, loaded, 7, 4)
    assert all(torch.equal(a, b) for a, b in zip(parts.parameters(), whole.parameters(), strict=True))


def test_a_parameter_without_gradient_is_left_alone() -> None:
    weight, idle = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = L2Init(torch.optim.AdamW([weight, idle], lr=0.1), strength=1.0)
    optimizer._take_anchors()
    with torch.no_grad():
        idle += 1
    weight.grad = torch.ones(1)
    optimizer.step()
    assert idle.item() == 2


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: L2Init(sgd(network()), strength=-1), ValueError, "strength must be a number from 0 on"),
        (lambda: L2Init(sgd(network()), strength=True), ValueError, "strength must be a number from 0 on"),
        (lambda: L2Init(sgd(network()), anchor_device="disk"), ValueError, "anchor_device must be one of"),
        (lambda: L2Init(network()), TypeError, "optimizer must be a torch.optim.Optimizer, got Sequential"),
        (lambda: L2Init(sgd(network(torch.float16))), ValueError, "float16 weights would lose the pull"),
        (lambda: L2InitCallback(-0.1), ValueError, "strength must be a number from 0 on"),
        (lambda: L2InitCallback(anchor_device="disk"), ValueError, "anchor_device must be one of"),
        (lambda: L2InitCallback(allow_no_effect=1), ValueError, "allow_no_effect must be True or False"),
        (lambda: SelfDistillationCallback(-1), ValueError, "weight must be a number from 0 on"),
        (lambda: SelfDistillationCallback(match="logits"), ValueError, "match must be one of"),
        (lambda: SelfDistillationCallback(teacher=3), ValueError, "teacher must be a model, or the folder"),
        (lambda: SelfDistillationCallback(teacher=""), ValueError, "teacher must be a model, or the folder"),
    ],
)
def test_wrong_settings_are_named(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


# The distances


def test_kl_and_its_gradient_are_those_of_torch() -> None:
    """In 64 bits, over more positions than a chunk holds, some of which do not count."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, CHUNK // 2 + 7, 11)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(shape, generator=generator, dtype=torch.float64)
    positions = torch.rand(shape[:2], generator=generator) < 0.8
    found = kl_to_teacher(logits, teacher, positions)
    (gradient,) = torch.autograd.grad(3 * found, logits)
    expected = nn.functional.kl_div(logits[positions].log_softmax(-1), teacher[positions].softmax(-1), reduction="sum")
    (by_torch,) = torch.autograd.grad(3 * expected, logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, by_torch, rtol=1e-10, atol=1e-14)
    assert torch.count_nonzero(gradient[~positions]) == 0


def test_gradients_by_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn((1, 3, 4), generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn((1, 3, 4), generator=generator, dtype=torch.float64)
    positions = torch.tensor([[True, False, True]])
    assert torch.autograd.gradcheck(lambda x: kl_to_teacher(x, teacher, positions), (logits,))


def test_kl_of_16_bits_is_worked_out_in_32() -> None:
    generator = torch.Generator().manual_seed(2)
    logits, teacher = (torch.randn((2, 9, 50), generator=generator).bfloat16() for _ in range(2))
    positions = torch.ones(2, 9, dtype=torch.bool)
    exact = kl_to_teacher(logits.double(), teacher.double(), positions)
    assert float(kl_to_teacher(logits, teacher, positions)) == pytest.approx(float(exact), rel=1e-5)


def test_no_positions_count_nothing() -> None:
    logits = torch.zeros((1, 2, 3), requires_grad=True)
    found = kl_to_teacher(logits, torch.ones(1, 2, 3), torch.zeros(1, 2, dtype=torch.bool))
    found.backward()
    assert found.item() == 0 and torch.count_nonzero(logits.grad) == 0
    assert feature_distance(logits, logits + 1, torch.zeros(1, 2, dtype=torch.bool)).item() == 0


def test_positions_are_those_that_the_host_scores() -> None:
    labels = torch.tensor([[-100, 4, -100, 5], [6, 7, 8, -100]])
    assert scored_positions(labels, True).tolist() == [[True, False, True, False], [True, True, False, False]]
    assert scored_positions(labels, False).tolist() == [[False, True, False, True], [True, True, True, False]]


# In the Trainer


class Gradients(TrainerCallback):
    """The gradient of the first optimizer step."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.found:
            self.found = {n: p.grad.clone() for n, p in kwargs["model"].named_parameters() if p.grad is not None}


def masked_rows(number: int) -> Any:
    """Rows whose labels leave out another number of tokens each, so that batches bear different numbers."""
    rows = tiny.rows(number)
    labels = [[-100] * (n % 9) + row[n % 9 :] for n, row in enumerate(rows["input_ids"])]
    return rows.remove_columns("labels").add_column("labels", labels)


def logged(trained: Any, name: str) -> list[float]:
    return [line[name] for line in trained.state.log_history if name in line]


@pytest.mark.parametrize("match", ["kl", "features"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_gradient_is_that_of_the_loss_written_out(match: str, accumulation: int, tmp_path: Path) -> None:
    """One step in 64 bits: cross entropy plus the weighted distance, both means over the tokens of the step."""
    model, teacher = tiny.model().double(), tiny.model(seed=7).double()
    gradients, data = Gradients(), masked_rows(4)
    trainer = tiny.trainer(
        tmp_path,
        SelfDistillationCallback(weight=0.6, match=match, teacher=copy.deepcopy(teacher)),
        gradients,
        model=copy.deepcopy(model),
        data=data,
        max_steps=1,
        max_grad_norm=0,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    extend(trainer).train()
    ids, labels = (torch.tensor(data[name]) for name in ("input_ids", "labels"))
    ours, theirs = (m(input_ids=ids, output_hidden_states=True) for m in (model, teacher))
    bearing = labels[:, 1:] != -100
    loss = nn.functional.cross_entropy(ours.logits[:, :-1][bearing], labels[:, 1:][bearing])
    if match == "kl":
        p, q = (o.logits[:, :-1][bearing].log_softmax(-1) for o in (theirs, ours))
        distance = (p.exp() * (p - q)).sum(-1).mean()
    else:
        one, other = (o.hidden_states[-1][:, :-1][bearing] for o in (ours, theirs))
        distance = (one - other).square().sum(-1).mean()
    (loss + 0.6 * distance).backward()
    assert set(gradients.found) == {name for name, _ in model.named_parameters()}
    for name, param in model.named_parameters():
        torch.testing.assert_close(gradients.found[name], param.grad, rtol=1e-5, atol=1e-7)
    assert logged(trainer, f"distillation_{match}") == [pytest.approx(float(distance.detach()), rel=1e-6)]


@pytest.mark.parametrize("match", ["kl", "features"])
def test_a_step_without_a_label_moves_nothing(match: str, tmp_path: Path) -> None:
    """The host's loss is 0/0 there and its gradient 0; the distance must not make NaN of the weights."""
    data = tiny.rows(8)
    masked = data.map(
        lambda row, place: {"labels": [-100] * len(row["labels"]) if place < 4 else row["labels"]}, with_indices=True
    )
    plugin = SelfDistillationCallback(match=match, teacher=tiny.model(seed=7))
    trainer = extend(tiny.trainer(tmp_path, plugin, data=masked, train_sampling_strategy="sequential", max_steps=2))
    trainer.train()
    bare = tiny.trainer(tmp_path / "bare", data=masked, train_sampling_strategy="sequential", max_steps=1)
    bare.train()
    assert all(bool(weight.isfinite().all()) for weight in tiny.weights(bare).values())
    assert all(bool(weight.isfinite().all()) for weight in tiny.weights(trainer).values())


def test_at_the_start_the_distance_to_itself_is_nothing(tmp_path: Path) -> None:
    """Without dropout, the first gradient is the bare one, and the distance grows from 0."""
    bare, ours = Gradients(), Gradients()
    extend(tiny.trainer(tmp_path / "bare", bare)).train()
    trained = extend(tiny.trainer(tmp_path / "ours", SelfDistillationCallback(weight=5.0), ours))
    trained.train()
    for name, gradient in bare.found.items():
        torch.testing.assert_close(ours.found[name], gradient, rtol=0, atol=1e-6)
    first, *later = logged(trained, "distillation_kl")
    assert first == 0 and all(value > 0 for value in later) and len(later) == 5


def test_a_given_optimizer_is_pulled_too(tmp_path: Path) -> None:
    """Two train() calls against the equation by hand on a bare Trainer: θ₀ is where each of them began."""

    class ByHand(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.begin = [param.detach().clone() for param in model.parameters()]

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                for param, start in zip(kwargs["model"].parameters(), self.begin, strict=True):
                    param -= 0.05 * 4.0 * (param - start)

    runs = []
    for callback in (L2InitCallback(strength=4.0), ByHand()):
        model = tiny.model()
        given = functools.partial(Trainer, optimizers=(torch.optim.SGD(model.parameters(), lr=0.05), None))
        trained = tiny.trainer(tmp_path, callback, cls=given, model=model, lr_scheduler_type="constant")
        runs.append(extend(trained) if isinstance(callback, L2InitCallback) else trained)
    for _ in range(2):
        for trained in runs:
            trained.train()
        for name, weight in tiny.weights(runs[0]).items():
            torch.testing.assert_close(weight, tiny.weights(runs[1])[name], rtol=0, atol=1e-6)


def test_both_keep_the_model_nearer(tmp_path: Path) -> None:
    """Each ends nearer to the first model, by its own measure on the rows trained on, than training without."""

    def ended(*plugins: Any) -> tuple[float, float]:
        trained = extend(tiny.trainer(tmp_path, *plugins, max_steps=30))
        trained.train()
        start = tiny.model()
        ids = torch.tensor(tiny.rows(40)["input_ids"])
        with torch.no_grad():
            pairs = zip(trained.model.parameters(), start.parameters(), strict=True)
            far = sum((param - begin).square().sum() for param, begin in pairs)
            ours, theirs = trained.model.eval()(input_ids=ids).logits, start.eval()(input_ids=ids).logits
        return float(far) ** 0.5, float(kl_to_teacher(ours, theirs, torch.ones_like(ids, dtype=torch.bool)))

    bare = ended()
    assert ended(L2InitCallback(strength=10.0))[0] < 0.8 * bare[0]
    assert ended(SelfDistillationCallback(weight=3.0))[1] < 0.6 * bare[1]


def test_checkpoints_hold_no_teacher(tmp_path: Path) -> None:
    found = {}
    for name, plugins in {"bare": [], "ours": [SelfDistillationCallback()]}.items():
        extend(tiny.trainer(tmp_path / name, *plugins, save_strategy="steps", save_steps=3)).train()
        folder = tmp_path / name / "checkpoint-3"
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.suffix in (".pt", ".safetensors")}
        found[name] = (sorted(load_file(folder / "model.safetensors")), sizes)
    assert found["ours"] == found["bare"]


def test_another_model_on_resume_is_refused(tmp_path: Path) -> None:
    extend(tiny.trainer(tmp_path, SelfDistillationCallback(), save_strategy="steps", save_steps=3)).train()
    other = extend(tiny.trainer(tmp_path, SelfDistillationCallback(), model=tiny.model(seed=4)))
    with pytest.raises(ValueError, match="is not the one that this run began with"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_teacher_by_its_folder(tmp_path: Path) -> None:
    """The same training as with the model itself; another vocabulary and no model are named."""
    tiny.model(seed=7).save_pretrained(tmp_path / "teacher")
    runs = []
    for teacher in (str(tmp_path / "teacher"), tiny.model(seed=7)):
        trained = extend(tiny.trainer(tmp_path / "run", SelfDistillationCallback(teacher=teacher), dropout=0.1))
        trained.train()
        runs.append(trained)
    assert tiny.same_weights(*runs)
    tiny.model(vocabulary=70).save_pretrained(tmp_path / "larger")
    with pytest.raises(ValueError, match="has a vocabulary of 70, the model of 64"):
        extend(tiny.trainer(tmp_path, SelfDistillationCallback(teacher=str(tmp_path / "larger")))).train()
    with pytest.raises(ValueError, match="cannot be loaded as the model is"):
        extend(tiny.trainer(tmp_path, SelfDistillationCallback(teacher=str(tmp_path / "nothing")))).train()


MODEL = tiny.model()


@pytest.mark.parametrize(
    ("make", "given", "text"),
    [
        (lambda: SelfDistillationCallback(teacher=MODEL), {"model": MODEL}, "teacher is the model that is trained"),
        (lambda: SelfDistillationCallback(teacher=tiny.model(vocabulary=70)), {}, "has a vocabulary of 70, the model"),
        (lambda: SelfDistillationCallback(0), {}, "would change nothing with weight=0"),
        (lambda: L2InitCallback(0), {}, "would change nothing with strength=0"),
    ],
)
def test_what_does_not_fit_is_said_at_extend(make: Any, given: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=text):
        extend(tiny.trainer(tmp_path, **given), make())


def test_a_loss_without_logits_and_updates_without_a_step_are_refused(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    trainer.args.use_liger_kernel = True
    with pytest.raises(PluginError, match="computes the loss without logits"):
        extend(trainer, SelfDistillationCallback())
    with pytest.raises(PluginError, match="no step can be changed"):
        extend(tiny.trainer(tmp_path), GradNormLoRPCallback(rank=2, layerwise=True), L2InitCallback())


def test_weight_decay_beside_it_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extend(tiny.trainer(tmp_path, weight_decay=0.1), L2InitCallback())
    assert "weight_decay=0.1 pulls the same weights to 0" in capsys.readouterr().err


def adapted(dropout: float = 0.0) -> Any:
    torch.manual_seed(1)
    return get_peft_model(tiny.model(), LoraConfig(r=2, target_modules="all-linear", lora_dropout=dropout))


def test_with_an_adapter_the_teacher_is_the_base_and_no_copy(tmp_path: Path) -> None:
    """The same training as with a copy of the base as teacher, dropout of the adapter included."""
    runs = []
    for teacher in (None, tiny.model()):
        plugin = SelfDistillationCallback(weight=2.0, teacher=teacher)
        trained = extend(tiny.trainer(tmp_path, plugin, model=adapted(dropout=0.2)))
        trained.train()
        assert (plugin._model is None) == (teacher is None)
        runs.append(trained)
    for name, weight in tiny.weights(runs[0]).items():
        torch.testing.assert_close(weight, tiny.weights(runs[1])[name], rtol=0, atol=1e-6)
    assert logged(runs[0], "distillation_kl")[-1] > 0


def unfrozen(model: Any) -> Any:
    for name, param in model.named_parameters():
        param.requires_grad_(param.requires_grad or "norm" in name)
    return model


def biased() -> Any:
    """A model with a bias, and an adapter that trains all of them."""
    torch.manual_seed(1)
    config = LlamaConfig(**{**tiny.model().config.to_dict(), "attention_bias": True})
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj"], bias="all"))


def saved_module() -> Any:
    torch.manual_seed(1)
    return get_peft_model(
        tiny.model(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, modules_to_save=["norm"])
    )


def prefixed() -> Any:
    torch.manual_seed(1)
    return get_peft_model(tiny.model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers")
@pytest.mark.parametrize(
    ("make", "copied"),
    [(lambda: unfrozen(adapted()), True), (biased, True), (adapted, False), (saved_module, False), (prefixed, False)],
    ids=["norms", "biases", "adapter", "module to save", "prefix"],
)
def test_the_teacher_stays_where_it_was_whatever_is_trained(make: Any, copied: bool, tmp_path: Path) -> None:
    """The base as PEFT gives it before training, on rows, against what is distilled from after it."""
    ids = torch.tensor(tiny.rows(4)["input_ids"])
    with torch.no_grad(), (first := make().eval()).disable_adapter():
        expected = first(input_ids=ids).logits
    trained = extend(tiny.trainer(tmp_path, plugin := SelfDistillationCallback(), model=make()))
    trained.train()
    assert (plugin._model is not None) == copied
    plugin.run = trained.plugin_run
    torch.testing.assert_close(plugin._asked({"input_ids": ids}).logits, expected, rtol=0, atol=1e-6)
    with torch.no_grad(), trained.model.eval().disable_adapter():
        moved = float((trained.model(input_ids=ids).logits - expected).abs().max())
    assert moved > 1e-3 if copied else moved < 1e-6


def test_beside_meta_tokens_the_adapters_base_is_copied(tmp_path: Path) -> None:
    """The meta parts are trained, and those of the teacher stay; the trained adapter has no part in it."""
    plugin = SelfDistillationCallback(weight=2.0)
    plugins = [plugin, settings.meta_tokens()]
    trained = extend(tiny.trainer(tmp_path, *plugins, **settings.adapted()))

    class Asks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ids[0, 5] = 64
            said.append(plugin._asked({"input_ids": ids}).logits)

    ids, said = torch.arange(1, 17)[None], []
    trained.add_callback(Asks())
    trained.train()
    assert plugin._model is not None and len(said) == 6
    assert all(torch.equal(logits, said[0]) for logits in said)


def test_a_new_adapter_that_begins_at_random_may_resume(tmp_path: Path) -> None:
    """Its weights have no part in the teacher; those of the base have."""

    def made(seed: int, base: int = 0) -> Any:
        model = tiny.model(seed=base)
        torch.manual_seed(seed)
        return unfrozen(get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")))

    steps = {"save_strategy": "steps", "save_steps": 3}
    extend(tiny.trainer(tmp_path, SelfDistillationCallback(), model=made(1), **steps)).train()
    checkpoint = str(tmp_path / "checkpoint-3")
    extend(tiny.trainer(tmp_path, SelfDistillationCallback(), model=made(2), **steps)).train(checkpoint)
    with pytest.raises(ValueError, match=r"other weights here|is not the one that this run began with"):
        extend(tiny.trainer(tmp_path, SelfDistillationCallback(), model=made(1, base=4))).train(checkpoint)


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    """The count is set by hand, as no such machine is needed to refuse it."""
    trainer = tiny.trainer(tmp_path, SelfDistillationCallback())
    trainer.args._n_gpu = 2
    with pytest.raises(PluginError, match=r"2 GPUs in one process split a batch, .*Start one process a GPU"):
        extend(trainer)


def test_a_copy_of_a_dispatched_model_moves_alone() -> None:
    """accelerate puts a `to` on the model that moves that very model."""
    model = dispatch_model(tiny.model(), {"": "cpu"}, force_hooks=True)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits.double()
    made = frozen_copy(model).to(torch.float64)
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    assert {param.dtype for param in made.parameters()} == {torch.float64}
    torch.testing.assert_close(made(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)


def test_without_adapter_puts_everything_back() -> None:
    model = adapted(dropout=0.5).train()
    model.base_model.model.lm_head.eval()
    for name, param in model.named_parameters():
        param.requires_grad_("lora_B" in name or "norm" in name)
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    modes = {name: module.training for name, module in model.named_modules()}
    nn.init.ones_(next(p for n, p in model.named_parameters() if "lora_B" in n))
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad(), without_adapter(model) as base:
        expected = tiny.model().eval()(input_ids=ids).logits
        assert torch.equal(base(input_ids=ids).logits, expected)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [name for name, param in model.named_parameters() if param.requires_grad] == trained
    with torch.no_grad():
        assert not torch.equal(model.eval()(input_ids=ids).logits, expected)


def test_evaluation_is_of_the_language_model_alone(tmp_path: Path) -> None:
    plugin = SelfDistillationCallback(weight=9.0, teacher=tiny.model(seed=7))
    trained = extend(tiny.trainer(tmp_path, plugin, eval_dataset=tiny.rows(8, 3)))
    trained.train()
    loss = trained.evaluate()["eval_loss"]
    ids = torch.tensor(tiny.rows(8, 3)["input_ids"])
    with torch.no_grad():
        assert loss == pytest.approx(float(trained.model.eval()(input_ids=ids, labels=ids).loss), rel=1e-5)


def test_masked_language_models(tmp_path: Path) -> None:
    """Labels that are not shifted: the distance is over the masked tokens."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForMaskedLM(BertConfig(vocab_size=64, **size, **still))
    teacher = frozen_copy(model)
    nn.init.normal_(teacher.cls.predictions.decoder.bias)
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<unk>"})
    trained = extend(
        tiny.trainer(
            tmp_path,
            SelfDistillationCallback(teacher=teacher),
            model=copy.deepcopy(model),
            data=tiny.rows(8).remove_columns("labels"),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, seed=1),
            max_steps=1,
        )
    )
    given: list[Any] = []
    trained.model.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
    trained.train()
    bearing = given[0]["labels"] != -100
    with torch.no_grad():
        said = (m.eval()(input_ids=given[0]["input_ids"]).logits[bearing] for m in (teacher, model))
        p, q = (logits.log_softmax(-1) for logits in said)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert logged(trained, "distillation_kl") == [pytest.approx(expected, rel=1e-4)] and expected > 0.01


def test_what_is_said_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugins = [SelfDistillationCallback(), L2InitCallback(anchor_device="cpu"), ReptileCallback(every=2)]
    trained = extend(tiny.trainer(tmp_path, *plugins, save_strategy="steps", save_steps=3))
    trained.train()
    numbers = sum(param.numel() for param in trained.model.parameters())
    said = capsys.readouterr().err
    assert f"the teacher is a copy of the model of {4 * numbers / 1e6:.2f} MB" in said
    assert f"strength 0.1; a copy of the weights of {4 * numbers / 1e6:.2f} MB (cpu)" in said
    held = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    anchors = [entry["l2_init_anchor"] for entry in held["state"].values()]
    assert sorted(a.sum().item() for a in anchors) == sorted(p.sum().item() for p in tiny.model().parameters())
    state = json.loads((tmp_path / "checkpoint-3" / "hf_pretrain_ext" / "state.json").read_text())
    assert state["plugins"]["self_distillation"] == {"teacher": weights_digest(tiny.model())}
    distances = logged(trained, "l2_init_distance")
    assert len(distances) == 6 and 0 < distances[0]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("plugin", "where"),
    [
        ("l2_init", "ddp"),
        pytest.param("l2_init", "fsdp2", marks=pytest.mark.slow),
        ("self_distillation", "ddp"),
        pytest.param("self_distillation", "zero2", marks=needs_deepspeed),
    ],
)
@pytest.mark.slow
def test_two_ranks_train_as_one(plugin: str, where: str, tmp_path: Path) -> None:
    """Up to rounding; the ranks alike; where the host saves the optimizer, a resume that is bit-exact."""
    alone = distributed_worker.run(tmp_path / "one", plugins=(plugin,))[1]
    two = launch(tmp_path, "two", where, plugins=[plugin])
    assert all(torch.equal(two[0]["weights"][k], v) for k, v in two[1]["weights"].items())
    for name, weight in two[0]["weights"].items():
        torch.testing.assert_close(weight, alone["weights"][name], rtol=0, atol=5e-5)
    if where != "fsdp2":
        saved = str(tmp_path / "two" / "checkpoint-3")
        resumed = launch(tmp_path, "resumed", where, plugins=[plugin], resume_from=saved)
        for rank in (0, 1):
            assert all(torch.equal(resumed[rank]["weights"][k], v) for k, v in two[rank]["weights"].items())


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("plugin", "where", "text"),
    [
        pytest.param("l2_init", "zero2", "its next step would undo the pull", marks=needs_deepspeed),
        ("self_distillation", "fsdp2", "would need its weights gathered for every forward pass"),
        pytest.param("self_distillation", "zero3", "would need its weights gathered", marks=needs_deepspeed),
    ],
)
@pytest.mark.slow
def test_where_it_cannot_work_it_is_refused(plugin: str, where: str, text: str, tmp_path: Path) -> None:
    done = start(tmp_path, "refused", where, plugins=[plugin])
    assert done.returncode != 0 and text in done.stderr
