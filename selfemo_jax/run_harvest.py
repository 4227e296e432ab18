"""Around the harvests of a run: the verifier that reads new inputs, and what a finished harvest is worth."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from rich.table import Table

from selfemo_jax.algo.rewards import weighted_iou
from selfemo_jax.appendlog import atomic_write
from selfemo_jax.config import Config
from selfemo_jax.data.inputs import Sample
from selfemo_jax.data.label_arrays import answers_to_arrays, gold_to_array
from selfemo_jax.distributed import from_first, is_first
from selfemo_jax.model.decoder import Params
from selfemo_jax.parts import Parts, weights_of
from selfemo_jax.phases import BASE, Phase, last_steps
from selfemo_jax.rollout.jax_engine import JaxEngine
from selfemo_jax.run_data import RunData
from selfemo_jax.run_inputs import SYNTHETIC
from selfemo_jax.runlog import RunLog
from selfemo_jax.scores import greedy_answers
from selfemo_jax.selfplay.drift import check_drift, harvest_report
from selfemo_jax.selfplay.flywheel import Verdict
from selfemo_jax.selfplay.no_signal import inputs_without_signal
from selfemo_jax.selfplay.recorded import RecordedTurn, newest_answers
from selfemo_jax.selfplay.selection import choose, label_shares


def teaching_inputs(
    found: Mapping[str, tuple[Sample, ...]],
    run_dir: Path,
    plan: tuple[Phase, ...],
    phase: Phase,
    config: Config,
    *,
    say: Callable[[str], None],
) -> dict[str, tuple[Sample, ...]]:
    """The phase's inputs by source without the synthetic ones that taught nothing before, where
    `flywheel.tau_low` asks for that."""
    synthetic, tau_low = found.get(SYNTHETIC, ()), config.flywheel.tau_low
    if tau_low is None or not synthetic:
        return dict(found)
    dropped = from_first(
        lambda: inputs_without_signal(synthetic, run_dir, plan, phase, tau_low=tau_low), channel="signal"
    )
    if dropped:
        say(f"{phase.name}: {len(dropped)} synthetic inputs taught nothing before")
    kept = tuple(sample for sample in synthetic if sample.id not in set(dropped))
    others = {name: samples for name, samples in found.items() if name != SYNTHETIC}
    return others | ({SYNTHETIC: kept} if kept else {})


class Verifier:
    """A frozen recogniser on an engine of its own, so that the policy's engine keeps its weights; closed by
    `close` or the end of a `with`."""

    def __init__(self, params: Params, parts: Parts, *, num_classes: int) -> None:
        self._parts, self._num_classes = parts, num_classes
        rows = parts.config.eval.batch_rows
        self._engine = JaxEngine(parts.model, parts.compute, parts.mesh, max_rows=rows)
        self._engine.update_policy(params, version=0)

    def __call__(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Its greedy answer to each new input, and how far it agrees with the declared emotions."""
        predictions = greedy_answers(self._engine, samples, self._parts.codec, self._parts.config)
        answers = [prediction.answer for prediction in predictions]
        inventories = [sample.inventory for sample in samples]
        pred, valid = answers_to_arrays(
            [[answer] for answer in answers], inventories, num_classes=self._num_classes
        )
        gold = gold_to_array([s.gold for s in samples], inventories, num_classes=self._num_classes)
        agreement = np.asarray(weighted_iou(jnp.asarray(pred), jnp.asarray(gold), jnp.asarray(valid)))[:, 0]
        return [
            Verdict(agreement=float(value), emotion=_known(answer.emotion, sample) if answer.valid else {})
            for value, answer, sample in zip(agreement, answers, samples, strict=True)
        ]

    def close(self) -> None:
        """Release its engine."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_verifier(parts: Parts, weights: Callable[[str], Params], *, num_classes: int) -> Verifier | None:
    """The verifier that the settings name, if any; ``weights`` gives those of the base policy or of a
    phase."""
    config = parts.config
    name = config.flywheel.verifier.weights
    if name is None and config.flywheel.control == "verifier_labels":
        name = BASE if config.cold_start.source == "none" else "cold"
    if name is None:
        return None
    params = weights(name) if name in (BASE, "cold") else weights_of(parts, Path(name))
    return Verifier(params, parts, num_classes=num_classes)


def recorded_turn(
    run_dir: Path,
    plan: tuple[Phase, ...],
    phase: Phase,
    inputs: Mapping[str, Sequence[Sample]],
    config: Config,
) -> RecordedTurn:
    """What `flywheel.harvest: replay` judges: the rollouts of the last steps of the RL before a harvest."""
    wheel = config.flywheel
    return newest_answers(
        run_dir,
        last_steps(run_dir, plan, phase.init, most=wheel.max_age),
        {sample.id: sample for samples in inputs.values() for sample in samples},
        max_depth=wheel.max_depth,
        most=wheel.max_inputs,
        size=wheel.dialogues_per_step,
    )


def close_harvest(
    records: Sequence[Mapping[str, Any]],
    data: RunData,
    config: Config,
    *,
    name: str,
    folder: Path,
    log: RunLog,
) -> None:
    """Write ``harvest.json`` into the phase's folder and print it; `DriftError` where its labels are too far
    from the human ones to train on."""
    originals = data.all_train()
    human = label_shares(originals)
    wheel = config.flywheel
    selection = choose(
        [Sample.from_json(record["sample"]) for record in records if record["accepted"]],
        n_syn=wheel.n_syn,
        heldout=wheel.heldout,
        seed=config.seed,
        human=human,
        max_label_ratio=wheel.max_label_ratio,
    )
    report = harvest_report(records, selection, human, originals, config)
    alarm = ""
    try:
        alarm = check_drift(report, config)
    finally:
        content = report | {"alarm": alarm, "places": _places(selection)}
        if is_first():
            atomic_write(folder / "harvest.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        log.show(harvest_table(name, report))
    if alarm:
        log.say(f"{name}: {alarm}")
    log.say(f"{name}: {report['training']} synthetic inputs, {report['heldout']} held out")


def harvest_table(name: str, report: Mapping[str, Any]) -> Table:
    """The counts of a harvest and its labels beside the human ones."""
    counts = [f"{report['proposed']} proposed", f"{report['accepted']} accepted"]
    counts += [f"{count} {reason}" for reason, count in report["rejected"].items()]
    places = [f"{report['training']} to train on", f"{report['heldout']} held out"]
    places += [f"{count} left out by {reason}" for reason, count in report["left_out"].items()]
    bits = report["divergence"]
    drift = f"{bits['accepted']:.3f} bits from the human labels, {bits['training']:.3f} of what is trained on"
    table = Table(
        title=f"{name}: {', '.join(counts)}",
        caption=f"{', '.join(places)}; {drift}",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("set", "label", "human", "recognised", "declared", "accepted", "training"):
        table.add_column(column, justify="left" if column in ("set", "label") else "right")
    labels = report["labels"]
    for dataset, shares in labels["human"].items():
        for label in sorted(shares, key=lambda label: -shares[label]):
            cells = [f"{labels[column].get(dataset, {}).get(label, 0.0):.3f}" for column in list(labels)]
            table.add_row(dataset, label, *cells)
    return table


def _places(selection) -> dict[str, list[str]]:
    """Where every accepted input went, by id."""
    parts = {"training": selection.training, "heldout": selection.heldout} | dict(selection.left_out)
    return {place: [sample.id for sample in samples] for place, samples in parts.items()}


def _known(emotion: Sequence[tuple[str, float]], sample: Sample) -> dict[str, float]:
    return {label: weight for label, weight in emotion if label in sample.inventory}
