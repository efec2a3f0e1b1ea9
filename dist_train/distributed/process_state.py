"""A training inside a process that somebody else owns: a script, a notebook."""

from __future__ import annotations

import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

_SHARED = (PartialState, AcceleratorState, GradientState)  # Accelerate's state, one for the whole process
_LOGGERS = ("dist_train", "py.warnings")


@contextmanager
def preserve_process_state() -> Iterator[None]:
    """Leave what belongs to the process as it was: environment, sys.path, default dtype, TF32, threads, random
    generators, logging, and the state of Accelerate, which is new inside."""
    environment, path = dict(os.environ), list(sys.path)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    python, numpy = random.getstate(), np.random.get_state()
    shared = [dict(state._shared_state) for state in _SHARED]
    loggers = [(each, each.level, each.propagate, each.handlers[:]) for each in map(logging.getLogger, _LOGGERS)]
    show_warning = warnings.showwarning
    for state in _SHARED:
        state._shared_state.clear()
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            yield
    finally:
        for state, before in zip(_SHARED, shared, strict=True):
            state._shared_state.clear()
            state._shared_state.update(before)
        for logger, level, propagate, handlers in loggers:
            for handler in set(logger.handlers) - set(handlers):
                handler.close()
            logger.setLevel(level)
            logger.propagate, logger.handlers = propagate, handlers
        if warnings.showwarning is not show_warning:
            logging.captureWarnings(False)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_default_dtype(dtype)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        torch.set_num_threads(threads)
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environment)
