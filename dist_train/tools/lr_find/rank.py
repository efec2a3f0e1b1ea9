"""The program of each rank of a range test: train while the learning rate rises, print the curve as JSON."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from dist_train.atomic_files import write_atomically
from dist_train.config.loading import load_config
from dist_train.config.schema import Config
from dist_train.data.splits import load_splits
from dist_train.distributed.launcher_watch import watch_launcher
from dist_train.distributed.process_end import end_process
from dist_train.distributed.process_info import detect_process
from dist_train.distributed.world import World
from dist_train.errors import ConfigError, DistTrainError
from dist_train.tools.lr_find.curve import Curve
from dist_train.tools.lr_find.range_test import CONFIG, ERROR, RangeTest
from dist_train.training.build import build_components, load_on_all
from dist_train.training.step.lr_schedule import LearningRate

_FEWEST = 10  # steps


def run(test: RangeTest, config: Config) -> Curve:
    """Run a test.

    Collective: every rank calls this with the same arguments.

    Raises:
        ConfigError: an epoch has too few steps.
    """
    splits = load_splits(config.data, config.seed, detect_process(os.environ).local_world_size)
    world = World.join(config)
    components = build_components(config, world, splits)
    step, steps = components.step, min(test.steps, components.sampler.steps_per_epoch)
    if steps < _FEWEST:
        raise ConfigError(
            f"An epoch has {steps} steps of global_batch_size={config.global_batch_size}, and the test needs at least "
            f"{_FEWEST}. Lower global_batch_size."
        )
    if config.model.weights is not None:
        load_on_all(step.net, config.model.weights, world)
        step.restart_optimizer()
    ratio = test.low / test.high
    rising = LearningRate(test.high, steps, "rising", function=lambda number, last: ratio ** (1 - number / (last - 1)))
    step.eager.learning_rate = rising
    step.warm_up(0)
    curve = Curve([], [], steps)
    for number in range(steps):
        if number == step.unfreezes_at:
            step.warm_up(number)
        step.take(number)
        totals = step.pop_window()  # of all ranks, so all stop at the same step
        curve = Curve([*curve.rates, rising.at(number)], [*curve.losses, totals["loss"] / totals["seen"]], steps)
        if curve.has_diverged:
            break
    world.leave()
    return curve


def main() -> None:
    watch_launcher(lambda: None)
    test, folder = RangeTest(**json.loads(sys.argv[1])), Path(sys.argv[2])
    sys.path.insert(0, str(Path.cwd()))  # user code is imported from here first
    try:
        curve = run(test, load_config(str(folder / CONFIG)))
    except DistTrainError as error:
        write_atomically(folder / ERROR, str(error), durable=False)
        end_process(error.exit_code)
    if detect_process(os.environ).rank == 0:
        print(json.dumps(asdict(curve)))
    end_process(0)


if __name__ == "__main__":
    main()
