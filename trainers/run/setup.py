"""Build everything that the loop works with from a config, after refusing what can be refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from .. import families, lora
from ..config.effects import doubts, without_effect
from ..config.train_config import ConfigError, TrainConfig
from ..distributed.processes import Processes, accelerator_of
from ..distributed.sharding import shard
from ..families import Family, Parts, load_family
from ..families.embeds import SharedEmbeds
from ..families.registry import FAMILIES
from ..job.preflight import check_family, files_of, options_of, preflight
from ..job.prompts import PromptSplit, split_prompts
from ..memory.blocks import swap_encoders
from ..memory.compile import check_compiler, compile_blocks
from ..memory.devices import is_on_cpu
from ..memory.low_bit import pack_base
from ..memory.offload import decoding, is_offloaded, place
from ..memory.trajectory_store import waiting_place
from .conditioning import Conditioning, StoredEmbeds, dtype_of, load_conditioning
from .guard.measures import Measures
from .method import DTYPES, objective_of
from .phases import phase
from .plans import Plans, plans_of
from .rewards import Advantages, RewardSet
from .sampler import Policy, Sampler
from .trainable import check_targets, make_trainable, per_sample_of, reference_of
from .update.learner import Averages, Learner, make_optimizer
from .update.two_pass import Objective


@dataclass(frozen=True, slots=True)
class Setup:
    """A run, ready to start.

    Attributes:
        held_out: prompts of the comparison before and after.
        plans: what samples: noise and credit of each step.
        sampler: what samples: requests to images.
        advantages: what compares: rewards to advantages.
        learner: what updates: the trained weights.
        measures: the guard's instruments, if there is a guard.
    """

    config: TrainConfig
    processes: Processes
    prompts: tuple[str, ...]
    held_out: tuple[str, ...]
    plans: Plans
    sampler: Sampler
    reward_set: RewardSet
    advantages: Advantages
    objective: Objective
    learner: Learner
    measures: Measures | None

    @property
    def family(self) -> Family:
        """The model, its network trainable."""
        return self.sampler.policy.family


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is in memory already, and the prompts of a run with their embeddings."""

    family: Family
    conditioning: Conditioning
    split: PromptSplit


@phase("loading")
def prepare(
    config: TrainConfig,
    say: Callable[[str], None] = lambda text: None,
    split: PromptSplit | None = None,
    heads: Mapping[str, str] | None = None,
    loaded: Loaded | None = None,
) -> Setup:
    """Load and build everything; `ConfigError` or `ModelError` if that is not possible.

    Args:
        say: called with what is being done, and with notes for the user, one sentence each.
        split: the prompts; those that the config names if None.
        heads: files of the heads that tastes score with, by label; their folders' own if None.
        loaded: instead of the config's model and prompts, which are not looked for.
    """
    accelerator = _accelerator(config)
    is_full = config.trainable.kind == "full"
    processes = Processes(accelerator, shards=is_full and config.trainable.shard)
    with processes.in_agreement():
        return _build(config, processes, say, split, heads, loaded)


def _build(
    config: TrainConfig,
    processes: Processes,
    say: Callable[[str], None],
    split: PromptSplit | None,
    heads: Mapping[str, str] | None,
    loaded: Loaded | None,
) -> Setup:
    accelerator, device = processes.accelerator, processes.device
    if processes.is_sharded:
        check_split(config)
    split, reward_set, measures = _check_inputs(config, split, heads, loaded)
    with collected_messages() as notes:
        loaded = loaded or _load(config, split, processes, say)
        family, text = loaded.family, loaded.conditioning
        shape = latent_shape(family, config.model)
        plans = plans_of(config, family, shape)
        parameters, more = make_trainable(config, family)
    notes += [
        *filter(None, [split.note]),
        *more,
        *_notes(config, family),
        *reward_set.tastes.doubts(),
    ]
    if processes.is_sharded:
        parameters = shard(family.network, device)
        say(f"all weights are split over {processes.count} processes")
    _place(config, family, processes)
    for rewards in filter(None, (reward_set, measures)):
        rewards.place(device, is_lent=_lends(config, device))
    _set_passes(config, family, say)
    guidance = (config.sampler.guidance_scale, config.sampler.guidance_gradient)
    policy = Policy(family, accelerator.autocast, *guidance, text.negative.to(device))
    reference = reference_of(config, family, parameters)
    for note in notes:
        say(note)
    return Setup(
        config=config,
        processes=processes,
        prompts=split.prompts,
        held_out=split.held_out,
        plans=plans,
        sampler=_sampler(config, policy, plans, text.embeds, shape, device, reference),
        reward_set=reward_set,
        advantages=Advantages.of(config.advantage, reward_set),
        objective=Objective(policy, config.method, objective_of(config.method)),
        learner=_learner(config, processes, family, plans.selection, parameters),
        measures=measures,
    )


