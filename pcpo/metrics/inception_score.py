"""The Inception Score, from batches in any order; memory does not grow with the images.

Of images x with class probabilities p(y|x) and their mean p(y), Salimans et al. 2016,
arXiv:1606.03498, take exp of the mean over x of KL(p(y|x) || p(y)). The images are shuffled into
ten splits; the mean and deviation of the splits' scores are reported. Which split an image is in
depends on its number alone, with the shuffle of torch-fidelity and dgm-eval (seed 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from .base import finite

SPLITS = 10
SEED = 2020


@dataclass(frozen=True, slots=True)
class Score:
    """An Inception Score.

    Attributes:
        mean: of the splits' scores, >= 1.
        std: their population deviation (no correction).
        images: number of images.
        note: one sentence that a reader must know; None if there is nothing to say.
    """

    mean: float
    std: float
    images: int
    note: str | None = None


def splits_of(total: int, splits: int = SPLITS, seed: int = SEED) -> Int64[Tensor, " n"]:
    """The split of each image, from 0 to `splits` - 1.

    The seed is that of numpy's legacy generator, whose stream is frozen.
    """
    order = np.random.RandomState(seed).permutation(total)
    splits_by_image = torch.empty(total, dtype=torch.int64)
    for split in range(splits):
        splits_by_image[order[split * total // splits : (split + 1) * total // splits]] = split
    return splits_by_image


class InceptionScore:
    """Takes in the logits of a known number of images, each once."""

    def __init__(self, total: int, splits: int = SPLITS) -> None:
        """Begin with no images."""
        if not 1 <= splits <= total:
            raise ValueError(
                f"an Inception Score over {splits} splits needs that many images at least, and "
                f"there are {total}"
            )
        self.total = total
        self.splits = splits
        self._split_of = splits_of(total, splits)
        self._sums: Float64[Tensor, "s c"] | None = None  # of p, by split
        self._logs = torch.zeros(splits, dtype=torch.float64)  # of p log p over images and classes
        self._seen = torch.zeros(total, dtype=torch.bool)

    def add(self, logits: Float[Tensor, "b c"], rows: Sequence[int]) -> None:
        """Take in a batch.

        Args:
            logits: Inception's, without the bias of its last layer.
            rows: the number of each image, from 0 to `total` - 1.

        Raises:
            ValueError: if a number is out of range or was seen already, or a logit is not finite;
                nothing is taken in then.
        """
        places = torch.as_tensor(rows, dtype=torch.int64)
        if len(places) != len(logits) or not all(0 <= row < self.total for row in rows):
            raise ValueError(
                f"{len(logits)} images with the numbers {list(rows)[:4]}... do not fit a score of "
                f"{self.total} images"
            )
        if len(set(rows)) < len(rows) or self._seen[places].any():
            raise ValueError("an image is taken into an Inception Score twice; give each once")
        logits = finite(logits.detach().to("cpu", torch.float64), "logits")
        logs = logits.log_softmax(1)
        chances = logs.exp()
        if self._sums is None:
            self._sums = torch.zeros(self.splits, logits.shape[1], dtype=torch.float64)
        into = self._split_of[places]
        self._sums.index_add_(0, into, chances)
        self._logs.index_add_(0, into, (chances * logs).sum(1))
        self._seen[places] = True

    def result(self) -> Score:
        """The score of the images so far, with a note if images are missing or few.

        Raises:
            ValueError: if a split has no image yet.
        """
        counts = torch.bincount(self._split_of[self._seen], minlength=self.splits).double()
        if self._sums is None or not counts.all():
            raise ValueError(
                f"of {self.total} images {int(self._seen.sum())} are there, too few for each of "
                f"{self.splits} splits to have one"
            )
        means = self._sums / counts[:, None]
        entropies = torch.special.entr(means).sum(1)
        scores = (self._logs / counts + entropies).exp()
        mean, std = float(scores.mean()), float(scores.std(correction=0))
        return Score(mean, std, int(counts.sum()), self._note(int(counts.min()), means.shape[1]))

    def _note(self, least: int, classes: int) -> str | None:
        missing = self.total - int(self._seen.sum())
        told = [f"{missing} of {self.total} images are missing"] if missing else []
        if least < classes:
            told.append(
                f"a split has {least} images, and no score can be larger than that number: it is "
                "comparable only with scores of as many images"
            )
        return "; ".join(told) or None
