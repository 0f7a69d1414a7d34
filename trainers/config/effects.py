"""Settings of a run that have no effect, because of another setting. No torch.

They are not errors: a panel or a preset gives all settings. Those that are not at their default are
reported once, at the start.
"""

from __future__ import annotations

from ...registry import ADVANTAGES, samplers
from ..families.registry import FAMILIES, titles
from .train_config import DEMOS, TrainConfig

ONLY_SOME = ("guidance", "clip_skip", "size_condition", "train_distilled")
"""Fields of the section `model` that only some families take, without a reason to name."""

Rule = tuple[str, bool, str]  # fields, "section.name" and names after it; are they unread; why


def without_effect(config: TrainConfig, family: str | None = None) -> list[str]:
    """The settings without effect, one sentence each; `family` is the model's, if it is known.

    >>> without_effect(TrainConfig(sampler={"negative_prompt": "blurry"}))
    ["sampler.negative_prompt is 'blurry' and has no effect: sampler.guidance_scale is 1"]
    """
    plain, sentences = TrainConfig(), []
    for fields, is_unread, why in _rules(config, family):
        section, *names = fields.replace(".", " ").split()
        for name in names if is_unread else ():
            value = getattr(getattr(config, section), name)
            if value != getattr(getattr(plain, section), name):
                sentences.append(f"{section}.{name} is {value!r} and has no effect: {why}")
    return [*sentences, *(sentence for is_so, sentence in _weak_settings(config) if is_so)]


def small_images(
    config: TrainConfig, family: str | None, own: tuple[int, int] | None = None
) -> list[str]:
    """A sentence on images smaller than the family's published models draw well, or none.

    Args:
        family: of its model, if it is known.
        own: width and height that the model was made for, in px, if they are known; where they are
            small themselves, so may the images be.

    >>> tiny = TrainConfig(model={"source": "a.ckpt", "width": 512, "height": 512})
    >>> small_images(tiny, "sdxl")[0][:64]
    'model.width and model.height are 512 x 512 px; SDXL draws badly '
    """
    spec, model = FAMILIES.get(family or ""), config.model
    if spec is None or model.source in DEMOS or min(own or (spec.least,)) < spec.least:
        return []
    width, height = model.width or (own or (0, 0))[0], model.height or (own or (0, 0))[1]
    if not 0 < width * height < spec.least**2:
        return []
    return [
        f"model.width and model.height are {width} x {height} px; {spec.title} draws badly below "
        f"{spec.least} x {spec.least}, and what is learnt there may not hold at the usual size"
    ]


def doubts(
    config: TrainConfig, family: str | None, own: tuple[int, int] | None = None
) -> list[str]:
    """Sentences on settings that work and may disappoint on a family's models.

    Args:
        family: of its model, if it is known.
        own: as of `small_images`.
    """
    spec, kind = FAMILIES.get(family or ""), config.optimizer.kind
    found = small_images(config, family, own)
    if spec is not None and kind in spec.doubtful_optimizers:
        found.append(
            f"optimizer.kind is {kind!r}, which was reported to fail on {spec.title}; 'adamw' is "
            "the one to take"
        )
    return found


