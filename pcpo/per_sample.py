"""Gradients of each sample of a batch, from one backward pass over the whole batch.

A layer's gradient is a sum, over rows and places, of outer products of the output's gradient with
the input. Summed over places alone it is each row's own. That takes no more work, but for each
sample as much memory as the weight: r (in + out) numbers per layer for LoRA of rank r.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight


class SampleGradients:
    """Linear and convolution layers whose backward pass keeps the samples' gradients apart.

    Args:
        layers: without bias, convolutions without groups and padded with zeros. Their batches have
            b samples, or k times b of them one after the other (as with and without the prompt, for
            classifier-free guidance); a sample's gradient is then the sum over its k rows.

    Raises:
        ValueError: if a layer is of another kind.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        for layer in layers:
            if not _is_known(layer):
                raise ValueError(
                    f"the gradients of {layer} cannot be kept apart by sample: it must be a linear "
                    "or a convolution layer without bias, groups and other padding than zeros"
                )
        self.layers: list[Any] = list(layers)
        self._kept: list[_Kept] = []

    @contextmanager
    def of(self, samples: int) -> Iterator[None]:
        """Accumulate each sample's own gradients in backward passes within it.

        Args:
            samples: b, of each batch that the layers see with gradient.

        Yields:
            To forward and backward passes; `taken` returns their gradients.
        """
        self._kept = [_Kept(layer, samples) for layer in self.layers]
        for kept in self._kept:
            kept.layer.forward = kept
        try:
            yield
        finally:
            for kept in self._kept:
                del kept.layer.forward
            self._kept = []

    @contextmanager
    def added(self) -> Iterator[None]:
        """Let backward passes within it add to the weights' own gradients, as they usually do."""
        for kept in self._kept:
            kept.is_apart = False
        try:
            yield
        finally:
            for kept in self._kept:
                kept.is_apart = True

    def taken(self) -> list[Float[Tensor, "b *w"]]:
        """The gradients so far, (b, *weight) of each layer, float32 or better, which are then
        dropped.

        A layer without a gradient has 0.
        """
        return [kept.take() for kept in self._kept]


def weighted_sum(
    weights: Float[Tensor, " b"], gradients: Float[Tensor, "b *w"]
) -> Float[Tensor, " *w"]:
    """sum_n weights_n gradients_n."""
    return torch.tensordot(weights.to(gradients.dtype), gradients, dims=1)


def _is_known(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        is_plain = layer.groups == 1 and layer.padding_mode == "zeros"
        return is_plain and layer.bias is None and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear) and layer.bias is None


class _Kept:
    """A layer's forward pass while gradients are kept apart; its output is bit-identical.

    Args:
        layer: whose pass it is.
        samples: of a batch.
    """

    def __init__(self, layer: Any, samples: int) -> None:
        self.layer, self.samples, self.is_apart = layer, samples, True
        self.sums: Tensor | None = None
        self.is_turned = False  # whether the sums are kept as (b, n, m)
        kinds = (_Linear, _PlainConvolution, _Convolution)
        self.function: Any = next(kind for kind in kinds if kind.fits(layer))

    def __call__(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        return self.function.apply(x, self.layer.weight, self)

    def add(self, grads: Float[Tensor, "rows m l"], inputs: Float[Tensor, "rows l n"]) -> None:
        """Add the products of each row to those of its sample.

        Raises:
            ValueError: if the rows are not the samples, or a multiple of them.
        """
        rows, samples = len(grads), self.samples
        if rows % samples:
            raise ValueError(
                f"a layer saw {rows} rows for {samples} samples: its gradients cannot be kept "
                "apart by sample; leave it out of the LoRA's targets"
            )
        self.is_turned = grads.shape[1] > inputs.shape[2]
        if self.is_turned:  # on a CPU a quarter of the time at rank 4
            grads, inputs = inputs.mT, grads.mT
        for first in range(0, rows, samples):
            own = slice(first, first + samples)
            if self.sums is None:
                product = torch.bmm(grads[own], inputs[own])
                self.sums = product.to(torch.promote_types(product.dtype, torch.float32))
            elif self.sums.dtype == grads.dtype:
                self.sums.baddbmm_(grads[own], inputs[own])
            else:
                self.sums += torch.bmm(grads[own], inputs[own])

    def take(self) -> Tensor:
        """The sums so far, in the weight's layout."""
        sums, self.sums, weight = self.sums, None, self.layer.weight
        if sums is None:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            return torch.zeros(self.samples, *weight.shape, dtype=dtype, device=weight.device)
        return self.function.laid_out(sums.mT if self.is_turned else sums, weight.shape)


class _Linear(torch.autograd.Function):
    """y = x W^T, rows first: x (rows, ..., in), W (out, in)."""

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear)

    @staticmethod
    def laid_out(sums: Tensor, shape: Sequence[int]) -> Tensor:
        return sums

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kept: _Kept) -> Tensor:
        ctx.kept = kept
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        weight = weight.to(grad.dtype)
        if weight.device.type == "cpu" and weight.shape[0] > weight.shape[1]:
            weight = weight.mT.contiguous().mT  # by columns: a third of the time at rank 4
        back = grad @ weight
        if x.ndim != 3:
            x, grad = (t.reshape(len(t), -1, t.shape[-1]) for t in (x, grad))
        if not ctx.kept.is_apart:
            return back, grad.flatten(0, 1).mT @ x.flatten(0, 1), None
        ctx.kept.add(grad.mT, x)
        return back, None, None


