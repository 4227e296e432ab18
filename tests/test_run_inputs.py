"""What a phase trains on: harvests by iteration, held-out roots, supervised examples, shares of a batch."""

import dataclasses
import functools
import itertools
import pickle
from collections import Counter

import pytest

from selfemo_jax import run_inputs
from selfemo_jax.data.dialogues import EMORYNLP, IEMOCAP, MELD, Dialogue, Turn
from selfemo_jax.data.grammar import parse
from selfemo_jax.data.inputs import Reference, build_inputs
from selfemo_jax.data.label_rows import Answered, label_table
from selfemo_jax.data.pipeline import input_stream
from selfemo_jax.phases import Phase
from selfemo_jax.run_inputs import (
    LABEL_ALONE,
    SYNTHETIC,
    Example,
    encode_dialogue,
    encode_example,
    encode_input,
    example_dialogues,
    example_encoder,
    opening_inputs,
    phase_examples,
    phase_inputs,
    source_weights,
    synthetic_inputs,
)
from tests.fabricated import codec, run_data, sample, settings, synthetic

NONE_HELD = {"flywheel": {"heldout": 0.0, "retrain": {"init": "cold"}}}


def phase(*buffer: str, kind="rl") -> Phase:
    return Phase(index=3, kind=kind, name="rl_final", iteration=9, init="cold", buffer=buffer)


def record(child, *, ids=(5, 6), **changes) -> dict:
    """A line of the store as the run writes it."""
    return {
        "iteration": child.iteration,
        "parent_id": child.parent_id,
        "root_id": child.root_id,
        "accepted": True,
        "reason": "accepted",
        "reply": "...",
        "select": {},
        "completion_ids": list(ids),
        "sample": child.to_json(),
    } | changes


def rejected(parent, iteration: int) -> dict:
    line = record(synthetic(parent, iteration=iteration))
    return line | {"accepted": False, "sample": None, "reason": "copy"}


def originals(number: int, labels=MELD):
    return [
        sample(n, labels=labels, dialogue=f"d{n}", gold={labels.labels[n % 3]: 1.0}) for n in range(number)
    ]


def test_a_phase_reads_the_accepted_inputs_of_the_harvests_in_its_buffer_alone():
    parents = originals(4)
    lines = [record(synthetic(p, iteration=i)) for i in (1, 2, 3) for p in parents[:2]]
    lines += [rejected(p, 2) for p in parents[2:]]
    config = settings(**NONE_HELD)
    training, held = synthetic_inputs(phase("original", "harvest_1", "harvest_3"), lines, config)
    assert Counter(s.iteration for s in training) == {1: 2, 3: 2} and held == ()
    assert synthetic_inputs(phase("original"), lines, config) == ((), ())


def test_the_cap_is_that_of_one_harvest():
    lines = [record(synthetic(p, iteration=i)) for i in (1, 2) for p in originals(6)]
    config = settings(flywheel={"n_syn": 2, "heldout": 0.0, "retrain": {"init": "cold"}})
    training, _ = synthetic_inputs(phase("original", "harvest_1", "harvest_2"), lines, config)
    assert Counter(s.iteration for s in training) == {1: 2, 2: 2}


def test_the_buffer_is_the_originals_by_set_and_the_harvests_together():
    data = run_data({"meld": originals(3), "iemocap": originals(2, IEMOCAP)})
    lines = [record(synthetic(data.train[name][0], iteration=1)) for name in ("meld", "iemocap")]
    found = phase_inputs(phase("original", "harvest_1"), data, lines, settings(**NONE_HELD))
    assert {name: len(samples) for name, samples in found.items()} == {"meld": 3, "iemocap": 2, SYNTHETIC: 2}
    assert {s.dataset for s in found[SYNTHETIC]} == {"meld", "iemocap"}
    assert SYNTHETIC not in phase_inputs(phase("original", "harvest_2"), data, lines, settings())


