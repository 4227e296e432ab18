"""Token entropy of the policy: over training, and by part of the answer (Fig. 6).

    python -m selfemo_jax.study entropy RUN [--answers recorded|sampled] [--rollouts 512] [--out DIR]

(a) The mean entropy of the policy's next-token distributions over its rollouts, as every RL step logs it.
(b) For the weights that each phase left, and those inside a phase that `checkpoint.weights_every` kept, the
mean entropy on the tokens of each part of an answer: reasoning, emotion, self-emotion, response. ``recorded``
(default) reads the run's recorded rollouts, the same ones for all weights, spread evenly over its RL steps;
``sampled`` lets each of them answer held-out inputs (``--split``; ``selfemo`` are the run's held-out
synthetic ones, as in the paper) at the rollout temperature, which is the policy's own entropy on data that it
was not trained on. Only answers inside the grammar have parts; how many there are is told. Intervals draw
dialogues, ten at least.
(c) How varied the replies of each RL step were: different word n-grams (distinct-1, distinct-2) and self-BLEU
among all replies of the step and among those to one input, where 1 says that all are alike. An entropy that
falls while these stay is confidence; one that falls with them is collapse.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfemo_jax.config import Config
from selfemo_jax.data.grammar import parse
from selfemo_jax.data.inputs import Sample
from selfemo_jax.parts import Parts, build_parts, make_engine, weights_of
from selfemo_jax.phases import SELFEMO
from selfemo_jax.rollout.engine import Completion, Request, Sampling
from selfemo_jax.rollout.records import load_groups
from selfemo_jax.study import showing
from selfemo_jax.study.curves import spearman, trainings
from selfemo_jax.study.reading import read_jsonl, read_metrics, run_note
from selfemo_jax.study.significance import FEW, estimate, mean_of_sums, sums_by_dialogue
from selfemo_jax.study.spans import PARTS, part_ranges, token_parts, token_ranges
from selfemo_jax.study.token_entropy import TokenEntropies

VARIETY = ("reply/distinct_1", "reply/distinct_2", "reply/self_bleu", "reply/self_bleu_in_group")


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """A valid answer as tokens behind its prompt."""

    id: str
    """Of the input."""
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    parts: np.ndarray
    """[T] index into `PARTS` of each completion token, or -1."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``study entropy``."""
    parser.add_argument("run", type=Path, help="folder of a run with its phases and rollouts")
    parser.add_argument("--answers", choices=("recorded", "sampled"), default="recorded", help="what is read")
    parser.add_argument("--rollouts", type=int, default=512, help="answers for each phase at most")
    words = "split of the inputs that are answered (sampled); selfemo: held-out synthetic inputs"
    parser.add_argument("--split", default="test", help=words)
    parser.add_argument("--data-root", help="folder of the corpora; default: as the run says")
    parser.add_argument("--out", type=Path, help="folder; default: study/ in the run")


def main(args: argparse.Namespace) -> int:
    """Print both tables, write ``entropy.json`` and ``entropy.png``."""
    if args.rollouts < 1:
        raise ValueError(f"--rollouts is {args.rollouts}; expected 1 or more")
    lines = [line for line in read_metrics(args.run) if "entropy" in line and "reward/r1" in line]
    if not lines:
        raise ValueError(f"{args.run}: no RL step logged an entropy")
    groups = stretches(args.run)
    steps, variety = phase_rows(groups), variety_rows(groups)
    rows = part_rows(args)
    note = run_note(args.run)
    titles = (
        showing.titled("token entropy of the policy over RL steps, nats", note),
        showing.titled(f"mean token entropy by part of the answer, nats, {args.answers} answers", note),
    )
    showing.print_table(titles[0], steps)
    if variety:
        showing.print_table(showing.titled("variety of the replies over RL steps", note), variety)
    else:
        print("variety of the replies: not logged by this run")
    showing.print_table(titles[1], rows)
    remark = FEW if any(bounds is None for row in rows for bounds in row.values()) else ""
    if remark:
        print(remark)
    out = args.out or args.run / "study"
    drawn = ("step", "phase", "entropy", *VARIETY)
    points = [{name: line[name] for name in drawn if name in line} for line in lines]
    content = {
        "note": note,
        "answers": args.answers,
        "remark": remark,
        "over training": steps,
        "variety of replies": variety,
        "by part": rows,
    }
    showing.write_json(out / "entropy.json", {**content, "points": points})
    draw(out / "entropy.png", points, rows, note=note)
    print(f"written: {out}/entropy.json, .png")
    return 0


