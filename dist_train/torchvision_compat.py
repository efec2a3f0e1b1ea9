"""torchvision, also where its compiled operators do not fit the torch beside it.

The CPU build of torch next to a CUDA build of torchvision (what a package index may well give) cannot load
torchvision's operators, and `import torchvision` dies of "operator torchvision::nms does not exist". Data sets,
transforms and image classifiers need none of these operators: it is enough that two of them have a schema. Calling
such an operator, say in a detection net, still raises.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from dist_train.errors import DistTrainError

_SCHEMA = "{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_NAMES = ("nms", "qnms")  # the operators whose absence stops the import
_defined: list[Any] = []  # a library object that is collected takes its schemas along


def import_torchvision() -> ModuleType:
    """torchvision, imported plainly if that works, else with the two missing operators declared.

    Afterwards `import torchvision.datasets` and the like work anywhere in this process.

    Raises:
        DistTrainError: torchvision is not installed, or cannot be imported for another reason.
    """
    if "torchvision" not in sys.modules:
        _forget_torchvision()  # somebody may have tried before
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise _cannot_import(error) from error
        fix = "Install the one that fits your torch: https://pytorch.org/get-started/locally."
        raise DistTrainError(f"torchvision is not installed. {fix}") from None
    except Exception as error:
        if not is_missing_operator(error):
            raise _cannot_import(error) from error
    _forget_torchvision()
    _declare_operators()
    try:
        return importlib.import_module("torchvision")
    except Exception as error:
        raise _cannot_import(error) from error


def is_missing_operator(error: BaseException) -> bool:
    """Whether `error` says that torchvision's operators do not fit the torch beside it."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(f"operator torchvision::{name} does not" in text for name in _NAMES)


def _forget_torchvision() -> None:
    """A failed import leaves half of its submodules behind, and the next import would build on them."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


def _declare_operators() -> None:
    if _defined:
        return
    from torch.library import Library

    library = Library("torchvision", "FRAGMENT")
    for name in _NAMES:
        library.define(_SCHEMA.format(name=name))
    _defined.append(library)


def _cannot_import(error: BaseException) -> DistTrainError:
    return DistTrainError(
        f"torchvision cannot be imported: {type(error).__name__}: {error}. "
        "Reinstall torch and torchvision as a pair: https://pytorch.org/get-started/locally."
    )
