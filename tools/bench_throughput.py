"""Compare JAX with PyTorch, phase by phase, on this machine.

    python tools/bench_throughput.py [--config configs/bench.yaml] [--backend jax|torch|both]
                                     [--json FILE] [--plot FILE] [--compare OLD.json --threshold 0.1]

Each side runs in a process of its own, PyTorch from its own environment (--torch_python, --trl_python). Both
get the same weights (safetensors written by the converter), tokens, rows and types, and must agree on losses
and gradient norms before anything is timed. Of the ways PyTorch can do a phase (eager, compiled, kernels,
caches) a trial finds the fastest, which is then timed in turns with JAX. Compilation and warm-up are apart.
Exit status: 1 where --compare finds a regression, 2 for settings that cannot be run.
"""

import argparse
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

from selfemo_jax.bench.driver import Disagreement, Driver  # noqa: E402
from selfemo_jax.bench.process import SideError  # noqa: E402
from selfemo_jax.bench.results import compare  # noqa: E402
from selfemo_jax.bench.settings import add_flags, flag_overrides, read_settings  # noqa: E402
from selfemo_jax.bench.show import plot, show, show_changes  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, or with --read show one that was run; the exit status."""
    args = _parser().parse_args(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    try:
        old = None if args.compare is None else json.loads(args.compare.read_text())
        result = _run(args) if args.read is None else json.loads(args.read.read_text())
        changes, missing = ([], []) if old is None else compare(
            old, result, threshold=args.threshold, by=args.compare_by
        )  # fmt: skip
    except (ValueError, OSError, SideError, Disagreement) as error:
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
    if old is None:
        return 0
    show_changes(changes, missing, console)
    return int(any(one["regressed"] for one in changes))


def _run(args: argparse.Namespace) -> dict:
    settings = read_settings(args.config, flag_overrides(args))
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
    parser.add_argument("--compare", type=Path, help="an earlier result; a regression is exit status 1")
    parser.add_argument("--threshold", type=float, default=0.1, help="share by which a phase may slow down")
    parser.add_argument(
        "--compare_by", choices=("seconds", "cpu_seconds", "ratio"), default="seconds",
        help="what is compared; ratio (to the fastest PyTorch) also between machines",
    )  # fmt: skip
    add_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
