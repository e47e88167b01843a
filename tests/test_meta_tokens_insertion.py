"""Where meta-tokens go and what becomes of labels, positions, masks and documents: against rows written by hand."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from hf_pretrain_ext import PackedCollator, check_isolation, pack
from hf_pretrain_ext.meta_tokens.batches import Insertion, mark
from hf_pretrain_ext.meta_tokens.boundaries import ending_tokens
from hf_pretrain_ext.meta_tokens.insertion import checked_fraction, draw_positions, insert, meta_counts
from hf_pretrain_ext.meta_tokens.rows import with_meta_tokens

META = 99
N = -100


def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tokenizer()


# Insertion by hand


def test_labels_go_with_their_tokens_and_metas_predict_the_next_text() -> None:
    """transformers takes label t + 1 as the target of position t; written out, position by position."""
    text = torch.tensor([[5, 6, 7, 8]])
    made = insert(text, text, torch.tensor([[1, 3, 4]]), META)
    assert made["input_ids"].tolist() == [[5, 99, 6, 99, 99, 7, 8]]
    assert made["labels"].tolist() == [[N, N, 6, N, N, 7, 8]]
    targets = made["labels"][0, 1:].tolist()
    assert dict(enumerate(zip(made["input_ids"][0].tolist(), targets, strict=False))) == {
        0: (5, N),  # its next token is a meta-token, which is no target
        1: (99, 6),  # a meta-token predicts the next text token
        2: (6, N),
        3: (99, N),  # of two in a row the first predicts nothing
        4: (99, 7),  # and the last the text
        5: (7, 8),
    }
    # Every token of text but the first is predicted once, as without meta-tokens.
    assert [target for target in targets if target != N] == [6, 7, 8]


def test_the_first_token_of_a_row_bears_no_loss_as_without_meta_tokens() -> None:
    made = insert(torch.tensor([[5, 6]]), torch.tensor([[5, 6]]), torch.tensor([[0]]), META)
    assert made["input_ids"].tolist() == [[99, 5, 6]] and made["labels"].tolist() == [[N, N, 6]]
    # Nor that of a document, where labels are not given.
    positions = torch.tensor([[0, 1, 0, 1]])
    made = insert(torch.tensor([[5, 6, 7, 8]]), None, torch.tensor([[2]]), META, position_ids=positions)
    assert made["labels"].tolist() == [[N, 6, N, N, 8]]


def test_the_models_loss_is_that_of_the_shift_by_hand() -> None:
    model = tiny.model(vocabulary=100).double().eval()
    text = torch.randint(1, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    made = insert(text, None, draw_positions([1, 2, 3], 12, 4), META)
    loss = model(input_ids=made["input_ids"], labels=made["labels"], use_cache=False).loss
    logits = model(input_ids=made["input_ids"], use_cache=False).logits.log_softmax(-1)
    losses = [
        -logits[row, place, made["input_ids"][row, place + 1]]
        for row, place in itertools.product(range(3), range(15))
        # What a row begins with, meta-token or not, is not predicted.
        if made["input_ids"][row, place + 1] != META and (made["input_ids"][row, : place + 1] != META).any()
    ]
    assert float(loss.detach()) == pytest.approx(float(torch.stack(losses).mean().detach()), rel=1e-6)


def test_masked_labels_of_the_data_stay_masked() -> None:
    made = insert(torch.tensor([[5, 6, 7]]), torch.tensor([[N, N, 7]]), torch.tensor([[0, 2]]), META)
    assert made["labels"].tolist() == [[N, N, N, N, 7]]


def test_documents_keep_their_own_positions_and_metas_are_of_the_next_token() -> None:
    """Two documents, [5 6 7] and [8 9]: one meta-token in front of the second, one behind all."""
    made = insert(
        torch.tensor([[5, 6, 7, 8, 9]]),
        torch.tensor([[N, 6, 7, N, 9]]),
        torch.tensor([[1, 4, 7]]),
        META,
        position_ids=torch.tensor([[0, 1, 2, 0, 1]]),
    )
    assert made["input_ids"].tolist() == [[5, 99, 6, 7, 99, 8, 9, 99]]
    assert made["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert made["labels"].tolist() == [[N, N, 6, 7, N, N, 9, N]]
    assert made["meta_documents"].tolist() == [[0, 1, 1]]


def test_rows_that_begin_in_the_middle_of_a_text_keep_their_first_position() -> None:
    made = insert(torch.tensor([[5, 6, 7]]), None, torch.tensor([[1]]), META, position_ids=torch.tensor([[8, 9, 0]]))
    assert made["position_ids"].tolist() == [[8, 9, 10, 0]]


def test_padding_stays_behind_and_bears_no_loss() -> None:
    made = insert(
        torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]]),
        torch.tensor([[5, 6, 7, 8], [5, 6, N, N]]),
        torch.tensor([[0, 2], [1, -1]]),
        META,
        attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    )
    assert made["input_ids"].tolist() == [[99, 5, 99, 6, 7, 8], [5, 99, 6, 0, 0, 0]]
    assert made["labels"].tolist() == [[N, N, N, 6, 7, 8], [N, N, 6, N, N, N]]
    assert made["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]
    assert made["meta_documents"].tolist() == [[0, 0], [0, -1]]


@pytest.mark.parametrize("starts", [None, torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])])
def test_padding_is_no_label_where_the_labels_are_the_text(starts: Any) -> None:
    made = insert(
        torch.tensor([[5, 6, 7, 8], [5, 6, 3, 3]]),
        None,
        torch.tensor([[1], [1]]),
        META,
        attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        position_ids=starts,
    )
    assert made["labels"].tolist() == [[N, N, 6, 7 if starts is None else N, 8], [N, N, 6, N, N]]


def test_types_are_kept() -> None:
    given = torch.tensor([[5, 6, 7]], dtype=torch.int32)
    made = insert(given, given, torch.tensor([[1]]), META, position_ids=given - 5, attention_mask=given > 0)
    kinds = {name: made[name].dtype for name in ("input_ids", "labels", "position_ids", "attention_mask")}
    assert kinds == {**dict.fromkeys(kinds, torch.int32), "attention_mask": torch.bool}


def test_no_meta_tokens_change_nothing() -> None:
    text = torch.tensor([[5, 6, 7]])
    made = insert(text, text, torch.empty(1, 0, dtype=torch.int64), META, position_ids=torch.tensor([[0, 1, 0]]))
    assert torch.equal(made["input_ids"], text) and made["position_ids"].tolist() == [[0, 1, 0]]
    assert made["labels"].tolist() == [[N, 6, 7]] and text.tolist() == [[5, 6, 7]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.tensor([5, 6])}, "input_ids must have the shape"),
        ({"positions": torch.tensor([1])}, r"positions must have the shape \(batch, meta\) with a batch of 2"),
        ({"positions": torch.tensor([[1], [4]])}, "positions must lie below 4"),
        ({"positions": torch.tensor([[1], [-1]])}, "0 to 1 meta-tokens a row: without an attention_mask"),
        ({"positions": torch.tensor([[1, 1], [0, 2]])}, "positions hold a place of a row twice"),
        ({"positions": torch.tensor([[0, 2], [3, 1]])}, r"positions must rise in each row, .*, got \[3, 1\]\. Sort"),
        ({"positions": torch.tensor([[-1, 2], [1, 3]])}, r"positions must rise in each row, .*, got \[-1, 2\]"),
        ({"labels": torch.ones(2, 4)}, r"labels must have the shape of input_ids, \(2, 3\), got \(2, 4\)"),
        ({"attention_mask": torch.tensor([[0, 1, 1]] * 2)}, "must be ones and then zeros"),
        ({"attention_mask": torch.tensor([[1, 0, 0]] * 2), "positions": torch.tensor([[2], [2]])}, "in the padding"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    given = {"input_ids": torch.ones(2, 3).long(), "labels": None, "positions": torch.tensor([[1], [0]]), **change}
    with pytest.raises(ValueError, match=message):
        insert(meta_id=META, **given)


# Where they go


def test_counts_are_those_of_decimals() -> None:
    """In floats 0.29 · 100 is 28.999999999999996."""
    assert meta_counts(0.29, [100, 101]).tolist() == [29, 29]
    assert meta_counts(0.1, 1024) == 102 and meta_counts(0.1, 9) == 0 and meta_counts(0, 10**6) == 0
    assert checked_fraction(0.1).denominator == checked_fraction(np.float64(0.1)).denominator == 10
    for wrong in (-0.1, 0.51, float("nan"), True, "0.1", None):
        with pytest.raises(ValueError, match=r"fraction must be meta-tokens per token of text, from 0 to 0.5"):
            checked_fraction(wrong)


def test_every_set_of_places_is_as_likely_as_any_other() -> None:
    """15 sets of 2 places of 6, 30,000 samples: each within five standard deviations of its share."""
    drawn = draw_positions(np.arange(30_000), 4, 2)
    seen = Counter(map(tuple, drawn.tolist()))
    assert set(seen) == set(itertools.combinations(range(6), 2))
    assert all(abs(count - 2000) < 5 * (2000 * 14 / 15) ** 0.5 for count in seen.values())


def test_places_depend_on_the_sample_alone() -> None:
    together = draw_positions([11, 12, 13], [40, 7, 40], [5, 2, 4])
    alone = [draw_positions([11], 40, 5), draw_positions([12], 7, 2), draw_positions([13], 40, 4)]
    assert together[0].tolist() == alone[0][0].tolist()
    assert together[1].tolist() == [*alone[1][0].tolist(), -1, -1, -1]
    assert together[2].tolist() == [*alone[2][0].tolist(), -1]
    assert draw_positions([12], 40, 5).tolist() != together[:1].tolist()


def test_places_are_the_same_on_every_machine() -> None:
    """Written down once: other numbers would be another experiment."""
    assert draw_positions([0, 1, 2**62], 20, 4).tolist() == [
        [1, 7, 13, 16],
        [2, 10, 18, 19],
        [6, 11, 19, 23],
    ]


def test_one_behind_every_so_many_tokens() -> None:
    assert draw_positions([5], 10, 3, "every_n").tolist() == [[3, 7, 11]]
    ids = torch.arange(10)[None]
    made = insert(ids, None, draw_positions([5], 10, 3, "every_n"), META)
    assert made["input_ids"].tolist() == [[0, 1, 2, 99, 3, 4, 5, 99, 6, 7, 8, 99, 9]]


def test_boundaries_come_first() -> None:
    """Fewer ends than meta-tokens: behind each end one, the others behind other tokens, the last token left aside."""
    ends = torch.zeros(1, 20, dtype=torch.bool)
    ends[0, [4, 9]] = True
    for seed in range(50):
        places = draw_positions([seed], 20, 4, "boundaries", ends)[0] - torch.arange(4)
        assert {5, 10} <= set(places.tolist()) and len(set(places.tolist())) == 4 and max(places.tolist()) < 20


def test_of_many_boundaries_some_are_drawn() -> None:
    ends = torch.zeros(1, 20, dtype=torch.bool)
    ends[0, ::2] = True
    seen = Counter(
        int(place)
        for seed in range(2000)
        for place in draw_positions([seed], 20, 2, "boundaries", ends)[0] - torch.arange(2)
    )
    assert set(seen) == set(range(1, 21, 2))
    assert all(abs(count - 400) < 5 * 400**0.5 for count in seen.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"how": "often"}, r"how must be one of \('uniform', 'every_n', 'boundaries'\), got 'often'"),
        ({"counts": -1}, "counts must lie from 0 on"),
        ({"counts": 11, "how": "every_n"}, "at most the tokens of text"),
        ({"how": "boundaries"}, "boundaries are needed with how='boundaries'"),
        ({"boundaries": torch.ones(1, 10, dtype=torch.bool)}, "and of no use else"),
        ({"text": 1 << 27}, "are longer than the 67,108,864"),
    ],
)
def test_places_that_cannot_be_drawn(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_positions(**{"seeds": [1], "text": 10, "counts": 2, **given})


# Whole batches


def written_out(
    ids: list[int], labels: list[int], documents: list[int], places: list[int]
) -> tuple[list[int], list[int], list[int], list[int]]:
    """One sample with its meta-tokens, token by token: ids, labels, documents, positions."""
    found: tuple[list[int], list[int], list[int], list[int]] = ([], [], [], [])
    token = 0
    for place in range(len(ids) + len(places)):
        meta = place in places
        document = documents[min(token, len(ids) - 1)]
        starts = not found[2] or found[2][-1] != document
        for column, value in zip(
            found,
            (
                META if meta else ids[token],
                N if meta or token == 0 else labels[token],
                document,
                0 if starts else found[3][-1] + 1,
            ),
            strict=True,
        ):
            column.append(value)
        token += not meta
    return found


@pytest.mark.parametrize("layout", ["whole", "right", "left", "joined"])
@pytest.mark.parametrize("length", ["longer", "fixed"])
@pytest.mark.parametrize("how", ["uniform", "every_n", "boundaries"])
def test_batches_against_samples_written_out(how: Any, length: Any, layout: str) -> None:
    """Random batches in every layout: whole rows, padded on either side, one sample behind the other."""
    draw = random.Random(f"{how}{length}{layout}")
    for _ in range(40):
        check_batch(draw, how, length, layout)


def check_batch(draw: random.Random, how: Any, length: Any, layout: str) -> None:
    width, fraction, packed = draw.randint(1, 30), draw.choice([0.0, 0.1, 0.3, 0.5]), draw.random() < 0.6
    sizes = [draw.randint(1, width) for _ in range(draw.randint(1, 4))]
    sizes = [width] * len(sizes) if layout == "whole" else [width, *sizes[1:]]
    seeds = [draw.randrange(2**62) for _ in sizes]
    ends = (3, 4, 5) if how == "boundaries" else ()
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": [], "attention_mask": []}
    expected = []
    for size, seed in zip(sizes, seeds, strict=True):
        ids = [draw.randint(1, 90) for _ in range(size)]
        labels = [number if draw.random() < 0.8 else N for number in ids]
        cuts = draw.sample(range(1, size), draw.randint(0, min(3, size - 1))) if packed else []
        documents = [sum(cut <= place for cut in cuts) for place in range(size)]
        positions = [place - max([0, *(cut for cut in cuts if cut <= place)]) for place in range(size)]
        padding = 0 if layout == "joined" else width - size
        for name, values, filler in (
            ("input_ids", ids, 0),
            ("labels", labels, N),
            ("position_ids", positions, 0),
            ("attention_mask", [1] * size, 0),
        ):
            filled = [filler] * padding
            columns[name].append([*filled, *values] if layout == "left" else [*values, *filled])
        count = int(fraction * 10) * size // 10
        text = size - count if length == "fixed" else size
        closed = [documents[place : place + 2] for place in range(text)]
        stops = [[ids[p] in ends or (p + 1 < text and len(set(closed[p])) > 1) for p in range(text)]]
        drawn = draw_positions([seed], text, count, how, torch.tensor(stops) if how == "boundaries" else None)
        expected.append((*written_out(ids[:text], labels[:text], documents[:text], drawn[0].tolist()), drawn[0]))
    behind = draw.randint(0, 3) if layout == "joined" else 0
    if layout == "joined":
        fillers = {"input_ids": 0, "labels": N, "position_ids": 0}
        batch = {
            name: torch.tensor([[*itertools.chain(*columns[name]), *[fillers[name]] * behind]]) for name in fillers
        }
    else:
        batch = {name: torch.tensor(rows) for name, rows in columns.items()}
    if layout == "whole":
        del batch["attention_mask"]
    if not packed:
        del batch["position_ids"]
    before = {name: tensor.clone() for name, tensor in batch.items()}
    made = Insertion(META, fraction, how, length, ends)(batch, seeds, sizes)
    assert all(torch.equal(batch[name], tensor) for name, tensor in before.items())
    if layout == "joined":
        compare_joined(made, expected, behind, packed)
    else:
        compare_rows(made, expected, layout, width, packed, fraction, length)


def compare_joined(made: dict[str, Any], expected: list[Any], behind: int, packed: bool) -> None:
    for name, column in (("input_ids", 0), ("labels", 1), ("position_ids", 3)):
        if name in made:
            values = made[name][0].tolist()
            assert values[: len(values) - behind] == [value for sample in expected for value in sample[column]]
    offset, number, places, documents = 0, 0, [], []
    for ids, _, document, _, drawn in expected:
        places += (drawn + offset).tolist()
        documents += [document[place] + number for place in drawn.tolist()]
        offset, number = offset + len(ids), number + (max(document) + 1) * packed
    assert made["meta_positions"].tolist() == [places] and made["meta_documents"].tolist() == [documents]


def compare_rows(
    made: dict[str, Any], expected: list[Any], layout: str, width: int, packed: bool, fraction: float, length: str
) -> None:
    most = int(fraction * 10) * width // 10
    total = width if length == "fixed" else width + most
    assert made["input_ids"].shape[1] == total and made["meta_positions"].shape[1] == most
    for row, (ids, labels, documents, positions, drawn) in enumerate(expected):
        padding = total - len(ids)
        # The first row has no padding: it is as wide as the batch.
        front = padding if layout == "left" else 0
        real = slice(front, front + len(ids))
        assert made["input_ids"][row, real].tolist() == ids
        assert made["labels"][row, real].tolist() == labels
        assert set(made["labels"][row].tolist()[: real.start] + made["labels"][row].tolist()[real.stop :]) <= {N}
        assert not packed or made["position_ids"][row, real].tolist() == positions
        if layout != "whole":
            mask = made["attention_mask"][row]
            assert mask[real].all() and int(mask.sum()) == len(ids)
        none = [-1] * (most - len(drawn))
        assert made["meta_positions"][row].tolist() == (drawn + front).tolist() + none
        assert made["meta_documents"][row].tolist() == [documents[place] for place in drawn.tolist()] + none


def test_what_attention_kernels_are_told_is_made_anew() -> None:
    """Two samples of one and of two documents, one behind the other, as TRL has them without padding."""
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9]]),
        "labels": torch.tensor([[N, 6, 7, N, 9]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1]]),
        "cu_seq_lens_q": torch.tensor([0, 3, 5], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, 3, 5], dtype=torch.int32),
        "max_length_q": 3,
        "max_length_k": 3,
        "seq_idx": torch.tensor([[0, 0, 0, 1, 1]], dtype=torch.int32),
    }
    made = Insertion(META, 0.5, "every_n")(batch, [0, 1], [3, 2])
    assert made["input_ids"].tolist() == [[5, 6, 7, 99, 8, 9, 99]]
    assert made["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    for side in "qk":
        assert made[f"cu_seq_lens_{side}"].tolist() == [0, 4, 7] and made[f"max_length_{side}"] == 4
        assert made[f"cu_seq_lens_{side}"].dtype == torch.int32
    assert made["seq_idx"].tolist() == [[0, 0, 0, 0, 1, 1, 1]] and made["seq_idx"].dtype == torch.int32


def test_a_batch_that_has_them_is_only_marked() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 99, 6, 99], [99, 0, 99, 0]]),
        "labels": torch.tensor([[5, 99, 6, 99], [99, 0, N, N]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "position_ids": torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0]]),
    }
    made = mark(batch, META)
    assert made["labels"].tolist() == [[5, N, 6, N], [N, 0, N, N]]
    assert made["meta_positions"].tolist() == [[1, 3], [0, -1]]
    assert made["meta_documents"].tolist() == [[0, 1], [0, -1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": [[5, 6]]}, r"a batch must have input_ids of the shape \(batch, sequence\)"),
        ({"input_ids": torch.tensor([[5, 99]])}, "input_ids hold the meta-token 99 already"),
        ({"labels": torch.ones(1, 3)}, r"labels must have the shape of input_ids, \(1, 2\), got \(1, 3\)"),
        ({"attention_mask": torch.ones(1, 1, 2, 2)}, r"attention_mask must have the shape of input_ids"),
        ({"token_type_ids": torch.ones(1, 2)}, "the batch has token_type_ids .* nothing says what it is at meta-tok"),
        ({"attention_mask": torch.tensor([[1, 0]] * 1), "seq_idx": torch.zeros(1, 2)}, "the batch has seq_idx, which"),
    ],
)
def test_batches_that_cannot_take_them(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Insertion(META, 0.5)({"input_ids": torch.tensor([[5, 6]]), **change}, [0])


def test_other_mistakes_about_batches() -> None:
    ids = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    holes = {**ids, "attention_mask": torch.tensor([[1, 0, 1, 1]])}
    masked = {**ids, "attention_mask": torch.ones(1, 4)}
    for batch, seeds, lengths, message in (
        (ids, [0, 1], None, "2 seeds for 1 samples"),
        (ids, [0, 1], [3, 2], "lengths are of 5 tokens, the batch has 4"),
        (masked, [0, 1], [2, 2], "has an attention_mask, by which they would see each other"),
        (holes, [0], None, "attention_mask has zeros between ones"),
    ):
        with pytest.raises(ValueError, match=message):
            Insertion(META, 0.5)(batch, seeds, lengths)
    for given, message in (
        ({"fraction": 2}, "fraction must be"),
        ({"how": "x"}, "how must be one of"),
        ({"length": "x"}, "length must be one of"),
        ({"ends": (1,)}, "ends are for how='boundaries'"),
    ):
        with pytest.raises(ValueError, match=message):
            Insertion(**{"meta_id": META, "fraction": 0.1, **given})  # type: ignore[arg-type]


# Isolation


def test_documents_of_packed_rows_stay_apart() -> None:
    """The model sees rows with meta-tokens as it sees packed ones: no output depends on another document."""
    rows = pack(tiny.documents(60), tiny.tokenizer(), 24, remainder="drop")
    batch = Insertion(50, 0.25)(PackedCollator()([rows[n] for n in range(4)]), range(4))
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    model = tiny.model()
    model.config.use_cache = False
    assert check_isolation(model, inputs) == 0
    masked = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    with pytest.raises(ValueError, match="influence each other"):
        check_isolation(model, masked)


# Tokens that end something


def test_tokens_that_end_a_sentence() -> None:
    reader = tiny.tokenizer()
    assert [reader.convert_ids_to_tokens(number) for number in ending_tokens(reader)] == ["<eos>", "."]
    assert ending_tokens(reader, ["b", 2, "b"]) == tuple(sorted({reader.convert_tokens_to_ids("b"), 2}))
    with pytest.raises(ValueError, match=r"boundaries has \['nope', 999\], which the tokenizer does not know"):
        ending_tokens(reader, ["nope", 999, "a"])
    reader.add_tokens(['said."', "e.g", "line\nbreak", "no. stop", "はい。"])
    added = set(ending_tokens(reader)) - set(ending_tokens(tiny.tokenizer()))
    assert {reader.convert_ids_to_tokens(number) for number in added} == {'said."', "line\nbreak", "はい。"}


# Datasets


def test_rows_of_a_dataset_are_as_the_collator_would_have_them() -> None:
    reader = tiny.tokenizer()
    rows = pack(tiny.documents(60), reader, 24)
    made = with_meta_tokens(rows, reader, fraction=0.25)
    number = reader.convert_tokens_to_ids("<|meta|>")
    assert made.column_names == [*rows.column_names, "labels"] and len(made) == len(rows)
    for old, new in zip(rows, made, strict=True):
        assert [token for token in new["input_ids"] if token != number] == old["input_ids"]
        assert new["input_ids"].count(number) == 6 and sum(new["seq_lengths"]) == 30
        # What bears a loss is what did.
        before = PackedCollator()([old])["labels"][0].tolist()
        after = PackedCollator()([new])["labels"][0].tolist()
        assert [label for label in after if label != N] == [label for label in before if label != N]
        starts = [place for place, position in enumerate(new["position_ids"]) if position == 0]
        assert np.diff([*starts, 30]).tolist() == new["seq_lengths"]
    assert with_meta_tokens(rows, reader, fraction=0.25, seed=1)[0] != made[0]
    assert with_meta_tokens(rows, reader, fraction=0.25)[:] == made[:]


def test_ragged_rows_of_a_dataset() -> None:
    reader = tiny.tokenizer()
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8], [9], []], "attention_mask": [[1] * 4, [1], []]})
    made = with_meta_tokens(rows, reader, fraction=0.5, positions="every_n", length="fixed")
    assert made["input_ids"][:] == [[5, 43, 6, 43], [9], []] and made["labels"][:] == [[N, N, 6, N], [N], []]
    assert made["attention_mask"][:] == [[1, 1, 1, 1], [1], []]
    tagged = Dataset.from_dict({"input_ids": [[5, 6], [7]], "tags": [["a", "b"], ["c", "d"]], "url": ["x", "y"]})
    assert with_meta_tokens(tagged, reader, fraction=0.5)["tags"][:] == [["a", "b"], ["c", "d"]]
    labelled = Dataset.from_dict({"input_ids": [[5, 6]], "labels": [[N, 6]]})
    assert with_meta_tokens(labelled, reader, fraction=0.5, positions="boundaries")["labels"][:] in (
        [[N, N, 6]],
        [[N, 6, N]],
    )


@pytest.mark.parametrize(
    ("rows", "given", "error", "message"),
    [
        ([{"input_ids": [1]}], {}, TypeError, "dataset must be a datasets.Dataset, got list"),
        (Dataset.from_dict({"text": ["a"]}), {}, ValueError, "and no input_ids"),
        (Dataset.from_dict({"input_ids": [[5, 43]]}), {}, ValueError, "hold the meta-token 43 already"),
        (
            Dataset.from_dict({"input_ids": [[5, 6]], "attention_mask": [[1, 0]]}),
            {},
            ValueError,
            "attention_mask has zeros: rows are padded",
        ),
        (
            Dataset.from_dict({"input_ids": [[5, 6], [7]], "completion_mask": [[0, 1], [1]]}),
            {},
            ValueError,
            "has the column completion_mask, .*nothing says what it is at meta-tokens. Take it out with",
        ),
        (Dataset.from_dict({"input_ids": [[5]]}), {"seed": -1}, ValueError, "seed must be an integer from 0 on"),
        (Dataset.from_dict({"input_ids": [[5]]}), {"fraction": 0.6}, ValueError, "fraction must be"),
        (Dataset.from_dict({"input_ids": [[5]]}), {"boundaries": ["."]}, ValueError, "boundaries are for positions="),
    ],
)
def test_datasets_that_cannot_take_them(rows: Any, given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        with_meta_tokens(rows, tiny.tokenizer(), **given)
