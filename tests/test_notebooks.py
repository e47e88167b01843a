"""The notebooks: run from top to bottom on stand-ins, as they are and as Colab runs them, and what they must hold.

Each is run by a kernel of this very interpreter, in a folder of its own, with no other kernel spec or profile than
what is made here. The tour always runs as Colab runs it, up to the push; `make test-notebooks` runs all both ways.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from loopback_hub import Hub

from hf_pretrain_ext import read_stages, read_trace
from hf_pretrain_ext.hub_card import BEGIN

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install 'hf-pretrain-ext[dev]'")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install 'hf-pretrain-ext[dev]'")
pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install 'hf-pretrain-ext[dev]'")

pytestmark = pytest.mark.docs

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
SECTIONS = [
    "The problem",
    "Install",
    "Model and data",
    "The lines to add",
    "Train",
    "What to look at",
    "Publish",
]
# Repositories on the Hub, all of them public and ungated, with the columns that are read.
MODEL = "HuggingFaceTB/SmolLM2-135M"
COLUMNS = {
    ("HuggingFaceFW/fineweb-edu", "sample-10BT"): {"text", "url"},
    ("wikimedia/wikipedia", "20231101.de"): {"text"},
    ("wikimedia/wikipedia", "20231101.es"): {"text"},
}
SMALLER = "DOCUMENTS, BLOCK, BATCH, STEPS, PEAK = 60, 64, 8, 10, 3e-3"

# What each run must have left: the run to publish, its plug-ins, and the plug-ins of the other runs by folder.
RUNS: dict[str, tuple[str, set[str], dict[str, set[str]]]] = {
    "00_tour": ("tour", {"forgetting", "replay", "rewarm"}, {}),
    "01_rewarming": ("rewarmed", {"forgetting", "rewarm"}, {"constant": {"forgetting"}}),
    "02_replay": (
        "replay-25",
        {"forgetting", "replay", "rewarm"},
        {"replay-0": {"forgetting", "rewarm"}, "replay-5": {"forgetting", "replay", "rewarm"}},
    ),
    "03_metadata_conditioning": ("metadata", {"forgetting", "metadata", "rewarm"}, {}),
    "04_meta_tokens": ("meta_tokens", {"forgetting", "meta_tokens", "rewarm"}, {}),
    "05_gradnormlorp": (
        "gradnormlorp",
        {"forgetting", "gradnormlorp", "rewarm"},
        {"adamw": {"forgetting", "rewarm"}},
    ),
    "06_many_stages": (
        "deploy",
        {"forgetting", "replay", "rewarm"},
        {
            "german": {"buffer", "forgetting", "replay", "reptile", "rewarm"},
            "spanish": {"forgetting", "replay", "rewarm"},
        },
    ),
    "07_no_old_data": (
        "self-distillation",
        {"forgetting", "rewarm", "self_distillation"},
        {"plain": {"forgetting", "rewarm"}, "l2-to-the-start": {"forgetting", "l2_init", "rewarm"}},
    ),
}


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return found


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_of(notebook: Any) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def prose_of(notebook: Any) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


# Running them


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once: each notebook finds it as if an earlier run of its own had."""
    spec = importlib.util.spec_from_file_location("stand_in", FOLDER / "stand_in.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("made") / "stand_in"
    module.make(str(folder))
    return folder


Execute = Callable[..., Any]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[warm.Warm, dict[str, str]]]:
    """Where kernels come from, and what of their environment is that of the machine they all run on."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HPE_"))}
    own = {
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    server = warm.Warm({**kept, **own})
    yield server, {**kept, **own}
    server.close()


@pytest.fixture
def execute(
    stand_in: Path, kernels: tuple[warm.Warm, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Execute]:
    """Runs a notebook in `tmp_path / "work"` and returns it with its outputs; an error in a cell is raised."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    spec = tmp_path / "kernels" / "here"
    spec.mkdir(parents=True)
    work = tmp_path / "work"
    shutil.copytree(stand_in, work / "runs" / "stand_in")

    def run(notebook: Any, **variables: str) -> Any:
        server, common = kernels
        own = {
            "IPYTHONDIR": str(tmp_path / "ipython"),
            "PYTHONPATH": os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        start = [*server.python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        (spec / "kernel.json").write_text(json.dumps({"argv": start, "display_name": "here", "language": "python"}))
        specs = KernelSpecManager(kernel_dirs=[str(tmp_path / "kernels")], ensure_native_kernel=False)
        manager = AsyncKernelManager(kernel_name="here", kernel_spec_manager=specs)
        client = nbclient.NotebookClient(
            notebook,
            km=manager,
            timeout=240,
            shutdown_kernel="immediate",
            resources={"metadata": {"path": str(work)}},
        )
        # A manager that is handed in would be left alone, and its kernel running.
        done = client.execute(cleanup_kc=True, env={**common, **own, **variables})
        assert not manager.has_kernel
        return done

    yield run


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text_of(notebook: Any) -> str:
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def shown(notebook: Any, kind: str) -> list[str]:
    return [output.data[kind] for output in outputs(notebook) if kind in output.get("data", {})]


def check(name: str, notebook: Any, work: Path) -> None:
    """What every run leaves: traces with its plug-ins, losses that were learned from, a card, a figure, a table."""
    published, plugins, others = RUNS[name]
    for run, names in {published: plugins, **others}.items():
        trace = read_trace(work / "runs" / run)
        assert trace[0]["event"] == "start" and set(trace[0]["plugins"]) == names, run
        (end,) = [event for event in trace if event["event"] == "end"]
        sets = json.loads((work / "runs" / run / "forgetting.json").read_text("utf-8"))["sets"]
        assert len(sets) >= 2
        for curve in sets.values():
            assert curve["steps"][0] == 0 and curve["steps"][-1] == end["step"] > 0
        assert any(curve["losses"][-1] < curve["losses"][0] for curve in sets.values()), run
    validate_repo_id(f"me/{published}")  # the folder's name becomes the repository's
    folder = work / "runs" / published
    card = (folder / "README.md").read_text("utf-8")
    assert card.count(BEGIN) == 1 and plugins <= set(ModelCard(card).data.tags) and ModelCard(card).data.datasets
    for plugin in plugins:
        assert f"| {plugin} |" in card
    assert (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file()
    assert shown(notebook, "image/png")
    assert any("<table" in html and "dataframe" in html for html in shown(notebook, "text/html"))
    assert "## Continued pre-training" in text_of(notebook)
    for line in ("Traceback", "FutureWarning", "DeprecationWarning"):
        assert line not in text_of(notebook)


IN_EVERY_RUN = ("00_tour", "06_many_stages")  # they use most of what there is


@pytest.mark.parametrize(
    "name", [name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_it_runs(name: str, execute: Execute, tmp_path: Path) -> None:
    work = tmp_path / "work"
    notebook = execute(read(name), HPE_SMOKE="1")
    check(name, notebook, work)
    if own := OWN.get(name):
        own(notebook, work / "runs")


def replay_is_what_was_asked_for(notebook: Any, runs: Path) -> None:
    for percent in (5, 25):
        (end,) = [event for event in read_trace(runs / f"replay-{percent}") if event["event"] == "end"]
        samples = {source: counts["samples"] for source, counts in end["counts"].items()}
        assert samples["replay"] * 100 == percent * sum(samples.values())
    table = shown(notebook, "text/plain")[-1]
    assert [line.split()[1] for line in table.splitlines() if line.startswith("replay-")] == ["0.00", "0.05", "0.25"]


def the_rate_was_rewarmed(notebook: Any, runs: Path) -> None:
    rates = {}
    for run in ("constant", "rewarmed"):
        scalars = [event.get("scalars", {}) for event in read_trace(runs / run)]
        rates[run] = [line["learning_rate"] for line in scalars if "learning_rate" in line]
    assert rates["constant"] == pytest.approx([3e-4] * 10)
    assert max(rates["rewarmed"]) > 2e-3 and rates["rewarmed"][-1] < 5e-4


def prompts_were_conditioned(notebook: Any, runs: Path) -> None:
    assert "en.wikipedia.org: '" in text_of(notebook) and "none: '" in text_of(notebook)
    assert "URL: {domain}" in (runs / "metadata" / "config.json").read_text("utf-8")


def meta_tokens_came_back(notebook: Any, runs: Path) -> None:
    curves = json.loads((runs / "meta_tokens" / "forgetting.json").read_text("utf-8"))["sets"]
    # A token that no model knows costs something at first, and that the model knows it afterwards is in its folder.
    assert curves["plain"]["losses"][0] < curves["inserted"]["losses"][0]
    assert "meta_attention" in (runs / "meta_tokens" / "model.safetensors").read_bytes()[:20_000].decode("latin-1")


def the_state_is_small(notebook: Any, runs: Path) -> None:
    (memory,) = [event for event in read_trace(runs / "gradnormlorp") if event["event"] == "memory"]
    table = next(text for text in shown(notebook, "text/plain") if "state, MB" in text)
    state = {line.split()[0]: float(line.split()[1]) for line in table.splitlines()[1:]}
    assert state["gradnormlorp"] == pytest.approx(memory["state"] / 1e6, abs=1e-3)
    assert state["gradnormlorp"] < state["adamw"] / 3


def the_life_is_told(notebook: Any, runs: Path) -> None:
    stages = read_stages(runs / "deploy")
    assert [stage.kind for stage in stages] == ["unknown", "stage", "stage", "anneal"]
    assert {source.name for source in stages[2].sources if source.replayed} == {"english", stages[1].name}
    assert stages[3].rate is not None and stages[2].rate is not None and stages[3].rate < stages[2].rate
    table = shown(notebook, "text/plain")[-1].splitlines()
    losses = {line.split()[0]: [float(loss) for loss in line.split()[1:]] for line in table[1:]}
    assert set(losses) == {"german", "spanish", "average", "LiNeS"}
    # The second stage learned its set, and a merge lies nearer to it than the first does.
    assert losses["spanish"][2] < losses["average"][2] < losses["german"][2]
    for merged in ("average", "lines"):
        assert (runs / "merged" / merged / "merge.json").is_file()
    assert not (runs / "deploy" / "replayed").exists()  # rows that were trained on are not pushed with the model


def both_stay_nearer(notebook: Any, runs: Path) -> None:
    final = {
        run: json.loads((runs / run / "forgetting.json").read_text("utf-8"))["sets"]["old"]["losses"][-1]
        for run in ("plain", "l2-to-the-start", "self-distillation")
    }
    assert final["l2-to-the-start"] < final["plain"] and final["self-distillation"] < final["plain"]


OWN: dict[str, Callable[[Any, Path], None]] = {
    "01_rewarming": the_rate_was_rewarmed,
    "02_replay": replay_is_what_was_asked_for,
    "03_metadata_conditioning": prompts_were_conditioned,
    "04_meta_tokens": meta_tokens_came_back,
    "05_gradnormlorp": the_state_is_small,
    "06_many_stages": the_life_is_told,
    "07_no_old_data": both_stay_nearer,
}


# As Colab runs them

PROLOGUE = """
import datasets, transformers
from IPython import get_ipython

FOUND, ASKED, INSTALLED = {found!r}, [], []


def stored(path, name=None, *, inner=datasets.load_dataset, **settings):
    ASKED.append((path, name, settings))
    return inner("json", data_files=FOUND[path, name], **settings)


datasets.load_dataset = stored
for auto in (transformers.AutoConfig, transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
    def from_pretrained(name, *args, inner=auto.from_pretrained, **settings):
        return inner("runs/stand_in/model" if name == {model!r} else name, *args, **settings)

    auto.from_pretrained = from_pretrained
get_ipython().register_magic_function(INSTALLED.append, "line", "pip")
"""


def as_on_colab(name: str, publish: bool = False) -> Any:
    """The notebook with what it fetches stood in for, and smaller sizes; all else is the branch that Colab takes."""
    notebook = read(name)
    first = {"03_metadata_conditioning": "web", "04_meta_tokens": "new"}.get(name, "old")
    files = dict(zip(COLUMNS, (first, "new", "later"), strict=True))
    found = {key: f"runs/stand_in/{stem}.jsonl" for key, stem in files.items()}
    (at,) = [n for n, cell in enumerate(notebook.cells) if cell.source.startswith("if SMOKE:")]
    smaller = nbformat.v4.new_code_cell(SMALLER)
    prologue = nbformat.v4.new_code_cell(PROLOGUE.format(found=found, model=MODEL))
    epilogue = nbformat.v4.new_code_cell("import json\nprint(json.dumps([ASKED, INSTALLED]))")
    notebook.cells = [prologue, *notebook.cells[: at + 1], smaller, *notebook.cells[at + 1 :], epilogue]
    if publish:
        for cell in notebook.cells:
            cell.source = cell.source.replace("PUBLISH = False", "PUBLISH = True")
    return notebook


def check_colab(name: str, notebook: Any, work: Path) -> None:
    check(name, notebook, work)
    asked, installed = json.loads(outputs(notebook)[-1].text)
    (line,) = installed
    (extras,) = re.findall(r'^install -q "hf-pretrain-ext\[([a-z,]+)\]"$', line)
    assert set(extras.split(",")) <= set(project()["optional-dependencies"])
    assert asked
    for path, config, settings in asked:
        assert (path, config) in COLUMNS and settings == {"split": "train", "streaming": True}


def test_the_tour_as_colab_runs_it_up_to_the_push(execute: Execute, tmp_path: Path) -> None:
    with Hub() as hub:
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0"}
        local = {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        notebook = execute(as_on_colab("00_tour", publish=True), **variables, **local)
        check_colab("00_tour", notebook, tmp_path / "work")
        pushed = hub.files["me/tour"]
    card = ModelCard(pushed["README.md"].decode())
    assert card.content.count(BEGIN) == 1 and card.data.datasets == sorted({path for path, _ in COLUMNS})
    assert {"model.safetensors", "tokenizer.json", "trace.jsonl"} <= set(pushed)
    assert hub.token not in nbformat.writes(notebook)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "00_tour"])
def test_as_colab_runs_it(name: str, execute: Execute, tmp_path: Path) -> None:
    check_colab(name, execute(as_on_colab(name)), tmp_path / "work")


# What they must hold


def test_every_notebook_has_a_row_here_and_in_the_lists() -> None:
    assert set(RUNS) == set(NAMES)
    lists = {FOLDER / "README.md": "", ROOT / "README.md": "examples/notebooks/"}
    for page, prefix in lists.items():
        for name in NAMES:
            assert f"]({prefix}{name}.ipynb)" in page.read_text("utf-8"), (page, name)


@pytest.mark.parametrize("name", NAMES)
def test_form(name: str) -> None:
    path = FOLDER / f"{name}.ipynb"
    notebook = read(name)
    nbformat.validate(notebook)
    assert path.stat().st_size < 24_000
    titles = re.findall(r"^(#+) (.+)$", prose_of(notebook), re.M)
    assert [level for level, _ in titles] == ["#", *["##"] * len(SECTIONS)]
    assert [title for _, title in titles[1:]] == SECTIONS
    for cell in notebook.cells:
        assert len(cell.source.splitlines()) <= 40
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.parametrize("name", NAMES)
def test_badge_and_links(name: str) -> None:
    """The badge opens this very file; links into the repository name files that are there."""
    (repository,) = re.findall(r"the repository `([\w.-]+/[\w.-]+)`", (FOLDER / "README.md").read_text("utf-8"))
    prose = prose_of(read(name))
    place = f"{repository}/blob/main/examples/notebooks/{name}.ipynb"
    badge = "![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)"
    assert prose.count(f"[{badge}](https://colab.research.google.com/github/{place})") == 1
    links = set(re.findall(r"\]\((\S+?)\)", prose))
    ours = f"https://github.com/{repository}/blob/main/"
    known = (ours, "https://arxiv.org/abs/", "https://colab.research.google.com/")
    for link in links:
        assert link.startswith(known), link
        assert not link.startswith(ours) or (ROOT / link.removeprefix(ours)).is_file(), link
    cards = {path.stem for path in (ROOT / "model_cards" / "methods").glob("*.md")}
    linked = {Path(link).stem for link in links if "model_cards/methods" in link}
    methods = set().union(RUNS[name][1], *RUNS[name][2].values()) & cards
    # Of each method that a notebook is about: re-warming and the probes stand in all of them.
    assert linked >= methods - {"forgetting", "replay", "rewarm"} and linked


@pytest.mark.parametrize("name", NAMES)
def test_colab_and_smoke_differ_in_names_and_sizes_alone(name: str) -> None:
    cells = code_of(read(name))
    mentions = [n for n, code in enumerate(cells) if "SMOKE" in code]
    assert mentions == [0, 1]
    assert "if not SMOKE:\n    %pip install -q" in cells[0]
    (choice,) = ast.parse(cells[1]).body
    assert isinstance(choice, ast.If) and isinstance(choice.test, ast.Name) and choice.test.id == "SMOKE"

    def assigned(body: list[ast.stmt]) -> set[str]:
        targets = [node for part in body for node in ast.walk(part) if isinstance(node, ast.Name)]
        return {node.id for node in targets if isinstance(node.ctx, ast.Store)}

    assert assigned(choice.body) == assigned(choice.orelse) > {"MODEL", "DOCUMENTS", "BLOCK", "BATCH", "STEPS"}
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in choice.orelse
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert values.pop("MODEL") == MODEL
    for source in values.values():
        assert (source["path"], source["name"]) in COLUMNS
    # A free T4 knows no bfloat16.
    assert not any("bf16=True" in code or '"bf16"' in code for code in cells)


@pytest.mark.parametrize("name", [*NAMES, "stand_in.py", "README.md"])
def test_no_paths_and_no_tokens(name: str) -> None:
    path = FOLDER / name
    text = (path if path.suffix else path.with_suffix(".ipynb")).read_text("utf-8")
    assert not re.findall(r"(?:/home/|/root/|/work/|/tmp/|/content/|/Users/|[A-Z]:\\\\)", text)
    assert not re.findall(r"hf_[A-Za-z0-9]{20,}", text)


def test_ruff_is_content() -> None:
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, str(FOLDER)], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stdout