def test_held_out_roots_are_in_no_phase_and_no_example():
    parents = originals(60)
    config = settings(flywheel={"heldout": 0.3, "retrain": {"init": "cold"}})
    lines = [record(synthetic(p, iteration=1), ids=(n,)) for n, p in enumerate(parents)]
    data, after = run_data({"meld": parents}), phase("harvest_1", kind="sft")
    training, held = synthetic_inputs(after, lines, config)
    assert held and len(training) + len(held) == 60
    examples = phase_examples(after, data, lines, codec(), config)[SYNTHETIC]
    assert sorted(s.root_id for s, _ in examples) == sorted(s.root_id for s in training)


def test_examples_of_a_harvest_pair_the_parent_with_the_accepted_completion():
    parents = originals(2)
    child = synthetic(parents[0], iteration=1)
    grandchild = synthetic(child, iteration=2)
    lines = [
        record(child, ids=(1, 2)),
        rejected(parents[1], 1),
        record(grandchild, ids=(3,)),
        record(synthetic(parents[1], iteration=2), ids=(4, 5)),
    ]
    data, config = run_data({"meld": parents}), settings(**NONE_HELD)
    second = phase_examples(phase("harvest_2", kind="sft"), data, lines, codec(), config)
    # The parent of a deeper turn is itself synthetic, and of an earlier harvest than those asked for.
    assert second == {SYNTHETIC: ((child, (3,)), (parents[1], (4, 5)))}
    both = phase_examples(phase("harvest_1", "harvest_2", kind="sft"), data, lines, codec(), config)
    assert [ids for _, ids in both[SYNTHETIC]] == [(1, 2), (3,), (4, 5)]
    prompt_ids, completion_ids = encode_example(second[SYNTHETIC][0], codec(), config)
    assert prompt_ids == encode_input(child, codec(), config)[1].token_ids and completion_ids == (3,)


def test_an_empty_harvest_gives_no_examples():
    data, config = run_data({"meld": originals(2)}), settings()
    found = phase_examples(phase("harvest_1", kind="sft"), data, [], codec(), config)
    assert found == {SYNTHETIC: ()} and source_weights(found, config) == {SYNTHETIC: 1.0}


def test_the_cold_start_uses_inputs_whose_next_turn_is_labelled_and_fits():
    long = Reference(speaker="Cy", text="row " * 90, labels={"joy": 1.0})
    silent = Reference(speaker="Cy", text="Row.", labels=None)
    samples = originals(4)
    samples += [sample(9, gold={"joy": 1.0}, reference=other) for other in (None, silent, long)]
    found = phase_examples(
        phase("original", kind="sft"), run_data({"meld": samples}), [], codec(), settings()
    )
    assert found == {"meld": tuple((s, None) for s in samples[:4])}


def test_a_cold_start_target_is_the_gold_the_next_label_and_the_next_turn():
    config = settings()
    one = sample(
        gold={"anger": 0.4, "fear": 0.9},
        reference=Reference(speaker="Cy", text="  I can \n row. ", labels={"joy": 1.0}),
    )
    prompt_ids, ids = encode_example((one, None), codec(), config)
    assert prompt_ids == encode_input(one, codec(), config)[1].token_ids
    assert ids[-1] == codec().eos_id
    said = parse(codec().decode(ids[:-1]), inventory=MELD.labels)
    assert said.valid and said.emotion == (("fear", 0.9), ("anger", 0.4))
    assert (said.self_emotion, said.response) == ((("joy", 1.0),), "I can row.")


