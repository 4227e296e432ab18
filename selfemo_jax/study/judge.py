"""Which of two policies answers better? Blind judges, both orders, agreement (Fig. 3, Table 9).

    python -m selfemo_jax.study judge BEFORE AFTER --config JUDGES.yaml [--num 50] [--out DIR]
    python -m selfemo_jax.study judge --pairs replies.jsonl --config JUDGES.yaml
    python -m selfemo_jax.study judge --pairs replies.jsonl --export-sheet sheet.csv
    python -m selfemo_jax.study judge --pairs replies.jsonl --sheets sheet.csv [--config JUDGES.yaml]

Judges are the `expert.endpoints` of the config, best two of different families, best at `expert.temperature`
0; each keeps its answers in a cache of its own, so nothing is paid for twice. A judge sees a pair twice, once
in each order, and does not learn who wrote what.

Ties: a side wins a pair only if the judge prefers it in both orders; a tie in one of them, or preferring the
same place in both, is a tie. Equal answers are a tie without a question: they count in the shares, and how
many they are is told, but agreement and correlation leave them out, also those of sheets. Pairs in which a
side has no readable reply are not judged but counted. A judge reads of a person only where the policies were
told of it (``--persona given``); without, the question of understanding has nothing to go by. A verdict that
cannot be read is asked for once more; a pair without two readable verdicts is left out of the shares and
counted. Intervals are Wilson's; p is that of the exact sign test on pairs that are no tie, with Holm's
correction over the table; kappa is Cohen's over win, tie and loss. A sheet of a person has one order only.
Whether better recognition goes with better answers: Spearman's correlation of a pair's gain in r1 with its
outcome (loss, tie, win of the second side).
"""

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from selfemo_jax.config import Config
from selfemo_jax.experts.panel import Panel
from selfemo_jax.study import showing
from selfemo_jax.study.curves import spearman
from selfemo_jax.study.judge_prompt import TASKS, Task, Verdict, question, read_verdict
from selfemo_jax.study.judge_sheet import export_sheet, key_of, read_sheet
from selfemo_jax.study.reading import joined_notes, short_names
from selfemo_jax.study.replies import SIDES, add_choice, answer_pairs, read_pairs, write_pairs
from selfemo_jax.study.significance import holm

OUTCOMES = ("second", "tie", "first")
TIE_RULE = "a side wins where it is preferred in both orders; everything else is a tie"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What one judge made of one pair under one question."""

    judge: str
    task: str
    pair: str
    verdicts: tuple[Verdict | None, Verdict | None]
    """With the first side as A, then as B; None where it could not be read. Of a sheet: empty places."""
    outcome: str | None
    """``first``, ``second`` or ``tie``; None where a verdict is missing."""
    asked: bool = True
    """False where both answers are equal: a tie without a question, or an item of a sheet with no choice."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``study judge``."""
    words = "two, before and after, which answer anew"
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help=words)
    words = "replies.jsonl of `study replies`, in place of checkpoints"
    parser.add_argument("--pairs", type=Path, help=words)
    parser.add_argument("--config", help="config whose expert.endpoints are the judges")
    parser.add_argument("--no-ties", action="store_true", help="judges may not call a tie, as in the paper")
    parser.add_argument("--export-sheet", type=Path, help="write a blind CSV for a person, and its key")
    parser.add_argument("--sheet-items", type=int, help="items of that sheet; default: all")
    words = "filled sheets, each one judge more"
    parser.add_argument("--sheets", nargs="+", type=Path, default=[], help=words)
    add_choice(parser)
    words = "folder; default: that of the pairs, or study/ in the second checkpoint"
    parser.add_argument("--out", type=Path, help=words)


