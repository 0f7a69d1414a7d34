"""`pcpo`, which also writes down what it sampled and how it holds its weights: OUT WORDS...

Started by torchrun it is one of several processes. FAULT, as "nan 1", makes one of them fail.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from comfyui_pcpo.pcpo.rewards import Scores
from comfyui_pcpo.trainers.cli import command as cli
from comfyui_pcpo.trainers.distributed import sharding
from comfyui_pcpo.trainers.run import iteration, loop, two_pass
from comfyui_pcpo.trainers.run.optimizer_step import Learnt
from comfyui_pcpo.trainers.run.policy import Policy
from comfyui_pcpo.trainers.run.rewards import Judges
from comfyui_pcpo.trainers.run.setup import Setup
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

FAULT = os.environ.get("FAULT", "").split()  # what happens, and in which process


@contextlib.contextmanager
def recorded(out: Path) -> Iterator[None]:
    """Within it each iteration's images and rewards, of all processes, are written to a folder."""
    score, line, prepare, seen = Judges.score, iteration._line, loop.prepare, []
    call, iterate, running = Policy.__call__, loop.one_iteration, []

    def iterating(setup: Setup, *rest) -> dict[str, object]:
        running.append(setup)
        try:
            return iterate(setup, *rest)
        finally:
            running.clear()

    def scoring(judges: Judges, images: torch.Tensor, prompts: list[str], *asked) -> torch.Tensor:
        if not running:  # the held-out comparison
            return score(judges, images, prompts)
        number, setup = len(seen), running[0]
        order = two_pass.order_of(setup, number, setup.config.images)
        seen.append(setup.processes.gathered(images, order))
        if number == 1 and ["nan", str(setup.processes.rank)] == FAULT:
            nothing = Scores(torch.full((len(images),), float("nan")), ({},), (None,))
            with patch.object(type(judges.rewards[0]), "score", lambda *_: nothing):
                return score(judges, images, prompts)
        fault(setup.processes.rank, number)
        return score(judges, images, prompts)

    def lining(setup: Setup, number: int, learnt: Learnt, *rest):
        if int(os.environ.get("RANK", "0")) == 0:
            found = {"images": seen[-1], "rewards": learnt.rewards.contiguous()}
            save_file(found, out / f"{number}.safetensors")
        return line(setup, number, learnt, *rest)

    def preparing(*words) -> Setup:
        setup = prepare(*words)
        facts = {
            "split": [is_split(parameter) for parameter in setup.parameters],
            "averages": [is_split(a) for a in setup.averaged.weights] if setup.averaged else [],
            "bytes": sum(sharding.local(parameter).nbytes for parameter in setup.parameters),
        }
        rank = setup.processes.rank
        (out / f"facts{rank}.json").write_text(json.dumps(facts))
        return setup

    def passing(policy: Policy, *words) -> torch.Tensor:
        if len(seen) == 1 and ["pass", os.environ.get("RANK")] == FAULT:
            raise MemoryError("the network does not fit")
        return call(policy, *words)

    out.mkdir(parents=True, exist_ok=True)
    with (
        patch.object(Policy, "__call__", passing),
        patch.object(Judges, "score", scoring),
        patch.object(loop, "one_iteration", iterating),
        patch.object(iteration, "_line", lining),
        patch.object(loop, "prepare", preparing),
    ):
        yield


def is_split(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, DTensor) and tensor.placements[0].is_shard()


def fault(rank: int, number: int) -> None:
    # in the second iteration, as FAULT says
    if number != 1 or FAULT[1:] != [str(rank)]:
        return
    if FAULT[0] == "bug":
        raise KeyError("weights")
    if FAULT[0] == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    with recorded(Path(sys.argv[1])):
        sys.exit(cli.main(sys.argv[2:]))
