"""What users install: plain files through every route, a light import, and one name for every class.

The working tree is copied before anything is built, so that it stays clean and leftovers of earlier builds in it
cannot reach the archives. Nothing here needs a network.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("accelerate", "bitsandbytes", "datasets", "matplotlib", "pandas", "peft", "torch", "transformers", "trl")
GENERATED = {"__pycache__", "build", "demo_output", "dist", "node_modules", "runs", "venv"}

# Runs where only the installed copy can be imported; prints where it came from.
IMPORT_CHECK = """
import importlib.metadata, json
import hf_pretrain_ext
from hf_pretrain_ext import callbacks
from hf_pretrain_ext.callbacks import ReplayCallback

entry_points = importlib.metadata.entry_points(group="hf_pretrain_ext.plugins")
print(json.dumps({
    "package": hf_pretrain_ext.__file__,
    "callbacks": callbacks.__file__,
    "module": ReplayCallback.__module__,
    "version": importlib.metadata.version("hf-pretrain-ext"),
    "plugins": {point.name: point.load().__qualname__ for point in entry_points},
}))
"""


def is_generated(path: Path) -> bool:
    """Hidden folders (the .git and .venv of a checkout), environments under any name, caches and outputs."""
    if path.name.endswith(".egg-info") or path.name in GENERATED:
        return True
    return path.is_dir() and not path.is_symlink() and (path.name.startswith(".") or (path / "pyvenv.cfg").exists())


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Run `command` in `cwd`, without the caller's PYTHONPATH, and return its standard output."""
    full_env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | env
    done = subprocess.run([*map(str, command)], cwd=cwd, env=full_env, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done.stdout


def build(source: Path, out: Path, kind: str) -> Path:
    """Build the `wheel` or `sdist` of the tree at `source` and return the one archive that this made."""
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out, source, cwd=out.parent)
    (archive,) = out.iterdir()
    return archive


