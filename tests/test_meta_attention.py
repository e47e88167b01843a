"""The sub-layer by itself: against the paper's formula, its contexts, its memory."""

from __future__ import annotations

import copy
import random
from typing import Any

import meta_attention_reference as reference
import pytest
import torch
from torch import Tensor

from hf_pretrain_ext.meta_tokens import MetaAttention
from hf_pretrain_ext.meta_tokens.attention import documents_of, meta_context, positions_of
from hf_pretrain_ext.meta_tokens.memory import MetaMemory, hang_memory, memory_of

LENGTH, HIDDEN = 20, 12


def drawn_case(seed: int) -> dict[str, Any]:
    """Rows with meta-tokens anywhere, of several documents, padded on one side, some rows without any."""
    draw = random.Random(seed)
    batch = draw.randint(1, 4)
    meta, documents = torch.zeros(batch, LENGTH, dtype=torch.bool), torch.zeros(batch, LENGTH, dtype=torch.long)
    for row in range(batch):
        start, stop = draw.choice([(0, LENGTH), (draw.randint(0, 6), LENGTH), (0, draw.randint(10, LENGTH))])
        count = draw.choice([0, 1, 3, 6])
        meta[row, draw.sample(range(start, stop), min(count, stop - start))] = True
        cuts = sorted(draw.sample(range(1, LENGTH), draw.randint(0, 3)))
        documents[row] = torch.bucketize(torch.arange(LENGTH), torch.tensor(cuts, dtype=torch.long), right=True)
    width = int(meta.sum(1).max()) + draw.randint(0, 2)
    positions = torch.full((batch, width), -1)
    for row in range(batch):
        here = meta[row].nonzero().flatten()
        positions[row, : len(here)] = here
    owners = torch.where(positions >= 0, documents.gather(1, positions.clamp(min=0)), -1)
    return {"meta": meta, "documents": documents, "positions": positions, "owners": owners}


def module(dtype: torch.dtype = torch.float64, seed: int = 0, **settings: Any) -> MetaAttention:
    torch.manual_seed(seed)
    chosen = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "bias": True, **settings}
    made = MetaAttention(HIDDEN, **chosen, dtype=dtype)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("layout", [None, "half", "interleaved", "pairs"])
def test_equals_the_dense_formula(seed: int, norm: Any, layout: Any) -> None:
    case, attention = drawn_case(seed), module(norm=norm, eps=1e-5, layout=layout, seed=seed)
    hidden = torch.randn(len(case["meta"]), LENGTH, HIDDEN, dtype=torch.float64)
    angles = torch.rand(len(hidden), LENGTH, 2, dtype=torch.float64) * 6 if layout else None
    rotary = None
    context = meta_context(case["positions"], LENGTH, case["owners"])
    if angles is not None:
        turns = {"half": torch.cat([angles] * 2, -1), "interleaved": angles.repeat_interleave(2, -1), "pairs": angles}
        picked = torch.stack([row[at] for row, at in zip(turns[layout], context.positions, strict=True)])
        rotary = (picked.cos(), picked.sin())
    expected = reference.dense(
        hidden,
        dict(attention.state_dict()),
        case["meta"],
        heads=4,
        shared=2,
        documents=case["documents"],
        angles=angles,
        norm=norm,
        eps=1e-5,
        interleaved=layout == "interleaved",
    )
    with torch.no_grad():
        made = context.add(hidden, attention(context.gather(hidden), context.mask, rotary)) - hidden
        assert float((made - expected).abs().max()) < 1e-12
        half = copy.deepcopy(attention).float()
        rotary32 = None if rotary is None else (rotary[0].float(), rotary[1].float())
        single = half(context.gather(hidden.float()), context.mask, rotary32)
        update = context.add(torch.zeros_like(hidden, dtype=torch.float32), single)
    assert float((update - expected).abs().max()) < 1e-6 * max(1, float(expected.abs().max()))


def test_other_documents_and_later_tokens_are_not_seen() -> None:
    """What the formula forbids has no effect; what it allows has one."""
    attention = module()
    positions, documents = torch.tensor([[1, 4, 8, 11]]), torch.tensor([[0, 0, 1, 1]])
    context = meta_context(positions, LENGTH, documents)
    hidden = torch.randn(1, LENGTH, HIDDEN, dtype=torch.float64)

    def change(place: int) -> list[bool]:
        other = hidden.clone()
        other[0, place] += 1
        before, after = (attention(context.gather(each), context.mask) for each in (hidden, other))
        return [bool((before[0, n] != after[0, n]).any()) for n in range(4)]

    assert change(1) == [True, True, False, False]
    assert change(4) == [False, True, False, False]
    assert change(8) == [False, False, True, True]
    assert change(2) == [False] * 4


