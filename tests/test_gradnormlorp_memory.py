"""What training takes: the plan against the bytes that a real step holds, at its end and at its peak."""

from __future__ import annotations

import importlib
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_pretrain_ext.gradnormlorp import (
    GradNormLoRP,
    compare,
    measured_state,
    memory,
    memory_of,
    param_groups,
    quantised,
)
from hf_pretrain_ext.gradnormlorp import optimizer as module
from hf_pretrain_ext.gradnormlorp.memory import on_meta

# Not the function of the same name.
planned = importlib.import_module("hf_pretrain_ext.gradnormlorp.memory")

CONFIG = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG)


def stepped(model: nn.Module, dtype: torch.dtype, groups: list[dict[str, Any]], **settings: Any) -> GradNormLoRP:
    """The optimizer after one step."""
    optimizer = GradNormLoRP(groups, **settings)
    for param in model.parameters():
        param.grad = torch.randn(param.shape).to(dtype)
    optimizer.step()
    model.zero_grad()
    return optimizer


# --- state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["out", "in", None])
@pytest.mark.parametrize("projector_bits", [4, 8, 16, 32])
@pytest.mark.parametrize("bits", [4, 8, 32])
def test_the_state_is_the_planned(
    bits: int, projector_bits: int, norm: str | None, dtype: torch.dtype, llama: Any
) -> None:
    """To the byte, from the config alone and from the model, after a real step on one with a separate head."""
    llama.to(dtype)
    settings: dict[str, Any] = {"bits": bits, "projector_bits": projector_bits, "norm": norm}
    optimizer = stepped(llama, dtype, param_groups(llama, 24), **settings)
    plan = memory(CONFIG, 24, dtype=dtype, **settings)
    assert measured_state(optimizer) == plan.state == plan.moments + plan.projectors + plan.magnitudes
    assert memory(llama, 24, **settings) == plan
    assert plan.parameters == plan.trained == sum(param.numel() for param in llama.parameters())
    assert plan.weights == plan.gradients == dtype.itemsize * plan.parameters
    assert plan.peak == plan.weights + plan.gradients + plan.state + plan.temporaries
    largest = max(param.numel() for param in llama.parameters())
    slow = memory(CONFIG, 24, dtype=dtype, layerwise=True, **settings)
    assert slow.gradients == dtype.itemsize * largest and slow.state == plan.state
    # By part: what each name holds.
    held = {"basis": 0, "magnitude": 0, "exp_avg": 0}
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                part = next((part for part in ("basis", "exp_avg") if name.startswith(part)), "magnitude")
                held[part] += value.untyped_storage().nbytes()
    assert list(held.values()) == [plan.projectors, plan.magnitudes, plan.moments]


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
def test_the_state_of_either_side_and_of_conv1d(proj_type: str) -> None:
    """And of frozen parameters, of which only the weights count."""
    model = nn.Sequential(nn.Linear(96, 160), Conv1D(96, 160), nn.Linear(160, 200), nn.LayerNorm(200))
    model[2].requires_grad_(False)
    groups = param_groups(model, 48)
    optimizer = stepped(model, torch.float32, groups, proj_type=proj_type)
    plan = memory_of(model, [{**group, "proj_type": proj_type} for group in groups])
    assert measured_state(optimizer) == plan.state
    frozen = sum(param.numel() for param in model[2].parameters())
    assert plan.parameters - plan.trained == frozen and plan.gradients == 4 * plan.trained
    assert plan.weights == 4 * plan.parameters
    assert memory(model, 48, proj_type=proj_type) == plan


def test_tied_weights_count_once() -> None:
    config = LlamaConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": True})
    plan = memory(config, 24)
    assert plan.parameters == sum(param.numel() for param in LlamaForCausalLM(config).parameters())
    assert memory(CONFIG, 24).parameters - plan.parameters == 512 * 64


def test_llama_7b_in_seconds() -> None:
    """Share of FP32 Adam's moments saved at rank 1024; the shapes are counted by hand once more."""
    began = time.process_time()
    config = LlamaConfig()
    model = on_meta(config)
    saved = []
    for bits, projector_bits in ((8, 16), (8, 8), (8, 4), (4, 4)):
        plan = memory(model, 1024, bits, projector_bits, dtype=torch.bfloat16)
        saved.append(round(1 - plan.state / (8 * plan.parameters), 3))
    assert saved == [0.894, 0.911, 0.919, 0.953]
    assert memory(config, 1024, 4, 4, dtype=torch.bfloat16) == plan
    assert time.process_time() - began < 60
    assert plan.parameters == 6_738_415_616
    h, i, v, r, layers = 4096, 11008, 32000, 1024, 32
    inside = layers * (4 * h * r + 3 * i * r) + 2 * v * h
    norms = (2 * layers + 1) * h
    plan = memory(model, 1024, dtype=torch.bfloat16)
    assert plan.projectors == layers * 7 * (h * r + 4 * r)
    # Norms of 4096 elements are just large enough for 8 bits.
    assert plan.moments == 2 * (inside + norms) + 2 * 4 * (inside + norms) // 256
    assert plan.magnitudes == 16 * layers * (4 * h + 2 * i + h)
    assert "weights 13.48, gradients 13.48" in plan.lines()[0] and "GB (6738.4M parameters" in plan.lines()[0]


