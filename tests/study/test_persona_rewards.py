"""Rewards by persona cluster: the right responder, numbers that add up, intervals over dialogues."""

import json

import pytest

from selfemo_jax.config_io import to_yaml
from selfemo_jax.data.grammar import parse
from selfemo_jax.evaluate import evaluate_splits
from selfemo_jax.evaluation.answers import Answers
from selfemo_jax.experts.panel import Panel
from selfemo_jax.run_data import load_data
from selfemo_jax.run_personas import add_personas, persona_pieces
from selfemo_jax.scores import prediction_of
from selfemo_jax.study import earned as reading
from selfemo_jax.study import persona_rewards
from selfemo_jax.study.__main__ import main
from selfemo_jax.study.clusters import personas_of_run
from selfemo_jax.study.earned import Clusters, Earned, read_clusters, read_system
from selfemo_jax.study.persona_rewards import chosen_clusters, cluster_rows
from tests.fabricated import settings, text

CLUSTERS = Clusters(
    of_persona={("s/train/a", "Ana"): 0, ("s/train/b", "Ben"): 1}, names={0: "calm", 1: "loud"}
)


def rollout(sample: str, r1: float, emotion: dict, gold: dict, *, valid: bool = True) -> dict:
    read = {"valid": valid, "emotion": emotion}
    return {"sample_id": sample, "r1": r1, "R": r1 + 0.1, "gold": gold, "parse": read}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Three RL steps and one of a harvest."""
    folder = tmp_path / "run"
    (folder / "rollouts").mkdir(parents=True)
    steps = {
        1: [rollout("s/train/a/1", 0.0, {"joy": 1.0}, {"fear": 1.0})],
        2: [
            rollout("s/train/a/1", 0.75, {"joy": 0.7, "fear": 0.2}, {"joy": 1.0}),
            rollout("s/train/b/3+1+1", 0.25, {"joy": 0.4, "fear": 0.6}, {"joy": 1.0}),
        ],
        3: [rollout("s/train/b/3+1+1", 1.0, {"joy": 1.0}, {"joy": 1.0})],
        4: [
            rollout("s/train/a/2", 0.0, {"joy": 1.0}, {"joy": 1.0}, valid=False),
            rollout("s/train/c/0", 0.5, {"joy": 1.0}, {"joy": 1.0}),
        ],
    }
    for step, lines in steps.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "rollouts" / f"step_{step:06d}.jsonl").write_text(text)
    metrics = [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.1}, {"step": 3}, {"step": 4, "loss": 0.1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (folder / "config.yaml").write_text(
        "note: plumbing run, not a result\nflywheel: {retrain: {init: cold}}\n"
    )
    responders = {"s/train/a/1": "Ana", "s/train/a/2": "Ana", "s/train/b/3+1+1": "Ben", "s/train/c/0": "Cy"}
    monkeypatch.setattr(reading, "responders_of", lambda folder: responders)
    return folder


def test_only_the_last_rl_steps_count_and_an_invalid_answer_is_wrong(run):
    system = read_system(run, CLUSTERS, name="run", kind=None, split="test", last=2)
    assert (system.kind, system.answers) == ("rollouts", "rollouts of the last 2 RL steps, training inputs")
    assert system.reward.startswith("R = r1 + lambda(step) r2 over groups of 8")
    found = system.earned
    # Step 3 is no RL step; steps 2 and 4 are the last two.
    assert [(one.root, one.cluster, one.r1, one.right) for one in found] == [
        ("s/train/a", 0, 0.75, True),
        ("s/train/b", 1, 0.25, False),
        ("s/train/a", 0, 0.0, False),
        ("s/train/c", -2, 0.5, True),
    ]
    assert [one.total for one in found] == pytest.approx([0.85, 0.35, 0.1, 0.6])


def test_rows_by_hand():
    earned = [
        *(Earned(root=f"r{n}", cluster=1, r1=n % 4 / 4, right=n % 4 == 0) for n in range(12)),
        *(Earned(root=f"r{place}", cluster=0, r1=1.0, right=True) for place in range(2)),
        Earned(root="r0", cluster=2, r1=0.0, right=False),
        Earned(root="r9", cluster=-1, r1=0.5, right=False),
    ]
    clusters = Clusters(of_persona={}, names={0: "calm", 1: "loud", 2: "rare"})
    rows = {row["cluster"]: row for row in cluster_rows(earned, clusters, [1, 0], num=200)}
    assert list(rows) == [
        "loud",
        "calm",
        "mean of these 2",
        "1 other clusters",
        "in no cluster",
        "all answers",
    ]
    assert (rows["loud"]["answers"], rows["loud"]["dialogues"], rows["loud"]["r1"]) == (12, 12, 37.5)
    assert rows["loud"]["accuracy"] == 25.0
    assert not any("R" in row for row in rows.values()), "single answers have no R"
    low, high = rows["loud"]["r1 ci"]
    assert low < 37.5 < high
    assert rows["calm"]["r1 ci"] is None, "two dialogues say nothing of others"
    # The paper's average counts each cluster once.
    assert rows["mean of these 2"]["r1"] == pytest.approx((37.5 + 100) / 2)
    assert rows["mean of these 2"]["r1 ci"] is None, "one of its clusters has none"
    assert rows["1 other clusters"]["r1 ci"] is None
    assert rows["all answers"]["answers"] == 16


def test_the_mean_of_clusters_has_an_interval_over_the_dialogues_of_all():
    """Clusters of one dialogue rise and fall together: here what one gains the other loses."""
    earned = [
        Earned(root=f"r{n}", cluster=c, r1=float(n % 2 == c), right=True) for n in range(10) for c in (0, 1)
    ]
    clusters = Clusters(of_persona={}, names={0: "calm", 1: "loud"})
    calm, loud, mean, _ = cluster_rows(earned, clusters, [0, 1], num=500)
    assert (mean["cluster"], mean["answers"], mean["dialogues"]) == ("mean of these 2", 20, 10)
    # Ten draws of a fair coin: between 2 and 8 in 98 %.
    assert calm["r1 ci"] == loud["r1 ci"] == [20.0, 80.0]
    assert (mean["r1"], mean["r1 ci"]) == (50.0, [50.0, 50.0])


def test_clusters_are_chosen_once_for_all_systems_by_their_personas():
    personas = {0: 2, 1: 3, 2: 5, 3: 4}
    clusters = Clusters(
        of_persona={(f"r{n}", str(c)): c for c, number in personas.items() for n in range(number)},
        names={c: str(c) for c in personas},
    )

    def system(name, answers):
        earned = [
            Earned(root="r", cluster=c, r1=0.5, right=True)
            for c, number in answers.items()
            for _ in range(number)
        ]
        return reading.System(
            name=name,
            kind="greedy",
            split="test",
            answers="",
            reward="",
            told=True,
            note="",
            earned=tuple(earned),
        )

    # By answers the first would take clusters 0 and 1, the second 3 and 0.
    systems = [system("a", {0: 9, 1: 8, 2: 1, 3: 7}), system("b", {0: 5, 1: 1, 3: 9, -1: 2})]
    assert chosen_clusters(systems, clusters, most=2) == [3, 1]
    assert chosen_clusters(systems, clusters, most=9) == [3, 1, 0]
    assert chosen_clusters([*systems, system("c", {-2: 4})], clusters, most=2) == [3, 1]
    assert chosen_clusters([system("c", {-2: 4})], clusters, most=2) == []
    rows = cluster_rows(systems[0].earned, clusters, [3, 1], num=100)
    assert [row["cluster"] for row in rows] == [
        "3",
        "1",
        "mean of these 2",
        "2 other clusters",
        "all answers",
    ]


def test_the_command_names_what_is_missing_and_writes_the_table(run, tmp_path, capsys):
    assert main(["personas", str(run)]) == 2
    assert "study clusters" in capsys.readouterr().err
    folder = tmp_path / "clusters"
    folder.mkdir()
    lines = [
        {"root": root, "speaker": who, "cluster": place} for (root, who), place in CLUSTERS.of_persona.items()
    ]
    (folder / "persona_clusters.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "clusters.json").write_text("{}")
    with pytest.raises(ValueError, match="run it anew"):
        read_clusters(folder)
    names = [{"cluster": place, "name": name} for place, name in CLUSTERS.names.items()]
    (folder / "clusters.json").write_text(json.dumps({"clusters": names}))
    assert read_clusters(folder) == CLUSTERS
    assert main(["personas", str(run), "--clusters", str(folder), "--samples", "100"]) == 0
    printed = capsys.readouterr().out
    assert "plumbing run, not a result" in printed and "was not told the personas" not in printed
    assert "fewer than 10 dialogues" in printed
    assert "among those that every system answered for: calm, loud" in printed
    rows = json.loads((run / "study" / "persona_rewards.json").read_text())["clusters"]
    assert sum(row["answers"] for row in rows if row["cluster"] in ("calm", "loud")) == 4
    assert (run / "study" / "persona_rewards.png").stat().st_size > 1000
    (run / "metrics.jsonl").write_text('{"step": 9, "loss": 1.0}\n')
    assert main(["personas", str(run), "--clusters", str(folder)]) == 2
    assert "rollout.keep" in capsys.readouterr().err


KINDS = ("calm, gentle, patient, soothing and slow", "loud, brash, furious, hotheaded and bitter")


def scene(piece) -> str:
    """What an expert writes of a piece: every speaker is of one of two kinds."""
    told = {name: f"{name} seems {KINDS[len(name) % 2]}." for name in piece.speakers}
    return f"I read it.\n```python\n{json.dumps(told | {'Theme': 'an everyday matter'})}\n```"


@pytest.mark.parametrize("scope", ["segment", "history"])
def test_rollouts_find_the_clusters_of_the_personas_that_experts_wrote(scope, tmp_path):
    """From the experts' answers to the table, through the files that each step leaves."""
    run, answers = tmp_path / "run", tmp_path / "answers.jsonl"
    endpoint = {"name": "owl", "kind": "replay", "model": "m", "record": str(answers)}
    config = settings(
        # As written down where the run was made; the folder has moved since.
        run_dir="elsewhere",
        data={"sets": ["sample/meld"], "max_items": 80},
        expert={"endpoints": [endpoint]},
        persona={"source": "expert", "scope": scope, "max_turns": 3},
    )
    data = load_data(config)
    pieces = [piece for piece, _ in persona_pieces(config, data)["train"]]
    lines = [{"question": piece.id, "text": scene(piece)} for piece in pieces]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "rollouts").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    with Panel(config.expert, tmp_path / "cache.jsonl") as panel:
        told = add_personas(config, data, panel, run, print).all_train()
    rollouts = [rollout(one.id, 0.5, dict(one.gold), dict(one.gold)) for one in told]
    text = "".join(json.dumps(line) + "\n" for line in rollouts)
    (run / "rollouts" / "step_000001.jsonl").write_text(text)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.1}\n')

    assert main(["clusters", "--run", str(run), "--min-cluster-size", "5", "--min-samples", "2"]) == 0
    assert main(["personas", str(run), "--samples", "100"]) == 0
    written = (run / "study" / "persona_clusters.jsonl").read_text().splitlines()
    speakers = [(line["root"], line["speaker"]) for line in map(json.loads, written)]
    assert len(set(speakers)) == len(speakers), "a speaker counts once in a dialogue"
    rows = json.loads((run / "study" / "persona_rewards.json").read_text())["clusters"]
    found = {row["cluster"]: row["answers"] for row in rows if not row["cluster"].startswith("mean of")}
    # One who has not spoken yet is unknown to a history.
    unknown = sum((one.root_id, one.responder) not in speakers for one in told)
    assert found.pop("all answers") == 80 == sum(found.values())
    assert found.get(persona_rewards.OTHER[persona_rewards.UNKNOWN], 0) == unknown
    assert unknown == 0 if scope == "segment" else unknown < 40
    assert any("patient" in name for name in found) and any("brash" in name for name in found)


