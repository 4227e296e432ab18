"""A run in progress: its folder, what it resumes from, and everything the page asks for by name.

The page (`train.py`) holds the algorithm; this holds the state around it: weights of phases, dev scores,
checkpoints, stops. Make it with `run_open.open_run`; it is closed at the end of its ``with`` block.
"""

import functools
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from selfemo_jax import label_phase, run_harvest, run_inputs
from selfemo_jax import phases as plans
from selfemo_jax.appendlog import AppendLog
from selfemo_jax.cards import write_cards
from selfemo_jax.checkpoint import StateStore
from selfemo_jax.config import Config, Optim
from selfemo_jax.data.inputs import Sample
from selfemo_jax.data.pipeline import Batch
from selfemo_jax.distributed import alone, any_of, is_first
from selfemo_jax.model.adapters import base_of
from selfemo_jax.model.decoder import Params
from selfemo_jax.parts import Parts, base_weights, compile_steps, weights_of
from selfemo_jax.phases import Phase, Position
from selfemo_jax.rollout.engine import Request, Sampling
from selfemo_jax.rollout.gap import check_gap
from selfemo_jax.rollout.records import prune, save_groups, save_texts
from selfemo_jax.rollout.stream import Rollouts, rollout_stream, sampling_seed
from selfemo_jax.run_data import RunData
from selfemo_jax.run_hosts import SharedStore
from selfemo_jax.run_resume import At, Stopped, check_same_data, newest_point, stop_check, take_back
from selfemo_jax.run_scores import dev_metrics, dev_subset, score_whole_splits
from selfemo_jax.run_steps import StepWatch
from selfemo_jax.run_weights import adapted_weights, best_kept, save_policy, weights_folder, weights_named
from selfemo_jax.runlog import RunLog
from selfemo_jax.scoring import Scored, make_scorer
from selfemo_jax.selfplay.flywheel import Candidate, ReplyIndex, summarise
from selfemo_jax.selfplay.play import Turn, accepted_replies, records_of, turns
from selfemo_jax.selfplay.recorded import RecordedTurn
from selfemo_jax.serving import run_engine
from selfemo_jax.train_step import Steps, TrainState

Item = TypeVar("Item")
TIME_LIMIT = "time limit"