def _learner(
    config: TrainConfig,
    processes: Processes,
    family: Family,
    selection: Any,
    parameters: list[torch.nn.Parameter],
) -> Learner:
    has_averages = config.trainable.ema_decay > 0
    optimizer = make_optimizer(config.optimizer, parameters)
    return Learner(
        config=config,
        processes=processes,
        selection=selection,
        parameters=parameters,
        optimizer=processes.accelerator.prepare_optimizer(optimizer),
        averaged=Averages([p.detach().clone() for p in parameters]) if has_averages else None,
        per_sample=per_sample_of(config, family),
    )


def _check_inputs(
    config: TrainConfig,
    split: PromptSplit | None,
    heads: Mapping[str, str] | None,
    loaded: Loaded | None,
) -> tuple[PromptSplit, RewardSet, Measures | None]:
    """Prompts, rewards and the guard's instruments.

    Whatever can be refused without a model is refused here.
    """
    if loaded is None:
        preflight(config, has_prompts=split is not None)
    else:
        split = loaded.split
    split = split or split_prompts(config.prompts, config.run.eval_prompts)
    reward_set = RewardSet.from_config(config, heads)
    reward_set.check_prompts([*split.prompts, *split.held_out])
    measures = Measures.of(config.guard)
    if measures is not None and measures.second is not None:
        measures.second.check_prompts(split.held_out[: config.guard.prompts])
    return split, reward_set, measures


def _load(
    config: TrainConfig, split: PromptSplit, processes: Processes, say: Callable[[str], None]
) -> Loaded:
    """Load the model on the CPU; its text encoders are gone before the network is read."""
    text, device = _conditioning(config, split, processes, say), processes.device
    say(f"loading {config.model.source} on {'the CPU' if device.type == 'cpu' else device}")
    return Loaded(_family(config, torch.device("cpu"), "network"), text, split)


def _conditioning(
    config: TrainConfig,
    split: PromptSplit,
    processes: Processes,
    say: Callable[[str], None],
) -> Conditioning:
    """The prompts' embeddings; of several processes the first of a machine encodes."""

    def load() -> Family:
        family = _family(config, processes.device, "text")
        plans_of(config, family, latent_shape(family, config.model))  # refused before the work
        return family

    def found() -> Conditioning:
        return load_conditioning(config, split.prompts, split.held_out, load, say)

    if processes.count > 1:
        with processes.in_agreement():  # the others find what it kept, and say nothing
            if processes.accelerator.is_local_main_process:
                found()
    return found()


def check_split(config: TrainConfig) -> None:
    """Refuse settings that a network split over processes does not support."""
    if config.model.precision == "float16":
        raise ConfigError(
            "model.precision is 'float16', whose scaled gradients cannot be split over processes; "
            "use 'bfloat16', or set trainable.shard to false"
        )
    if config.model.compile:
        raise ConfigError(
            "model.compile is true, but weights that are split over processes are put together "
            "in every pass; set model.compile to false, or trainable.shard to false"
        )
    if config.optimizer.kind == "adamw8bit":
        raise ConfigError(
            "optimizer.kind is 'adamw8bit', whose moments cannot be split over processes; set it "
            "to 'adamw', or trainable.shard to false"
        )


def _place(config: TrainConfig, family: Family, processes: Processes) -> None:
    """Put the model on the device, its base packed first: the unpacked one may not fit there."""
    device = processes.device
    model = config.model
    if model.base != "same":
        pack_base(family.network, model.base, device, waits=model.offload == "blocks")
    place(family, device, model.offload, is_split=processes.is_sharded)


def _set_passes(config: TrainConfig, family: Family, say: Callable[[str], None]) -> None:
    """Set up gradient checkpointing and compilation."""
    if config.model.gradient_checkpointing:
        family.set_gradient_checkpointing(True)
    if config.model.compile:
        say(f"{compile_blocks(family.network)} blocks are compiled in the first iteration")


