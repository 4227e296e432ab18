"""Recorded rollouts: what is written comes back, what is damaged is refused, replay gives it out again."""

import json
from dataclasses import replace

import numpy as np
import pytest

from selfemo_jax.rollout.engine import Completion, Group, Request, Sampling
from selfemo_jax.rollout.records import (
    FOLDER,
    ReplayEngine,
    load_groups,
    prune,
    save_groups,
    save_texts,
    set_aside,
    step_file,
)
from selfemo_jax.scoring import make_scorer, score_groups
from tests import fabricated

GREEDY = Sampling(max_tokens=4, temperature=0.0, stop_ids=(2,))
SAMPLED = Sampling(max_tokens=4, temperature=1.0, stop_ids=(2,))


def completion(*ids: int, finish="length", versions=(3,)) -> Completion:
    logprobs = tuple(float(np.float32(-0.1 * (i + 1))) for i in range(len(ids)))
    return Completion(token_ids=ids, logprobs=logprobs, finish_reason=finish, policy_versions=versions)


def request(place: int, num: int, *prompt: int, step: int = 5) -> Request:
    return Request(id=f"{step}:{place}:meld/train/ä b/{place}", token_ids=prompt, num=num, seed=0)


REQUESTS = [request(0, 2, 4, 5, 6), request(1, 0, 7), request(2, 3, 8, 9)]
GROUPS = [
    Group(
        request_id=REQUESTS[0].id,
        completions=(completion(11, 2, finish="stop"), completion(12, 13, 14, versions=(3, 4))),
    ),
    Group(request_id=REQUESTS[1].id, error="the server said no"),
    Group(
        request_id=REQUESTS[2].id,
        completions=(completion(2, finish="stop"), completion(15, 16), completion(17, versions=())),
    ),
]


def write(run_dir, step: int = 5):
    save_groups(run_dir, step, REQUESTS, GROUPS)
    return step_file(run_dir, step, "npz")


def test_unequal_groups_and_an_error_come_back_as_they_were(tmp_path):
    assert load_groups(write(tmp_path)) == (REQUESTS, GROUPS)


def test_a_step_whose_groups_were_all_lost_comes_back(tmp_path):
    save_groups(tmp_path, 1, REQUESTS[1:2], GROUPS[1:2])
    assert load_groups(step_file(tmp_path, 1, "npz")) == (REQUESTS[1:2], GROUPS[1:2])


def test_the_file_needs_no_pickle(tmp_path):
    with np.load(write(tmp_path), allow_pickle=False) as arrays:
        kinds = {arrays[name].dtype.kind for name in arrays.files}
    assert "O" not in kinds


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = write(tmp_path)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="step_000005.npz: cannot be read"):
            load_groups(path)


def test_flipped_bytes_are_refused(tmp_path):
    path = write(tmp_path)
    whole = path.read_bytes()
    refused = 0
    for start in range(0, len(whole) - 4, 23):
        path.write_bytes(
            whole[:start] + bytes(b ^ 0xFF for b in whole[start : start + 4]) + whole[start + 4 :]
        )
        try:
            assert load_groups(path) == (REQUESTS, GROUPS), f"changed silently by bytes {start}"
        except ValueError as error:
            assert "cannot be read" in str(error)
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("lengths", np.array([2, 3, 1, 2, 9], np.int32)),
        ("group_sizes", np.array([2, 0, 1], np.int32)),
        ("finish", np.array([0, 1, 0, 1, 5], np.int8)),
        ("errors", np.array(["", "lost"])),
        ("token_ids", None),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(tmp_path, name, values):
    path = write(tmp_path)
    with np.load(path) as arrays:
        data = {key: arrays[key] for key in arrays.files}
    if values is None:
        del data[name]
    else:
        data[name] = values
    np.savez_compressed(path, **data)
    with pytest.raises(ValueError, match="cannot be read"):
        load_groups(path)


def test_texts_hold_one_line_a_rollout_with_its_scores(tmp_path):
    config = fabricated.settings(rl={"group_size": 2})
    samples = [fabricated.sample(n, gold={"joy": 1.0}) for n in range(2)]
    answers = [fabricated.text([("joy", 1.0)], reply="Größe, row on!"), "no tags here"]
    groups = [fabricated.group("a", answers), Group(request_id="b", error="lost")]
    scored = score_groups(
        samples,
        [fabricated.prompt()] * 2,
        groups,
        fabricated.codec(),
        make_scorer(config),
        config,
        num_classes=8,
        step=1,
        total_steps=2,
    )
    save_texts(tmp_path, 9, scored)
    lines = [
        json.loads(line) for line in step_file(tmp_path, 9, "jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [(line["step"], line["sample_id"], line["idx"]) for line in lines] == [
        (9, samples[0].id, 0),
        (9, samples[0].id, 1),
    ]
    assert lines[0]["history"] == [list(turn) for turn in samples[0].history] and lines[1]["history"] is None
    assert lines[0]["text"] == answers[0] and lines[0]["parse"]["response"] == "Größe, row on!"
    assert (lines[0]["r1"], lines[1]["r1"]) == (1.0, 0.0)
    assert lines[0]["parse"]["valid"] and not lines[1]["parse"]["valid"]
    assert "E_NO_EMOTION" in lines[1]["parse"]["codes"]
    assert lines[0]["advantage"] > 0 > lines[1]["advantage"]
    assert lines[0]["policy_versions"] == [7]


def kept(run_dir, keep: str, last: int) -> list[int]:
    for step in range(1, last + 1):
        for suffix in ("npz", "jsonl"):
            path = step_file(run_dir, step, suffix)
            path.parent.mkdir(exist_ok=True)
            path.touch()
        prune(run_dir, step, keep=keep)
    steps = {
        suffix: sorted(int(p.stem[5:]) for p in run_dir.glob(f"*/*.{suffix}")) for suffix in ("npz", "jsonl")
    }
    assert steps["npz"] == steps["jsonl"]
    return steps["npz"]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ("all", list(range(1, 12))),
        ("last 1", [11]),
        ("last 3", [9, 10, 11]),
        ("last 40", list(range(1, 12))),
        ("every 4", [4, 8, 11]),
        ("every 1", list(range(1, 12))),
    ],
)
def test_prune_keeps_what_the_rule_says_and_the_newest(tmp_path, keep, expected):
    assert kept(tmp_path, keep, 11) == expected


