"""Tuned MODELs that cannot be rows of the base's batch: each predicts by itself.

Their weights are in modules of other files, or in the base's own module, which then carries one
MODEL's weights after the other.
"""

from __future__ import annotations

import math
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
from jaxtyping import Float
from torch import Tensor

Prompts = dict[str, Any]
"""Conditioning under "positive" and, where there is any, "negative"."""

Pair = tuple[Any, Any]
"""Positive and negative conditioning; None is not predicted."""


class Stage:
    """Which MODEL's weights each module carries.

    ComfyUI's clones of one file share one module. Loading one of them takes the weights of the
    others away without a word, so each is put on before it predicts.

    Args:
        patchers: the MODELs that are loaded at first, no two of one module.
    """

    def __init__(self, patchers: list[Any]) -> None:
        self.patchers = patchers

    def put_on(self, patcher: Any, shape: Any) -> None:
        """Have a MODEL's module carry its weights."""
        if patcher.model.current_patcher is not patcher:
            others = [one for one in self.patchers if not one.is_clone(patcher)]
            needed = patcher.memory_required([2 * shape[0], *shape[1:]])
            comfy.model_management.load_models_gpu([patcher, *others], memory_required=needed)
            patcher.pre_run()
            self.patchers = [patcher, *others]
        patcher.inject_model()  # nothing, where that is done already


class BesideModel:
    """A tuned MODEL that predicts by itself."""

    def __init__(self, patcher: Any) -> None:
        self.patcher = patcher.clone()
        self.options: dict[str, Any] = {}

    def prepare(self, prompts: Prompts, sigmas: Tensor) -> None:
        """Collect what patches it, as CFGGuider does before it samples."""
        own = comfy.model_patcher.create_model_options_clone(self.patcher.model_options)
        own.setdefault("transformer_options", {})["sample_sigmas"] = sigmas
        comfy.sampler_helpers.prepare_model_patcher(self.patcher, prompts, own)
        device, dtype = self.patcher.load_device, self.patcher.model_dtype()
        comfy.samplers.cast_to_load_options(own, device=device, dtype=dtype)
        self.options = own

    def outputs(self, pair: Pair, x: Tensor, timestep: Tensor) -> list[Tensor]:
        """Its clean estimates; it must be on stage.

        Args:
            x: latents, in ComfyUI's scale.
        """
        return outputs(self.patcher.model, pair, x, timestep, self.options)

    def predict(
        self, pair: Pair, outs: list[Tensor], x: Tensor, timestep: Tensor, cfg: float
    ) -> Float[Tensor, "b *d"]:
        """Its guided clean estimate; it must be on stage.

        Args:
            x: latents, in ComfyUI's scale.
            cfg: scale of classifier-free guidance.
        """
        return classifier_free(self.patcher.model, pair, outs, cfg, x, timestep, self.options)


def prepare_conditioning(model: Any, prompts: Prompts, *given: Any, **kwargs: Any) -> Prompts:
    """Conditioning ready for a batch.

    Args:
        model: of ComfyUI, not its patcher.
        given: noise, latents before they are in the model's scale, device, mask, seed.
    """
    noise, latent, device, mask, seed = given
    if latent is not None and latent.count_nonzero() > 0:
        latent = model.process_latent_in(latent)
    copies = {name: [dict(part) for part in cond] for name, cond in prompts.items()}
    return comfy.samplers.process_conds(model, noise, copies, device, latent, mask, seed, **kwargs)


def pair_of(prompts: Prompts, cfg: float, options: dict[str, Any]) -> Pair:
    """Positive and negative; None for the negative where CFGGuider leaves it out."""
    is_alone = math.isclose(cfg, 1.0) and not options.get("disable_cfg1_optimization", False)
    return prompts.get("positive"), None if is_alone else prompts.get("negative")


def outputs(
    model: Any, pair: Pair, x: Tensor, timestep: Tensor, options: dict[str, Any]
) -> list[Tensor]:
    """Clean estimates of one pair, by whatever node has taken this over."""
    function = options.get("sampler_calc_cond_batch_function")
    if function is None:
        return comfy.samplers.calc_cond_batch(model, list(pair), x, timestep, options)
    told = {"conds": list(pair), "input": x, "sigma": timestep, "model": model}
    return function(told | {"model_options": options})


def classifier_free(
    model: Any,
    pair: Pair,
    outs: list[Tensor],
    cfg: float,
    x: Tensor,
    timestep: Tensor,
    options: dict[str, Any],
) -> Float[Tensor, "b *d"]:
    """Classifier-free guidance of one pair, with all that patches of ComfyUI make of it."""
    for function in options.get("sampler_pre_cfg_function", []):
        told = {"conds": list(pair), "conds_out": outs, "cond_scale": cfg, "timestep": timestep}
        outs = function(
            told | {"input": x, "sigma": timestep, "model": model, "model_options": options}
        )
    return comfy.samplers.cfg_function(
        model, *outs[:2], cfg, x, timestep, model_options=options, cond=pair[0], uncond=pair[1]
    )
