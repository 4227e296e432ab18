"""What a run resumes from: the newest complete step, and its logs taken back to it."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfemo_jax import phases as plans
from selfemo_jax.appendlog import AppendLog, atomic_write
from selfemo_jax.checkpoint import StateStore
from selfemo_jax.distributed import any_of, from_first, is_first
from selfemo_jax.phases import Phase
from selfemo_jax.rollout.records import set_aside
from selfemo_jax.run_scores import final_file

_EMPTY_SHA256 = hashlib.sha256().hexdigest()
_AGREED_EVERY = 16
"""Answers after which hosts agree whether to stop."""

Resumed = tuple[int, dict[str, Any]]
"""Global step of a saved state, and its record."""


class Stopped(Exception):
    """The run stopped with everything saved; `--resume` goes on."""


def stop_check(why: Callable[[], str], run_dir: Path) -> Callable[[], None]:
    """What ends the scoring of whole splits once ``why`` gives a reason; hosts agree every few calls."""
    calls = itertools.count(1)

    def check() -> None:
        if next(calls) % _AGREED_EVERY == 0 and (reason := any_of(why(), channel="stop")):
            raise Stopped(
                f"{reason} while whole splits are scored; all phases are saved, go on with --resume "
                f"--run_dir {run_dir}"
            )

    return check


@dataclass(frozen=True, kw_only=True)
class At:
    """Where a phase begins or goes on: steps done, and the input iterator's state (None at the beginning)."""

    step: int
    iterator: Mapping[str, Any] | None


def newest_point(
    run_dir: Path, plan: tuple[Phase, ...], store: StateStore
) -> tuple[dict[str, Any] | None, Resumed | None]:
    """The record to go on from (None: from the very beginning), and the saved state inside the open phase.

    ValueError where the run is finished.
    """
    first = plans.first_open(run_dir, plan)
    if first == len(plan) and final_file(run_dir).exists():
        raise ValueError(f"--resume: {run_dir} is finished; its scores are in {final_file(run_dir)}")
    for step in reversed(store.steps()):
        meta = store.meta(step)
        if meta["position"]["phase"] == first:
            return meta, (step, meta)
        # Phases rise with the steps: no older state is of use, and of the oldest a kill may have left half.
        if meta["position"]["phase"] < first:
            break
    return (plans.record_of(run_dir, plan[first - 1]) if first > 0 else None), None


def check_same_data(point: Mapping[str, Any], fingerprint: str, run_dir: Path) -> None:
    """ValueError where the labelled inputs are not those of the run."""
    if point["fingerprint"] != fingerprint:
        raise ValueError(
            f"--resume: the labelled inputs are not those that {run_dir} was trained on (SHA-256 "
            f"{fingerprint[:12]}..., recorded {point['fingerprint'][:12]}...); give it the "
            "same data.root and files, or start a new run"
        )


def take_back(
    run_dir: Path,
    point: Mapping[str, Any],
    logs: Mapping[str, AppendLog],
    *,
    into: Path,
    say: Callable[[str], None],
) -> None:
    """Cut every log to what the record holds of it and set later rollouts aside; ValueError where a log lost
    content. Of several processes the first one does."""
    if not is_first():
        return
    for name, log in logs.items():
        length, digest = point["logs"].get(name, (0, _EMPTY_SHA256))
        if beyond := log.truncate_to(length, digest, into):
            say(f"{name}: {beyond} bytes after the checkpoint moved to {into}")
    if moved := set_aside(run_dir, after=point["position"]["global_step"], into=into):
        say(f"rollouts of {moved} steps after the checkpoint moved to {into}")


def resumes(run_dir: str | None, resume: str | None) -> bool:
    """Whether the command goes on with a run; ValueError where it asks for one that is not there."""
    existing = from_first(
        lambda: run_dir is not None and (Path(run_dir) / "metrics.jsonl").exists(), channel="resumes"
    )
    if resume == "latest" and not existing:
        raise ValueError(f"--resume: {run_dir} holds no run; name its folder by --run_dir")
    return bool(resume) and existing


@contextmanager
def settings_restored_on_error(kept: Mapping[Path, bytes]) -> Iterator[None]:
    """Write the files back when the block raises a ValueError.

    A refused start must not leave its settings to the run that is there.
    """
    try:
        yield
    except ValueError:
        for path, content in kept.items():
            atomic_write(path, content)
        raise


def settings_of(run_dir: str | None) -> dict[Path, bytes]:
    """The files that a start writes over: of the run that it goes on with, or of one that somebody else may
    just have begun."""
    named = ("config.yaml", "env.json") if is_first() else ()
    files = [Path(run_dir or ".") / name for name in named]
    return {path: path.read_bytes() for path in files if path.exists()}
