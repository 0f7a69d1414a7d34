"""How far the text read in a picture agrees with the text asked for."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
from numpy.typing import NDArray

QUOTES = re.compile(r'"([^"]*)"|“([^“”]*)”')
"""Text in straight or curly double quotes."""


def quoted_text(prompt: str) -> str | None:
    """The first text in double quotes, None if there is none or it is blank.

    >>> quoted_text('A sign that says "Open 24 h", and "Exit"')
    'Open 24 h'
    """
    match = QUOTES.search(prompt)
    text = (match[1] or match[2] or "") if match else ""
    return text if text.strip() else None


def squeeze(text: str) -> str:
    """The text in lower case without white space, as Flow-GRPO compares it."""
    return "".join(text.split()).lower()


def edit_distance(first: str, second: str) -> int:
    """Fewest insertions, deletions and replacements that make one text the other (Levenshtein).

    One row of the table at a time: what a replacement or a deletion costs is known from the row
    above; then insertions run along the row, which is a cumulative minimum once each entry has its
    own column taken off.

    >>> edit_distance("kitten", "sitting")
    3
    """
    characters, columns = _codes(second), np.arange(len(second) + 1)
    row = columns
    for number, character in enumerate(_codes(first), start=1):
        replaced = row[:-1] + (characters != character)
        begun = np.concatenate([[number], np.minimum(replaced, row[1:] + 1)])
        row = np.minimum.accumulate(begun - columns) + columns
    return int(row[-1])


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def edit_score(read: str, target: str) -> float:
    """Flow-GRPO's text reward (Liu et al. 2025): 1 - distance / length, 0 to 1.

    Both are squeezed first. A target that occurs anywhere in the text read counts as right; it has
    at least one character that is not white space.

    >>> edit_score("OPEN 24 hours", "open24"), edit_score("Hallo", "Hello"), edit_score("", "Hi")
    (1.0, 0.8, 0.0)
    """
    read, target = squeeze(read), squeeze(target)
    if target in read:
        return 1.0
    return 1 - min(edit_distance(read, target), len(target)) / len(target)


def exact_score(read: str, target: str) -> float:
    """1 if both are the same but for white space and case, else 0."""
    return float(squeeze(read) == squeeze(target))


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation.

    >>> words("Don't stop, NOW -- or 2.5!")
    ["don't", 'stop', 'now', 'or', '2', '5']
    """
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def word_f1(read: str, target: str) -> float:
    """Twice the words in common over the words of both, each counted as often as it occurs.

    >>> word_f1("open open now", "Now OPEN!")
    0.8

    0 to 1; 1 also if both have no words but are the same.
    """
    present, wanted = Counter(words(read)), Counter(words(target))
    if not present and not wanted:
        return exact_score(read, target)
    return 2 * (present & wanted).total() / (present.total() + wanted.total())
