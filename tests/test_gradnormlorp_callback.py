"""GradNormLoRPCallback in a Trainer: exact resume, DoRA adapters, the layer-wise form, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, set_seed

from hf_pretrain_ext import PluginError, PluginTrainerMixin, extend, read_trace
from hf_pretrain_ext.callbacks import ForgettingCallback, GradNormLoRPCallback, ReplayCallback, RewarmCallback
from hf_pretrain_ext.gradnormlorp import GradNormLoRP, measured_state, param_groups


def model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Large enough for moments in few bits."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.1,
        bos_token_id=None,
        eos_token_id=0,
    )
    made: Any = LlamaForCausalLM(config)
    return made.to(dtype)


def ours(**settings: Any) -> GradNormLoRPCallback:
    return GradNormLoRPCallback(**{"rank": 32, "update_proj_gap": 3, **settings})


def build(folder: Path, *plugins: TrainerCallback, **settings: Any) -> Any:
    return extend(tiny.trainer(folder, *plugins, **{"model": model(), "max_steps": 8, "max_grad_norm": 0, **settings}))


def trained(folder: Path, *plugins: TrainerCallback, **settings: Any) -> Any:
    trainer = build(folder, *plugins, **settings)
    trainer.train()
    return trainer


def held(trainer: Any) -> dict[str, Any]:
    """Weights and the optimizer's whole state, by path."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, GradNormLoRP)
    state = optimizer.state_dict()["state"]
    named = {f"{place}/{name}": value for place, each in state.items() for name, value in each.items()}
    return {**tiny.weights(trainer), **named}


def differences(first: Trainer, second: Trainer) -> list[str]:
    mine, theirs = held(first), held(second)
    assert mine.keys() == theirs.keys()
    return [
        name
        for name, value in mine.items()
        if not (
            torch.equal(value, theirs[name]) and value.dtype == theirs[name].dtype
            if isinstance(value, Tensor)
            else value == theirs[name]
        )
    ]


def logged(trainer: Trainer, key: str) -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


def dora(**settings: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 8, "use_dora": True, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    )


