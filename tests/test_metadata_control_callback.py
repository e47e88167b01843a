"""Control tokens in a Trainer: what tokenizer, model, checkpoints and configs hold, and what a model learns."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import settings
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_metadata_callback import Watch, run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_pretrain_ext import PluginError
from hf_pretrain_ext.callbacks import MetadataCallback, ReplayCallback
from hf_pretrain_ext.metadata import BlockStream, ControlTokens, Template, generate
from hf_pretrain_ext.vocabulary import add_tokens, fit_embeddings

G, B = "<|good|>", "<|bad|>"
SIZE = len(tiny.tokenizer())
WITHIN, BEYOND = 64, SIZE
"""Rows of models: with room for the tokens, and without."""


def callback(template: Any = None, **given: Any) -> MetadataCallback:
    tokens = ControlTokens(0.5, **{"drop": 0.0, **given.pop("tokens", {})})
    return MetadataCallback(template, **{"block_size": 16, "cooldown": 0.25, "control": tokens, **given})


def trainer(folder: Path, *plugins: Any, rows: int = BEYOND, **given: Any) -> Any:
    given = {"data": settings.scored_documents(80), "processing_class": tiny.tokenizer(), **given}
    given.setdefault("model", tiny.model(vocabulary=rows))
    return run(folder, *plugins, **given)


def rows_of(model: Any, tokenizer: Any) -> torch.Tensor:
    found: torch.Tensor = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids([G, B])]
    return found.detach().clone()


class AtStart(TrainerCallback):
    """Rows of the control tokens before the first step, and whether the optimizer has them."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.rows = rows_of(model, kwargs["processing_class"])
        held = {id(parameter) for group in kwargs["optimizer"].param_groups for parameter in group["params"]}
        self.held = id(model.get_input_embeddings().weight) in held
        self.table = model.get_input_embeddings().weight.detach().clone()


@pytest.mark.parametrize("rows", [WITHIN, BEYOND])
def test_tokenizer_at_extend_model_when_training_begins(rows: int, tmp_path: Path) -> None:
    start, watch = AtStart(), Watch()
    trained = trainer(tmp_path, callback(), start, watch, rows=rows)
    tokenizer = trained.processing_class
    ids = tokenizer.convert_tokens_to_ids([G, B])
    assert ids == [SIZE, SIZE + 1] and len(trained.model.get_input_embeddings().weight) == rows
    before = trained.model.get_input_embeddings().weight.detach().clone()
    trained.get_train_dataloader()  # ids that the model does not have yet are none of its faults
    trained.train()
    assert len(start.table) == max(rows, SIZE + 2) == trained.model.config.vocab_size and start.held
    assert torch.allclose(start.rows, before[:SIZE].mean(0).expand(2, -1), atol=1e-7)
    kept = [number for number in range(rows) if number not in ids]
    assert torch.equal(start.table[kept], before[kept])
    assert not torch.equal(rows_of(trained.model, tokenizer), start.rows)
    seen = torch.cat([batch["input_ids"] for step in range(5) for batch in watch.steps[step]])
    labels = torch.cat([batch["labels"] for step in range(5) for batch in watch.steps[step]])
    where = torch.isin(seen, torch.tensor(ids))
    assert where.sum() > 20 and (labels[where] == -100).all()
    # In the cooldown there are none.
    for step in (5,):
        assert not torch.isin(torch.cat([b["input_ids"] for b in watch.steps[step]]), torch.tensor(ids)).any()


@pytest.mark.parametrize("rows", [WITHIN, BEYOND])
def test_rows_are_initialised_once(rows: int, tmp_path: Path) -> None:
    """Not by a second train(), and not in a model that was loaded from a finished run."""
    start = AtStart()
    trained = trainer(tmp_path, callback(), start, rows=rows)
    trained.train()
    trained.save_model(str(tmp_path / "model"))
    end = rows_of(trained.model, trained.processing_class)
    trained.train()
    assert torch.equal(start.rows, end)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.convert_tokens_to_ids([G, B]) == [SIZE, SIZE + 1]
    for reader in (tokenizer, tiny.tokenizer()):
        again = AtStart()
        other = trainer(tmp_path / "other", callback(), again, model=model, processing_class=reader, max_steps=4)
        other.train()
        assert torch.equal(again.rows, end)
        end = rows_of(model, tokenizer)


