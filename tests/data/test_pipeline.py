"""The stream of inputs: order, shares, restarts, hosts and reader processes."""

import itertools
import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from selfemo_jax.data.curriculum import root_of
from selfemo_jax.data.dialogues import IEMOCAP, MELD
from selfemo_jax.data.pipeline import input_stream, mixture_weights, with_floor
from tests.fabricated import sample

ONE = {"a": range(10)}
TWO = {"a": range(100), "b": range(100, 130)}
SHARES = {"a": 0.75, "b": 0.25}


def stream(sources=TWO, weights=SHARES, encode=str, *, batch_size=4, seed=7, **options):
    return input_stream(sources, weights, encode, batch_size=batch_size, seed=seed, **options)


def take(batches, number: int) -> list:
    return list(itertools.islice(batches, number))


def items(batches, number: int) -> list:
    return [item for batch in take(batches, number) for item in batch.items]


def test_the_same_seed_gives_the_same_stream_and_another_seed_another():
    first = items(stream(), 20)
    assert items(stream(), 20) == first
    assert items(stream(seed=8), 20) != first


def test_items_are_encoded_and_come_in_whole_batches():
    batches = take(stream(encode=lambda n: n * 2), 5)
    assert all(len(batch.items) == 4 for batch in batches)
    assert {item % 2 for batch in batches for item in batch.items} == {0}


def test_batches_count_their_inputs_by_data_set():
    def of(labels):
        return [sample(n, labels=labels, gold={}) for n in range(8)]

    examples = {"meld": [(s, None) for s in of(MELD)], "iemocap": [(s, (1, 2)) for s in of(IEMOCAP)]}
    (batch,) = take(stream(examples, {"meld": 0.75, "iemocap": 0.25}, root_of, batch_size=8), 1)
    assert batch.counts() == {"data/iemocap": 2.0, "data/meld": 6.0}
    # The inputs of dialogues are counted one by one.
    dialogues = {"meld": [tuple(of(MELD)), tuple(of(MELD)[:3])]}
    (batch,) = take(stream(dialogues, {"meld": 1.0}, len, batch_size=2), 1)
    assert sorted(batch.items) == [3, 8] and batch.counts() == {"data/meld": 11.0}
    (batch,) = take(stream(), 1)
    assert batch.counts() == {}


def test_every_item_is_seen_once_in_each_pass_in_a_new_order():
    seen = items(stream(ONE, {"a": 1.0}, int, batch_size=5), 6)
    passes = [seen[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0] and passes[0] != list(range(10))


def test_passes_are_whole_where_batches_do_not_divide_them():
    seen = items(stream(ONE, {"a": 1.0}, int, batch_size=4), 5)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))


def test_each_source_of_a_mixture_is_passed_through_whole():
    seen = Counter(items(stream(encode=int, batch_size=8), 60))  # 480 items: 360 of a, 120 of b
    counts = {name: [seen[item] for item in source] for name, source in TWO.items()}
    assert sum(counts["a"]) == 360 and sum(counts["b"]) == 120
    assert set(counts["a"]) == {3, 4} and set(counts["b"]) == {4}


def test_every_batch_holds_its_share_of_each_source_to_within_one():
    weights = {"a": 0.7, "b": 0.3}
    for batch in take(stream(weights=weights, encode=int, batch_size=16), 40):
        num_b = sum(item >= 100 for item in batch.items)
        assert abs(num_b - 0.3 * 16) <= 1


def test_sources_of_one_length_are_shuffled_apart():
    twins = {"a": range(50), "b": range(100, 150)}
    seen = items(stream(twins, {"a": 0.5, "b": 0.5}, int, batch_size=10), 10)
    assert [n for n in seen if n < 100] != [n - 100 for n in seen if n >= 100]


def test_sources_that_are_empty_or_weigh_nothing_are_left_out():
    sources = TWO | {"c": (), "d": range(200, 210)}
    weights = SHARES | {"c": 0.5, "d": 0.0}
    assert max(items(stream(sources, weights, int), 40)) < 130


def test_no_inputs_at_all_is_an_error_in_words():
    with pytest.raises(ValueError, match="no training inputs: every source is empty"):
        next(stream({"a": ()}, {"a": 1.0}))


