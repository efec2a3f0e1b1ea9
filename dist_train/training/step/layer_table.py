"""The table of a net's layers, as one forward pass shows them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parameter import is_lazy


@dataclass
class Layer:
    name: str  # path in the net, "" for the net itself
    type: str
    output: str  # shape without the batch, "" if it is no tensor or the layer was not called
    parameters: int  # of the layer itself, without those inside it


@contextmanager
def record_layers(net: nn.Module) -> Iterator[list[Layer]]:
    """Yield a list that, after a forward pass inside, holds the layers in the order of their first call.

    Layers that were not called follow; containers without parameters of their own are left out.
    """
    modules = dict(net.named_modules())  # before the pass, which may replace some
    names = {id(module): name for name, module in modules.items()}
    outputs: dict[str, Any] = {}

    def note_output(module: nn.Module, _inputs: Any, output: Any) -> None:
        if id(module) in names:
            outputs.setdefault(names[id(module)], output.shape[1:] if isinstance(output, Tensor) else None)

    table: list[Layer] = []
    handle = register_module_forward_hook(note_output)
    try:
        yield table
    finally:
        handle.remove()
    for name in (*outputs, *(each for each in modules if each not in outputs)):
        module = modules[name]
        parameters = sum(each.numel() for each in module.parameters(recurse=False) if not is_lazy(each))
        if parameters or not any(module.children()):
            shape = outputs.get(name)
            table.append(Layer(name, type(module).__name__, " x ".join(map(str, shape or ())), parameters))
