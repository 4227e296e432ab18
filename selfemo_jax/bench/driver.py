"""Runs a benchmark: weights, tokens, the sides' processes, agreement before timing, rounds taken in turns."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfemo_jax.bench import results
from selfemo_jax.bench.contestants import Contestant, contestants
from selfemo_jax.bench.process import SideError, SideProcess, start_side
from selfemo_jax.bench.settings import BenchSettings
from selfemo_jax.bench.task import PACKED_WORK, Task, make_task
from selfemo_jax.model.flops import known_device

Say = Callable[[str], None]
GREEDY_SHARE = 0.98
"""Greedy tokens that must be equal in float32; a tie of two logits may fall either way."""


class Disagreement(RuntimeError):
    """The sides do not compute the same: nothing is timed."""


@dataclass
class _Opened:
    """A contestant's runs so far."""

    who: Contestant
    first: dict[str, Any]
    runs: list[dict[str, Any]] = field(default_factory=list)
    peaks: dict[str, Any] = field(default_factory=dict)


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

    def run(self) -> dict[str, Any]:
        """Everything measured, as `results` describes it."""
        began, load = time.strftime("%Y-%m-%dT%H:%M:%S%z"), os.getloadavg()
        self._prepare()
        for point, settings in points(self._settings):
            name = "_".join(f"{key}{value}" for key, value in point.items()) or "base"
            task = make_task(settings, self._folder / name)
            for phase in settings.phases:
                self._phase(phase, settings, task, point)
        return results.assemble(
            self._settings,
            rows=self.rows,
            sides=self._described,
            left_out=self.left_out,
            unavailable=self.unavailable,
            profiles=self.profiles,
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
        """Write the weights, and ask the sides what they are."""
        model = dataclasses.asdict(self._settings.model_config)
        case = {"phase": "weights", "model": model, "seed": self._settings.seed}
        jax = self._side("jax", 1)
        self._folder.mkdir(parents=True, exist_ok=True)
        if not (self._model / "config.json").exists():
            jax.ask("open", name="weights", case=case | {"model_folder": str(self._model.resolve())})
            jax.ask("close", name="weights")
        sides = {"both": ("jax", "torch")}.get(self._settings.backend, (self._settings.backend,))
        for side in sides:
            self._described[side] = self._side(side, 1).ask("describe")
            products = {"phase": "products", "dtype": self._settings.dtype}
            answer = self._side(side, 1).ask("open", name="products", case=products)
            self._side(side, 1).ask("close", name="products")
            self._products[side] = answer["values"]["flops_per_s"]
        platforms = {side: found["platform"] for side, found in self._described.items()}
        if len(set(platforms.values())) > 1:
            raise ValueError(f"bench: the sides run on different devices: {platforms}; set --platform")
        if "torch" in sides and "rl_step" in self._settings.phases:
            try:
                self._described["trl"] = self._side("trl", 1).ask("describe")
            except SideError as error:
                self._say(f"TRL is left out: {error}")
                self._processes.pop(("trl", 1)).close()
        if not self._together:
            self.close()

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
        if key not in self._processes:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._processes[key] = start_side(
                side, self._settings, self._folder, devices=devices, tools=self._tools
            )
        return self._processes[key]

    # One phase

    def _phase(self, phase: str, settings: BenchSettings, task: Task, point: dict[str, int]) -> None:
        attentions = tuple(self._described.get("torch", {}).get("flags", {}).get("attention", ("sdpa",)))
        trl = "trl" in self._described.get("trl", {}).get("versions", {})
        entered = contestants(phase, settings, attentions=attentions, trl=trl)
        if not trl and phase == "rl_step" and settings.backend != "jax":
            self.unavailable.append(
                {"phase": phase, "label": "TRL", "error": "trl is not installed in --trl_python"}
            )
        finalists = self._trial(entered, settings, task)
        opened = {who.label: _Opened(who=who, first={}) for who in finalists}
        if self._together:
            self._in_rounds(finalists, opened, settings, task)
        else:
            self._in_sittings(finalists, opened, settings, task)
        for one in opened.values():
            if one.runs:
                self._record(one, settings, task, point)

    def _in_rounds(
        self, finalists: Sequence[Contestant], opened: dict[str, _Opened], settings: BenchSettings, task: Task
    ) -> None:
        with ExitStack() as stack:
            ready = []
            for who in finalists:
                first = self._open(stack, who, settings, task, opened[who.label])
                if first is None:
                    continue
                opened[who.label].first = first
                ready.append(who)
                self._check([opened[one.label] for one in ready], settings)
            for who in ready:
                self._ask(who, "run", num=settings.warmup)
            for _ in range(settings.rounds):
                for who in ready:
                    opened[who.label].runs += self._ask(who, "run", num=1)["runs"]
            self._profile(ready, settings, task)

    def _in_sittings(
        self, finalists: Sequence[Contestant], opened: dict[str, _Opened], settings: BenchSettings, task: Task
    ) -> None:
        halves = (-(-settings.rounds // 2), settings.rounds // 2)
        for sitting, num in enumerate(halves):
            for who in finalists:
                with ExitStack() as stack:
                    first = self._open(stack, who, settings, task, opened[who.label])
                    if first is None:
                        continue
                    if sitting == 0:
                        opened[who.label].first = first
                        self._check([one for one in opened.values() if one.first], settings)
                    self._ask(who, "run", num=settings.warmup)
                    opened[who.label].runs += self._ask(who, "run", num=num)["runs"]
                    if sitting == 1:
                        self._profile([who], settings, task)
                self.close()

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
                with ExitStack() as stack:
                    if self._open(stack, who, settings, task, None) is not None:
                        self._ask(who, "run", num=1)
                        runs = self._ask(who, "run", num=2)["runs"]
                        seconds[who.label] = min(run["seconds"] for run in runs)
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

    @contextmanager
    def _closing(self, who: Contestant, one: _Opened | None) -> Iterator[None]:
        try:
            yield
        finally:
            # A process that has ended has nothing left to close.
            try:
                peaks = self._ask(who, "close")
            except SideError:
                peaks = {}
            if one is not None:
                one.peaks = peaks

    def _open(
        self, stack: ExitStack, who: Contestant, settings: BenchSettings, task: Task, one: _Opened | None
    ) -> dict[str, Any] | None:
        """The first run of a contestant, or None where its side cannot do it."""
        self._devices = settings.devices
        case = who.case(settings, task.folder, self._model)
        try:
            first = self._ask(who, "open", case=case)
        except SideError as error:
            self._say(f"{who.phase}: {who.label} left out: {error}")
            self.unavailable.append({"phase": who.phase, "label": who.label, "error": str(error)})
            return None
        stack.enter_context(self._closing(who, one))
        # A second opening finds its programs in the caches on disk: only the first says what compiling takes.
        compiled = self._firsts.setdefault((task.folder.name, who.phase, who.label), first)
        self._say(
            f"{who.phase}: {who.label}, built in {first['build_s']:.1f} s, first run {first['first_s']:.1f} s"
        )
        return first | {name: compiled[name] for name in ("build_s", "first_s")}

    def _ask(self, who: Contestant, command: str, **request: Any) -> dict[str, Any]:
        return self._side(who.side, self._devices).ask(command, name=who.label, **request)

    def _check(self, opened: Sequence[_Opened], settings: BenchSettings) -> None:
        """Same losses, gradient norms and greedy tokens, before anything is timed."""
        phase = opened[0].who.phase
        values = {one.who.label: one.first["values"] for one in opened}
        losses = {label: found["loss"] for label, found in values.items() if "loss" in found}
        if losses and max(losses.values()) - min(losses.values()) > settings.loss_tolerance:
            raise Disagreement(f"{phase}: losses differ by more than {settings.loss_tolerance}: {losses}")
        norms = {label: found["grad_norm"] for label, found in values.items() if "grad_norm" in found}
        bound = 1e-3 if settings.dtype == "float32" else 5e-2
        if norms and max(norms.values()) > (1 + bound) * min(norms.values()):
            raise Disagreement(f"{phase}: gradient norms differ by more than {bound:.1%}: {norms}")
        tokens = {label: found["tokens"] for label, found in values.items() if "tokens" in found}
        expected = settings.groups * settings.group_size * settings.completion
        if set(tokens.values()) - {expected}:
            raise Disagreement(f"{phase}: {expected} tokens were to be sampled, found {tokens}")
        greedy = {label: found["greedy"] for label, found in values.items() if "greedy" in found}
        if settings.dtype == "float32" and greedy:
            reference = next(iter(greedy.values()))
            for label, tokens in greedy.items():
                share = sum(a == b for a, b in zip(tokens, reference, strict=True)) / len(reference)
                if share < GREEDY_SHARE:
                    raise Disagreement(f"{phase}: {label} has {share:.0%} of the greedy tokens of the first")

    def _profile(self, who: Sequence[Contestant], settings: BenchSettings, task: Task) -> None:
        if settings.profile:
            for one in who:
                name = f"{task.folder.name}_{one.phase}_{one.label}".replace(" ", "_")
                folder = Path(settings.profile).resolve() / name
                items = self._ask(one, "profile", folder=str(folder))["items"]
                self.profiles.append({"phase": one.phase, "label": one.label, "folder": name, "items": items})

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
            for phase in ("prefill", "decode", "rollout"):
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


def points(settings: BenchSettings) -> Iterator[tuple[dict[str, int], BenchSettings]]:
    """The settings as they are, then with one swept setting changed at a time."""
    yield {}, settings
    for name, values in settings.sweep.items():
        for value in values:
            if value != getattr(settings, name):
                yield {name: value}, dataclasses.replace(settings, **{name: value})
