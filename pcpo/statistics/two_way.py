"""The mean of a table whose rows and columns are both samples, with its interval.

    y_ij = mu + a_i + b_j + e_ij,  a ~ N(0, s_a^2),  b ~ N(0, s_b^2),  e ~ N(0, s_e^2)

Rows are seeds and columns prompts, for example. An interval over seeds alone holds for these
prompts, and the other way round; this one holds for other seeds and other prompts.
"""

from __future__ import annotations

import numpy as np


def two_way_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a mean over rows and columns.

    With mean squares M of rows, columns and the rest, the mean's variance is estimated by
    (M_row + M_col - M_rest) / (n m) (Searle, Casella and McCulloch 1992, ch. 4), and its degrees of
    freedom by Satterthwaite (1946). No component is taken as negative. With one column, it is
    Student's interval over the rows.

    >>> two_way_interval(np.array([[1.0, 2.0], [3.0, 4.0]]))[0] < 1.0
    True

    Args:
        values: (rows, columns), at least two rows.
        confidence: between 0 and 1.

    Raises:
        ValueError: for fewer than two rows.
    """
    rows, columns = values.shape
    if rows < 2:
        raise ValueError(f"an interval over rows needs two at least; there are {rows}")
    by_row, by_column, mean = values.mean(1), values.mean(0), values.mean()
    of_rows, of_columns = columns * by_row.var(ddof=1), 0.0
    rest, freedom = 0.0, rows - 1.0
    if columns > 1:
        of_columns = rows * by_column.var(ddof=1)
        apart = values - by_row[:, None] - by_column + mean
        rest = np.square(apart).sum() / ((rows - 1) * (columns - 1))
        of_rows, of_columns = max(of_rows, rest), max(of_columns, rest)
        parts = np.array([of_rows, of_columns, -rest])
        each = np.array([rows - 1, columns - 1, (rows - 1) * (columns - 1)])
        spread = (parts**2 / each).sum()
        freedom = max(1.0, parts.sum() ** 2 / spread) if spread > 0 else freedom
    variance = (of_rows + of_columns - rest) / values.size
    half = float(student_quantile((1 + confidence) / 2, freedom) * np.sqrt(variance))
    return float(mean) - half, float(mean) + half


def student_quantile(share: float, freedom: float) -> float:
    """The quantile of Student's t.

    With t = sqrt(freedom) tan(angle), the angle has the density cos(angle)^(freedom - 1), which is
    summed on a grid.

    >>> round(student_quantile(0.975, 4), 3)
    2.776

    Args:
        share: below it, from 0.5 to less than 1.
        freedom: degrees of freedom, >= 1, whole or not.

    Returns:
        The quantile, right to about 1e-6 of itself where share <= 0.999.
    """
    angles = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = np.interp(2 * share - 1, below / below[-1], angles)
    return float(np.sqrt(freedom) * np.tan(angle))
