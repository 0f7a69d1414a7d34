"""The training loop, from top to bottom.

In one pass (update/one_pass.py) the four steps have another order: an image's gradients are taken
while it is sampled, and wait for its advantage.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from ..distributed.processes import in_contact
from ..finite import naming_step
from ..job.folder import JobFolder
from ..report.progress import Progress
from ..report.refresh import Reporter
from .checkpoint import Position
from .control import Control
from .endings import Result, recorded_end
from .iteration import Iteration, Results, line_of
from .keeper import Keeper
from .phases import ITERATION, phase
from .rewards import Scoring
from .setup import Setup
from .update.one_pass import one_pass
from .update.two_pass import batches_of, update


def run(
    setup: Setup, folder: JobFolder, progress: Progress, at: Position, server: Path | None = None
) -> Result:
    """Train from a position to the end, and record in the folder how that ends.

    Args:
        folder: of the run, which this process holds.
        at: where to begin.
        server: the folder of ComfyUI's jobs, if ComfyUI started this run.
    """
    control = Control(folder, server, setup.processes.decide)
    reporter = Reporter(folder, setup.config)
    log = progress.log_to(folder.log) if setup.processes.is_first else nullcontext()
    with control.signals(), recorded_end(reporter), log, in_contact():
        keeper = Keeper.of(setup, reporter, progress, at)
        if at.iteration == 0:
            at = replace(at, before=keeper.first.mean)
        return keeper.finish(iterate(setup, keeper, progress, control, at))


def iterate(
    setup: Setup, keeper: Keeper, progress: Progress, control: Control, at: Position
) -> Position:
    """Sample, score, compare, update, until the last iteration or until the guard ends the run.

    `Stopped` if the user or ComfyUI does; what was finished is saved.
    """
    config, processes, sampler = setup.config, setup.processes, setup.sampler
    for number in range(at.iteration, config.run.iterations):
        if at.strikes >= config.guard.patience:
            break
        with keeper.saved_if_stopped(at), phase(ITERATION):
            if control.between(number, config.run.iterations, keeper.pause):
                keeper.show(number)
            keeper.renew_tastes(number)
            plan = setup.plans.at(number).to(processes.device)
            iteration = Iteration.of(number, plan, config, setup.prompts, progress, control)
            if config.method.update == "one_pass":
                results = one_pass(setup, iteration)
            else:
                requests, prompts = iteration.requests, iteration.prompts
                order, tree = iteration.order, iteration.tree
                mine = processes.pad(processes.share(order, tree=tree), len(requests), tree)
                advance = iteration.sampling(len(mine), in_step=processes.is_sharded)
                scoring = Scoring(setup.reward_set, processes, prompts, order, tree)
                with processes.passes(), naming_step(f"iteration {number + 1}"):
                    sample = sampler.under(plan)
                    sampled = sample([requests[i] for i in mine], advance, scoring.see)
                rewards = scoring.rewards()
                advantages = setup.advantages.of_paths(rewards, prompts, plan.branches)
                began = time.monotonic()
                batches = batches_of(iteration, mine, sampled, sampler, advantages)
                means = update(setup.learner, setup.objective, iteration, batches)
                results = Results(rewards, advantages[-1], means, time.monotonic() - began)
        at = keeper.keep(at, line_of(iteration, results, setup.reward_set))
    return at
