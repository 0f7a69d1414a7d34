"""Numbers and tables as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Sequence[str]]


def with_interval(estimate: Mapping[str, Any] | None, form: str = "{:.4g}") -> str:
    """A mean with its interval, where they are known.

    >>> with_interval({"mean": 2.0, "low": 1.5, "high": 3.0})
    '2 [1.5, 3]'
    """
    if estimate is None or estimate["mean"] is None:
        return "not known"
    mean = form.format(estimate["mean"])
    if estimate["low"] is None:
        return mean
    return f"{mean} [{form.format(estimate['low'])}, {form.format(estimate['high'])}]"


def align_columns(rows: Rows, right: int) -> str:
    """Rows in columns: the first `right` columns stand to the right, the others to the left.

    >>> align_columns([["rank", "name"], ["1", "one"]], 1)
    'rank  name\\n   1  one'
    """
    columns = [_column(c, is_right=i < right) for i, c in enumerate(zip(*rows, strict=True))]
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def markdown(head: Sequence[str], rows: Rows, *, right: int | None = None) -> str:
    """A Markdown table whose columns are aligned in the text as well.

    >>> print(markdown(["name", "score"], [["a|b", "0.5"]], right=1), end="")
    | name | score |
    | ---- | ----: |
    | a\\|b |   0.5 |

    Args:
        head: the names of the columns.
        rows: their cells.
        right: the first column of those that stand to the right; None if none does.
    """
    columns = []
    for i, column in enumerate(zip(head, *rows, strict=True)):
        is_right = right is not None and i >= right
        first, *cells = _column([c.replace("|", "\\|") for c in column], is_right=is_right, least=3)
        columns.append([first, "-" * (len(first) - is_right) + ":" * is_right, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in zip(*columns, strict=True))


def _column(cells: Sequence[str], *, is_right: bool, least: int = 0) -> list[str]:
    """The cells of a column, as wide as the widest."""
    width = max(least, *map(len, cells))
    return [cell.rjust(width) if is_right else cell.ljust(width) for cell in cells]