def with_tokens(*tokens: str) -> Any:
    """A tokenizer that came with them."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": list(tokens)})
    return tokenizer


def test_rows_that_were_trained_elsewhere_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By a second train() too; tokens that are added now, or have no rows, begin with the mean."""
    for tokenizer, rows, kept in (
        (with_tokens(G, B), WITHIN, [True, True]),
        (with_tokens(G), WITHIN, [True, False]),
        (with_tokens(G, B), BEYOND, [False, False]),
        (tiny.tokenizer(), WITHIN, [False, False]),
    ):
        caplog.clear()
        start = AtStart()
        trained = trainer(tmp_path, callback(), start, rows=rows, processing_class=tokenizer)
        before = trained.model.get_input_embeddings().weight.detach().clone()
        said = any("and the model keeps the rows that it has" in record.message for record in caplog.records)
        assert said == any(kept)
        trained.train()
        for number, stays in enumerate(kept):
            row = before[SIZE + number] if stays else before[: SIZE + kept[0]].mean(0)
            torch.testing.assert_close(start.rows[number], row, rtol=0, atol=0 if stays else 1e-7)
        end = rows_of(trained.model, tokenizer)
        trained.train()
        assert torch.equal(start.rows, end)


def test_resume_is_exact_with_rows_that_were_kept(tmp_path: Path) -> None:
    whole = trainer(tmp_path, callback(), rows=WITHIN, processing_class=with_tokens(G, B), save_strategy="steps")
    whole.args.save_steps = whole.state.save_steps = 3
    whole.train()
    resumed = trainer(tmp_path, callback(), rows=WITHIN, processing_class=with_tokens(G, B))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert tiny.same_weights(whole, resumed)