def main(args: argparse.Namespace) -> int:
    """Ask, print both tables, write ``judge.json``, ``judge_verdicts.json`` and ``judge.png``."""
    pairs, note, out, names = _pairs(args)
    judgeable = [pair for pair in pairs if all(_reply(pair, side) for side in SIDES)]
    silent = {side: sum(not _reply(pair, side) for pair in pairs) for side in SIDES}
    if args.export_sheet:
        number = export_sheet(args.export_sheet, judgeable, seed=args.seed, num=args.sheet_items)
        print(
            f"{number} items in {args.export_sheet}; who fills it in must not see {key_of(args.export_sheet)}"
        )
        if not args.config and not args.sheets:
            return 0
    judged: list[Judged] = []
    if args.config:
        judged += ask_judges(args.config, judgeable, out, ties=not args.no_ties)
    for sheet, judge in sheet_names(args.sheets, {one.judge for one in judged}).items():
        judged += people(sheet, judge, {pair["id"]: pair for pair in pairs})
    check_once(judged)
    if not judged:
        raise ValueError(
            "no judge, or no pair in which both sides have a reply: name a config with expert.endpoints by "
            "--config, filled sheets by --sheets, or write a sheet by --export-sheet"
        )
    note = joined_notes([note])
    rows, agreements = result_rows(judged), agreement_rows(judged)
    sides = f"second is {names[1]}, first is {names[0]}"
    titles = (
        showing.titled(f"{len(judgeable)} of {len(pairs)} pairs judged, percent; {sides}", note),
        showing.titled("agreement between judges on answers that differ", note),
        showing.titled("gain in r1 against outcome, over pairs whose answers differ", note),
    )
    recognition = recognition_rows(judged, pairs)
    showing.print_table(titles[0], rows)
    if agreements:
        showing.print_table(titles[1], agreements)
    if recognition:
        showing.print_table(titles[2], recognition)
    print(f"without a readable reply: first {silent['first']}, second {silent['second']} of {len(pairs)}")
    equal = {task.name: sum(_equal(pair, task) for pair in judgeable) for task in TASKS}
    words = ", ".join(f"{number} in {task}" for task, number in equal.items())
    print(f"ties without a question, both answers being equal, of {len(judgeable)} pairs: {words}")
    described = sum(bool(pair["persona"]) for pair in judgeable)
    if described < len(judgeable):
        print(
            f"judges read who the person is in {described} of {len(judgeable)} pairs; in the others the "
            "question of understanding has nothing to go by (--persona given tells the policies too)"
        )
    content = {"note": note, "sides": sides, "ties allowed": not args.no_ties, "tie rule": TIE_RULE}
    content["pairs with a persona"] = described
    content |= {f"without reply: {side}": number for side, number in silent.items()}
    content |= {f"ties without a question: {task}": number for task, number in equal.items()}
    content |= {"judges": rows, "agreement": agreements, "recognition": recognition}
    showing.write_json(out / "judge.json", content)
    verdicts = [vars(one) for one in judged]
    showing.write_json(out / "judge_verdicts.json", {"note": note, "verdicts": verdicts})
    draw(out / "judge.png", rows, title=titles[0])
    print(f"written: {out}/judge.json, judge_verdicts.json, judge.png")
    return 0


def ask_judges(
    config_file: str, pairs: Sequence[Mapping[str, Any]], out: Path, *, ties: bool
) -> list[Judged]:
    """Every judge of a config on every pair, task and order. What was answered before is not asked again;
    ExpertError when a judge leaves questions open."""
    from selfemo_jax.config_io import load_config

    # Nothing is trained here: a file with judges alone must not be asked for a base policy.
    words = ["--config", config_file, "--flywheel.retrain.init=cold"]
    config, _ = load_config(words, prog="selfemo_jax.study")
    if not config.expert.endpoints:
        raise ValueError(f"{config_file}: expert.endpoints is empty; name the judges there")
    judged = []
    with ExitStack() as stack:
        make = _policy_maker(config, stack)
        for endpoint in config.expert.endpoints:
            settings = replace(config.expert, endpoints=[endpoint], assign="all", cache=None)
            cache = out / "judges" / f"{endpoint.name}.jsonl"
            with Panel(settings, cache, make_policy=make) as panel:
                judged += _ask(panel, endpoint.name, pairs, ties=ties)
    return judged


def _ask(panel: Panel, judge: str, pairs: Sequence[Mapping[str, Any]], *, ties: bool) -> list[Judged]:
    places = [(pair, task) for pair in pairs for task in TASKS]
    open_places = [(pair, task) for pair, task in places if not _equal(pair, task)]
    questions = [
        question(pair, task, first_is_a=first_is_a, ties=ties)
        for pair, task in open_places
        for first_is_a in (True, False)
    ]
    said = [answers[0].text for answers in panel.ask(questions, what=f"judge {judge}")]
    verdicts = [read_verdict(text, ties=ties) for text in said]
    unread = [place for place, verdict in enumerate(verdicts) if verdict is None]
    if unread:
        again = panel.ask([questions[place].again() for place in unread], what=f"judge {judge}, once more")
        for place, answers in zip(unread, again, strict=True):
            verdicts[place] = read_verdict(answers[0].text, ties=ties)
    by_place = {
        (pair["id"], task.name): (verdicts[2 * i], verdicts[2 * i + 1])
        for i, (pair, task) in enumerate(open_places)
    }
    judged = []
    for pair, task in places:
        both = by_place.get((pair["id"], task.name))
        judged.append(
            Judged(
                judge=judge,
                task=task.name,
                pair=pair["id"],
                verdicts=both or (None, None),
                outcome=outcome_of(*both) if both else "tie",
                asked=both is not None,
            )
        )
    return judged