def _geometry(layer: Any) -> tuple[Any, Any, Any]:
    """Stride, padding and dilation of a convolution."""
    return layer.stride, layer.padding, layer.dilation


class _Convolution(torch.autograd.Function):
    """A convolution without bias: x (rows, in, h, w), W (out, in, kh, kw)."""

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        return isinstance(layer, nn.Conv2d)

    @staticmethod
    def laid_out(sums: Tensor, shape: Sequence[int]) -> Tensor:
        return sums.unflatten(2, shape[1:])

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kept: _Kept) -> Tensor:
        ctx.kept = kept
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, None, *_geometry(kept.layer))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        stride, padding, dilation = how = _geometry(ctx.kept.layer)
        back = conv2d_input(x.shape, weight.to(grad.dtype), grad, *how)
        if not ctx.kept.is_apart:
            return back, conv2d_weight(x, weight.shape, grad, *how), None
        patches = F.unfold(x, weight.shape[2:], dilation, padding, stride)
        ctx.kept.add(grad.flatten(2), patches.mT)
        return back, None, None


class _PlainConvolution(_Convolution):
    """A convolution of stride 1, both gradients of which are products with patches of the output's.

    The patches of a LoRA down-projection's output gradient are much smaller than its input's, for
    it has few outputs. Seen from a pixel of the input they hold its neighbours' gradients, in the
    kernel's opposite order.
    """

    @staticmethod
    def fits(layer: Any) -> bool:
        if not isinstance(layer, nn.Conv2d):
            return False
        reach = zip(layer.kernel_size, *_geometry(layer)[1:], strict=True)
        return layer.stride == (1, 1) and all(p <= d * (k - 1) for k, p, d in reach)

    @staticmethod
    def laid_out(sums: Tensor, shape: Sequence[int]) -> Tensor:
        opposite = sums.view(len(sums), shape[0], *shape[2:], shape[1]).flip(2, 3)
        return opposite.permute(0, 1, 4, 2, 3).contiguous()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad,) = grad_outputs
        if not ctx.kept.is_apart:
            return _Convolution.backward(ctx, *grad_outputs)
        x, weight = ctx.saved_tensors
        _, padding, dilation = _geometry(ctx.kept.layer)
        kernel = weight.shape[2:]
        reach: Any = [d * (k - 1) - p for k, p, d in zip(kernel, padding, dilation, strict=True)]
        is_point = kernel == (1, 1)
        patches = grad.flatten(2) if is_point else F.unfold(grad, kernel, dilation, reach)
        opposite = weight.to(grad.dtype).flip(2, 3).transpose(0, 1).flatten(1)
        ctx.kept.add(patches, x.flatten(2).mT)
        return (opposite @ patches).view(x.shape), None, None
