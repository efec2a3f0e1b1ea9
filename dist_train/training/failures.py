"""Failure handling: report an error to the other ranks, to the launcher and to later readers."""

from __future__ import annotations

import logging
import sys
import traceback
from contextlib import suppress
from typing import TextIO

from dist_train.checkpoints.resume_hint import is_self_explanatory, resume_hint
from dist_train.config.batch_plan import BatchPlan
from dist_train.config.schema import Config
from dist_train.data.loader import loader_error
from dist_train.distributed import watchdog
from dist_train.distributed.devices import is_device_assert, is_out_of_memory
from dist_train.distributed.peer_failures import first_line, is_peer_failure, is_timeout
from dist_train.distributed.process_end import end_process
from dist_train.distributed.process_info import ProcessInfo
from dist_train.errors import DistTrainError, OutOfMemory, PeerLost, UserCodeError
from dist_train.runs.directory import RunDir
from dist_train.runs.error_report import record_error
from dist_train.runs.start_options import StartOptions, is_not_worth_keeping, remove_if_not_started

_log = logging.getLogger(__name__)


class FailureHandler:
    """Writes an error to error.json (the first of all ranks) and to the rank's log, and sets the state ERROR.

    With several ranks the process exits immediately: the others wait in a collective, and a clean exit would wait
    for them. The directory of a run that did not start is removed, by our launcher if there is one.
    """

    def __init__(self, process: ProcessInfo, config: Config, start: StartOptions) -> None:
        self.process = process
        # None until this start owns one. Our launcher names its own, and prints the error that it finds there.
        self.run_dir = RunDir(start.run_dir) if start.launched and start.run_dir else None
        self.errors: TextIO = sys.stderr  # shared by all ranks
        self.in_setup = True
        self._config = config
        self._start = start
        self._launched = self.run_dir is not None

    def __enter__(self) -> FailureHandler:
        return self

    def __exit__(self, _kind: object, raised: BaseException | None, _trace: object) -> None:
        watchdog.disarm()
        try:
            self._handle(raised)
        finally:
            if raised is not None and self.run_dir is not None:
                self.run_dir.unlock()  # this process may go on, and start the run again

    def _handle(self, raised: BaseException | None) -> None:
        if not isinstance(raised, Exception):
            return
        trace = traceback.format_exc()
        _log.debug("%s", trace)
        error = self._explain(raised)
        code = error.exit_code if isinstance(error, DistTrainError) else 1
        first = True
        if self.run_dir is not None and self.run_dir.status.is_superseded():
            code = 0  # the old srun kills a failed step by number, and a later start now uses that number
        elif self.run_dir is not None and self.run_dir.status.read().get("state") == "FINISHED":
            first = False  # a rank was lost during the exit, after the run was complete
        elif self.run_dir is not None:
            first = record_error(self.run_dir.error, error, self.process.rank, code, trace)
            doomed = self.in_setup and is_not_worth_keeping(self.run_dir, self._start)
            if self.in_setup and not self.run_dir.path.exists():
                first = False  # the rank that was has removed it
            elif self.process.rank == 0 and self.run_dir.status.attempt and not doomed:
                with suppress(DistTrainError, OSError):
                    self.run_dir.status.update(state="ERROR")
            if first and not self._launched and not is_self_explanatory(type(error).__name__):
                single_node = self.process.world_size == self.process.local_world_size
                if hint := resume_hint(self.run_dir, self.process.world_size if single_node else None):
                    error.add_note(hint)
        if first and self.process.world_size > 1:
            message = str(error) if isinstance(error, DistTrainError) else trace
            text = "\n".join([message, *getattr(error, "__notes__", [])])
            # A disk that rejects error.json also rejects the launcher's log.
            unrecorded = self._launched and self.run_dir is not None and not self.run_dir.error.exists()
            print(f"error [rank {self.process.rank}]: {text}", file=sys.stdout if unrecorded else self.errors)
        if first and self.in_setup and self.run_dir is not None:
            remove_if_not_started(self.run_dir, self._start)
        if self.process.world_size > 1:
            end_process(code)
        if error is not raised:
            raise error from raised

    def _explain(self, error: Exception) -> Exception:
        """Return a clearer error if the cause is known, otherwise the error itself."""
        if is_out_of_memory(error):
            return self._out_of_memory(error)
        if is_peer_failure(error):
            if is_timeout(error):
                name = "setup_timeout_s" if self.in_setup else "stall_timeout_s"
                limit = f"{name}={getattr(self._config, name):g}"
                return PeerLost(f"Another rank did not answer within {limit}: it hangs or is much slower.")
            return PeerLost("Another rank is gone and left no error: it was probably killed, or its node failed.")
        if is_device_assert(error):
            return UserCodeError(
                "A kernel found an index out of range: usually a label outside the net's classes, or a token outside "
                "an embedding. Run again with device=cpu, which names the example."
            )
        return loader_error(error) or error

    def _out_of_memory(self, error: Exception) -> OutOfMemory:
        config, size = self._config, self.process.world_size
        if config.per_device_batch_size == "auto":
            return OutOfMemory(f"Out of memory with per_device_batch_size=auto. Set a number.\n{first_line(error)}")
        plan = BatchPlan.of(config, size)
        smaller = plan.with_smaller_forwards()
        if smaller is None:
            fix = f"A forward pass already has only one example: use a smaller net, or more than {size} processes."
        else:
            fix = (
                f"per_device_batch_size={smaller.per_device_batch_size} needs less memory for the same global batch: "
                f"{smaller.per_device_batch_size} x {smaller.grad_accum_steps} micro-steps x {size} processes."
            )
        return OutOfMemory(
            f"Out of memory with per_device_batch_size={plan.per_device_batch_size} ({plan.per_device_batch_size} x "
            f"{plan.grad_accum_steps} x {size} = {plan.global_batch_size}). {fix}\n{first_line(error)}"
        )
