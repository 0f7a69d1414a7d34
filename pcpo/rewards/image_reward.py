"""ImageReward: a BLIP that reads the prompt while it looks at the image, and a head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from jaxtyping import Float32
from torch import Tensor, nn

from ..pretrained.clip import AffineHead, sizes
from ..pretrained.find import part_of
from ..pretrained.network import dtype_of, load_frozen
from ..pretrained.preprocess import Cropped, Prepared
from ..pretrained.shapes import BLIPS, BlipSpec
from ..pretrained.tokenizers import Tokenizer, bert_tokenizer
from .network import NetworkReward

MEAN = 0.16717362830052426
DEVIATION = 1.0333394966054072
"""Deviation of the head's output over the authors' validation set."""

LONGEST = 35
"""Most tokens of a prompt, its start and end included."""


def vision_network(spec: BlipSpec) -> nn.Module:
    """A BLIP's vision tower without weights. Its norms' epsilon is timm's, not transformers'."""
    from transformers import BlipVisionConfig, BlipVisionModel

    config = BlipVisionConfig(
        **sizes(spec.vision),
        image_size=spec.size,
        patch_size=spec.patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    return BlipVisionModel(config)


def text_network(spec: BlipSpec) -> nn.Module:
    """A BLIP's text encoder without weights; as a "decoder" it has its cross-attention."""
    from transformers import BlipTextConfig, BlipTextModel

    config = BlipTextConfig(
        **sizes(spec.text),
        vocab_size=spec.vocabulary,
        encoder_hidden_size=spec.vision.width,
        max_position_embeddings=spec.context,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,
        bos_token_id=0,
        eos_token_id=0,
        sep_token_id=0,
    )
    return BlipTextModel(config, add_pooling_layer=False)


@dataclass(frozen=True, eq=False)
class ImageReward(NetworkReward):
    """How well an image answers its prompt, and how good it is: mostly -2.3 to 2.

    Source: Xu et al. 2023, arXiv:2304.05977. A picture with transparency loses its alpha before
    it is resized, and not after as in their code.

    Attributes:
        weights: path of the weight file; it is searched where None.
        vocab: path of BERT's `vocab.txt` (uncased); it is searched where None.
    """

    name: ClassVar[str] = "image_reward"
    needs_prompt: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True
    unit: ClassVar[str] = "deviations"
    vocab: str | None = None

    @property
    def preparation(self) -> Cropped:
        """CLIP's, by torchvision."""
        return Cropped(corner="even")

    @property
    def files(self) -> Mapping[str, tuple[str | None, tuple[str, ...]]]:
        return {"image_reward": (self.weights, ()), "bert_vocab": (self.vocab, ())}

    def _network(self, stem: str, make: Callable[[BlipSpec], nn.Module]) -> nn.Module:
        spec, path = BLIPS["image_reward"], self.paths["image_reward"]
        return load_frozen(path, (stem,), (stem, spec), lambda: make(spec), self.dtype, stem)

    @cached_property
    def _vision(self) -> nn.Module:
        return self._network("vision.", vision_network)

    @cached_property
    def _text(self) -> nn.Module:
        return self._network("text.", text_network)

    @cached_property
    def _head(self) -> AffineHead:
        state = part_of(self.paths["image_reward"], "head.")
        return AffineHead({name.removeprefix("head."): t for name, t in state.items()})

    @cached_property
    def _tokens(self) -> Tokenizer:
        return bert_tokenizer(self.name, self.paths["bert_vocab"], LONGEST)

    def modules(self) -> list[nn.Module]:
        return [self._vision, self._text, self._head]

    def judge(self, prepared: Prepared, prompts: Sequence[str]) -> Float32[Tensor, " b"]:
        """Score prepared images.

        The encoder reads a prompt in both directions, though transformers' class is a decoder.
        """
        seen = self._vision(prepared.to(dtype_of(self._vision))).last_hidden_state
        tokens = self._tokens(prompts)
        read = self._text(
            input_ids=tokens.ids.to(seen.device),
            attention_mask=tokens.mask.to(seen.device),
            encoder_hidden_states=seen,
            is_decoder=False,
        ).last_hidden_state
        return (self._head(read[:, 0]) - MEAN) / DEVIATION
