"""Whether runs that lie there are those that a study would make now: results of other settings must not be
taken for them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from selfemo_jax.config import Config
from selfemo_jax.config_io import load_config, read_config
from selfemo_jax.distributed import LAUNCH_FLAGS

FREE = ("run_dir", "note", "seed", "mesh", "platform", "time_limit", "data.root")
"""Settings that say where, when and which of equal runs, not how it was trained."""
SHOWN = 6
"""Keys that an error lists."""


def differences(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> both values, where two settings differ."""
    first, second = (dict(_leaves(asdict(config))) for config in (one, other))
    keys = dict.fromkeys((*first, *second))
    return {key: (first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key)}


def check_made_by(run_dir: Path, train_args: Sequence[str]) -> None:
    """ValueError where `selfemo_jax.train` would not take these arguments, or where a run has begun in the
    folder with other settings than they give now, names of places and the seed aside. Its seed must be
    theirs."""
    words = [*train_args, f"--run_dir={run_dir}"]
    wanted, _ = load_config(words, prog="selfemo_jax.study", flags=LAUNCH_FLAGS)
    path = run_dir / "config.yaml"
    if path.is_file():
        _refuse(path, read_config(path), wanted, free=set(FREE) - {"seed"}, what="the command now gives")


def check_alike(run_dirs: Sequence[Path]) -> None:
    """ValueError where runs differ in more than the seed."""
    paths = [path for path in (folder / "config.yaml" for folder in run_dirs) if path.is_file()]
    configs = [read_config(path) for path in paths]
    for path, config in zip(paths[1:], configs[1:], strict=True):
        _refuse(path, config, configs[0], free=set(FREE), what=f"{paths[0]} has")


def _refuse(path: Path, found: Config, wanted: Config, *, free: set[str], what: str) -> None:
    changed = {key: both for key, both in differences(found, wanted).items() if key not in free}
    if changed:
        words = [f"{key} is {there!r}, {what} {here!r}" for key, (there, here) in changed.items()]
        more = f"; and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
        raise ValueError(
            f"{path}: this run was made with other settings: {'; '.join(words[:SHOWN])}{more}. Name another "
            "--out, or remove the run"
        )


def _leaves(tree: Mapping[str, Any], prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, dict) and name != "weights":
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
