"""The numbers that settings may hold, each with its bounds in words."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(frozen=True)
class Bounds:
    """The values a number may take; part of its annotation."""

    words: str
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        """Whether the value is finite and inside; NaN never is."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and math.isfinite(value)

    def __repr__(self) -> str:
        return self.words


Count = Annotated[int, Bounds("1 or more", low=1)]
Natural = Annotated[int, Bounds("0 or more", low=0)]
Finite = Annotated[float, Bounds("a finite number")]
NotNegative = Annotated[float, Bounds("0 or more", low=0)]
Positive = Annotated[float, Bounds("above 0", low=0, open_low=True)]
Share = Annotated[float, Bounds("from 0 to 1", low=0, high=1)]
Decay = Annotated[float, Bounds("from 0 to below 1", low=0, high=1, open_high=True)]
DType = Literal["float32", "bfloat16"]
