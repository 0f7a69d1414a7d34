"""Combinations of settings that cannot be run. No torch: checked when a config is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...registry import ADVANTAGES, TRANSITIONS, samplers
from ..reading import shown
from . import bounds

if TYPE_CHECKING:
    from .sections import TrainSettings

Refusals = list[tuple[bool, str]]  # is it so; field, value and remedy


def refusals(config: TrainSettings) -> Refusals:
    """All combinations that the mathematics or the trainer does not allow.

    Returns:
        (whether this config has it, the message) for each combination.
    """
    return [
        *_method(config),
        *_credit(config),
        *_sampler(config),
        *_selection(config),
        *_branches(config),
        *_one_pass(config),
        *_rewards(config),
        *_guard(config),
        *_size(config),
        *_frozen(config),
        *_other_rules(config),
    ]


def _method(c: TrainSettings) -> Refusals:
    m, s = c.method, c.sampler
    return [
        (
            m.ratio != "epsilon_matching"
            and m.credit not in ("native", "relative", "weighted_loss"),
            f"method.ratio is '{m.ratio}' and method.credit '{m.credit}': a density knows only "
            "the sampler's own weights; set method.credit to 'native' or method.ratio to "
            "'epsilon_matching'",
        ),
        (
            m.ratio == "squared_error" and s.transition != "cps",
            f"method.ratio 'squared_error' belongs to sampler.transition 'cps', not "
            f"'{s.transition}'; use 'density'",
        ),
        (
            m.ratio == "guard" and s.transition != "flow_sde",
            f"method.ratio 'guard' (GRPO-Guard) belongs to sampler.transition 'flow_sde', not "
            f"'{s.transition}'; use 'density'",
        ),
        (
            m.kl == "without_interval"
            and m.kl_weight > 0
            and s.transition in samplers(is_flow=False),
            "method.kl 'without_interval' is Flow-GRPO's and has no meaning for "
            f"{s.transition}; use 'exact'",
        ),
    ]


def _credit(c: TrainSettings) -> Refusals:
    m, s = c.method, c.sampler
    return [
        (
            m.target_weight is not None and m.credit == "native",
            f"method.target_weight is {m.target_weight}, but method.credit 'native' takes the "
            "sampler's own weights; leave it out, or set method.credit to 'proportionate'",
        ),
        (
            m.credit in ("published", "exact", "relative") and s.transition != "ddim",
            f"method.credit is '{m.credit}', a reading of ddim, but sampler.transition is "
            f"'{s.transition}'; set method.credit to 'proportionate'",
        ),
        (
            m.solve_weight is not None
            and (
                m.credit not in ("native", "proportionate", "published") or s.transition != "ddim"
            ),
            f"method.solve_weight is {m.solve_weight}, but method.credit '{m.credit}' on "
            f"sampler.transition '{s.transition}' solves for no noise by it; leave it out",
        ),
        (
            m.credit == "relative" and c.trainable.kind == "full",
            "method.credit is 'relative', whose policy is relative to the network without its "
            "adapters, but trainable.kind is 'full', which has none; set trainable.kind to 'lora' "
            "or method.credit to 'proportionate'",
        ),
        (
            m.credit == "relative" and m.selection == "sliding_window",
            "method.credit is 'relative', which makes one model of all steps' weights, but "
            "method.selection is 'sliding_window', which moves them; set it to 'all' or "
            "'random_fraction'",
        ),
        (
            m.credit == "relative" and m.kl_weight > 0 and m.kl_fraction < 1,
            f"method.kl_fraction is {m.kl_fraction}, but method.credit 'relative' needs the base's "
            "prediction at every step, so that nothing would be saved; set it to 1",
        ),
    ]


def _sampler(c: TrainSettings) -> Refusals:
    m, s = c.method, c.sampler
    most = TRANSITIONS.entries[s.transition].most
    return [
        (
            s.noise_level == 0,
            f"sampler.noise_level is 0: a sampler without noise has no policy, so '{m.ratio}' has "
            "nothing to compare; set it above 0 (ddim: 1)",
        ),
        (
            s.noise_level > most,
            f"sampler.noise_level is {s.noise_level}; {s.transition} allows at most {most:g}",
        ),
        (
            m.credit == "exact" and s.noise_level != 1,
            f"sampler.noise_level is {s.noise_level}, but method.credit 'exact' solves for ddim's "
            "noise itself; set it to 1, or method.credit to 'objective_only'",
        ),
        (
            s.drop_last >= s.steps,
            f"sampler.drop_last is {s.drop_last} of {s.steps} steps; at least one must be trained",
        ),
    ]


def _selection(c: TrainSettings) -> Refusals:
    m, trained = c.method, c.sampler.steps - c.sampler.drop_last
    slides = m.selection == "sliding_window"
    return [
        (
            slides and trained == 1,
            "method.selection is 'sliding_window', but 1 step is trained and a window cannot "
            "slide; use 'all' or raise sampler.steps",
        ),
        (
            slides and m.window > trained,
            f"method.window is {m.window}, more than the {trained} trained steps "
            "(sampler.steps less sampler.drop_last); lower it, or use method.selection 'all'",
        ),
        (
            slides and m.window_move == "fixed" and m.window_start + m.window > trained,
            f"method.window_start is {m.window_start}, but a window of {m.window} steps must begin "
            f"at {max(0, trained - m.window)} or before to lie within the {trained} trained steps "
            "(sampler.steps less sampler.drop_last); lower it, or method.window",
        ),
        (
            slides and m.window_move == "sliding" and m.window_stride > m.window,
            f"method.window_stride is {m.window_stride}, more than method.window "
            f"({m.window}): the steps between are never trained; lower it to {m.window} or less",
        ),
    ]


def _branches(c: TrainSettings) -> Refusals:
    s, group, at = c.sampler, c.prompts.images_per_prompt, c.sampler.branch_at
    is_asked, slides = s.branches > 1, c.method.selection == "sliding_window"
    trees = c.images // c.tree
    return [
        (
            is_asked and not at and not slides,
            f"sampler.branches is {s.branches}, but sampler.branch_at names no step at which "
            "images part; name some, or set method.selection to 'sliding_window', whose first "
            "step it then is",
        ),
        (
            is_asked and (list(at) != sorted({*at}) or not all(0 < step < s.steps for step in at)),
            f"sampler.branch_at is {shown(list(at))}; its steps ascend, from 1 to "
            f"{s.steps - 1} (sampler.steps less 1)",
        ),
        (
            is_asked and bool(at) and slides and c.method.window_move != "fixed",
            f"sampler.branch_at is {shown(list(at))}, but method.window_move "
            f"'{c.method.window_move}' moves the steps that carry noise; leave branch_at out, so "
            "that images part where the window begins",
        ),
        (
            is_asked and group % c.tree != 0,
            f"prompts.images_per_prompt is {group}, but {s.branches} branches at each of "
            f"{max(1, len(at))} steps make trees of {c.tree:,} images; set it to a multiple of "
            "that, or lower sampler.branches",
        ),
        (
            is_asked and c.optimizer.updates > max(1, trees),
            f"optimizer.updates is {c.optimizer.updates}, but the images of an iteration are "
            f"{trees} trees of {c.tree:,} (sampler.branches), which stay together; lower it",
        ),
        (
            is_asked
            and c.advantage.among == "siblings"
            and not ADVANTAGES.entries[c.advantage.kind].is_of_groups,
            f"advantage.among is 'siblings', but advantage.kind '{c.advantage.kind}' compares with "
            "more than those; set kind to 'group' or among to 'prompt'",
        ),
    ]


def _one_pass(c: TrainSettings) -> Refusals:
    is_asked = c.method.update == "one_pass"
    return [
        (
            is_asked and c.trainable.kind == "full",
            "method.update is 'one_pass', which keeps a gradient for every image, but "
            "trainable.kind is 'full', whose gradients are as large as the network; set "
            "trainable.kind to 'lora' or method.update to 'two_pass'",
        ),
        (
            is_asked and c.model.compile,
            "method.update is 'one_pass', which keeps the images' gradients apart inside of what "
            "model.compile would compile; set model.compile to false or method.update to "
            "'two_pass'",
        ),
        (
            is_asked and c.optimizer.updates > c.prompts.per_iteration,
            f"optimizer.updates is {c.optimizer.updates} and method.update 'one_pass', where each "
            f"update has prompts of its own, but prompts.per_iteration is "
            f"{c.prompts.per_iteration}; raise it, lower the updates, or use 'two_pass'",
        ),
        (
            is_asked and c.method.credit == "weighted_loss",
            "method.credit is 'weighted_loss', which differs from 'objective_only' in what is "
            "clipped, but method.update is 'one_pass', which clips nothing; set "
            "method.credit to 'objective_only' or method.update to 'two_pass'",
        ),
        (
            is_asked and c.run.storage_rounding == "after",
            "run.storage_rounding is 'after', a fault of what is stored for a second pass, but "
            "method.update is 'one_pass', which stores nothing; set method.update to 'two_pass'",
        ),
    ]


def _rewards(c: TrainSettings) -> Refusals:
    return [
        *(
            (
                part.weight == 0,
                f"rewards gives {label!r} the weight 0; leave it out or raise the weight",
            )
            for label, part in c.reward_parts.items()
        ),
        *(
            (
                part.normalise != "affine" and (part.scale, part.shift) != (1.0, 0.0),
                f"rewards.{label} has a scale or a shift, but its normalise is "
                f"{part.normalise!r}; set it to 'affine', or leave them out",
            )
            for label, part in c.reward_parts.items()
        ),
    ]


def _guard(c: TrainSettings) -> Refusals:
    g, run, trained = c.guard, c.run, c.reward_parts.values()
    odd = [text for text in g.reward_options if not text.partition("=")[0] or "=" not in text]
    return [
        (
            g.every > 0 and g.prompts > run.eval_prompts,
            f"guard.prompts is {g.prompts}, more than run.eval_prompts ({run.eval_prompts}), the "
            "held-out prompts that it looks at; lower it or raise run.eval_prompts",
        ),
        (
            g.every == 0 and g.reward is not None,
            f"guard.reward is {g.reward!r}, but guard.every is 0, which is no guard; set it to the "
            "iterations between two looks (5), or leave the reward out",
        ),
        (
            g.reward is None and (g.max_fall is not None or g.reward_options != ()),
            "guard.max_fall and guard.reward_options are of a second reward, but guard.reward "
            "names none; name one or leave them out",
        ),
        (
            bool(odd),
            f"guard.reward_options has {odd[0] if odd else ''!r}, which is no option; write "
            "OPTION=VALUE",
        ),
        (
            any((part.name, part.options) == (g.reward, g.options) for part in trained),
            f"guard.reward is {g.reward!r}, which is trained on and rises however the images "
            "collapse; name another",
        ),
        (
            g.every > 0
            and g.diversity == "ssim_diversity"
            and min(c.model.width or 64, c.model.height or 64) < 11,
            "guard.diversity is 'ssim_diversity', which needs images of 11 pixels on a side; use "
            "'pixel_diversity'",
        ),
    ]


def _size(c: TrainSettings) -> Refusals:
    return [
        (
            c.images > bounds.IMAGES,
            f"prompts.per_iteration ({c.prompts.per_iteration}) times prompts.images_per_prompt "
            f"({c.prompts.images_per_prompt}) is {c.images:,} images an iteration, more than "
            f"{bounds.IMAGES:,}; lower one of them",
        ),
    ]


def _frozen(c: TrainSettings) -> Refusals:
    """Of what stores the frozen weights otherwise."""
    return [
        (
            c.trainable.kind == "full" and c.model.base != "same",
            f"model.base is '{c.model.base}', which freezes the weights, but trainable.kind is "
            "'full'; set model.base to 'same' or trainable.kind to 'lora'",
        ),
        (
            c.trainable.kind == "full" and c.model.offload == "blocks",
            "model.offload is 'blocks', whose blocks are frozen, but trainable.kind is 'full'; set "
            "model.offload to 'always' or trainable.kind to 'lora'",
        ),
        (
            c.model.compile and c.model.offload == "blocks",
            "model.compile is true, but model.offload 'blocks' changes a block's weights between "
            "its passes; set model.compile to false or model.offload to 'always'",
        ),
        (
            c.model.compile and c.model.base != "same",
            f"model.compile is true, but model.base is '{c.model.base}', which is made whole in "
            "every pass by code that cannot be compiled; set model.compile to false",
        ),
    ]


def _other_rules(c: TrainSettings) -> Refusals:
    a = c.advantage
    return [
        (
            c.optimizer.updates > c.images,
            f"optimizer.updates is {c.optimizer.updates}, more than the {c.images} images of an "
            "iteration; lower it or raise prompts.per_iteration",
        ),
        (
            ADVANTAGES.entries[a.kind].is_of_groups and c.prompts.images_per_prompt < 2,
            f"advantage.kind '{a.kind}' needs prompts.images_per_prompt of at least 2; it is "
            f"{c.prompts.images_per_prompt}",
        ),
        (
            a.kind == "per_prompt" and a.min_count > a.buffer_size,
            f"advantage.min_count is {a.min_count}, more than advantage.buffer_size "
            f"({a.buffer_size}): a prompt's own statistics would never be used; lower it",
        ),
        (
            c.trainable.kind == "full" and c.trainable.init_lora is not None,
            "trainable.init_lora is a LoRA, but trainable.kind is 'full'; set kind to 'lora'",
        ),
        (
            c.trainable.kind == "full" and c.method.kl_weight > 0,
            f"method.kl_weight is {c.method.kl_weight}, but trainable.kind is 'full': the KL is to "
            "the base model, which is the network without its adapters, and a full fine-tune has "
            "none; set method.kl_weight to 0 or trainable.kind to 'lora'",
        ),
        (
            c.trainable.ema_decay == 0 and (c.trainable.ema_every > 1 or c.trainable.ema_ramp),
            "trainable.ema_every and trainable.ema_ramp say how weights are averaged, but "
            "trainable.ema_decay is 0, which is not at all; set it (Flow-GRPO: 0.9)",
        ),
        (
            c.run.storage == "float32" and c.run.storage_rounding == "after",
            "run.storage_rounding 'after' has no effect at run.storage 'float32'; choose another",
        ),
    ]
