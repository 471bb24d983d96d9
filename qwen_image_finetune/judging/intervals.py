"""95 % intervals of a mean: Student's t for few differences, the bootstrap for whatever else is averaged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# 0.975 quantiles of Student's t with 1, 2, ... 30 degrees of freedom (NIST/SEMATECH e-Handbook, 1.3.6.7.2).
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_NORMAL = 1.959964
RESAMPLES = 2000  # of the bootstrap


class Interval(NamedTuple):
    """A mean with its 95 % interval; one value alone has none, and its ends are infinite."""

    mean: float
    low: float
    high: float

    @property
    def words(self) -> str:
        return f"{self.mean:+.4f} (95 %: {self.low:+.4f} to {self.high:+.4f})"


def t_quantile(degrees: int) -> float:
    """The 0.975 quantile of Student's t, to 3 digits; beyond 30 degrees of freedom by Cornish and Fisher."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = _NORMAL
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def t_interval(values: Sequence[float]) -> Interval:
    """Mean of independent values; meant for differences of pairs, whose own spread cancels.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) == 1:
        return Interval(mean, -math.inf, math.inf)
    half = t_quantile(len(array) - 1) * float(array.std(ddof=1)) / math.sqrt(len(array))
    return Interval(mean, mean - half, mean + half)


def bootstrap(values: Sequence[float]) -> Interval:
    """Percentile bootstrap of the mean (Efron 1979): the same values always give the same interval.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    array = np.asarray(values, dtype=np.float64)
    if len(array) == 1:
        return Interval(float(array[0]), -math.inf, math.inf)
    chosen = np.random.default_rng(0).integers(0, len(array), (RESAMPLES, len(array)))
    low, high = np.quantile(array[chosen].mean(axis=1), [0.025, 0.975])
    return Interval(float(array.mean()), float(low), float(high))
