"""Sample a micro-batch with gradients: one pass does this in place of a rollout and its update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...pcpo.per_sample import SampleGradients
from ...pcpo.ratios import KLS, RATIOS, StepBatch
from ...pcpo.rollout import rollout_with_gradient
from ..config.train_config import ConfigError, MethodConfig, TrainConfig
from ..families import Family
from ..lora.adapters import ADAPTER, adapters
from ..memory.trajectory_store import pulled
from .sampler import Request, Sampler


def apart_of(config: TrainConfig, family: Family) -> SampleGradients | None:
    """What one pass keeps each sample's gradients with; None for two passes.

    Its layers are those inside the adapters, down and up of each.

    Raises:
        ConfigError: if an adapter is of a kind whose gradients cannot be kept apart.
    """
    if config.method.update == "two_pass":
        return None
    pairs = [
        (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]) for _, layer in adapters(family.network)
    ]
    try:
        return SampleGradients([part for pair in pairs for part in pair])
    except ValueError as error:
        raise ConfigError(f"method.update 'one_pass': {error}, or use 'two_pass'") from error


@dataclass(frozen=True, slots=True)
class Drawn:
    """The results of a micro-batch.

    Attributes:
        final: latents after the last step.
        clean: clean estimates of the last step.
        gradients: each sample's gradient of the sum of its chosen log ratios, by trained layer.
        kl: sum of the chosen steps' divergences from the reference, if there is one.
    """

    final: Float[Tensor, "b c h w"]
    clean: Float[Tensor, "b c h w"]
    gradients: list[Float[Tensor, "b *w"]]
    kl: Float[Tensor, ""]


@dataclass(frozen=True, slots=True)
class Learner:
    """Samples a micro-batch with gradients.

    Attributes:
        sampler: with the iteration's plan.
        apart: of the trained layers.
        method: its ratio and KL.
        backward: adds a loss's gradients.
    """

    sampler: Sampler
    apart: SampleGradients
    method: MethodConfig
    backward: Callable[..., None]

    def __call__(
        self, batch: list[Request], chosen: Sequence[Sequence[int]], kl_weight: float
    ) -> Drawn:
        """Sample a full micro-batch; nothing here waits for the device.

        Args:
            batch: the images, and padding.
            chosen: for each image, the steps of the plan to train; padding has none.
            kl_weight: of the sum of divergences, whose gradient is added to the weights' own.
        """
        sampler, plan = self.sampler, self.sampler.plan
        given = sampler.given(batch)
        mask = torch.zeros(len(plan), len(batch))
        for row, steps in enumerate(chosen):
            mask[list(steps), row] = 1
        counted = pulled(mask, sampler.device)
        kl = torch.zeros((), device=sampler.device)

        def learn(i: int, prediction: Tensor, step: StepBatch, frozen: Tensor | None) -> None:
            compared = frozen if kl_weight > 0 else None  # a relative policy has one without KL
            log_ratio = RATIOS[self.method.ratio](prediction, step)
            self.backward((log_ratio * counted[i]).sum(), retain_graph=compared is not None)
            if compared is None:
                return
            rows = (column[i].expand(len(batch)) for column in (plan.weight, plan.interval))
            divergence = KLS[self.method.kl](prediction, compared, *rows)
            summed = (divergence * counted[i]).sum()
            kl.add_(summed.detach())
            with self.apart.added():
                self.backward(kl_weight * summed)

        with self.apart.of(len(batch)):
            final, clean = rollout_with_gradient(
                given.denoiser,
                plan,
                given.noise,
                learn,
                mask.any(dim=1).nonzero().flatten().tolist(),
                reference=given.reference,
                storage=sampler.options.get("storage", torch.float32),
            )
            return Drawn(final, clean, self.apart.taken(), kl)
