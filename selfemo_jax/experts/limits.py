"""What a server's headers say about waiting: Retry-After, and the usual rate-limit headers."""

import asyncio
import math
import random
import re
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime

from selfemo_jax.experts.ask import ExpertError

SPREAD = 0.25
"""Requests held back together start within this share of the wait after its end, so that they do not collide
again."""
LARGEST_SPREAD = 5.0
"""Seconds."""
SLICE = 0.5
"""Seconds after which a wait looks whether it is still wanted."""
TOLD = 30.0
"""Seconds of a wait from which the person who started the run is told of it."""

_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?!s))?"
                       r"(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?")  # fmt: skip
_UNITS = (86400.0, 3600.0, 60.0, 1.0, 0.001)


def retry_after(headers: Mapping[str, str], *, now: float) -> float | None:
    """Seconds that `Retry-After` (seconds or a date) or `retry-after-ms` asks to wait; None without either.

    ``now`` is the time of day in seconds since 1970.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    if text is None:
        return None
    seconds = _number(text)
    if seconds is not None:
        return seconds
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return None


def reset_wait(headers: Mapping[str, str], *, tokens: int, now: float) -> float:
    """Seconds until the server takes another request of ``tokens`` tokens, by its rate-limit headers; 0 when
    it takes one now, or does not say."""
    wait = 0.0
    for kind, needed in (("requests", 1), ("tokens", tokens)):
        for prefix, suffix in (("x-ratelimit", f"-{kind}"), ("ratelimit", "")):
            remaining = _number(headers.get(f"{prefix}-remaining{suffix}"))
            if remaining is not None and remaining < (needed if suffix else 1):
                wait = max(wait, _duration(headers.get(f"{prefix}-reset{suffix}"), now))
    return wait


class Gate:
    """Holds back all requests to one server until the moment it asked for.

    ``longest`` seconds is the wait that may be asked for; ``ending`` says that nothing is to be begun any
    more, which ends every wait.
    """

    def __init__(
        self,
        name: str,
        *,
        longest: float,
        ending: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = print,
    ):
        self._name, self._longest, self._ending, self._say = name, longest, ending, say
        self._open_at = 0.0
        self._spread = 0.0

    def block(self, seconds: float) -> None:
        """No request starts within so many seconds; the longest wait asked for holds."""
        before = self.left
        if seconds <= before:
            return
        self._open_at = time.monotonic() + seconds
        self._spread = min(SPREAD * seconds, LARGEST_SPREAD)
        # Requests that were sent together come back with nearly the same wait: it is told once.
        if before + TOLD < seconds <= self._longest:
            self._say(
                f"expert {self._name}: the server asks to wait {seconds:.0f} s; nothing is asked until then"
            )

    @property
    def left(self) -> float:
        """Seconds until it opens."""
        return max(0.0, self._open_at - time.monotonic())

    def check(self) -> None:
        """ExpertError where the server asks for more than the longest wait."""
        if self.left > self._longest:
            raise ExpertError(
                f"expert {self._name}: the server asks to wait {self.left:.1f} s, more than expert.deadline "
                f"{self._longest:g}; start again later"
            )

    async def passed(self) -> bool:
        """Return once it is open, requests one after the other: whether one may still begin. ExpertError as
        `check`."""
        share = random.random() if self.left else 0.0
        while (left := self._open_at + share * self._spread - time.monotonic()) > 0 and not self._ending():
            self.check()
            await asyncio.sleep(min(left, SLICE))
        return not self._ending()

    async def wait(self, seconds: float) -> None:
        """Return after so many seconds, or when nothing is to be begun any more."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._ending():
            await asyncio.sleep(min(left, SLICE))


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else None
    except ValueError:
        return None
    return value if value is not None and math.isfinite(value) and value >= 0 else None


def _duration(text: str | None, now: float) -> float:
    """`1m30s`, `20ms`, plain seconds, seconds since 1970, or an ISO date, as seconds from now."""
    if text is None:
        return 0.0
    text = text.strip()
    seconds = _number(text)
    if seconds is not None:
        return seconds - now if seconds > 1e9 and seconds >= now else 0.0 if seconds > 1e9 else seconds
    if text and (match := _DURATION.fullmatch(text)):
        return sum(float(part) * unit for part, unit in zip(match.groups(), _UNITS, strict=True) if part)
    try:
        from datetime import datetime

        return max(0.0, datetime.fromisoformat(text).timestamp() - now)
    except ValueError:
        return 0.0