def test_answers_that_are_not_whole_end_with_their_label_and_are_drawn_by_the_seed():
    examples = [(one, None) for one in originals(40)]
    table = label_table({"meld": MELD.labels}, codec(), thinking=False)

    def encoded(share: float, seed: int = 0, own: Example | None = None) -> list[Answered]:
        config = settings(seed=seed, cold_start={"rows": "dialogues", "whole_answers": share})
        return encode_dialogue([own] if own else examples, codec(), config, table=table, weights={})

    whole, some = encoded(1.0), encoded(0.4)
    cut = [answer for answer in some if answer not in whole]
    assert 14 <= len(cut) <= 34 and some == encoded(0.4) != encoded(0.4, seed=1)
    for (one, _), before, after in zip(examples, whole, some, strict=True):
        assert before.label_at is not None
        ends = before.label_at + 1 if after in cut else len(before.completion_ids)
        assert after.completion_ids == before.completion_ids[:ends] and after.prompt_ids == before.prompt_ids
        assert after.completion_ids[before.label_at] == table.token_ids[table.index("meld", *one.gold)]
    # What the policy or an expert wrote is learned as it was written.
    (written,) = encoded(0.01, own=(originals(1)[0], whole[0].completion_ids))
    assert written.completion_ids == whole[0].completion_ids


def lines_of(name: str, *labels: str) -> Dialogue:
    turns = tuple(
        Turn(speaker=speaker, text=f"line {n}", labels={label: 1.0})
        for n, (speaker, label) in enumerate(zip(itertools.cycle(("Ada", "Bo")), labels, strict=False))
    )
    return Dialogue(dataset="meld", split="train", dialogue_id=name, turns=turns)


def test_lines_without_an_answer_are_asked_for_their_label_among_the_answers_of_their_dialogue():
    dialogues = [lines_of("d0", "joy", "fear", "anger"), lines_of("d1", "joy")]
    (answered,) = build_inputs(dialogues, MELD, rule="context_and_responder")
    data = dataclasses.replace(
        run_data({"meld": [answered]}), dialogues={f"meld/train/{d.dialogue_id}": d for d in dialogues}
    )
    config = settings(cold_start={"rows": "dialogues", "lines": "all", "class_power": 1.0})
    first = phase("original", kind="sft")
    examples = phase_examples(first, data, [], codec(), config)["meld"]
    assert [(one.id, completion) for one, completion in examples] == [
        ("meld/train/d0/0", LABEL_ALONE),
        ("meld/train/d0/1", None),
        ("meld/train/d0/2", LABEL_ALONE),
        ("meld/train/d1/0", LABEL_ALONE),
    ]
    assert [len(d) for d in example_dialogues({"meld": examples})["meld"]] == [3, 1]
    without = settings(cold_start={"rows": "dialogues"})
    assert phase_examples(first, data, [], codec(), without) == {"meld": ((answered, None),)}

    table = label_table({"meld": MELD.labels}, codec(), thinking=False)
    encoded = example_encoder(data, codec(), config, table)(examples)
    opening = table.opening("meld")
    for (one, completion), answer in zip(examples, encoded, strict=True):
        label = table.token_ids[table.index("meld", *one.gold)]
        assert answer.label_at == len(opening)
        assert answer.completion_ids[: len(opening) + 1] == (*opening, label)
        assert (len(answer.completion_ids) == len(opening) + 1) == (completion == LABEL_ALONE)
    # The labels of all four lines are counted, not that of the one input alone.
    assert [answer.weight for answer in encoded] == pytest.approx([2 / 3, 4 / 3, 4 / 3, 2 / 3])


def test_experts_answers_stand_among_the_other_lines():
    dialogue = lines_of("d0", "joy", "fear", "anger")
    inputs = build_inputs([dialogue], MELD, rule="context_and_responder")
    written = ((inputs[0], (5, 6)), (inputs[0], (5, 7)))
    data = dataclasses.replace(
        run_data({"meld": inputs}), dialogues={"meld/train/d0": dialogue}, expert_examples=written
    )
    config = settings(
        cold_start={"source": "expert", "rows": "dialogues", "lines": "all"},
        expert={"endpoints": [{"name": "owl", "base_url": "http://127.0.0.1:9/v1", "model": "m"}]},
    )
    found = phase_examples(phase("original", kind="sft"), data, [], codec(), config)["meld"]
    assert [(one.id[-1], completion) for one, completion in found] == [
        ("0", LABEL_ALONE), ("1", (5, 6)), ("1", (5, 7)), ("2", LABEL_ALONE),
    ]  # fmt: skip


