"""The processes of a run: how they divide the work, and how they stay together.

Which image belongs to which process follows from its number alone, and so does its prompt: only
rewards are exchanged, and every process compares all of them. If one process meets an error, a
signal or a request, all meet it at the same place (`in_agreement`, `decide`), so that none waits
for another that has ended.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import Tensor
from torch import distributed as dist

from ...remedies import command
from ..errors import RunError, Stopped, UserError

Result = TypeVar("Result")

PATIENCE = timedelta(days=7)
"""How long one process waits for another that is alive: a reward may take hours.

A process that has ended is noticed at once, by its connection or by what started it.
"""
BUCKET = 1 << 24
"""Elements of gradients that are exchanged at once."""


class LostContact(RunError):
    """Another process of the run ended without a message."""


def accelerator_of(cpu: bool, precision: str) -> Accelerator:
    """This process's device and its connection to the others.

    `precision` is "no", "bf16" or "fp16", of autocast.
    """
    waiting = InitProcessGroupKwargs(timeout=PATIENCE)
    return Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[waiting])


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of a run, as one of them sees them; alone, everything here does nothing.

    Attributes:
        shards: whether several processes split the network's weights.
    """

    accelerator: Accelerator
    shards: bool = False

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are split over the processes, so that each pass needs all of them."""
        return self.shards and self.count > 1

    @property
    def count(self) -> int:
        return self.accelerator.num_processes

    @property
    def rank(self) -> int:
        """This process's number, counted from 0."""
        return self.accelerator.process_index

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    # --- work ------------------------------------------------------------------------------------

    def share(self, order: Sequence[int], rank: int | None = None, tree: int = 1) -> list[int]:
        """The images of a process, sorted: dealt out like cards.

        Any consecutive ones, such as an update's, are divided evenly too.

        >>> from types import SimpleNamespace as Fake
        >>> Processes(Fake(num_processes=2, process_index=0)).share([3, 0, 4, 1, 2])
        [2, 3, 4]

        Args:
            order: all images, in the order in which they are trained.
            rank: of the process; this one's if None.
            tree: so many images after each other stay together.
        """
        first = (self.rank if rank is None else rank) * tree
        trees = range(first, len(order), self.count * tree)
        return sorted(image for start in trees for image in order[start : start + tree])

    def pad(self, mine: Sequence[int], total: int, tree: int = 1) -> list[int]:
        """Pad a share to the longest one's length, for processes that must work in step.

        Padding repeats a tree, whose second copy is not used.
        """
        missing = self._most(total, tree) - len(mine)
        last = list(mine[-tree:]) or list(range(tree))
        return [*mine, *last * (missing // tree)]

    def _most(self, total: int, tree: int) -> int:
        """The images of the longest share."""
        return -(-total // (self.count * tree)) * tree

    def gather(self, rows: Tensor, order: Sequence[int], tree: int = 1) -> Tensor:
        """Collect the rows of all images on the CPU, from every process's own rows.

        Args:
            rows: (its images, ...), in the order of `share`.
            order: as given to `share`, and so is `tree`.
        """
        if self.count == 1:
            return rows.cpu()
        most = self._most(len(order), tree)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        with in_contact():
            collected: Any = self.accelerator.gather(padded.to(self.accelerator.device))
        every = collected.cpu().reshape(self.count, most, *rows.shape[1:])
        everything = every.new_zeros(len(order), *rows.shape[1:])
        for rank, part in enumerate(every):
            images = self.share(order, rank, tree)
            everything[images] = part[: len(images)]
        return everything

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype by their sums over all processes."""
        if self.count == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            with in_contact():
                dist.all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def largest(self, value: float) -> float:
        """The largest of the processes' values."""
        if self.count == 1:
            return value
        sent = torch.tensor([value], dtype=torch.float32, device=self.accelerator.device)
        with in_contact():
            collected: Any = self.accelerator.gather(sent)
        return collected.max().item()

    # --- staying together ------------------------------------------------------------------------

    @contextmanager
    def in_agreement(self, in_step: bool = False) -> Iterator[None]:
        """Let each process work by itself within it; an error of one is then an error of all.

        The others then raise `Stopped` or `RunError`, or `LostContact` if one is gone. It may be
        nested; apart from that, and unless `in_step`, the work must not need another process.

        Args:
            in_step: the work itself needs all processes. A process that fails is not waited for,
                and
                ends; errors that it raises on purpose, all raise at the same place.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        alone = self.count == 1 or isinstance(error, LostContact) or is_common(error)
        if alone or (in_step and not isinstance(error, UserError | None)):
            if error is not None:
                raise error
            return
        self._settle(error)

    def passes(self) -> AbstractContextManager[None]:
        """The context of work with the network, as `in_agreement`."""
        return self.in_agreement(in_step=self.is_sharded)

    def decide(self, work: Callable[[], Result]) -> Result:
        """Do something in every process; the first one's (small) result counts for all.

        An error of one is an error of all.
        """
        with self.in_agreement():
            result = work()
        if self.count > 1:
            with in_contact():
                result = broadcast_object_list([result])[0]
        return result

    def _settle(self, error: Exception | None) -> None:
        """Exchange errors; all raise the same one, or none."""
        device = self.accelerator.device
        failed = torch.tensor([int(error is not None)], device=device)
        with in_contact():
            dist.all_reduce(failed)
            if failed.item() == 0:
                return
            words = gather_object([None if error is None else (_kind(error), _words(error))])
        faults = [(said[0], rank, said[1]) for rank, said in enumerate(words) if said is not None]
        kind, rank, text = min(faults)  # what failed goes before what was asked to stop
        shown = f"in process {rank}: {text}" if rank and kind != "stopped" else text
        common = Stopped(shown) if kind == "stopped" else RunError(shown)
        if rank == self.rank and rank == 0 and error is not None:
            common = error
        elif rank == self.rank and not isinstance(error, UserError):
            traceback.print_exception(error, file=sys.stderr)
        common.add_note(TOGETHER)
        raise common from error


def _kind(error: Exception) -> str:
    return "stopped" if isinstance(error, Stopped) else "failed"


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors in their order, up to `BUCKET` elements each."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


# --- how a process leaves ------------------------------------------------------------------------


TOGETHER = "every process of the run ends with this"
"""A note on an error that all processes have."""


def is_common(error: BaseException | None) -> bool:
    """Whether every process has this error."""
    return TOGETHER in getattr(error, "__notes__", ())


@contextmanager
def in_contact() -> Iterator[None]:
    """Report a connection that breaks within it in plain words.

    Raises:
        LostContact: if a process has ended.
        RuntimeError: unchanged, if it has another cause.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, UserError) or not is_broken_connection(error):
            raise error
        raise LostContact(
            "another process of the run has ended (what it had to say is above); the last "
            f"checkpoint is good: go on with {command('resume', 'RUN')}"
        ) from error


def is_broken_connection(error: BaseException) -> bool:
    """Whether an error comes from the connection to another process."""
    if isinstance(error, dist.DistError):
        return True
    return any(sign in str(error) for sign in ("gloo", "by peer", "NCCL"))


def leave(error: Exception | None) -> None:
    """Wait for the first process, which may have something to report, before this one ends.

    Whatever started the processes ends all of them as soon as one of them has failed.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if error is None or is_common(error):
        with suppress(RuntimeError):
            dist.all_reduce(torch.zeros(1, device=PartialState().device))
            dist.destroy_process_group()
