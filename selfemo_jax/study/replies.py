"""The same inputs answered by two policies, side by side (Tables 8, 10 and 11).

    python -m selfemo_jax.study replies BEFORE AFTER --num 20 [--split test] [--out DIR]

Both are checkpoints: a run (its best policy), a phase's folder (``RUN/phases/00_cold``), a converted or a
Hugging Face folder. Inputs are drawn by seed, not chosen for what was answered. Answers are greedy, each
under the checkpoint's own settings; with ``--persona given`` both speak as the same persons, described as in
the run of the second, else in that of the first. ``replies.jsonl`` is what `study judge` reads.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from selfemo_jax.appendlog import atomic_write
from selfemo_jax.config import Config
from selfemo_jax.data.inputs import Sample
from selfemo_jax.study import showing
from selfemo_jax.study.reading import joined_notes, read_jsonl, short_names

SIDES = ("first", "second")
PARTS = {
    "think": "reasoning",
    "emotion": "emotion",
    "self_emotion": "own emotion",
    "response": "reply",
}
FIELDS = ("id", "dataset", "history", "responder", "persona", *SIDES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``study replies``."""
    parser.add_argument("first", type=Path, metavar="BEFORE", help="checkpoint")
    parser.add_argument("second", type=Path, metavar="AFTER", help="checkpoint")
    add_choice(parser)
    parser.add_argument("--out", type=Path, help="folder; default: study/ in the second checkpoint")


def add_choice(parser: argparse.ArgumentParser) -> None:
    """The flags that say which inputs are answered and how."""
    parser.add_argument("--num", type=int, default=20, help="inputs, drawn over all data sets")
    parser.add_argument("--split", default="test", help="split that they are drawn from")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--data-root", help="folder of the corpora; default: as the checkpoints' runs say")
    parser.add_argument(
        "--persona", choices=("given", "none"), help="whether prompts tell the persona; default: eval.persona"
    )


def main(args: argparse.Namespace) -> int:
    """Answer, show the table of scores, write ``replies.jsonl`` and ``replies.md``."""
    pairs, note = answer_pairs(args, args.first, args.second)
    out = args.out or (args.second if args.second.is_dir() else args.second.parent) / "study"
    write_pairs(out, pairs, note=note, names=short_names([args.first, args.second]))
    print(f"written: {out}/replies.jsonl, .md")
    return 0


def answer_pairs(args: argparse.Namespace, first: Path, second: Path) -> tuple[list[dict[str, Any]], str]:
    """Both checkpoints' greedy answers to the chosen inputs, and the note that they carry.

    ValueError where the two were trained on inputs of different form: they could not be given the same.
    """
    from selfemo_jax.run_data import fixed_subset

    if args.num < 1:
        raise ValueError(f"--num is {args.num}; expected 1 or more")
    configs = [settings_of(path, data_root=args.data_root, persona=args.persona) for path in (first, second)]
    for key in ("sets", "speaker_style"):
        here, there = (getattr(config.data, key) for config in configs)
        if here != there:
            raise ValueError(
                f"data.{key} is {here} in {first} and {there} in {second}: compare policies that read "
                "the same inputs"
            )
    asked = [inputs_of(config, args.split) for config in (configs[0], *_reading_else(configs))]
    drawn = [fixed_subset(found, args.num, seed=args.seed, purpose="study/replies") for found in asked]
    if [sample.id for sample in drawn[0]] != [sample.id for sample in drawn[-1]]:
        raise ValueError(f"the {args.split} split of {first} and of {second} holds different inputs")
    drawn = _as_the_same_persons(drawn)
    answers, notes = [], []
    for config, samples in zip(configs, (drawn[0], drawn[-1]), strict=True):
        found, note = answers_of(config, samples)
        answers.append(found)
        notes.append(note)
    pairs = []
    for place, sample in enumerate(drawn[0]):
        told = [config.eval.persona == "given" for config in configs]
        pairs.append(
            {
                "id": sample.id,
                "dataset": sample.dataset,
                "history": [list(turn) for turn in sample.history],
                "target_speaker": sample.target_speaker,
                "responder": sample.responder,
                "persona": sample.persona if any(told) else None,
                "gold": dict(sample.gold),
                **{side: answers[index][place] for index, side in enumerate(SIDES)},
            }
        )
    return pairs, joined_notes(notes)