@pytest.mark.parametrize("rows", [WITHIN, BEYOND])
@pytest.mark.parametrize("loaded", [False, True])
def test_resume_is_exact(rows: int, loaded: bool, tmp_path: Path) -> None:
    """With a model made anew, which gets its rows again, and with one loaded from the checkpoint."""

    class Save(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = state.global_step == 3

    whole = trainer(tmp_path, callback(), Save(), rows=rows)
    whole.train()
    folder = tmp_path / "checkpoint-3"
    given = {"model": AutoModelForCausalLM.from_pretrained(folder)} if loaded else {"rows": rows}
    resumed = trainer(tmp_path, callback(), **given)
    resumed.train(resume_from_checkpoint=str(folder))
    assert tiny.same_weights(whole, resumed)
    assert resumed.plugin_run.realised() == whole.plugin_run.realised()


def test_model_init_gets_rows_in_every_train(tmp_path: Path) -> None:
    from hf_pretrain_ext import PackedCollator, extend

    start, tokenizer = AtStart(), tiny.tokenizer()
    from transformers import Trainer

    made = extend(
        Trainer(
            model_init=lambda: tiny.model(vocabulary=SIZE),
            args=tiny.arguments(tmp_path),
            train_dataset=settings.scored_documents(80),
            processing_class=tokenizer,
            data_collator=PackedCollator(),
            callbacks=[callback(), start],
        )
    )
    for _ in range(2):
        made.train()
        assert torch.equal(start.rows[0], start.rows[1]) and len(start.table) == SIZE + 2


def test_config_and_tokenizer_say_what_was_trained(tmp_path: Path) -> None:
    given = callback("{domain} ", tokens={"segments": settings.thirds, "drop": 0.1})
    trained = trainer(tmp_path, given)
    trained.train()
    trained.save_model(str(tmp_path / "model"))
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert config.control_tokens["tokens"] == [G, B] and config.fitted_tokens == {G: SIZE, B: SIZE + 1}
    assert config.metadata_template["text"] == "{domain} "
    assert ControlTokens.load(tmp_path / "model") == ControlTokens(0.5, drop=0.1)
    assert Template.load(tmp_path / "model").text == "{domain} "
    settings_ = given.settings()["control"]
    assert (settings_["thresholds"], settings_["segments"]) == ([0.5], "function thirds")
    # Without a template there is none in the config.
    other = trainer(tmp_path / "other", callback())
    other.train()
    assert not hasattr(other.model.config, "metadata_template")


def test_beside_replay_of_raw_documents(tmp_path: Path) -> None:
    """Replayed documents become plain blocks, whatever they spell."""
    old = tiny.documents(40, seed=9)
    spelled = Dataset.from_dict({"text": [f"{text} {G}" for text in old["text"]]})
    watch = Watch()
    trained = trainer(tmp_path, callback(cooldown=0), ReplayCallback(spelled, ratio=0.5), watch)
    trained.train()
    ids = trained.processing_class.convert_tokens_to_ids([G, B])
    count = sum(torch.isin(b["input_ids"], torch.tensor(ids)).any(1).sum() for s in watch.steps.values() for b in s)
    assert count == trained.plugin_run.realised()["conditioned"]["samples"] == 12


def test_segments_as_documents_everywhere(tmp_path: Path) -> None:
    """A column of segments for training, the same or texts for what is replayed."""
    old = settings.scored_documents(40)
    parts = old.map(lambda row: {"parts": settings.thirds(row["text"])}).remove_columns("text")
    for replayed in (parts, tiny.documents(40, seed=9)):
        trained = trainer(
            tmp_path,
            callback(tokens={"segments": "parts"}),
            ReplayCallback(replayed, ratio=0.25),
            data=parts,
        )
        trained.train()
        assert set(trained.plugin_run.realised()) == {"conditioned", "plain", "replay"}


def test_streams(tmp_path: Path) -> None:
    watch = Watch()
    stream = settings.scored_documents(200).to_iterable_dataset(num_shards=3)
    trained = trainer(tmp_path, callback(), watch, data=stream, dataloader_num_workers=2)
    trained.train()
    views = trained.plugin_run.plan.sources
    assert all(isinstance(view.dataset, BlockStream) for view in views)
    ids = torch.tensor(trained.processing_class.convert_tokens_to_ids([G, B]))
    assert all(torch.isin(batch["input_ids"], ids).any() for step in range(4) for batch in watch.steps[step])
    assert not any(torch.isin(batch["input_ids"], ids).any() for batch in watch.steps[5])


# What is refused


def test_embeddings_that_cannot_learn_are_refused(tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(PluginError, match=r"the model has an adapter.*trainable_token_indices"):
        trainer(tmp_path, callback(), model=get_peft_model(tiny.model(), lora))
    fitted, tokenizer = tiny.model(vocabulary=SIZE), tiny.tokenizer()
    ids = add_tokens(tokenizer, [G, B])
    fit_embeddings(fitted, tokenizer, ids)
    with pytest.raises(PluginError, match="frozen and those of all control tokens are the same"):
        trainer(tmp_path, callback(), model=get_peft_model(fitted, lora))
    frozen = tiny.model(vocabulary=SIZE)
    frozen.get_input_embeddings().weight.requires_grad = False
    with pytest.raises(PluginError, match="frozen and those of all control tokens are the same"):
        trainer(tmp_path, callback(), model=frozen)


def test_an_adapter_over_fitted_rows_trains_them(tmp_path: Path) -> None:
    base, tokenizer = tiny.model(vocabulary=SIZE), tiny.tokenizer()
    ids = add_tokens(tokenizer, [G, B])
    fit_embeddings(base, tokenizer, ids)
    lora = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": ids})
    adapted = get_peft_model(base, lora)
    trained = trainer(tmp_path, callback(), model=adapted, processing_class=tokenizer, learning_rate=0.1)
    trained.train()
    delta = [v for k, v in adapted.named_parameters() if "trainable_tokens_delta" in k]
    assert len(delta) == 1 and not torch.equal(delta[0][0], delta[0][1])


def test_an_optimizer_of_the_users_is_refused_where_rows_must_come(tmp_path: Path) -> None:
    from transformers import Trainer

    class Given(Trainer):
        def __init__(self, model: Any, **kwargs: Any):
            super().__init__(model=model, optimizers=(torch.optim.SGD(model.parameters(), 0.1), None), **kwargs)

    with pytest.raises(PluginError, match="built with its own optimizer, which would not train the rows"):
        trainer(tmp_path, callback(), cls=Given)
    fits = trainer(tmp_path, callback(), cls=Given, rows=WITHIN)
    before = rows_of(fits.model, fits.processing_class)
    fits.train()
    assert not torch.equal(rows_of(fits.model, fits.processing_class), before)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"tokens": {"column": "toxicity"}}, {}, r"control tokens take the columns \['toxicity'\]"),
    ({"tokens": {"segments": "parts"}}, {}, "segments='parts' is no column of the dataset"),
    ({"tokens": {"tokens": ["<eos>", B]}}, {}, "which the tokenizer has as its"),
    ({"tokens": {"tokens": ["a", B]}}, {}, "which the tokenizer knows as ordinary text"),
    ({"tokens": {"missing": "error"}}, {"data": settings.scored_documents(30, lacking=True)}, "has no score"),
    ({"block_size": 4}, {}, "a block of 4 tokens is too short"),
    ({}, {"data": tiny.rows(40)}, "tokenized already"),
    ({}, {"processing_class": None}, "the Trainer has no tokenizer"),
]