def stretches(run_dir: Path) -> dict[str, list[Mapping[str, Any]]]:
    """RL phase -> the steps that logged an entropy; and those of phases that go on from one another."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for training in trainings(run_dir, None):
        logged = [line for line in training.lines if "entropy" in line]
        found |= {name: [line for line in logged if line["phase"] == name] for name in training.phases}
        found[training.name] = logged
    return found


def phase_rows(
    groups: Mapping[str, Sequence[Mapping[str, Any]]], *, of: str = "entropy"
) -> list[dict[str, Any]]:
    """One row for each group of steps: entropy, or the metric ``of``, at the start and end (means of a tenth
    of the steps), rank correlation with the step, and which share of the fall lies in the first half."""
    rows = []
    for name, members in groups.items():
        values = np.array([line[of] for line in members])
        tenth, half = max(1, len(values) // 10), len(values) // 2
        first, last = values[:tenth].mean(), values[-tenth:].mean()
        middle = values[max(0, half - tenth // 2) :][:tenth].mean()
        correlation, p = spearman(np.array([line["step"] for line in members]), values)
        # Noise of a few steps divided by hardly any fall would be no share.
        fell = first - last > 0.05 * abs(first)
        rows.append(
            {
                "phase": name,
                "steps": len(values),
                "first": float(first),
                "last": float(last),
                "difference": float(last - first),
                "spearman with step": correlation,
                "p": p,
                "fall in first half, percent": float(100 * (first - middle) / (first - last))
                if fell
                else None,
            }
        )
    return rows


def variety_rows(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Rows as `phase_rows` makes them, for each measure of the replies' variety that the steps logged, with
    its rank correlation with the entropy."""
    rows = []
    for metric in VARIETY:
        logged = {name: [line for line in members if metric in line] for name, members in groups.items()}
        for name, members in logged.items():
            if not members:
                continue
            (row,) = phase_rows({name: members}, of=metric)
            values = [np.array([line[key] for line in members]) for key in ("entropy", metric)]
            row |= {"spearman with entropy": spearman(*values)[0]}
            rows.append({"measure": metric.removeprefix("reply/")} | row)
    return rows


def part_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each policy in the run's phases: answers, and mean entropy of each part, with intervals."""
    from selfemo_jax.study.replies import settings_of

    folders = policies(args.run)
    if not folders:
        raise ValueError(
            f"{args.run}: no phase left weights in phases/; only finished phases, and "
            "steps that checkpoint.weights_every kept, can be measured"
        )
    config = settings_of(next(iter(folders.values())), data_root=args.data_root, persona=None)
    parts = build_parts(config)
    entropies = TokenEntropies(parts.model, parts.compute, parts.mesh)
    recorded = recorded_answers(args.run, parts, most=args.rollouts) if args.answers == "recorded" else None
    rows = []
    for version, (name, folder) in enumerate(folders.items()):
        params = weights_of(parts, folder)
        asked, answers = recorded or sampled_answers(
            parts, params, inputs_of(args.run, config, args.split), most=args.rollouts, version=version
        )
        if not answers:
            rows.append({"phase": name, "answers": asked, "valid": 0})
            continue
        values = entropies(
            params,
            [(*one.prompt, *one.completion) for one in answers],
            starts=[len(one.prompt) for one in answers],
            temperature=config.rollout.temperature,
        )
        rows.append({"phase": name, "answers": asked, "valid": len(answers)} | part_means(answers, values))
    if not any(row["valid"] for row in rows):
        raise ValueError(f"{args.run}: no answer of any policy is inside the grammar; nothing has parts")
    return rows


