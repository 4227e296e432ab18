"""What a system's answers earned, and which persona cluster each responder is in (for Table 3).

Three kinds of answers are read: the recorded rollouts of a run's last RL steps (training inputs, sampled, in
groups), and what `selfemo_jax.evaluate` wrote for any checkpoint or endpoint: sampled answers in groups, or
one greedy answer to each input. r1 is the weighted IoU of one answer in all of them; R, the whole reward, is
of groups alone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from selfemo_jax.study.reading import (
    predictions_file,
    read_jsonl,
    read_predictions,
    run_note,
    scores_beside,
)

NOISE, UNKNOWN = -1, -2
Kind = Literal["rollouts", "samples", "greedy"]
KINDS: tuple[Kind, ...] = ("rollouts", "samples", "greedy")
SAMPLES = "_samples.jsonl"
Key = tuple[str, str]
"""Root dialogue and speaker."""


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """What `study clusters` wrote."""

    of_persona: Mapping[Key, int]
    names: Mapping[int, str]


@dataclass(frozen=True, kw_only=True)
class Earned:
    """What one answer earned."""

    root: str
    cluster: int
    r1: float
    right: bool
    total: float | None = None
    """R; None for an answer that is in no group."""


@dataclass(frozen=True, kw_only=True)
class System:
    """The answers of one run, checkpoint or endpoint."""

    name: str
    kind: Kind
    split: str
    """Of the inputs."""
    answers: str
    """What is averaged, in words."""
    reward: str
    """What R is, in words; empty where there is none."""
    told: bool
    """Whether its prompts held the personas."""
    note: str
    earned: tuple[Earned, ...]


def read_clusters(folder: Path) -> Clusters:
    """Clusters of a study's folder; ValueError says how to make them."""
    hint = "`python -m selfemo_jax.study clusters --run RUN` writes it"
    lines = read_jsonl(folder / "persona_clusters.jsonl", hint=hint)
    path = folder / "clusters.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {hint}")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return Clusters(
            of_persona={(line["root"], line["speaker"]): int(line["cluster"]) for line in lines},
            names={int(row["cluster"]): str(row["name"]) for row in summary["clusters"]},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: not what `study clusters` writes ({error!r}); run it anew") from None


def read_system(
    source: Path, clusters: Clusters, *, name: str, kind: Kind | None, split: str, last: int
) -> System:
    """The answers of a run's folder, of an evaluation's folder or of a file that it wrote.

    Without a ``kind`` rollouts are taken where the run recorded some, else sampled answers, else greedy ones.
    ``split`` is of an evaluation, ``last`` the number of RL steps that count.
    """
    if source.is_file():
        own: Kind = "samples" if source.name.endswith(SAMPLES) else "greedy"
        if kind not in (None, own):
            raise ValueError(f"{source} holds {own} answers, but --answers is {kind}")
        kind = own
    if kind == "rollouts" or (kind is None and rl_files(source)):
        return _of_rollouts(source, clusters, name=name, last=last)
    if kind is None and not any(_evaluated(source, split, end) for end in (SAMPLES, "_predictions.jsonl")):
        raise ValueError(
            f"{source}: no recorded rollouts of an RL step in rollouts/ (rollout.keep decides how many stay) "
            f"and no {split}_predictions.jsonl, there or in eval/ (`python -m selfemo_jax.evaluate "
            f"--checkpoint {source} --split {split}` writes it)"
        )
    if kind == "samples" or (kind is None and _evaluated(source, split, SAMPLES)):
        return _of_samples(source, clusters, name=name, split=split)
    return _of_greedy(source, clusters, name=name, split=split)


def rl_files(run_dir: Path) -> list[Path]:
    """The recorded rollouts of a run's RL steps, in their order."""
    files = {
        int(path.stem.removeprefix("step_")): path for path in (run_dir / "rollouts").glob("step_*.jsonl")
    }
    if not files:
        return []
    lines = read_jsonl(run_dir / "metrics.jsonl", hint="expected a run")
    return [files[step] for step in sorted({line["step"] for line in lines if "loss" in line} & files.keys())]


def responders_of(run_dir: Path) -> dict[str, str]:
    """Input's id -> who answers it: original inputs from the run's data, synthetic ones from its
    flywheel."""
    from selfemo_jax.config_io import read_config
    from selfemo_jax.run_data import load_data

    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir}: no config.yaml; expected the folder of a run")
    data = load_data(read_config(run_dir / "config.yaml"))
    found = {sample.id: sample.responder for sample in data.all_train()}
    flywheel = run_dir / "flywheel.jsonl"
    if flywheel.is_file():
        for line in read_jsonl(flywheel, hint="the run wrote it; it is damaged"):
            if line.get("sample"):
                found[line["sample"]["id"]] = line["sample"]["responder"]
    return found


