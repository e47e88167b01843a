"""Optimizer state in few bits: moments by blocks, bases by columns, and weights rounded at random.

Moments use bitsandbytes' dynamic codes (Dettmers et al., 2022): one byte an element and a float32 maximum for each
block. Four bits use the same kernels with a code of 16 values, each of which stands 16 times among the 256.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "decode_basis",
    "decode_moment",
    "encode_basis",
    "encode_moment",
    "basis_bytes",
    "moment_bits",
    "moment_bytes",
    "round_into",
]

MOMENT_BLOCK = {8: 256, 4: 128}
"""Elements that share a maximum: bitsandbytes' block, and that of the 4-bit optimizers (Li et al., 2023)."""

BASIS_BLOCK = 64
"""Elements of a 4-bit basis that share a maximum: the block of NF4 (Dettmers et al., 2023)."""

SMALLEST_QUANTISED = 4096
"""Moments of fewer elements stay in float32, as in bitsandbytes."""

CHUNK = 1 << 22
"""Elements rounded at a time, so that the noise takes 16 MiB whatever the matrix."""


def functional() -> Any:
    """`bitsandbytes.functional`, or what to install."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            "bits=8 or 4 and projector_bits=4 need bitsandbytes: pip install 'hf-pretrain-ext[bnb]', or pass bits=32 "
            "and projector_bits=8, 16 or 32"
        )
    import bitsandbytes.functional

    return bitsandbytes.functional


@functools.cache
def _code(bits: int, signed: bool, device: torch.device) -> Tensor:
    """The 256 values, ascending in [-1, 1], that codes stand for."""
    if bits == 8:
        return functional().create_dynamic_map(signed=signed).float().to(device)
    if signed:
        # Dynamic exponent (Dettmers, 2016) in four bits, as bitsandbytes draws it up, zero included.
        values = functional().create_dynamic_map(signed=True, max_exponent_bits=3, total_bits=4).unique()
    else:
        # No zero among them: a second moment rounded to zero would divide by epsilon (Li et al., 2023, 4.1).
        values = torch.arange(1, 17) / 16
    return values.float().repeat_interleave(16).to(device)


def moment_bits(numel: int, bits: int) -> int:
    """Bits that a moment of `numel` elements is kept in when `bits` are asked for."""
    return bits if numel >= SMALLEST_QUANTISED else 32


def moment_bytes(numel: int, bits: int) -> int:
    """Bytes of one moment, maxima included."""
    bits = moment_bits(numel, bits)
    if bits == 32:
        return 4 * numel
    return -(numel * bits // -8) + 4 * -(numel // -MOMENT_BLOCK[bits])


def encode_moment(moment: Tensor, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (uint8; two an element's byte in 4 bits) and the float32 maximum of each block."""
    codes, state = functional().quantize_blockwise(
        moment.contiguous(), code=_code(bits, signed, moment.device), blocksize=MOMENT_BLOCK[bits]
    )
    if bits == 4:
        codes = codes.flatten() >> 4
        if codes.numel() % 2:
            codes = torch.cat([codes, codes.new_zeros(1)])
        codes = codes[0::2] << 4 | codes[1::2]
    return codes, state.absmax


def decode_moment(codes: Tensor, absmax: Tensor, shape: torch.Size, bits: int, signed: bool) -> Tensor:
    """The moment in float32."""
    if bits == 4:
        codes = torch.stack([codes & 0xF0, codes << 4], dim=-1).flatten()[: shape.numel()]
    return functional().dequantize_blockwise(
        codes.view(shape), absmax=absmax, code=_code(bits, signed, codes.device), blocksize=MOMENT_BLOCK[bits]
    )


def basis_bytes(rows: int, rank: int, bits: int) -> int:
    """Bytes of a basis of `rank` columns, scales included."""
    if bits == 8:
        return rows * rank + 4 * rank
    if bits == 4:
        return -(rows * rank // -2) + 4 * -(rows * rank // -BASIS_BLOCK)
    return rows * rank * bits // 8


def encode_basis(basis: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Codes and scales of an orthonormal basis, `[rows, rank]` in float32.

    int8: one scale a column. NF4: two an element's byte, one scale for each 64 elements. 16 and 32: no scales.
    """
    if bits == 8:
        scale = basis.abs().amax(dim=0).clamp_min(torch.finfo(torch.float32).tiny) / 127
        return (basis / scale).round_().to(torch.int8), scale
    if bits == 4:
        codes, state = functional().quantize_4bit(basis.contiguous(), blocksize=BASIS_BLOCK, quant_type="nf4")
        return codes.flatten(), state.absmax
    return basis.to(torch.bfloat16 if bits == 16 else torch.float32), None


def decode_basis(codes: Tensor, scale: Tensor | None, shape: tuple[int, int], bits: int) -> Tensor:
    """The basis in float32, `[rows, rank]`."""
    if bits == 8:
        assert scale is not None
        return codes.to(torch.float32).mul_(scale)
    if bits == 4:
        return functional().dequantize_4bit(
            codes.view(-1, 1),
            quant_state=functional().QuantState(
                absmax=scale, shape=torch.Size(shape), dtype=torch.float32, blocksize=BASIS_BLOCK, quant_type="nf4"
            ),
        )
    return codes.to(torch.float32)


def round_into(target: Tensor, value: Tensor, generator: torch.Generator) -> None:
    """Writes float32 `value` into bfloat16 `target`, up or down at random so that the mean is `value`.

    A bfloat16 has 8 bits of mantissa: an update below 1/512 of a weight is lost when it is rounded to nearest, at
    every step again. The same noise on every rank, since `generator` is seeded alike.
    """
    target, value = target.view(-1), value.contiguous().view(-1)
    for start in range(0, value.numel(), CHUNK):
        part = value[start : start + CHUNK]
        noise = torch.empty(-(part.numel() // -4), dtype=torch.int64, device=part.device)
        noise.random_(-(2**63), None, generator=generator)
        low = noise.view(torch.int16)[: part.numel()].to(torch.int32).bitwise_and_(0xFFFF)
        # Cutting the low 16 bits off rounds towards zero; a uniform number added before makes it fair.
        low.add_(part.view(torch.int32)).bitwise_and_(-0x10000)
        target[start : start + CHUNK] = low.view(torch.float32)
        # Or they would stand beside those of the next part.
        del noise, low