@pytest.mark.parametrize(("settings_", "given", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_does_not_fit_is_said_before_training(
    settings_: dict[str, Any], given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(PluginError, match=message):
        trainer(tmp_path, callback(**settings_), **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"control": 0.5}, r"control must be ControlTokens, got 0\.5"),
        ({"missing": "plain"}, "missing without a template, of which there is none beside control"),
        ({"columns": {"a": "b"}}, "columns without a template"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        callback(**given)


def test_missing_scores_are_noted_and_traced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from hf_pretrain_ext import read_trace

    trained = trainer(tmp_path, callback(), data=settings.scored_documents(80, lacking=True))
    assert any("texts lack a score and go without a control token" in record.message for record in caplog.records)
    trained.train()
    event = next(event for event in read_trace(tmp_path) if event["event"] == "metadata")
    assert event["conditioned"]["missing_scores"] > 0 and event["conditioned"]["control_tokens"] > 0


# What it is for


def test_a_model_writes_what_its_control_token_stands_for(tmp_path: Path) -> None:
    """Texts of a's scored low, of b's high: behind either token, with nothing else, the model goes on as trained."""
    draw = random.Random(0)
    signs = [draw.choice("ab") for _ in range(300)]
    data = Dataset.from_dict({"text": [sign * 12 for sign in signs], "score": [float(sign == "b") for sign in signs]})
    trained = trainer(tmp_path, callback(cooldown=0), data=data, max_steps=60, learning_rate=2e-2)
    trained.train()
    tokenizer, model = trained.processing_class, trained.model.eval()
    written = [generate(model, tokenizer, "", control=t, max_new_tokens=8, do_sample=False) for t in (G, B)]
    assert written == ["a" * 8, "b" * 8]


@pytest.mark.parametrize("rows", [WITHIN, BEYOND])
def test_a_loss_of_control_tokens_is_asked_where_wanted(rows: int, tmp_path: Path) -> None:
    """As labels, which `extend` does not take for a fault where the model has no rows for them yet."""
    watch = Watch()
    trained = trainer(tmp_path, callback("{domain} ", cooldown=0, tokens={"loss": True}), watch, rows=rows)
    ids = torch.tensor(trained.processing_class.convert_tokens_to_ids([G, B]))
    trained.train()
    seen, labels = (
        torch.cat([batch[key].flatten() for step in watch.steps.values() for batch in step])
        for key in ("input_ids", "labels")
    )
    asked = torch.isin(labels, ids)
    assert 5 < asked.sum() and torch.equal(seen[asked], labels[asked])
    # Where a document goes on in another block, its token is repeated as metadata is.
    assert torch.isin(seen, ids).sum() > asked.sum()
