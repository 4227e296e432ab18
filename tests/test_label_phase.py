"""The phase on labels: rows of a dialogue against separate rows, the loss among a set's labels, dev."""

import contextlib
import dataclasses
import functools
import math

import jax
import numpy as np

from selfemo_jax import label_phase
from selfemo_jax.config import Loss, Optim
from selfemo_jax.data.batching import pack
from selfemo_jax.data.dialogues import Dialogue, Turn
from selfemo_jax.data.label_rows import LabelTable, Question, label_sequences
from selfemo_jax.learn import label_update
from selfemo_jax.model.decoder import Compute
from selfemo_jax.model.sharding import make_mesh
from selfemo_jax.phases import plan
from selfemo_jax.train_step import Steps, device_batch, make_steps, sequence_logprobs
from tests.fabricated import codec, run_data, sample, settings
from tests.model.tiny import TINY, assert_trees_close, weights

TABLE = LabelTable(
    names=(("a", "joy"), ("a", "fear"), ("b", "joy"), ("b", "fear"), ("b", "anger")),
    token_ids=(11, 12, 11, 12, 13),
    sets=(0, 0, 1, 1, 1),
)


@functools.cache
def steps() -> Steps:
    return make_steps(
        TINY,
        Compute(),
        make_mesh({}),
        optim=Optim(lr=1e-2),
        loss=Loss(),
        temperature=1.0,
        logits_budget_mib=64,
        labels=TABLE,
    )


def asked() -> list[Question]:
    """Two dialogues of set a and b, of three and four lines."""
    rng = np.random.default_rng(0)

    def draw(length):
        return tuple(int(token) for token in rng.integers(20, 97, length))

    found = []
    for dataset, labels in (("a", (0, 1, 1)), ("b", (4, 2, 3, 4))):
        history = draw(3)
        for turn, label in enumerate(labels):
            history += draw(2 + turn)
            found.append(
                Question(
                    dataset=dataset,
                    prompt_ids=(*history, *draw(2), 5),
                    label=label,
                    window=(dataset, 0),
                    weight=1.0 + turn,
                )
            )
    return found


def accumulated(layout: str):
    packed = pack(label_sequences(asked()), layout=layout, row_tokens=40, micro_rows=1)
    parts, total = steps().parts(weights()), steps().zeros["labels"]()
    rows = packed.batch.tokens.shape[0]
    for row in range(rows):
        part = {
            name: value[row : row + 1] for name, value in device_batch(packed.batch, steps().mesh).items()
        }
        total = steps().label_gradients(parts, total, part)
    return total, packed


def test_rows_of_a_dialogue_equal_separate_rows():
    together, packed = accumulated("shared_prefix")
    apart, separate = accumulated("separate")
    assert packed.num_tokens < 0.75 * separate.num_tokens
    assert_trees_close(together.gradients, apart.gradients, bound=1e-5)
    for name, pair in together.sums.items():
        np.testing.assert_allclose(pair, apart.sums[name], atol=1e-5, err_msg=name)


def test_the_loss_is_among_the_labels_of_the_set_alone():
    total, _ = accumulated("separate")
    params, expected, right = weights(), 0.0, 0
    weight_sum = sum(question.weight for question in asked())
    for question in asked():
        own = [i for i, number in enumerate(TABLE.sets) if number == TABLE.sets[question.label]]
        logprobs = []
        for index in own:
            # The full model's log-probability of the label's token; the rest of the vocabulary cancels out.
            one = Question(
                dataset=question.dataset, prompt_ids=question.prompt_ids, label=TABLE.token_ids[index],
                window=question.window,
            )  # fmt: skip
            batch = pack(label_sequences([one]), layout="separate", row_tokens=40, micro_rows=1).batch
            logprobs.append(sequence_logprobs(steps(), params, batch, micro_rows=1)[0].ravel())
        values = [row[len(question.prompt_ids) - 1] for row in logprobs]
        log_total = math.log(sum(math.exp(v) for v in values))
        expected -= question.weight / weight_sum * (values[own.index(question.label)] - log_total)
        right += own[int(np.argmax(values))] == question.label
    assert math.isclose(float(total.sums["loss"][0]), expected, abs_tol=1e-5)
    assert float(total.sums["accuracy"][0]) == right and float(total.sums["accuracy"][1]) == len(asked())


def test_the_best_label_is_of_the_questions_own_set():
    config = settings(batch={"row_tokens": 192, "micro_rows": 1})
    best = label_phase.best_labels(steps(), weights(), asked(), config)
    assert [TABLE.sets[index] for index in best] == [TABLE.sets[question.label] for question in asked()]


def test_an_update_on_labels_lowers_their_loss():
    config = settings(batch={"row_tokens": 192, "micro_rows": 1})
    # The state is donated to the update.
    state = steps().init_state(jax.tree.map(np.array, weights()))
    state = jax.device_put(state)
    losses = []
    for step in range(6):
        state, metrics = label_update(
            steps(), state, [asked()], config, step=step, rate=2e-3, where="here",
            timer=lambda name: contextlib.nullcontext(),
        )  # fmt: skip
        losses.append(metrics["loss"])
    assert losses[-1] < 0.9 * losses[0] and losses[1] < losses[0]


def test_the_plan_puts_labels_before_the_cold_start():
    config = settings(
        cold_start={"labels": {"epochs": 0.5}}, flywheel={"iterations": 0, "retrain": {"init": "cold"}}
    )
    assert [(p.name, p.kind, p.init) for p in plan(config)] == [
        ("labels", "labels", "base"),
        ("cold", "sft", "labels"),
        ("rl_final", "rl", "cold"),
    ]


def test_dialogues_hold_every_labelled_line_whatever_the_rule_of_inputs():
    data = run_data({"meld": (sample(2, gold={"joy": 1.0}),)})
    turns = tuple(
        Turn(speaker="Ada", text=f"line {n}", labels={"joy": 1.0} if n != 1 else None) for n in range(4)
    )
    dialogue = Dialogue(dataset="meld", split="train", dialogue_id="d1", turns=turns)
    other = Dialogue(dataset="meld", split="train", dialogue_id="d2", turns=turns)
    data = dataclasses.replace(data, dialogues={"meld/train/d1": dialogue, "meld/train/d2": other})
    found = label_phase.training_dialogues(data, settings())
    assert [len(lines) for lines in found["meld"]] == [3, 3]
    limited = label_phase.training_dialogues(data, settings(data={"max_items": 4, "max_prompt": 128}))
    assert [lines[0].root_id for lines in limited["meld"]] == ["meld/train/d1"]
    assert label_phase.table_of(data, codec(), settings()) is None
    config = settings(cold_start={"labels": {"epochs": 0.5}})
    table = label_phase.table_of(data, codec(), config)
    encode = label_phase.question_encoder(found, table, codec(), config)
    assert {table.names[question.label] for question in encode(found["meld"][0])} == {("meld", "joy")}
