"""The trained weights of a run, and what moves them: AdamW over the gradients of all processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ....pcpo.finite import all_finite
from ....pcpo.per_sample import SampleGradients
from ...config.sections import OptimizerConfig
from ...config.train_config import TrainConfig
from ...distributed.processes import Processes
from ...distributed.sharding import full_tensor, local, swap_values
from ...finite import Diverged
from ...job.files import finite
from ..method import averaging_decay, learning_rate
from ..phases import phase

SUMS = 8 + 22  # numbers that a micro-batch reports, as `Objective.loss` describes them
NAMES = ("loss", "log_ratio", "log_ratio_squared", "clip_fraction", "outside_fraction", "kl")
WORDS = {"grad_norm": "the norm of the gradient", "log_ratio": "log rho", "loss": "the loss"}
"""Names of an update's means in an error."""
PREFIX = "optimizer."


@dataclass(slots=True)
class Averages:
    """Exponential moving averages (EMA) of the trained parameters.

    Before the first averaging they are the untrained weights, a LoRA that does nothing; until then
    the trained weights are exported as they are.

    Attributes:
        count: how often they were averaged.
    """

    weights: list[Tensor]
    count: int = 0

    def add(self, parameters: Sequence[Tensor], decay: float) -> None:
        """Average once more; `decay` is the share of the old averages that stays."""
        now = [local(parameter) for parameter in parameters]
        torch._foreach_lerp_([local(mean) for mean in self.weights], now, 1 - decay)
        self.count += 1


@dataclass(frozen=True, slots=True)
class Learner:
    """What an update works with.

    Attributes:
        averaged: their averages, or None.
        per_sample: keeps the images' gradients apart, if updates are made in one pass.
    """

    config: TrainConfig
    processes: Processes
    selection: Any
    parameters: list[nn.Parameter]
    optimizer: Any
    averaged: Averages | None
    per_sample: SampleGradients | None

    def with_exported(self) -> AbstractContextManager[object]:
        """Give the network the exported weights within it: averages, if there are any."""
        if self.averaged is None or self.averaged.count == 0:
            return nullcontext()
        return swap_values(self.parameters, self.averaged.weights)

    @phase("optimizer")
    def step(self, done: int, sums: Tensor) -> dict[str, Any]:
        """One optimizer step on the gradients of all processes, unless training has diverged.

        Args:
            sums: this process's, as `Objective.loss` describes them.

        Returns:
            The means of the update, with the gradient's norm before clipping; that is None if
            float16's scaled gradients overflow, and the step is skipped.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optimizer, done)
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if not self.processes.is_sharded:  # else they were summed on their way
            self.processes.add_up([p.grad for p in self.parameters if p.grad is not None])
        limit = self.config.optimizer.max_grad_norm
        norm: Any = self.processes.accelerator.clip_grad_norm_(self.parameters, limit)
        means = summarise(self.sum_over_processes(sums)) | {"grad_norm": float(full_tensor(norm))}
        with self.processes.in_agreement():
            self._check_means(done, means)
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = averaging_decay(self.config.trainable, done)
        if self.averaged is not None and decay is not None:
            self.averaged.add(self.parameters, decay)
        with self.processes.in_agreement():
            self._check_weights(done)
        return finite(means)

    def sum_over_processes(self, sums: Tensor) -> list[float]:
        """Sums over all processes; the first entry is a maximum."""
        everyone = self.processes.gather(sums[None], range(self.processes.count))
        return [everyone[:, 0].max().item(), *everyone[:, 1:].sum(0).tolist()]

    def _check_means(self, done: int, means: dict[str, Any]) -> None:
        """Refuse a step whose means are not finite, naming the first."""
        scaler = self.processes.accelerator.scaler
        for name, value in means.items():
            if name == "log_ratio_histogram" or isfinite(value):
                continue
            if name == "grad_norm" and scaler is not None and scaler.get_scale() > 1:
                continue  # it leaves the step out, and scales less from now on
            raise _divergence(self.config, done, f"{WORDS.get(name, name)} is {value}")

    def _check_weights(self, done: int) -> None:
        """Refuse weights that are not finite: a finite gradient may still cause them."""
        parts = {
            "weights": self.parameters,
            "averaged weights": self.averaged.weights if self.averaged else (),
            "moments of the optimizer": moments(self.optimizer),
        }
        for name, tensors in parts.items():
            if not all_finite(map(local, tensors)):
                raise _divergence(self.config, done, f"not all {name} are finite after the step")


def _divergence(config: TrainConfig, done: int, what: str) -> Diverged:
    """The error of a run that cannot go on: where, what and the remedy."""
    iteration, update = divmod(done, config.optimizer.updates)
    kept = f"what was saved up to iteration {iteration} is good" if iteration else "nothing is lost"
    return Diverged(
        f"training diverged in iteration {iteration + 1}, update {update + 1} of "
        f"{config.optimizer.updates}: {what}; {kept}; start a new run with a lower optimizer.lr "
        f"({config.optimizer.lr:g})"
    )


# --- AdamW ---------------------------------------------------------------------------------------


def make_optimizer(config: OptimizerConfig, parameters: Sequence[nn.Parameter]) -> Any:
    """AdamW over parameters.

    In 8 bits each block of 256 moments shares a scale; tensors of less than 4096 stay in float32.
    """
    kind: Any = torch.optim.AdamW
    if config.kind == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        kind = AdamW8bit
    return kind(
        parameters,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        eps=config.eps,
    )


def moments_of(optimizer: Any) -> dict[str, Tensor]:
    """An optimizer's state as tensors that share no memory, named "optimizer.INDEX.NAME"."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in _flat(state).items():
            tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(int(value))
            place = local(tensor).data_ptr()
            if place in seen:  # tables of 8-bit numbers are shared
                tensor = tensor.clone()
            seen.add(place)
            tensors[f"{PREFIX}{index}.{name}"] = tensor
    return tensors


