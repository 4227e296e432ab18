"""The run folder: resolved settings, environment, one JSON object a step, phase timers and a progress bar."""

import json
import math
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from rich.console import Console, ConsoleRenderable
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from selfemo_jax.appendlog import AppendLog, atomic_write, read_json
from selfemo_jax.config import Config
from selfemo_jax.config_io import to_yaml
from selfemo_jax.sinks import Sink, open_sink

__all__ = ["AppendLog", "RunLog", "atomic_write", "environment"]

PACKAGES = (
    "selfemo-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorstore",
    "transformers",
    "tokenizers",
    "numpy",
    "grain",
)
SHOWN = ("loss", "reward/r1", "reward/r2", "reward/total", "kl")


def environment(data_hashes: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a run depends on beside its settings: code, versions, devices, data. Starts the JAX backend."""
    import jax

    commit, dirty = _commit()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "backend": jax.default_backend(),
        "devices": [f"{device.id} {device.device_kind}" for device in jax.devices()],
        "num_processes": jax.process_count(),
        "data": dict(data_hashes or {}),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> tuple[str | None, bool | None]:
    """Commit of the checkout the package lies in, and whether tracked files differ; None outside one."""

    def git(*words: str) -> str:
        root = Path(__file__).resolve().parents[1]
        return subprocess.run(
            ["git", "-C", str(root), *words], check=True, capture_output=True, text=True, timeout=30
        ).stdout.strip()

    try:
        if git("ls-files", "selfemo_jax/runlog.py") == "":
            return None, None
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


class RunLog:
    """One run's folder while it is being written; closed by `close` or at the end of a `with` block.

    A step's line in metrics.jsonl holds step, phase, the metrics, and `time/<name>` seconds of each timer
    since the line before. Timers measure the host: wait for device results inside them.
    """

    def __init__(
        self,
        config: Config,
        *,
        resume: bool = False,
        data_hashes: Mapping[str, str] | None = None,
        primary: bool = True,
        console: Console | None = None,
    ) -> None:
        """Make or reopen `config.run_dir`. Only the `primary` process writes and prints.

        ValueError when the folder already holds a run and `resume` is False. A start that failed before its
        first step left no run.
        """
        assert config.run_dir is not None, "load_config fills run_dir"
        self.run_dir = Path(config.run_dir)
        self.orphan_dir = self.run_dir / "orphaned" / time.strftime("%Y%m%dT%H%M%S")
        """Where this start of the run moves what an earlier one left beyond its checkpoint."""
        self.metrics: AppendLog | None = None
        self._primary = primary
        self._console = console or Console(highlight=False)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._sinks: list[Sink] = []
        self._started, self._done, self._total = time.monotonic(), 0, 0
        if not primary:
            return
        before, scored = self.run_dir / "metrics.jsonl", self.run_dir / "eval" / "final.json"
        # A run without phases has scores and not one step.
        if not resume and (scored.exists() or (before.exists() and before.stat().st_size)):
            raise ValueError(
                f"run_dir {self.run_dir} holds a run already; go on with it by --resume, or name another "
                "--run_dir"
            )
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._write_config(config)
        self._write_environment(environment(data_hashes), resume)
        self.metrics = AppendLog(self.run_dir / "metrics.jsonl")
        for name in config.log.sinks:
            self._sinks.append(open_sink(name, self.run_dir, asdict(config)))

    def _write_config(self, config: Config) -> None:
        path = self.run_dir / "config.yaml"
        text = to_yaml(config)
        if path.exists() and (before := path.read_text(encoding="utf-8")) != text:
            atomic_write(self.orphan_dir / "config.yaml", before)
            changed = sorted(_changed(yaml.safe_load(before), asdict(config)))
            self.say(
                f"settings changed since the run began: {', '.join(changed)}; old ones in {self.orphan_dir}"
            )
        atomic_write(path, text)

    def _write_environment(self, found: dict[str, Any], resume: bool) -> None:
        path = self.run_dir / "env.json"
        if resume and path.exists():
            first = read_json(path)
            first.setdefault("resumed", []).append(found)
            found = first
        atomic_write(path, json.dumps(found, indent=1) + "\n")

    @contextmanager
    def timer(self, name: str) -> Generator[None]:
        """Add the seconds of the block to `time/<name>` of the next line, also when the block raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[f"time/{name}"] += time.perf_counter() - start

    @contextmanager
    def phase(self, name: str, *, total: int, done: int = 0) -> Generator[None]:
        """Show progress over `total` steps, of which `done` are behind us, while the block runs."""
        self._started, self._done, self._total = time.monotonic(), 0, total - done
        if not (self._primary and self._console.is_terminal):
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[words]}"),
        )
        with Progress(*columns, console=self._console, transient=False) as self._progress:
            self._task = self._progress.add_task(name, total=total, completed=done, words="")
            try:
                yield
            finally:
                self._progress, self._task = None, None

    def step(self, step: int, metrics: Mapping[str, float], *, phase: str) -> None:
        """Write one line of metrics and move the progress on; what is not finite is written as null."""
        values = {name: float(value) for name, value in metrics.items()} | dict(self._seconds)
        self._seconds.clear()
        self._done += 1
        if self.metrics is None:
            return
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self.metrics.append({"step": step, "phase": phase} | {name: finite.get(name) for name in values})
        for sink in self._sinks:
            sink.write(step, finite)
        words = _words(finite)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=1, words=words)
        else:
            left = (time.monotonic() - self._started) / self._done * max(self._total - self._done, 0)
            self.say(f"{phase} step {step}, {self._done}/{self._total}, eta {_minutes(left)} {words}")

    def say(self, text: str) -> None:
        """Print a line, above the progress bar where there is one."""
        if self._primary:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, renderable: ConsoleRenderable) -> None:
        """Print a table, above the progress bar where there is one."""
        if self._primary:
            self._console.print(renderable)

    def flush(self) -> None:
        """Return once every line is on disk; called at each checkpoint."""
        if self.metrics is not None:
            self.metrics.flush()

    def close(self) -> None:
        """Flush and release the files and sinks; a second call does nothing."""
        if self.metrics is not None:
            self.metrics.close()
        while self._sinks:
            self._sinks.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys whose values differ."""
    for name in old:
        before, after = old[name], new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping) and name != "weights":
            yield from _changed(before, after, f"{prefix}{name}.")
        elif before != after:
            yield prefix + name


def _words(values: Mapping[str, float]) -> str:
    shown = [f"{name} {values[name]:.3g}" for name in SHOWN if name in values]
    if "perf/tokens_per_s" in values:
        shown.append(f"{values['perf/tokens_per_s']:,.0f} tokens/s")
    return "  ".join(shown)


def _minutes(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
