"""How far a vision language model's description of a picture says what its prompt says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import versions_of
from ..pictures.tensors import Images, pictures_of
from ..pretrained.find import find
from ..pretrained.network import DTYPES
from ..scores import Scores
from .bert_score import LAYER, Bert, weight_hashes
from .chat import ChatReward

PLACE = "{prompt}"
"""Placeholder for the prompt in the reference."""


@dataclass(frozen=True, eq=False)
class VlmBertScore(ChatReward):
    """BERTScore recall of the prompt in a language model's description of the picture (DDPO).

    Source: Black et al. 2024, who ask LLaVA; PCPO asks Qwen2.5-VL-3B, whose licence is for
    research alone, unlike that of its 7B. An empty description is worth 0.

    Attributes:
        weights: folder of DeBERTa XLarge MNLI; it is searched where None.
        folders: where it is searched first.
        dtype: of DeBERTa: "float32", "float16" or "bfloat16".
        question: that the model is asked about the picture.
        reference: what its answer is compared with; each "{prompt}" is replaced by the prompt.
    """

    name: ClassVar[str] = "vlm_bert_score"
    needs_prompt: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    unit: ClassVar[str] = "recall"
    weights: str | None = None
    folders: list[str] = field(default_factory=list)
    dtype: str = "float32"
    question: str = "Answer concisely: what is going on in this image?"
    reference: str = "The image contains {prompt}"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        if isinstance(self.folders, str):
            raise ValueError(f"folders is {self.folders!r}; give a list of folders")
        if not isinstance(self.question, str) or not self.question.strip():
            raise ValueError(f"question is {self.question!r}; ask for a description")
        if not isinstance(self.reference, str) or PLACE not in self.reference:
            raise ValueError(f"reference is {self.reference!r}; it has to have {PLACE} in it")
        _ = self.folder  # what is missing is said at once

    @cached_property
    def folder(self) -> Path:
        return find("deberta", self.folders, self.weights)

    @cached_property
    def bert(self) -> Bert:
        return Bert(self.folder, self.dtype, self.name, LAYER)

    def modules(self) -> list[nn.Module]:
        return [self.bert.network]

    def fingerprint(self) -> dict[str, Any]:
        """What its numbers depend on: both models, the question and the reference."""
        return {
            "reward": self.name,
            "question": self.question,
            "reference": self.reference,
            **self.identity(),
            "weights": {"layer": LAYER, "sha256": weight_hashes(self.folder)},
            "dtype": self.dtype,
            "versions": versions_of("torch", "transformers", "pillow"),
        }

    def measure(self, images: Images, prompts: Sequence[str]) -> Scores:
        """Have each image described, and compare the description with its prompt."""
        said = self.ask(pictures_of(images), [self.question] * len(prompts))
        described = {row: one.text for row, one in enumerate(said) if one.text is not None}
        references = [self.reference.replace(PLACE, prompts[row]) for row in described]
        agreements = self.bert.agreements(list(described.values()), references)
        values = torch.full((len(said),), float("nan"))
        details: list[Mapping[str, float]] = [{} for _ in said]
        for row, one in zip(described, agreements, strict=True):
            values[row], details[row] = one.recall, asdict(one)
        return Scores(values, tuple(details), tuple(one.why for one in said))
