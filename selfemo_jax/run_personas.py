"""Personas and scenes of a run: inferred by experts before its first phase, and kept in its folder."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from selfemo_jax.appendlog import atomic_write
from selfemo_jax.config import Config
from selfemo_jax.data.inputs import Sample
from selfemo_jax.experts.panel import Panel
from selfemo_jax.run_data import RunData, with_experts
from selfemo_jax.selfplay import personas
from selfemo_jax.selfplay.personas import Piece, Scene

FILE = "personas.jsonl"
Say = Callable[[str], None]
Pieces = dict[str, list[tuple[Piece, tuple[Sample, ...]]]]
"""Split -> what is read of it, each piece with the inputs that get their persona from it."""


def persona_pieces(config: Config, data: RunData) -> Pieces:
    """What experts read of each split that gets personas."""
    settings = config.persona
    found: Pieces = {}
    for split in settings.splits:
        if split == "train":
            samples = data.all_train()
        elif split in data.evaluation:
            samples = data.split(split)
        else:
            continue
        if settings.scope == "history":
            found[split] = [
                (personas.history_piece(sample, max_turns=settings.max_turns), (sample,))
                for sample in samples
            ]
            continue
        # A whole dialogue tells what is said later; config_check allows it for train alone.
        assert split == "train", f"segments of the {split} split"
        by_root: dict[str, list[Sample]] = {}
        for sample in samples:
            by_root.setdefault(sample.root_id, []).append(sample)
        found[split] = [
            (piece, tuple(s for s in members if start < len(s.history) <= end))
            for root, members in by_root.items()
            for piece, start, end in personas.segments(
                data.dialogues[root], root, max_turns=settings.max_turns
            )
        ]
    return found


def add_personas(config: Config, data: RunData, panel: Panel, folder: Path, say: Say) -> RunData:
    """The data whose inputs carry the persona and theme that experts inferred (equation 4).

    ValueError where they inferred none at all.
    """
    if config.persona.source != "expert":
        return data
    pieces = persona_pieces(config, data)
    listed = [piece for split in pieces.values() for piece, _ in split]
    scenes, reasons = personas.extract(panel, listed)
    lines = [_scene_line(piece, scenes.get(piece.id), reasons.get(piece.id)) for piece in listed]
    atomic_write(folder / FILE, to_jsonl(lines))
    say(f"personas: {len(scenes)} of {len(listed)} pieces{_shown(reasons)}")
    if listed and not scenes:
        raise ValueError(
            f"persona.source expert: no answer could be read{_shown(reasons)}; look at {folder / FILE} and "
            "expert.max_tokens, or set persona.source to given or none"
        )
    return _with_scenes(data, pieces, scenes)


def with_personas(config: Config, data: RunData, *, split: str) -> RunData:
    """The data with the personas and themes that experts inferred for the run that the settings are of;
    unchanged where none were asked for inputs of the split.

    ValueError where the settings ask for them and the run's folder has none.
    """
    if config.persona.source != "expert" or split not in config.persona.splits:
        return data
    path = Path(config.run_dir or ".") / FILE
    if not path.is_file():
        raise ValueError(
            f"persona.source is expert and {path} does not exist: the personas lie in the folder of the run "
            "that asked for them; give it as --run_dir, or set persona.source to given or none"
        )
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    scenes = {
        line["piece"]: Scene(personas=line["personas"], theme=line["theme"], source=line["source"])
        for line in lines
        if "personas" in line
    }
    return _with_scenes(data, persona_pieces(config, data), scenes)


def _with_scenes(data: RunData, pieces: Pieces, scenes: Mapping[str, Scene]) -> RunData:
    scene_of = {
        sample.id: scenes[piece.id]
        for split in pieces.values()
        for piece, members in split
        for sample in members
        if piece.id in scenes
    }
    train = {name: tuple(_told(s, scene_of) for s in samples) for name, samples in data.train.items()}
    evaluation = {
        split: {name: tuple(_told(s, scene_of) for s in samples) for name, samples in sets.items()}
        for split, sets in data.evaluation.items()
    }
    # Self-play needs the personas of all speakers. Histories come with rising length, so the first that
    # names a speaker is the one that knows least of the future.
    by_root: dict[str, dict[str, str]] = {root: {} for root in data.personas}
    for piece, members in pieces.get("train", ()):
        if piece.id in scenes:
            root = members[0].root_id if members else piece.id.rpartition("#")[0]
            for speaker, sentence in scenes[piece.id].personas.items():
                by_root[root].setdefault(speaker, sentence)
    return with_experts(
        data, train=train, evaluation=evaluation, personas=by_root, examples=data.expert_examples
    )


def to_jsonl(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as lines of JSON."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _told(sample: Sample, scenes: Mapping[str, Scene]) -> Sample:
    scene = scenes.get(sample.id)
    if scene is None:
        return sample
    return replace(
        sample,
        persona=scene.personas.get(sample.responder),
        theme=scene.theme,
        tags=(*sample.tags, f"persona:{scene.source}"),
    )


def _scene_line(piece: Piece, scene: Scene | None, reason: str | None) -> dict[str, Any]:
    if scene is None:
        return {"piece": piece.id, "reason": reason}
    return {
        "piece": piece.id,
        "source": scene.source,
        "theme": scene.theme,
        "personas": dict(scene.personas),
    }


def _shown(reasons: Mapping[str, str], most: int = 3) -> str:
    shown = "; ".join(f"{piece}: {reason}" for piece, reason in list(reasons.items())[:most])
    return f"; {len(reasons)} have none ({shown})" if reasons else ""