def test_prune_refuses_other_words(tmp_path):
    with pytest.raises(ValueError, match="rollout.keep is 'newest'; expected all, last N or every N"):
        prune(tmp_path, 1, keep="newest")


def test_set_aside_moves_later_steps_and_leaves_earlier_ones(tmp_path):
    kept(tmp_path, "all", 4)
    step_file(tmp_path, 4, "jsonl").unlink()
    into = tmp_path / "orphaned" / "now"
    assert set_aside(tmp_path, after=2, into=into) == 2
    assert sorted(p.name for p in (tmp_path / FOLDER).iterdir()) == [
        f"step_00000{n}.{suffix}" for n in (1, 2) for suffix in ("jsonl", "npz")
    ]
    assert sorted(p.name for p in (into / FOLDER).iterdir()) == [
        "step_000003.jsonl",
        "step_000003.npz",
        "step_000004.npz",
    ]


def test_set_aside_without_later_steps_makes_no_folder(tmp_path):
    kept(tmp_path, "all", 2)
    assert set_aside(tmp_path, after=2, into=tmp_path / "orphaned") == 0
    assert not (tmp_path / "orphaned").exists()
    assert set_aside(tmp_path / "new", after=0, into=tmp_path / "orphaned") == 0


class Inner:
    """The engine behind a replay: says what it was asked."""

    def __init__(self):
        self.calls = []

    def generate(self, requests, sampling):
        self.calls.append(("generate", [r.id for r in requests], sampling.temperature))
        yield from (Group(request_id=r.id, completions=(completion(1),)) for r in requests)

    def update_policy(self, params, *, version):
        self.calls.append(("update_policy", params, version))

    def close(self):
        self.calls.append(("close",))


def test_replay_gives_the_recorded_groups_for_the_same_prompts(tmp_path):
    write(tmp_path)
    inner = Inner()
    asked = [replace(REQUESTS[2], seed=99), replace(REQUESTS[0], seed=98), replace(REQUESTS[1], num=3)]
    assert list(ReplayEngine(inner, tmp_path).generate(asked, SAMPLED)) == [GROUPS[2], GROUPS[0], GROUPS[1]]
    assert inner.calls == []


@pytest.mark.parametrize(
    "asked",
    [replace(REQUESTS[0], token_ids=(4, 5, 7)), replace(REQUESTS[0], id="5:0:meld/train/other/0")],
    ids=["other ids", "other input"],
)
def test_replay_refuses_other_prompts(tmp_path, asked):
    write(tmp_path)
    with pytest.raises(ValueError, match="holds another prompt than '5:0:"):
        list(ReplayEngine(Inner(), tmp_path).generate([asked], SAMPLED))


def test_replay_refuses_another_group_size(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match="holds 2 rollouts of .* rl.group_size is 8"):
        list(ReplayEngine(Inner(), tmp_path).generate([replace(REQUESTS[0], num=8)], SAMPLED))


def test_replay_refuses_a_step_that_was_not_kept(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match="step_000006.npz is missing"):
        list(ReplayEngine(Inner(), tmp_path).generate([request(0, 2, 4, 5, 6, step=6)], SAMPLED))


def test_replay_refuses_a_folder_without_records(tmp_path):
    with pytest.raises(ValueError, match="has no rollouts/ folder"):
        ReplayEngine(Inner(), tmp_path)


def test_replay_leaves_greedy_requests_and_weights_to_the_engine_behind_it(tmp_path):
    write(tmp_path)
    inner = Inner()
    engine = ReplayEngine(inner, tmp_path)
    groups = list(engine.generate([Request(id="0", token_ids=(1,), num=1, seed=0)], GREEDY))
    assert [group.request_id for group in groups] == ["0"]
    engine.update_policy({"w": 1}, version=4)
    engine.close()
    assert inner.calls == [("generate", ["0"], 0.0), ("update_policy", {"w": 1}, 4), ("close",)]
