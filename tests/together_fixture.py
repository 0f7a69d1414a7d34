"""What `Processes` promises, tried by two processes that torchrun started; prints one line each."""

from __future__ import annotations

import sys

import torch
from comfyui_pcpo.trainers.distributed.processes import Processes, accelerator_of, leave
from comfyui_pcpo.trainers.run.control import RunError, Stopped


def caught(work) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main() -> None:
    processes = Processes(accelerator_of(cpu=True, precision="no"))
    rank, count = processes.rank, processes.count
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0)).tolist()
    mine = processes.share(order)
    rows = torch.tensor([[image, image / 3] for image in mine], dtype=torch.float64)
    everything = processes.gathered(rows, order)
    assert everything[:, 0].tolist() == list(range(7)) and len(mine) in (3, 4)
    assert everything[:, 1].equal(torch.arange(7, dtype=torch.float64) / 3)
    assert len(processes.filled(mine, 7)) == 4
    none = processes.gathered(torch.zeros(1 - rank, 2), [0])  # fewer images than processes
    assert none.shape == (1, 2) and processes.filled(processes.share([0]), 1) == [0]
    tensors = [torch.full((3,), rank + 1.0), torch.full((2, 2), 10.0 * rank)]
    processes.add_up(tensors)
    assert tensors[0].tolist() == [3.0] * 3 and tensors[1].tolist() == [[10.0] * 2] * 2
    assert processes.largest(float(rank)) == count - 1
    assert processes.decided(lambda: f"of {rank}") == "of 0"

    def failing(whose: int, error: Exception) -> str:
        def work() -> None:
            with processes.agreed():
                if rank == whose:
                    raise error

        return caught(work)

    assert failing(9, KeyError()) == "nothing"
    same = [failing(1, RunError("no disk")), failing(0, RunError("no disk"))]
    assert same == ["RunError: in process 1: no disk", "RunError: no disk"], same
    assert failing(1, Stopped("as asked")) == "Stopped: as asked"
    both = caught(lambda: both_fail(processes))
    assert both == "RunError: in process 1: a reward failed", both  # a failure goes first
    bug = failing(1, KeyError("x"))
    assert bug == "RunError: in process 1: KeyError: 'x'", bug
    assert caught(lambda: nested(processes)) == "RunError: in process 1: no model"
    sys.stdout.write(f"process {rank} agrees\n")  # one write, which the other cannot come between
    sys.stdout.flush()
    leave(None)


def nested(processes: Processes) -> None:
    # one has failed before the other is where they agree for the first time
    with processes.agreed():
        if processes.rank == 1:
            raise RunError("no model")
        with processes.agreed():
            pass
        raise AssertionError("it went on alone")


def both_fail(processes: Processes) -> None:
    with processes.agreed():
        raise Stopped("as asked") if processes.rank == 0 else RunError("a reward failed")


if __name__ == "__main__":
    main()
