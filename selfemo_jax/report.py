"""One self-contained page about one or more runs: curves, scores, rollouts, self-play, run card.

    python -m selfemo_jax.report RUN [RUN ...] [--study FILE_OR_FOLDER ...] [--out FILE]
                                 [--max_rollouts N] [--max_dialogues N]

Writes RUN/report.html, of several runs report.html in the folder that holds them all. The page needs no
network and no server. It works on runs that are unfinished or damaged and says what is missing.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from selfemo_jax.reporting import html, studies
from selfemo_jax.reporting.compare import comparisons, seed_groups
from selfemo_jax.reporting.rollouts import blocks
from selfemo_jax.reporting.runs import RunReport, labels_of, read_run
from selfemo_jax.reporting.scores import MIN_DIALOGUES

MAX_ROLLOUTS = 100_000
MAX_DIALOGUES = 2_000


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; returns the exit status."""
    parser = argparse.ArgumentParser(prog="selfemo_jax.report", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--study", nargs="+", type=Path, default=[], help="JSON outputs of studies, or folders"
    )
    parser.add_argument("--out", type=Path, help="the file to write")
    parser.add_argument("--max_rollouts", type=int, default=MAX_ROLLOUTS, help="of all runs together")
    parser.add_argument("--max_dialogues", type=int, default=MAX_DIALOGUES, help="of all runs together")
    args = parser.parse_args(argv)
    started = time.monotonic()
    try:
        out = write_report(
            args.runs, out=args.out, study=args.study,
            max_rollouts=args.max_rollouts, max_dialogues=args.max_dialogues,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = time.monotonic() - started
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB in {seconds:.1f} s; open it in a browser")
    return 0


def write_report(
    folders: Sequence[Path],
    *,
    out: Path | None = None,
    study: Sequence[Path] = (),
    max_rollouts: int = MAX_ROLLOUTS,
    max_dialogues: int = MAX_DIALOGUES,
) -> Path:
    """Write the page about the runs and return its path; ValueError where a folder holds no run."""
    folders = [Path(folder) for folder in folders]
    labels = labels_of(folders)
    runs = [
        read_run(
            folder, label=label,
            most_rollouts=max_rollouts // len(folders), most_dialogues=max_dialogues // len(folders),
        )
        for folder, label in zip(folders, labels, strict=True)
    ]  # fmt: skip
    notices: list[str] = []
    sources = [(path, label) for folder, label in zip(folders, labels, strict=True)
               for path in studies.run_studies(folder)]  # fmt: skip
    sources += [(path, "") for given in study for path in studies.study_files(given)]
    missing = [path for path, _ in sources if not path.exists()]
    if missing:
        raise ValueError(f"{missing[0]} does not exist; --study takes JSON files or folders of them")
    summary = {
        "title": ", ".join(run.summary["label"] for run in runs),
        "runs": [run.summary for run in runs],
        "comparisons": comparisons(runs),
        "min_dialogues": MIN_DIALOGUES,
        "seeds": seed_groups(runs),
        "studies": [table for path, label in sources for table in studies.tables(path, notices, of=label)],
        "notices": notices,
        "made": time.strftime("%Y-%m-%d %H:%M"),
    }
    target = Path(out) if out else _common(folders) / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(html.pieces(_title(summary), _data(runs, summary)))
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    return target


def report_at_end(run_dir: Path, say: Callable[[str], None]) -> None:
    """Write the report of a run that has been scored; what hinders it becomes a line, never a failed run."""
    started = time.monotonic()
    try:
        out = write_report([run_dir])
    # Nothing in a report is worth the loss of a run.
    except Exception as error:
        say(f"notice: no report was written: {type(error).__name__}: {error}")
    else:
        say(f"report: {out} ({time.monotonic() - started:.1f} s)")


def _data(runs: Sequence[RunReport], summary: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "dialogues", [run.dialogues for run in runs]
    for place, run in enumerate(runs):
        for block in blocks(run.rollout_files, place, run.notices):
            yield "rollouts", block
    # Last, as reading the rollouts may have added notices.
    yield "summary", summary


def _common(folders: Sequence[Path]) -> Path:
    if len(folders) == 1:
        return folders[0]
    return Path(os.path.commonpath([folder.resolve() for folder in folders]))


def _title(summary: dict[str, Any]) -> str:
    notes = sorted({run["note"] for run in summary["runs"] if run["note"]})
    return " - ".join([f"SELF-EMO report: {summary['title']}", *notes])


if __name__ == "__main__":
    sys.exit(main())