def inputs_of(config: Config, split: str) -> tuple[Sample, ...]:
    """The labelled inputs of a split as a policy of these settings is given them: biographies told, and with
    `eval.persona` given the personas that experts wrote for its run."""
    from selfemo_jax.run_biographies import with_biographies
    from selfemo_jax.run_data import load_data
    from selfemo_jax.run_personas import with_personas

    data = with_biographies(config, load_data(config))
    if config.eval.persona == "given":
        data = with_personas(config, data, split=split)
    return data.split(split)


def _reading_else(configs: Sequence[Config]) -> Sequence[Config]:
    """The second settings where either tells what is known from its own run: biographies, or personas."""
    told = any(config.output.biography != "none" or config.eval.persona == "given" for config in configs)
    return configs[1:] if told else ()


def _as_the_same_persons(drawn: Sequence[Sequence[Sample]]) -> list[list[Sample]]:
    """The inputs of both sides with one persona and theme: those of the second, else those of the first."""
    known = [next((one for one in same[::-1] if one.persona), same[-1]) for same in zip(*drawn, strict=True)]
    return [
        [replace(one, persona=told.persona, theme=told.theme) for one, told in zip(side, known, strict=True)]
        for side in drawn
    ]


def settings_of(checkpoint: Path, *, data_root: str | None, persona: str | None) -> Config:
    """The settings that a checkpoint is evaluated with; its run is the one whose folder it lies in now."""
    from selfemo_jax.checkpoint import find_checkpoint
    from selfemo_jax.config_io import config_folder, load_config

    found = find_checkpoint(checkpoint)
    config, _ = load_config([], prog="selfemo_jax.study", base=lambda _: found.config_file)
    config = found.settings(config)
    if found.config_file.parent != config_folder():
        config = replace(config, run_dir=str(found.config_file.parent))
    if data_root:
        config = replace(config, data=replace(config.data, root=data_root))
    if persona:
        config = replace(config, eval=replace(config.eval, persona=persona))
    return config


def answers_of(config: Config, samples: Sequence[Sample]) -> tuple[list[dict[str, Any]], str]:
    """Greedy answers of the configured checkpoint as JSON, with r1 against the gold, and its note."""
    import jax.numpy as jnp

    from selfemo_jax.algo.rewards import weighted_iou
    from selfemo_jax.data.label_arrays import answers_to_arrays, gold_to_array
    from selfemo_jax.parts import build_parts, make_engine, weights_of
    from selfemo_jax.scores import greedy_answers

    parts = build_parts(config)
    engine = make_engine(parts)
    try:
        assert config.model.path is not None
        engine.update_policy(weights_of(parts, Path(config.model.path)), version=0)
        predictions = list(greedy_answers(engine, samples, parts.codec, config))
    finally:
        engine.close()
    inventories = [sample.inventory for sample in samples]
    num_classes = max(map(len, inventories)) + 1
    pred, valid = answers_to_arrays([[p.answer] for p in predictions], inventories, num_classes=num_classes)
    gold = gold_to_array([sample.gold for sample in samples], inventories, num_classes=num_classes)
    r1 = np.asarray(weighted_iou(jnp.asarray(pred), jnp.asarray(gold), jnp.asarray(valid)))[:, 0]
    answers = [
        {
            "valid": p.answer.valid,
            "codes": list(p.answer.codes),
            "think": p.answer.think,
            "emotion": dict(p.answer.emotion),
            "self_emotion": dict(p.answer.self_emotion),
            "response": p.answer.response,
            "text": p.text,
            "r1": round(float(reward), 4),
        }
        for p, reward in zip(predictions, r1, strict=True)
    ]
    return answers, parts.note


