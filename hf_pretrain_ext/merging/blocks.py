"""The blocks of a model, found by the structure of its parameters' names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from hf_pretrain_ext.merging.checkpoints import MergeError
from hf_pretrain_ext.values import shown

__all__ = ["Blocks", "find_blocks"]

# Up to the first component that is a number: those behind it count experts or sub-layers.
_IN_STACK = re.compile(r"(?P<prefix>[^0-9.][^.]*(?:\.[^0-9.][^.]*)*)\.(?P<index>[0-9]{1,6})\.")


@dataclass(frozen=True)
class Blocks:
    """A stack of `number` blocks, whose parameters' names begin with `prefix`, a dot, and the block's number."""

    prefix: str
    number: int

    def index(self, name: str) -> int | None:
        """The block of the parameter `name`, None for one outside the stack."""
        start = f"{self.prefix}."
        if not name.startswith(start):
            return None
        number = name[len(start) :].split(".", 1)[0]
        return int(number) if number.isdecimal() else None

    def scale(self, name: str, alpha: float, beta: float) -> float:
        """alpha + beta · l / (L − 1) in block l of L; alpha outside the stack (LiNeS).

        Example:

        >>> blocks = Blocks("model.layers", 3)
        >>> [blocks.scale(name, 0.2, 0.8) for name in ("model.embed.weight", "model.layers.1.w", "model.layers.2.w")]
        [0.2, 0.6000000000000001, 1.0]
        """
        index = self.index(name)
        return alpha if index is None else alpha + beta * (index / (self.number - 1))


def find_blocks(names: Iterable[str], prefix: str | None = None, number: int | None = None) -> Blocks:
    """The stack of blocks among parameters of these names.

    A stack is a prefix behind which the numbers 0 to L − 1 all occur, L at least 2 (LiNeS divides by L − 1). Numbers
    further inside (experts, sub-layers) do not count.

    Args:
        names (`list[str]`): Names of parameters.
        prefix (`str`, *optional*): What stands before the number; needed where several stacks are as likely.
        number (`int`, *optional*): How many blocks there should be (as the model's config says): decides between
            several stacks.

    Raises:
        [`~hf_pretrain_ext.merging.MergeError`]: no stack, or several.

    Example:

    >>> find_blocks(["model.embed_tokens.weight", "model.layers.0.w", "model.layers.1.experts.7.w"])
    Blocks(prefix='model.layers', number=2)
    """
    if prefix is not None and (not isinstance(prefix, str) or not prefix):
        raise MergeError(f"blocks must be the text before the number of a block, got {shown(prefix)}")
    found: dict[str, set[int]] = {}
    for name in names:
        if prefix is not None:
            index = Blocks(prefix, 0).index(name)
            if index is not None:
                found.setdefault(prefix, set()).add(index)
        elif match := _IN_STACK.match(name):
            found.setdefault(match["prefix"], set()).add(int(match["index"]))
    stacks = [
        Blocks(each, len(indices))
        for each, indices in found.items()
        if len(indices) > 1 and indices == set(range(len(indices)))
    ]
    if prefix is not None and not stacks:
        seen = f"only the numbers {sorted(found[prefix])[:10]}" if prefix in found else "no name"
        raise MergeError(f"blocks={prefix!r}: {seen} begins so; numbers 0, 1, ... must follow it")
    likely = [each for each in stacks if each.number == number] if len(stacks) > 1 else stacks
    if len(likely) == 1:
        return likely[0]
    if not stacks:
        raise MergeError("no blocks were found: no part of the names is followed by the numbers 0, 1, ... (2 or more)")
    told = ", ".join(f"{each.prefix} ({each.number} blocks)" for each in stacks)
    raise MergeError(f"several stacks of blocks: {told}. Name one as blocks={stacks[0].prefix!r}")
