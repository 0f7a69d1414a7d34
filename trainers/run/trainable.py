"""The trained part of a network, and its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from torch import nn

from ...pcpo.per_sample import SampleGradients
from ..config.train_config import ConfigError, TrainConfig
from ..distributed.sharding import swap_values
from ..families import Family
from ..lora import adapters
from ..lora.adapters import ADAPTER
from .phases import REFERENCE, phase


def check_targets(config: TrainConfig, family: Family) -> None:
    """Refuse adapters of layers that the network does not have, naming those to choose from.

    The network may be on torch's "meta" device.
    """
    if config.trainable.kind == "full":
        return
    try:
        adapters.check_targets(family.network, _targets(config, family))
    except ValueError as error:
        raise ConfigError(f"trainable.targets: {error}") from error


def make_trainable(
    config: TrainConfig, family: Family
) -> tuple[list[nn.Parameter], tuple[str, ...]]:
    """Put adapters on the network, or unfreeze all of it.

    Returns:
        The trained parameters, and notes for the user.
    """
    chosen = config.trainable
    if chosen.kind == "full":
        family.network.requires_grad_(True)
        return [p for p in family.network.parameters() if p.requires_grad], ()
    parameters = adapters.add_lora(
        family.network,
        chosen.rank,
        chosen.alpha,
        _targets(config, family),
        chosen.init,
        seed=config.run.seed,
    )
    if chosen.init_lora is None:
        return parameters, ()
    return parameters, adapters.load_lora(family.network, chosen.init_lora).notes


def reference_of(
    config: TrainConfig, family: Family, parameters: list[nn.Parameter]
) -> Callable[[], AbstractContextManager] | None:
    """The context in which the network is its base, if the KL or the policy needs one."""
    if config.method.kl_weight == 0 and config.method.credit != "relative":
        return None
    base = partial(adapters.reference, family.network)
    if config.trainable.init_lora is not None:
        base = partial(swap_values, parameters, [p.detach().clone() for p in parameters])

    @contextmanager
    def reference() -> Iterator[None]:
        with phase(REFERENCE), base():
            yield

    return reference


def _targets(config: TrainConfig, family: Family) -> tuple[str, ...]:
    """Layers that get adapters."""
    return config.trainable.targets or family.lora_targets


def per_sample_of(config: TrainConfig, family: Family) -> SampleGradients | None:
    """What one pass keeps each sample's gradients with; None for two passes.

    Its layers are those inside the adapters, down and up of each.

    Raises:
        ConfigError: if an adapter is of a kind whose gradients cannot be kept apart.
    """
    if config.method.update == "two_pass":
        return None
    pairs = [
        (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER])
        for _, layer in adapters.adapters(family.network)
    ]
    try:
        return SampleGradients([part for pair in pairs for part in pair])
    except ValueError as error:
        raise ConfigError(f"method.update 'one_pass': {error}, or use 'two_pass'") from error
