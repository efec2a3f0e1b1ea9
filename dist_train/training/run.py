"""One attempt of a run: find its directory, build the components, restore, train, and report the result."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from uuid import uuid4

from dist_train.checkpoints.manifest import run_id_from_checkpoints
from dist_train.config.loading import to_yaml
from dist_train.config.schema import Config
from dist_train.data.fingerprint import differences
from dist_train.data.sets.image_set import num_examples
from dist_train.data.splits import Splits, load_splits
from dist_train.distributed import watchdog
from dist_train.distributed.job_scheduler import JobScheduler
from dist_train.distributed.process_info import detect_process
from dist_train.distributed.signals import StopRequest
from dist_train.distributed.stdio import redirect_output
from dist_train.distributed.world import SHARED_MEMORY, World
from dist_train.errors import DataError
from dist_train.models.registry import check_model_exists
from dist_train.runs.attempt import begin_attempt
from dist_train.runs.directory import RunDir
from dist_train.runs.progress import log_to_file, log_to_screen
from dist_train.runs.records import State
from dist_train.runs.start_options import StartOptions, check_start, find_run_dir
from dist_train.training.build import build_trainer
from dist_train.training.extension import check_extension
from dist_train.training.failures import FailureHandler
from dist_train.training.provenance import changed_data, describe_start
from dist_train.training.start_report import report_results

_log = logging.getLogger(__name__)


def run_training(
    config: Config, start: StartOptions, request: StopRequest, started: float, scheduler: JobScheduler
) -> State:
    """Train until the end or an agreed stop. `started`: time.perf_counter() at the start of the process.

    Collective: every rank calls this with the same arguments.
    """
    process = detect_process(os.environ)
    failure_handler = FailureHandler(process, config, start)
    log_to_screen(process.rank, start.verbosity)
    with failure_handler:
        # Before the ranks join: a rank that waits for a lock or a download must not block others in a collective.
        check_model_exists(config.model)
        splits = load_splits(config.data, config.seed, process.local_world_size)
        watchdog.arm(config.setup_timeout_s)
        world = World.join(config, find_run_dir(config, start).precision)
        run_dir = RunDir(Path(world.on_rank_zero(lambda: str(find_run_dir(config, start, claim=True).path))))
        attempt = world.on_rank_zero(lambda: _open(run_dir, config, splits, start, started))
        if attempt is None:
            if world.is_rank_zero:
                print(f"{run_dir.path} is finished already: nothing to do.")
            world.leave()
            return "FINISHED"
        run_dir.status.attempt = attempt
        failure_handler.run_dir = run_dir
        world.check_shared(run_dir.path)
        world.check_same("config", to_yaml(config))
        _check_same_data(world, splits)
        log_to_file(run_dir, world.rank)
        if not world.is_rank_zero:  # with a hundred nodes, only rank zero prints
            failure_handler.errors = redirect_output(run_dir.rank_log(world.rank))
        world = _same_exchange(_same_threads(world, run_dir), run_dir, config)
        _record_start(world, run_dir, start)
        _log.debug("rank %d of %d, %s, %d threads", world.rank, world.size, world.device, world.num_threads)
        with build_trainer(config, world, run_dir, splits, start, request, started, scheduler) as trainer:
            # The set-up is over: compiling may take long, a step must not.
            world.set_timeout(config.stall_timeout_s)
            watchdog.arm(config.stall_timeout_s)
            failure_handler.in_setup = False
            state = trainer.train()
    if world.is_rank_zero:
        run_dir.unlock()
        if state == "FINISHED":
            report_results(run_dir)
    world.leave()
    return state


def _open(run_dir: RunDir, config: Config, splits: Splits, start: StartOptions, started: float) -> int | None:
    """Begin an attempt and return its number, None if the run is finished. Rank zero only."""
    if check_start(run_dir, config, start):
        return None
    changes = changed_data(run_dir.read_provenance(), splits.fingerprints) if run_dir.holds_checkpoints else []
    if changes:
        raise DataError(
            f"{run_dir.path} was trained on different data:\n" + "\n".join(f"  {change}" for change in changes) + "\n"
            "Give the new run another name with --run-name, or restore the data."
        )
    if start.extend:
        check_extension(run_dir, config, num_examples(splits.train) // config.global_batch_size)
    run_dir.lock()
    if check_start(run_dir, config, start, create=False):  # another start may have finished it in between
        run_dir.unlock()
        return None
    # Without an id in its files, a run keeps that of its checkpoints: with another they would not count as its own.
    wandb_id = run_id_from_checkpoints(run_dir) or uuid4().hex[:8]
    begin_attempt(run_dir, config, wandb_id=wandb_id, started=started, asked_at=start.asked_at, extend=start.extend)
    return run_dir.status.attempt


def _check_same_data(world: World, splits: Splits) -> None:
    """Check that all ranks hold the same examples: an index must mean the same example on each rank.

    Collective: every rank must call this.

    Raises:
        DataError: on every rank, naming the first that differs from rank zero.
    """
    theirs = world.from_rank_zero(splits.fingerprints)
    said = [
        f"The {split} set of rank {world.rank} on {socket.gethostname()} has {here}; that of rank 0 has {there}. "
        f"Every rank must build the same set: from the same files, with random draws under a fixed seed."
        for split, here, there in differences(splits.fingerprints, theirs)
    ]
    if problem := world.first_problem("".join(said[:1])):
        raise DataError(problem)


def _record_start(world: World, run_dir: RunDir, start: StartOptions) -> None:
    """Record how the run was started before the set-up, which may be killed, so that it can be started like that again.

    Collective: every rank must call this.
    """
    description = describe_start(world, world.hosts(), start.init_from_text)
    world.on_rank_zero(lambda: None if run_dir.holds_checkpoints else run_dir.write_provenance(description))


def _same_exchange(world: World, run_dir: RunDir, config: Config) -> World:
    """Return `world` with the exchange of gradients that the run began with; a new run shares memory where it can.

    Collective: every rank must call this.
    """
    before = world.from_rank_zero(run_dir.read_provenance() if run_dir.holds_checkpoints else {})
    if before.get("world_size") == world.size and before.get("exchange", "gloo") != SHARED_MEMORY:
        return world
    return world.with_shared_memory(config.setup_timeout_s)


def _same_threads(world: World, run_dir: RunDir) -> World:
    """Return `world` with the number of threads that the run began with."""
    before = run_dir.read_provenance()
    threads = before.get("num_threads")
    if threads and before.get("world_size") == world.size and threads != world.num_threads:
        _log.info("threads per process: %d, as at the start of the run (not %d)", threads, world.num_threads)
        return world.with_threads(threads)
    return world