def test_rows_that_are_no_meta_tokens_stay_bit_for_bit() -> None:
    context = meta_context(torch.tensor([[0, 3], [2, -1], [-1, -1]]), 5)
    hidden = torch.randn(3, 5, 4)
    made = context.add(hidden, torch.ones(3, 2, 4))
    changed = (made != hidden).any(-1)
    assert changed.nonzero().tolist() == [[0, 0], [0, 3], [1, 2]]
    assert torch.equal(made[changed], hidden[changed] + 1)


def test_no_nan_forwards_or_backwards_where_rows_have_none() -> None:
    attention = module(torch.float32)
    hidden = torch.randn(3, 6, HIDDEN, requires_grad=True)
    positions = torch.tensor([[-1, -1], [5, -1], [0, 1]])
    context = meta_context(positions, 6, torch.where(positions < 0, -1, 0))
    made = context.add(hidden, attention(context.gather(hidden), context.mask))
    made.square().sum().backward()
    assert bool(torch.isfinite(made).all()) and hidden.grad is not None and bool(torch.isfinite(hidden.grad).all())
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in attention.parameters())


def test_gradients_equal_those_of_the_dense_formula() -> None:
    case, attention = drawn_case(3), module(bias=False, norm="layernorm")
    hidden = torch.randn(len(case["meta"]), LENGTH, HIDDEN, dtype=torch.float64, requires_grad=True)
    context = meta_context(case["positions"], LENGTH, case["owners"])
    weights = {name: p.detach().clone().requires_grad_() for name, p in attention.named_parameters()}
    expected = reference.dense(hidden, weights, case["meta"], heads=4, shared=2, documents=case["documents"])
    direction = torch.randn_like(hidden)
    theirs = torch.autograd.grad((expected * direction).sum(), [hidden, *weights.values()])
    made = context.add(torch.zeros_like(hidden), attention(context.gather(hidden), context.mask))
    ours = torch.autograd.grad((made * direction).sum(), [hidden, *attention.parameters()])
    assert all(float((a - b).abs().max()) < 1e-10 for a, b in zip(ours, theirs, strict=True))
    assert any(float(a.abs().max()) > 0.1 for a in ours)


def test_one_document_needs_no_mask() -> None:
    """Then attention takes the kernel for plain causal attention; rows of unequal counts are right all the same."""
    attention, positions = module(), torch.tensor([[0, 3, 7], [2, -1, -1]])
    hidden = torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)
    plain = meta_context(positions, LENGTH)
    masked = meta_context(positions, LENGTH, torch.where(positions < 0, -1, 0))
    assert plain.mask is None and masked.mask is not None
    with torch.no_grad():
        made = [each.add(hidden, attention(each.gather(hidden), each.mask)) for each in (plain, masked)]
    assert float((made[0] - made[1]).abs().max()) < 1e-12


def test_positions_are_found_in_ids() -> None:
    tokens = torch.tensor([[9, 1, 9, 9], [1, 1, 1, 1], [1, 9, 1, 1]])
    assert positions_of(tokens, 9).tolist() == [[0, 2, 3], [-1, -1, -1], [1, -1, -1]]
    assert positions_of(tokens, 5).shape == (3, 0)


def test_documents_are_told_by_position_ids() -> None:
    order = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    positions = torch.tensor([[1, 3, 4, 5], [0, 5, -1, -1]])
    assert documents_of(order, positions).tolist() == [[0, 1, 1, 2], [0, 0, -1, -1]]
    assert documents_of(order[:1], positions[:1]).tolist() == [[0, 1, 1, 2]]
    # Left padding as `generate` numbers it.
    assert documents_of(torch.tensor([[1, 1, 0, 1, 2]]), torch.tensor([[2, 4]])).unique().numel() == 1


@pytest.mark.parametrize("layout", [None, "half"])
def test_memory_makes_steps_equal_one_pass(layout: Any) -> None:
    attention = module(layout=layout)
    hidden = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    meta = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 1, 0, 1, 0]])
    angle = torch.arange(9, dtype=torch.float64)[None, :, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
    turns = (angle.cos(), angle.sin())

    def run(start: int, stop: int, memory: MetaMemory | None, past: int = 0) -> Tensor:
        from hf_pretrain_ext.meta_tokens.attention import gather_rotary

        context = meta_context(positions_of(meta[:, start:stop], 1), stop - start, memory=memory, past=past)
        part = hidden[:, start:stop]
        if not context.count:
            return part
        rotary = gather_rotary(*(each[:, start:stop] for each in turns), context) if layout else None
        return context.add(part, attention(context.gather(part), context.mask, rotary, memory))

    whole = run(0, 9, None)
    memory = MetaMemory()
    steps = [run(a, b, memory, past=a) for a, b in ((0, 4), (4, 5), (5, 8), (8, 9))]
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-12, rtol=0)
    # What is forgotten can be done again, differently.
    memory.forget(5)
    assert memory.places is not None and int(memory.places.max()) < 5
    again = [run(a, b, memory, past=a) for a, b in ((5, 6), (6, 9))]
    assert torch.allclose(torch.cat(again, 1), whole[:, 5:], atol=1e-12, rtol=0)


