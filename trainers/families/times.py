"""Times that a network is told, in float32."""

from __future__ import annotations

from torch import Tensor, nn


class Times:
    """Passes times in float32 to a network's embedding: diffusers rounds them to its dtype.

    In bfloat16 a sigma would be off by up to 0.2 %; ComfyUI passes it exactly.

    Args:
        embedding: the module that is given the times as its first arguments.
    """

    def __init__(self, embedding: nn.Module) -> None:
        self._given: tuple[Tensor, ...] = ()
        embedding.register_forward_pre_hook(self)

    def set(self, *sigmas: Tensor) -> None:
        """Set the times of the next pass through the network, in [0, 1]."""
        self._given = tuple(sigma * 1000 for sigma in sigmas)

    def __call__(self, _module: nn.Module, rounded: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given, self._given = self._given, ()
        return (*given, *rounded[len(given) :])
