"""From a config to everything the loop works with. What can be refused is refused first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..pcpo.rewards import Reward, load_reward
from . import lora
from .build import DTYPES, advantage_of, objective_of, selection_of
from .config import ConfigError, TrainConfig
from .families import Family, load_family
from .families.embeds import Embeds
from .heard import heard
from .plans import Plans, looking_plan, plans_of
from .policy import Policy
from .preflight import check_family, files_of, preflight
from .prompts import HELD_OUT, read_prompts
from .sampling import Sampler
from .update import Objective


@dataclass(frozen=True, slots=True)
class Setup:
    """A run, ready to start.

    Attributes:
        config: what was asked for.
        accelerator: device, processes and precision.
        family: the model, its network trainable.
        parameters: what is trained.
        optimizer: AdamW over them.
        averaged: exponential moving averages of the parameters, or None.
        prompts: what can be asked for.
        held_out: prompts of the comparison before and after.
        embeds: of `prompts`, then of `held_out`, on the CPU.
        plans: the sampler.
        sampler: requests to images.
        objective: what is minimised.
        selection: which steps are trained.
        advantages: one a reward, or one for their sum.
        rewards: the rewards, in the config's order.
        notes: what the user should know, one sentence each.
    """

    config: TrainConfig
    accelerator: Accelerator
    family: Family
    parameters: list[torch.nn.Parameter]
    optimizer: Any
    averaged: list[Tensor] | None
    prompts: tuple[str, ...]
    held_out: tuple[str, ...]
    embeds: Embeds
    plans: Plans
    sampler: Sampler
    objective: Objective
    selection: Any
    advantages: list[Any]
    rewards: list[Reward]
    notes: tuple[str, ...]


def prepare(config: TrainConfig, say: Callable[[str], None] = lambda text: None) -> Setup:
    """Load and build everything.

    Args:
        config: the run.
        say: told what is being done.

    Returns:
        The setup; `ConfigError` or `ModelError` where it cannot be had.
    """
    prompts, held_out, rewards = _checked(config)
    accelerator = _accelerator(config)
    say(f"loading {config.model.source} on {accelerator.device}")
    with heard() as said:
        family = _family(config, accelerator.device)
    shape = latent_shape(family, config.model)
    plans = plans_of(config, family, shape)
    parameters, notes = _make_trainable(config, family)
    notes = (*said, *notes, *_notes(config, family))
    say(f"encoding {len(prompts) + len(held_out)} prompts")
    embeds, negative = _encode(family, [*prompts, *held_out], config.sampler.negative_prompt)
    if config.model.gradient_checkpointing:
        family.set_gradient_checkpointing(True)
    guidance = (config.sampler.guidance_scale, config.sampler.guidance_gradient)
    policy = Policy(family, accelerator.autocast, *guidance, negative.to(accelerator.device))
    reference = reference_of(config, family, parameters)
    together = config.advantage.combine == "rewards"
    return Setup(
        config=config,
        accelerator=accelerator,
        family=family,
        parameters=parameters,
        optimizer=accelerator.prepare_optimizer(_optimizer(config, parameters)),
        averaged=[p.detach().clone() for p in parameters] if config.trainable.ema_decay else None,
        prompts=prompts,
        held_out=held_out,
        embeds=embeds,
        plans=plans,
        sampler=_sampler(config, policy, plans, embeds, shape, accelerator.device, reference),
        objective=Objective(policy, config.method, objective_of(config.method)),
        selection=selection_of(config.method),
        advantages=[advantage_of(config.advantage) for _ in ([0] if together else rewards)],
        rewards=rewards,
        notes=notes,
    )


def _checked(config: TrainConfig) -> tuple[tuple[str, ...], tuple[str, ...], list[Reward]]:
    """Prompts, held-out prompts and rewards; what can be refused without a model is refused."""
    preflight(config)
    prompts = read_prompts(config.prompts.source)
    held_out = _held_out(config, prompts)
    rewards = [load_reward(name) for name in config.rewards]
    _check_prompts(rewards, [*prompts, *held_out])
    return prompts, held_out, rewards


def _family(config: TrainConfig, device: torch.device) -> Family:
    full = config.trainable.kind == "full"
    kind = None if config.model.prediction_type == "auto" else config.model.prediction_type
    family = load_family(
        files_of(config.model),
        dtype=torch.float32 if full else DTYPES[config.model.precision],
        device=device,
        prediction_type=kind,
        allow_download=config.model.allow_download,
    )
    check_family(config, family.name)
    if family.name == "flux":
        family.guidance = config.model.guidance
    if config.model.t5_length is not None:
        family.t5_length = config.model.t5_length
    return family


def _sampler(
    config: TrainConfig,
    policy: Policy,
    plans: Plans,
    embeds: Embeds,
    shape: tuple[int, int, int],
    device: torch.device,
    reference: Callable[[], AbstractContextManager] | None,
) -> Sampler:
    storage = {
        "storage": DTYPES[config.run.storage],
        "round_before_use": config.run.storage_rounding == "before",
    }
    plan, size = plans.stochastic.to(device), config.run.micro_batch
    decode = config.sampler.decode
    return Sampler(policy, plan, embeds, shape, size, device, storage, reference, decode)


def _accelerator(config: TrainConfig) -> Accelerator:
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device is 'cuda', but no CUDA device is there; set it to 'cpu'")
    on_cpu = config.run.device == "cpu" or not torch.cuda.is_available()
    if on_cpu and config.model.precision == "float16":
        raise ConfigError(
            "model.precision is 'float16', which a CPU cannot train in; use 'float32' or 'bfloat16'"
        )
    precision = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[config.model.precision]
    return Accelerator(cpu=on_cpu, mixed_precision=precision)


def _held_out(config: TrainConfig, prompts: tuple[str, ...]) -> tuple[str, ...]:
    count = config.run.eval_prompts
    source = HELD_OUT.get(config.prompts.source)
    return (read_prompts(source) if source else prompts)[:count]


def _check_prompts(rewards: Sequence[Reward], prompts: Sequence[str]) -> None:
    """Score blank images once, so that a prompt a reward cannot read is refused at once.

    Raises:
        ConfigError: naming the reward and the prompt.
    """
    blank = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    for reward in rewards:
        for prompt in dict.fromkeys(prompts) if reward.needs_prompt else ():
            errors = reward.score(blank, [prompt]).errors
            if errors and errors[0]:
                raise ConfigError(f"the reward {reward.name!r} cannot judge a prompt: {errors[0]}")


def latent_shape(family: Family, model: Any) -> tuple[int, int, int]:
    """The shape of one latent, of the model's own size where none is given.

    Args:
        family: the model.
        model: has `width` and `height`, pixels or None.

    Returns:
        (channels, height, width).

    Raises:
        ConfigError: where the model cannot draw an image of this size.
    """
    width, height = family.native_resolution
    try:
        return family.latent_shape(model.width or width, model.height or height)
    except ValueError as error:
        raise ConfigError(f"the images' size, width and height: {error}") from error


def _notes(config: TrainConfig, family: Family) -> tuple[str, ...]:
    """What the user may not have meant."""
    scale = config.sampler.guidance_scale
    if family.name != "flux" or scale == 1:
        return ()
    return (
        f"sampler.guidance_scale is {scale:g} on FLUX.1-dev, which has guidance distilled into it "
        f"(model.guidance {config.model.guidance:g}): both are applied, at twice the time; 1 is "
        "usual",
    )


def _make_trainable(
    config: TrainConfig, family: Family
) -> tuple[list[torch.nn.Parameter], tuple[str, ...]]:
    """Adapters, or all weights: what is trained, and notes."""
    chosen = config.trainable
    if chosen.kind == "full":
        family.network.requires_grad_(True)
        return [p for p in family.network.parameters() if p.requires_grad], ()
    parameters = lora.add_lora(
        family.network,
        chosen.rank,
        chosen.alpha,
        chosen.targets or family.lora_targets,
        chosen.init,
        seed=config.run.seed,
    )
    notes: tuple[str, ...] = ()
    if chosen.init_lora is not None:
        notes = lora.load_lora(family.network, chosen.init_lora).notes
    return parameters, notes


@torch.no_grad()
def _encode(family: Family, prompts: list[str], negative: str) -> tuple[Embeds, Embeds]:
    """Embeddings of all prompts, each distinct one encoded once; the text encoder is dropped.

    Raises:
        ConfigError: where a prompt is longer than the text encoder takes.
    """
    distinct = list(dict.fromkeys([*prompts, negative]))
    for prompt in distinct:
        if (length := family.prompt_length(prompt)) > family.max_prompt_length:
            raise ConfigError(
                f"a prompt has {length} tokens and the model takes {family.max_prompt_length}; "
                f"shorten it, or the end would be trained on unseen: {prompt[:60]!r}..."
            )
    starts = range(0, len(distinct), 32)
    embeds = Embeds.joined([family.encode(distinct[i : i + 32]).to("cpu") for i in starts])
    family.release_text_encoder()
    rows = {prompt: i for i, prompt in enumerate(distinct)}
    return embeds[[rows[prompt] for prompt in prompts]], embeds[[rows[negative]]]


def reference_of(
    config: TrainConfig, family: Family, parameters: list[torch.nn.Parameter]
) -> Callable[[], AbstractContextManager] | None:
    """The context in which the network is its base, where a KL term needs one."""
    if config.method.kl_weight == 0:
        return None
    if config.trainable.init_lora is None:
        return lambda: lora.reference(family.network)
    frozen = [p.detach().clone() for p in parameters]
    return lambda: swapped(parameters, frozen)


class swapped:
    """Within it the parameters have other values.

    Args:
        parameters: of the network.
        values: for the time being, one a parameter.
    """

    def __init__(self, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self.pairs = list(zip(parameters, values, strict=True))
        self.kept: list[Tensor] = []

    def __enter__(self) -> None:
        self.kept = [p.data for p, _ in self.pairs]
        for parameter, value in self.pairs:
            parameter.data = value

    def __exit__(self, *exception: object) -> None:
        for (parameter, _), value in zip(self.pairs, self.kept, strict=True):
            parameter.data = value


def _optimizer(config: TrainConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    c = config.optimizer
    return torch.optim.AdamW(
        parameters,
        lr=c.lr,
        betas=(c.beta1, c.beta2),
        weight_decay=c.weight_decay,
        eps=c.eps,
    )


def evaluation_sampler(setup: Setup) -> Sampler:
    """The comparison's sampler, the same for every method, at its own steps and noise."""
    run, shape = setup.config.run, setup.sampler.shape
    sampler = setup.config.sampler
    plan = looking_plan(setup.family, shape, run.eval_steps, run.eval_noise, sampler)
    changed = replace(setup.sampler, reference=None, decode="final")
    return changed.under(plan.to(setup.accelerator.device))
