"""Compare JAX with PyTorch, phase by phase, on this machine.

    python tools/bench_throughput.py [--config configs/bench.yaml] [--backend jax|torch|both]
                                     [--json FILE] [--plot FILE] [--compare OLD.json --threshold 0.1]

Each side runs in a process of its own, all but JAX from environments of their own (--torch_python,
--trl_python, --tunix_python). They get the same weights (safetensors written by the converter), tokens, rows
and types, and must agree on losses and gradient norms before anything is timed. Of the ways PyTorch can do a
phase (eager, compiled, kernels, caches) a trial finds the fastest, which is then timed in turns with JAX.
Compilation and warm-up are apart.
What a side cannot do is left out and told; the rest is measured and written.
Exit status: 1 where --compare finds a regression or misses what it had, 2 for settings that cannot be run and
for sides that do not agree.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "selfemo_jax").is_dir():
    ROOT = ROOT.parent
if str(ROOT) not in sys.path:
    # The benchmark also runs where the package is not installed: beside a fixed environment.
    sys.path.append(str(ROOT))

from rich.console import Console  # noqa: E402

from selfemo_jax.bench.driver import Driver  # noqa: E402
from selfemo_jax.bench.process import SideError  # noqa: E402
from selfemo_jax.bench.results import check_same_work, compare  # noqa: E402
from selfemo_jax.bench.settings import BenchSettings, add_flags, flag_overrides, read_settings  # noqa: E402
from selfemo_jax.bench.show import plot, show, show_changes  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, or with --read show one that was run; the exit status."""
    args = _parser().parse_args(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    try:
        # What would fail at the end fails here, before an hour is spent.
        for path in (args.json, args.plot):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
        old = None if args.compare is None else json.loads(args.compare.read_text())
        if args.read is None:
            settings = read_settings(args.config, flag_overrides(args))
            if old is not None:
                check_same_work(old, dataclasses.asdict(settings))
            result = _run(args, settings)
        else:
            result = json.loads(args.read.read_text())
    except (ValueError, OSError, SideError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    show(result, console)
    if args.plot is not None:
        try:
            plot(result, args.plot)
        except ImportError as error:
            console.print(f"no picture: {error}")
    wrong = result.get("disagreements", []) or ([] if result["rows"] else ["nothing could be measured"])
    for words in wrong:
        print(f"error: {words}", file=sys.stderr)
    if wrong:
        return 2
    return 0 if old is None else _compared(old, result, args, console)


def _compared(old: dict, result: dict, args: argparse.Namespace, console: Console) -> int:
    try:
        changes, missing = compare(old, result, threshold=args.threshold, by=args.compare_by)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show_changes(changes, missing, console)
    return int(any(one["regressed"] for one in changes) or any(one["asked"] for one in missing))


def _run(args: argparse.Namespace, settings: BenchSettings) -> dict:
    with tempfile.TemporaryDirectory(prefix="bench") as scratch:
        folder = Path(scratch) if args.work is None else args.work
        driver = Driver(
            settings,
            folder,
            Path(__file__).resolve().parent,
            lambda text: print(text, file=sys.stderr, flush=True),
        )
        try:
            return driver.run()
        finally:
            driver.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench_throughput", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", type=Path, help="YAML file, as configs/bench.yaml; flags are laid over it"
    )
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--plot", type=Path, help="write a picture here (needs matplotlib)")
    parser.add_argument("--read", type=Path, help="show and compare this result instead of running one")
    parser.add_argument("--work", type=Path, help="folder for weights, tokens, logs, compiled programs; kept")
    parser.add_argument("--compare", type=Path, help="an earlier result; slower or gone is exit status 1")
    parser.add_argument("--threshold", type=float, default=0.1, help="share by which a phase may slow down")
    parser.add_argument(
        "--compare_by", choices=("seconds", "cpu_seconds", "ratio"), default="seconds",
        help="what is compared; ratio (to the fastest PyTorch) also between machines",
    )  # fmt: skip
    add_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
