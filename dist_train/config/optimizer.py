"""The settings of the optimizer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from dist_train.config.section import Section
from dist_train.config.values import Fraction, Options, known_or_own

# The settings of each optimizer besides lr: keyword arguments of its torch.optim class. None keeps torch's default.
OPTIMIZERS: dict[str, frozenset[str]] = {
    "adam": frozenset({"betas", "eps", "weight_decay", "amsgrad"}),
    "adamw": frozenset({"betas", "eps", "weight_decay", "amsgrad"}),
    "sgd": frozenset({"momentum", "weight_decay", "nesterov", "dampening"}),
    "adadelta": frozenset({"rho", "eps", "weight_decay"}),
    "rmsprop": frozenset({"alpha", "eps", "weight_decay", "momentum", "centered"}),
    "muon": frozenset({"weight_decay"}),
}


def _optimizer_or_own(name: str) -> str:
    return known_or_own("optimizer", name, OPTIMIZERS, "timm:NAME, package.module:Class")


class GroupConfig(Section):
    """Parameters with a learning rate or weight decay of their own. The first group that matches one takes it."""

    match: str  # name of a parameter or of a module around it; * stands for any text
    lr_factor: PositiveFloat = 1.0  # of the scheduled learning rate
    weight_decay: NonNegativeFloat | None = None  # None: that of the optimizer


class OptimizerConfig(Section):
    # adam, adamw, sgd, adadelta, rmsprop, muon (with AdamW for all but the matrices of hidden layers), timm:NAME, or a
    # class of torch.optim or your own as package.module:Class.
    name: Annotated[str, AfterValidator(_optimizer_or_own)] = "adam"
    lr: PositiveFloat = 1e-3  # peak learning rate, before lr_scaling
    # From betas to centered: keyword arguments of the torch.optim class (see OPTIMIZERS); None keeps its default.
    betas: tuple[Fraction, Fraction] | None = None
    momentum: NonNegativeFloat | None = None
    dampening: float | None = None
    nesterov: bool | None = None
    weight_decay: NonNegativeFloat | None = None
    eps: PositiveFloat | None = None
    amsgrad: bool | None = None
    alpha: Fraction | None = None
    rho: Fraction | None = None
    centered: bool | None = None
    # Keyword arguments of torch.optim.Muon, of timm's optimizer or of your class: optimizer.args.KEY=VALUE.
    args: Options = {}
    # Parameters with their own lr or weight decay: [{match: head, lr_factor: 10, weight_decay: 0}, ...]. `match` is the
    # name of a parameter or of a module around it, where * stands for any text; the first that matches one takes it.
    groups: list[GroupConfig] = []
    # 1d: no weight decay, in any group, of parameters with fewer than two dimensions, which are biases and norms.
    no_decay: Literal["1d"] | None = None
    # Multiply lr by this once for each layer between a parameter and the last layer. A layer is a child of the net, or
    # one of the modules in its nn.Sequential and nn.ModuleList; a norm belongs to the layer before it.
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    # Multiply lr by r = global_batch_size / lr_base_batch_size (linear) or by the square root of r (sqrt).
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    lr_base_batch_size: PositiveInt | None = None  # the global batch size for which lr was chosen

    @model_validator(mode="after")
    def _fits(self) -> OptimizerConfig:
        own = OPTIMIZERS.get(self.name, frozenset({"weight_decay"})) | ({"args"} if self.own_step else set())
        unknown = sorted(self._arguments_set() - own) + (["args"] if self.args and not self.own_step else [])
        if unknown:
            hint = f". Did you mean args.{unknown[0]}?" if self.own_step else ""
            raise ValueError(
                f"{self.name} has no {', '.join(unknown)}. Its settings: lr, {', '.join(sorted(own))}{hint}"
            )
        for key in ("lr", "weight_decay"):
            if key in self.args:
                raise ValueError(f"args.{key}={self.args[key]}: set optimizer.{key} instead")
        if (self.lr_scaling == "none") != (self.lr_base_batch_size is None):
            raise ValueError("lr_scaling (linear or sqrt) and lr_base_batch_size go together; set both or neither")
        return self

    @property
    def own_step(self) -> bool:
        """Whether the optimizer takes its own step, which is known in no other form than the eager one."""
        return self.name == "muon" or ":" in self.name

    @property
    def rounds_to_bf16(self) -> bool:
        """Whether its steps are rounded to bf16, which amplifies the rounding that differs with the division."""
        return "muon" in self.name.lower()

    def _arguments_set(self) -> set[str]:
        return {key for key in set().union(*OPTIMIZERS.values()) if getattr(self, key) is not None}

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that were set, without lr."""
        return {key: getattr(self, key) for key in sorted(self._arguments_set())}

    def scaled_lr(self, global_batch_size: int) -> float:
        """The learning rate after the scaling rule (linear: Goyal et al., arXiv 1706.02677)."""
        ratio = global_batch_size / (self.lr_base_batch_size or global_batch_size)
        factors: dict[str, float] = {"none": 1.0, "linear": ratio, "sqrt": ratio**0.5}
        return self.lr * factors[self.lr_scaling]
