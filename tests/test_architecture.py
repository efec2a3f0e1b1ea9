"""The architecture as tests: imports point down, and each dangerous door is opened in one place."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.processes import ROOT

PACKAGE = ROOT / "dist_train"
# From the bottom up: a module imports only what stands before it.
LAYERS = [
    "errors", "seeding", "schedule", "config", "config_file", "plan", "environment", "whole", "small_files",
    "records", "error_file", "metrics_file", "time_sheet", "run_dir", "manifest", "watchdog", "stop_request", "slurm",
    "terminal", "start", "nodes", "post_mortem", "launch", "batch_script", "summary", "compare", "sweep", "charts",
    "page", "hardware", "distributed", "agreement", "batching", "audit", "vision", "user_code", "unpack", "bundle",
    "nets", "models", "generators", "data", "metrics", "objective", "optimizers", "averaging", "weights", "rehearsal",
    "observation", "eager_update", "whole_update", "step", "confusion", "evaluate", "train_state", "checkpoint",
    "checkpoints", "facts", "tracking", "progress", "parts", "final_passes", "journal", "train", "reporting",
    "attempt", "results", "saved_net", "submission", "simulate", "doctor", "verify", "bench", "cli",
]  # fmt: skip
DATA_LAYERS = [
    "image_set", "storage", "memory", "idx", "bundled_mnist", "catalog", "download", "named", "image_folder", "user",
    "pixels", "settings", "loader", "identity", "child", "splits", "batches", "evaluation_batches",
]  # fmt: skip
BENCH_LAYERS = [
    "task", "interval", "rounds", "harness", "contest", "scaling", "probes", "inside", "startup", "speedrun",
    "report", "suite",
]  # fmt: skip
VERIFY_LAYERS = ["trial", "rank", "suite"]
CLI_LAYERS = [
    "options",
    "train",
    "results",
    "runs",
    "sweep",
    "slurm",
    "tracking",
    "config",
    "data",
    "bench",
    "verify",
    "doctor",
]
INNER = {"data": DATA_LAYERS, "verify": VERIFY_LAYERS, "bench": BENCH_LAYERS, "cli": CLI_LAYERS}
PEERS = "bench/peers/"  # what people write without us: they come through any door
ONLY_DOOR = {
    "wandb": {"tracking"},
    "subprocess": {"launch", "slurm"},
    "torch.distributed": {"distributed"},
    "torchvision": {"vision"},
}
TORCH_FREE = [*LAYERS[: LAYERS.index("hardware")], "cli"]
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(imported module, whether at the top level) for every import in the file, from its syntax tree."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, top
            yield from ((f"{node.module}.{alias.name}", top) for alias in node.names if node.module == "torch")


def test_every_module_has_its_layer() -> None:
    top = {name for name in MODULES if "/" not in name} - {"__init__", "__main__"} | {*INNER}
    assert top == set(LAYERS)
    for package, layers in INNER.items():
        inner = {name.removeprefix(f"{package}/") for name in MODULES if name.startswith(f"{package}/")}
        assert {name for name in inner if "/" not in name} == {*layers, "__init__"}


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith(PEERS)])
def test_imports_point_down(module: str) -> None:
    package, _, inner = module.rpartition("/")
    mine = package or module
    for name, top in imports(PACKAGE / f"{module}.py"):
        parts = name.split(".")
        if parts[0] == "dist_train" and len(parts) > 1 and mine not in ("__init__", "__main__"):
            own = parts[1]
            if own == mine and len(parts) > 2 and inner != "__init__":
                assert INNER[mine].index(parts[2]) < INNER[mine].index(inner), f"{module} imports {name}, above it"
            elif own != mine:
                # bundle unpacks the MNIST it links to; data reads bundles: the one circle, closed inside a function.
                circle = module == "bundle" and own == "data" and not top
                assert circle or LAYERS.index(own) < LAYERS.index(mine), f"{module} imports {name}, a layer above it"
        for door, openers in ONLY_DOOR.items():
            assert not (name == door or name.startswith(door + ".")) or mine in openers, f"{module} imports {name}"


def test_torch_free_at_import() -> None:
    """What runs before processes start, and `--help`, must not wait for torch."""
    code = f"import sys; import {', '.join('dist_train.' + name for name in TORCH_FREE)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_readme_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text()
    ours = [name for name in MODULES if not name.startswith(PEERS)]
    names = [Path(name).name for name in ours if not name.endswith(("__init__", "__main__"))]
    assert [name for name in names if f"{name}.py" not in readme] == []


# --- the tests themselves --------------------------------------------------------------------------------------------

TESTS = sorted((ROOT / "tests").rglob("*.py"))
PRIVATE = re.compile(r"_[a-z]\w*")
# Not ours; and Accelerate has no other way to leave a world.
PRIVATE_ELSEWHERE = {"_exit", "_load_from_state_dict", "_reset_state", "_version"}


def private_names(path: Path) -> Iterator[str]:
    """Of dist_train's that are read, imported or named in a text, as monkeypatch wants them."""
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
def test_a_test_uses_what_is_public(path: Path) -> None:
    """What several tests share is in tests/support, and a private name may change without a test being changed."""
    assert [name for name, _ in imports(path) if name.rpartition(".")[2].startswith("test_")] == []
    assert set(private_names(path)) - PRIVATE_ELSEWHERE == set()