def test_what_is_refused(tmp_path: Path) -> None:
    CONFIG.save_pretrained(tmp_path)
    assert memory(tmp_path, 24) == memory(str(tmp_path), 24) == memory(CONFIG, 24)
    for wrong, text in (
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"rank": 8, "bits": 16}, "bits must be one of 4, 8, 32, got 16"),
        ({"rank": 64}, "leaves no matrix to project"),
        ({"rank": 8, "target_modules": ["c_attn"]}, "target_modules names ['c_attn']"),
        ({"rank": None}, "rank must be an integer of at least 1, got None"),
        (
            {"rank": 8, "dtype": torch.float16},
            "dtype must be torch.float32 or torch.bfloat16, or None for the model's",
        ),
        ({"rank": 8, "dtype": "bfloat16"}, "dtype must be torch.float32 or torch.bfloat16"),
    ):
        for plan in (memory, compare):
            with pytest.raises(ValueError) as error:
                plan(CONFIG, **wrong)
            assert text in str(error.value)
    with pytest.raises(ValueError, match=r"the model has torch\.float16: plan with dtype=torch\.bfloat16"):
        memory(LlamaForCausalLM(CONFIG).half(), 8)
    with pytest.raises(ValueError, match="must be a model, a config, or a path or Hub name of one, got int"):
        memory(7, 8)


def test_lines_are_for_people() -> None:
    assert memory(CONFIG, 24).lines()[0].endswith("MB (0.2M parameters; activations apart)")
    assert " kB (" in memory_of(layer := nn.Linear(4, 4), [{"params": list(layer.parameters())}]).lines()[0]


# --- peak -------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """Bytes of all tensors alive, by their storages, from the first that it is shown."""

    def __init__(self, *there: Tensor):
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in there:
            self._add(tensor.detach())

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self.live:
            self.live[id(storage)] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, id(storage))

    def _free(self, key: int) -> None:
        self.now -= self.live.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        self.peak = max(self.peak, self.now)
        return result


def states(optimizer: Any) -> Iterator[Tensor]:
    return (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))


def test_the_tracker_tracks() -> None:
    """Views and in-place operations take nothing, what is let go counts no longer."""
    there = torch.zeros(500)
    with Peak(there) as tracker:
        first = torch.zeros(1000)
        view = first.view(10, 100)[1:]
        del first
        second = view.add_(1) + 1
        del view
        third = second * 2
        assert (tracker.now, tracker.peak) == (2000 + 3600 * 2, 2000 + 3600 + 4000)
        del second, third
        assert tracker.now == 2000


def peaks(shape: tuple[int, ...], dtype: torch.dtype, **settings: Any) -> tuple[Any, list[int]]:
    """The plan, and what the tensors of each of 5 steps took besides weights, gradients and state."""
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.randn(shape).to(dtype))
    group = {"params": [holder.weight], **settings}
    plan = memory_of(holder, [group])
    optimizer = GradNormLoRP([{**group, "update_proj_gap": 4}])
    found = []
    for _ in range(5):
        holder.weight.grad = torch.randn(shape).to(dtype)
        with Peak(holder.weight, holder.weight.grad, *states(optimizer)) as tracker:
            optimizer.step()
        found.append(tracker.peak - plan.weights - plan.gradients - plan.state)
    assert measured_state(optimizer) == plan.state
    return plan, found