def outcome_of(first_as_a: Verdict | None, first_as_b: Verdict | None) -> str | None:
    """What two verdicts of one judge on one pair come to: a side that is preferred in both orders, else a
    tie; None where one could not be read."""
    if first_as_a is None or first_as_b is None:
        return None
    preferred = {"A": ("first", "second"), "B": ("second", "first"), "tie": ("tie", "tie")}
    one, other = preferred[first_as_a][0], preferred[first_as_b][1]
    return one if one == other else "tie"


def sheet_names(sheets: Sequence[Path], taken: set[str]) -> dict[Path, str]:
    """Sheet -> name of who filled it in: its file's, with as many folders as tell sheets apart, and another
    than any judge's. ValueError where a sheet is named twice."""
    if len({sheet.resolve() for sheet in sheets}) < len(sheets):
        raise ValueError(f"--sheets {' '.join(map(str, sheets))}: a sheet is named twice; name each once")
    names = short_names([sheet.with_suffix("") for sheet in sheets]) if sheets else []
    return {
        sheet: f"{name} (sheet)" if name in taken else name for sheet, name in zip(sheets, names, strict=True)
    }


def people(sheet: Path, judge: str, pairs: Mapping[str, Mapping[str, Any]]) -> list[Judged]:
    """A filled sheet as a judge."""
    found = read_sheet(sheet)
    if strange := sorted({name for name, _ in found} - pairs.keys()):
        raise ValueError(
            f"{sheet}: judges {strange[0]}, which is not among these pairs; give those it was made of"
        )
    tasks = {task.name: task for task in TASKS}
    return [
        Judged(
            judge=judge,
            task=task,
            pair=name,
            verdicts=(None, None),
            outcome=outcome,
            asked=not _equal(pairs[name], tasks[task]),
        )
        for (name, task), outcome in found.items()
    ]


def check_once(judged: Sequence[Judged]) -> None:
    """ValueError where a judge answers a question on a pair twice: one would count for two."""
    seen: set[tuple[str, str, str]] = set()
    for one in judged:
        place = (one.judge, one.task, one.pair)
        if place in seen:
            raise ValueError(
                f"judge {one.judge} answers twice on {one.task} of {one.pair}; give judges different names, "
                "and name each sheet and each pair once"
            )
        seen.add(place)


