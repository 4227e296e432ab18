"""A run's folder as the plain data of a report; nothing of the folder is needed but its metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from selfemo_jax.reporting.card import card, flat
from selfemo_jax.reporting.curves import columns, peaks, phase_times, phases
from selfemo_jax.reporting.dialogues import conversations
from selfemo_jax.reporting.flows import changes, label_lists, phase_answers, steps_between
from selfemo_jax.reporting.reading import Notices, number, read_json, read_lines
from selfemo_jax.reporting.rollouts import choose_steps, sampled_tokens, step_files
from selfemo_jax.reporting.scores import score_rows
from selfemo_jax.reporting.studies import persona_map


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What a report holds of one run."""

    summary: dict[str, Any]
    """JSON: label, note, card, settings, curves, times, scores, changes of confusions, harvests, notices."""
    dialogues: list[dict[str, Any]]
    rollout_files: list[Path]
    predictions: dict[str, list[dict[str, Any]]]
    """Answers to each scored split, for paired comparisons."""
    notices: Notices
    """Of files that cannot be read; also in ``summary``."""


def is_run(folder: Path) -> bool:
    """Whether a run has begun in the folder."""
    return (folder / "metrics.jsonl").is_file()


def read_run(folder: Path, *, label: str, most_rollouts: int, most_dialogues: int) -> RunReport:
    """Everything of a run but the texts of its rollouts, whose files are chosen here and read later.

    ValueError where the folder holds no run.
    """
    if not is_run(folder):
        raise ValueError(
            f"{folder} has no metrics.jsonl; expected the folder of a run (--run_dir of a training)"
        )
    notices: Notices = []
    config, env = _config(folder, notices), read_json(folder / "env.json", notices) or {}
    lines = [
        line
        for line in read_lines(folder / "metrics.jsonl", notices)
        if isinstance(line.get("step"), int) and isinstance(line.get("phase"), str)
    ]
    final = read_json(folder / "eval" / "final.json", notices)
    splits, predictions = _scores(folder, final, notices)
    files, num_rollouts = choose_steps(step_files(folder), most=most_rollouts)
    kept, num_dialogues = conversations(read_lines(folder / "flywheel.jsonl", notices), most=most_dialogues)
    if final is None:
        notices.append("the run has no final scores: it has not ended")
    if len(files) < len(step_files(folder)):
        notices.append(f"of {num_rollouts:,} rollouts only {len(files):,} evenly spaced steps are shown")
    if len(kept) < num_dialogues:
        notices.append(f"of {num_dialogues:,} self-play dialogues only {len(kept):,} are shown")
    times, (sampled, recorded) = phase_times(lines), sampled_tokens(folder)
    summary = {
        "label": label,
        "note": str(config.get("note") or (final or {}).get("note") or ""),
        "card": card(
            config, env, times,
            sampled=sampled, recorded=recorded, rollouts=num_rollouts, best=(final or {}).get("best"),
            memory=peaks(lines), scoring=sum(result.get("seconds") or 0.0 for result in splits.values()),
        ),
        "settings": dict(flat(config)),
        "phases": phases(lines),
        "curves": columns(lines),
        "times": times,
        "scores": score_rows(splits, predictions, notices),
        "changes": _changes(folder, notices),
        "harvests": _harvests(folder, notices),
        "personas": persona_map(folder, notices),
        "num_rollouts": num_rollouts,
        "num_dialogues": num_dialogues,
        "notices": notices,
    }  # fmt: skip
    return RunReport(
        summary=summary, dialogues=kept, rollout_files=files, predictions=predictions, notices=notices
    )


def labels_of(folders: Sequence[Path]) -> list[str]:
    """Short and different names: the last parts of the paths, as many as are needed."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(found[-depth:]) for found in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{folder.resolve().name} ({place})" for place, folder in enumerate(folders, start=1)]


def _config(folder: Path, notices: Notices) -> Mapping[str, Any]:
    path = folder / "config.yaml"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        notices.append(f"config.yaml cannot be read: {error}")
        return {}
    return found if isinstance(found, Mapping) else {}


def _changes(folder: Path, notices: Notices) -> list[dict[str, Any]]:
    """How the confusions on dev changed from phase to phase."""
    found = phase_answers(folder, notices)
    labels = label_lists(folder, found, notices)
    rows = [row for before, after in steps_between(found) for row in changes(before, after, labels)]
    for row in (row for one in rows for kind in ("pairs", "flows") for row in one[kind]):
        row |= {name: number(row[name], 5) for name in ("p", "p_holm")}
    return rows


def _scores(
    folder: Path, final: Mapping[str, Any] | None, notices: Notices
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Results and predictions by split; of an unfinished run those that its stop left.

    What a later evaluation of the same policy added (yardsticks, samples) is taken over.
    """
    splits = dict((final or {}).get("splits") or {})
    for split, result in splits.items():
        later = read_json(folder / "eval" / f"{split}.json", notices)
        if isinstance(later, Mapping) and _same_scores(result, later):
            splits[split] = {
                **result,
                **{key: later[key] for key in ("yardsticks", "samples") if key in later},
            }
    if not splits:
        for path in sorted((folder / "eval").glob("*.json")):
            found = read_json(path, notices)
            if isinstance(found, Mapping) and "sets" in found:
                splits[path.stem] = found
    predictions = {}
    for split in splits:
        lines = read_lines(folder / "eval" / f"{split}_predictions.jsonl", notices)
        predictions[split] = [line for line in lines if "id" in line and isinstance(line.get("gold"), str)]
    return splits, predictions


def _same_scores(result: Mapping[str, Any], later: Mapping[str, Any]) -> bool:
    """Whether both are of the same answers to the same inputs, as far as their scores tell."""
    told = [
        {name: [of.get(key) for key in ("num", "accuracy", "weighted_f1")] for name, of in sets.items()}
        for sets in (result.get("sets") or {}, later.get("sets") or {})
    ]
    return told[0] == told[1]


def _harvests(folder: Path, notices: Notices) -> list[dict[str, Any]]:
    found = []
    for path in sorted((folder / "phases").glob("*/harvest.json")):
        report = read_json(path, notices)
        if isinstance(report, Mapping):
            found.append({"phase": path.parent.name, **report})
    return found