def declared_version() -> str:
    text = (ROOT / "hf_pretrain_ext" / "_version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    assert match, "hf_pretrain_ext/_version.py has no literal __version__"
    return match[1]


def expected_files() -> set[str]:
    """Every module of the package under the name it is imported by, and the marker of a typed package."""
    package = ROOT / "hf_pretrain_ext"
    modules = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}
    plugins = {f"hf_pretrain_ext/callbacks/{path.name}" for path in (ROOT / "callbacks").glob("*.py")}
    assert "hf_pretrain_ext/callbacks/__init__.py" in plugins
    return modules | plugins | {"hf_pretrain_ext/py.typed"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the working tree with its symbolic link as a link, without anything generated."""
    copy = tmp_path_factory.mktemp("tree") / "hf-pretrain-ext"

    def ignore(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if is_generated(Path(folder, name))}

    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tree, tmp_path_factory.mktemp("wheel") / "out", "wheel")


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tree, tmp_path_factory.mktemp("sdist") / "out", "sdist")


@pytest.fixture(scope="module")
def wheel_of_sdist(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return build(source, tmp_path_factory.mktemp("wheel_of_sdist") / "out", "wheel")


def test_the_link_is_relative() -> None:
    link = ROOT / "hf_pretrain_ext" / "callbacks"
    if not link.is_symlink():
        pytest.skip("not a checkout: an unpacked sdist holds plain files here")
    assert os.readlink(link) == "../callbacks"


@pytest.mark.parametrize("name", ["wheel", "wheel_of_sdist"])
def test_wheel_holds_plain_files(name: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(name)
    assert path.name == f"hf_pretrain_ext-{declared_version()}-py3-none-any.whl"
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        assert expected_files() <= members.keys()
        # The package and its metadata, and no second copy of the plug-ins under a top-level name.
        assert {member.split("/")[0] for member in members} == {
            "hf_pretrain_ext",
            f"hf_pretrain_ext-{declared_version()}.dist-info",
        }
        links = [member for member, info in members.items() if (info.external_attr >> 16) & 0o170000 == 0o120000]
        assert not links
        for plugin in (ROOT / "callbacks").glob("*.py"):
            assert archive.read(f"hf_pretrain_ext/callbacks/{plugin.name}") == plugin.read_bytes()


def test_sdist_holds_plain_files(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
        needed = expected_files() | {"LICENSE", "pyproject.toml"}
        assert needed <= members.keys()
        assert [name for name, member in members.items() if not (member.isreg() or member.isdir())] == []
        for plugin in (ROOT / "callbacks").glob("*.py"):
            stored = archive.extractfile(members[f"hf_pretrain_ext/callbacks/{plugin.name}"])
            assert stored is not None and stored.read() == plugin.read_bytes()


def check_import(cwd: Path, package_root: Path, **env: str) -> None:
    """Import from `cwd`, and find everything under `package_root`, our plug-ins by their entry points too."""
    found = json.loads(run(*warm.python(), "-c", IMPORT_CHECK, cwd=cwd, **env).splitlines()[-1])
    package = package_root / "hf_pretrain_ext"
    assert os.path.samefile(found["package"], package / "__init__.py")
    assert os.path.samefile(found["callbacks"], package / "callbacks" / "__init__.py")
    assert found["module"].startswith("hf_pretrain_ext.callbacks")
    assert found["version"] == declared_version()
    # Other installed packages may add to the group; ours must be there.
    ours = {"forgetting": "ForgettingCallback", "replay": "ReplayCallback", "rewarm": "RewarmCallback"}
    assert ours.items() <= found["plugins"].items()


@pytest.mark.parametrize("name", ["wheel", "sdist"])
def test_installed_archive_imports(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    archive: Path = request.getfixturevalue(name)
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation")
    run(*pip, "--target", target, archive, cwd=elsewhere)
    # The environment may hold an editable install of the working tree: PYTHONPATH comes before it.
    check_import(elsewhere, target, PYTHONPATH=str(target))


def test_editable_install_imports(tmp_path: Path) -> None:
    # All that are found, because the build leftovers in the tree itself (*.egg-info) carry the name too.
    found = importlib.metadata.distributions(name="hf-pretrain-ext")
    origins = [json.loads(distribution.read_text("direct_url.json") or "{}") for distribution in found]
    if not any(origin.get("dir_info", {}).get("editable") for origin in origins):
        pytest.skip("this environment holds no editable install of hf-pretrain-ext (make install makes one)")
    check_import(tmp_path, ROOT)


def test_import_is_light(tmp_path: Path) -> None:
    """`import hf_pretrain_ext` adds next to nothing to a script: it loads none of the big libraries."""
    code = f"import json, sys, hf_pretrain_ext; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    output = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert json.loads(output.splitlines()[-1]) == []


def sources(*suffixes: str) -> Iterator[Path]:
    for folder, folders, files in os.walk(ROOT):  # follows no links: every file once
        folders[:] = sorted(name for name in folders if not is_generated(Path(folder, name)))
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(suffixes))


def imports_callbacks(code: str) -> bool:
    """Whether `code` imports the top-level folder, by statement or by name."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""] if node.level == 0 else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [
                arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            ]
        else:
            continue
        if any(name.split(".")[0] == "callbacks" for name in names):
            return True
    return False


# A statement at the start of a line: in documents, after a doctest prompt, in a notebook's JSON string.
TEXT_IMPORT = re.compile(r"""^\s*(?:>>>\s*|\.\.\.\s*|")?(?:import|from)\s+callbacks\b""", re.MULTILINE)


def test_nothing_imports_callbacks_from_the_top_level() -> None:
    """The folder's own name would load second copies of the classes, which `isinstance` then tells apart."""
    code = {path: path.read_text(encoding="utf-8") for path in sources(".py")}
    text = {path: path.read_text(encoding="utf-8") for path in sources(".ipynb", ".md", ".toml", ".yaml", ".yml")}
    assert ROOT / "tests" / "test_packaging.py" in code
    found = [path for path, source in code.items() if imports_callbacks(source) or TEXT_IMPORT.search(source)]
    found += [path for path, source in text.items() if TEXT_IMPORT.search(source)]
    assert not found, f"write hf_pretrain_ext.callbacks in {[str(path.relative_to(ROOT)) for path in found]}"


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ("import {}", True),
        ("import os, {}.replay as replay", True),
        ("def f():\n    from {}.replay import ReplayCallback", True),
        ("importlib.import_module('{}.replay')", True),
        ("from hf_pretrain_ext import {}", False),
        ("from hf_pretrain_ext.{} import ReplayCallback", False),
        ("from .{} import ReplayCallback", False),
        ("import {}_of_others", False),
    ],
)
def test_the_import_check_tells_apart(code: str, refused: bool) -> None:
    assert imports_callbacks(code.format("callbacks")) is refused