def result_rows(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """One row for each judge and question: shares in percent with Wilson's intervals, sign test, order
    consistency, how often the first place was preferred, unread pairs."""
    from scipy.stats import binomtest

    rows = []
    for judge, task in dict.fromkeys((one.judge, one.task) for one in judged):
        mine = [one for one in judged if (one.judge, one.task) == (judge, task)]
        read = [one for one in mine if one.outcome is not None]
        row: dict[str, Any] = {"judge": judge, "task": task, "n": len(read)}
        counts = {outcome: sum(one.outcome == outcome for one in read) for outcome in OUTCOMES}
        names = {"second": "second wins", "tie": "tie", "first": "first wins"}
        for outcome in OUTCOMES:
            row[names[outcome]] = 100 * counts[outcome] / len(read) if read else None
            row[f"{names[outcome]} ci"] = wilson(counts[outcome], len(read))
        decided = counts["first"] + counts["second"]
        row["p_sign"] = float(binomtest(counts["second"], decided).pvalue) if decided else 1.0
        twice = [one for one in mine if None not in one.verdicts]
        same = [one for one in twice if one.outcome != "tie" or one.verdicts == ("tie", "tie")]
        row["orders agree"] = 100 * len(same) / len(twice) if twice else None
        places = [verdict for one in twice for verdict in one.verdicts if verdict != "tie"]
        row["place A preferred"] = 100 * places.count("A") / len(places) if places else None
        row["unread"] = len(mine) - len(read)
        rows.append(row)
    for row, p in zip(rows, holm([row["p_sign"] for row in rows]), strict=True):
        row["p_sign_holm"] = p
    return rows


def agreement_rows(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """One row for each two judges and question: pairs with different answers that both judged, share of equal
    outcomes, Cohen's kappa (None where both always say the same)."""
    from sklearn.metrics import cohen_kappa_score

    by_judge: dict[str, dict[tuple[str, str], str]] = {}
    for one in judged:
        if one.asked and one.outcome is not None:
            by_judge.setdefault(one.judge, {})[one.task, one.pair] = one.outcome
    rows = []
    for (one, mine), (other, theirs) in itertools.combinations(by_judge.items(), 2):
        for task in TASKS:
            both = [key for key in mine if key in theirs and key[0] == task.name]
            if not both:
                continue
            here, there = [mine[key] for key in both], [theirs[key] for key in both]
            varied = len(set(here)) > 1 or len(set(there)) > 1
            kappa = float(cohen_kappa_score(here, there, labels=list(OUTCOMES))) if varied else None
            equal = 100 * float(np.mean([a == b for a, b in zip(here, there, strict=True)]))
            row = {"judges": f"{one} and {other}", "task": task.name, "n": len(both)}
            rows.append(row | {"equal": equal, "kappa": kappa})
    return rows


def recognition_rows(judged: Sequence[Judged], pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each judge and question: pairs with different answers, an outcome, and r1 on both sides,
    Spearman's correlation of the gain in r1 with the outcome, its two-sided p; None where either is the same
    for all."""
    gains = {
        pair["id"]: pair["second"]["r1"] - pair["first"]["r1"]
        for pair in pairs
        if all(isinstance(pair[side].get("r1"), int | float) for side in SIDES)
    }
    worth = {"first": -1, "tie": 0, "second": 1}
    rows = []
    for judge, task in dict.fromkeys((one.judge, one.task) for one in judged):
        mine = [one for one in judged if (one.judge, one.task) == (judge, task) and one.pair in gains]
        points = [
            (gains[one.pair], worth[one.outcome]) for one in mine if one.asked and one.outcome is not None
        ]
        if points:
            correlation, p = spearman(*np.array(points, float).T)
            rows.append({"judge": judge, "task": task, "n": len(points), "spearman": correlation, "p": p})
    return rows


def wilson(count: int, total: int) -> list[float] | None:
    """Wilson's 95 % interval of a share, in percent; None without any."""
    from statsmodels.stats.proportion import proportion_confint

    if total == 0:
        return None
    low, high = proportion_confint(count, total, method="wilson")
    return [100 * float(low), 100 * float(high)]


def draw(path: Path, rows: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Bars of win, tie and loss for each judge and question."""
    figure = showing.new_figure(9, 1.2 + 0.5 * len(rows))
    axes = figure.add_subplot()
    axes.set_title(title, fontsize="small", loc="left")
    left = np.zeros(len(rows))
    for name, colour in (("second wins", "tab:green"), ("tie", "0.8"), ("first wins", "tab:orange")):
        shares = np.array([row[name] or 0.0 for row in rows])
        axes.barh(range(len(rows)), shares, left=left, color=colour, label=name)
        left += shares
    axes.set_yticks(range(len(rows)), [f"{row['judge']}, {row['task']} (n={row['n']})" for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="percent of pairs", xlim=(0, 100))
    axes.legend(fontsize="small", frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    showing.save_figure(figure, path)


def _pairs(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str, Path, list[str]]:
    if args.pairs and not args.checkpoints:
        pairs, note = read_pairs(args.pairs)
        return pairs, note, args.out or args.pairs.parent, list(SIDES)
    if args.pairs or len(args.checkpoints) != 2:
        raise ValueError("judge: name two checkpoints, or --pairs with what `study replies` wrote")
    first, second = args.checkpoints
    pairs, note = answer_pairs(args, first, second)
    out, names = args.out or second / "study", short_names([first, second])
    write_pairs(out, pairs, note=note, names=names)
    return pairs, note, out, names


def _reply(pair: Mapping[str, Any], side: str) -> bool:
    return bool(pair[side].get("valid", True) and pair[side]["response"].strip())


def _equal(pair: Mapping[str, Any], task: Task) -> bool:
    keys = ("response", "self_emotion") if task.with_emotions else ("response",)
    return all(pair["first"].get(key) == pair["second"].get(key) for key in keys)


def _policy_maker(config: Config, stack: ExitStack) -> Callable[..., Any]:
    """Makes the judge of kind policy: the config's model answers chats."""

    def make(endpoint, sampling):
        from selfemo_jax.experts.policy import PolicyExpert
        from selfemo_jax.parts import base_weights, build_parts, make_engine

        parts = build_parts(config)
        engine = make_engine(parts)
        stack.callback(engine.close)
        longest = parts.model.max_positions - sampling.max_tokens
        return PolicyExpert(
            endpoint, sampling, engine, parts.codec, base_weights(parts),
            thinking=config.model.thinking, max_prompt=longest,
        )  # fmt: skip

    return make