def test_a_rare_label_of_the_training_inputs_counts_more_in_an_answer():
    common, rare = originals(4)[0], originals(4)[1]
    data = run_data({"meld": [common, common, common, rare]})
    table = label_table({"meld": MELD.labels}, codec(), thinking=False)
    for power, expected in ((0.0, [1.0, 1.0]), (1.0, [2 / 3, 2.0])):
        config = settings(cold_start={"rows": "dialogues", "class_power": power})
        encode = example_encoder(data, codec(), config, table)
        assert [one.weight for one in encode([(common, None), (rare, None)])] == pytest.approx(expected)


def test_cold_start_num_is_shared_by_the_data_sets_and_fixed_by_the_seed():
    data = run_data({"meld": originals(30), "iemocap": originals(10, IEMOCAP)})
    first = phase("original", kind="sft")
    config = settings(cold_start={"num": 8})
    found = phase_examples(first, data, [], codec(), config)
    assert {name: len(examples) for name, examples in found.items()} == {"meld": 6, "iemocap": 2}
    assert found == phase_examples(first, data, [], codec(), config)
    assert found != phase_examples(first, data, [], codec(), settings(cold_start={"num": 8}, seed=1))


def test_a_cold_start_without_any_target_is_refused():
    first, unlabelled = phase("original", kind="sft"), [sample(gold={"joy": 1.0}, reference=None)]
    with pytest.raises(ValueError, match="no training input has a labelled next turn"):
        phase_examples(first, run_data({"meld": unlabelled}), [], codec(), settings())
    with pytest.raises(ValueError, match="fits into rollout.max_tokens 8; raise it"):
        phase_examples(
            first, run_data({"meld": originals(3)}), [], codec(), settings(rollout={"max_tokens": 8})
        )


def test_the_share_of_a_harvest_is_that_of_the_buffer_within_bounds():
    config = settings(rl={"prompts_per_step": 16, "mini_prompts": 16})

    def sizes(meld, iemocap, made):
        return {"meld": range(meld), "iemocap": range(iemocap), SYNTHETIC: range(made)}

    assert source_weights(sizes(300, 100, 0), config) == {"meld": 0.75, "iemocap": 0.25}
    assert source_weights(sizes(300, 100, 100), config) == pytest.approx(
        {"meld": 0.6, "iemocap": 0.2, SYNTHETIC: 0.2}
    )
    assert source_weights(sizes(3, 1, 400), config) == pytest.approx(
        {"meld": 0.375, "iemocap": 0.125, SYNTHETIC: 0.5}
    )
    # 20 of 420 would be less than one input a batch; two places of sixteen are asked for.
    assert source_weights(sizes(300, 100, 20), config)[SYNTHETIC] == pytest.approx(2 / 16)
    assert source_weights(sizes(300, 100, 50), config)[SYNTHETIC] == pytest.approx(2 / 16)


@pytest.mark.parametrize("made", [1, 2])
def test_what_a_collapsed_harvest_leaves_is_not_in_every_batch(made):
    config = settings(rl={"prompts_per_step": 16, "mini_prompts": 16})
    found = source_weights({"meld": range(400), SYNTHETIC: range(made)}, config)
    # An original input is asked (1 - share) / 400 of the time, each of these about four times as often.
    assert found[SYNTHETIC] == pytest.approx(4 * made / (400 + made))
    assert found[SYNTHETIC] / made < 4.1 * found["meld"] / 400


@pytest.mark.parametrize(("prompts", "share"), [(1, 0.5), (2, 0.5), (3, 0.5), (5, 0.4)])
def test_small_steps_leave_room_for_the_originals(prompts, share):
    config = settings(rl={"prompts_per_step": prompts, "mini_prompts": prompts})
    found = source_weights({"meld": range(500), SYNTHETIC: range(100)}, config)
    assert found == pytest.approx({"meld": 1 - share, SYNTHETIC: share})