def filled() -> tuple[Any, MetaMemory]:
    from transformers import DynamicCache

    cache, memory = DynamicCache(), MetaMemory()
    cache.update(torch.randn(3, 1, 5, 2), torch.randn(3, 1, 5, 2), 0)
    hang_memory(cache, memory)
    memory.append(torch.tensor([[0, 3], [1, -1], [2, 4]]))
    memory.extend(0, torch.randn(3, 1, 2, 4), torch.randn(3, 1, 2, 4))
    return cache, memory


def test_the_memory_follows_what_is_done_to_a_cache() -> None:
    from transformers import DynamicCache

    cache, memory = filled()
    assert isinstance(cache, DynamicCache) and type(cache).__name__ == "DynamicCache"
    keys, values = memory.layers[0]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert memory.places is not None and memory.places.tolist() == [[2, 4], [0, 3], [0, 3]]
    assert torch.equal(memory.layers[0][0], keys[[2, 0, 0]]) and torch.equal(memory.layers[0][1], values[[2, 0, 0]])
    assert len(cache.layers[0].keys) == 3
    cache.batch_select_indices(torch.tensor([0, 1]))
    cache.batch_repeat_interleave(2)
    assert memory.places.tolist() == [[2, 4], [2, 4], [0, 3], [0, 3]] and len(cache.layers[0].keys) == 4
    cache.crop(-2)
    assert memory_of(cache, int(cache.get_seq_length())).places.tolist() == [[2], [2], [0], [0]]  # type: ignore[union-attr]
    assert memory.layers[0][0].shape == (4, 1, 1, 4)
    cache.reset()
    assert memory_of(cache, int(cache.get_seq_length())).count == 0


def test_copies_of_a_cache_are_independent() -> None:
    cache, _ = filled()
    other = copy.deepcopy(cache)
    other.reorder_cache(torch.tensor([1, 1, 1]))
    ours, theirs = memory_of(cache, 5).places, memory_of(other, 5).places
    assert ours is not None and theirs is not None
    assert ours.tolist() == [[0, 3], [1, -1], [2, 4]] and theirs.tolist() == [[1, -1]] * 3
    assert type(other) is type(cache)


def test_a_cache_that_something_else_filled_is_refused() -> None:
    from transformers import DynamicCache

    cache = DynamicCache()
    assert memory_of(cache, 0).count == 0
    stranger = DynamicCache()
    stranger.update(torch.randn(1, 1, 5, 2), torch.randn(1, 1, 5, 2), 0)
    with pytest.raises(ValueError, match="DynamicCache of 5 tokens that this model did not see"):
        memory_of(stranger, 5)
    with pytest.raises(ValueError, match="of 3 rows, and input_ids has 2"):
        meta_context(torch.tensor([[5], [6]]), 9, memory=filled()[1])


def test_compiles_without_a_graph_break() -> None:
    attention = module(torch.float32, layout="half")
    context = meta_context(torch.tensor([[1, 4, 6], [2, 3, -1]]), LENGTH, torch.tensor([[0, 0, 1], [0, 0, -1]]))
    hidden, rotary = torch.randn(2, LENGTH, HIDDEN), (torch.rand(2, 3, 4), torch.rand(2, 3, 4))

    def run(hidden: Tensor) -> Tensor:
        made = meta_context(context.positions, LENGTH, torch.tensor([[0, 0, 1], [0, 0, 1]]))
        return made.add(hidden, attention(made.gather(hidden), made.mask, rotary))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(hidden), run(hidden), atol=1e-6)


def test_no_work_is_done_at_other_positions() -> None:
    """Floating-point operations of the projections go with the meta-tokens, not with the length."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(length: int, meta: int) -> int:
        context = meta_context(torch.arange(meta)[None], length)
        hidden = torch.randn(1, length, HIDDEN)
        with FlopCounterMode(display=False) as counter:
            attention(context.gather(hidden), context.mask)
        return counter.get_total_flops()

    attention = module(torch.float32)
    assert count(1000, 10) == count(100, 10) > 0
    assert count(1000, 20) == 2 * count(1000, 10)
