"""dist_train.torchvision_compat. Each case runs in its own process: earlier imports would change the result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_python(code: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fake_torchvision(folder: Path, source: str) -> None:
    """Write a torchvision package that is imported instead of the installed one."""
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "part.py").write_text("ready = False\n")
    (folder / "torchvision" / "__init__.py").write_text(source)


def test_installed_pair_works(tmp_path: Path) -> None:
    code = """
from dist_train.torchvision_compat import import_torchvision
first = import_torchvision()
import torchvision, torchvision.datasets, torchvision.models, torchvision.transforms.v2 as v2
assert first is torchvision is import_torchvision()
import torch
print(v2.functional.horizontal_flip(torch.tensor([[[1, 2]]])).tolist(), torchvision.datasets.MNIST.__name__)
print(sum(weight.numel() for weight in torchvision.models.squeezenet1_1().parameters()))
"""
    assert run_python(code, tmp_path).split("\n") == ["[[[2, 1]]] MNIST", "1235496"]


def test_missing_operators_are_declared_after_failed_import_elsewhere(tmp_path: Path) -> None:
    # Simulates a CPU torch with a CUDA torchvision on any machine; some submodules stay in sys.modules.
    fake_torchvision(
        tmp_path,
        "import torch, torchvision.part\n"
        "assert not torchvision.part.ready, 'a module of the failed import was used again'\n"
        "torchvision.part.ready = True\n"
        "torch.library.register_fake('torchvision::nms')(len)\n"
        "torch.library.register_fake('torchvision::qnms')(len)\n",
    )
    code = """
try:
    import torchvision
except RuntimeError as error:
    print(error)
from dist_train.torchvision_compat import import_torchvision
print(import_torchvision().__name__)
"""
    assert run_python(code, tmp_path).split("\n") == ["operator torchvision::nms does not exist", "torchvision"]


def test_matching_pair_is_imported_unchanged(tmp_path: Path) -> None:
    fake_torchvision(tmp_path, "loaded = True\n")
    code = """
import sys
from dist_train.torchvision_compat import import_torchvision
print(import_torchvision().loaded, "torch" in sys.modules)
"""
    assert run_python(code, tmp_path) == "True False"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (None, "torchvision is not installed. Install the version that matches"),
        ("import pillow_is_gone", "torchvision cannot be imported: ModuleNotFoundError: No module named 'pillow_is"),
        ("raise OSError('libcudart')", "torchvision cannot be imported: OSError: libcudart. Reinstall torch and"),
    ],
)
def test_other_failures_name_fix(tmp_path: Path, source: str | None, expected: str) -> None:
    hide = "sys.modules['torchvision'] = None" if source is None else ""
    if source is not None:
        fake_torchvision(tmp_path, source)
    code = f"""
import sys
{hide}
from dist_train.errors import DistTrainError
from dist_train.torchvision_compat import import_torchvision
try:
    import_torchvision()
except DistTrainError as error:
    print(error)
"""
    assert run_python(code, tmp_path).startswith(expected)
