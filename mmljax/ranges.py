"""What a number of a config may be, as annotations of the schema's fields."""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple


class Range(NamedTuple):
    """Finite numbers from ``least`` to ``most``, without ``least`` itself where it is excluded."""

    least: float
    most: float = math.inf
    excluded: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is in the range."""
        enough = value > self.least if self.excluded else value >= self.least
        return enough and value <= self.most and math.isfinite(value)

    def __str__(self) -> str:
        start = f"{'above' if self.excluded else 'at least'} {self.least:g}"
        return start if self.most == math.inf else f"{start} and at most {self.most:g}"


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, excluded=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, excluded=True)]
Decay = Annotated[float, Range(0, 0.999999)]  # of a running mean: at 1 it would never move
