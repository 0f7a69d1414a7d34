"""Frozen networks made from a weight file, once for equal weights; CLIP's two towers.

A tower may compute in half precision. What follows it, the norm, the product and the head, is done
in float32: half precision would give a score in steps of 0.002 and more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from .network import device_of, dtype_of, load_frozen
from .shapes import HEAD_LAYERS, ClipSpec, TowerSpec
from .tokenizers import Tokenizer

VISION = ("vision_model.", "visual_projection.")
TEXT = ("text_model.", "text_projection.")


Embeds = Float32[Tensor, "b e"]

_PROMPTS_KEPT = 4096
_PROMPTS_AT_ONCE = 64


def vision_network(spec: ClipSpec) -> nn.Module:
    """A CLIP's vision tower with its projection, without weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        **sizes(spec.vision),
        image_size=spec.size,
        patch_size=spec.patch,
        projection_dim=spec.embed,
        hidden_act=spec.activation,
    )
    return CLIPVisionModelWithProjection(config)


def text_network(spec: ClipSpec) -> nn.Module:
    """A CLIP's text tower with its projection, without weights."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    end = spec.vocabulary - 1
    config = CLIPTextConfig(
        **sizes(spec.text),
        vocab_size=spec.vocabulary,
        max_position_embeddings=spec.context,
        projection_dim=spec.embed,
        hidden_act=spec.activation,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    return CLIPTextModelWithProjection(config)


def sizes(tower: TowerSpec) -> dict[str, Any]:
    """A tower's widths by the names in transformers' configurations."""
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.inner,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
    }


class Vision:
    """Images to embeddings of unit length."""

    def __init__(self, path: Path, spec: ClipSpec, dtype: str) -> None:
        made_as = (spec.vision, spec.activation)
        self.network = load_frozen(path, VISION, made_as, lambda: vision_network(spec), dtype)

    def __call__(self, prepared: Float[Tensor, "b 3 s s"]) -> Embeds:
        """Embed prepared images, on the network's device."""
        embeds = self.network(pixel_values=prepared.to(dtype_of(self.network))).image_embeds
        return unit(embeds)


class Text:
    """Prompts to embeddings of unit length; those of the latest prompts are kept."""

    def __init__(self, path: Path, spec: ClipSpec, dtype: str, tokens: Tokenizer) -> None:
        made_as = (spec.text, spec.activation)
        self.network = load_frozen(path, TEXT, made_as, lambda: text_network(spec), dtype)
        self.tokens = tokens
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Embeds:
        """Embed prompts, each once, on the network's device."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
        for start in range(0, len(new), _PROMPTS_AT_ONCE):
            part = new[start : start + _PROMPTS_AT_ONCE]
            self._kept |= zip(part, self._embed(part), strict=True)
        for prompt in prompts:
            self._kept.move_to_end(prompt)
        embeds = torch.stack([self._kept[prompt] for prompt in prompts])
        while len(self._kept) > _PROMPTS_KEPT:
            self._kept.popitem(last=False)
        return embeds.to(device_of(self.network))

    def _embed(self, prompts: Sequence[str]) -> Embeds:
        """No mask is needed: no token sees those after it, and the first end token is read."""
        ids = self.tokens(prompts).ids.to(device_of(self.network))
        return unit(self.network(input_ids=ids).text_embeds).cpu()


def unit(embeds: Float[Tensor, "b e"]) -> Embeds:
    """Scale embeddings to unit length, in float32."""
    embeds = embeds.float()
    return embeds / embeds.square().sum(-1, keepdim=True).sqrt()


def cosines(images: Embeds, prompts: Embeds) -> Float32[Tensor, " b"]:
    """Cosine of each image and its own prompt, both of unit length: -1 to 1.

    Multiplied and added up in float32: a matrix product would follow the caller's settings.
    """
    return (images * prompts.to(images.device)).sum(-1)


class AffineHead(nn.Module):
    """An aesthetic head: linear maps with nothing between them, so one affine map.

    They are multiplied in float64; the result is applied in float32.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        """Collapse the maps.

        Args:
            state: "layers.0.weight" and so on.
        """
        super().__init__()
        weight, bias = torch.eye(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for layer in reversed(HEAD_LAYERS):
            bias = weight @ state[f"layers.{layer}.bias"].double() + bias
            weight = weight @ state[f"layers.{layer}.weight"].double()
        self.weight = nn.Parameter(weight[0].float(), requires_grad=False)
        self.bias = nn.Parameter(bias[0].float(), requires_grad=False)

    def forward(self, embeds: Float[Tensor, "b e"]) -> Float32[Tensor, " b"]:
        return (embeds.float() * self.weight).sum(-1) + self.bias
