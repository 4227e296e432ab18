"""What is said of a run's harvests: each check at its limit, rewards by origin, the inputs that are shown."""

import json

import pytest

from selfemo_jax.selfplay import __main__ as command
from selfemo_jax.selfplay.stats import checks, repeated_replies, rewards_by_origin
from selfemo_jax.selfplay.store import Store
from tests.fabricated import sample, synthetic

REPLIES = {"num": 40, "median_words": 4.0, "distinct_1": 0.5, "distinct_2": 0.6}
HUMAN = {"num": 40, "median_words": 6.0, "distinct_1": 0.5, "distinct_2": 1.0}
GOOD = {
    "proposed": 90,
    "accepted": 50,
    "rejected": {"low_reward": 30, "copy": 10},
    "by_depth": {"1": {"proposed": 60, "accepted": 40}, "2": {"proposed": 30, "accepted": 10}},
    "training": 40,
    "heldout": 4,
    "left_out": {"label_share": 6},
    "labels": {
        name: {"meld": {"joy": 0.75, "fear": 0.25}}
        for name in ("human", "recognised", "declared", "accepted", "training")
    },
    "largest_label_ratio": 2.0,
    "replies": REPLIES,
    "human_replies": HUMAN,
}


def verdicts(*, repeated: float | None = 0.05, **changes) -> list[bool]:
    return [check.passed for check in checks(GOOD | changes, least=50, repeated=repeated)]


def test_the_limits_themselves_pass():
    assert verdicts() == [True] * 5


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        (0, {"accepted": 49}),
        (1, {"largest_label_ratio": 2.01}),
        (1, {"largest_label_ratio": None}),
        (2, {"replies": REPLIES | {"median_words": 3.5}}),
        (3, {"replies": REPLIES | {"distinct_2": 0.59}}),
        (3, {"human_replies": HUMAN | {"distinct_2": 0.0}}),
        (4, {"repeated": 0.051}),
    ],
)
def test_each_check_fails_alone(place, changes):
    assert verdicts(**changes) == [at != place for at in range(5)]


def test_a_harvest_that_left_nothing_passes_no_check():
    nothing = {"num": 0, "median_words": 0.0, "distinct_1": 0.0, "distinct_2": 0.0}
    empty = {"accepted": 0, "largest_label_ratio": 0.0, "replies": nothing, "human_replies": nothing}
    assert verdicts(repeated=None, **empty) == [False] * 5


def test_near_duplicates_in_the_store_fail_the_check_whatever_the_settings_took_for_one(tmp_path, capsys):
    told = ["We row to the second island.", "Leave the oars on the deck.", "Who ate all of my bread?"]
    again = ["You row to the second island.", "My coat is still wet.", "Sing something else."]
    with Store(tmp_path / "flywheel.jsonl") as store:
        for iteration, replies in ((1, told), (2, again)):
            for n, reply in enumerate(replies):
                child = synthetic(
                    sample(n, dialogue=f"d{iteration}{n}", gold={"joy": 1.0}), iteration=iteration
                )
                line = {"iteration": iteration, "accepted": True, "sample": child.to_json(), "reply": reply}
                store.append(line)
            phase = tmp_path / "phases" / f"{iteration:02d}_harvest_{iteration}"
            phase.mkdir(parents=True)
            (phase / "harvest.json").write_text(json.dumps(GOOD | {"places": {"training": []}}))
    # The first of the second harvest repeats one of the first harvest.
    assert repeated_replies(tmp_path) == {1: 0.0, 2: pytest.approx(1 / 3)}
    assert command.main(["stats", str(tmp_path), "--least=50", "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)["harvests"].values()
    assert [check["passed"] for check in first["checks"]] == [True] * 5
    assert [check["passed"] for check in second["checks"]] == [True] * 4 + [False]
    assert second["checks"][-1]["found"] == "33.3%"


def run_of(folder, *, iterations=1):
    """A run's folder with harvests of two accepted inputs each, one of them to train on."""
    with Store(folder / "flywheel.jsonl") as store:
        for iteration in range(1, iterations + 1):
            children = [
                synthetic(
                    sample(n, dialogue=f"d{iteration}{n}", gold={"joy": 1.0}),
                    iteration=iteration,
                    gold={"fear": 0.5},
                    history=(("Ada", "Hello."), ("Cy", f"Reply {iteration} of {n}.")),
                )
                for n in range(2)
            ]
            for child in children:
                line = {"iteration": iteration, "accepted": True, "sample": child.to_json()}
                own = f"{'abc'[iteration] * 9} {'xyz'[int(child.root_id[-1])] * 9}"
                store.append(line | {"reply": own})
            phase = folder / "phases" / f"{iteration:02d}_harvest_{iteration}"
            phase.mkdir(parents=True)
            places = {"training": [children[0].id], "heldout": [children[1].id]}
            (phase / "harvest.json").write_text(json.dumps(GOOD | {"places": places}))
    lines = [
        {"step": 1, "phase": "cold", "loss": 1.0},
        {"step": 2, "phase": "rl_1", "reward/r1/original": 0.5, "data/original": 6.0},
        {"step": 3, "phase": "rl_1", "reward/r1/original": 0.2, "data/original": 3.0,
         "reward/r1/synthetic": 0.9, "data/synthetic": 2.0},
    ]  # fmt: skip
    half = '{"step": 4, "phase": "rl_'
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + half)
    return folder


def test_rewards_are_weighted_by_their_prompts_and_kept_apart(tmp_path):
    assert rewards_by_origin(run_of(tmp_path)) == {
        "rl_1": {
            "original": {"r1": pytest.approx(0.4), "prompts": 9.0},
            "synthetic": {"r1": pytest.approx(0.9), "prompts": 2.0},
        }
    }


def test_the_command_prints_counts_labels_checks_rewards_and_inputs(tmp_path, capsys):
    run = run_of(tmp_path, iterations=2)
    assert command.main(["stats", str(run), "--least=50"]) == 0
    printed = capsys.readouterr().out
    for number in (1, 2):
        assert f"{number:02d}_harvest_{number}: 90 proposed" in printed
        assert f"Reply {number} of 0." in printed and f"Reply {number} of 1." not in printed
    for words in ("rejected: low_reward", "33.3%", "left out: label_share", "10 of 30", "0.750", "passed"):
        assert words in printed
    assert "FAILED" not in printed and "0.400" in printed and "gold fear 0.50" in printed


def test_a_failed_check_is_an_exit_status(tmp_path, capsys):
    run = run_of(tmp_path)
    assert command.main(["stats", str(run)]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert command.main(["stats", str(run), "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    (harvest,) = content["harvests"].values()
    assert [check["passed"] for check in harvest["checks"]] == [False, True, True, True, True]
    assert "places" not in harvest["report"] and content["rewards"]["rl_1"]["original"]["prompts"] == 9.0


def test_a_folder_without_harvests_is_named(tmp_path, capsys):
    assert command.main(["stats", str(tmp_path)]) == 2
    assert "no phases/*/harvest.json" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_an_error_in_words(tmp_path, capsys):
    run = run_of(tmp_path)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    assert command.main(["stats", str(run)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