def moments(optimizer: Any) -> Iterator[Tensor]:
    """An optimizer's moments, or their scales in 8 bits, without copies."""
    for state in optimizer.state.values():
        for value in _flat(state).values():
            if isinstance(value, Tensor) and value.ndim:  # else the number of steps
                yield value


def _flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the inner table that bitsandbytes keeps its codes in."""
    flat: dict[str, Any] = {}
    for name, value in state.items():
        flat |= value if isinstance(value, Mapping) else {name: value}
    return flat


def load_moments(optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Restore an optimizer, in place, from the tensors of `moments_of`.

    It must be of the same kind over the same parameters.
    """
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith(PREFIX):
            index, kind = name.removeprefix(PREFIX).split(".", 1)
            is_count = tensor.ndim == 0 and not tensor.is_floating_point()
            state.setdefault(int(index), {})[kind] = tensor.item() if is_count else tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


# --- numbers of an update ------------------------------------------------------------------------


def summarise(sums: Sequence[float]) -> dict[str, Any]:
    """Means over the update's pairs, by name, the largest |log rho|, and log rho's histogram.

    The histogram counts, in units of the clip range, values below -5, in each of twenty bins up to
    5, and above.
    """
    largest, count, *totals = sums[:8]
    means: dict[str, Any] = dict(zip(NAMES, (total / count for total in totals), strict=True))
    square = means.pop("log_ratio_squared")
    means["log_ratio_std"] = max(0.0, square - means["log_ratio"] ** 2) ** 0.5
    return {**means, "log_ratio_max": largest, "log_ratio_histogram": [int(n) for n in sums[8:]]}


def sums_on_policy(
    count: Float[Tensor, ""], loss: Float[Tensor, ""], kl: Float[Tensor, ""]
) -> Float[Tensor, " sums"]:
    """The sums of pairs whose log ratio is 0, as `Objective.loss` describes them."""
    zero = torch.zeros_like(count)
    sums = torch.stack([zero, count, loss, zero, zero, zero, zero, kl])
    return torch.cat([sums, histogram(zero[None], count[None])])


def histogram(values: Tensor, counted: Tensor) -> Tensor:
    """The number of values below -5, in each half unit up to 5, and above; never waits."""
    edges = torch.arange(-5, 5.25, 0.5, device=values.device)
    bins = torch.bucketize(values, edges)
    columns = torch.arange(len(edges) + 1, device=values.device)
    return ((bins[:, None] == columns) * counted[:, None]).sum(0)