@pytest.mark.parametrize("done", [1, 3, 11, 29])
def test_a_saved_state_goes_on_with_the_next_batch(done):
    whole = take(stream(), 40)
    # Mid-pass and after several passes of the small source, through the JSON of a checkpoint.
    state = json.loads(json.dumps(whole[done - 1].state))
    assert take(stream(state=state), 40 - done) == whole[done:]


def test_hosts_partition_the_stream():
    whole = items(stream(encode=int, batch_size=4), 20)
    shards = [items(stream(encode=int, batch_size=4, shard=(host, 2)), 10) for host in range(2)]
    assert shards[0] == whole[::2] and shards[1] == whole[1::2]


def test_a_shard_goes_on_from_its_own_state():
    options = {"shard": (1, 3)}
    whole = take(stream(**options), 9)
    assert take(stream(state=whole[3].state, **options), 5) == whole[4:]


def test_mixture_by_size():
    found = mixture_weights({"a": 30, "b": 10}, kind="proportional", temperature=5.0, weights={})
    assert found == {"a": 0.75, "b": 0.25}


def test_mixture_by_temperature():
    sizes = {"a": 900, "b": 100}
    found = mixture_weights(sizes, kind="temperature", temperature=2.0, weights={})
    assert found == pytest.approx({"a": 0.75, "b": 0.25})  # roots 30 and 10
    sharp = mixture_weights(sizes, kind="temperature", temperature=0.5, weights={})
    assert sharp == pytest.approx({"a": 81 / 82, "b": 1 / 82})
    assert mixture_weights(sizes, kind="temperature", temperature=1.0, weights={}) == {"a": 0.9, "b": 0.1}


def test_mixture_as_named():
    found = mixture_weights({"a": 900, "b": 100}, kind="weights", temperature=1.0, weights={"b": 3, "a": 1})
    assert found == {"a": 0.25, "b": 0.75}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0}, r"names \['a'\], the run has \['a', 'b'\]; name each once"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, r"names \['a', 'b', 'c'\]"),
        ({"a": 1.0, "b": 0.0}, "expected numbers above 0"),
    ],
)
def test_mixtures_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        mixture_weights({"a": 3, "b": 4}, kind="weights", temperature=1.0, weights=weights)


def test_a_floor_raises_one_share_and_scales_the_others():
    found = with_floor({"a": 0.6, "b": 0.3, "c": 0.1}, floor={"c": 0.25})
    assert found == pytest.approx({"a": 0.5, "b": 0.25, "c": 0.25})


def test_a_floor_below_the_share_changes_nothing():
    weights = {"a": 0.6, "b": 0.4}
    assert with_floor(weights, floor={"b": 0.1}) == pytest.approx(weights)
    assert with_floor(weights, floor={"c": 0.5}) == pytest.approx(weights)


def test_floors_that_leave_no_room_are_refused():
    with pytest.raises(ValueError, match="ask for 1.20 of a batch, at most 1"):
        with_floor({"a": 0.2, "b": 0.4, "c": 0.4}, floor={"b": 0.6, "c": 0.6})


def environment_too(number: int) -> tuple:
    return number, os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("JAX_PLATFORMS")


@pytest.fixture(scope="module")
def read_by_a_worker():
    """Eight batches read by one worker, and five read after a restart from the third state."""

    def encode(number):
        return environment_too(number)

    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = "0,1"
    try:
        whole = take(stream(encode=encode, num_workers=1), 8)
        resumed = take(stream(encode=encode, num_workers=1, state=json.loads(json.dumps(whole[2].state))), 5)
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
    return whole, resumed


def test_a_worker_reads_the_same_stream_and_sees_no_accelerator(read_by_a_worker):
    whole, _ = read_by_a_worker
    read = [item for batch in whole for item in batch.items]
    assert [number for number, *_ in read] == items(stream(encode=int), 8)
    assert {(cuda, jax) for _, _, cuda, jax in read} == {("", "cpu")}
    assert {pid for _, pid, *_ in read}.isdisjoint({os.getpid()})


def test_a_worker_goes_on_from_a_saved_state(read_by_a_worker):
    whole, resumed = read_by_a_worker
    numbers = [[item[0] for item in batch.items] for batch in (*whole[3:], *resumed)]
    assert numbers[:5] == numbers[5:]


def test_importing_the_pipeline_imports_neither_jax_nor_grain():
    code = (
        "import sys, selfemo_jax.data.pipeline\n"
        "print(*sorted({'jax', 'grain', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
