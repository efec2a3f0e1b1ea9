"""A child process that looks at a data set of the user and is thrown away."""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from dist_train.distributed.world import end_process
from dist_train.errors import DistTrainError, UserCodeError

T = TypeVar("T")


def run_in_child(function: Callable[..., T], *args: Any) -> T:
    """What `function(*args)` returns (small, picklable), without a trace in this process.

    The child begins as a DataLoader's workers do: by fork, where that is the way here. So what a set opens at its first
    use is opened in the child, and later in each worker: never in the parent, where all workers would share it.

    Raises:
        DistTrainError: that of the function, or the child ended without an answer.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.Process(target=_answer, args=(sender, function, args), daemon=True)
    child.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        child.join()
        raise UserCodeError(
            f"The process that was to look at the first examples ended with exit code {child.exitcode}. "
            f"data.num_workers=0 looks at them in this one."
        ) from None
    child.join()
    if isinstance(answer, DistTrainError):
        raise answer
    return answer  # type: ignore[no-any-return]


def _answer(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    threading.Thread(target=_not_outlive_the_parent, daemon=True).start()
    torch.set_num_threads(1)  # as in a worker: others would wait for threads that a fork leaves behind
    code = 1
    try:
        try:
            answer = function(*args)
        except DistTrainError as error:
            answer = error
        sender.send(answer)
        code = 0
    except BaseException:  # not of the user's code: that is told by a DistTrainError
        traceback.print_exc()
    finally:
        end_process(code)  # whatever threads the set has started


def _not_outlive_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
