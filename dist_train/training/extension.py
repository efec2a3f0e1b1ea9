"""Whether a run may be trained for longer: as if it had been started with that length, unless it is told otherwise."""

from __future__ import annotations

from dataclasses import replace

from dist_train.config.loading import load_config
from dist_train.config.schema import Config
from dist_train.errors import ConfigError
from dist_train.runs.directory import RunDir
from dist_train.training.step.lr_schedule import LearningRate


def check_extension(run_dir: RunDir, config: Config, steps_per_epoch: int) -> None:
    """Check that a run with checkpoints may go on with `config`, if that is another one than it has.

    Raises:
        ConfigError: that is not longer; early stopping would end it at once; its learning rate so far would have been
            another one in a run of that length.
        UserCodeError: the user's schedule fails.
    """
    if not run_dir.extension_to(config):
        return
    before, done = load_config(str(run_dir.config)), run_dir.saved_step
    length, asked, name = before.train_for, config.train_for, run_dir.path.name
    learning_rate = LearningRate.of(config, steps_per_epoch)
    if learning_rate.total_steps <= done or learning_rate.total_steps < length.to_steps(steps_per_epoch):
        more = replace(length, value=length.value + asked.value) if length.unit == asked.unit else None
        raise ConfigError(
            f"{name} has trained {done} steps of {length}, and {asked} is not longer. --extend takes the whole length"
            + (f': for {asked} more, --extend="{more}".' if more else f", which is more than {length}.")
        )
    if config.early_stop == before.early_stop and run_dir.read_result().get("early_stopped"):
        raise ConfigError(
            f"early_stop ended {name} at step {done}, and would do so again. Add -o early_stop=null, or a larger "
            f"early_stop.patience."
        )
    former = replace(learning_rate, total_steps=length.to_steps(steps_per_epoch))
    if any(former.at(step) != learning_rate.at(step) for step in range(done)):
        raise ConfigError(
            f"schedule.name={config.schedule.name} depends on the length: with train_for={asked} the {done} steps of "
            f"{name} would have had another learning rate. Choose that of the rest: "
            f'-o "schedule={{name: constant}}" -o optimizer.lr={before.optimizer.lr / 10:g}, for example.'
        )
