"""Implicit Reward Guidance as a GUIDER (paper Appendix F): base + sum of gamma_i (tuned_i - base).

Imported where ComfyUI runs: the guider is a subclass of its CFGGuider.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
from comfy.patcher_extension import PatcherInjection, WrappersMP
from jaxtyping import Float
from torch import Tensor

from ..pcpo.guidance import implicit_reward
from .irg_rows import RowAdapters, flattened, is_extension, rows_of

KEY = "pcpo_irg"
NAMES = ("positive", "negative")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Tuned:
    """A tuned MODEL and its part in the guidance.

    Attributes:
        model: a MODEL of the base's kind.
        gamma: 0 the base, 1 the tuned model, above 1 extrapolates, below 0 leads away.
        positive: its own conditioning; the guider's where None.
        negative: the same for the negative prompt.
        start: share of the sampling, in [0, 1], from which on it takes part.
        end: share after which it does not.
    """

    model: Any
    gamma: float
    positive: Any = None
    negative: Any = None
    start: float = 0.0
    end: float = 1.0

    def takes_part(self, sigma: float, sampling: Any) -> bool:
        """Whether it counts at a sigma; with gamma 0 it never does."""
        high, low = (sampling.percent_to_sigma(share) for share in (self.start, self.end))
        return self.gamma != 0 and low <= sigma <= high


class ImplicitRewardGuider(comfy.samplers.CFGGuider):
    """CFGGuider over a base MODEL and its tuned versions.

    Versions that are the base with more patches run in one batch with it, over one copy of the
    weights; ComfyUI splits the batch where memory is short. A MODEL of another file runs beside it.

    Args:
        base: a MODEL.
        tuned: its versions.
    """

    def __init__(self, base: Any, tuned: list[Tuned]) -> None:
        patcher, self.tuned = base.clone(), tuned
        self.adapters = RowAdapters()
        self.others: dict[int, OtherModel] = {}
        self.owner: list[int | None] = []
        for variant, one in enumerate(tuned):
            if is_extension(base, one.model):
                self.adapters.add(variant, base, one.model)
            else:
                self.others[variant] = OtherModel(one.model)
        injection = PatcherInjection(inject=self.adapters.inject, eject=self.adapters.eject)
        patcher.set_injections(KEY, [injection])
        patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self._apply_model)
        super().__init__(patcher)
        self._say_how()

    def set_conds(self, positive: Any, negative: Any) -> None:
        """Set the conditioning of the base, and of each version that has none of its own."""
        conds = {"positive": positive, "negative": negative}
        for variant, one in enumerate(self.tuned):
            conds[f"positive {variant}"] = positive if one.positive is None else one.positive
            conds[f"negative {variant}"] = negative if one.negative is None else one.negative
        self.inner_set_conds({name: cond for name, cond in conds.items() if cond is not None})

    def outer_sample(self, *args: Any, **kwargs: Any) -> Any:
        """Sample, with the models of other files loaded too."""
        with ExitStack() as stack:
            for variant, other in self.others.items():
                names = [f"{name} {variant}" for name in NAMES]
                conds = {name: self.conds[name] for name in names if name in self.conds}
                stack.enter_context(other.loaded(args[0].shape, conds))
            return super().outer_sample(*args, **kwargs)

    def inner_sample(
        self, noise: Any, latent_image: Any, device: Any, *args: Any, **kw: Any
    ) -> Any:
        """Prepare the other models' conditioning as CFGGuider prepares the base's."""
        mask, seed = args[2], args[5]
        for other in self.others.values():
            other.process(noise, latent_image, device, mask, seed, kw)
        return super().inner_sample(noise, latent_image, device, *args, **kw)

    def predict_noise(
        self,
        x: Float[Tensor, "b *d"],
        timestep: Tensor,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> Float[Tensor, "b *d"]:
        """The guided clean estimate, which is affine in eps or velocity at a given x.

        Args:
            x: latents, in ComfyUI's scale.
            timestep: their sigma.
            model_options: ComfyUI's.
            seed: not used.

        Returns:
            The estimate.
        """
        options = {k: v for k, v in (model_options or {}).items() if k != "multigpu_clones"}
        sampling = self.inner_model.model_sampling
        sigma = float(timestep.max())
        active = [i for i, one in enumerate(self.tuned) if one.takes_part(sigma, sampling)]
        beside = [i for i in active if i not in self.others]
        base, *together = self._batched(x, timestep, options, beside)
        estimates = dict(zip(beside, together, strict=True))
        for i in active:
            if i in self.others:
                estimates[i] = self.others[i].estimate(x, timestep, options, self.cfg)
        gammas = [self.tuned[i].gamma for i in active]
        return implicit_reward(base, [estimates[i] for i in active], gammas)

    def _batched(
        self, x: Tensor, timestep: Tensor, options: dict[str, Any], beside: list[int]
    ) -> list[Tensor]:
        """Guided estimates of the base and the versions beside it, from one batch."""
        pairs = [self._pair("")] + [self._pair(f" {i}") for i in beside]
        if _is_conditional_alone(self.cfg, options):
            pairs = [(positive, None) for positive, _ in pairs]
        whose = [None, *beside]

        def compute(conds: list[Any]) -> list[Tensor]:
            self.owner = flattened((variant, variant) for variant in whose)
            return comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, options)

        outs = compute(flattened(pairs))
        return [
            _guided(self.inner_model, pair, outs[2 * i : 2 * i + 2], self.cfg, x, timestep, options)
            for i, pair in enumerate(pairs)
        ]

    def _pair(self, ending: str) -> tuple[Any, Any]:
        return self.conds.get(f"positive{ending}"), self.conds.get(f"negative{ending}")

    def _apply_model(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Tell the adapters whose rows the network is about to see.

        To other patches each version looks like a plain pair of conditional (0) and not (1).
        """
        options = kwargs.get("transformer_options") or args[5]
        conds, total = options["cond_or_uncond"], len(args[0])
        rows = rows_of(conds, self.owner, total) if self.owner else {}
        options["cond_or_uncond"] = [cond % 2 for cond in conds]
        with self.adapters.batch(rows, total):
            return executor(*args, **kwargs)

    def _say_how(self) -> None:
        if self.others:
            log.info(
                "Implicit Reward Guidance: %d of %d tuned models are of another file than the base "
                "and run beside it, with weights of their own",
                len(self.others),
                len(self.tuned),
            )
        if self.adapters.merged_keys:
            log.info(
                "Implicit Reward Guidance: %d weights have patches that are no plain LoRA and are "
                "computed a second time, merged",
                len(self.adapters.merged_keys),
            )


