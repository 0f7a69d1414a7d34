"""Several tuned versions of one network in one forward pass: each row of the batch has its own.

A LoRA adds up(down(x)) to the output of a layer, so a batch can hold rows of the base network
beside rows of its tuned versions, over ONE copy of the weights. Patches that are no plain LoRA
(LoKr, LoHa, DoRA, whole weights) are exact too: their layers are computed a second time, for their
rows alone, with merged weights. No ComfyUI is imported here but in `merged_weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rows = dict[int, list[slice]]
"""Which rows of a batch belong to which tuned version; all others are the base's."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """What a LoRA adds to one layer.

    Attributes:
        variant: whose it is.
        up: (out, rank), of any number of trailing 1s.
        down: (rank, in), or a convolution's (rank, in, height, width).
        scale: strength times alpha / rank.
        first: where its outputs begin among the layer's, 0 but for fused layers.
        count: how many of the layer's outputs it has; None for all.
    """

    variant: int
    up: Tensor
    down: Tensor
    scale: float
    first: int = 0
    count: int | None = None

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The addition for rows x of the layer's input."""
        down, up = self.down.to(x), self.up.to(x)
        if not isinstance(layer, nn.Conv2d):
            return F.linear(F.linear(x, down.flatten(1)), up.flatten(1)) * self.scale
        down = down.view(len(down), layer.in_channels, *layer.kernel_size)
        padding: Any = layer.padding
        inner = F.conv2d(x, down, None, layer.stride, padding, layer.dilation)
        return F.conv2d(inner, up.view(*up.shape[:2], 1, 1)) * self.scale


def low_rank(variant: int, layer: nn.Module, patch: Sequence[Any]) -> LowRank | None:
    """A patch as an addition to its layer's output.

    Args:
        variant: whose it is.
        layer: the module whose weight it is for.
        patch: of a ModelPatcher: strength, adapter, strength of the weight, offset, function.

    Returns:
        The addition; None where the patch is no plain LoRA on a linear or 2D layer.
    """
    strength, adapter, weight_strength, offset, function = patch
    weights = getattr(adapter, "weights", None)
    if getattr(adapter, "name", None) != "lora" or weights is None or weight_strength != 1:
        return None
    up, down, alpha, mid, dora, reshape = weights
    is_plain = mid is None and dora is None and reshape is None
    is_known = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    if not (is_plain and is_known) or (offset is not None and offset[0] != 0):
        return None
    if function is not None:
        up = function(up.clone())
    first, count = (0, None) if offset is None else (offset[1], offset[2])
    scale = strength * (1.0 if alpha is None else alpha / len(down))
    return LowRank(variant, up, down, float(scale), first, count)


def extra_patches(base: Any, tuned: Any) -> Iterator[tuple[str, list[Any]]]:
    """What a tuned MODEL has beyond the base it was cloned from.

    Args:
        base: a MODEL.
        tuned: a clone of it, patched further.

    Yields:
        The key of a weight, and its additional patches.
    """
    for key, patches in tuned.patches.items():
        shared = base.patches.get(key, [])
        if len(patches) > len(shared):
            yield key, patches[len(shared) :]


def is_extension(base: Any, tuned: Any) -> bool:
    """Whether a MODEL is a clone of the base that has all its patches, in their order, first."""
    if not tuned.is_clone(base):
        return False
    return all(
        len(tuned.patches.get(key, [])) >= len(patches)
        and all(a[1] is b[1] and a[0] == b[0] for a, b in zip(patches, tuned.patches[key]))  # noqa: B905
        for key, patches in base.patches.items()
    )


