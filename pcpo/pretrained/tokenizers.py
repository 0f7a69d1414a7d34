"""From prompts to tokens; what exceeds a network's length is cut, with a warning."""

from __future__ import annotations

import html
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

log = logging.getLogger(__name__)

CLIP_TOKENIZER = Path(__file__).parent / "clip_tokenizer"
CLIP_LONGEST = 77
"""Most tokens of CLIP's text tower, start and end included."""

_UNLIMITED = 10**9  # tokens; tokenizers only warn of their limit, and know nothing of the reward


@dataclass(frozen=True, slots=True)
class Tokens:
    """Prompts as a network takes them.

    Attributes:
        ids: rows padded to equal lengths.
        mask: 1 for a token of the prompt, 0 for padding.
    """

    ids: Int64[Tensor, "b t"]
    mask: Int64[Tensor, "b t"]


class Tokenizer:
    """Tokenizes prompts for one reward.

    A prompt that is too long loses its last words and keeps its end token; this is logged once.
    """

    def __init__(
        self, made: Any, longest: int, reward: str, clean: Callable[[str], str] | None = None
    ) -> None:
        """Wrap a tokenizer of transformers."""
        self.made, self.longest, self.reward = made, longest, reward
        self.clean = clean or str
        self.has_told = False

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Tokenize prompts, cutting each to the most tokens allowed."""
        rows = self.made([_encodable(self.clean(prompt)) for prompt in prompts])["input_ids"]
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) > self.longest:
                self._tell(prompt, len(row))
                row[self.longest - 1 :] = row[-1:]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.made.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        return Tokens(ids, mask)

    def _tell(self, prompt: str, count: int) -> None:
        if not self.has_told:
            log.warning(
                "the reward %r reads %d tokens of a prompt at most, and no more of longer ones: "
                "%r has %d (this is said once)",
                *(self.reward, self.longest, f"{prompt[:60]}...", count),
            )
        self.has_told = True


def _encodable(prompt: str) -> str:
    """Replace lone surrogates, which JSON can hold and no tokenizer reads."""
    return prompt.encode("utf-8", "replace").decode()


def clip_tokenizer(reward: str, clean: Callable[[str], str] | None = None) -> Tokenizer:
    """CLIP's tokenizer of transformers, from the files shipped with this package."""
    from transformers import CLIPTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    made = CLIPTokenizerFast.from_pretrained(
        CLIP_TOKENIZER, local_files_only=True, model_max_length=_UNLIMITED
    )
    return Tokenizer(made, CLIP_LONGEST, reward, clean)


def bert_tokenizer(reward: str, vocabulary: Path, longest: int) -> Tokenizer:
    """BERT's tokenizer (uncased).

    Args:
        reward: its name in messages.
        vocabulary: path of `vocab.txt`.
        longest: most tokens, start and end included.

    Raises:
        RuntimeError: if transformers did not read the vocabulary.
    """
    from transformers import BertTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    # By place: transformers 5 calls this argument `vocab` and passes over a `vocab_file` silently.
    made = BertTokenizerFast(
        str(vocabulary), do_lower_case=True, model_max_length=_UNLIMITED, verbose=False
    )
    count = len(vocabulary.read_text(encoding="utf-8").splitlines())
    if len(made) != count:
        raise RuntimeError(f"the tokenizer read {len(made)} tokens of {count} in {vocabulary}")
    return Tokenizer(made, longest, reward)


def has_ftfy() -> bool:
    """Whether prompts can be cleaned as OpenAI's tokenizer cleans them."""
    return find_spec("ftfy") is not None


def clean_prompt(prompt: str) -> str:
    """Clean a prompt as OpenAI's and open_clip's tokenizers do; transformers' does not.

    ftfy mends broken letters and typographic quotes, if it is installed; HTML entities are resolved
    twice; white space becomes single spaces.

    >>> clean_prompt(" a cat &amp;amp;  a\\n dog ")
    'a cat & a dog'
    """
    if has_ftfy():
        import ftfy

        prompt = ftfy.fix_text(prompt)
    return " ".join(html.unescape(html.unescape(prompt)).split())
