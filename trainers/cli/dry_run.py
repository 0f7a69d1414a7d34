"""`pcpo train --dry-run`: what a run needs, and whether it fits the card."""

from __future__ import annotations

from ..config.effects import doubts
from ..config.train_config import DEMOS, ConfigError, TrainConfig
from ..estimate.fit import GIB, refusal, text_of
from ..estimate.memory import estimate
from ..estimate.network_costs import Network, network_for
from ..families import inspect_source
from ..families.registry import spec_of_source
from ..job.preflight import files_of, missing_checkpoint, model_source, preflight


def dry_run(config: TrainConfig, name: str, card_gb: float | None) -> int:
    """Print the estimate of a run; `ConfigError`, with remedies, if it does not fit.

    Args:
        config: of the run. A model that is not downloaded yet is taken to be the published one.
        name: of the config in an error.
        card_gb: memory of the planned card, GiB; this machine's if None.
    """
    values = config.model_dump(mode="json")
    card = card_gb * GIB if card_gb is not None else _card(config.run.device)
    estimated = estimate(values, _network(config, name), card)
    print("\n".join([text_of(estimated), *doubts(config, _family(config))]))
    if card is None:
        print("there is no CUDA device here; --card-gb N plans for a card with N GB")
        return 0
    if (why := refusal(values, estimated, card)) is not None:
        raise ConfigError(why)
    print(f"it fits: the card has {card / GIB:.1f} GiB")
    return 0


def _card(device: str) -> float | None:
    import torch

    from ..memory.devices import is_on_cpu, memory_of

    return None if is_on_cpu(device) else memory_of(torch.device("cuda"))


def _family(config: TrainConfig) -> str | None:
    source = config.model.source
    if (spec := spec_of_source(source)) is not None:
        return spec.name
    return inspect_source(model_source(source), allow_download=config.model.allow_download).family


def _network(config: TrainConfig, name: str) -> Network:
    """The model's network; counted now if it is not a published one."""
    source = config.model.source
    if missing_checkpoint(source) is not None:
        return network_for(source)
    preflight(config, name)
    model = inspect_source(model_source(source), allow_download=config.model.allow_download)
    if source in DEMOS:
        return network_for(source)
    from ..estimate.count_networks import counted_network

    return counted_network(files_of(config.model), model)
