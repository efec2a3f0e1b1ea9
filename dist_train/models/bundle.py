"""A BK.Synapse bundle's net: `bks_model.py` with UserModel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.errors import UserCodeError
from dist_train.user_code.bundles import check_method, class_of, label_of, open_bundle
from dist_train.user_code.importing import check_arguments, wrap_user_errors

if TYPE_CHECKING:
    from torch import nn


def load_model_bundle(path: Path, args: Mapping[str, Any] | None = None) -> nn.Module:
    """UserModel, made with the keyword arguments `args`.

    Raises:
        ConfigError: nothing at `path`, or `args` that UserModel does not take.
        UserCodeError: what lies there does not have the interface above, or fails.
    """
    from torch import nn

    cls = class_of(open_bundle(path, "bks_model.py", "model.bundle"), "UserModel")
    if not issubclass(cls, nn.Module):
        raise UserCodeError(f"{label_of(cls)} is not a torch.nn.Module. Derive it from one.")
    check_method(cls, "loss", "output", "target")
    if hasattr(cls, "metrics"):
        check_method(cls, "metrics", "output", "target")
    check_arguments(cls, args or {}, "model.args")
    with wrap_user_errors(label_of(cls), "cannot be made"):
        model: nn.Module = cls(**(args or {}))
    return model
