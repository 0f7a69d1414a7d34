"""Implicit Reward Guidance as a GUIDER (paper Appendix F): base + sum of gamma_i (tuned_i - base).

Imported where ComfyUI runs: the guider is a subclass of its CFGGuider.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.samplers
from comfy.patcher_extension import PatcherInjection, WrappersMP
from jaxtyping import Float
from torch import Tensor

from ...pcpo.guidance import implicit_reward, shared_negative
from ...pcpo.row_lora import Batch, Variant
from .beside import (
    BesideModel,
    Pair,
    Prompts,
    Stage,
    classifier_free,
    outputs,
    pair_of,
    prepare_conditioning,
)
from .rows import Patches, RowAdapters, obstacle, shared_patches

KEY = "pcpo_irg"
SCALE = "pcpo_scale"
"""In the model options of a step: what all gammas are multiplied by, where a sampler says so."""

NAMES = ("positive", "negative")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Tuned:
    """A tuned MODEL and its part in the guidance.

    Attributes:
        model: a MODEL of the base's kind. Where it is a clone of the base its weights count, and
            the base's other patches hold for it.
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

    Versions that are clones of the base with other patches are rows of one batch with it, over one
    copy of the weights; ComfyUI splits the batch where memory is short. All others run by
    themselves. Versions with gamma 0 cost nothing.

    Args:
        tuned: its versions; they are numbered in this order.
        shares_negative: whether versions without a negative prompt of their own take the base's
            prediction of it, as `shared_negative` says, instead of predicting it.
    """

    def __init__(self, base: Any, tuned: list[Tuned], *, shares_negative: bool = False) -> None:
        self.shares_negative = shares_negative
        self.tuned = {i: one for i, one in enumerate(tuned) if one.gamma != 0}
        reasons = {i: obstacle(base, one.model) for i, one in self.tuned.items()}
        together = {i: self.tuned[i].model.patches for i, why in reasons.items() if why is None}
        patcher = base.clone()
        self.adapters = _adapters(patcher, together)
        self.beside = {
            i: BesideModel(self.tuned[i].model) for i, why in reasons.items() if why is not None
        }
        self.prompts: dict[int, Prompts] = {}
        self.whose: Callable[[int], tuple[Variant, int]] = lambda cond: (None, cond)
        injection = PatcherInjection(inject=self.adapters.inject, eject=self.adapters.eject)
        patcher.set_injections(KEY, [injection])
        patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self._apply_model)
        patcher.set_additional_models(KEY, self._of_other_files(patcher))
        super().__init__(patcher)
        self._say_how(reasons)

    def set_conds(self, positive: Any, negative: Any) -> None:
        """Set the conditioning of the base, and of each version that has some of its own."""
        conds = {"positive": positive, "negative": negative}
        for i, one in self.tuned.items():
            conds |= {f"positive {i}": one.positive, f"negative {i}": one.negative}
        self.inner_set_conds({name: cond for name, cond in conds.items() if cond is not None})

    def outer_sample(self, *args: Any, **kwargs: Any) -> Any:
        """Sample; every layer has its own forward afterwards, whatever happens."""
        self.stage = Stage([self.model_patcher, *self._of_other_files(self.model_patcher)])
        try:
            return super().outer_sample(*args, **kwargs)
        finally:
            for other in self.beside.values():
                other.patcher.cleanup()
            self.model_patcher.eject_model()
            self.prompts = {}

    def inner_sample(
        self,
        noise: Any,
        latent_image: Any,
        device: Any,
        sampler: Any,
        sigmas: Any,
        denoise_mask: Any,
        callback: Any,
        disable_pbar: Any,
        seed: Any,
        **kwargs: Any,
    ) -> Any:
        """Prepare each pair of prompts by itself, as CFGGuider does, and sample."""
        conds, given = self.conds, (noise, latent_image, device, denoise_mask, seed)
        for i, one in self.tuned.items():
            other = self.beside.get(i)
            if other is None and one.positive is None and one.negative is None:
                continue  # the base's are used
            pair = {name: conds.get(f"{name} {i}", conds.get(name)) for name in NAMES}
            own = {name: cond for name, cond in pair.items() if cond is not None}
            if other is not None:
                other.prepare(own, sigmas)
            model = self.inner_model if other is None else other.patcher.model
            self.prompts[i] = prepare_conditioning(model, own, *given, **kwargs)
        self.conds = {name: conds[name] for name in NAMES if name in conds}
        rest = (sampler, sigmas, denoise_mask, callback, disable_pbar, seed)
        try:
            return super().inner_sample(noise, latent_image, device, *rest, **kwargs)
        finally:
            self.conds = conds | self.conds  # ComfyUI cleans up after all of them

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
            model_options: ComfyUI's, `SCALE` among them for relative credit.
            seed: not used.
        """
        options = {k: v for k, v in (model_options or {}).items() if k != "multigpu_clones"}
        sampling, sigma = self.inner_model.model_sampling, float(timestep.max())
        active = [i for i, one in self.tuned.items() if one.takes_part(sigma, sampling)]
        rows: list[Variant] = [None, *(i for i in active if i not in self.beside)]
        self.stage.put_on(self.model_patcher, x.shape)
        found, base = self._predict_batch(rows, x, timestep, options)
        for i in active:
            if i in self.beside:
                self.stage.put_on(self.beside[i].patcher, x.shape)
                found[i] = self._alone(i, base, x, timestep)
        gammas = [options.get(SCALE, 1.0) * self.tuned[i].gamma for i in active]
        return implicit_reward(found[None], [found[i] for i in active], gammas)

    def _predict_batch(
        self, versions: list[Variant], x: Tensor, timestep: Tensor, options: dict[str, Any]
    ) -> tuple[dict[Variant, Tensor], list[Tensor]]:
        """Guided estimates of the base (None, the first) and versions, and the base's two.

        To other patches each of them looks like a plain pair of conditional (0) and not (1).
        """
        model, pairs = self.inner_model, [self._pair(i, options) for i in versions]
        if "sampler_calc_cond_batch_function" in options:  # which takes one pair
            outs = []
            for i, pair in zip(versions, pairs, strict=True):
                self.whose = lambda cond, i=i: (i, cond)
                outs.append(outputs(model, self._predict_one(i, pair), x, timestep, options))
        else:
            self.whose = lambda cond: (versions[cond // 2], cond % 2)
            each = zip(versions, pairs, strict=True)
            conds = [cond for i, pair in each for cond in self._predict_one(i, pair)]
            flat = comfy.samplers.calc_cond_batch(model, conds, x, timestep, options)
            outs = [flat[k : k + 2] for k in range(0, len(flat), 2)]
        estimates = {}
        for i, pair, out in zip(versions, pairs, outs, strict=True):
            self.whose = lambda cond, i=i: (i, cond)  # some patches predict once more here
            full = self._with_negative(i, pair, out, outs[0])
            estimates[i] = classifier_free(model, pair, full, self.cfg, x, timestep, options)
        return estimates, outs[0]

    def _alone(self, version: int, base: list[Tensor], x: Tensor, timestep: Tensor) -> Tensor:
        """The guided estimate of a version that cannot be in the batch."""
        other = self.beside[version]
        pair = pair_of(self.prompts[version], self.cfg, other.options)
        outs = other.outputs(self._predict_one(version, pair), x, timestep)
        full = self._with_negative(version, pair, outs, base)
        return other.predict(pair, full, x, timestep, self.cfg)

    def _shares(self, version: Variant) -> bool:
        """Whether the base's prediction of the negative prompt serves for a version too."""
        return self.shares_negative and version is not None and self.tuned[version].negative is None

    def _predict_one(self, version: Variant, pair: Pair) -> Pair:
        return (pair[0], None) if self._shares(version) else pair

    def _with_negative(
        self, version: Variant, pair: Pair, outs: list[Tensor], base: list[Tensor]
    ) -> list[Tensor]:
        if pair[1] is None or not self._shares(version):
            return outs
        return [outs[0], shared_negative(outs[0], *base)]

    def _pair(self, version: Variant, options: dict[str, Any]) -> Pair:
        if version is None:
            return pair_of(self.conds, self.cfg, options)
        if version not in self.prompts:  # the base's, which caches of other packs must tell apart
            self.prompts[version] = {
                name: [part | {"uuid": uuid.uuid4()} for part in cond]
                for name, cond in self.conds.items()
            }
        return pair_of(self.prompts[version], self.cfg, options)

    def _apply_model(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Tell the adapters whose rows the network is about to see."""
        options = kwargs.get("transformer_options") or args[5]
        owned = [self.whose(cond) for cond in options["cond_or_uncond"]]
        options["cond_or_uncond"] = [cond for _, cond in owned]
        batch = Batch(tuple(owner for owner, _ in owned), len(args[0]) // len(owned))
        with self.adapters.on(batch):
            return executor(*args, **kwargs)

    def _of_other_files(self, patcher: Any) -> list[Any]:
        """One MODEL of each module but the patcher's; loaded along with it."""
        found: list[Any] = []
        for other in self.beside.values():
            if not any(one.is_clone(other.patcher) for one in [patcher, *found]):
                found.append(other.patcher)
        return found

    def _say_how(self, reasons: dict[int, str | None]) -> None:
        for i, why in reasons.items():
            if why is not None:
                log.info(
                    "Implicit Reward Guidance: tuned model %d %s; it runs by itself, beside the "
                    "batch of the others",
                    i + 1,
                    why,
                )
        if self.adapters.whole:
            log.info(
                "Implicit Reward Guidance: %d weights have patches that are no plain LoRA; their "
                "layers are computed once more, with the difference",
                len(self.adapters.whole),
            )


def _adapters(patcher: Any, together: dict[int, Patches]) -> RowAdapters:
    """What base and versions do not share; the patcher is left with what they do."""
    own = patcher.patches
    shared = shared_patches(own, *together.values())
    if any(len(shared.get(key, [])) < len(patches) for key, patches in own.items()):
        patcher.patches, patcher.patches_uuid = shared, uuid.uuid4()
    adapters = RowAdapters(shared)
    adapters.add(None, patcher.model, own)
    for i, patches in together.items():
        adapters.add(i, patcher.model, patches)
    return adapters
