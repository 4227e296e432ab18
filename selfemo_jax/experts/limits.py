"""What a server's headers say about waiting: Retry-After, and the usual rate-limit headers."""

import asyncio
import math
import random
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

SPREAD = 0.25
"""Requests held back together start within this share of the wait after its end, so that they do not collide
again."""
LARGEST_SPREAD = 5.0
"""Seconds."""

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
    """Holds back all requests to one server until the moment it asked for."""

    def __init__(self) -> None:
        self._open_at = 0.0
        self._spread = 0.0

    def block(self, seconds: float) -> None:
        """No request starts within so many seconds; the longest wait asked for holds."""
        if time.monotonic() + seconds > self._open_at:
            self._open_at = time.monotonic() + seconds
            self._spread = min(SPREAD * seconds, LARGEST_SPREAD)

    @property
    def left(self) -> float:
        """Seconds until it opens."""
        return max(0.0, self._open_at - time.monotonic())

    async def passed(self) -> None:
        """Return once it is open, requests one after the other."""
        while self.left > 0:
            await asyncio.sleep(self.left + random.uniform(0.0, self._spread))


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
