"""GradNormLoRP's optimizer and its parts, against autograd, torch.optim, torch.linalg.svd and a float64 reference."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import math
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import architectures
import pytest
import tiny
import torch
from torch import Tensor, nn

from hf_pretrain_ext.gradnormlorp import (
    GradNormLoRP,
    captured_energy,
    leading_basis,
    param_groups,
    projected_modules,
    quantised,
)
from hf_pretrain_ext.gradnormlorp import optimizer as module
from hf_pretrain_ext.gradnormlorp.projector import keyed_generator, projects_right

EXACT: dict[str, Any] = {"bits": 32, "projector_bits": 32}
BITS = [(32, 32), (8, 8), (4, 4), (8, 16)]


def made(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[nn.Parameter, Any]:
    """A parameter of a fixed seed and its optimizer."""
    value = torch.randn(shape, generator=torch.Generator().manual_seed(11)) / shape[-1] ** 0.5
    param = nn.Parameter(value.to(dtype))
    return param, GradNormLoRP([param], **settings)


def gradients(shape: tuple[int, ...], steps: int, seed: int = 5) -> list[Tensor]:
    """A drift of rank 3 and noise: what gradients look like."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, math.prod(shape[1:]), generator=generator)
    return [drift.view(shape) + torch.randn(shape, generator=generator) for _ in range(steps)]


def feed(param: Tensor, optimizer: Any, fed: Iterable[Tensor]) -> Tensor:
    for gradient in fed:
        param.grad = gradient.to(param.dtype)
        optimizer.step()
    return param.detach().clone()


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Tensor):
        return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    return type(ours) is type(theirs) and ours == theirs


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every basis is the identity: the subspace is the whole space, in its own coordinates."""
    monkeypatch.setattr(module, "leading_basis", lambda matrix, rank, generator: torch.eye(matrix.shape[0], rank))


class Adam:
    """Kingma and Ba, in float64."""

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.betas, self.eps, self.first, self.second, self.age = betas, eps, 0.0 * torch.zeros(1), torch.zeros(1), 0

    def __call__(self, gradient: Tensor) -> Tensor:
        (a, b), self.age = self.betas, self.age + 1
        self.first = a * self.first + (1 - a) * gradient
        self.second = b * self.second + (1 - b) * gradient**2
        return (self.first / (1 - a**self.age)) / ((self.second / (1 - b**self.age)).sqrt() + self.eps)


def weight_normalised(
    weight: Tensor, fed: list[Tensor], dim: int, tangential: bool, lr: float, scale: float, decay: float
) -> list[Tensor]:
    """Weight-normalised AdamW that sets V to W after each step, gradients by autograd, all in float64."""
    weight, on_m, on_v = weight.double(), Adam(), Adam()
    for gradient in fed:
        v = weight.clone().requires_grad_()
        m = weight.norm(dim=dim, keepdim=True).requires_grad_()
        (m * v / v.norm(dim=dim, keepdim=True) * gradient.double()).sum().backward()
        assert m.grad is not None and v.grad is not None
        with torch.no_grad():
            v -= lr * scale * on_v(v.grad if tangential else gradient.double())
            m *= 1 - lr * decay
            m -= lr * on_m(m.grad)
            assert bool((m > 0).all())
            weight = m * v / v.norm(dim=dim, keepdim=True)
    return [weight, m.detach()]


# --- gradients and steps ----------------------------------------------------------------------------


@pytest.mark.parametrize("tangential", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("norm", ["out", "in"])
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9)])
def test_gradients_are_those_of_weight_norm(
    shape: tuple[int, int], norm: str, transposed: bool, tangential: bool
) -> None:
    """First moments after one step, undone, against autograd through torch's own weight_norm in float64."""
    weight, _ = made(shape)
    group = {"params": [weight], "rank": min(shape), "norm": norm, "transposed": transposed, "tangential": tangential}
    optimizer = GradNormLoRP([group], **EXACT)
    (gradient,) = gradients(shape, 1)
    kept = 0 if (norm == "out") != transposed else 1
    v = weight.detach().double().requires_grad_()
    m = v.detach().norm(dim=1 - kept, keepdim=True).requires_grad_()
    (torch._weight_norm(v, m, kept) * gradient.double()).sum().backward()
    assert v.grad is not None and m.grad is not None
    feed(weight, optimizer, [gradient])
    state = optimizer.state[weight]
    torch.testing.assert_close(state["magnitude_exp_avg"].double() / 0.1, m.grad.flatten(), rtol=1e-5, atol=1e-5)
    inside, basis = state["exp_avg"].double() / 0.1, state["basis"].double()
    whole = inside @ basis.T if shape[0] >= shape[1] else basis @ inside
    wanted = v.grad if tangential else gradient.double()
    torch.testing.assert_close(whole, wanted, rtol=1e-4, atol=1e-5)
    if tangential:
        assert float((whole * weight.grad.double()).sum()) > 0  # type: ignore[union-attr]  # fed above


def test_a_tangential_gradient_is_projected_and_decides_the_basis() -> None:
    """Below full rank too: R = G_tan·P, and P spans the leading directions of G_tan, not of G."""
    weight, optimizer = made((40, 24), rank=4, tangential=True, **EXACT)
    before = weight.detach().clone()
    gradient = before * 50 + gradients((40, 24), 1)[0]
    unit = before / before.norm(dim=1, keepdim=True)
    tangent = gradient - (gradient * unit).sum(1, keepdim=True) * unit
    feed(weight, optimizer, [gradient])
    state = optimizer.state[weight]
    torch.testing.assert_close(state["exp_avg"] / 0.1, tangent @ state["basis"], rtol=1e-3, atol=1e-4)
    best = torch.linalg.svd(tangent.T).U[:, :4]
    assert captured_energy(tangent.T, state["basis"]) > 0.99 * captured_energy(tangent.T, best)
    assert captured_energy(gradient.T, state["basis"]) < 0.9 * captured_energy(
        gradient.T, torch.linalg.svd(gradient.T).U[:, :4]
    )


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("tangential", [False, True])
@pytest.mark.parametrize("norm", ["out", "in"])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_at_full_rank_it_is_weight_normalised_adamw(shape: tuple[int, int], norm: str, tangential: bool) -> None:
    """100 steps against the float64 reference; m has moved, decayed, and stays moved."""
    settings: dict[str, Any] = {"lr": 3e-3, "scale": 1.0, "weight_decay": 0.5}
    weight, optimizer = made(
        shape, rank=16, norm=norm, tangential=tangential, update_proj_gap=1000, **settings, **EXACT
    )
    before, fed, dim = weight.detach().clone(), gradients(shape, 100), 1 if norm == "out" else 0
    wanted, m = weight_normalised(before, fed, dim, tangential, 3e-3, 1.0, 0.5)
    feed(weight, optimizer, fed)
    assert float((weight.detach().double() - wanted).abs().max()) < 2e-5
    torch.testing.assert_close(weight.detach().double().norm(dim=dim), m.flatten(), rtol=2e-5, atol=0)
    assert float((m.flatten() / before.norm(dim=dim) - 1).abs().median()) > 0.05
    without, _ = weight_normalised(before, fed, dim, tangential, 3e-3, 1.0, 0.0)
    other, _ = weight_normalised(before, fed, dim, not tangential, 3e-3, 1.0, 0.5)
    # The bound can fail: what decay and the tangential part do is far above it.
    assert min(float((wanted - each).abs().max()) for each in (without, other)) > 1e-3


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_without_normalisation_at_full_rank_it_is_adamw(shape: tuple[int, int]) -> None:
    """100 steps against torch.optim.AdamW, decay on; and so it is for a group without a rank."""
    common: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}
    fed = gradients(shape, 100)
    theirs, _ = made(shape)
    reference = feed(theirs, torch.optim.AdamW([theirs], **common), fed)
    for rank in (16, None):
        weight, optimizer = made(shape, rank=rank, scale=1.0, norm=None, update_proj_gap=1000, **common, **EXACT)
        assert float((feed(weight, optimizer, fed) - reference).abs().max()) < 2e-6