# --- resume -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"bits": 4, "projector_bits": 16, "on_refresh": "rotate"}, {"layerwise": True}], ids=str
)
def test_resume_is_exact(settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    """After the first step, amid a gap and before a refresh (with 7 matrices at a gap of 3, each is all of these)."""
    whole = trained(
        tmp_path, ours(**settings), model=model(dtype), save_strategy="steps", save_steps=1, save_only_model=False
    )
    state = held(whole)
    assert any(value.dtype == torch.uint8 for value in state.values() if isinstance(value, Tensor))
    assert {value for name, value in state.items() if name.endswith("/refreshes")} == {3, 4}
    for stop in (1, 5):
        resumed = build(tmp_path, ours(**settings), model=model(dtype))
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
        assert differences(whole, resumed) == []
        assert not tiny.same_weights(whole, SimpleNamespace(model=model(dtype)))  # type: ignore[arg-type]  # has one
        # The host's last line counts this call alone.
        assert tiny.history(resumed)[:-1] == tiny.history(whole)[:-1]


@pytest.mark.parametrize("change", [{"rank": 16}, {"bits": 4}, {"norm": None}, {"layerwise": True}], ids=str)
def test_another_setting_is_another_run(change: dict[str, Any], tmp_path: Path) -> None:
    trained(tmp_path, ours(), max_steps=2, save_strategy="steps", save_steps=1)
    (name,) = change
    with pytest.raises(ValueError, match=rf"plugins\.gradnormlorp\.{name}: "):
        build(tmp_path, ours(**change), max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_it_resumes_beside_the_other_plugins(tmp_path: Path) -> None:
    """Schedule, replayed data and probes at once, and accumulation with clipping."""

    def plugins() -> list[TrainerCallback]:
        return [
            RewarmCallback(peak_lr=1e-2, warmup=2),
            ReplayCallback(tiny.rows(30, seed=9), ratio=0.25),
            ForgettingCallback({"old": tiny.rows(8, seed=9)}, every=2),
            ours(),
        ]

    settings: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "weight_decay": 0.1}
    whole = trained(tmp_path, *plugins(), save_strategy="steps", save_steps=5, **settings)
    resumed = build(tmp_path, *plugins(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert differences(whole, resumed) == []
    assert logged(whole, "learning_rate")[:4] == pytest.approx([0, 5e-3, 1e-2, 1e-2], rel=0.2)
    assert whole.plugin_run.realised()["replay"]["samples"] == 16
    assert len(logged(whole, "eval_old_loss")) >= 4
    alone = trained(tmp_path / "alone", *plugins()[:3], **settings)
    assert logged(alone, "loss")[0] == logged(whole, "loss")[0] and logged(alone, "loss") != logged(whole, "loss")


def test_a_plain_trainer_takes_the_optimizer(tmp_path: Path) -> None:
    """`optimizer_cls_and_kwargs`, no plug-in: trains, saves, resumes to the same bits; as the plug-in does."""

    def plain(given: LlamaForCausalLM) -> Trainer:
        groups = param_groups(given, 32, weight_decay=0.1, update_proj_gap=3)
        trainer = Trainer(
            model=given,
            args=tiny.arguments(tmp_path, max_steps=8, save_strategy="steps", save_steps=5, weight_decay=0.1),
            train_dataset=tiny.rows(40),
            data_collator=tiny.default_data_collator,
            optimizer_cls_and_kwargs=(GradNormLoRP, {"params": groups, "lr": 1e-2, "seed": 3}),
        )
        return trainer

    whole = plain(model())
    whole.train()
    resumed = plain(model())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert differences(whole, resumed) == []
    assert logged(whole, "loss")[-1] < logged(whole, "loss")[0]
    with_plugin = trained(tmp_path / "plugin", ours(), max_grad_norm=1.0, weight_decay=0.1)
    assert differences(whole, with_plugin) == []


def test_arguments_reach_the_optimizer(tmp_path: Path) -> None:
    """Rate, betas, epsilon, decay and seed of the TrainingArguments; gap and scale of the form."""
    trainer = build(
        tmp_path, GradNormLoRPCallback(rank=32), learning_rate=3e-3, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-5,
        weight_decay=0.2, seed=7,
    )  # fmt: skip
    optimizer = trainer.create_optimizer()
    projected, embeddings, vectors = optimizer.param_groups
    for group in optimizer.param_groups:
        assert (group["lr"], tuple(group["betas"]), group["eps"], group["seed"]) == (3e-3, (0.8, 0.9), 1e-5, 7)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.2, 0.0]
    assert (projected["rank"], projected["update_proj_gap"], projected["scale"]) == (32, 200, 0.25)
    assert embeddings["rank"] is None and vectors["rank"] is None
    assert all(group["bits"] == 8 for group in optimizer.param_groups)
    shared: dict[str, Any] = {"bits": 4, "projector_bits": 16, "proj_type": "left", "on_refresh": "keep"}
    form_a: dict[str, Any] = {"norm": "in", "tangential": True, "scale": 0.5, "update_proj_gap": 7}
    for group in GradNormLoRPCallback(rank=32, **shared, **form_a).groups(model()):
        assert {key: group[key] for key in shared} == shared
        assert group["rank"] is None or {key: group[key] for key in form_a} == form_a
    adapter, _ = GradNormLoRPCallback(rank=4, **shared).groups(adapted())
    assert {key: adapter[key] for key in shared} == shared and adapter["norm"] is None


def test_the_mixin_and_a_second_training(tmp_path: Path) -> None:
    class Mine(PluginTrainerMixin, Trainer):
        pass

    both = []
    for cls, layerwise in ((Trainer, False), (Trainer, True), (Mine, True)):
        made = tiny.trainer(tmp_path, ours(layerwise=layerwise), cls=cls, model=model(), max_steps=3, max_grad_norm=0)
        trainer = extend(made)
        trainer.train()
        trainer.train()
        both.append(trainer)
    assert differences(both[0], both[1]) == differences(both[1], both[2]) == []
    assert trainer.state.global_step == 3


# --- memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"layerwise": True}, {"bits": 32}, {"norm": None}], ids=str)
def test_the_trace_says_what_is_held(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once a run; planned and held are the same bytes."""
    trainer = trained(tmp_path, ours(**settings), max_steps=3)
    (event,) = [line for line in read_trace(tmp_path) if line["event"] == "memory"]
    assert event["state"] == measured_state(trainer.optimizer.optimizer)
    plan = event["plan"]
    assert event["state"] == plan["moments"] + plan["projectors"] + plan["magnitudes"]
    gradients = max(p.numel() for p in trainer.model.parameters()) if "layerwise" in settings else plan["trained"]
    assert plan["gradients"] == 4 * gradients
    assert event["peak"] == event["state"] + plan["weights"] + plan["gradients"] + plan["temporaries"]
    said = capsys.readouterr().err
    assert "gradnormlorp: planned: weights 0." in said
    megabytes = f"{event['state'] / 1e6:.2f} MB"
    assert f"gradnormlorp: optimizer state: {megabytes} held, {megabytes} planned" in said


@pytest.mark.parametrize(("off", "warned"), [(0.009, False), (0.02, True)])
def test_a_plan_that_is_off_is_said(
    off: float, warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first step, from one per cent on."""
    monkeypatch.setattr(
        "hf_pretrain_ext.callbacks.gradnormlorp.measured_state", lambda opt: round(measured_state(opt) * (1 + off))
    )
    trained(tmp_path, ours(), max_steps=2)
    said = capsys.readouterr().err
    assert ("were planned, more than 1 % off" in said) == warned
    assert [line["event"] for line in read_trace(tmp_path)].count("warning") == warned


# --- form B -----------------------------------------------------------------------------------------


def test_an_adapters_checkpoint_is_pefts(tmp_path: Path) -> None:
    """Loads with PEFT alone, gives the same logits, merged too; the base has not moved, factors and m have."""
    base = tiny.weights(SimpleNamespace(model=model()))  # type: ignore[arg-type]  # has a model
    trainer = trained(tmp_path, GradNormLoRPCallback(rank=4, adapter=dora()), save_strategy="steps", save_steps=8)
    assert isinstance(trainer.model, PeftModel)
    folder = tmp_path / "checkpoint-8"
    loaded = PeftModel.from_pretrained(model(), folder).eval()
    tuned = trainer.model.eval()
    ids = torch.arange(1, 33).view(2, 16)
    with torch.no_grad():
        logits = tuned(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, logits)
        assert not torch.allclose(model().eval()(input_ids=ids).logits, logits, atol=1e-3)
        merged = loaded.merge_and_unload()
        assert not isinstance(merged, PeftModel)
        torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)
    moved = {name: value for name, value in tiny.weights(trainer).items() if "lora" not in name}
    assert all(any(torch.equal(value, base[end]) for end in base if name.replace(".base_layer", "").endswith(end))
               for name, value in moved.items())  # fmt: skip
    fresh = {name: p for name, p in get_peft_model(model(), dora()).named_parameters() if "magnitude" in name}
    now = dict(tuned.named_parameters())
    assert fresh and all(not torch.equal(value, now[name]) for name, value in fresh.items())
    assert "hf_pretrain_ext" not in (folder / "adapter_config.json").read_text()
    assert json.loads((folder / "adapter_config.json").read_text())["use_dora"] is True


def test_an_adapter_resumes_exactly(tmp_path: Path) -> None:
    """And a model that comes wrapped is trained as one that is wrapped here."""

    def run(folder: Path, **settings: Any) -> Any:
        return build(folder, GradNormLoRPCallback(rank=4, update_proj_gap=3, adapter=dora()), **settings)

    whole = run(tmp_path, save_strategy="steps", save_steps=4)
    whole.train()
    resumed = run(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert differences(whole, resumed) == []
    factors, magnitudes = whole.optimizer.optimizer.param_groups
    assert (factors["rank"], factors["norm"], factors["scale"], factors["update_proj_gap"]) == (4, None, 4.0, 3)
    assert magnitudes["rank"] is None and magnitudes["weight_decay"] == 0.0
    assert len(factors["params"]) == 2 * len(magnitudes["params"]) == 14
    plugin = GradNormLoRPCallback(rank=4, adapter=dora())
    assert plugin.groups(whole.model)[0]["update_proj_gap"] == 500
    given = trained(tmp_path / "given", GradNormLoRPCallback(rank=4, update_proj_gap=3), model=adapted())
    groups = given.optimizer.optimizer.param_groups
    for mine, theirs in zip((factors, magnitudes), groups, strict=True):
        assert {k: v for k, v in mine.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
        assert [p.shape for p in mine["params"]] == [p.shape for p in theirs["params"]]


@pytest.mark.parametrize(
    "change",
    [{"lora_dropout": 0.5}, {"use_rslora": True}, {"target_modules": ["q_proj", "up_proj"]}, {"bias": "all"}],
    ids=str,
)
def test_another_adapter_is_another_run(change: dict[str, Any], tmp_path: Path) -> None:
    (name,) = change
    settings: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    same = dora()
    trained(tmp_path, GradNormLoRPCallback(rank=4, adapter=same), **settings)
    last = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=rf"plugins\.gradnormlorp\.adapter\.{name}"):
        build(tmp_path, GradNormLoRPCallback(rank=4, adapter=dora(**change))).train(resume_from_checkpoint=last)
    # PEFT has not written into it what "all-linear" was.
    again = build(tmp_path, GradNormLoRPCallback(rank=4, adapter=same), max_steps=2)
    again.train(resume_from_checkpoint=last)


def test_modules_beside_the_adapter_decay_as_others() -> None:
    given = adapted(target_modules=["q_proj", "up_proj"], modules_to_save=["embed_tokens", "norm"])
    names = {id(param): name for name, param in given.named_parameters()}
    groups = GradNormLoRPCallback(rank=4).groups(given, weight_decay=0.1)
    decayed = [names[id(param)] for group in groups[1:] if group["weight_decay"] for param in group["params"]]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert decayed == ["base_model.model.model.embed_tokens.modules_to_save.default.weight"]


def adapted(**settings: Any) -> Any:
    return get_peft_model(model(), dora(**settings))


def test_sft_with_a_dora_adapter(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from hf_pretrain_ext.demo.tokenizer import train_tokenizer

    texts = [f"the cat {n} sat on the mat {n % 5}" for n in range(40)]
    tokenizer = train_tokenizer(texts, vocab_size=280)
    arguments = {key: value for key, value in tiny.arguments(tmp_path).to_dict().items() if key in SFT}
    trainer = trl.SFTTrainer(
        model=model(),
        args=trl.SFTConfig(**arguments, use_cpu=True, bf16=False, gradient_checkpointing=False),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": texts}),
        peft_config=dora(),
        callbacks=[GradNormLoRPCallback(rank=4)],
    )
    before = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
    extend(trainer).train()
    changed = {name for name, param in trainer.model.named_parameters() if not torch.equal(param, before[name])}
    assert changed == {name for name, param in trainer.model.named_parameters() if param.requires_grad}
    assert isinstance(trainer.optimizer.optimizer, GradNormLoRP)


SFT = ("output_dir", "per_device_train_batch_size", "max_steps", "learning_rate", "logging_steps", "save_strategy",
       "report_to", "disable_tqdm", "seed", "dataloader_pin_memory")  # fmt: skip


# --- layer-wise -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layerwise_is_the_ordinary_form(dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit without clipping; no gradient is left; the logged norm is the ordinary one."""
    left: list[bool] = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            left.append(any(param.grad is not None for param in kwargs["model"].parameters()))

    ordinary = trained(tmp_path / "a", ours(), Look(), model=model(dtype), weight_decay=0.1)
    assert all(left)
    left.clear()
    layerwise = trained(tmp_path / "b", ours(layerwise=True), Look(), model=model(dtype), weight_decay=0.1)
    assert left == [False] * 8
    assert differences(ordinary, layerwise) == []
    assert logged(ordinary, "loss") == logged(layerwise, "loss")
    norms = logged(layerwise, "grad_norm")
    assert len(norms) == 8 and norms[0] > 0
    assert norms == pytest.approx(logged(ordinary, "grad_norm"), rel=1e-5 if dtype == torch.float32 else 1e-2)


def chain() -> tuple[Any, list[dict[str, Any]], Tensor]:
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 48), nn.Tanh(), nn.Linear(48, 7))
    return layers, param_groups(layers, 6, update_proj_gap=2), torch.randn(9, 48)


@pytest.mark.parametrize("bound", [0.05, 1e-4, 100.0])
def test_layerwise_clips_each_parameter_by_its_own_norm(bound: float) -> None:
    """As torch's clipping called for one parameter after the other; the norm that is told is from before."""
    ends: list[list[Tensor]] = []
    told: list[list[float]] = [[], []]
    for layerwise in (False, True):
        layers, groups, inputs = chain()
        optimizer = GradNormLoRP(groups, lr=1e-2)
        if layerwise:
            optimizer.step_in_backward(bound)
        for _ in range(5):
            layers(inputs).square().mean().backward()
            if layerwise:
                norm = optimizer.gradient_norm()
                assert norm is not None
                told[1].append(float(norm))
                assert all(param.grad is None for param in layers.parameters())
            else:
                told[0].append(float(torch.nn.utils.clip_grad_norm_(layers.parameters(), float("inf"))))
                for param in layers.parameters():
                    torch.nn.utils.clip_grad_norm_([param], bound)
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.gradient_norm() is None
        ends.append([param.detach() for param in layers.parameters()])
    for first, second in zip(*ends, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)
    assert told[0] == pytest.approx(told[1], rel=1e-5)


def test_the_bound_of_the_plugin_reaches_the_hooks(tmp_path: Path) -> None:
    """So small a bound that Adam's epsilon shows; at one far above all norms nothing changes."""
    free = trained(tmp_path / "free", ours(layerwise=True), adam_epsilon=1e-3)
    wide = trained(tmp_path / "wide", ours(layerwise=True, max_matrix_norm=1e6), adam_epsilon=1e-3)
    tight = trained(tmp_path / "tight", ours(layerwise=True, max_matrix_norm=1e-3), adam_epsilon=1e-3)
    assert tiny.same_weights(free, wide) and not tiny.same_weights(free, tight)
    assert logged(tight, "grad_norm")[0] == pytest.approx(logged(free, "grad_norm")[0]), "from before the clipping"


def test_a_second_backward_is_refused() -> None:
    layers, groups, inputs = chain()
    optimizer = GradNormLoRP(groups)
    optimizer.step_in_backward()
    layers(inputs).sum().backward()
    with pytest.raises(RuntimeError, match=r"a second backward before optimizer\.step\(\): with step_in_backward"):
        layers(inputs).sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    layers(inputs).sum().backward()
    optimizer.step()
    optimizer.step_after_backward()
    before = layers[0].weight.detach().clone()
    for _ in range(2):
        layers(inputs).sum().backward()
    assert torch.equal(layers[0].weight, before) and layers[0].weight.grad is not None
    optimizer.step()
    assert not torch.equal(layers[0].weight, before)
    with pytest.raises(ValueError, match="max_norm must be positive, or None for no clipping, got 0"):
        optimizer.step_in_backward(0)


def test_asking_twice_updates_once() -> None:
    ends = []
    for times in (1, 3):
        layers, groups, inputs = chain()
        optimizer = GradNormLoRP(groups)
        for _ in range(times):
            optimizer.step_in_backward()
        layers(inputs).sum().backward()
        optimizer.step()
        ends.append(layers[0].weight.detach())
    assert torch.equal(*ends)


def test_a_second_training_layer_by_layer_is_the_ordinary_one(tmp_path: Path) -> None:
    """The first training's hooks do not update beside the second's."""
    ends = []
    for layerwise in (False, True):
        given = model()
        for _ in range(2):
            trained(tmp_path / str(layerwise), ours(layerwise=layerwise), model=given, max_steps=3)
        ends.append(given.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


class Interrupted(TrainerCallback):
    """Once, after a step."""

    done = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and not self.done:
            self.done = True
            raise KeyboardInterrupt


def test_an_interrupted_training_leaves_no_hooks(tmp_path: Path) -> None:
    """Neither to a second training of the same Trainer nor to a plain one."""
    whole = trained(tmp_path / "whole", ours(layerwise=True))
    trainer = build(tmp_path, Interrupted(), ours(layerwise=True), save_strategy="steps", save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    given, matrix = trainer.model, trainer.model.model.layers[0].mlp.up_proj.weight
    before = matrix.detach().clone()
    tiny.trainer(tmp_path / "plain", model=given, learning_rate=0.0, max_steps=1).train()
    assert torch.equal(matrix, before)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert differences(whole, trainer) == []


def test_the_plugin_of_an_interrupted_training_takes_its_hooks_away() -> None:
    """Also where nothing told it that the training has ended."""
    plugin, given = ours(layerwise=True), model()
    args = SimpleNamespace(weight_decay=0, learning_rate=1e-2, adam_beta1=0.9, adam_beta2=0.99, adam_epsilon=1e-8)
    args.seed = 0
    plugin.optimizer(given, args).step_in_backward()
    plugin.optimizer(given, args)
    given(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
    assert all(param.grad is not None for param in given.parameters())
    plugin.end()
    plugin.end()


def test_the_last_to_step_in_backward_has_the_parameters() -> None:
    layers, groups, inputs = chain()
    first, second = GradNormLoRP(groups, lr=1e-2), GradNormLoRP(param_groups(layers, 6), lr=1e-2)
    first.step_in_backward()
    layers(inputs).sum().backward()  # interrupted here
    second.step_in_backward()
    for _ in range(2):
        layers(inputs).sum().backward()
        second.step()
    assert {state["step"] for state in second.state.values()} == {2}
    assert {state["step"] for state in first.state.values()} == {1}
    with pytest.raises(RuntimeError, match="another optimizer's step_in_backward has taken over parameters of this"):
        first.step()
    first.step_in_backward()
    first.step()
    with pytest.raises(RuntimeError, match="taken over"):
        second.step()


def test_an_optimizer_that_is_gone_updates_nothing() -> None:
    layers, groups, inputs = chain()
    GradNormLoRP(groups).step_in_backward()
    before = layers[0].weight.detach().clone()
    layers(inputs).sum().backward()
    assert torch.equal(layers[0].weight, before) and layers[0].weight.grad is not None


def test_frozen_parameters_have_no_hooks() -> None:
    layers, _, inputs = chain()
    layers[0].requires_grad_(False)
    optimizer = GradNormLoRP(layers.parameters(), rank=6)
    optimizer.step_in_backward()
    layers(inputs).sum().backward()
    assert set(optimizer.state) == set(layers[2:].parameters())


class Terminated(TrainerCallback):
    """What the host does on SIGTERM: a checkpoint where the update of the fourth step is about to be made."""

    trainer: Any = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            control.should_training_stop = True
            self.trainer._save_checkpoint(self.trainer.model, None)


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_checkpoint_before_the_update_resumes_exactly(layerwise: bool, tmp_path: Path) -> None:
    """Layer by layer the update is there already: the checkpoint has to wait for the step's end."""
    whole = trained(tmp_path / "whole", ours(layerwise=layerwise))
    terminated = Terminated()
    terminated.trainer = build(tmp_path, terminated, ours(layerwise=layerwise))
    terminated.trainer.train()
    (folder,) = tmp_path.glob("checkpoint-*")
    resumed = build(tmp_path, ours(layerwise=layerwise))
    resumed.train(resume_from_checkpoint=str(folder))
    assert differences(whole, resumed) == []


# --- refusals ---------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
    ({"rank": None}, "rank must be an integer of at least 1, got None"),
    ({"rank": "8"}, "rank must be an integer of at least 1, got '8'"),
    ({"update_proj_gap": 0}, "update_proj_gap must be an integer of at least 1, got 0"),
    ({"scale": -1.0}, "scale must be a finite number, 0 or more, got -1.0"),
    ({"bits": 16}, "bits must be one of 4, 8, 32, got 16"),
    ({"projector_bits": 1}, "projector_bits must be one of 4, 8, 16, 32, got 1"),
    ({"proj_type": "full"}, "proj_type must be one of 'std', 'reverse_std', 'left', 'right', got 'full'"),
    ({"norm": "columns"}, "norm must be one of 'out', 'in', None, got 'columns'"),
    ({"tangential": None}, "tangential must be one of True, False, got None"),
    ({"on_refresh": "forget"}, "on_refresh must be one of 'reset', 'keep', 'rotate', got 'forget'"),
    ({"target_modules": []}, "target_modules must be a string or a list of names of modules, got []"),
    (
        {"target_modules": ["q_proj", 3]},
        "target_modules must be a string or a list of names of modules, got ['q_proj'",
    ),
    ({"tangential": True, "norm": None}, "tangential=True takes out what the magnitude follows, and with norm=None"),
    ({"layerwise": 1}, "layerwise must be True or False, got 1"),
    ({"max_matrix_norm": 1.0}, "max_matrix_norm=1.0 is of the layer-wise form: pass layerwise=True, or clip with"),
    ({"max_matrix_norm": 0, "layerwise": True}, "max_matrix_norm must be positive, or None, got 0"),
    ({"max_matrix_norm": float("nan"), "layerwise": True}, "max_matrix_norm must be positive, or None, got nan"),
    ({"adapter": "dora"}, "adapter must be a peft.LoraConfig with use_dora=True, got str"),
    ({"adapter": LoraConfig()}, "adapter must be a peft.LoraConfig with use_dora=True, got LoraConfig without it"),
]


@pytest.mark.parametrize(("wrong", "text"), WRONG, ids=[text for _, text in WRONG])
def test_wrong_settings_fail_at_construction(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as error:
        GradNormLoRPCallback(**{"rank": 8, **wrong})
    assert text in str(error.value)


def mixed() -> LlamaForCausalLM:
    return model(torch.float16)


def frozen() -> LlamaForCausalLM:
    return model().requires_grad_(False)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    (
        {"rank": 64},
        {},
        ["gradnormlorp: target_modules='all-linear' with rank=64 leaves no matrix to project: 7 match"],
    ),
    (
        {"target_modules": ["c_attn"]},
        {},
        ["target_modules names ['c_attn'], but the linear layers of this model are ['down_proj'"],
    ),
    ({"target_modules": "*"}, {}, ["target_modules='*' is no regular expression: nothing to repeat"]),
    ({}, {"model": mixed}, ["parameters must be float32 or bfloat16, one of shape (64, 64) is torch.float16"]),
    ({}, {"model": frozen}, ["of 8 linear layers 7 match, none of which is trained"]),
    ({"adapter": dora(), "rank": 9}, {}, ["rank=9 exceeds the rank of the adapter, r=8. Lower rank, or raise r of"]),
    (
        {"adapter": dora(), "rank": 4},
        {"model": adapted},
        ["adapter is given, and the model has an adapter already. Leave adapter out, or pass the model without"],
    ),
    (
        {"adapter": dora(rank_pattern={"q_proj": 2}), "rank": 4},
        {},
        ["rank=4 exceeds the rank of the adapter at model.layers.0.self_attn.q_proj, 2 by rank_pattern. Lower rank, "
         "or raise rank_pattern['q_proj'] of the LoraConfig."],
    ),
    (
        {"adapter": dora(r=40, target_modules=["k_proj", "up_proj"]), "rank": 36},
        {},
        ["rank=36 exceeds the smaller side of model.layers.0.self_attn.k_proj, 32. Lower rank, or leave that module"],
    ),
    (
        {"adapter": dora(target_modules=["foo"]), "rank": 4},
        {},
        ["adapter has target_modules=['foo'], which match no module of LlamaForCausalLM. Name some that it has, such"],
    ),
    (
        {"adapter": dora(), "rank": 4},
        {"model": lambda: architectures.build("Mixtral")},
        ["PEFT does not put this adapter into a MixtralForCausalLM: ValueError: lora.ParamWrapper does not work with",
         "Name target_modules that it can adapt, such as ['q_proj', 'v_proj']."],
    ),
    (
        {"adapter": dora(), "rank": 4, "target_modules": ["q_proj"]},
        {},
        ["target_modules=('q_proj',) is of form A: an adapter trains the modules of its own configuration. Leave it"],
    ),
    ({"rank": 9}, {"model": adapted}, ["rank=9 exceeds the rank of the adapter, 8: lower it, or raise r of"]),
    (
        {"rank": 4},
        {"model": lambda: adapted(use_dora=False)},
        ["the model has no trained DoRA adapter, which W = m·(W0 + BA)/‖W0 + BA‖ is: pass adapter=LoraConfig("],
    ),
    (
        {"rank": 4, "adapter": dora(), "norm": "in"},
        {},
        ["norm and tangential are of form A: a DoRA adapter normalises by output unit on its own. Leave them out."],
    ),
    ({"rank": 4, "tangential": True}, {"model": adapted}, ["norm and tangential are of form A"]),
    (
        {"layerwise": True},
        {"gradient_accumulation_steps": 4},
        ["gradnormlorp[layerwise]: gradient_accumulation_steps=4 wants gradients kept, and none is. Set it to 1 and"],
    ),
    (
        {"layerwise": True},
        {"max_grad_norm": 0.5},
        ["gradnormlorp[layerwise]: max_grad_norm=0.5 clips by the norm over all gradients, the first of which are",
         "Set max_grad_norm=0, and max_matrix_norm here to clip each matrix by its own."],
    ),
    (
        {"layerwise": True},
        {"max_grad_norm": 1.0, "gradient_accumulation_steps": 2},
        ["2 problems", "max_grad_norm=1.0 clips", "gradient_accumulation_steps=2 wants"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("plugin", "run", "texts"),
    [each for each in REFUSED if each[2]],
    ids=[each[2][0][:60] for each in REFUSED if each[2]],
)
def test_what_does_not_fit_is_refused(
    plugin: dict[str, Any], run: dict[str, Any], texts: list[str], tmp_path: Path
) -> None:
    """Before anything is touched, with what to do."""
    settings = {key: value() if callable(value) else value for key, value in run.items()}
    with pytest.raises(PluginError) as error:
        build(tmp_path, GradNormLoRPCallback(**{"rank": 8, **plugin}), **settings)
    for text in texts:
        assert text in str(error.value)


@pytest.mark.parametrize("how", ["pissa", "olora", "gaussian"])
def test_adapters_that_begin_otherwise_are_tried_without_weights(how: Any, tmp_path: Path) -> None:
    """To be tried, they need none."""
    adapter = dora(init_lora_weights=how)
    trained = build(tmp_path, GradNormLoRPCallback(rank=4, adapter=adapter), max_steps=1)
    trained.train()
    assert adapter.init_lora_weights == how
    assert trained.model.peft_config["default"].init_lora_weights == how


def problems(plugin: GradNormLoRPCallback, **arguments: Any) -> list[str]:
    args = SimpleNamespace(
        **{"gradient_accumulation_steps": 1, "max_grad_norm": 0.0, "world_size": 1, "fp16": False, **arguments}
    )
    setup: Any = SimpleNamespace(model=model(), args=args, trainer=SimpleNamespace())
    found: Iterable[Any] = plugin.check(setup)
    return [str(problem) for problem in found]


def test_processes_and_fp16_are_refused() -> None:
    assert problems(ours()) == problems(ours(layerwise=True)) == problems(ours(), world_size=2) == []
    (several,) = problems(ours(layerwise=True), world_size=2)
    assert several.startswith("gradnormlorp[layerwise]: several processes average their gradients after each is there")
    (scaled,) = problems(ours(), fp16=True)
    assert scaled == "gradnormlorp: fp16 scales the loss, and with it every norm. Use bf16, or float32."


@pytest.mark.parametrize("action", ["skip", "stop"])
def test_leaving_updates_out_is_refused_layer_by_layer(action: str, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, ours(layerwise=True), model=model(), max_grad_norm=0)
    with pytest.raises(PluginError, match=rf"on_nonfinite='{action}' looks at all gradients before any update"):
        extend(trainer, on_nonfinite=action).train()  # type: ignore[arg-type]  # one of them
    again = extend(tiny.trainer(tmp_path, ours(layerwise=True), model=model(), max_grad_norm=0))
    with pytest.raises(PluginError, match=rf"on_nonfinite='{action}' looks"):
        extend(again, on_nonfinite=action)  # type: ignore[arg-type]  # as above
    extend(tiny.trainer(tmp_path, ours(), model=model()), on_nonfinite=action)  # type: ignore[arg-type]  # as above


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_gradient_that_is_not_finite_is_survived_and_told(layerwise: bool, tmp_path: Path) -> None:
    """Reported with its step; the weights stay finite and training goes on."""

    class Spoilt(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss: Any = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step in (0, 3) else loss

    trainer = extend(tiny.trainer(tmp_path, ours(layerwise=layerwise), cls=Spoilt, model=model(), max_grad_norm=0))
    trainer.train()
    assert all(bool(value.isfinite().all()) for value in tiny.weights(trainer).values())
    events = [line for line in read_trace(tmp_path) if line["event"] == "nonfinite"]
    assert [event["step"] for event in events] == [0, 3]
    assert all(event["what"] == ["loss", "gradients"] for event in events)
    assert not tiny.same_weights(trainer, SimpleNamespace(model=model()))  # type: ignore[arg-type]  # has a model


def test_two_optimizers_are_refused(tmp_path: Path) -> None:
    made = model()
    trainer = Trainer(
        model=made,
        args=tiny.arguments(tmp_path),
        train_dataset=tiny.rows(40),
        data_collator=tiny.default_data_collator,
        optimizers=(torch.optim.SGD(made.parameters(), lr=0.1), None),
    )
    with pytest.raises(PluginError, match="optimizer"):
        extend(trainer, ours())