# By name: what is largest on the way. Rank high or low, basis from the whole or from a sketch, either side.
MATRICES = [
    ((512, 256), 32),
    ((256, 512), 64),
    ((384, 384), 96),
    ((512, 512), 16),
    ((512, 128), 125),
    ((128, 128), 60),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"norm": "in"},
        {"norm": None},
        {"tangential": True},
        {"bits": 32, "projector_bits": 32},
        {"bits": 32, "on_refresh": "reset"},
        {"bits": 4, "projector_bits": 16},
        {"on_refresh": "keep"},
        {"on_refresh": "rotate", "projector_bits": 4},
        {"on_refresh": "reset"},
        {"proj_type": "reverse_std"},
    ],
    ids=str,
)
def test_the_peak_of_a_projected_step(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """The highest of first step, refresh and steps between is the planned one within 4 %."""
    for shape, rank in MATRICES:
        plan, found = peaks(shape, dtype, rank=rank, **settings)
        assert max(found) == pytest.approx(plan.temporaries, rel=0.04), (shape, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("parts", [1, 4])
def test_the_peak_of_a_plain_step(parts: int, bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a whole, and in parts, whose temporaries are those of one part."""
    numel = 1 << 18
    for each in (module, planned):
        monkeypatch.setattr(each, "CHUNK", numel // parts)
    for each in (quantised, planned):
        monkeypatch.setattr(each, "CHUNK" if each is quantised else "ROUNDED", numel // parts // 2)
    plan, found = peaks((numel,), dtype, bits=bits)
    assert max(found) == pytest.approx(plan.temporaries, rel=0.02)
    whole = 4 * numel
    assert plan.temporaries < (24 if parts == 1 else 6) * whole / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_of_the_layerwise_form(dtype: torch.dtype) -> None:
    """Five matrices in a chain: weights, state, the step's temporaries and a gradient at a time, activations apart."""
    model = nn.Sequential(*(nn.Linear(768, 768, bias=False) for _ in range(5))).to(dtype)
    groups = [{"params": list(model.parameters()), "rank": 64}]
    inputs = torch.randn(2, 768).to(dtype)
    found = {}
    for layerwise in (False, True):
        plan = memory_of(model, groups, layerwise=layerwise)
        optimizer = GradNormLoRP(groups)
        if layerwise:
            optimizer.step_in_backward(max_norm=1.0)
        for _ in range(2):
            with Peak(*model.parameters(), *states(optimizer)) as tracker:
                model(inputs).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        optimizer.step_after_backward()
        assert tracker.peak == pytest.approx(plan.peak, rel=0.03)
        found[layerwise] = tracker.peak
    assert found[False] - found[True] == pytest.approx(4 * 768 * 768 * dtype.itemsize, rel=0.1)


# --- beside others ----------------------------------------------------------------------------------


def test_rows_beside_others_are_hand_arithmetic() -> None:
    """One linear layer of 48 × 32 to project at rank 8, the rest 100 elements, in bfloat16."""
    model = nn.Sequential(nn.Linear(32, 48, bias=False), nn.LayerNorm(50))
    total, inside, basis, units, rest = 48 * 32 + 100, 48 * 8, 32 * 8, 48, 100
    factors = 8 * (48 + 32)
    eight = 2 + 2 * 4 / 256
    rows = {row.pop("name"): tuple(row.values()) for row in compare(model, 8)}
    assert rows["Adam, FP32 moments"] == (2 * total, 2 * total, 8 * total)
    assert rows["Adam, BF16 moments"] == (2 * total, 2 * total, 4 * total)
    assert rows["Adam, 8 bits"] == (2 * total, 2 * total, round(eight * total))
    assert rows["GaLore"] == (2 * total, 2 * total, 2 * (basis + 2 * inside + 2 * rest))
    assert rows["GaLore, 8 bits"] == (2 * total, 2 * total, round(2 * basis + eight * (inside + rest)))
    assert rows["LoRA"] == (2 * (total + factors), 2 * factors, 8 * factors)
    assert rows["DoRA"] == (2 * (total + factors + units), 2 * (factors + units), 8 * (factors + units))
    ours = 2 * 4 * (inside + rest) + basis + 4 * 8 + 16 * units
    assert rows["GradNormLoRP, 8 bits"] == (2 * total, 2 * total, ours)
    assert rows["GradNormLoRP, 8 bits, layer-wise"] == (2 * total, 2 * 48 * 32, ours)
    assert len(rows) == 9


def test_weights_that_modules_share_count_once() -> None:
    """As of a model that has them in one module alone."""

    class Shared(nn.Module):
        def __init__(self, times: int):
            super().__init__()
            self.table = nn.Embedding(10, 64)
            self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(times + 1))
            for layer in list(self.layers)[1:-1]:
                layer.weight = self.layers[0].weight

    once, thrice = (compare(Shared(times), 8) for times in (1, 3))
    assert once == thrice and all(row["state"] > 0 for row in once)


def test_compare_takes_what_memory_takes() -> None:
    rows = {row["name"]: row for row in compare(CONFIG, 24, 4, 16, dtype=torch.float32, target_modules=["q_proj"])}
    plan = memory(CONFIG, 24, 4, 16, dtype=torch.float32, target_modules=["q_proj"])
    assert rows["GradNormLoRP, 4 bits"]["state"] == plan.state
    assert rows["LoRA"]["gradients"] == 4 * 2 * 24 * 128
    assert rows["Adam, FP32 moments"]["weights"] == 4 * plan.parameters
    # Of a Conv1D the units are its outputs.
    model = nn.Sequential(Conv1D(48, 32))
    dora, lora = ({row["name"]: row for row in compare(model, 8)}[name]["state"] for name in ("DoRA", "LoRA"))
    assert dora - lora == 8 * 48


def test_the_tiny_model_of_the_tests_is_not_quantised() -> None:
    """Its moments are too small: tests of few bits need a larger one."""
    assert memory(tiny.model(), 4, 8).moments == memory(tiny.model(), 4, 32).moments
    assert memory(CONFIG, 24, 8).moments < memory(CONFIG, 24, 32).moments / 2
