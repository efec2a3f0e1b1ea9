"""Construction of a net by name: ours, torchvision's, timm's or the user's. Weights depend only on the seed."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from dist_train.config.schema import ModelConfig
from dist_train.distributed.rng import derive_seed, seeded
from dist_train.errors import ConfigError, DataError, DistTrainError, UserCodeError
from dist_train.models.bundle import load_model_bundle
from dist_train.models.names import check_own_name, unknown_net
from dist_train.models.nets import MODELS
from dist_train.torchvision_compat import import_torchvision
from dist_train.user_code.bundles import check_bundle
from dist_train.user_code.importing import (
    accepted_arguments,
    check_arguments,
    check_object,
    load_object,
    parameters_of,
    wrap_user_errors,
)

_log = logging.getLogger(__name__)

DataSpec = Mapping[str, int | None]  # in_channels, num_classes, image_size of the data set; None if unknown


def build_model(config: ModelConfig, spec: DataSpec, seed: int) -> nn.Module:
    """Construct the net of `config` for a data set with `spec`, on the CPU and in torch's default dtype.

    The weights depend only on `seed`. The global generators do not change.

    Raises:
        ConfigError: an unknown name or argument, or the data set does not provide what the net needs.
        UserCodeError: the user's class or bundle lacks the expected interface, or fails.
    """
    with seeded(derive_seed(seed, "init")):
        if config.bundle is not None:
            model = load_model_bundle(config.bundle, config.args)
        else:
            source, colon, name = config.name.partition(":")
            if not colon:
                model = _own(config, spec)
            elif source == "torchvision":
                model = _torchvision(name, config, spec)
            elif source == "timm":
                model = _timm(name, config, spec)
            else:
                model = _of_user(config, spec)
    _reject_lazy_layers(model)
    _warn_of_hidden_layers(model)
    for method in ("loss", "metrics"):
        if not callable(getattr(model, method, print)):
            raise UserCodeError(
                f"{type(model).__name__}.{method} is of type {type(getattr(model, method)).__name__}. "
                f"Make it a method {method}(output, target), or give it another name."
            )
    return model


def check_model_exists(config: ModelConfig) -> None:
    """Check that the net exists. User code is executed only if its source does not show the name.

    Raises:
        ConfigError, UserCodeError: as `build_model`.
    """
    source, colon, name = config.name.partition(":")
    if config.bundle is not None:
        check_bundle(config.bundle, "bks_model.py", "model.bundle", "UserModel")
    elif not colon:
        check_own_name(config)
    elif source == "torchvision":
        _check_torchvision(name, config)
    elif source == "timm":
        _import_timm(name, config)
    else:
        check_object(config.name)


def is_library_net(config: ModelConfig) -> bool:
    """Whether the net is one of torchvision's or timm's."""
    return config.bundle is None and config.name.startswith(("torchvision:", "timm:"))


def _reject_lazy_layers(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(map(is_lazy, [*module.parameters(recurse=False), *module.buffers(recurse=False)])):
            raise UserCodeError(
                f"{type(model).__name__}: layer {name} is a {type(module).__name__} without a size, but its weights "
                f"must be initialised from the seed before any data are read. Give the size, or call the net once in "
                f"its constructor, on zeros of the inputs' shape."
            )


def _warn_of_hidden_layers(model: nn.Module) -> None:
    """Warn of layers in a plain list, tuple or dict: torch does not see them."""
    known = set(model.modules())
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            each = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            hidden = [item for item in each if isinstance(item, nn.Module) and item not in known]
            if hidden and not name.startswith("_"):
                _log.warning(
                    "%s: %s holds %d layers in a %s, which are not trained, moved to the device or saved. Use "
                    "nn.ModuleList or nn.ModuleDict.",
                    type(model).__name__, f"{path}.{name}" if path else name, len(hidden), type(value).__name__,
                )  # fmt: skip


def _own(config: ModelConfig, spec: DataSpec) -> nn.Module:
    check_own_name(config)
    make = MODELS[config.name]
    check_arguments(make, config.args, "model.args")
    try:
        return make(**(_needed(config, spec, *spec) | config.args))
    except (TypeError, ValueError, RuntimeError) as error:  # an argument of the wrong type, or out of range
        raise _cannot_construct(config, error) from error


def _of_user(config: ModelConfig, spec: DataSpec) -> nn.Module:
    factory = load_object(config.name)
    label = f"model.name={config.name}"
    if isinstance(factory, nn.Module) or not callable(factory):
        raise UserCodeError(f"{label} is of type {type(factory).__name__}, not a class or function that returns a net.")
    check_arguments(factory, config.args, "model.args")
    # What the data set does not provide gets the constructor's default, if it has one.
    named = accepted_arguments(factory, dict(spec))
    required = [key for key in named if _is_required(factory, key)]
    offered = {key: value for key, value in named.items() if value is not None} | _needed(config, spec, *required)
    given = offered | config.args
    if missing := [key for key in parameters_of(factory)[0] if _is_required(factory, key) and key not in given]:
        raise ConfigError(f"{label} needs {', '.join(missing)}. Set model.args.{missing[0]}=VALUE.")
    with wrap_user_errors(label, "cannot be constructed"):
        model = factory(**given)
    if not isinstance(model, nn.Module):
        raise UserCodeError(f"{label} returns a {type(model).__name__}, not a torch.nn.Module.")
    return model


def _is_required(factory: Callable[..., Any], key: str) -> bool:
    parameter = inspect.signature(factory).parameters.get(key)
    return parameter is not None and parameter.default is parameter.empty


def _check_torchvision(name: str, config: ModelConfig) -> None:
    models = import_torchvision().models
    names = models.list_models(module=models)  # the classifiers
    if name not in names:
        raise unknown_net(config, "torchvision:", names, "See https://pytorch.org/vision/stable/models.html.")


def _torchvision(name: str, config: ModelConfig, spec: DataSpec) -> nn.Module:
    _check_torchvision(name, config)
    factory = import_torchvision().models.get_model_builder(name)
    check_arguments(factory, config.args, "model.args")
    needed = _needed(config, spec, "in_channels", "num_classes")
    channels = needed.pop("in_channels")
    # Without aux_logits=False googlenet and inception_v3 return a tuple in training.
    offered = {"weights": None, **accepted_arguments(factory, {"aux_logits": False, **needed})}
    try:
        model: nn.Module = factory(**(offered | config.args))
    except (TypeError, ValueError) as error:
        raise _cannot_construct(config, error) from error
    except OSError as error:  # a network error, or one of the cache
        code = f"import torchvision; torchvision.models.get_model('{name}', weights='{config.args.get('weights')}')"
        raise _cannot_fetch(config, error, code) from error
    path, conv = next((item for item in model.named_modules() if isinstance(item[1], nn.Conv2d)), ("", None))
    if isinstance(conv, nn.Conv2d) and conv.in_channels != channels:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _with_channels(conv, channels, bool(config.args.get("weights"))))
    return model


def _with_channels(conv: nn.Conv2d, in_channels: int, pretrained: bool) -> nn.Conv2d:
    make: Any = nn.Conv2d
    new: nn.Conv2d = make(
        in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
    )
    if pretrained:  # keeps the output for a gray image that is copied into every channel
        with torch.no_grad():
            new.weight.copy_(conv.weight.sum(dim=1, keepdim=True) / in_channels)
            if new.bias is not None and conv.bias is not None:
                new.bias.copy_(conv.bias)
    return new


def _import_timm(name: str, config: ModelConfig) -> Any:
    """Import timm and check that it has a net of this name."""
    import_torchvision()  # timm imports it
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ConfigError(f"model.name={config.name} needs timm: pip install 'dist-train[timm]'.") from None
    if not timm.is_model(name):
        raise unknown_net(config, "timm:", timm.list_models(), "timm.list_models() has all names.")
    return timm


def _timm(name: str, config: ModelConfig, spec: DataSpec) -> nn.Module:
    timm = _import_timm(name, config)
    needed = _needed(config, spec, "in_channels", "num_classes")
    offered = {"in_chans": needed.get("in_channels"), "num_classes": needed.get("num_classes")}
    args: dict[str, Any] = {"pretrained": False, **offered, **config.args}
    hub = logging.getLogger("huggingface_hub")
    before = hub.level
    hub.setLevel(logging.ERROR)  # without a network it logs each of ten attempts
    if args["pretrained"]:
        _log.info("%s: fetching its weights, which may take a minute, also without a network", config.name)
    try:
        model: nn.Module = timm.create_model(name, **args)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _cannot_construct(config, error) from error
    except OSError as error:
        code = f"import timm; timm.create_model('{name}', pretrained=True)"
        raise _cannot_fetch(config, error, code) from error
    finally:
        hub.setLevel(before)
    return model


def _needed(config: ModelConfig, spec: DataSpec, *keys: str) -> dict[str, int]:
    fixes = {
        "num_classes": "Give the data set's class an attribute `classes` or `num_classes`",
        "in_channels": "Make each example (image tensor [C, H, W], label)",
        "image_size": "Make each example (image tensor [C, H, W], label), with H = W",
    }
    needed: dict[str, int] = {}
    for key in keys:
        value = spec[key]
        if value is not None:
            needed[key] = value
        elif key not in config.args:
            # torchvision and timm have no argument of this name; for them only the data set can provide it.
            data_only = key == "in_channels" and is_library_net(config)
            fix = fixes[key] + ("." if data_only else f", or set model.args.{key}.")
            raise ConfigError(f"model.name={config.name} needs {key}, which the data set does not provide. {fix}")
    return needed


def _cannot_construct(config: ModelConfig, error: Exception) -> DistTrainError:
    args = ", ".join(f"model.args.{key}={value}" for key, value in config.args.items()) or "no model.args"
    return ConfigError(f"model.name={config.name} cannot be constructed with {args}: {error}.")


def _cannot_fetch(config: ModelConfig, error: OSError, code: str) -> DistTrainError:
    return DataError(
        f"The weights of model.name={config.name} could not be fetched ({type(error).__name__}: "
        f"{' '.join(str(error).split()).rstrip('.')}). To put them into the cache, run this once with network access, "
        f'for example on a login node: python -c "{code}"'
    )
