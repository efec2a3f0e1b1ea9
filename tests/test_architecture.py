"""The architecture: imports point down, and restricted modules are imported in one place."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from support.processes import ROOT

PACKAGE = ROOT / "dist_train"
# From the bottom up: a folder imports only from those before it.
FOLDERS = [
    "config", "user_code", "distributed", "data", "models", "runs", "checkpoints", "training", "launch", "tools",
    "inference", "web", "cli",
]  # fmt: skip
FILES = {"__init__", "__main__", "errors", "atomic_files", "torchvision_compat"}  # at the top; all may import them
# What runs before processes start, and `--help`, must not wait for torch.
TORCH_FREE = {"errors", "atomic_files", "config", "runs", "launch", "web", "cli"}
PEERS = "tools.bench.peers."  # training loops without this package: they may import anything
RESTRICTED = {  # module: where it may be imported
    "wandb": {"training.tracking"},
    "subprocess": {"launch.torchrun", "launch.subprocesses", "launch.slurm.commands"},
    "torch.distributed": {"distributed.world", "distributed.peer_failures"},
    "torchvision": {"torchvision_compat"},
}
PATHS = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(path: Path) -> Iterator[str]:
    """Yield the modules that the file imports, also inside functions and for types only.

    For torch and this package, also yield imported names, which may be modules.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module.split(".")[0] in ("torch", "dist_train"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path: Path) -> set[str]:
    """Return the modules of this package that the file imports."""
    return {found for name in imports(path) if (found := name.removeprefix("dist_train.")) != name and found in PATHS}


def folder_of(module: str) -> str:
    return module.split(".")[0]


def test_package_has_exactly_these_folders_and_files() -> None:
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == {*FOLDERS}
    assert {path.stem for path in PACKAGE.glob("*.py")} == FILES


@pytest.mark.parametrize("module", PATHS)
def test_imports_point_down(module: str) -> None:
    mine = folder_of(module)
    below = FOLDERS[: FOLDERS.index(mine)] if mine in FOLDERS else FOLDERS if mine.startswith("__") else []
    allowed = FILES | {mine, *below}
    assert [name for name in ours(PATHS[module]) if folder_of(name) not in allowed] == []


@pytest.mark.parametrize("inner", [False, True], ids=["modules", "inner folders"])
def test_no_import_cycles(inner: bool) -> None:
    """Raises CycleError, which shows the cycle."""
    graph: dict[str, set[str]] = {}
    for module, path in PATHS.items():
        mine, *names = (name.rpartition(".")[0] if inner else name for name in [module, *ours(path)])
        graph.setdefault(mine, set()).update(set(names) - {mine, ""})
    graph.pop("", None)  # the files at the top: see the test above
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    "folder", sorted(path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*/__init__.py"))
)
def test_folder_has_docstring_and_imports_nothing(folder: str) -> None:
    tree = ast.parse((PACKAGE / folder / "__init__.py").read_text())
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1 or folder == "cli"


@pytest.mark.parametrize("module", [name for name in PATHS if not name.startswith(PEERS)])
def test_restricted_modules_are_imported_in_one_place(module: str) -> None:
    names = set(imports(PATHS[module]))
    found = {each for each in RESTRICTED for name in names if name == each or name.startswith(f"{each}.")}
    assert {each for each in found if module not in RESTRICTED[each]} == set()


def test_torch_free_at_import() -> None:
    free = [f"dist_train.{name}" for name in PATHS if folder_of(name) in TORCH_FREE]
    code = f"import sys, {', '.join(free)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- the tests themselves --------------------------------------------------------------------------------------------

TESTS = sorted((ROOT / "tests").rglob("*.py"))
PRIVATE = re.compile(r"_[a-z]\w*")
# Private names of other libraries: Accelerate has no other way to leave a world.
PRIVATE_ELSEWHERE = {
    "_exit",
    "_global_forward_hooks",
    "_load_from_state_dict",
    "_reset_state",
    "_shared_state",
    "_version",
}


def private_names(path: Path) -> Iterator[str]:
    """Yield the private names of dist_train that are read, imported or named in a string, as for monkeypatch."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dist_train"):
            yield from (alias.name for alias in node.names if PRIVATE.fullmatch(alias.name))
        elif isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr):
            if not isinstance(node.value, ast.Name) or node.value.id not in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr"):
            texts = [each.value for each in node.args if isinstance(each, ast.Constant)]
            yield from (text for text in texts if isinstance(text, str) and PRIVATE.fullmatch(text.rpartition(".")[2]))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_tests_use_only_public_names(path: Path) -> None:
    """Shared code is in tests/support, and a private name may change without changing a test."""
    assert [name for name in imports(path) if name.rpartition(".")[2].startswith("test_")] == []
    assert set(private_names(path)) - PRIVATE_ELSEWHERE == set()
