"""The graph of a net for TensorBoard."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_train.distributed.peer_failures import first_line

_log = logging.getLogger(__name__)


def write_graph(folder: Path, make_net: Callable[[], nn.Module], inputs: Any) -> None:
    """Trace a net of its own with `inputs`, both on the CPU, into the event files of `folder`.

    Not the net that trains, which tracing would change. One that cannot be made or traced has no graph: a warning says
    so.
    """
    from torch.utils.tensorboard import SummaryWriter

    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's, about what it cannot see
            with SummaryWriter(str(folder)) as writer:
                # In a tuple: the arguments of forward. Not strict: the net may return a dict.
                writer.add_graph(make_net().eval(), (inputs,), use_strict_trace=False)
    except Exception as error:  # anything that torch or the user's net raises
        _log.warning("no graph for TensorBoard: %s", first_line(error))
