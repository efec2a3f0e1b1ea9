"""Import of torchvision, also where its compiled operators do not match the installed torch.

A CPU build of torch with a CUDA build of torchvision, which a package index may install, cannot load torchvision's
operators: `import torchvision` fails with "operator torchvision::nms does not exist". Data sets, transforms and image
classifiers use none of these operators: declaring the schema of two of them is enough. Calling such an operator, for
example in a detection net, still raises.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from dist_train.errors import DistTrainError

_SCHEMA = "{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_NAMES = ("nms", "qnms")  # the operators without which the import fails
_defined: list[Any] = []  # keeps the library object alive: its schemas are removed with it


def import_torchvision() -> ModuleType:
    """Import torchvision; if that fails for its operators, declare the two missing ones and import it again.

    Afterwards `import torchvision.datasets` and the like work anywhere in this process.

    Raises:
        DistTrainError: torchvision is not installed, or cannot be imported for another reason.
    """
    if "torchvision" not in sys.modules:
        _forget_torchvision()  # an earlier import may have failed
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise _cannot_import(error) from error
        fix = "Install the version that matches your torch: https://pytorch.org/get-started/locally."
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
    """Return whether `error` means that torchvision's operators do not match the installed torch."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(f"operator torchvision::{name} does not" in text for name in _NAMES)


def _forget_torchvision() -> None:
    """Remove the submodules that a failed import leaves behind: the next import would use them."""
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