def test_max_share_holds_against_the_floor():
    config = settings(flywheel={"max_share": 0.1, "retrain": {"init": "cold"}})
    assert source_weights({"meld": range(5), SYNTHETIC: range(500)}, config)[SYNTHETIC] == pytest.approx(0.1)
    config = settings(flywheel={"max_share": 0.0, "retrain": {"init": "cold"}})
    assert source_weights({"meld": range(5), SYNTHETIC: range(500)}, config) == {"meld": 1.0, SYNTHETIC: 0.0}


def test_named_weights_share_what_a_harvest_leaves():
    mixture = {"kind": "weights", "weights": {"meld": 3.0, "emorynlp": 1.0}}
    config = settings(data={"sets": ["meld", "emorynlp"], "mixture": mixture})
    found = source_weights({"meld": range(10), "emorynlp": range(10), SYNTHETIC: range(20)}, config)
    assert found == pytest.approx({"meld": 0.375, "emorynlp": 0.125, SYNTHETIC: 0.5})


def test_without_synthetic_inputs_the_same_harvest_gives_other_batches():
    data = run_data({"meld": originals(30)})
    lines = [record(synthetic(parent, iteration=1)) for parent in data.train["meld"][:6]]

    def batches(**wheel) -> list[tuple[str, ...]]:
        config = settings(flywheel=NONE_HELD["flywheel"] | wheel)
        found = phase_inputs(phase("original", "harvest_1"), data, lines, config)
        shares = source_weights(found, config)
        stream = input_stream(found, shares, lambda s: s.id, batch_size=8, seed=1)
        return [batch.items for batch in itertools.islice(stream, 10)]

    made, none = batches(), batches(n_syn=0)
    assert all(any(name.endswith("+1") for name in items) for items in made)
    assert not any(name.endswith("+1") for items in none for name in items)


@pytest.mark.parametrize("made", [30, 60])
def test_a_small_harvest_is_in_each_of_the_first_batches(made):
    config = settings(rl={"prompts_per_step": 8, "mini_prompts": 8})
    sources = {
        "meld": originals(300),
        "emorynlp": originals(90, EMORYNLP),
        SYNTHETIC: [synthetic(s, iteration=1) for s in originals(made)],
    }
    batches = input_stream(sources, source_weights(sources, config), lambda s: s.origin, batch_size=8, seed=1)
    counts = [batch.items.count("synthetic") for batch in itertools.islice(batches, 10)]
    assert min(counts) >= 1 and sum(counts) == pytest.approx(20, abs=1)


def test_self_play_begins_from_every_input_once_in_a_seeded_order():
    sources = {"meld": originals(9), SYNTHETIC: [synthetic(s, iteration=1) for s in originals(2)]}
    config = settings()
    found = opening_inputs(sources, config, seed=5)
    assert sorted(s.id for s in found) == sorted(s.id for samples in sources.values() for s in samples)
    assert found == opening_inputs(sources, config, seed=5) != opening_inputs(sources, config, seed=6)


def test_max_inputs_takes_the_first_of_that_order_that_may_be_extended():
    sources = {"meld": [*originals(9), *(synthetic(s, iteration=1, depth=3) for s in originals(4))]}
    limited = settings(flywheel={"max_inputs": 5, "retrain": {"init": "cold"}})
    every = opening_inputs(sources, settings(), seed=5)
    assert len(every) == 9 and {s.depth for s in every} == {0}
    assert opening_inputs(sources, limited, seed=5) == every[:5]


def test_personas_are_told_or_left_out_by_the_setting():
    one = sample(gold={"joy": 1.0}, persona="Cy doubts everything.")
    told, untold = (
        codec().decode(encode_input(one, codec(), settings(data={"persona": told}))[1].token_ids)
        for told in (True, False)
    )
    assert "doubts" in told and "doubts" not in untold


def test_the_encoder_can_travel_to_a_reader_process():
    encode = functools.partial(run_inputs.encode_input, codec=codec(), config=settings())
    one = sample(gold={"joy": 1.0})
    assert pickle.loads(pickle.dumps(encode))(one) == encode(one)
