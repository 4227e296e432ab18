"""The public corpora from their public homes: every file at a named commit, checked against its pinned
SHA-256.

A file is written aside and renamed once its digest is right, so that nothing half written is ever found
under its name. IEMOCAP has no public home: its licence is asked for by a form.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

from selfemo_jax.data.manifest import SHA256, SOURCES, URLS

TRIES = 3
FIRST_WAIT = 1.0
"""Seconds before the second try; doubled before each further one."""
TIMEOUT = 30.0
"""Seconds without a byte."""
LARGEST = 64 << 20
"""Bytes of the largest file that is read; the largest published one has 1.1 MB."""


class FetchError(ValueError):
    """A file could not be had; the message says which, why, and how to get it by hand."""


class _Passing(Exception):
    """One request failed in a way that another may not."""


def files_of(names: Sequence[str]) -> tuple[str, ...]:
    """The downloadable files of data sets, as `meld/train_sent_emo.csv`. ValueError for a set that has
    none."""
    for name in names:
        if name not in SOURCES:
            raise ValueError(f"fetch: no data set {name!r}; expected any of {', '.join(SOURCES)}")
        if not any(file.startswith(f"{name}/") for file in URLS):
            raise ValueError(f"fetch: {name} cannot be downloaded: {SOURCES[name]}")
    return tuple(file for name in names for file in URLS if file.startswith(f"{name}/"))


def state_of(path: Path, sha256: str) -> str:
    """`missing`, `as published` or `not the published bytes`."""
    if not path.is_file():
        return "missing"
    same = hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    return "as published" if same else "not the published bytes"


def fetch_files(
    files: Sequence[str],
    root: Path,
    *,
    urls: Mapping[str, str] = URLS,
    sha256: Mapping[str, str] = SHA256,
    force: bool = False,
    first_wait: float = FIRST_WAIT,
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Bring the files under ``root``; file -> `kept`, `fetched` or `left` (other bytes under its name, not
    forced).

    What is there as published is not asked for again. FetchError when one cannot be had: those before it
    stay, and under its own name there is what was there before.
    """
    done: dict[str, str] = {}
    for file in files:
        path, state = root / file, state_of(root / file, sha256[file])
        if state == "as published":
            done[file] = "kept"
        elif state != "missing" and not force:
            done[file] = "left"
        else:
            try:
                _fetch(urls[file], path, sha256[file], first_wait)
            except FetchError as error:
                open_files = [name for name in files if name not in done]
                raise FetchError(f"{error}\n{_by_hand(open_files, urls, root)}") from None
            done[file] = "fetched"
        words = {
            "kept": "is there",
            "fetched": "fetched",
            "left": "not the published bytes; left as it is",
        }
        say(f"{path}: {words[done[file]]}")
    return done


def _fetch(url: str, path: Path, sha256: str, first_wait: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        found = ""
        for attempt in range(1, TRIES + 1):
            try:
                found = _download(url, part)
                break
            except _Passing as error:
                if attempt == TRIES:
                    raise FetchError(f"{url}: {error} ({TRIES} tries)") from None
                time.sleep(first_wait * 2 ** (attempt - 1))
        if found != sha256:
            raise FetchError(
                f"{url}: the file that came has SHA-256 {found[:16]}..., expected {sha256[:16]}...; it was "
                "thrown away. A proxy or a mirror that changes files may stand in between"
            )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _download(url: str, part: Path) -> str:
    """Write the body to ``part``; its SHA-256."""
    digest, size = hashlib.sha256(), 0
    try:
        with (
            httpx.stream("GET", url, follow_redirects=True, timeout=TIMEOUT) as response,
            part.open("wb") as file,
        ):
            if response.status_code in (408, 425, 429) or response.status_code >= 500:
                raise _Passing(f"HTTP {response.status_code}")
            if response.status_code != 200:
                raise FetchError(f"{url}: HTTP {response.status_code} {response.reason_phrase}")
            for chunk in response.iter_bytes():
                size += len(chunk)
                if size > LARGEST:
                    raise FetchError(f"{url}: more than {LARGEST >> 20} MiB came; this is not the file")
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except httpx.ConnectError as error:
        raise _Passing(f"no connection to {httpx.URL(url).host}: {error}") from None
    except httpx.TimeoutException:
        raise _Passing(f"no answer within {TIMEOUT:g} s") from None
    except (httpx.TransportError, httpx.DecodingError) as error:
        raise _Passing(f"the download broke off: {error}") from None
    except httpx.InvalidURL as error:
        raise FetchError(f"{url}: {error}") from None
    return digest.hexdigest()


def _by_hand(files: Sequence[str], urls: Mapping[str, str], root: Path) -> str:
    lines = "".join(f"\n  {urls[file]}\n    -> {root / file}" for file in files)
    return f"Nothing was written under that name. Without network, put these files there by hand:{lines}"