@pytest.mark.usefixtures("identity")
def test_scale_and_rate_act_where_they_should() -> None:
    """`scale` is the direction's alone, `lr` everything's; both from the group."""
    fed = gradients((24, 16), 30)
    weight, optimizer = made((24, 16), rank=16, update_proj_gap=1000, **EXACT)
    before = weight.detach().clone()
    optimizer.param_groups[0].update(lr=5e-3, scale=0.3)
    wanted, _ = weight_normalised(before, fed, 1, False, 5e-3, 0.3, 0.0)
    assert float((feed(weight, optimizer, fed).double() - wanted).abs().max()) < 1e-5


@pytest.mark.parametrize("norm", ["out", "in", None])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_the_direction_moves_by_rank_r(
    shape: tuple[int, int], norm: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V's step has rank r exactly, W's (with normalisation) more."""
    steps: list[Tensor] = []
    set_magnitude = GradNormLoRP._set_magnitude

    def spy(self: Any, moved: Tensor, *rest: Any) -> None:
        steps.append(moved - before)
        set_magnitude(self, moved, *rest)

    monkeypatch.setattr(GradNormLoRP, "_set_magnitude", spy)
    weight, optimizer = made(shape, rank=5, norm=norm, lr=0.1, **EXACT)
    for gradient in gradients(shape, 3):
        before = weight.detach().clone()
        feed(weight, optimizer, [gradient])
        whole = weight.detach() - before
        assert torch.linalg.matrix_rank(whole if norm is None else steps[-1], rtol=1e-4) == 5
        assert norm is None or torch.linalg.matrix_rank(whole, rtol=1e-4) > 5
    assert len(steps) == (0 if norm is None else 3)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_which_side_is_projected(shape: tuple[int, int], proj_type: str) -> None:
    """GaLore's dialect: "std" is right for m ≥ n; the moments have the other side."""
    weight, optimizer = made(shape, rank=5, proj_type=proj_type, **EXACT)
    feed(weight, optimizer, gradients(shape, 1))
    right = {"std": shape[0] >= shape[1], "reverse_std": shape[0] < shape[1], "left": False, "right": True}[proj_type]
    state = optimizer.state[weight]
    assert projects_right(weight.shape, proj_type) == right
    assert state["basis"].shape == (shape[1] if right else shape[0], 5)
    assert state["exp_avg"].shape == ((shape[0], 5) if right else (5, shape[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_magnitude_that_crosses_zero_is_a_signed_scalar(dtype: torch.dtype) -> None:
    """The direction held fixed (scale 0), W = m·v with m by scalar Adam in float64, signed, through zero."""
    weight, optimizer = made((6, 4), dtype, rank=4, lr=0.05, scale=0.0, **EXACT)
    start = weight.detach().double()
    m = start.norm(dim=1, keepdim=True)
    unit, adam, crossed = start / m, Adam(), torch.zeros(6, 1, dtype=torch.bool)
    for number in range(60):
        # Towards zero, through it, and later back again: what the old sign leaves in the moments shows.
        gradient = unit * (1.0 + 0.2 * torch.arange(6).view(6, 1)) * (1 if number < 35 else -1)
        feed(weight, optimizer, [gradient])
        m = m - 0.05 * adam((gradient.to(dtype).double() * unit).sum(1, keepdim=True))
        crossed |= m < 0
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        assert float((weight.detach().double() - m * unit).abs().max()) < tolerance, number
    assert bool(crossed.all()) and bool((m != m.abs()).any())


# --- bfloat16 ---------------------------------------------------------------------------------------


def nearest(target: Tensor, value: Tensor, generator: torch.Generator) -> None:
    target.copy_(value.view_as(target))


@pytest.mark.parametrize("norm", ["out", None])
@pytest.mark.parametrize("rank", [32, None])
def test_bfloat16_follows_small_steps(norm: str | None, rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms that a gradient pushes up by 10 % in 200 steps: within 0.5 % of float32; rounded to nearest they stay."""

    def grown(dtype: torch.dtype) -> Tensor:
        weight, optimizer = made((64, 32), dtype, rank=rank, lr=5e-4 if norm and rank else 9e-5, norm=norm,
                                 scale=1.0, bits=32, projector_bits=32)  # fmt: skip
        if norm and rank:
            optimizer.param_groups[0]["scale"] = 0.1
        before = weight.detach().float().norm(dim=1)
        noise = torch.Generator().manual_seed(1)
        for _ in range(200):
            push = -weight.detach().float() * 30 + 0.05 * torch.randn(64, 32, generator=noise)
            feed(weight, optimizer, [push])
        return (weight.detach().float().norm(dim=1) / before).mean()

    wanted, ours = float(grown(torch.float32)), float(grown(torch.bfloat16))
    assert 1.05 < wanted < 1.2
    assert ours == pytest.approx(wanted, abs=0.005)
    monkeypatch.setattr(module, "round_into", nearest)
    if norm is None or rank is None:
        assert float(grown(torch.bfloat16)) < 1 + 0.5 * (wanted - 1)


def test_rounding_is_fair_and_keyed() -> None:
    """Unbiased over keys, on one of the two neighbours, exact on what bfloat16 holds, the same for the same key."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(4097, generator=generator) * 10.0 ** torch.randint(-20, 20, (4097,), generator=generator)
    down = (value.view(torch.int32) & -0x10000).view(torch.float32)
    up = ((value.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    total, seen = torch.zeros(4097, dtype=torch.float64), set()
    for key in range(400):
        target = torch.empty(4097, dtype=torch.bfloat16)
        quantised.round_into(target, value, keyed_generator(value.device, key))
        assert bool(((target.float() == down) | (target.float() == up)).all())
        total += (target.double() - value.double()) / (up - down).double().abs()
        seen.add(target.view(torch.int16).numpy().tobytes())
    assert len(seen) == 400
    bias = total / 400
    # Deviation of one element's mean: at most 0.5/√400; of the mean over elements: 0.5/√(400·4097).
    assert float(bias.abs().max()) < 0.025 * 5 and abs(float(bias.mean())) < 5 * 0.5 / (400 * 4097) ** 0.5
    again = [torch.empty(4097, dtype=torch.bfloat16) for _ in range(2)]
    for target in again:
        quantised.round_into(target, value, keyed_generator(value.device, 3, 4))
    assert torch.equal(again[0], again[1])
    target = torch.empty(6, dtype=torch.bfloat16)
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, 1.0, -1.5])
    for key in range(50):
        quantised.round_into(target, special, keyed_generator(value.device, key))
        assert torch.equal(target.float().nan_to_num(7.0, 8.0, 9.0), special.nan_to_num(7.0, 8.0, 9.0))


def test_rounding_in_parts_covers_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "CHUNK", 512)
    value, target = torch.randn(40, 33), torch.zeros(40, 33, dtype=torch.bfloat16)
    quantised.round_into(target, value, keyed_generator(value.device, 1))
    assert float((target.float() / value - 1).abs().max()) < 2**-7
    ones = torch.full((4 * 512,), 1 + 2**-9)
    many = torch.zeros(4 * 512, dtype=torch.bfloat16)
    quantised.round_into(many, ones, keyed_generator(value.device, 1))
    parts = many.view(4, 512)
    assert all(not torch.equal(parts[0], parts[other]) for other in (1, 2, 3)), "each part has noise of its own"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_others_do_to_the_weights_is_taken_over(dtype: torch.dtype) -> None:
    """W·1.05 between two steps: m goes with it, where the next step moves nothing; and it stays that way."""
    weight, optimizer = made((64, 32), dtype, rank=8, lr=1e-3, **EXACT)
    fed = gradients((64, 32), 12)
    feed(weight, optimizer, fed[:5])
    with torch.no_grad():
        weight.mul_(1.05)
    changed = weight.detach().float().norm(dim=1)
    optimizer.param_groups[0]["lr"] = 0.0
    before = optimizer.state[weight].get("magnitude", changed / 1.05)
    after = feed(weight, optimizer, fed[5:6]).float()
    torch.testing.assert_close(after.norm(dim=1), changed, rtol=1e-6 if dtype == torch.float32 else 6e-3, atol=0)
    if dtype == torch.bfloat16:
        ratio = optimizer.state[weight]["magnitude"] / before
        assert float((ratio - 1.05).abs().max()) < 5e-3 and float((ratio.mean() - 1.05).abs()) < 5e-4
    feed(weight, optimizer, fed[6:])
    torch.testing.assert_close(weight.detach().float().norm(dim=1), changed, rtol=5e-3, atol=0)


def test_untouched_weights_are_a_factor_of_one() -> None:
    """At a rate of zero m keeps its bits, however often W is rounded anew, though ‖W‖ differs from m."""
    weight, optimizer = made((64, 32), torch.bfloat16, rank=8, lr=1e-3, **EXACT)
    fed = gradients((64, 32), 30)
    feed(weight, optimizer, fed[:10])
    kept = optimizer.state[weight]["magnitude"].clone()
    assert not torch.equal(kept, weight.detach().float().norm(dim=1))
    optimizer.param_groups[0]["lr"] = 0.0
    feed(weight, optimizer, fed[10:])
    assert torch.equal(optimizer.state[weight]["magnitude"], kept)
    torch.testing.assert_close(weight.detach().float().norm(dim=1), kept, rtol=3e-3, atol=0)


# --- few bits ---------------------------------------------------------------------------------------


def regression(**settings: Any) -> tuple[list[float], Tensor]:
    """Losses on a linear problem of 128 × 96 and the weight at its end."""
    generator = torch.Generator().manual_seed(0)
    inputs, target = torch.randn(256, 96, generator=generator), torch.randn(128, 96, generator=generator) / 10
    layer = nn.Linear(96, 128, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(128, 96, generator=generator) / 10)
    optimizer = GradNormLoRP(layer.parameters(), **{"lr": 1e-2, "scale": 1.0, **settings})
    losses = []
    for _ in range(60):
        loss = (layer(inputs) - inputs @ target.T).square().mean()
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses, layer.weight.detach()


@pytest.mark.parametrize("rank", [48, None])
@pytest.mark.parametrize(("bits", "loss_bound", "distance_bound"), [(8, 0.005, 0.2), (4, 0.2, 0.35)])
def test_few_bits_follow_32(rank: int | None, bits: int, loss_bound: float, distance_bound: float) -> None:
    """Losses over the whole trajectory, in units of the first, and the end of the path, in units of its length.

    At rank 48 the bases part with the rounding: another path of the same losses.
    """
    losses, end = regression(rank=rank, update_proj_gap=20, **EXACT)
    ours, our_end = regression(rank=rank, update_proj_gap=20, bits=bits, projector_bits=32)
    assert losses[-1] < 0.25 * losses[0]
    assert ours != losses, "few bits were in use"
    worst = max(abs(a - b) for a, b in zip(ours, losses, strict=True)) / losses[0]
    assert worst < loss_bound
    _, start = regression(rank=rank, lr=0.0)
    assert float((our_end - end).norm() / (end - start).norm()) < distance_bound


@pytest.mark.parametrize(("projector_bits", "bound"), [(16, 0.002), (8, 0.005), (4, 0.05)])
def test_a_basis_in_few_bits_follows_32(projector_bits: int, bound: float) -> None:
    losses, _ = regression(rank=48, update_proj_gap=20, **EXACT)
    ours, _ = regression(rank=48, update_proj_gap=20, bits=32, projector_bits=projector_bits)
    assert ours != losses
    assert max(abs(a - b) for a, b in zip(ours, losses, strict=True)) / losses[0] < bound


@pytest.mark.parametrize("numel", [4096, 4097, 5001, 70_000])
@pytest.mark.parametrize("bits", [8, 4])
def test_moments_round_trip(bits: int, numel: int) -> None:
    """Error within half the widest gap of each code, for the block's maximum; bytes as announced; odd sizes."""
    generator = torch.Generator().manual_seed(0)
    moment = torch.randn(numel, generator=generator) * torch.rand(numel, generator=generator) ** 4
    block = quantised.MOMENT_BLOCK[bits]
    for signed in (True, False):
        value = moment if signed else moment.square()
        codes, absmax = quantised.encode_moment(value, bits, signed)
        assert codes.dtype == torch.uint8 and absmax.dtype == torch.float32
        assert codes.nbytes + absmax.nbytes == quantised.moment_bytes(numel, bits)
        back = quantised.decode_moment(codes, absmax, value.shape, bits, signed)
        assert back.shape == value.shape and back.dtype == torch.float32
        padded = nn.functional.pad(value.abs(), (0, -numel % block)).view(-1, block)
        assert torch.equal(absmax, padded.amax(1))
        error = ((back - value).abs() / absmax.repeat_interleave(block)[:numel]).max()
        code = quantised._code(bits, signed, value.device)
        # −1 is no signed code.
        lowest = 1 + float(code[0]) if signed else float(code[0])
        assert float(error) <= max(float(code.diff().max()) / 2, lowest) + 2e-5
        assert float(error) < {8: 0.02, 4: 0.32 if signed else 0.07}[bits]
        if not signed:
            again = quantised.encode_moment(back, bits, signed)
            assert torch.equal(quantised.decode_moment(*again, value.shape, bits, signed), back)


def test_a_second_moment_never_decodes_to_zero_in_four_bits() -> None:
    """Where its block holds anything: at least a sixteenth of the maximum; an all-zero block stays zero."""
    value = torch.zeros(128 * 40)
    value[: 128 * 39 : 128] = 10.0 ** torch.linspace(-30, 20, 39)
    value[5] = 1e-37
    back = quantised.decode_moment(*quantised.encode_moment(value, 4, False), value.shape, 4, False).view(40, 128)
    for row, maximum in zip(back[:39], value[: 128 * 39 : 128], strict=True):
        assert float(row.min()) == pytest.approx(float(maximum) / 16, rel=1e-5)
        assert float(row.max()) == pytest.approx(float(maximum), rel=1e-5)
    assert bool((back[39] == 0).all())


@pytest.mark.parametrize(("bits", "bound"), [(32, 0.0), (16, 2**-8), (8, 0.5 / 127 + 1e-6), (4, 0.16)])
@pytest.mark.parametrize(("rows", "rank"), [(96, 7), (65, 9), (64, 64)])
def test_bases_round_trip(rows: int, rank: int, bits: int, bound: float) -> None:
    """Error against the largest element of the column (8), of 64 elements (4), of the element itself (16)."""
    basis = torch.linalg.qr(torch.randn(rows, rank))[0]
    codes, scale = quantised.encode_basis(basis, bits)
    held = codes.nbytes + (0 if scale is None else scale.nbytes)
    assert held == quantised.basis_bytes(rows, rank, bits)
    back = quantised.decode_basis(codes, scale, (rows, rank), bits)
    assert back.shape == basis.shape and back.dtype == torch.float32
    unit = {8: basis.abs().amax(0), 4: basis.abs().max()}.get(bits, basis.abs())
    assert float(((back - basis).abs() / unit).max()) <= bound
    assert bits == 32 or not torch.equal(back, basis)
    empty = quantised.decode_basis(*quantised.encode_basis(torch.zeros(rows, rank), bits), (rows, rank), bits)
    assert bool((empty == 0).all())


def test_small_moments_stay_in_float32() -> None:
    assert [quantised.moment_bits(n, 8) for n in (4095, 4096)] == [32, 8]
    assert [quantised.moment_bytes(n, 4) for n in (4095, 4096, 4097)] == [4 * 4095, 2048 + 4 * 32, 2049 + 4 * 33]


# --- the subspace -----------------------------------------------------------------------------------


def orthonormal(basis: Tensor) -> bool:
    return float((basis.T @ basis - torch.eye(basis.shape[1])).abs().max()) < 1e-5


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("shape", "rank"), [((300, 90), 16), ((90, 300), 16), ((200, 200), 40), ((150, 400), 8)])
def test_a_basis_captures_what_the_svd_does(shape: tuple[int, int], rank: int, power: float) -> None:
    """Spectra σᵢ = i^−power: at least 99 % of the best energy, leading directions first, and the same again."""
    generator = torch.Generator().manual_seed(1)
    side = min(shape)
    left = torch.linalg.qr(torch.randn(shape[0], side, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(shape[1], side, generator=generator))[0]
    matrix = (left * torch.arange(1, side + 1) ** -power) @ right.T
    first, again = (leading_basis(matrix, rank, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again) and orthonormal(first) and first.is_contiguous()
    best = torch.linalg.svd(matrix, full_matrices=False).U[:, :rank]
    assert captured_energy(matrix, first) > 0.99 * captured_energy(matrix, best)
    column_energy = (first.T @ matrix).norm(dim=1)
    assert bool((column_energy.diff() < 1e-4).all())
    if 2 * (rank + 32) < shape[0]:
        assert not torch.equal(first, leading_basis(matrix, rank, torch.Generator().manual_seed(6)))


SCALES = [1.0, 1e30, 1e-30, 1e36, 1e-38]


@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (60, 60)])
def test_bases_of_odd_matrices_are_orthonormal(shape: tuple[int, int]) -> None:
    """Zero, rank 1, one entry, huge and tiny: an orthonormal basis that holds what there is."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(shape, generator=generator)
    noise /= noise.abs().max()
    one = torch.outer(noise[:, 0], noise[0])
    one /= one.abs().max()
    entry = torch.zeros(shape)
    entry[3, 4] = 1.0
    assert orthonormal(leading_basis(torch.zeros(shape), 6, generator))
    best = captured_energy(noise, torch.linalg.svd(noise).U[:, :6])
    for scale in SCALES:
        for matrix, least in ((noise, 0.8 * best), (one, 0.999), (entry, 0.999)):
            basis = leading_basis(matrix * scale, 6, generator)
            assert orthonormal(basis), scale
            assert captured_energy(matrix, basis) > least, scale


@pytest.mark.parametrize("rank", [0, -1, 41])
def test_a_rank_that_cannot_be_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank must lie in 1\.\.40 for a matrix of shape \(40, 300\), got {rank}"):
        leading_basis(torch.zeros(40, 300), rank)


def test_captured_energy_of_zero_is_one() -> None:
    assert captured_energy(torch.zeros(4, 4), torch.eye(4)[:, :2]) == 1.0
    assert captured_energy(torch.eye(4), torch.eye(4)[:, :2]) == 0.5


def test_keys_tell_their_parts_apart() -> None:
    keys = [
        (0,),
        (1,),
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (1, 1, 1),
        (2**63, 1),
        (12, 3),
        (1, 23),
        (5, 1, 1, 1),
        (5, 1, 1, 2),
    ]
    drawn = {tuple(torch.randn(3, generator=keyed_generator(torch.device("cpu"), *key)).tolist()) for key in keys}
    assert len(drawn) == len(keys)


# --- refreshes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("matrices", "gap"), [(7, 5), (3, 10), (12, 4), (5, 1), (1, 6)])
def test_matrices_take_turns(matrices: int, gap: int) -> None:
    """After the first step at most ⌈K/gap⌉ new bases a step, each matrix one every `gap` steps, kept in between."""
    params = [nn.Parameter(torch.randn(12, 8)) for _ in range(matrices)]
    others = [nn.Parameter(torch.randn(3)) for _ in range(2)]
    groups = [{"params": others, "rank": None}, {"params": params[: matrices // 2 + 1]}]
    groups += [{"params": params[matrices // 2 + 1 :]}] * (matrices > 1)
    optimizer = GradNormLoRP(groups, rank=3, update_proj_gap=gap, **EXACT)
    bases: list[list[Tensor]] = []
    for _ in range(4 * gap + 1):
        for param in (*params, *others):
            param.grad = torch.randn_like(param)
        optimizer.step()
        bases.append([optimizer.state[param]["basis"].clone() for param in params])
    changed = [[not torch.equal(a, b) for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(bases)]
    assert max(map(sum, changed)) <= -(matrices // -gap)
    for number in range(matrices):
        steps = [step for step, each in enumerate(changed) if each[number]]
        assert steps and steps[0] < gap and all(b - a == gap for a, b in itertools.pairwise(steps))
        assert optimizer.state[params[number]]["refreshes"] == len(steps) + 1


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("shape", [(160, 48), (48, 160)])
@pytest.mark.parametrize("on_refresh", ["reset", "keep", "rotate"])
def test_what_becomes_of_the_moments(on_refresh: str, shape: tuple[int, int], bits: int) -> None:
    """At a refresh: begun anew, kept as numbers, or rotated by explicit matrices. m's moments go on throughout."""
    weight, optimizer = made(
        shape, rank=32, update_proj_gap=3, on_refresh=on_refresh, scale=1.0, norm=None, bits=bits, projector_bits=32
    )
    fed, right, shape_inside = gradients(shape, 4), shape[0] > shape[1], ((160, 32) if shape[0] > 48 else (32, 160))
    feed(weight, optimizer, fed[:3])

    def moment(key: str, signed: bool) -> Tensor:
        state = optimizer.state[weight]
        if bits == 32:
            return state[key].clone()
        return quantised.decode_moment(state[key], state[f"{key}_absmax"], torch.Size(shape_inside), bits, signed)

    first, second, old = moment("exp_avg", True), moment("exp_avg_sq", False), optimizer.state[weight]["basis"].clone()
    before = weight.detach().clone()
    feed(weight, optimizer, fed[3:])
    new = optimizer.state[weight]["basis"]
    assert not torch.equal(new, old) and optimizer.state[weight]["refreshes"] == 2
    age = {"reset": 1, "keep": 4, "rotate": 4}[on_refresh]
    assert optimizer.state[weight]["age"] == age
    if on_refresh == "reset":
        first, second = torch.zeros_like(first), torch.zeros_like(second)
    if on_refresh == "rotate":
        # The moment of G = M·Pᵀ (or P·M) in the new coordinates.
        turn = old.T @ new
        whole, square = (first @ turn, second @ turn**2) if right else (turn.T @ first, turn.T**2 @ second)
        first, second = whole, square
    inside = fed[3] @ new if right else new.T @ fed[3]
    first, second = 0.9 * first + 0.1 * inside, 0.999 * second + 0.001 * inside**2
    for key, signed, wanted in (("exp_avg", True, first), ("exp_avg_sq", False, second)):
        error = float((moment(key, signed) - wanted).abs().max() / wanted.abs().max())
        assert error < {32: 1e-5, 8: 0.02, 4: 0.33}[bits], key
    step = (first / (1 - 0.9**age)) / ((second / (1 - 0.999**age)).sqrt() + 1e-8)
    moved = before - 1e-3 * (step @ new.T if right else new @ step)
    if bits == 32 or on_refresh == "reset":
        torch.testing.assert_close(weight.detach(), moved, rtol=0, atol=2e-6)


def test_the_magnitudes_moments_outlive_a_refresh() -> None:
    weight, optimizer = made((24, 16), rank=4, update_proj_gap=2, lr=1e-4, on_refresh="reset", **EXACT)
    adam = Adam()
    for gradient in gradients((24, 16), 7):
        before = weight.detach().double()
        adam((gradient.double() * before).sum(1) / before.norm(dim=1))
        feed(weight, optimizer, [gradient])
    state = optimizer.state[weight]
    assert state["refreshes"] == 4 and state["magnitude_age"] == 7 and state["age"] == 1
    torch.testing.assert_close(state["magnitude_exp_avg"].double(), adam.first, rtol=1e-4, atol=1e-5)


def test_seeds_and_places_differ() -> None:
    """Range finder and rounding depend on seed and on the parameter's place, not on torch's own generator."""

    def ends(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        params = [nn.Parameter(torch.full((96, 80), 0.1, dtype=dtype)) for _ in range(2)]
        params += [nn.Parameter(torch.full((96,), 0.1, dtype=dtype)) for _ in range(2)]
        optimizer = GradNormLoRP(params, rank=4, seed=seed, lr=1e-4, **EXACT)
        torch.randn(3)
        for gradient in gradients((96, 80), 2):
            for param in params:
                param.grad = (gradient if param.ndim == 2 else gradient[:, 0]).to(dtype)
            optimizer.step()
        return [param.detach() for param in params]

    first, again, other = ends(1), ends(1), ends(2)
    assert same(dict(enumerate(first)), dict(enumerate(again)))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])
    low, low_other = ends(1, torch.bfloat16), ends(2, torch.bfloat16)
    assert not torch.equal(low[2], low[3]) and not torch.equal(low[2], low_other[2])


def test_every_draw_has_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed, parameter, step or number of the basis, purpose: no two draws of a run alike, all of the seed."""
    keys: list[tuple[int, ...]] = []

    def spy(device: torch.device, *key: int) -> torch.Generator:
        keys.append(key)
        return keyed_generator(device, *key)

    monkeypatch.setattr(module, "keyed_generator", spy)
    params, optimizer = two(torch.bfloat16, 8, 8, seed=77)
    walk(params, optimizer, 0, 9)
    assert len(set(keys)) == len(keys) == 4 * 9 + 2 * 3
    assert {key[0] for key in keys} == {77} and {key[1] for key in keys} == {0, 1, 2, 3}


# --- numbers that are none --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 3, 4])
@pytest.mark.parametrize("rank", [8, None])
@pytest.mark.parametrize(("dtype", "norm", "tangential"), [
    (torch.float32, "out", False), (torch.float32, "in", True), (torch.float32, None, False),
    (torch.bfloat16, "out", True),
])  # fmt: skip
def test_a_gradient_that_is_not_finite_counts_as_zero(
    dtype: torch.dtype, norm: str | None, tangential: bool, rank: int | None, where: int, bad: float
) -> None:
    """At the first step, a refresh or between: weights and state finite; as with a gradient of zeros between."""
    shape, fed = (96, 64), gradients((96, 64), 6)
    spoilt = [gradient.clone() for gradient in fed]
    spoilt[where][7, 9] = bad
    settings: dict[str, Any] = {"rank": rank, "norm": norm, "tangential": tangential, "update_proj_gap": 3}
    weight, optimizer = made(shape, dtype, **settings)
    for number, gradient in enumerate(spoilt):
        before = weight.detach().clone()
        feed(weight, optimizer, [gradient])
        assert bool(weight.isfinite().all())
        assert number == where or not torch.equal(weight, before)
    state = optimizer.state[weight]
    assert all(bool(value.isfinite().all()) for value in state.values() if isinstance(value, Tensor))
    if where == 1 or rank is None:
        zero = [torch.zeros(shape) if number == where else gradient for number, gradient in enumerate(fed)]
        other, theirs = made(shape, dtype, **settings)
        assert torch.equal(feed(other, theirs, zero), weight)


def test_zero_gradients_and_none(recwarn: pytest.WarningsRecorder) -> None:
    """A gradient of zeros, from the first step on, moves nothing; without one nothing is looked at."""
    for settings in ({"rank": 4}, {"rank": None}, {"rank": 4, "norm": None}, {"rank": 4, "tangential": True}):
        weight, optimizer = made((96, 64), **settings)
        before = weight.detach().clone()
        after = feed(weight, optimizer, [torch.zeros(96, 64)] * 3)
        torch.testing.assert_close(after, before, rtol=3e-7, atol=0)
        assert not torch.equal(feed(weight, optimizer, gradients((96, 64), 1)), before)
    weight, optimizer = made((12, 8), rank=4)
    optimizer.step()
    assert not optimizer.state
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = GradNormLoRP(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="parameter 0 has a sparse one: embed with sparse=False"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["out", "in"])
def test_units_of_zeros_come_alive(norm: str, dtype: torch.dtype) -> None:
    """Of a matrix that is zero in part or as a whole; and they go on growing after their first step."""
    for zeros in (slice(0, 3), slice(None)):
        weight, optimizer = made((24, 16), dtype, rank=8, lr=1e-2, norm=norm, **EXACT)
        with torch.no_grad():
            (weight if norm == "out" else weight.T)[zeros] = 0
        fed = gradients((24, 16), 1) * 6
        lengths = []
        for gradient in fed:
            feed(weight, optimizer, [gradient])
            units = weight.detach().float().norm(dim=1 if norm == "out" else 0)[zeros]
            assert bool(weight.isfinite().all()) and bool((units > 0).all())
            lengths.append(units)
        assert bool((lengths[-1] > lengths[0]).all())


def test_a_matrix_that_changes_its_shape_is_told() -> None:
    weight, optimizer = made((12, 8), rank=4)
    feed(weight, optimizer, gradients((12, 8), 1))
    weight.data = weight.data.flatten()
    weight.grad = torch.randn(96)
    with pytest.raises(RuntimeError, match=r"parameter 0 was a matrix and is \(96,\) now: something has flattened"):
        optimizer.step()


# --- state ------------------------------------------------------------------------------------------


def two(dtype: torch.dtype, bits: int, projector_bits: int, **settings: Any) -> tuple[list[nn.Parameter], Any]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(160, 64), (48, 160), (70, 61), (7,)]
    params = [nn.Parameter((torch.randn(shape, generator=generator) / 8).to(dtype)) for shape in shapes]
    groups = [{"params": params[:2], "rank": 32}, {"params": params[2:]}]
    return params, GradNormLoRP(groups, bits=bits, projector_bits=projector_bits, update_proj_gap=4, **settings)


def walk(params: list[nn.Parameter], optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        for number, param in enumerate(params):
            param.grad = gradients(tuple(param.shape), 1, seed=100 * step + number)[0].to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "projector_bits"), BITS)
@pytest.mark.parametrize("stop", [3, 4])
def test_state_survives_a_file(stop: int, bits: int, projector_bits: int, dtype: torch.dtype) -> None:
    """Every tensor's dtype and bits come back, and training goes on to the same bits, refreshes included."""
    params, optimizer = two(dtype, bits, projector_bits, weight_decay=0.1)
    walk(params, optimizer, 0, stop)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": [param.data for param in params]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others, resumed = two(dtype, bits, projector_bits, weight_decay=0.7, lr=1.0)
    for param, value in zip(others, saved["params"], strict=True):
        param.data.copy_(value)
    resumed.load_state_dict(saved["optimizer"])
    assert len(optimizer.state) == len(resumed.state) == 4
    for param, other in zip(params, others, strict=True):
        assert same(optimizer.state[param], resumed.state[other])
        assert bits == 32 or param.numel() < 4096 or optimizer.state[param]["exp_avg"].dtype == torch.uint8
    walk(params, optimizer, stop, 10)
    walk(others, resumed, stop, 10)
    assert all(same(optimizer.state[param], resumed.state[other]) for param, other in zip(params, others, strict=True))
    assert all(torch.equal(param, other) for param, other in zip(params, others, strict=True))
    assert optimizer.state[params[0]]["refreshes"] == 3


def test_a_loaded_state_is_a_copy() -> None:
    params, optimizer = two(torch.float32, 8, 8)
    walk(params, optimizer, 0, 2)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    others, resumed = two(torch.float32, 8, 8)
    resumed.load_state_dict(saved)
    walk(others, resumed, 2, 5)
    assert same(saved["state"], kept["state"])


@pytest.mark.parametrize("how", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
@pytest.mark.parametrize("bits", [8, 4])
def test_copies_go_on_alike(bits: int, how: Callable[[Any], Any]) -> None:
    params, optimizer = two(torch.float32, bits, 8)
    walk(params, optimizer, 0, 3)
    others, copied = how((params, optimizer))
    walk(params, optimizer, 3, 8)
    walk(others, copied, 3, 8)
    assert all(torch.equal(param, other) for param, other in zip(params, others, strict=True))
    assert copied.gradient_norm() is None
    copied.step_after_backward()


@pytest.mark.parametrize("change", ["rank", "shape", "bits", "groups"])
def test_the_state_of_another_model_is_refused(change: str) -> None:
    """And nothing is taken over: the optimizer goes on as it was."""
    weight, optimizer = made((160, 64), rank=32, bits=8)
    feed(weight, optimizer, gradients((160, 64), 2))
    shape = (160, 80) if change == "shape" else (160, 64)
    other, refusing = made(shape, rank=16 if change == "rank" else 32, bits=4 if change == "bits" else 8)
    if change == "groups":
        refusing.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "rank": None})
    before = {key: value for key, value in refusing.param_groups[0].items() if key != "params"}
    text = {
        "rank": "rank",
        "bits": "bits",
        "shape": "a parameter of shape (160, 80) and rank 32 has",
        "groups": "different number of parameter groups",
    }[change]
    with pytest.raises(ValueError) as error:
        refusing.load_state_dict(optimizer.state_dict())
    assert text in str(error.value)
    assert {key: value for key, value in refusing.param_groups[0].items() if key != "params"} == before
    feed(other, refusing, gradients(shape, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_parts_change_nothing(bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain step in parts of 512 elements, odd remainder included, gives the bits of a step as a whole."""
    fed = gradients((97, 53), 4)
    ends = []
    for chunk in (1 << 24, 512, 1280):
        monkeypatch.setattr(module, "CHUNK", chunk)
        weight, optimizer = made((97, 53), dtype, bits=bits, weight_decay=0.1)
        feed(weight, optimizer, fed)
        ends.append({"weight": weight.detach(), **optimizer.state[weight]})
    for end in ends[1:]:
        assert end.keys() == ends[0].keys()
        for key, value in ends[0].items():
            assert same(end[key].flatten(), value.flatten()) if isinstance(value, Tensor) else end[key] == value, key


def test_closures_and_schedulers() -> None:
    """The loss of a closure is returned, with gradients on; a scheduler's rate is in force."""
    layer = nn.Linear(16, 12)
    optimizer = GradNormLoRP(layer.parameters(), lr=0.1, rank=4)
    assert [(group["rank"], len(group["params"])) for group in optimizer.param_groups] == [(4, 1), (None, 1)]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = layer(torch.ones(3, 16)).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first.requires_grad
    scheduler.step()
    before = [param.detach().clone() for param in layer.parameters()]
    assert optimizer.step(closure) < first
    for param, kept in zip(layer.parameters(), before, strict=True):
        torch.testing.assert_close(param.detach(), kept, rtol=3e-7, atol=0)


# --- settings ---------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1e-3}, "lr must be a finite number, 0 or more, got -0.001"),
    ({"lr": math.nan}, "lr must be a finite number, 0 or more, got nan"),
    ({"lr": "fast"}, "lr must be a finite number, 0 or more, got 'fast'"),
    ({"lr": True}, "lr must be a finite number, 0 or more, got True"),
    ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
    ({"rank": 4.0}, "rank must be an integer of at least 1, got 4.0"),
    ({"rank": True}, "rank must be an integer of at least 1, got True"),
    ({"rank": 9}, "rank=9 exceeds the projected side, 8, of a parameter of shape (12, 8): lower it"),
    ({"rank": 13, "proj_type": "left"}, "rank=13 exceeds the projected side, 12, of a parameter of shape (12, 8)"),
    ({"update_proj_gap": 0}, "update_proj_gap must be an integer of at least 1, got 0"),
    ({"update_proj_gap": None}, "update_proj_gap must be an integer of at least 1, got None"),
    ({"scale": -1}, "scale must be a finite number, 0 or more, got -1"),
    ({"scale": math.inf}, "scale must be a finite number, 0 or more, got inf"),
    ({"proj_type": "full"}, "proj_type must be one of 'std', 'reverse_std', 'left', 'right', got 'full'"),
    ({"betas": (0.9, 1.0)}, "betas must be two numbers of at least 0 and below 1, got (0.9, 1.0)"),
    ({"betas": 0.9}, "betas must be two numbers of at least 0 and below 1, got 0.9"),
    ({"betas": (0.9, math.nan)}, "betas must be two numbers of at least 0 and below 1, got (0.9, nan)"),
    ({"betas": ("a", 0.9)}, "betas must be two numbers of at least 0 and below 1, got ('a', 0.9)"),
    ({"betas": (None, 0.9)}, "betas must be two numbers of at least 0 and below 1, got (None, 0.9)"),
    ({"betas": (0.9, 0.9, 0.9)}, "betas must be two numbers of at least 0 and below 1"),
    ({"eps": -1e-8}, "eps must be a finite number, 0 or more, got -1e-08"),
    ({"weight_decay": -0.1}, "weight_decay must be a finite number, 0 or more, got -0.1"),
    ({"weight_decay": None}, "weight_decay must be a finite number, 0 or more, got None"),
    ({"bits": 16}, "bits must be one of 4, 8, 32, got 16"),
    ({"bits": 8.0}, "bits must be one of 4, 8, 32, got 8.0"),
    ({"projector_bits": 2}, "projector_bits must be one of 4, 8, 16, 32, got 2"),
    ({"norm": "row"}, "norm must be one of 'out', 'in', None, got 'row'"),
    ({"norm": False}, "norm must be one of 'out', 'in', None, got False"),
    ({"tangential": 1}, "tangential must be one of True, False, got 1"),
    ({"on_refresh": "drop"}, "on_refresh must be one of 'reset', 'keep', 'rotate', got 'drop'"),
    ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ({"seed": None}, "seed must be an integer of at least 0, got None"),
]


@pytest.mark.parametrize(("wrong", "text"), WRONG, ids=[text for _, text in WRONG])
def test_wrong_settings_are_refused(wrong: dict[str, Any], text: str) -> None:
    """As an argument, and in a group, at construction and later."""
    settings: dict[str, Any] = {"rank": 4, **wrong}
    with pytest.raises(ValueError) as error:
        GradNormLoRP([nn.Parameter(torch.zeros(12, 8))], **settings)
    assert text in str(error.value)
    group = {"params": [nn.Parameter(torch.zeros(12, 8))], **settings}
    with pytest.raises(ValueError) as error:
        GradNormLoRP([group])
    assert text in str(error.value)
    optimizer = GradNormLoRP([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError) as error:
        optimizer.add_param_group(group)
    assert text in str(error.value) and len(optimizer.param_groups) == 1


class Sharded(Tensor):
    """What tells a DTensor, here."""

    def full_tensor(self) -> None: ...


PARAMETERS: list[tuple[Callable[[], Any], int | None, str]] = [
    (lambda: nn.Parameter(torch.zeros(7)), 4, "holds matrices only, one parameter has shape (7,): pass rank=None"),
    (lambda: nn.Parameter(torch.zeros(2, 3, 4)), 2, "holds matrices only, one parameter has shape (2, 3, 4)"),
    (lambda: nn.Parameter(torch.zeros(4, 4).as_subclass(Sharded)), 2, "is a DTensor: GradNormLoRP needs whole"),
    (lambda: nn.Parameter(torch.zeros(0)), None, "a parameter of shape (0,) is empty: if it is sharded (ZeRO-3)"),
    (lambda: nn.Parameter(torch.zeros(4, 4).half()), 2, "float32 or bfloat16, one of shape (4, 4) is torch.float16"),
    (lambda: nn.Parameter(torch.zeros(4).double()), None, "one of shape (4,) is torch.float64"),
    (lambda: nn.Parameter(torch.zeros(4, 6).T), 2, "shape (6, 4) is not contiguous: param.data = param.data"),
]


@pytest.mark.parametrize(("make", "rank", "text"), PARAMETERS, ids=[text for *_, text in PARAMETERS])
def test_parameters_that_cannot_be_are_refused(make: Callable[[], Any], rank: int | None, text: str) -> None:
    with pytest.raises(ValueError) as error:
        GradNormLoRP([{"params": [make()], "rank": rank}])
    assert text in str(error.value)


def test_defaults_are_those_of_the_signature() -> None:
    given = {
        name: parameter.default
        for name, parameter in inspect.signature(GradNormLoRP).parameters.items()
        if name != "params"
    }
    assert {**given, "transposed": False} == module.DEFAULTS
    assert GradNormLoRP([nn.Parameter(torch.zeros(3))]).defaults == module.DEFAULTS


# --- groups -----------------------------------------------------------------------------------------


def names(model: nn.Module, groups: list[dict[str, Any]]) -> list[set[str]]:
    by_id = {id(param): name for name, param in model.named_parameters()}
    return [{by_id[id(param)] for param in group["params"]} for group in groups]


def test_all_linear_is_every_layer_but_the_head() -> None:
    """Tied or not; embedding in plain AdamW with decay, norms without."""
    for tied in (True, False):
        model = tiny.model()
        if not tied:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        groups = param_groups(model, 4, weight_decay=0.1, scale=0.5)
        projected, decayed, plain = names(model, groups)
        parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        assert {name.split(".")[-2] for name in projected} == set(parts) and len(projected) == 14
        assert decayed == {"model.embed_tokens.weight"} | ({"lm_head.weight"} if not tied else set())
        assert plain and all("norm" in name for name in plain)
        assert [(group["rank"], group["weight_decay"], group.get("scale")) for group in groups] == [
            (4, 0.1, 0.5),
            (None, 0.1, None),
            (None, 0.0, None),
        ]


def test_conv1d_is_normed_by_output_unit() -> None:
    """GPT-2's [in, out] weights: norms along the inputs, as many magnitudes as outputs."""
    model = architectures.build("GPT-2")
    groups = param_groups(model, 4)
    assert [group.get("transposed") for group in groups] == [True, None, None]
    optimizer = GradNormLoRP(groups, **EXACT)
    ids = torch.arange(1, 21).view(2, 10)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for block in model.transformer.h:
        weight = block.mlp.c_fc.weight
        assert weight.shape == (16, 64)
        assert optimizer.state[weight]["magnitude_exp_avg"].shape == (64,)


def test_modules_by_pattern_and_by_name() -> None:
    model = tiny.model()
    assert set(projected_modules(model, 4, r".*layers\.1\..*(q|k)_proj")) == {
        f"model.layers.1.self_attn.{name}_proj" for name in "qk"
    }
    assert set(projected_modules(model, 4, ["q_proj", "mlp.up_proj"])) == {
        f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
    }
    # Of 16 × 8 (k and v, one head) the smaller side is 8: nothing to gain at rank 8.
    assert not any(name.endswith(("k_proj", "v_proj")) for name in projected_modules(model, 8))
    model.model.layers[0].requires_grad_(False)
    assert all("layers.1" in name for name in projected_modules(model, 4))
    assert set(projected_modules(model, 4, ["lm_head", "q_proj"])) == {"lm_head", "model.layers.1.self_attn.q_proj"}


NOTHING: list[tuple[int, Any, str]] = [
    (64, "all-linear", "leaves no matrix to project: 14 match, of smaller sides [8, 16]. Lower the rank"),
    (4, "nothing.*", "leaves no matrix to project: of 15 linear layers 0 match, none of which is trained"),
    (4, "q_proj", "leaves no matrix to project: of 15 linear layers 0 match"),
    (4, "*proj", "target_modules='*proj' is no regular expression: nothing to repeat"),
    (4, ["q_proj", "c_attn"], "target_modules names ['c_attn'], but the linear layers of this model are ['down_proj'"),
    (4, ["proj"], "target_modules names ['proj']"),
]


@pytest.mark.parametrize(("rank", "targets", "text"), NOTHING, ids=[text for *_, text in NOTHING])
def test_nothing_to_project_is_told(rank: int, targets: Any, text: str) -> None:
    with pytest.raises(ValueError) as error:
        param_groups(tiny.model(), rank, targets)
    assert text in str(error.value)


def test_no_decay_by_pattern() -> None:
    model = architectures.build("GPT-2")
    groups = param_groups(model, 4, weight_decay=0.1, no_decay=["*wpe*"])
    assert names(model, groups)[1:][0] == {"transformer.wte.weight"}
    assert "transformer.wpe.weight" in names(model, groups)[2] and groups[2]["weight_decay"] == 0.0


FAMILIES = ["Llama", "GPT-2", "Gemma 3", "Phi", "GPT-NeoX", "BLOOM", "DeepSeek-V3", "Mixtral", "Mamba", "OPT"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_one_group(family: str) -> None:
    """And one step changes every one that has a gradient."""
    model = architectures.build(family)
    model.train()
    groups = param_groups(model, 4, weight_decay=0.1)
    held = [id(param) for group in groups for param in group["params"]]
    trained = [id(param) for param in model.parameters() if param.requires_grad]
    assert sorted(held) == sorted(trained) and len(set(held)) == len(held)
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for group in groups:
        assert group["rank"] is None or not embeddings & {id(param) for param in group["params"]}
        assert group["weight_decay"] == 0.0 or all(param.ndim > 1 for param in group["params"])
    optimizer = GradNormLoRP(groups, lr=1e-2)
    ids = torch.arange(1, 21).view(2, 10)
    model(input_ids=ids, labels=ids).loss.backward()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer.step()
    for name, param in model.named_parameters():
        moved = not torch.equal(param, before[name])
        assert bool(param.isfinite().all()) and moved == (param.grad is not None and bool(param.grad.any())), name


@pytest.mark.parametrize("nothing", [0.0, math.nan])
def test_a_first_gradient_that_tells_nothing_is_no_reason_for_a_basis(nothing: float) -> None:
    """The first gradient of a LoRA's A is zero: the basis comes from the first that is not, and lasts a gap."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 48))
    optimizer = GradNormLoRP([weight], lr=1e-2, rank=4, update_proj_gap=5, norm=None, projector_bits=32)
    before, gradient = weight.detach().clone(), torch.randn(64, 4) @ torch.randn(4, 48)
    weight.grad = torch.full_like(weight, nothing)
    optimizer.step()
    assert torch.equal(weight, before) and optimizer.state[weight]["refreshes"] == 0
    for step in (1, 2):
        weight.grad = gradient.clone()
        optimizer.step()
        basis = optimizer.state[weight]["basis"]
        assert optimizer.state[weight]["refreshes"] == 1
        assert captured_energy(gradient.T, basis) > 0.9999, step