def answered(config) -> Answers:
    """Answers of somebody who is right where the responder's name has an even length; of two samples the
    second is right where the first is not."""

    def of(sample, place: int):
        gold = max(sample.gold, key=lambda label: sample.gold[label])
        other = next(label for label in sample.inventory if label != gold)
        mine = gold if len(sample.responder) % 2 == place else other
        said = text([(mine, 1.0)])
        read = parse(said, inventory=sample.inventory)
        return prediction_of(
            sample, said, read, config, finished=True, num_prompt_tokens=2, num_tokens=3, seconds=None
        )  # fmt: skip

    return Answers(
        greedy=lambda samples: (of(sample, 0) for sample in samples),
        sampled=lambda samples, num: ([of(sample, place) for place in range(num)] for sample in samples),
        config=config,
    )


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A folder of `evaluate`, for a served model as for any, and clusters of the personas of its split: calm
    ones are answered right, loud ones wrong; the second of two samples is the other way round."""
    folder = tmp_path_factory.mktemp("served")
    config = settings(data={"sets": ["sample/meld"]})
    data = load_data(config)
    evaluate_splits(
        answered(config), data, splits=["dev"], note="M at URL",
        folder=folder, say=print, num_samples=2,
    )  # fmt: skip
    of_persona = {(one.root_id, one.responder): len(one.responder) % 2 for one in data.split("dev")}
    (folder / "study").mkdir()
    lines = [{"root": root, "speaker": who, "cluster": place} for (root, who), place in of_persona.items()]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "study" / "persona_clusters.jsonl").write_text(text)
    names = [{"cluster": 0, "name": "calm"}, {"cluster": 1, "name": "loud"}]
    (folder / "study" / "clusters.json").write_text(json.dumps({"clusters": names}))
    return folder, data


def test_an_evaluation_without_rollouts_has_a_row_for_each_cluster(evaluated, capsys):
    folder, data = evaluated
    words = ["personas", str(folder), "--split", "dev", "--samples", "100"]
    assert main([*words, "--answers", "greedy"]) == 0
    printed = capsys.readouterr().out
    assert "one greedy answer to each input, dev split - M at URL" in printed
    assert "it was not told the personas (eval.persona is none)" in printed
    content = json.loads((folder / "study" / "persona_rewards.json").read_text())
    rows = {row["cluster"]: row for row in content["clusters"]}
    calm = sum(len(one.responder) % 2 == 0 for one in data.split("dev"))
    assert (rows["calm"]["answers"], rows["calm"]["r1"], rows["calm"]["accuracy"]) == (calm, 100.0, 100.0)
    assert (rows["loud"]["r1"], rows["all answers"]["answers"]) == (0.0, len(data.split("dev")))
    assert content["averaged"][0]["R"] is None and not any("R" in row for row in rows.values())


def test_sampled_answers_are_groups_with_the_whole_reward(evaluated, capsys):
    folder, _ = evaluated
    assert main(["personas", str(folder), "--split", "dev", "--samples", "100"]) == 0
    content = json.loads((folder / "study" / "persona_rewards.json").read_text())
    (averaged,) = content["averaged"]
    assert averaged["answers"] == "2 sampled answers to each input, dev split"
    assert averaged["R"].startswith("R = r1 + 0.5 r2 over groups of 2")
    # Of two answers one is right; each names one of the two core labels: 1/2 + 1/2 * 1/2.
    for row in content["clusters"]:
        assert (row["r1"], row["accuracy"], row["R"]) == pytest.approx((50, 50, 75))
    path = folder / "dev_samples.jsonl"
    assert main(["personas", str(path), "--answers", "greedy", "--clusters", str(folder / "study")]) == 2
    assert "holds samples answers" in capsys.readouterr().err


def test_answers_that_were_drawn_differently_are_said_not_to_compare(run, evaluated, capsys):
    folder, _ = evaluated
    words = ["personas", str(folder), str(run), "--split", "dev", "--samples", "100"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "these rows do not compare" in printed
    assert f"{run.name}: no responder has a clustered persona; `study clusters --splits train`" in printed


def test_what_an_evaluation_lacks_is_said(tmp_path, evaluated, capsys):
    folder, _ = evaluated
    clusters = ["--clusters", str(folder / "study")]
    assert main(["personas", str(tmp_path), *clusters]) == 2
    error = capsys.readouterr().err
    assert "rollout.keep" in error and "selfemo_jax.evaluate" in error
    assert main(["personas", str(folder), *clusters, "--answers", "samples"]) == 2
    assert "no test_samples.jsonl" in capsys.readouterr().err
    line = json.loads((folder / "dev_predictions.jsonl").read_text().splitlines()[0])
    del line["responder"]
    (tmp_path / "test_predictions.jsonl").write_text(json.dumps(line) + "\n")
    assert main(["personas", str(tmp_path), *clusters]) == 2
    assert "record 1 lacks" in capsys.readouterr().err


def test_personas_of_an_evaluation_split_are_those_of_its_responders(tmp_path):
    config = settings(data={"sets": ["sample/meld"]})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    found = personas_of_run(tmp_path, splits=["train", "test"])
    test = {(one.root, one.speaker): one.sentence for one in found if "/test/" in one.root}
    asked = load_data(config).split("test")
    assert test == {(one.root_id, one.responder): one.persona for one in asked if one.persona}
    assert len(found) > len(test) > 10
    (tmp_path / "config.yaml").write_text(to_yaml(settings(persona={"source": "none"})))
    with pytest.raises(ValueError, match=r"test data has no personas.*persona\.splits"):
        personas_of_run(tmp_path, splits=["test"])
