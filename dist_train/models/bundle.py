"""The net of a BK.Synapse bundle: the class UserModel in `bks_model.py`."""

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
    """Construct UserModel of the bundle at `path` with the keyword arguments `args`.

    Raises:
        ConfigError: `path` does not exist, or UserModel does not accept `args`.
        UserCodeError: the bundle lacks the interface of user_code.bundles, or fails.
    """
    from torch import nn

    cls = class_of(open_bundle(path, "bks_model.py", "model.bundle"), "UserModel")
    if not issubclass(cls, nn.Module):
        raise UserCodeError(f"{label_of(cls)} is not a torch.nn.Module. Derive it from that class.")
    check_method(cls, "loss", "output", "target")
    if hasattr(cls, "metrics"):
        check_method(cls, "metrics", "output", "target")
    check_arguments(cls, args or {}, "model.args")
    with wrap_user_errors(label_of(cls), "cannot be constructed"):
        model: nn.Module = cls(**(args or {}))
    return model
