"""A stopwatch of nested phases: seconds, calls, arithmetic and memory of each.

A phase's seconds are its own: those of a phase inside it are not counted twice. On a GPU it
synchronises where a phase begins and ends, so the watch is for measuring and never for training.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

PROC = Path("/proc/self")


@dataclass(slots=True)
class Phase:
    """The total costs of a phase.

    Attributes:
        seconds: of its own, without the phases inside it.
        calls: how often it was entered.
        rows: latents that were passed through the network in it.
        flop: operations; a multiplication with its addition is two.
        peak: bytes held at its worst moment, in all; 0 if unknown.
    """

    seconds: float = 0.0
    calls: float = 0.0
    rows: float = 0.0
    flop: float = 0.0
    peak: int = 0


@dataclass(slots=True)
class Watch:
    """Measures phases.

    Attributes:
        clock: seconds, from any start.
        costs: operations of a call that were counted once, by its key.
    """

    device: torch.device
    clock: Callable[[], float]
    phases: dict[str, Phase] = field(default_factory=dict)
    costs: dict[Any, float] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)
    _since: float = 0.0
    _is_shut: bool = False

    @contextmanager
    def phase(self, name: str, *, is_whole: bool = False) -> Iterator[Phase]:
        """Measure a phase.

        Args:
            is_whole: count the phases inside it as parts of it.

        Yields:
            Its costs so far, to add rows and operations to.
        """
        if self._is_shut:
            yield Phase()
            return
        self._charge_phase()
        self._open.append(name)
        self._is_shut = is_whole
        phase = self.phases.setdefault(name, Phase())
        phase.calls += 1
        try:
            yield phase
        finally:
            self._is_shut = False
            self._charge_phase()
            self._open.pop()

    def inside(self, name: str) -> bool:
        """Whether a phase is open."""
        return name in self._open

    def count_once(self, key: Any, call: Callable[[], Any]) -> tuple[Any, float]:
        """Call a function, and count its arithmetic unless its key was counted before.

        Compiled code runs uncompiled while it is counted: inside a dispatch mode torch would give
        up compiling it.

        Args:
            key: equal for calls of equal cost.

        Returns:
            Its result, and its operations.
        """
        if key in self.costs:
            return call(), self.costs[key]
        with torch.compiler.set_stance("force_eager"), Operations() as operations:
            out = call()
        self.costs[key] = operations.flop
        return out, operations.flop

    def take(self) -> dict[str, Phase]:
        """The measurements since the last call, which then begin anew."""
        self._charge_phase()
        phases, self.phases = self.phases, {}
        return phases

    def _charge_phase(self) -> None:
        """Assign the time that has passed to the innermost phase, and begin anew."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = self.clock()
        if self._open:
            phase = self.phases.setdefault(self._open[-1], Phase())
            phase.seconds += now - self._since
            phase.peak = max(phase.peak, peak_of(self.device))
        forget_peak(self.device)
        self._since = self.clock()


class Operations(TorchDispatchMode):
    """Counts the arithmetic within it, including that of a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if (count := flop_registry.get(packet)) is not None:
            self.flop += count(*args, **kwargs, out_val=out)
        elif (per_pair := _ON_CPU.get(packet)) is not None:
            first = 1 if "backward" in str(packet) else 0  # after the gradient of the output
            self.flop += per_pair * _pairs(*args[first : first + 2])
        return out


_ON_CPU: dict[Any, float] = {  # which torch's own table lacks: products of two, and of five
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: 4.0,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: 10.0,
}


def _pairs(query: Tensor, key: Tensor) -> float:
    """Numbers of all queries times the number of keys."""
    return float(query.numel()) * key.shape[-2]


def peak_of(device: torch.device) -> int:
    """Bytes held at the worst moment since `forget_peak`; 0 if the system does not say.

    On a GPU these are the tensors', on a CPU the process's.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        return 0
    status = (PROC / "status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def forget_peak(device: torch.device) -> None:
    """Restart the measurement of `peak_of`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        (PROC / "clear_refs").write_text("5")


def product_rate(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Operations per second of a large matrix product, the best of several.

    `clock` gives seconds, from any start.
    """
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    watch, best = Watch(device, clock), float("inf")
    for _ in range(6):
        with watch.phase("product"):
            torch.mm(a, b)
        best = min(best, watch.take()["product"].seconds)
    return 2 * side**3 / best
