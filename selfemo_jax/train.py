"""Algorithm 1 of SELF-EMO (arXiv:2604.18003): cold start, rounds of SELF-GRPO and self-play, final SELF-GRPO,
scores.

    python -m selfemo_jax.train [--config FILE] [--mesh 8 | --mesh fsdp=4,tp=2] [--run_dir DIR]
                                [--resume | --resume auto] [--dry_run] [--a.b VALUE]

One step of SELF-GRPO: P labelled inputs become prompts; the policy answers each G times with the emotions of
the last speaker, its own emotions and its reply; r1 is the weighted IoU of the first with the gold, r2 how
much of the group's core emotions it names; their sum is normalised inside the group and drives a clipped
update with a KL term to the phase's frozen start. After RL the policy plays: the best answer of each input
extends its dialogue, its declared emotions become the gold of that turn, another speaker answers it in the
next turn, and every extended dialogue joins the inputs of the next round.

Departures from the paper, and points that its text leaves open:
1. Algorithm 1 is not in the public text; the phases follow the prose (sections 3.2 to 3.4, 4.1).
2. Without an expert model the cold start is made of the human data: gold label, the next speaker's label as
   self-emotion, the real next turn as reply (`cold_start.source: human`); and whoever has no persona in the
   data is played as a neutral participant (`persona.source: expert` infers them). No bundled config asks a
   server, and most play one round (`flywheel.iterations`; the number is not in the paper).
3. A dialogue ends at the first reply that is rejected, or with `flywheel.max_depth` generated turns; from the
   second on the gold is what the policy declared itself, so r1 there measures agreement with itself alone.
4. `reward.preset: paper` is the literal reading (r1 + t/T r2, any listed weight counts as named); `robust`
   asks for a weight of .05 and ends at 0.5, which blocks the padding of label lists.
5. With std normalisation lambda acts only inside groups whose r1 varies: where all r1 are equal the consensus
   acts at full strength from step 1. That is the paper's; `advantages.scale` has the alternatives and
   `group/share_r2_only` logs the share.
6. The loss is an exact token mean over the mini-batch, on any mesh. verl's older worker averages
   micro-batches (`loss.aggregation: micro-token-mean`).
7. The reported policy is the best of the final phase by dev score; the test split is read once, at the end.
8. For small models only: labels of whole dialogues learned before the answers (`cold_start.labels`) or among
   them (`rows: dialogues`, `lines: all`, `whole_answers`, `label_weight`, `class_power`), weights by class in
   RL (`advantages.class_power`), and a penalty on repetition in scored answers (`eval.frequency_penalty`).
"""

import selfemo_jax.keep_memory  # noqa: F401, I001 - before NumPy starts threads

import math
import sys
from collections.abc import Sequence