@dataclass(slots=True)
class RowAdapters:
    """The tuned versions of a network, put on its layers while it is loaded.

    Attributes:
        low_rank: additions by the layer's path.
        whole: (variant, patches) of merged parameters by their key.
        rows: of the batch in the network now; empty outside a forward pass.
        total: rows of that batch.
    """

    low_rank: dict[str, list[LowRank]] = field(default_factory=dict)
    whole: dict[str, list[tuple[int, list[Any]]]] = field(default_factory=dict)
    rows: Rows = field(default_factory=dict)
    total: int = 0
    _merged: dict[str, dict[int, dict[str, Tensor]]] = field(default_factory=dict)
    _replaced: list[nn.Module] = field(default_factory=list)

    def add(self, variant: int, base: Any, tuned: Any) -> None:
        """Take over what a tuned MODEL has beyond its base.

        Args:
            variant: what to call it in `rows`.
            base: a MODEL.
            tuned: for which `is_extension` holds.
        """
        for key, patches in extra_patches(base, tuned):
            path, _, name = key.rpartition(".")
            layer = base.model.get_submodule(path)
            found = [low_rank(variant, layer, patch) for patch in patches]
            plain = [one for one in found if one is not None]
            if name == "weight" and len(plain) == len(found):
                self.low_rank.setdefault(path, []).extend(plain)
            else:
                self.whole.setdefault(key, []).append((variant, patches))

    @property
    def merged_keys(self) -> list[str]:
        """Parameters that are computed a second time with merged weights."""
        return sorted(self.whole)

    def inject(self, patcher: Any) -> None:
        """Replace the forward of every layer concerned; called when the model is loaded."""
        for key, wanted in self.whole.items():
            path, _, name = key.rpartition(".")
            layers = self._merged.setdefault(path, {})
            for variant, patches in wanted:
                layers.setdefault(variant, {})[name] = merged_weight(patcher, key, patches)
        for path in {*self.low_rank, *self._merged}:
            layer = patcher.model.get_submodule(path)
            merged, plain = self._merged.get(path, {}), self.low_rank.get(path, [])
            layer.forward = self._forward(layer, layer.forward, plain, merged)
            self._replaced.append(layer)

    def eject(self, patcher: Any) -> None:
        """Give every layer its own forward back; called when the model is unloaded."""
        for layer in self._replaced:
            del layer.forward  # the instance's; the class's is seen again
        self._replaced.clear()
        self._merged.clear()

    @contextmanager
    def batch(self, rows: Rows, total: int) -> Iterator[None]:
        """Within it the network's batch has these rows."""
        self.rows, self.total = rows, total
        try:
            yield
        finally:
            self.rows, self.total = {}, 0

    def _forward(
        self,
        layer: nn.Module,
        original: Callable[..., Tensor],
        plain: list[LowRank],
        merged: dict[int, dict[str, Tensor]],
    ) -> Callable[..., Tensor]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = original(x, *args, **kwargs)
            if not self.rows:
                return y
            if len(x) != self.total:
                raise RuntimeError(
                    f"a layer met {len(x)} rows in a batch of {self.total}: this network folds its "
                    "batch, so that Implicit Reward Guidance cannot tell whose rows they are"
                )
            for variant, parameters in merged.items():
                for part in self.rows.get(variant, ()):
                    with replaced(layer, parameters):
                        y[part] = original(x[part], *args, **kwargs)
            for one in plain:
                for part in self.rows.get(one.variant, ()):
                    added, at = one(layer, x[part]), y[part]
                    if one.count is not None:
                        at = at.narrow(-1, one.first, one.count)
                    at.add_(added)
            return y

        return forward


@contextmanager
def replaced(layer: nn.Module, parameters: dict[str, Tensor]) -> Iterator[None]:
    """Within it a layer has other parameters."""
    own: dict[str, Any] = layer._parameters
    before = {name: own[name] for name in parameters}
    device = next(iter(before.values())).device
    own.update({n: nn.Parameter(p.to(device), requires_grad=False) for n, p in parameters.items()})
    try:
        yield
    finally:
        own.update(before)


@torch.no_grad()
def merged_weight(patcher: Any, key: str, patches: list[Any]) -> Tensor:
    """A parameter with the base's patches and further ones in it.

    Args:
        patcher: of the base, loaded.
        key: of the parameter.
        patches: beyond the base's.

    Returns:
        The parameter in its own dtype.
    """
    import comfy.lora

    (original, convert), *own = patcher.get_key_patches(key)[key]
    weight = convert(original.clone(), inplace=False) if convert is not None else original.clone()
    result = comfy.lora.calculate_weight([*own, *patches], weight.float(), key)
    return result.to(original.dtype)


def rows_of(conds: Sequence[int], owner: Sequence[int | None], total: int) -> Rows:
    """Whose rows a batch holds.

    Args:
        conds: which conditioning each chunk of the batch belongs to; core decides their order.
        owner: the tuned version of each conditioning, None for the base.
        total: rows of the batch.

    Returns:
        The rows of each tuned version.
    """
    size, rows = total // len(conds), {}
    for chunk, cond in enumerate(conds):
        variant = owner[cond]
        if variant is not None:
            rows.setdefault(variant, []).append(slice(chunk * size, (chunk + 1) * size))
    return rows


def flattened(pairs: Iterable[Sequence[Any]]) -> list[Any]:
    """The members of all pairs, one after the other."""
    return [member for pair in pairs for member in pair]
