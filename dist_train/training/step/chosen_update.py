"""The choice of the form of an update: eager, or a faster one that a trial has shown to be equal."""

from __future__ import annotations

import logging
import traceback

from dist_train.config.schema import Config, StepMode, WantedMode
from dist_train.training.step.eager import EagerUpdate
from dist_train.training.step.forward_effects import ForwardEffects
from dist_train.training.step.fused import prepare, unsupported_reason
from dist_train.training.step.mode_selection import Update, modes_to_try, try_update

_log = logging.getLogger(__name__)


def choose_update(
    eager: EagerUpdate, effects: ForwardEffects, config: Config, step: int, wanted: WantedMode, pass_s: float
) -> tuple[StepMode, Update]:
    """Return the eager update, or an equivalent one in the `wanted` mode, or with `auto` in a faster one.

    `pass_s`: the seconds of one forward and backward.

    Collective: every rank must call this.
    """
    if config.optimizer.own_step:
        if wanted != "eager":
            name = config.optimizer.name
            _log.info("step_mode=%s: eager, since optimizer.name=%s takes its own step", wanted, name)
        return "eager", eager
    world, auto = eager.world, wanted == "auto"
    left, pass_s = eager.learning_rate.total_steps - step, world.slowest(pass_s)
    modes = modes_to_try(world.device.type, left, pass_s) if wanted == "auto" else [wanted]
    if not modes:
        _log.info(
            "step_mode=auto: eager, since a trial of another mode would not pay off in the remaining %d steps", left
        )
    for mode in modes:
        if mode == "eager":
            break
        why_not = world.first_problem(unsupported_reason(eager, effects, mode, config))
        found = why_not or _try(eager, step, mode, must_be_faster=auto)
        if not isinstance(found, str):
            return mode, found
        level = logging.INFO if auto else logging.WARNING
        _log.log(level, "step_mode=%s: keeps the eager update: %s", wanted if len(modes) == 1 else mode, found)
    return "eager", eager


def _try(eager: EagerUpdate, step: int, mode: StepMode, must_be_faster: bool) -> Update | str:
    """Try this mode; return its update, or why it is not used, with everything restored.

    Collective: every rank must call this.
    """
    world, optimizer = eager.world, eager.optimizer
    known = set(optimizer.state)
    if any(each.requires_grad and each not in known for each in eager.parameters):
        eager.make_optimizer_state(step)
    action = "capturing" if mode == "graph" else "compiling"
    _log.info("step_mode=%s: %s the update, which may take a minute the first time", mode, action)
    groups = [dict(group) for group in optimizer.param_groups]

    def prepared() -> Update:
        """Prepare the update, or fail on every rank."""
        update, problem = None, ""
        try:
            update = prepare(eager, mode, step)
        except Exception as error:
            if world.size == 1:
                raise
            problem = _in_one_line(error)
        if problem := world.first_problem(problem):
            raise RuntimeError(problem)
        assert update is not None
        return update

    try:
        update, result = try_update(
            eager, eager.perturbed, prepared, eager.state(), step, world.synchronize, world.slowest
        )
        why_not = world.first_problem(result.rejection_reason(must_be_faster))
    except Exception as error:  # a compiler may raise anything for a user's net
        _log.debug("%s", traceback.format_exc())
        why_not = _in_one_line(error)
    if why_not:
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.update(before)
        for parameter in set(optimizer.state) - known:
            del optimizer.state[parameter]
        eager.clear_gradients()
        return why_not
    _log.info("step_mode=%s: %s", mode, result)
    return update


def _in_one_line(error: Exception) -> str:
    return " ".join([f"{type(error).__name__}:", *str(error).split("\n")[:2]])