def policies(run_dir: Path) -> dict[str, Path]:
    """Phase, or phase and step -> folder of weights, in the order in which the run made them."""
    found = {}
    for phase in sorted(run_dir.glob("phases/*")):
        inside = sorted(path.parent for path in phase.glob("steps/[0-9]*/config.json"))
        found |= {f"{phase.name} step {int(folder.name)}": folder for folder in inside}
        if (phase / "weights" / "config.json").exists():
            found[phase.name] = phase / "weights"
    return found


def part_means(answers: Sequence[Spoken], values: Sequence[np.ndarray]) -> dict[str, Any]:
    """Mean entropy over the tokens of each part that occurs, and over all tokens, each with its interval."""
    row: dict[str, Any] = {}
    masks = {part: [one.parts == index for one in answers] for index, part in enumerate(PARTS)}
    masks["all tokens"] = [np.ones(len(one.parts), bool) for one in answers]
    for part, chosen in masks.items():
        flat = [float(x) for found, mask in zip(values, chosen, strict=True) for x in found[mask]]
        if not flat:
            continue
        ids = [one.id for one, mask in zip(answers, chosen, strict=True) for _ in range(int(mask.sum()))]
        found = estimate([[sums_by_dialogue(flat, ids)]], mean_of_sums)
        row[part] = found.value
        row[f"{part} ci"] = None if found.interval is None else list(found.interval)
    return row


