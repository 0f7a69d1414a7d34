"""The score that a vision language model gives a picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..pictures.tensors import Images, pictures_of
from ..remote.http import excerpt
from ..scores import Scores
from .chat import ChatReward, Said

MOST = 1e6
"""Largest score allowed, and minus it the smallest."""

PLACE = "{prompt}"
"""Placeholder for the prompt in a question."""

QUESTION = (
    'How well does this image show "{prompt}"? Answer with one number from 0 (not at all) to 10 '
    "(perfectly), and nothing else."
)
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?!\w)")


def mark_in(text: str, lowest: float, highest: float) -> float:
    """The number in an answer, from `lowest` to `highest`.

    Where the answer repeats the scale ("7/10", "7 out of 10", "on a scale of 0 to 10: 7"), the
    scale is skipped. What is left has to be one number, within the scale.

    >>> mark_in("**Score: 7.5 / 10.**", 0, 10), mark_in("From 0 to 10 it is a 3", 0, 10)
    (7.5, 3.0)

    Raises:
        ValueError: if there is no such number, or more than one.
    """
    low, high = (rf"{re.escape(f'{end:g}')}(?:\.0+)?(?![\w]|\.\d)" for end in (lowest, highest))
    scale = rf"(?<![\w.])\(?{low}\s*(?:-|–|—|to|and)\s*{high}\)?|(?:/|\bout of\b|\bof\b)\s*{high}"
    numbers = {float(number) for number in NUMBER.findall(re.sub(scale, " ", text))}
    if len(numbers) != 1:
        many = "no number" if not numbers else "more than one number"
        raise ValueError(f"the language model's answer has {many}: {excerpt(text)!r}")
    mark = numbers.pop()
    if not lowest <= mark <= highest:
        raise ValueError(
            f"the language model's answer is not from {lowest:g} to {highest:g}: {excerpt(text)!r}"
        )
    return mark


@dataclass(frozen=True)
class VlmJudge(ChatReward):
    """The number that a vision language model answers a question about the picture with.

    Attributes:
        question: about the picture; each "{prompt}" in it is replaced by the prompt.
        lowest: lowest mark of the scale.
        highest: largest one.
    """

    name: ClassVar[str] = "vlm_judge"
    unit: ClassVar[str] = "points"
    question: str = QUESTION
    lowest: float = 0.0
    highest: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.question, str) or not self.question.strip():
            raise ValueError(f"question is {self.question!r}; ask for one number, with {PLACE}")
        if not -MOST <= self.lowest < self.highest <= MOST:
            raise ValueError(
                f"lowest is {self.lowest} and highest {self.highest}; give the ends of the scale "
                "that the question asks for"
            )

    @property
    def needs_prompt(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return PLACE in self.question

    @property
    def bounds(self) -> tuple[float, float]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.lowest, self.highest

    def fingerprint(self) -> dict[str, Any]:
        """What its numbers depend on: the model and the question."""
        scale = {"lowest": self.lowest, "highest": self.highest}
        return {"reward": self.name, "question": self.question, **scale, **self.identity()}

    def measure(self, images: Images, prompts: Sequence[str]) -> Scores:
        """Ask about each image, and read the number."""
        questions = [self.question.replace(PLACE, prompt) for prompt in prompts]
        marks = [self._mark(said) for said in self.ask(pictures_of(images), questions)]
        return Scores(
            torch.tensor([mark for mark, _ in marks]), errors=tuple(why for _, why in marks)
        )

    def _mark(self, said: Said) -> tuple[float, str | None]:
        if said.text is None:
            return float("nan"), said.why
        try:
            return mark_in(said.text, self.lowest, self.highest), None
        except ValueError as error:
            return float("nan"), str(error)
