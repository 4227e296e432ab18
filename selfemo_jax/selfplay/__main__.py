"""Self-play to look at: the policy plays dialogues on in the terminal, and every turn is written down.

    python -m selfemo_jax.selfplay --checkpoint DIR [--num 20] [--split train] [--out FILE] [--a.b VALUE]
    python -m selfemo_jax.selfplay stats RUN

The checkpoint is a run's, a converted or a Hugging Face folder. A dialogue is played as a harvest plays it,
with the same rules of acceptance but for the verifier, until a reply is rejected or it carries
`flywheel.max_depth` generated turns; `--flywheel.tau 0` lets it go on whatever the reward. `--bench
16,64,256` measures turns per second instead. `stats` measures the harvests that a training run left.
"""

import functools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from selfemo_jax.appendlog import atomic_write
from selfemo_jax.checkpoint import find_checkpoint
from selfemo_jax.config_io import Flag, load_config
from selfemo_jax.data.inputs import Sample
from selfemo_jax.parts import build_parts, make_engine, weights_of
from selfemo_jax.run_data import RunData, fixed_subset, load_data
from selfemo_jax.run_inputs import encode_input
from selfemo_jax.run_personas import with_personas
from selfemo_jax.scoring import make_scorer
from selfemo_jax.selfplay import stats
from selfemo_jax.selfplay.flywheel import Candidate
from selfemo_jax.selfplay.play import Turn, play_out
from selfemo_jax.selfplay.show import follow, panel

FLAGS = {
    "checkpoint": Flag(help="run, converted or Hugging Face folder", required=True),
    "num": Flag(help="dialogues to play", type=int, default=20),
    "split": Flag(help="whose inputs open the dialogues: train, dev or test", default="train"),
    "out": Flag(help="JSONL file; default: selfplay.jsonl in the run's eval/, or beside the checkpoint"),
    "quiet": Flag(help="print the summary alone", switch=True),
    "bench": Flag(help="numbers of dialogues, separated by commas: measure turns per second instead"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Play; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] == "stats":
        return stats.main(words[1:])
    try:
        with ExitStack() as stack:
            _play(words, stack)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _play(words: Sequence[str], stack: ExitStack) -> None:
    config, command = load_config(
        words,
        prog="selfemo_jax.selfplay",
        flags=FLAGS,
        base=lambda command: find_checkpoint(command.extra["checkpoint"]).config_file,
    )
    flags = command.extra
    if flags["num"] < 1:
        raise ValueError(f"--num is {flags['num']}; expected 1 or more")
    checkpoint = find_checkpoint(flags["checkpoint"])
    config = checkpoint.settings(config)
    parts, data = build_parts(config), load_data(config)
    if config.data.persona:
        data = with_personas(config, data, split=flags["split"])
    engine = stack.enter_context(closing(make_engine(parts)))
    engine.update_policy(weights_of(parts, checkpoint.weights), version=0)
    samples = data.all_train() if flags["split"] == "train" else data.split(flags["split"])
    play = functools.partial(
        play_out,
        engine,
        codec=parts.codec,
        scorer=make_scorer(config),
        encode=functools.partial(encode_input, codec=parts.codec, config=config),
        personas=known_personas(data, samples),
        num_classes=data.num_classes,
        seed=config.seed,
    )
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if parts.note:
        console.print(f"note: {parts.note}", markup=False)
    if flags["bench"]:
        sizes = _sizes(flags["bench"])
        pool = fixed_subset(samples, max(sizes), seed=config.seed, purpose="selfplay")
        _bench(functools.partial(play, config=config), pool, sizes, config.rl.group_size, console)
    else:
        opening = fixed_subset(samples, flags["num"], seed=config.seed, purpose="selfplay")
        out = Path(flags["out"] or checkpoint.out / "selfplay.jsonl")
        _show(opening, play(opening, config=config), out, console, quiet=flags["quiet"])


def known_personas(data: RunData, samples: Sequence[Sample]) -> dict[str, dict[str, str]]:
    """Root dialogue -> speaker -> persona: the run's, and what samples tell about their own responders."""
    found: dict[str, dict[str, str]] = {root: dict(people) for root, people in data.personas.items()}
    for sample in samples:
        if sample.persona:
            found.setdefault(sample.root_id, {}).setdefault(sample.responder, sample.persona)
    return found


def _show(
    opening: Sequence[Sample],
    play: Iterator[tuple[Turn, list[Candidate]]],
    out: Path,
    console: Console,
    *,
    quiet: bool,
) -> None:
    began = time.perf_counter()
    steps = list(play)
    seconds = time.perf_counter() - began
    judged = [candidate for _, candidates in steps for candidate in candidates]
    dialogues = list(follow(opening, judged))
    if not quiet:
        for dialogue in dialogues:
            console.print(panel(dialogue))
    console.print(summary(steps))
    text = "".join(json.dumps(d.to_json(), ensure_ascii=False) + "\n" for d in dialogues)
    atomic_write(out, text)
    console.print(
        f"{len(dialogues)} dialogues, {len(judged)} turns in {seconds:.1f} s with compiling: {out}",
        markup=False,
    )


def summary(steps: Sequence[tuple[Turn, Sequence[Candidate]]]) -> Table:
    """A row for each turn: how many were asked, what they earned, why dialogues ended."""
    table = Table(title="turns", title_justify="left")
    for column in ("turn", "asked", "accepted", "mean r1 of the best", "rejected"):
        table.add_column(column, justify="left" if column == "rejected" else "right")
    by_turn: dict[int, list[Candidate]] = {}
    for turn, candidates in steps:
        by_turn.setdefault(turn.number, []).extend(candidates)
    for number, candidates in by_turn.items():
        r1 = [c.select["r1"] for c in candidates if c.select]
        reasons: dict[str, int] = {}
        for candidate in candidates:
            if candidate.child is None:
                reasons[candidate.reason] = reasons.get(candidate.reason, 0) + 1
        table.add_row(
            str(number),
            str(len(candidates)),
            str(sum(c.child is not None for c in candidates)),
            f"{sum(r1) / len(r1):.3f}" if r1 else "-",
            ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items())),
        )
    return table


def _bench(
    play: Any, pool: Sequence[Sample], sizes: Sequence[int], group_size: int, console: Console
) -> None:
    table = Table(title="turns per second, compiled before", title_justify="left")
    for column in ("dialogues", "turns", "rollouts", "seconds", "CPU seconds", "turns/s", "rollouts/s"):
        table.add_column(column, justify="right")
    for size in sizes:
        opening = pool[:size]
        list(play(opening))
        began, cpu = time.perf_counter(), time.process_time()
        num = sum(len(candidates) for _, candidates in play(opening))
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        rate, rollouts = num / seconds, num * group_size
        table.add_row(
            str(len(opening)), str(num), str(rollouts), f"{seconds:.2f}", f"{cpu:.2f}",
            f"{rate:.1f}", f"{rate * group_size:.0f}",
        )  # fmt: skip
    console.print(table)


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(word) for word in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ValueError(f"--bench is {text!r}; expected numbers above 0, as in 16,64,256")
    return sizes


if __name__ == "__main__":
    sys.exit(main())