class OtherModel:
    """A tuned MODEL that does not share the base's weights.

    Args:
        patcher: the MODEL.
    """

    def __init__(self, patcher: Any) -> None:
        self.patcher = patcher
        self.inner: Any = None
        self.conds: dict[str, Any] = {}

    def loaded(self, shape: Any, conds: dict[str, Any]) -> ExitStack:
        """Load it; the context that is given back cleans up after it."""
        copies = {name: [dict(part) for part in cond] for name, cond in conds.items()}
        self.inner, self.conds, models = comfy.sampler_helpers.prepare_sampling(
            self.patcher, shape, copies, self.patcher.model_options
        )
        stack, held = ExitStack(), self.conds
        stack.callback(comfy.sampler_helpers.cleanup_models, held, models)
        stack.callback(self.patcher.cleanup)
        self.patcher.pre_run()
        return stack

    def process(
        self, noise: Any, latent: Any, device: Any, mask: Any, seed: Any, kwargs: dict[str, Any]
    ) -> None:
        """Make its conditioning ready for a batch."""
        if latent is not None and latent.count_nonzero() > 0:
            latent = self.inner.process_latent_in(latent)
        self.conds = comfy.samplers.process_conds(
            self.inner, noise, self.conds, device, latent, mask, seed, **kwargs
        )

    def estimate(
        self, x: Tensor, timestep: Tensor, options: dict[str, Any], cfg: float
    ) -> Float[Tensor, "b *d"]:
        """Its guided clean estimate."""
        ordered = {name.split()[0]: cond for name, cond in self.conds.items()}
        pair = (ordered.get("positive"), ordered.get("negative"))
        if _is_conditional_alone(cfg, options):
            pair = (pair[0], None)
        own = comfy.model_patcher.create_model_options_clone(self.patcher.model_options)
        shared = options.get("transformer_options", {})
        if "sample_sigmas" in shared:
            own.setdefault("transformer_options", {})["sample_sigmas"] = shared["sample_sigmas"]
        outs = comfy.samplers.calc_cond_batch(self.inner, list(pair), x, timestep, own)
        return _guided(self.inner, pair, outs, cfg, x, timestep, own)


def _is_conditional_alone(cfg: float, options: dict[str, Any]) -> bool:
    """Whether there is nothing to guide with, as CFGGuider decides it."""
    return math.isclose(cfg, 1.0) and not options.get("disable_cfg1_optimization", False)


def _guided(
    model: Any,
    pair: tuple[Any, Any],
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