class Run:
    """The state around the page."""

    def __init__(self, config: Config, parts: Parts, data: RunData, log: RunLog):
        self.config, self.parts, self.data, self.log = config, parts, data, log
        self.dir, self.codec, self.timer = log.run_dir, parts.codec, log.timer
        self.plan = plans.plan(config)
        self.scorer = make_scorer(config, data.all_train())
        self.sampling = Sampling(
            max_tokens=config.rollout.max_tokens,
            temperature=config.rollout.temperature,
            stop_ids=parts.codec.stop_ids,
        )
        self.engine = run_engine(parts, self.dir, log.say)
        self.global_step, self._phase_step, self._total = 0, 0, 0
        self._stop: str | None = None
        self._best: dict[str, Any] | None = None
        self._resumed: tuple[int, dict[str, Any]] | None = None
        self._steps: dict[Optim, Steps] = {}
        self._base: Params | None = None
        self._started = time.monotonic()
        self._watch = StepWatch(config, log)
        self._flywheel = SharedStore(self.dir / "flywheel.jsonl")
        self._of_phase = ExitStack()
        self._best_dir = self.dir / "checkpoints" / "best"
        states, saving = self.dir / "checkpoints" / "states", config.checkpoint
        self._store = StateStore(states, keep=saving.keep, asynchronous=saving.asynchronous)
        self._dev = dev_subset(data, config)
        self.encode_input = functools.partial(run_inputs.encode_input, codec=parts.codec, config=config)
        self._table = label_phase.table_of(data, parts.codec, config)
        self.encode_example = run_inputs.example_encoder(data, parts.codec, config, self._table)

    # What a run resumes from

    def rewind(self) -> None:
        """Take everything back to the newest complete step: logs are cut to what it recorded, later records
        set aside. ValueError where a log lost content, the data changed, or there is nothing left to do."""
        point, self._resumed = newest_point(self.dir, self.plan, self._store)
        if point is None:
            start = Position(phase=0, step=0, global_step=0)
            point = self._meta(start, None) | {"logs": {}, "best": None}
        check_same_data(point, self.data.fingerprint, self.dir)
        self.global_step = point["position"]["global_step"]
        self._best = best_kept(point["best"], self._best_dir)
        take_back(self.dir, point, self._logs(), into=self.log.orphan_dir, say=self.log.say)
        first = plans.first_open(self.dir, self.plan)
        where = self.plan[first].name if first < len(self.plan) else "the final scores"
        self.log.say(f"resuming at {where}, step {point['position']['step']}, global step {self.global_step}")

    def open_phases(self) -> tuple[Phase, ...]:
        """The phases that are not done."""
        return self.plan[plans.first_open(self.dir, self.plan) :]

    def start(self, phase: Phase, steps: Steps, *, total_steps: int) -> tuple[TrainState, At]:
        """The phase's training state: as the checkpoint left it, or fresh from the weights of
        ``phase.init``."""
        fresh = steps.init_state(self.weights(phase.init))
        restored, at = self._enter(phase, total_steps, fresh)
        return fresh if restored is None else restored, at

    def start_frozen(self, phase: Phase) -> tuple[Params, At]:
        """The weights of ``phase.init`` for a phase that changes none, and where it goes on."""
        _, at = self._enter(phase, 0, None)
        return self.weights(phase.init), at

    def _enter(self, phase: Phase, total_steps: int, like: TrainState | None) -> tuple[TrainState | None, At]:
        self._total = total_steps
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            plans.begin(self.dir, phase)
            self._phase_step = 0
            return None, At(step=0, iterator=None)
        global_step, meta = resumed
        self._phase_step = meta["position"]["step"]
        state = None if like is None else self._store.restore(global_step, like)
        return state, At(step=self._phase_step, iterator=meta["iterator"])

    # Weights, compiled functions, inputs

    def weights(self, name: str) -> Params:
        """The weights that a finished phase left, or the base policy's; with adapters one base for all."""
        if not self.config.lora.rank:
            return weights_named(name, self.parts, self.plan, self.dir)
        if self._base is None:
            self._base = base_weights(self.parts)
        return adapted_weights(name, self._base, self.parts, self.plan, self.dir)

    def reference(self, phase: Phase) -> Params | None:
        """The frozen policy that the phase is held to, None without a KL term. With adapters it is a matter
        of other adapters, or of none: no second copy."""
        if not self.config.loss.kl_coef:
            return None
        found = self.weights(phase.init)
        return base_of(found) if phase.init == plans.BASE else found

    def steps(self, optim: Optim) -> Steps:
        """Compiled functions for an optimizer's settings, made once in a process."""
        if optim not in self._steps:
            self._steps[optim] = compile_steps(self.parts, optim, labels=self._table)
        return self._steps[optim]

    def refresh(self, params: Params, *, version: int | None = None) -> None:
        """Give the engine the policy; its version is the number of global steps behind it, all by default."""
        with self.timer("refresh"):
            self.engine.update_policy(params, version=self.global_step if version is None else version)

    def seed(self, phase: Phase) -> int:
        """Seed of a phase's order of inputs."""
        return sampling_seed(self.config.seed, phase.name, "order") % 2**31

    def inputs(self, phase: Phase) -> dict[str, tuple[Sample, ...]]:
        """The phase's buffer by source."""
        found = run_inputs.phase_inputs(phase, self.data, self._records(), self.config)
        return run_harvest.teaching_inputs(found, self.dir, self.plan, phase, self.config, say=self.log.say)

    def examples(self, phase: Phase) -> dict[str, tuple[Any, ...]]:
        """The phase's supervised examples by source, or with `cold_start.rows: dialogues` those of each
        dialogue."""
        found = run_inputs.phase_examples(phase, self.data, self._records(), self.codec, self.config)
        by_dialogue = self.config.cold_start.rows == "dialogues"
        return run_inputs.example_dialogues(found) if by_dialogue else dict(found)

    def label_dialogues(self) -> label_phase.Dialogues:
        """The labelled lines of the training dialogues by source."""
        return label_phase.training_dialogues(self.data, self.config)

    def encode_questions(self, dialogues: label_phase.Dialogues) -> Callable[[Any], Any]:
        """Dialogue -> its questions, as the phase on labels takes them."""
        assert self._table is not None
        return label_phase.question_encoder(dialogues, self._table, self.codec, self.config)

    def mixture(self, sources: Mapping[str, Sequence[Any]]) -> dict[str, float]:
        """Share of a batch that each source gets."""
        return run_inputs.source_weights(sources, self.config)

    def difficulty(self) -> Callable[[Any], float] | None:
        """How hard an item of a supervised phase is, where `cold_start.order` asks for a curriculum."""
        return run_inputs.item_difficulty(self.data, self.config)

    def turns(self, phase: Phase, *, done: int) -> Iterator[Turn]:
        """The turns of a harvest that are not over after ``done`` steps; each waits for the one before."""
        if self.config.flywheel.harvest == "replay":
            recorded = run_harvest.recorded_turn(self.dir, self.plan, phase, self.inputs(phase), self.config)
            return (turn for turn in (recorded,) if turn.last > done)
        opening = run_inputs.opening_inputs(self.inputs(phase), self.config, seed=self.seed(phase))
        judged = functools.partial(self._records, iteration=phase.iteration)
        return (turn for turn in turns(opening, judged, self.config.flywheel) if turn.last > done)

    def answers(self, phase: Phase, turn: Turn, *, after: int) -> Iterator[tuple[int, Rollouts]]:
        """The answers to the turn's dialogues, step by step: sampled now, or recorded."""
        if isinstance(turn, RecordedTurn):
            return turn.rollouts(self.encode_input, after=after)
        return rollout_stream(
            self.engine, turn.batches(self.encode_input, after=after), self.requests_of(phase), self.sampling,
            first=max(turn.first, after + 1), last=turn.last, ahead=0, max_lost=self.config.rollout.max_lost,
            tell=self.log.say,
        )  # fmt: skip

    def requests_of(self, phase: Phase) -> Callable[[int, Batch], tuple[Request, ...]]:
        """Requests of a step of the phase, each with its own sampling seed."""
        before = self.global_step - self._phase_step
        return functools.partial(run_inputs.step_requests, phase=phase, config=self.config, before=before)

    def reply_index(self) -> ReplyIndex:
        """Replies accepted so far in this run."""
        threshold = self.config.flywheel.hygiene.near_duplicate
        return ReplyIndex(accepted_replies(self._records()), threshold=threshold)

    def verifier(self) -> run_harvest.Verifier | None:
        """The frozen recogniser that a harvest must convince, if the settings name one; of one phase."""
        found = run_harvest.open_verifier(self.parts, self.weights, num_classes=self.data.num_classes)
        return found and self._of_phase.enter_context(found)

    def _records(self, **which: Any) -> list[dict[str, Any]]:
        return self._flywheel.records(**which)

    # The end of a step, and of a phase

    def watch(self, phase: Phase, items: Iterator[Item], *, total: int | None = None) -> Iterator[Item]:
        """The items, with progress towards ``total``, the phase's own number of steps by default."""
        self._total = self._total if total is None else total
        return self._watch.follow(
            phase, items, total=self._total, done=self._phase_step, number=lambda: self.global_step + 1
        )

    def record(self, rollouts: Rollouts, scored: Scored) -> None:
        """Write the step's rollouts: arrays for replay, text for people."""
        global_step = self.global_step + 1
        if not is_first():
            return
        with self.timer("record"):
            save_groups(self.dir, global_step, rollouts.requests, rollouts.groups)
            save_texts(self.dir, global_step, scored)
            prune(self.dir, global_step, keep=self.config.rollout.keep)

    def end_step(
        self,
        phase: Phase,
        step: int,
        state: TrainState,
        metrics: Mapping[str, float],
        iterator: Mapping[str, Any],
    ) -> None:
        """Refresh the sampler, score on dev, log, save and stop, each when it is due."""
        self.global_step += 1
        if warning := check_gap(metrics, self.config.rollout, where=f"{phase.name} step {step}"):
            self.log.say(warning)
        every, kept = self.config.eval.every, self.config.checkpoint.weights_every
        due = step == self._total or (every > 0 and step % every == 0)
        if folder := plans.kept_dir(self.dir, phase, step, every=kept, total=self._total):
            self._save_weights(folder, state.params, phase)
        if phase.kind == "rl" or (due and phase.kind != "labels"):
            self.refresh(state.params)
        scores = self._score_dev(phase, state.params) if due else {}
        self._end(phase, step, state, {**metrics, **scores}, iterator)

    def end_harvest(
        self, phase: Phase, step: int, turn: Turn, candidates: Sequence[Candidate], scored: Scored
    ) -> None:
        """Write the judged rollouts to the flywheel's store, log and save."""
        self.global_step += 1
        for record in records_of(candidates, turn, self.codec, style=self.config.output.prompt_style):
            self._flywheel.append({"iteration": phase.iteration} | record)
        self._end(phase, step, None, scored.metrics | turn.metrics() | summarise(candidates), None)

    def finish(self, phase: Phase, state: TrainState | None) -> None:
        """Leave the phase's folder behind: weights, record, and the marker last."""
        if state is not None:
            self._save_weights(weights_folder(self.dir, phase), state.params, phase)
        for log in self._logs().values():
            log.flush()
        if phase.kind == "harvest":
            # Before the phase is marked: a harvest that may not be trained on is not done.
            run_harvest.close_harvest(
                self._records(iteration=phase.iteration), self.data, self.config,
                name=phase.name, folder=plans.phase_dir(self.dir, phase), log=self.log,
            )  # fmt: skip
        position = Position(phase=phase.index + 1, step=0, global_step=self.global_step)
        plans.finish(self.dir, phase, self._meta(position, None) | {"steps": self._phase_step})
        self._of_phase.close()

    def final_scores(self) -> None:
        """Score the best policy of the last phase on whole splits, and print what it is worth."""
        if not self.plan:
            return self._score_final(self.weights(plans.BASE), notice="")
        scored = self._best_dir if self._best else weights_folder(self.dir, self.plan[-1])
        self._score_final(weights_of(self.parts, scored), notice="")
        if is_first():
            write_cards(scored, self.dir)

    def _end(
        self,
        phase: Phase,
        step: int,
        state: TrainState | None,
        metrics: Mapping[str, float],
        iterator: Mapping[str, Any] | None,
    ) -> None:
        self._phase_step = step
        speed = (
            self._watch.end(self.global_step, tokens=metrics.get("batch/tokens", 0.0), wait_for=state)
            | getattr(self.engine, "take_metrics", dict)()
        )
        self.log.step(self.global_step, {**metrics, **speed, "phase_step": step}, phase=phase.name)
        self._watch.forecast(phase, left=self._total - step, total=self._total, seconds=speed["time/step"])
        reason = self._why_stop()
        # A harvest's state is a few numbers, its steps are long.
        if reason or state is None or step % self.config.checkpoint.every == 0:
            position = Position(phase=phase.index, step=step, global_step=self.global_step)
            for log in self._logs().values():
                log.flush()
            with self.timer("save"):
                self._store.save(self.global_step, state, self._meta(position, iterator))
        if reason:
            self._store.wait()
            words = f"{reason} at {phase.name} step {step}; saved, go on with --resume --run_dir {self.dir}"
            if reason.startswith(TIME_LIMIT):
                params = self.weights(phase.init) if state is None else state.params
                self._score_final(params, notice=f"unfinished: {reason}")
            raise Stopped(words)

    def _why_stop(self) -> str:
        limit = self.config.time_limit
        over = limit is not None and time.monotonic() - self._started > limit * 60
        reason = self._stop or (f"{TIME_LIMIT} of {limit:g} min reached" if over else "")
        return any_of(reason, channel="stop")

    def on_signal(self, number: int, frame: Any) -> None:
        """Ask for a stop at the next step boundary."""
        del frame
        self._stop = signal.Signals(number).name

    # Scores and files

    def _score_dev(self, phase: Phase, params: Params) -> dict[str, float]:
        if not self._dev:
            return {}
        if phase.kind == "labels":
            assert self._table is not None
            dev = self.data.split(self.config.data.dev_split)
            steps = self.steps(self.config.cold_start.labels.optim)
            with self.timer("eval"):
                return label_phase.label_metrics(
                    steps, params, dev, self._table, self.data.label_sets, self.codec, self.config
                )
        with self.timer("eval"):
            metrics = dev_metrics(self.engine, self._dev, self.parts, self.data, phase, records=self._records)
        value = metrics["dev/wf1"]
        if phase == self.plan[-1] and (self._best is None or value > self._best["dev/wf1"]):
            self._best = {"dev/wf1": value, "global_step": self.global_step, "phase": phase.name}
            self._save_weights(self._best_dir, params, phase)
        return metrics

    def _score_final(self, params: Params, *, notice: str) -> None:
        self.refresh(params)
        summary = {"global_step": self.global_step, "best": self._best}
        with self.timer("eval"):
            score_whole_splits(
                self.engine, self.parts, self.data,
                run_dir=self.dir, notice=notice, summary=summary, say=self.log.say,
                check_stop=stop_check(lambda: self._stop, self.dir),
            )  # fmt: skip

    def _save_weights(self, folder: Path, params: Params, phase: Phase) -> None:
        with self.timer("save"):
            save_policy(folder, params, self.parts, phase=phase, global_step=self.global_step)

    def _logs(self) -> dict[str, AppendLog | SharedStore]:
        """Those that this process writes."""
        logs = {"metrics.jsonl": self.log.metrics, "flywheel.jsonl": self._flywheel}
        return {name: log for name, log in logs.items() if log is not None and is_first()}

    def _meta(self, position: Position, iterator: Mapping[str, Any] | None) -> dict[str, Any]:
        return {
            "position": asdict(position),
            "iterator": None if iterator is None else dict(iterator),
            "logs": {name: list(log.length_and_digest()) for name, log in self._logs().items()},
            "fingerprint": self.data.fingerprint,
            "best": self._best,
            "experts": dict(self.data.expert_cache),
        }

    def close(self) -> None:
        """Finish the last write and release files and devices; errors of the write are raised."""
        self._watch.close()
        self._flywheel.close()
        self._of_phase.close()
        self.engine.close()
        if not alone():
            self._store.close()
