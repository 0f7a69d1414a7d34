"""BERTScore: how far one text says what another says, by DeBERTa's vectors of their tokens.

Zhang et al. 2020, with the model that its authors advise: the 40th layer of DeBERTa XLarge MNLI,
without weights for rare words and without rescaling. Each token takes the most similar token of
the other text; recall is the mean over the reference's tokens, precision over the candidate's. The
marks at the ends of a text have no weight in these means, but can be taken.
"""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from .base import RewardUnavailable
from .stored import files_of, sha256_of, tensors_of
from .texts import Tokenizer
from .towers import DTYPES, device_of, filled, unmixed

log = logging.getLogger(__name__)

LAYER = 40
LONGEST = 512
"""Tokens of a text, the marks at its ends included."""

_TEXTS_KEPT = 512
_TEXTS_AT_ONCE = 32
_PREFIX = "deberta."
_UNLIMITED = 10**9
_DROPS = re.compile(r"pooler\.|classifier\.|lm_predictions\.|cls\.|embeddings\.position_ids$")
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Agreement:
    """BERTScore of a candidate with its reference; all are 0 where either is empty.

    Attributes:
        precision: how far the reference says what the candidate says.
        recall: how far the candidate says what the reference says.
        f1: their harmonic mean.
    """

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, slots=True)
class _Text:
    """A text's tokens.

    Attributes:
        units: their vectors, of length 1, in main memory.
        weights: 1, or 0 for the marks at the ends.
    """

    units: Float32[Tensor, "t d"]
    weights: Float32[Tensor, " t"]


class Bert:
    """DeBERTa up to a layer, and its tokenizer."""

    def __init__(self, folder: Path, dtype: str, reward: str, layer: int = LAYER) -> None:
        """Load them.

        Args:
            folder: in Hugging Face's format, with the tokenizer's files.
            dtype: a key of `DTYPES`, of the network; what follows it is float32.
            reward: for messages.
            layer: whose vectors are compared, counted from 1.
        """
        self.network = _network(folder, dtype, layer)
        self.tokens = _tokenizer(folder, reward, self.network.config.vocab_size)
        self._kept: OrderedDict[str, _Text] = OrderedDict()

    def agreements(self, candidates: Sequence[str], references: Sequence[str]) -> list[Agreement]:
        """Compare each candidate with its reference.

        Args:
            candidates: texts.
            references: one a candidate.

        Returns:
            One a pair.
        """
        texts = self._read([text.strip() for text in (*candidates, *references)])
        count = len(candidates)
        return [agreement(c, r) for c, r in zip(texts[:count], texts[count:], strict=True)]

    def _read(self, texts: Sequence[str]) -> list[_Text]:
        """The tokens of texts; those of the latest are kept, since prompts come again."""
        new = sorted({text for text in texts if text not in self._kept}, key=len)
        for start in range(0, len(new), _TEXTS_AT_ONCE):
            part = new[start : start + _TEXTS_AT_ONCE]
            self._kept |= zip(part, self._embed(part), strict=True)
        found = [self._kept[text] for text in texts]
        while len(self._kept) > _TEXTS_KEPT:
            self._kept.popitem(last=False)
        return found

    @torch.no_grad()
    def _embed(self, texts: Sequence[str]) -> Iterable[_Text]:
        tokens, device = self.tokens(texts), device_of(self.network)
        with unmixed(device):
            found = self.network(
                input_ids=tokens.ids.to(device), attention_mask=tokens.mask.to(device)
            )
        vectors = found.last_hidden_state.float().cpu()
        made = self.tokens.made
        for row, ids, mask in zip(vectors, tokens.ids, tokens.mask, strict=True):
            count = int(mask.sum())
            units = row[:count] / row[:count].norm(dim=-1, keepdim=True)
            marks = (ids[:count] == made.cls_token_id) | (ids[:count] == made.sep_token_id)
            yield _Text(units, (~marks).float())


def agreement(candidate: _Text, reference: _Text) -> Agreement:
    """BERTScore of a candidate with its reference."""
    if not (candidate.weights.any() and reference.weights.any()):
        return Agreement(0.0, 0.0, 0.0)
    likeness = candidate.units @ reference.units.T
    precision = _mean(likeness.amax(1), candidate.weights)
    recall = _mean(likeness.amax(0), reference.weights)
    both = precision + recall
    return Agreement(precision, recall, 2 * precision * recall / both if both else 0.0)


def _mean(values: Tensor, weights: Tensor) -> float:
    return ((values * weights).sum() / weights.sum()).item()


# --- loading ---------------------------------------------------------------------------------


def taken(names: Iterable[str], layer: int) -> dict[str, str]:
    """Which tensors of a file the network up to a layer takes.

    What is left out is known: the layers behind, and the heads of other tasks.

    Args:
        names: in the file.
        layer: the last one used.

    Returns:
        The names in the file by those in the network.

    Raises:
        RewardUnavailable: where the file has a tensor that is unknown.
    """
    found = {}
    for name in names:
        own = name.removeprefix(_PREFIX)
        at = _LAYER.match(own)
        if _DROPS.match(own) or (at and int(at[1]) >= layer):
            continue
        if not own.startswith(("embeddings.", "encoder.")):
            raise RewardUnavailable(f"the weights have a tensor {name!r}, which DeBERTa has not")
        found[own] = name
    return found


def _network(folder: Path, dtype: str, layer: int) -> Any:
    from transformers import DebertaConfig, DebertaModel

    config = DebertaConfig.from_pretrained(folder, local_files_only=True)
    if not layer <= config.num_hidden_layers:
        raise RewardUnavailable(
            f"the network in {folder} has {config.num_hidden_layers} layers, and the {layer}th is "
            "wanted; give a larger one, such as deberta-xlarge-mnli"
        )
    config.num_hidden_layers = layer
    tensors = tensors_of(folder)
    state: Mapping[str, Tensor] = {o: tensors[n] for o, n in taken(tensors, layer).items()}
    try:
        return filled(lambda: DebertaModel(config), state, DTYPES[dtype])
    except RuntimeError as error:
        raise RewardUnavailable(
            f"the weights in {folder} are not those that its config.json describes; download the "
            f"folder again ({str(error).splitlines()[-1].strip()})"
        ) from error


def _tokenizer(folder: Path, reward: str, vocabulary: int) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        made = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, use_fast=True, model_max_length=_UNLIMITED
        )
    except (OSError, ValueError, TypeError) as error:
        raise _no_tokenizer(folder) from error
    if 2 * len(made) < vocabulary:  # transformers passes over files that it misses
        raise _no_tokenizer(folder)
    return Tokenizer(made, LONGEST, reward)


def _no_tokenizer(folder: Path) -> RewardUnavailable:
    return RewardUnavailable(
        f"the folder {folder} has no tokenizer that can be read; put tokenizer.json, or vocab.json "
        "and merges.txt, of deberta-xlarge-mnli into it"
    )


def weight_hashes(folder: Path) -> dict[str, str]:
    """The hash of each file of the folder's weights."""
    return {file.name: sha256_of(file) for file in files_of(folder)}
