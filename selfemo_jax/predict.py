"""Answers to dialogues without labels: dialogues.jsonl (or stdin) -> emotions with weights, self-emotion,
reply.

    python -m selfemo_jax.predict --checkpoint DIR [--labels joy,anger,...] [dialogues.jsonl]

One JSON object a line in, ``{"dialogue_id", "turns": [{"speaker", "text"}], "responder"?, "persona"?,
"theme"?, "labels"?}``, and one out. The last turn is the one to recognise. The label list is the dialogue's
own, else that of ``--labels``.
"""

import selfemo_jax.keep_memory  # noqa: F401, I001 - before NumPy starts threads

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from selfemo_jax.checkpoint import find_checkpoint
from selfemo_jax.config_io import Flag, load_config
from selfemo_jax.data.dialogues import MELD, label_set
from selfemo_jax.data.inputs import Sample
from selfemo_jax.parts import build_parts, make_engine, weights_of
from selfemo_jax.scores import greedy_answers

LISTENER = "Listener"
FLAGS = {
    "checkpoint": Flag(help="run, converted or Hugging Face folder", required=True),
    "labels": Flag(help="label list, separated by commas", default=",".join(MELD.labels)),
    "dialogues": Flag(help="JSONL file; default: standard input", positional=True),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Answer every dialogue; returns the exit status."""
    try:
        config, command = load_config(
            sys.argv[1:] if argv is None else argv,
            prog="selfemo_jax.predict",
            flags=FLAGS,
            base=lambda command: find_checkpoint(command.extra["checkpoint"]).config_file,
        )
        checkpoint = find_checkpoint(command.extra["checkpoint"])
        config = checkpoint.settings(config)
        config = replace(config, eval=replace(config.eval, persona="given"))
        default = tuple(
            label.strip().lower() for label in command.extra["labels"].split(",") if label.strip()
        )
        name = command.extra["dialogues"]
        if name is None:
            samples = list(read_dialogues(sys.stdin, "stdin", default))
        else:
            with Path(name).open(encoding="utf-8") as file:
                samples = list(read_dialogues(file, name, default))
        parts = build_parts(config)
        engine = make_engine(parts)
        engine.update_policy(weights_of(parts, checkpoint.weights), version=0)
        if parts.note:
            print(f"note: {parts.note}", file=sys.stderr)
        if command.extra["labels"] == FLAGS["labels"].default:
            print(f"labels, where a dialogue names none: {', '.join(default)} (or --labels)", file=sys.stderr)
        asked = [as_trained(sample, config.data.speaker_style) for sample in samples]
        predictions = greedy_answers(engine, asked, parts.codec, config)
        for sample, prediction in zip(samples, predictions, strict=True):
            answer = prediction.answer
            line = {
                "dialogue_id": sample.root_id,
                "speaker": sample.target_speaker,
                "label": prediction.label,
                "emotion": dict(answer.emotion),
                "responder": sample.responder,
                "self_emotion": dict(answer.self_emotion),
                "response": answer.response,
                "valid": answer.valid,
                "codes": list(answer.codes),
            }
            print(json.dumps(line, ensure_ascii=False), flush=True)
        engine.close()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read_dialogues(file: Iterable[str], name: str, default: tuple[str, ...]) -> Iterator[Sample]:
    """Inputs from JSON lines; ValueError names the line and what is wrong with it."""
    for number, line in enumerate(_lines(file, name), start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not a JSON object: {error}") from error
        yield _sample(record, where, default)


def as_trained(sample: Sample, speaker_style: str) -> Sample:
    """The input with its speakers called as the policy knows them: `data.speaker_style` of its training."""
    if speaker_style == "name":
        return sample
    speakers = dict.fromkeys((*(speaker for speaker, _ in sample.history), sample.responder))
    names = {name: f"Speaker {number}" for number, name in enumerate(speakers, start=1)} | {
        LISTENER: LISTENER
    }
    history = tuple((names[speaker], text) for speaker, text in sample.history)
    return replace(
        sample,
        history=history,
        target_speaker=names[sample.target_speaker],
        responder=names[sample.responder],
    )


def _lines(file: Iterable[str], name: str) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as error:
        found = error.object[error.start]
        raise ValueError(f"{name}: byte 0x{found:02X} is not UTF-8; save the file as UTF-8") from error


def _sample(record: Any, where: str, default: tuple[str, ...]) -> Sample:
    if not isinstance(record, Mapping) or not isinstance(record.get("turns"), list) or not record["turns"]:
        raise ValueError(f'{where}: expected {{"dialogue_id": ..., "turns": [{{"speaker", "text"}}, ...]}}')
    history = []
    for place, turn in enumerate(record["turns"]):
        speaker, text = (turn.get(key) if isinstance(turn, Mapping) else None for key in ("speaker", "text"))
        if not (isinstance(speaker, str) and isinstance(text, str) and speaker.strip() and text.strip()):
            raise ValueError(
                f"{where}: turn {place}: expected a speaker and a text that are not empty, found {turn!r}"
            )
        history.append((speaker.strip(), text.strip()))
    target = history[-1][0]
    labels = record.get("labels", default)
    if not isinstance(labels, list | tuple) or len(labels) < 2 or not all(isinstance(x, str) for x in labels):
        raise ValueError(f"{where}: labels: expected a list of at least two names, found {labels!r}")
    try:
        inventory = label_set("labels", [label.strip() for label in labels]).labels
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    for key in ("responder", "persona", "theme"):
        if not isinstance(record.get(key), str | None):
            raise ValueError(f"{where}: {key}: expected text, found {record[key]!r}")
    others = [speaker for speaker, _ in reversed(history) if speaker != target]
    responder = record.get("responder") or (others[0] if others else LISTENER)
    if responder == target:
        raise ValueError(f"{where}: responder {responder!r} is the last speaker; name somebody else")
    identity = str(record.get("dialogue_id", where))
    return Sample(
        id=identity, root_id=identity, parent_id=None, dataset="user", split="test", history=tuple(history),
        target_speaker=target, responder=responder, persona=record.get("persona"), theme=record.get("theme"),
        inventory=inventory, gold={}, reference=None,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