def _rules(c: TrainConfig, family: str | None) -> list[Rule]:
    spec = FAMILIES.get(family or "")
    is_flow = c.sampler.transition in samplers(is_flow=True) if spec is None else spec.is_flow
    title = "a diffusion model" if spec is None else spec.title
    kind = "a flow model" if is_flow else title
    taken = {"t5_length", *ONLY_SOME} if spec is None else spec.options
    on_cpu = c.run.device == "cpu"
    return [
        ("model.t5_length", not is_flow or "t5_length" not in taken, f"{title} has no T5"),
        *((f"model.{name}", name not in taken, f"it is for {titles(name)}") for name in ONLY_SOME),
        ("model.offload", on_cpu and c.model.offload != "blocks", "run.device is 'cpu'"),
        (
            "trainable.rank alpha targets init",
            c.trainable.kind == "full",
            "all weights are trained",
        ),
        ("trainable.shard", c.trainable.kind == "lora", "trainable.kind is 'lora'"),
        (
            "trainable.ema_every ema_ramp ema_decay",
            c.trainable.ema_every > _updates(c),
            f"the run has {_updates(c)} updates, and what was trained is exported as it is",
        ),
        ("sampler.spacing", is_flow, f"the model is {kind}"),
        ("sampler.grid shift whole_timesteps", not is_flow, f"the model is {kind}"),
        (
            "sampler.negative_prompt guidance_gradient",
            c.sampler.guidance_scale == 1,
            "sampler.guidance_scale is 1",
        ),
        (
            "sampler.initial_noise",
            c.sampler.initial_noise == "prompt" and c.prompts.images_per_prompt == 1,
            "prompts.images_per_prompt is 1",
        ),
        ("sampler.branch_at", c.sampler.branches == 1, "sampler.branches is 1"),
        ("advantage.among", c.sampler.branches == 1, "sampler.branches is 1"),
        *_rules_of_learning(c),
        ("taste.pairs", c.taste.ask_every == 0, "taste.ask_every is 0"),
        (
            "taste.ask_every",
            all(part.name != "taste" for part in c.reward_parts.values()),
            "no reward is a taste",
        ),
        ("run.eval_steps eval_noise", c.run.eval_prompts == 0, "run.eval_prompts is 0"),
        (
            "guard.prompts images diversity min_diversity max_drift patience",
            c.guard.every == 0,
            "guard.every is 0",
        ),
    ]


def _rules_of_learning(c: TrainConfig) -> list[Rule]:
    m, kind, slides = c.method, c.advantage.kind, c.method.selection == "sliding_window"
    selection, compared = f"method.selection is {m.selection!r}", f"advantage.kind is {kind!r}"
    moves = f"method.window_move is {m.window_move!r}"
    return [
        ("method.fraction", m.selection != "random_fraction", selection),
        (
            "method.window window_move window_start window_stride window_every",
            not slides,
            selection,
        ),
        ("method.window_start", slides and m.window_move != "fixed", moves),
        ("method.window_stride", slides and m.window_move != "sliding", moves),
        ("method.window_every", slides and m.window_move == "fixed", moves),
        (
            "method.window_stride",
            slides and m.window_move == "sliding" and m.window_every >= c.run.iterations,
            f"method.window_every is {m.window_every}, and run.iterations {c.run.iterations}",
        ),
        ("method.kl kl_fraction", m.kl_weight == 0, "method.kl_weight is 0"),
        (
            "method.objective clip_low clip_high",
            m.update == "one_pass",
            "method.update is 'one_pass', where nothing is ever clipped",
        ),
        *(
            (f"advantage.{name}", name not in ADVANTAGES.entries[kind].reads, compared)
            for name in ("global_std", "buffer_size", "min_count", "ddof")
        ),
        ("advantage.combine", len(c.rewards) == 1, "there is one reward"),
    ]


def _weak_settings(c: TrainConfig) -> list[tuple[bool, str]]:
    """Settings that do less than they seem to ask for."""
    trained, guard, updates = c.trainable, c.guard, _updates(c)
    warmup, times = c.optimizer.warmup, updates // trained.ema_every
    kept = 0.0 if trained.ema_ramp or not times else trained.ema_decay**times
    looks = -(-c.run.iterations // guard.every) if guard.every else 0
    reached = c.optimizer.lr * updates / max(1, warmup)
    return [
        (
            warmup > updates,
            f"optimizer.warmup is {warmup}, more than the run's {updates} updates: the learning "
            f"rate never comes to optimizer.lr, but to {reached:g}",
        ),
        (
            kept > 0.5,
            f"trainable.ema_decay is {trained.ema_decay}: the averages that are exported after "
            f"{updates} updates are still {kept:.1%} the untrained weights; lower it, or set "
            "trainable.ema_ramp",
        ),
        (
            c.sampler.guidance_scale == 0,
            "sampler.guidance_scale is 0: the network sees sampler.negative_prompt alone, and the "
            "prompts have no effect; 1 is without guidance",
        ),
        (
            0 < looks < guard.patience,
            f"guard.patience is {guard.patience}, more than the guard's {looks} looks at the run: "
            "it cannot end it",
        ),
    ]


def _updates(c: TrainConfig) -> int:
    return c.run.iterations * c.optimizer.updates