def _of_rollouts(run_dir: Path, clusters: Clusters, *, name: str, last: int) -> System:
    from selfemo_jax.config_io import read_config
    from selfemo_jax.evaluation.rewards import group_words

    files = rl_files(run_dir)[-last:]
    if not files:
        raise ValueError(
            f"{run_dir}: no recorded rollouts of an RL step in rollouts/; rollout.keep decides how many stay"
        )
    responders = responders_of(run_dir)
    config = read_config(run_dir / "config.yaml")
    earned = []
    for path in files:
        for line in read_jsonl(path, hint="the run wrote it; it is damaged"):
            emotion = line["parse"]["emotion"] if line["parse"]["valid"] else {}
            said = max(emotion, key=lambda label: emotion[label]) if emotion else None
            gold = max(line["gold"], key=lambda label: line["gold"][label])
            where = _place(line["sample_id"], responders.get(line["sample_id"], ""), clusters)
            earned.append(Earned(**where, r1=float(line["r1"]), right=said == gold, total=float(line["R"])))
    reward = config.reward
    own = reward.function or reward.primary
    words = f"rollouts of the last {len(files)} RL steps, training inputs"
    return System(
        name=name,
        kind="rollouts",
        split="train",
        answers=words if own == "wiou" else f"{words}; r1 is reward.primary {own}, not weighted IoU",
        reward=group_words(config, config.rl.group_size, weight="lambda(step)"),
        told=config.data.persona,
        note=run_note(run_dir),
        earned=tuple(earned),
    )


def _of_samples(source: Path, clusters: Clusters, *, name: str, split: str) -> System:
    path = source if source.is_file() else _evaluated(source, split, SAMPLES)
    if path is None:
        raise ValueError(
            f"{source}: no {split}{SAMPLES} in it or in its eval/; `python -m selfemo_jax.evaluate "
            f"--checkpoint {source} --split {split} --samples 8` writes it"
        )
    split = path.name.removesuffix(SAMPLES)
    lines = read_jsonl(path, hint="selfemo_jax.evaluate writes it anew")
    scores = scores_beside(path, split)
    num = max((line.get("idx", 0) for line in lines), default=0) + 1
    return System(
        name=name,
        kind="samples",
        split=split,
        answers=f"{num} sampled answers to each input, {split} split",
        reward=str((scores.get("reward") or {}).get("is", "")) if num > 1 else "",
        told=scores.get("persona") == "given",
        note=str(scores.get("note") or ""),
        earned=_of_lines(path, lines, clusters),
    )


def _of_greedy(source: Path, clusters: Clusters, *, name: str, split: str) -> System:
    path = predictions_file(source, split)
    system = read_predictions(source, split=None if source.is_file() else split, name=name)
    return System(
        name=name,
        kind="greedy",
        split=system.split,
        answers=f"one greedy answer to each input, {system.split} split",
        reward="",
        told=scores_beside(path, system.split).get("persona") == "given",
        note=system.note,
        earned=_of_lines(path, [line for lines in system.sets.values() for line in lines.values()], clusters),
    )


def _of_lines(path: Path, lines: Sequence[Mapping[str, Any]], clusters: Clusters) -> tuple[Earned, ...]:
    earned = []
    for number, line in enumerate(lines, start=1):
        try:
            where = _place(line["id"], line["responder"], clusters)
            right, r1 = line["prediction"] == line["gold"], float(line["r1"])
            total = float(line["R"]) if "R" in line else None
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: record {number} lacks what a reward by persona needs ({error!r}); "
                "selfemo_jax.evaluate writes it anew"
            ) from None
        earned.append(Earned(**where, r1=r1, right=right, total=total))
    if not earned:
        raise ValueError(f"{path} holds no answer")
    return tuple(earned)


def _place(name: str, responder: str, clusters: Clusters) -> dict[str, Any]:
    root = name.rsplit("/", 1)[0]
    return {"root": root, "cluster": clusters.of_persona.get((root, responder), UNKNOWN)}


def _evaluated(source: Path, split: str, ending: str) -> Path | None:
    places = (source / "eval" / f"{split}{ending}", source / f"{split}{ending}")
    return next((path for path in places if path.is_file()), None)
