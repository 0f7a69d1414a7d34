"""BERTScore: how much of one text another text says, by DeBERTa's vectors of their tokens.

Zhang et al. 2020, with the model that its authors advise: the 40th layer of DeBERTa XLarge MNLI,
without weights for rare words and without rescaling. Each token is matched with the most similar
token of the other text; recall is the mean over the reference's tokens, precision over the
candidate's. The special tokens at the ends have no weight in these means, but can be matched.
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
from torch.nn.utils.rnn import pad_sequence

from ..errors import RewardUnavailable
from ..pretrained.network import DTYPES, build_frozen, device_of, no_autocast
from ..pretrained.read import files_of, sha256_of, tensors_of
from ..pretrained.tokenizers import Tokenizer

log = logging.getLogger(__name__)

LAYER = 40
LONGEST = 512
"""Most tokens of a text, special tokens included."""

_TEXTS_KEPT = 512
_TEXTS_AT_ONCE = 32
_PREFIX = "deberta."
_UNLIMITED = 10**9
_DROPS = re.compile(r"pooler\.|classifier\.|lm_predictions\.|cls\.|embeddings\.position_ids$")
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Agreement:
    """BERTScore of a candidate with its reference; all are 0 if either is empty.

    Attributes:
        precision: how much of the candidate the reference says.
        recall: how much of the reference the candidate says.
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
        weights: 1, or 0 for the special tokens at the ends.
    """

    units: Float32[Tensor, "t d"]
    weights: Float32[Tensor, " t"]


class Bert:
    """DeBERTa up to a layer, and its tokenizer."""

    def __init__(self, folder: Path, dtype: str, reward: str, layer: int = LAYER) -> None:
        """Load the network and its tokenizer.

        Args:
            dtype: of the network, a key of `DTYPES`; what follows it is float32.
            layer: whose vectors are compared, counted from 1.
        """
        self.network = _network(folder, dtype, layer)
        self.tokens = _tokenizer(folder, reward, self.network.config.vocab_size)
        self._kept: OrderedDict[str, _Text] = OrderedDict()

    def agreements(self, candidates: Sequence[str], references: Sequence[str]) -> list[Agreement]:
        """Compare each candidate with its reference."""
        texts = self._read([text.strip() for text in (*candidates, *references)])
        return agreements(texts[: len(candidates)], texts[len(candidates) :])

    def _read(self, texts: Sequence[str]) -> list[_Text]:
        """The tokens of texts; the latest are kept, since prompts come again."""
        new = sorted({text for text in texts if text not in self._kept}, key=len)
        for start in range(0, len(new), _TEXTS_AT_ONCE):
            part = new[start : start + _TEXTS_AT_ONCE]
            self._kept |= zip(part, self._embed(part), strict=True)
        read = [self._kept[text] for text in texts]
        while len(self._kept) > _TEXTS_KEPT:
            self._kept.popitem(last=False)
        return read

    @torch.no_grad()
    def _embed(self, texts: Sequence[str]) -> list[_Text]:
        tokens, device = self.tokens(texts), device_of(self.network)
        with no_autocast(device):
            output = self.network(
                input_ids=tokens.ids.to(device), attention_mask=tokens.mask.to(device)
            )
        vectors = output.last_hidden_state.float().cpu()
        units = vectors / vectors.norm(dim=-1, keepdim=True)
        made = self.tokens.made
        marks = (tokens.ids == made.cls_token_id) | (tokens.ids == made.sep_token_id)
        weights, counts = (~marks).float(), tokens.mask.sum(1).tolist()
        return [
            _Text(u[:n].clone(), w[:n].clone())
            for u, w, n in zip(units, weights, counts, strict=True)
        ]


def agreements(candidates: Sequence[_Text], references: Sequence[_Text]) -> list[Agreement]:
    """BERTScore of each candidate with its reference."""
    if not candidates:
        return []
    (c, c_weights), (r, r_weights) = _pad(candidates), _pad(references)
    is_pair = (c_weights >= 0)[:, :, None] & (r_weights >= 0)[:, None, :]
    likeness = (c @ r.mT).masked_fill(~is_pair, float("-inf"))
    precision, recall = _mean(likeness.amax(2), c_weights), _mean(likeness.amax(1), r_weights)
    is_empty = precision.isnan() | recall.isnan()
    f1 = 2 * precision * recall / (precision + recall)
    rows = torch.stack([precision, recall, f1]).masked_fill(is_empty, 0).nan_to_num(0).T
    return [Agreement(*row) for row in rows.tolist()]


def _pad(texts: Sequence[_Text]) -> tuple[Float32[Tensor, "b t d"], Float32[Tensor, "b t"]]:
    """Pad vectors and weights to the longest text; padding has weight -1."""
    units = pad_sequence([text.units for text in texts], batch_first=True)
    weights = pad_sequence([text.weights for text in texts], batch_first=True, padding_value=-1)
    return units, weights


def _mean(values: Float32[Tensor, "b t"], weights: Float32[Tensor, "b t"]) -> Tensor:
    """The mean over entries of weight 1, NaN if there are none."""
    counts = weights > 0
    return torch.where(counts, values, 0).sum(1) / counts.sum(1)


# --- loading ---------------------------------------------------------------------------------


def network_names(names: Iterable[str], layer: int) -> dict[str, str]:
    """Map the names in a network up to `layer` to those in a file.

    Later layers and the heads of other tasks are left out.

    Raises:
        RewardUnavailable: if the file has an unknown tensor.
    """
    names_here = {}
    for name in names:
        own = name.removeprefix(_PREFIX)
        at = _LAYER.match(own)
        if _DROPS.match(own) or (at and int(at[1]) >= layer):
            continue
        if not own.startswith(("embeddings.", "encoder.")):
            raise RewardUnavailable(f"the weights have a tensor {name!r}, which DeBERTa has not")
        names_here[own] = name
    return names_here


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
    state: Mapping[str, Tensor] = {o: tensors[n] for o, n in network_names(tensors, layer).items()}
    try:
        return build_frozen(lambda: DebertaModel(config), state, DTYPES[dtype])
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
    return {file.name: sha256_of(file) for file in files_of(folder)}
