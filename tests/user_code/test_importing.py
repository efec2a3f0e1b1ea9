"""dist_train.user_code.importing: where names are looked up, and the error messages."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dist_train.errors import ConfigError, UserCodeError
from dist_train.user_code.importing import accepted_arguments, check_arguments, import_file, load_object
from support.processes import ROOT


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder; modules imported from it are removed from sys.modules afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_class_from_current_folder(folder: Path) -> None:
    (folder / "my_nets.py").write_text("class Net: pass\n")
    assert load_object("my_nets:Net").__name__ == "Net"
    assert sys.path.count(str(folder)) == 1
    load_object("my_nets:Net")
    assert sys.path.count(str(folder)) == 1


def test_module_imports_sibling_in_its_package(folder: Path) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "sizes.py").write_text("WIDTH = 7\n")
    (folder / "mine" / "nets.py").write_text("from mine.sizes import WIDTH\n")
    assert load_object("mine.nets:WIDTH") == 7


def test_current_folder_precedes_rest_of_path(folder: Path) -> None:
    other = folder / "other"
    other.mkdir()
    (other / "my_twice.py").write_text("WHERE = 'other'\n")
    (folder / "my_twice.py").write_text("WHERE = 'here'\n")
    sys.path.insert(0, str(other))
    assert load_object("my_twice:WHERE") == "here"


def test_console_script_finds_current_folder(folder: Path) -> None:
    # Its sys.path[0] is the folder of the script, not the current folder.
    (folder / "bin").mkdir()
    script = folder / "bin" / "command.py"
    script.write_text("from dist_train.user_code.importing import load_object\nprint(load_object('my_here:ANSWER'))\n")
    (folder / "my_here.py").write_text("ANSWER = 42\n")
    package = ROOT
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "42\n", done.stderr


@pytest.mark.parametrize("spec", ["my_nets", "my_nets:", ":Net", "my nets:Net", "a:b:c", "my_nets.py:Net(3)"])
def test_invalid_name_is_config_error(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"does not have the form package\.module:Name"):
        load_object(spec)


def message(spec: str) -> str:
    with pytest.raises(UserCodeError) as caught:
        load_object(spec)
    return str(caught.value)


def test_missing_module_gets_suggestion(folder: Path) -> None:
    (folder / "my_nets.py").touch()
    (folder / "lib").mkdir()
    (folder / "lib" / "layers.py").touch()
    assert message("my_net:Net").startswith(f"my_net:Net: no module my_net, neither in {folder} nor among")
    assert message("my_net:Net").endswith("Did you mean my_nets?")
    assert message("lib.layer:Net").endswith("Did you mean lib.layers?")
    assert "no module my_nets.deeper" in message("my_nets.deeper:Net")


def test_missing_name_gets_lines_and_suggestion(folder: Path) -> None:
    (folder / "my_nets.py").write_text("from pathlib import Path\n\nclass Net: pass\n\ndef make(): pass\n")
    text = message("my_nets:Nett")
    assert text == (
        f"my_nets:Nett: {folder}/my_nets.py has no Nett. Found: Net (line 3), make (line 5). Did you mean Net?"
    )


def test_syntax_error_is_located(folder: Path) -> None:
    (folder / "my_broken.py").write_text("x = 1\nclass Net(:\n")
    assert message("my_broken:Net").startswith(f"my_broken:Net cannot be imported: {folder}/my_broken.py:2: SyntaxErr")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("import einopsss", "ModuleNotFoundError: No module named 'einopsss'."),
        ("import json; json.loads('{')", "JSONDecodeError: Expecting property name"),  # raised inside json
        ("raise SystemExit(3)", "SystemExit: 3."),
        ("from my_half import gone", "ImportError: cannot import name 'gone' from 'my_half'"),
    ],
)
def test_import_error_is_located_in_user_file(folder: Path, line: str, error: str) -> None:
    (folder / "my_half.py").touch()
    (folder / "my_fails.py").write_text(f"\n\n{line}\n")
    assert message("my_fails:Net").startswith(f"my_fails:Net cannot be imported: {folder}/my_fails.py:3: {error}")


@pytest.mark.parametrize(
    "main",
    [
        "def make():\n    from torchvision.datasets import MNIST\n    return MNIST\n",  # imported when called
        "from my_sibling import make\n",
        "from my_folder.deep import make\n",  # no file of this folder mentions torchvision
    ],
)
def test_torchvision_works_in_user_code_with_any_installed_pair(folder: Path, main: str) -> None:
    (folder / "my_user.py").write_text(main)
    if "sibling" in main:
        (folder / "my_sibling.py").write_text(
            "def make():\n    from torchvision.datasets import MNIST\n    return MNIST\n"
        )
    (folder / "my_folder").mkdir()
    (folder / "my_folder" / "deep.py").write_text("import torchvision\ndef make(): return torchvision.datasets.MNIST\n")
    code = "from dist_train.user_code.importing import load_object as load; print(load('my_user:make')().__name__)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "MNIST\n", done.stderr


def test_code_without_torchvision_does_not_import_torch(folder: Path) -> None:
    (folder / "my_plain.py").write_text("ANSWER = 42\n")
    code = """
import sys
from dist_train.user_code.importing import load_object
load_object("my_plain:ANSWER")
print(sorted({"torch", "torchvision"} & set(sys.modules)))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_file_imports_its_siblings_and_leaves_no_module_on_failure(folder: Path) -> None:
    (folder / "somewhere").mkdir()
    file = folder / "somewhere" / "main.py"
    file.write_text("import my_neighbour\nclass Net: pass\n")
    with pytest.raises(UserCodeError, match=r"data\.bundle=x cannot be imported: .*main\.py:1: ModuleNotFoundError"):
        import_file(file, "main_123", "data.bundle=x")
    assert "main_123" not in sys.modules
    (folder / "somewhere" / "my_neighbour.py").touch()
    module = import_file(file, "main_123", "data.bundle=x")
    assert module.Net.__module__ == "main_123"
    assert import_file(file, "main_123", "data.bundle=x") is module


# --- calling ---


class Sized:
    def __init__(self, num_classes: int, width: int = 3) -> None:
        self.given = (num_classes, width)


class Derived(Sized):
    def __init__(self, depth: int = 1, **options: Any) -> None:
        super().__init__(**options)


class Bare(nn.Module):
    pass


def test_only_accepted_arguments_are_passed() -> None:
    offered = {"in_channels": 1, "num_classes": 10}
    assert accepted_arguments(Sized, offered) == {"num_classes": 10}
    assert accepted_arguments(Derived, offered) == {"num_classes": 10}
    assert accepted_arguments(Bare, offered) == {}  # nn.Module's own **kwargs accepts nothing

    def make(**options: Any) -> Sized:
        return Sized(**options)

    assert accepted_arguments(make, offered) == {"num_classes": 10}

    def silent(**options: Any) -> Any:
        return options

    assert accepted_arguments(silent, offered) == {}
    assert accepted_arguments(print, offered) == {}


def test_error_names_unknown_and_valid_arguments() -> None:
    check_arguments(Derived, {"depth": 2, "width": 4}, "model.args")
    with pytest.raises(ConfigError, match=r"^Unknown setting model\.args\.widht\. Did you mean model\.args\.width\? "):
        check_arguments(Derived, {"widht": 2}, "model.args")
    with pytest.raises(ConfigError, match=r"It takes: num_classes, width\.$"):
        check_arguments(Sized, {"q": 2}, "model.args")
    with pytest.raises(ConfigError, match=r"It takes: nothing\.$"):
        check_arguments(Bare, {"q": 2}, "model.args")
