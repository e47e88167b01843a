"""Intruder dimensions: strong directions of a tuned matrix that the base matrix does not have (arXiv 2410.21228)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_pretrain_ext.merging.adapter import Adapter, is_adapter, oriented
from hf_pretrain_ext.merging.blocks import Blocks, find_blocks
from hf_pretrain_ext.merging.checkpoints import Checkpoint, MergeError, open_checkpoint, resolve
from hf_pretrain_ext.merging.compare import check_specs
from hf_pretrain_ext.values import check_integers, is_number, shown

__all__ = ["IntruderReport", "MatrixIntruders", "intruder_cosines", "intruder_dimensions"]


@torch.no_grad()
def intruder_cosines(base: Tensor, tuned: Tensor, k: int = 10) -> Tensor:
    """How near the strongest left singular vectors of `tuned` come to any one of `base`.

    For each of the top `k` left singular vectors u of `tuned`: max over all left singular vectors v of `base` of
    |cos(u, v)|. Where singular values of the base are equal, its vectors are not determined, and neither is this.

    Args:
        base (`Tensor` of shape `(out, in)`): A weight before tuning.
        tuned (`Tensor` of shape `(out, in)`): The weight after it.
        k (`int`, defaults to `10`): How many vectors, or all if there are fewer.

    Returns:
        `Tensor` of shape `(k,)`: In the order of falling singular values, from 0 to 1.

    Example:

    >>> base = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> intruder_cosines(base, base, k=2)
    tensor([1., 1.])
    """
    check_integers(k=(k, 1, None, False))
    if base.ndim != 2 or base.shape != tuned.shape:
        raise ValueError(
            f"base and tuned must be matrices of one shape, got {list(base.shape)} and {list(tuned.shape)}"
        )
    if not (base.is_floating_point() and tuned.is_floating_point()):
        raise ValueError(f"base and tuned must be matrices of floats, got {base.dtype} and {tuned.dtype}")
    k = min(k, *base.shape)
    base, tuned = (oriented(matrix, fan_in_fan_out=False) for matrix in (base, tuned))
    known = torch.linalg.svd(base, full_matrices=False)[0]
    new = torch.linalg.svd(tuned, full_matrices=False)[0][:, :k]
    return (new.T @ known).abs().amax(1).clamp(max=1)


@dataclass(frozen=True)
class MatrixIntruders:
    """One matrix: its name, its shape as (out, in), and the [`intruder_cosines`] of its top vectors."""

    name: str
    shape: tuple[int, int]
    cosines: tuple[float, ...]
    intruders: int


@dataclass
class IntruderReport:
    """What [`intruder_dimensions`] found, matrix by matrix.

    Attributes:
        k (`int`): Vectors looked at in each matrix.
        eps (`float`): Cosine below which a vector is an intruder.
        matrices (`list[MatrixIntruders]`): One a matrix.
        skipped (`dict[str, str]`): What was not looked at, and why.
    """

    k: int
    eps: float
    matrices: list[MatrixIntruders] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Intruder dimensions of all matrices: the paper's count."""
        return sum(matrix.intruders for matrix in self.matrices)

    def to_dict(self) -> dict[str, Any]:
        """In JSON types."""
        rows = [
            {"name": m.name, "shape": list(m.shape), "intruders": m.intruders, "cosines": list(m.cosines)}
            for m in self.matrices
        ]
        return {"k": self.k, "eps": self.eps, "total": self.total, "matrices": rows, "skipped": self.skipped}

    def __str__(self) -> str:
        width = max(len("matrix"), *(len(matrix.name) for matrix in self.matrices))
        lines = [f"{'matrix':<{width}}  {'shape':>13}  intruders  least cosine"]
        lines += [
            f"{m.name:<{width}}  {'x'.join(map(str, m.shape)):>13}  {m.intruders:>9}  {min(m.cosines):>12.3f}"
            for m in self.matrices
        ]
        most = sum(len(matrix.cosines) for matrix in self.matrices)
        lines.append(
            f"{self.total} intruder dimensions among {most} top singular vectors of {len(self.matrices)} matrices "
            f"(k={self.k}, eps={self.eps:g})"
        )
        if self.skipped:
            lines.append(f"not looked at: {len(self.skipped)} tensors")
        return "\n".join(lines)