def write_pairs(out: Path, pairs: Sequence[Mapping[str, Any]], *, note: str, names: Sequence[str]) -> None:
    """``replies.jsonl`` (the note in each line), ``replies.md``, and a table of scores in the terminal."""
    lines = [json.dumps({**pair, "note": note}, ensure_ascii=False) + "\n" for pair in pairs]
    atomic_write(out / "replies.jsonl", "".join(lines))
    rows = [
        {
            "policy": name,
            "inputs": len(pairs),
            "valid": 100 * float(np.mean([pair[side]["valid"] for pair in pairs])),
            "mean r1": 100 * float(np.mean([pair[side]["r1"] for pair in pairs])),
            "words a reply": float(np.mean([len(pair[side]["response"].split()) for pair in pairs])),
            "distinct-2 of replies": distinct_bigrams([pair[side]["response"] for pair in pairs]),
        }
        for side, name in zip(SIDES, names, strict=True)
    ]
    title = showing.titled("answers to the same inputs, in percent where it applies", note)
    showing.print_table(title, rows)
    page = [showing.markdown(title, rows), *(example(pair, names) for pair in pairs)]
    atomic_write(out / "replies.md", "\n".join(page))


def read_pairs(path: Path) -> tuple[list[dict[str, Any]], str]:
    """What `write_pairs` wrote, and its note; ValueError names what a line lacks."""
    pairs = read_jsonl(path, hint="`python -m selfemo_jax.study replies BEFORE AFTER` writes it")
    seen: set[str] = set()
    for number, pair in enumerate(pairs, start=1):
        lacking = [name for name in FIELDS if name not in pair]
        if lacking or any(not isinstance(pair[side], dict) or "response" not in pair[side] for side in SIDES):
            raise ValueError(f"{path}: record {number} lacks {', '.join(lacking) or 'an answer'}")
        if str(pair["id"]) in seen:
            raise ValueError(
                f"{path}: record {number} answers {pair['id']} a second time; remove one of them"
            )
        seen.add(str(pair["id"]))
    if not pairs:
        raise ValueError(f"{path} holds no pair of replies")
    return pairs, joined_notes([str(pair.get("note") or "") for pair in pairs])


def distinct_bigrams(replies: Sequence[str]) -> float | None:
    """Different word pairs among all word pairs of the replies, in percent; None without any."""
    pairs = []
    for reply in replies:
        words = reply.lower().split()
        pairs += list(zip(words, words[1:], strict=False))
    return 100 * len(set(pairs)) / len(pairs) if pairs else None


def example(pair: Mapping[str, Any], names: Sequence[str]) -> str:
    """One input with both answers, for a page."""
    lines = [f"### {pair['id']}", ""]
    if pair["persona"]:
        lines += [f"{pair['responder']}: {_plain(pair['persona'])}", ""]
    turns = enumerate(pair["history"], start=1)
    lines += [f"{number}. **{_plain(speaker)}**: {_plain(text)}" for number, (speaker, text) in turns]
    gold = ", ".join(pair["gold"])
    lines += ["", f"Gold of the last turn: {gold}. Answering: {_plain(pair['responder'])}.", ""]
    lines += ["| | " + " | ".join(map(_plain, names)) + " |", "|---|---|---|"]
    for field, title in PARTS.items():
        values = [pair[side][field] for side in SIDES]
        cells = [weights(value) if isinstance(value, Mapping) else value for value in values]
        if field == "think" and not any(cells):
            continue
        lines.append(f"| {title} | " + " | ".join(_plain(value) or "-" for value in cells) + " |")
    lines.append("| r1 | " + " | ".join(_r1(pair[side]) for side in SIDES) + " |")
    return "\n".join(lines) + "\n"


def weights(emotions: Mapping[str, float]) -> str:
    """``joy 0.70, fear 0.20``."""
    return ", ".join(f"{label} {weight:.2f}" for label, weight in emotions.items())


def _r1(answer: Mapping[str, Any]) -> str:
    return f"{answer['r1']:.2f}" if answer["valid"] else f"0.00 (invalid: {', '.join(answer['codes'])})"


def _plain(text: str) -> str:
    """One line that no page takes for markup or a new cell."""
    for mark in "\\`*_|<>[]#":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