def _family(config: TrainConfig, device: torch.device, parts: Parts) -> Family:
    family = load_model(config, device, parts)
    check_family(config, family.name)
    check_targets(config, family)
    return family


def load_model(config: TrainConfig, device: torch.device, parts: Parts) -> Family:
    """Load a config's model, as `load_family` does, with the settings of the config."""
    options: dict[str, Any] = {"dtype": dtype_of(config), "parts": parts}
    options |= options_of(config.model)
    if parts != "text" or config.model.offload != "blocks":
        return load_family(files_of(config.model), device=device, **options)
    family = load_family(files_of(config.model), **options)  # the encoders wait there too
    swap_encoders(family, device)
    family.place(device, text_alone=True)
    return family


def _sampler(
    config: TrainConfig,
    policy: Policy,
    plans: Plans,
    embeds: SharedEmbeds | StoredEmbeds,
    shape: tuple[int, int, int],
    device: torch.device,
    reference: Callable[[], AbstractContextManager] | None,
) -> Sampler:
    plan, size = plans.stochastic.to(device), config.run.micro_batch
    return Sampler(
        policy,
        plan,
        embeds,
        shape,
        size,
        device,
        storage_of(config),
        reference,
        decode=config.sampler.decode,
        waits=waiting_place(config.run.store_on, device),
        decoding=decoding(policy.family, device, is_lent=_lends(config, device)),
        remedy="training has diverged: start a new run with a lower optimizer.lr "
        f"({config.optimizer.lr:g}); in iteration 1 it is the model itself: choose another one, or "
        "model.precision 'float32'",
        # another size of batch would be compiled for itself
        untrained=policy if config.model.compile else policy.joined,
    )


def storage_of(config: TrainConfig) -> dict[str, Any]:
    """How `rollout` stores trajectories."""
    is_rounded_first = config.run.storage_rounding == "before"
    return {"storage": DTYPES[config.run.storage], "round_before_use": is_rounded_first}


def _lends(config: TrainConfig, device: torch.device) -> bool:
    return is_offloaded(config.model.offload, device)


def _accelerator(config: TrainConfig) -> Accelerator:
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device is 'cuda', but no CUDA device is there; set it to 'cpu'")
    on_cpu = is_on_cpu(config.run.device)
    if on_cpu and config.model.precision == "float16":
        raise ConfigError(
            "model.precision is 'float16', which a CPU cannot train in; use 'float32' or 'bfloat16'"
        )
    precision = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[config.model.precision]
    accelerator = accelerator_of(on_cpu, precision)
    if config.model.compile:
        check_compiler(accelerator.device)
    return accelerator


def latent_shape(family: Family, model: Any) -> tuple[int, int, int]:
    """(channels, height, width) of one latent, of the model's own size if none is given.

    `model` has `width` and `height`, in pixels or None; `ConfigError` if the model cannot draw an
    image of this size.
    """
    width, height = family.native_resolution
    try:
        return family.latent_shape(model.width or width, model.height or height)
    except ValueError as error:
        raise ConfigError(f"the images' size, width and height: {error}") from error


def _notes(config: TrainConfig, family: Family) -> tuple[str, ...]:
    """Notes on settings that the user may not have meant."""
    scale = config.sampler.guidance_scale
    unread = without_effect(config, family.name)
    unread += doubts(config, family.name, family.native_resolution)
    spec = FAMILIES[family.name]
    if "guidance" not in spec.options or scale == 1:
        return tuple(unread)
    return (
        *unread,
        f"sampler.guidance_scale is {scale:g} on {spec.models}, which has guidance distilled into "
        f"it (model.guidance {config.model.guidance:g}): both are applied, at twice the time; 1 is "
        "usual",
    )


class _Collector(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.INFO)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()) not in self.said:
            self.said.append(text)


@contextmanager
def collected_messages() -> Iterator[list[str]]:
    """Collect the families' messages within it, each once, instead of writing them to stderr."""
    said: list[str] = []
    collector = _Collector(said)
    logs = [logging.getLogger(package.__name__) for package in (families, lora)]
    levels = [log.level for log in logs]
    for log in logs:
        log.addHandler(collector)
        log.setLevel(logging.INFO)
    try:
        yield said
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
            log.removeHandler(collector)