from selfemo_jax.config_io import load_config
from selfemo_jax.data.pipeline import input_stream
from selfemo_jax.distributed import LAUNCH_FLAGS
from selfemo_jax.dry_run import describe
from selfemo_jax.learn import label_update, rl_update, sft_update
from selfemo_jax.optimizer import learning_rate
from selfemo_jax.phases import Phase
from selfemo_jax.rollout.engine import RolloutError
from selfemo_jax.rollout.stream import rollout_stream
from selfemo_jax.run import Run
from selfemo_jax.run_open import open_run
from selfemo_jax.run_resume import Stopped
from selfemo_jax.scoring import score_groups
from selfemo_jax.selfplay.flywheel import harvest
from selfemo_jax.train_step import NonFiniteError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the plan; returns the exit status (75 after a stop that can be resumed)."""
    try:
        words = sys.argv[1:] if argv is None else argv
        config, command = load_config(words, prog="selfemo_jax.train", flags=LAUNCH_FLAGS)
        if command.dry_run:
            describe(config)
            return 0
        with open_run(config, command) as run:
            for phase in run.open_phases():
                kinds = {"labels": label_rows, "sft": supervised, "rl": self_grpo, "harvest": play}
                kinds[phase.kind](run, phase)
            run.final_scores()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 75
    except (ValueError, OSError, NonFiniteError, RolloutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2
    return 0


def label_rows(run: Run, phase: Phase) -> None:
    """Labels alone, one row a dialogue: cheap, and before any answer is written."""
    settings = run.config.cold_start.labels
    dialogues = run.label_dialogues()
    total = math.ceil(settings.epochs * sum(map(len, dialogues.values())) / settings.batch_size)
    steps = run.steps(settings.optim)
    state, at = run.start(phase, steps, total_steps=total)
    batches = input_stream(
        dialogues, run.mixture(dialogues), run.encode_questions(dialogues),
        batch_size=settings.batch_size, seed=run.seed(phase), state=at.iterator, difficulty=run.difficulty(),
    )  # fmt: skip
    for step, batch in run.watch(phase, zip(range(at.step + 1, total + 1), batches, strict=False)):
        rate = learning_rate(settings.optim, step=step - 1, total_steps=total)
        where = f"{phase.name} step {step}"
        state, metrics = label_update(
            steps, state, batch.items, run.config, step=step, rate=rate, where=where, timer=run.timer
        )
        run.end_step(phase, step, state, metrics | batch.counts() | {"lr": rate}, batch.state)
    run.finish(phase, state)


def supervised(run: Run, phase: Phase) -> None:
    """Cold start (equation 5), or SFT on what self-play accepted: learn to write the grammar."""
    config = run.config
    examples = run.examples(phase)
    total = math.ceil(
        config.cold_start.epochs * sum(map(len, examples.values())) / config.cold_start.batch_size
    )
    steps = run.steps(config.cold_start.optim)
    state, at = run.start(phase, steps, total_steps=total)
    batches = input_stream(
        examples, run.mixture(examples), run.encode_example,
        batch_size=config.cold_start.batch_size, seed=run.seed(phase), state=at.iterator,
        num_workers=config.data.num_workers, difficulty=run.difficulty(),
    )  # fmt: skip
    for step, batch in run.watch(phase, zip(range(at.step + 1, total + 1), batches, strict=False)):
        rate = learning_rate(config.cold_start.optim, step=step - 1, total_steps=total)
        where = f"{phase.name} step {step}"
        state, metrics = sft_update(
            steps, state, batch.items, config, rate=rate, where=where, timer=run.timer
        )
        run.end_step(phase, step, state, metrics | batch.counts() | {"lr": rate}, batch.state)
    run.finish(phase, state)


def self_grpo(run: Run, phase: Phase) -> None:
    """SELF-GRPO (equations 6 to 14) from the weights of ``phase.init``, which stay frozen as its
    reference."""
    config = run.config
    inputs = run.inputs(phase)
    num_inputs = sum(map(len, inputs.values()))
    total = phase.steps or max(1, int(config.rl.epochs * num_inputs / config.rl.prompts_per_step))
    steps = run.steps(config.optim)
    reference = run.reference(phase)
    state, at = run.start(phase, steps, total_steps=total)
    batches = input_stream(
        inputs, run.mixture(inputs), run.encode_input,
        batch_size=config.rl.prompts_per_step, seed=run.seed(phase), state=at.iterator,
        num_workers=config.data.num_workers,
    )  # fmt: skip
    run.refresh(state.params)
    stream = rollout_stream(
        run.engine, batches, run.requests_of(phase), run.sampling,
        first=at.step + 1, last=total, ahead=config.rollout.overlap, max_lost=config.rollout.max_lost,
        tell=run.log.say,
    )  # fmt: skip
    for step, rollouts in run.watch(phase, stream):
        with run.timer("reward"):
            scored = score_groups(
                rollouts.samples, rollouts.prompts, rollouts.groups, run.codec, run.scorer, config,
                num_classes=run.data.num_classes, step=step, total_steps=total,
            )  # fmt: skip
        rate = learning_rate(config.optim, step=step - 1, total_steps=total)
        where = f"{phase.name} step {step}"
        state, metrics = rl_update(
            steps, state, reference, scored, config, rate=rate, where=where, timer=run.timer
        )
        run.record(rollouts, scored)
        metrics = scored.metrics | metrics | rollouts.metrics() | {"lr": rate}
        run.end_step(phase, step, state, metrics, rollouts.batch.state)
    run.finish(phase, state)


def play(run: Run, phase: Phase) -> None:
    """Self-play and harvest (equations 6 and 7): turn after turn the frozen policy answers every live
    dialogue; its best answers extend the dialogues and become inputs. `flywheel.harvest: replay` judges what
    RL sampled last instead."""
    config = run.config
    params, at = run.start_frozen(phase)
    # Frozen: a resumed phase samples from the same version as one that was not interrupted.
    version = run.global_step - at.step
    run.refresh(params, version=version)
    index, verify = run.reply_index(), run.verifier()
    recorded = config.flywheel.harvest == "replay"
    for turn in run.turns(phase, done=at.step):
        stream = run.answers(phase, turn, after=at.step)
        for step, rollouts in run.watch(phase, stream, total=turn.most):
            with run.timer("reward"):
                scored = score_groups(
                    rollouts.samples, rollouts.prompts, rollouts.groups, run.codec, run.scorer, config,
                    num_classes=run.data.num_classes, step=1, total_steps=1,
                )  # fmt: skip
                candidates = harvest(
                    scored, config, index, run.data.personas, iteration=phase.iteration,
                    policy_version=None if recorded else version, encode=run.encode_input, verify=verify,
                )  # fmt: skip
            if not recorded:
                run.record(rollouts, scored)
            run.end_harvest(phase, step, turn, candidates, scored)
    run.finish(phase, None)


if __name__ == "__main__":
    sys.exit(main())
