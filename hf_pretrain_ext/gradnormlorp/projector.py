"""The subspace that gradients are projected to, by a randomised range finder (Halko et al., 2011), not a full SVD."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["captured_energy", "keyed_generator", "leading_basis", "projects_right"]

OVERSAMPLING = 32
"""Columns tried beyond the rank."""

POWER_ITERATIONS = 2
"""Rounds of G·Gᵀ that turn the random columns towards the leading singular vectors."""

PROJ_TYPES = ("std", "reverse_std", "left", "right")

_MASK = (1 << 64) - 1


def keyed_generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator that depends on `key` alone (splitmix64 of its parts), not on what was drawn before."""
    state = 0
    for part in key:
        state = (state + 0x9E3779B97F4A7C15 + (part & _MASK)) & _MASK
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return torch.Generator(device).manual_seed(state >> 1)


def projects_right(shape: torch.Size, proj_type: str) -> bool:
    """Whether G is projected as G·P (P on its columns) rather than Pᵀ·G: GaLore's `proj_type`."""
    if proj_type in ("left", "right"):
        return proj_type == "right"
    return (shape[0] >= shape[1]) == (proj_type == "std")


def leading_basis(
    matrix: Tensor,
    rank: int,
    generator: torch.Generator | None = None,
    oversampling: int = OVERSAMPLING,
    power_iterations: int = POWER_ITERATIONS,
) -> Tensor:
    """An orthonormal basis of the space of the `rank` leading left singular vectors of `matrix`.

    Args:
        matrix (`Tensor`): `[rows, columns]`, any dtype; computed in float32. Must be finite. Zero or rank-deficient
            matrices give an orthonormal basis all the same.
        rank (`int`): columns of the basis, at most `rows`.
        generator (`torch.Generator`, *optional*): of the random columns.
        oversampling (`int`, *optional*, defaults to 32): columns tried beyond the rank.
        power_iterations (`int`, *optional*, defaults to 2): more are closer to the SVD, and dearer.

    Returns:
        `Tensor`: `[rows, rank]` in float32, leading directions first.

    Raises:
        `ValueError`: for a rank that the matrix cannot have.

    Example:

    >>> import torch
    >>> from hf_pretrain_ext.gradnormlorp import leading_basis
    >>> basis = leading_basis(torch.diag(torch.tensor([1.0, 3.0, 2.0])), rank=2)
    >>> basis.abs().round(decimals=3).tolist()
    [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    """
    rows, columns = matrix.shape
    if not 1 <= rank <= rows:
        raise ValueError(f"rank must lie in 1..{rows} for a matrix of shape {tuple(matrix.shape)}, got {rank}")
    matrix = matrix.to(torch.float32)
    # Squares of gradients overflow or vanish in float32 long before the gradients do.
    unit = 1 / torch.linalg.vector_norm(matrix, ord=torch.inf).clamp_min(torch.finfo(torch.float32).tiny)
    tried = rank + oversampling
    if 2 * tried >= rows:
        scaled = matrix * unit
        return _leading_eigenvectors(scaled @ scaled.T, rank)
    start = torch.randn(columns, tried, generator=generator, device=matrix.device)
    span = torch.linalg.qr((matrix @ start).mul_(unit)).Q
    for _ in range(power_iterations):
        span = torch.linalg.qr((matrix @ (matrix.T @ span).mul_(unit)).mul_(unit)).Q
    inside = (span.T @ matrix).mul_(unit)
    return span @ _leading_eigenvectors(inside @ inside.T, rank)


def _leading_eigenvectors(symmetric: Tensor, count: int) -> Tensor:
    return torch.linalg.eigh(symmetric).eigenvectors[:, -count:].flip(1).contiguous()


def captured_energy(matrix: Tensor, basis: Tensor) -> float:
    """The share of ‖matrix‖² that lies in the span of `basis` (`[rows, rank]`, orthonormal); 1.0 for zero."""
    whole = matrix.float().square().sum()
    inside = (basis.T @ matrix.float()).square().sum()
    return float(torch.where(whole > 0, inside / whole, 1.0))