def recorded_answers(run_dir: Path, parts: Parts, *, most: int) -> tuple[int, list[Spoken]]:
    """How many recorded rollouts were read, at most ``most`` spread over the recorded RL steps, and the
    valid ones among them."""
    rl = {line["step"] for line in read_metrics(run_dir) if "loss" in line and "reward/r1" in line}
    paths = sorted(run_dir.glob("rollouts/step_*.npz"))
    paths = [path for path in paths if int(path.stem.removeprefix("step_")) in rl]
    if not paths:
        raise ValueError(
            f"{run_dir}: no recorded rollouts of an RL step in rollouts/; rollout.keep decides how many stay"
        )
    found: list[Spoken] = []
    asked = 0
    paths = [paths[place] for place in np.unique(np.linspace(0, len(paths) - 1, most).astype(int))]
    share = -(-most // len(paths))
    for path in paths:
        requests, groups = load_groups(path)
        lines = read_jsonl(path.with_suffix(".jsonl"), hint="the run wrote it beside the arrays")
        rollouts = [
            (request.token_ids, completion)
            for request, group in zip(requests, groups, strict=True)
            for completion in group.completions
        ]
        if len(rollouts) != len(lines):
            raise ValueError(f"{path}: {len(rollouts)} rollouts, but {len(lines)} lines of text beside it")
        chosen = np.unique(
            np.linspace(0, len(rollouts) - 1, min(share, len(rollouts), most - asked)).astype(int)
        )
        asked += len(chosen)
        for place in chosen:
            line, (prompt, completion) = lines[place], rollouts[place]
            if not line["parse"]["valid"]:
                continue
            inventory = (*line["parse"]["emotion"], *line["parse"]["self_emotion"])
            one = spoken(line["sample_id"], prompt, completion, parts, inventory=inventory)
            if one is None:
                raise ValueError(
                    f"{path}: rollout {place} reads differently now; the tokenizer or the grammar changed"
                )
            found.append(one)
        if asked >= most:
            break
    return asked, found


def inputs_of(run_dir: Path, config: Config, split: str) -> tuple[Sample, ...]:
    """The inputs of a labelled split, or the accepted synthetic ones that the run held out by root
    dialogue."""
    from selfemo_jax.phases import plan
    from selfemo_jax.run_inputs import synthetic_inputs
    from selfemo_jax.study import replies

    if split != SELFEMO:
        return replies.inputs_of(config, split)
    records = read_jsonl(run_dir / "flywheel.jsonl", hint="this run has no harvest; name a labelled --split")
    _, held = synthetic_inputs(plan(config)[-1], records, config)
    if not held:
        raise ValueError(
            f"{run_dir}: no accepted synthetic input was held out (flywheel.heldout "
            f"{config.flywheel.heldout})"
        )
    return held


def sampled_answers(
    parts: Parts, params: Any, inputs: Sequence[Sample], *, most: int, version: int
) -> tuple[int, list[Spoken]]:
    """One sampled answer of these weights to each of at most ``most`` inputs, and the valid ones."""
    from selfemo_jax.run_data import fixed_subset
    from selfemo_jax.scores import encode_prompt

    config: Config = parts.config
    samples = fixed_subset(inputs, most, seed=config.seed, purpose="study/entropy")
    told = config.eval.persona == "given"
    prompts = [encode_prompt(sample, parts.codec, config, persona=told) for sample in samples]
    requests = [
        Request(id=str(place), token_ids=prompt.token_ids, num=1, seed=place)
        for place, prompt in enumerate(prompts)
    ]
    sampling = Sampling(
        max_tokens=config.rollout.max_tokens,
        temperature=config.rollout.temperature,
        stop_ids=parts.codec.stop_ids,
    )
    engine = make_engine(parts)
    try:
        engine.update_policy(params, version=version)
        groups = {int(group.request_id): group for group in engine.generate(requests, sampling)}
    finally:
        engine.close()
    found = []
    for place, sample in enumerate(samples):
        completion = groups[place].completions[0]
        one = spoken(sample.id, prompts[place].token_ids, completion, parts, inventory=sample.inventory)
        if one is not None:
            found.append(one)
    return len(samples), found


def spoken(
    name: str, prompt: Sequence[int], completion: Completion, parts: Parts, *, inventory: Sequence[str]
) -> Spoken | None:
    """A completion with its parts; None where it is outside the grammar."""
    config, codec = parts.config, parts.codec
    stopped = completion.finish_reason == "stop"
    ids = completion.token_ids[:-1] if stopped else completion.token_ids
    text = codec.decode(ids)
    answer = parse(
        text,
        inventory=inventory,
        max_labels=config.output.max_labels,
        thinking=config.model.thinking,
        think_open_in_prompt=codec.chat_frame(thinking=config.model.thinking).think_open,
        finished=stopped,
    )
    if not answer.valid:
        return None
    found = token_parts(token_ranges(ids, codec.decode), part_ranges(text, answer))
    ending = np.full(len(completion.token_ids) - len(ids), -1)
    return Spoken(
        id=name,
        prompt=tuple(prompt),
        completion=tuple(completion.token_ids),
        parts=np.concatenate([found, ending]),
    )


def draw(
    path: Path, points: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], *, note: str
) -> None:
    """Entropy over steps, the variety of replies where it was logged, and entropy by part over phases."""
    measures = [metric for metric in VARIETY if any(metric in point for point in points)]
    figure = showing.new_figure(14 if measures else 10, 4)
    figure.suptitle(showing.titled("token entropy, nats", note), fontsize="small")
    left, *middle, right = figure.subplots(1, 3 if measures else 2)
    for axes in middle:
        for metric in measures:
            mine = [point for point in points if metric in point]
            label = metric.removeprefix("reply/")
            axes.plot([point["step"] for point in mine], [point[metric] for point in mine], label=label)
        axes.set(title="variety of replies", xlabel="step", ylabel="share; self-BLEU", ylim=(0, 1.02))
        axes.legend(fontsize="small", frameon=False)
    for name in dict.fromkeys(point["phase"] for point in points):
        mine = [point for point in points if point["phase"] == name]
        left.plot([point["step"] for point in mine], [point["entropy"] for point in mine], label=name)
    left.set(title="policy over RL steps", xlabel="step", ylabel="nats")
    left.legend(fontsize="small", frameon=False)
    for part in (*PARTS, "all tokens"):
        mine = [(place, row) for place, row in enumerate(rows) if part in row]
        if mine:
            y = np.array([row[part] for _, row in mine])
            bounds = np.array([row[f"{part} ci"] or [row[part]] * 2 for _, row in mine])
            error = np.maximum(np.abs(bounds.T - y), 0)
            right.errorbar([place for place, _ in mine], y, yerr=error, marker="o", capsize=3, label=part)
    right.set(title="by part of the answer")
    right.set_xticks(range(len(rows)), [row["phase"] for row in rows], rotation=20, ha="right")
    right.legend(fontsize="small", frameon=False)
    for axes in (left, *middle, right):
        axes.grid(alpha=0.3)
    showing.save_figure(figure, path)
