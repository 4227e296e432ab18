"""Runs a benchmark: weights, tokens, the sides' processes, agreement before timing, rounds taken in turns.

What a side cannot do costs its own rows and no other: everything else that was measured is kept and told.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfemo_jax.bench import results
from selfemo_jax.bench.agreement import Disagreement, check
from selfemo_jax.bench.contestants import Contestant, contestants
from selfemo_jax.bench.process import SideError, SideProcess, start_side
from selfemo_jax.bench.settings import BenchSettings
from selfemo_jax.bench.task import PACKED_WORK, Task, make_task
from selfemo_jax.model.flops import known_device

Say = Callable[[str], None]
GET_TUNIX = "`pip install google-tunix` into an environment of its own, and name its Python"


@dataclass
class _Opened:
    """A contestant's runs so far."""

    who: Contestant
    first: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    peaks: dict[str, Any] = field(default_factory=dict)
    failed: bool = False
    """Whether its side could not go on with it: it has no row then."""


class Driver:
    """One benchmark in the making; its processes end with it."""

    def __init__(self, settings: BenchSettings, folder: Path, tools: Path, say: Say):
        self._settings, self._folder, self._tools, self._say = settings, folder, tools, say
        self._processes: dict[tuple[str, int], SideProcess] = {}
        self._described: dict[str, dict[str, Any]] = {}
        self._products: dict[str, float] = {}
        # Named, since the folder may be kept and hold those of another benchmark.
        self._model = folder / f"model_{settings.model}_{settings.seed}"
        self._firsts: dict[tuple[str, str, str], dict[str, Any]] = {}
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] = []
        self.unavailable: list[dict[str, str]] = []
        self.profiles: list[dict[str, Any]] = []
        self.disagreements: list[str] = []

    def run(self) -> dict[str, Any]:
        """Everything measured, as `results` describes it."""
        began, load = time.strftime("%Y-%m-%dT%H:%M:%S%z"), os.getloadavg()
        # All tokens first: lengths that do not fit into rows are known before anything is measured.
        cases = [
            (point, settings, make_task(settings, self._folder / _case_name(point)))
            for point, settings in points(self._settings)
        ]
        self._prepare()
        for point, settings, task in cases:
            self._devices = settings.devices
            for phase in settings.phases:
                self._phase(phase, settings, task, point)
        return results.assemble(
            self._settings,
            rows=self.rows,
            sides=self._described,
            left_out=self.left_out,
            unavailable=self.unavailable,
            profiles=self.profiles,
            disagreements=self.disagreements,
            peak=self._peak(),
            began=began,
            load={"before": load, "after": os.getloadavg()},
        )

    def close(self) -> None:
        """End all processes."""
        for process in self._processes.values():
            process.close()
        self._processes.clear()

    def _prepare(self) -> None:
        """Ask the sides what they are, and write the weights."""
        self._folder.mkdir(parents=True, exist_ok=True)
        # First what may not be there at all.
        if self._settings.backend != "jax":
            self._describe_torch()
        if self._settings.backend != "torch":
            self._describe("jax")
        platforms = {side: found["platform"] for side, found in self._described.items()}
        if len(set(platforms.values())) > 1:
            raise ValueError(f"bench: the sides run on different devices: {platforms}; set --platform")
        if "torch" in self._described and "rl_step" in self._settings.phases:
            try:
                self._described["trl"] = self._side("trl", 1).ask("describe")
            except SideError as error:
                self._say(f"TRL is left out: {error}")
        if "rl_step" in self._settings.phases:
            self._describe_tunix()
        self._write_weights()
        if not self._together or self._settings.devices > 1:
            self.close()

    def _write_weights(self) -> None:
        """By the converter, for all sides; a kept folder may have them."""
        if (self._model / "config.json").exists():
            return
        model = dataclasses.asdict(self._settings.model_config)
        case = {"phase": "weights", "model": model, "seed": self._settings.seed}
        jax = self._side("jax", 1)
        jax.ask("open", name="weights", case=case | {"model_folder": str(self._model.resolve())})
        jax.ask("close", name="weights")

    def _describe(self, side: str) -> None:
        described = self._side(side, self._settings.devices).ask("describe")
        # The peak is one device's, so that is what is asked.
        products = {"phase": "products", "dtype": self._settings.dtype}
        answer = self._side(side, 1).ask("open", name="products", case=products)
        self._side(side, 1).ask("close", name="products")
        self._products[side] = answer["values"]["flops_per_s"]
        self._described[side] = described

    def _describe_torch(self) -> None:
        """Where nobody named an environment of PyTorch and this one has none, JAX is measured alone."""
        try:
            self._describe("torch")
        except SideError as error:
            if self._settings.backend == "torch" or self._settings.torch_python is not None:
                raise
            self._leave_out("all phases", "torch", error)

    def _describe_tunix(self) -> None:
        """From the environment that is named; what is wrong with it is told once, with how to get one."""
        if self._settings.tunix_python is None:
            if self._settings.backend == "both":
                self._leave_out("rl_step", "tunix", f"no --tunix_python; {GET_TUNIX}")
            return
        platforms = {side["platform"] for side in self._described.values()}
        try:
            found = self._side("tunix", 1).ask("describe")
            if "google-tunix" not in found["versions"]:
                raise SideError("google-tunix is not installed in --tunix_python")
            if found["platform"] not in platforms:
                raise SideError(f"its jax runs on {found['platform']}, the other sides on {platforms}")
        except SideError as error:
            self._leave_out("rl_step", "tunix", f"{GET_TUNIX}: {error}")
        else:
            self._described["tunix"] = found

    @property
    def _together(self) -> bool:
        """Whether both sides stay loaded."""
        how = self._settings.interleave
        on_cpu = all(side["platform"] == "cpu" for side in self._described.values())
        return how == "rounds" or (how == "auto" and on_cpu)

    def _peak(self) -> dict[str, Any]:
        kinds = {side["device"] for side in self._described.values()}
        known = next((device for kind in kinds if (device := known_device(kind))), None)
        if known is not None and self._settings.dtype == "bfloat16":
            return {
                "flops_per_s": known.flops, "bytes_per_s": known.bandwidth, "source": "data sheet",
                "products": self._products,
            }  # fmt: skip
        # The faster side's product, so that neither is measured against a peak of its own.
        best = max(self._products.values())
        return {"flops_per_s": best, "source": "largest measured product", "products": self._products}

    def _side(self, side: str, devices: int) -> SideProcess:
        key = side, devices
        if key in self._processes and self._processes[key].ended:
            self._processes.pop(key).close()
        if key not in self._processes:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._processes[key] = start_side(
                side, self._settings, self._folder, devices=devices, tools=self._tools
            )
        return self._processes[key]

    # One phase

    def _phase(self, phase: str, settings: BenchSettings, task: Task, point: dict[str, int]) -> None:
        torch = self._described.get("torch", {})
        attentions = tuple(torch.get("flags", {}).get("attention", ("sdpa",)))
        trl = "trl" in self._described.get("trl", {}).get("versions", {})
        entered = contestants(phase, settings, attentions=attentions, trl=trl)
        entered = [who for who in entered if who.side in self._described]
        if not trl and phase == "rl_step" and torch:
            self._leave_out(phase, "TRL", "trl is not installed in --trl_python")
        opened = [_Opened(who=who) for who in self._trial(entered, settings, task)]
        take_turns = self._in_rounds if self._together else self._in_sittings
        try:
            take_turns(opened, settings, task)
        except Disagreement as error:
            self.disagreements.append(str(error))
            self._leave_out(phase, "all", error)
            return
        for one in opened:
            if one.runs:
                self._record(one, settings, task, point)

    def _in_rounds(self, opened: Sequence[_Opened], settings: BenchSettings, task: Task) -> None:
        with ExitStack() as stack:
            for one in opened:
                self._open(stack, one, settings, task)
                self._check(opened, settings)
            for one in opened:
                self._attempt(one, "run", num=settings.warmup)
            for _ in range(settings.rounds):
                for one in opened:
                    self._time(one, num=1)
            for one in opened:
                self._profile(one, settings, task)

    def _in_sittings(self, opened: Sequence[_Opened], settings: BenchSettings, task: Task) -> None:
        halves = (-(-settings.rounds // 2), settings.rounds // 2)
        for sitting, num in enumerate(halves):
            for one in opened:
                # Its process ends whatever happens: JAX's would keep the memory that the next one needs.
                with self._leaving(), ExitStack() as stack:
                    self._open(stack, one, settings, task)
                    if sitting == 0:
                        self._check(opened, settings)
                    self._attempt(one, "run", num=settings.warmup)
                    self._time(one, num=num)
                    if sitting == 1:
                        self._profile(one, settings, task)

    @contextmanager
    def _leaving(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.close()

    def _check(self, opened: Sequence[_Opened], settings: BenchSettings) -> None:
        values = {one.who.label: one.first["values"] for one in opened if one.first and not one.failed}
        check(opened[0].who.phase, values, settings)

    def _trial(self, entered: Sequence[Contestant], settings: BenchSettings, task: Task) -> list[Contestant]:
        """The fastest of each seat, by two runs of each; a seat with one contestant needs none."""
        seats: dict[tuple[str, str], list[Contestant]] = {}
        for who in entered:
            seats.setdefault(who.seat, []).append(who)
        chosen = []
        for candidates in seats.values():
            if len(candidates) == 1:
                chosen += candidates
                continue
            seconds: dict[str, float] = {}
            for who in candidates:
                one = _Opened(who=who)
                with ExitStack() as stack:
                    self._open(stack, one, settings, task)
                    self._attempt(one, "run", num=1)
                    self._time(one, num=2)
                if one.runs:
                    seconds[who.label] = min(run["seconds"] for run in one.runs)
                if not self._together:
                    self.close()
            if not seconds:
                continue
            best = min(seconds, key=seconds.__getitem__)
            chosen += [who for who in candidates if who.label == best]
            self.left_out += [
                {"phase": candidates[0].phase, "label": label, "seconds": taken, "instead": best,
                 "its_seconds": seconds[best]}
                for label, taken in seconds.items() if label != best
            ]  # fmt: skip
        return [who for who in entered if who in chosen]

    def _open(self, stack: ExitStack, one: _Opened, settings: BenchSettings, task: Task) -> None:
        """The first run of a contestant; it is closed with the stack."""
        who = one.who
        first = self._attempt(one, "open", case=who.case(settings, task.folder, self._model))
        if first is None:
            return
        stack.callback(self._close, one)
        # A second opening finds its programs in the caches on disk: only the first says what compiling takes.
        compiled = self._firsts.setdefault((task.folder.name, who.phase, who.label), first)
        self._say(
            f"{who.phase}: {who.label}, built in {first['build_s']:.1f} s, first run {first['first_s']:.1f} s"
        )
        if not one.first:
            one.first = first | {name: compiled[name] for name in ("build_s", "first_s")}

    def _close(self, one: _Opened) -> None:
        # A process that has ended has nothing left to close.
        if not self._processes[one.who.side, self._devices].ended:
            with suppress(SideError):
                one.peaks = self._ask(one, "close")

    def _time(self, one: _Opened, *, num: int) -> None:
        if (answer := self._attempt(one, "run", num=num)) is not None:
            one.runs += answer["runs"]

    def _attempt(self, one: _Opened, command: str, **request: Any) -> dict[str, Any] | None:
        """The answer, or None where the side could not: then its runs are dropped and it is asked no more."""
        if one.failed:
            return None
        try:
            return self._ask(one, command, **request)
        except SideError as error:
            one.failed = True
            one.runs.clear()
            self._leave_out(one.who.phase, one.who.label, error)
            return None

    def _ask(self, one: _Opened, command: str, **request: Any) -> dict[str, Any]:
        return self._side(one.who.side, self._devices).ask(command, name=one.who.label, **request)

    def _leave_out(self, phase: str, label: str, error: object) -> None:
        self._say(f"{phase}: {label} left out: {error}")
        self.unavailable.append({"phase": phase, "label": label, "error": str(error)})

    def _profile(self, one: _Opened, settings: BenchSettings, task: Task) -> None:
        """A trace of one more run; what was timed stands without it."""
        if not settings.profile or one.failed:
            return
        who = one.who
        name = f"{task.folder.name}_{who.phase}_{who.label}".replace(" ", "_")
        found: dict[str, Any] = {"phase": who.phase, "label": who.label, "folder": name, "items": []}
        try:
            folder = str(Path(settings.profile).resolve() / name)
            found["items"] = self._ask(one, "profile", folder=folder)["items"]
        except SideError as error:
            self._say(f"{who.phase}: no trace of {who.label}: {error}")
            found["error"] = str(error)
        self.profiles.append(found)

    def _record(self, one: _Opened, settings: BenchSettings, task: Task, point: dict[str, int]) -> None:
        """One row for each phase that the runs hold."""
        who = one.who
        common = {
            "side": who.side, "label": who.label, "layout": who.layout, "point": point,
            "base": {name: getattr(self._settings, name) for name in self._settings.sweep},
            "devices": settings.devices, "build_s": one.first["build_s"], "first_s": one.first["first_s"],
            **one.peaks,
        }  # fmt: skip
        if who.phase == "generate":
            for phase in results.GENERATED:
                seconds = [run["values"][f"{phase}_s"] for run in one.runs]
                tokens, flops = task.tokens(settings, phase), task.flops(settings, phase, "")
                self.rows.append(common | results.measured(phase, seconds, tokens=tokens, flops=flops))
            return
        # A whole step makes its own rows: JAX shares prompts in them, PyTorch has a row a sequence.
        layout = who.layout or ("shared_prefix" if who.side == "jax" else "separate")
        row = common | results.measured(
            who.phase, [run["seconds"] for run in one.runs], tokens=task.tokens(settings, who.phase),
            flops=task.flops(settings, who.phase, layout),
        )  # fmt: skip
        row["cpu_seconds"] = [run["cpu_seconds"] for run in one.runs]
        names = [name for name in one.runs[0]["values"] if name.endswith("_s")]
        row["parts"] = {n: statistics.median(run["values"][n] for run in one.runs) for n in names}
        row |= {name: one.first["values"].get(name) for name in ("loss", "grad_norm")}
        if who.phase in PACKED_WORK:
            row["padding"] = task.padding[who.layout]
        self.rows.append(row)


def points(settings: BenchSettings) -> list[tuple[dict[str, int], BenchSettings]]:
    """The settings as they are, then with one swept setting changed at a time."""
    return [({}, settings)] + [
        ({name: value}, dataclasses.replace(settings, **{name: value}))
        for name, values in settings.sweep.items()
        for value in values
        if value != getattr(settings, name)
    ]


def _case_name(point: dict[str, int]) -> str:
    return "_".join(f"{key}{value}" for key, value in point.items()) or "base"
