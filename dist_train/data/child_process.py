"""A short-lived child process that inspects a user's data set."""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from dist_train.distributed.process_end import end_process
from dist_train.errors import DistTrainError, UserCodeError

T = TypeVar("T")


def run_in_child(function: Callable[..., T], *args: Any) -> T:
    """Return the (small, picklable) result of `function(*args)` without side effects in this process.

    The child starts as a DataLoader's workers do: by fork, where that is the default. What a set opens at its first
    use is opened in the child, and later in each worker, but never in the parent, whose handle all workers would share.

    Raises:
        DistTrainError: raised by the function, or because the child ended without a result.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.Process(target=_run_and_send, args=(sender, function, args), daemon=True)
    child.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        child.join()
        raise UserCodeError(
            f"The process that inspects the first examples ended with exit code {child.exitcode}. "
            f"Set data.num_workers=0 to inspect them in the main process."
        ) from None
    child.join()
    if isinstance(result, DistTrainError):
        raise result
    return result  # type: ignore[no-any-return]


def _run_and_send(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # as in a worker: more would wait for threads that do not exist after a fork
    code = 1
    try:
        try:
            result = function(*args)
        except DistTrainError as error:
            result = error
        sender.send(result)
        code = 0
    except BaseException:  # not from user code: that arrives as a DistTrainError
        traceback.print_exc()
    finally:
        end_process(code)  # even if the set has started threads


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