def intruder_dimensions(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    k: int = 10,
    eps: float = 0.5,
    *,
    target_modules: Sequence[str] | None = None,
    fan_in_fan_out: bool | None = None,
    device: str | torch.device = "cpu",
) -> IntruderReport:
    """Counts the intruder dimensions of an adapter or of a tuned checkpoint (Shuttleworth et al., 2024).

    A left singular vector among the top `k` of a tuned matrix is an intruder if its cosine with every left singular
    vector of the base's matrix is below `eps`. One matrix is in memory at a time; each costs two singular value
    decompositions.

    Args:
        base (`str`): The checkpoint before tuning: a folder, or a name on the Hub.
        tuned (`str`): A PEFT adapter (LoRA or DoRA) on it, or the whole checkpoint after tuning.
        k (`int`, defaults to `10`): Top singular vectors of each matrix (the value of the paper's code).
        eps (`float`, defaults to `0.5`): The cosine (the value of the paper's code).
        target_modules (`list[str]`, *optional*): Ends of the names of the modules to look at, such as `"q_proj"`. By
            default all linear layers that an adapter changes, or all matrices inside the blocks of a checkpoint.
        fan_in_fan_out (`bool`, *optional*): Whether weights are stored as (in, out), as GPT-2's are. By default as the
            adapter's config says; False for a checkpoint.
        device (`str`, defaults to `"cpu"`): Where the decompositions are computed.

    Returns:
        [`IntruderReport`]

    Raises:
        [`~hf_pretrain_ext.merging.MergeError`]: an adapter that is not LoRA or not of this base, files that are
            missing or damaged, nothing to look at.
    """
    check_integers(k=(k, 1, None, False))
    if not is_number(eps) or not 0 < eps <= 1:
        raise ValueError(f"eps must be a cosine above 0, up to 1, got {shown(eps)}")
    if fan_in_fan_out is not None and not isinstance(fan_in_fan_out, bool):
        raise ValueError(f"fan_in_fan_out must be True, False or None, got {shown(fan_in_fan_out)}")
    if target_modules is not None and (
        not isinstance(target_modules, Sequence) or isinstance(target_modules, str) or not target_modules
    ):
        raise ValueError(
            f"target_modules must be a list of ends of module names, or None, got {shown(target_modules)}"
        )
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'device must be one of torch, such as "cpu" or "cuda", got {shown(device)}') from error
    report = IntruderReport(k, float(eps))
    before = open_checkpoint(base, "base")
    folder, revision = resolve(tuned, "tuned")
    after = Adapter(folder, "tuned") if is_adapter(folder) else Checkpoint(folder, "tuned", str(tuned), revision)
    try:
        if isinstance(after, Adapter):
            turned = after.fan_in_fan_out if fan_in_fan_out is None else fan_in_fan_out
            matrices = _of_adapter(before, after, target_modules, turned, report)
        else:
            matrices = _of_checkpoint(before, after, target_modules, bool(fan_in_fan_out), report)
        for name, old, new in matrices:
            # Of an unchanged matrix nothing needs to be computed.
            cosines = [1.0] * min(k, *old.shape)
            if not torch.equal(old, new):
                for which, matrix in (("base", old), ("tuned", new)):
                    if not torch.isfinite(matrix).all():
                        raise MergeError(f"{which}: {name} holds NaN or infinities")
                cosines = intruder_cosines(old.to(device), new.to(device), k).tolist()
            count = sum(cosine < eps for cosine in cosines)
            report.matrices.append(MatrixIntruders(name, (old.shape[0], old.shape[1]), tuple(cosines), count))
    finally:
        before.close()
        after.close()
    if not report.matrices:
        raise MergeError(f"no matrix to look at: target_modules={shown(target_modules)} ends no module's name")
    return report


def _chosen(module: str, target_modules: Sequence[str] | None) -> bool:
    return target_modules is None or any(module == end or module.endswith(f".{end}") for end in target_modules)


def _of_adapter(
    base: Checkpoint, adapter: Adapter, target_modules: Sequence[str] | None, turned: bool, report: IntruderReport
) -> Iterator[tuple[str, Tensor, Tensor]]:
    report.skipped.update(adapter.skipped)
    for module, key in adapter.names_in(base).items():
        if _chosen(module, target_modules):
            old = oriented(base.matrix(key), turned)
            yield key, old, adapter.tuned(module, old)


def _of_checkpoint(
    base: Checkpoint, tuned: Checkpoint, target_modules: Sequence[str] | None, turned: bool, report: IntruderReport
) -> Iterator[tuple[str, Tensor, Tensor]]:
    common = [key for key in base.specs if key in tuned.specs]
    report.skipped.update({key: "in one of the two only" for key in [*base.specs, *tuned.specs] if key not in common})
    problems = check_specs({each.name: {key: each.specs[key] for key in common} for each in (base, tuned)})
    if problems:
        raise MergeError("these checkpoints cannot be compared:\n" + "\n".join(f"  {line}" for line in problems))
    stack: Blocks | None = None
    if target_modules is None:
        stack = find_blocks(common, None, base.number_of_blocks)
    for key in common:
        spec, module = base.specs[key], key.removesuffix(".weight")
        if not spec.dtype.is_floating_point or len(spec.shape) < 2:
            continue
        if not _chosen(module, target_modules) or (stack is not None and stack.index(key) is None):
            report.skipped[key] = "not chosen" if stack is None else "outside the blocks"
        elif len(spec.shape) > 2:
            report.skipped[key] = f"of {len(spec.shape)} dimensions"
        else:
            yield key, oriented(base.matrix(key), turned), oriented(tuned.matrix(key), turned)
