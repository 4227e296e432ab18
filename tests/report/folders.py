"""Run folders written by hand: every file that a report reads, with numbers that a test can work out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NOTE = "plumbing run, not a result"
HOSTILE = (
    "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'>\u2028<b>bold</b>"
)
LABELS = ("joy", "anger")
WORDS = ["river", "stone", "ladder", "window", "orange", "kettle", "marble", "signal", "garden", "copper"]


def write_run(
    folder: Path,
    *,
    steps: int = 4,
    prompts: int = 2,
    group_size: int = 3,
    note: str = NOTE,
    seed: int = 0,
    text: str = "",
    right: Sequence[int] = (1, 0, 1, 1),
) -> Path:
    """A run of one cold step, ``steps`` of RL and a harvest; ``right``: which of its answers are right."""
    write(folder / "config.yaml", f"seed: {seed}\nrun_dir: {folder}\nnote: {note}\noptim:\n  lr: 0.001\n")
    env = {"commit": "f00d" * 10, "dirty": False, "time": "2026-01-02T03:04:05", "command": ["train", text]}
    env |= {"devices": ["0 cpu"], "backend": "cpu", "versions": {"jax": "9"}, "data": {"inputs": "abc123"}}
    write(folder / "env.json", json.dumps(env))
    lines = [
        {"step": 1, "phase": "cold", "nll": 2.0, "time/step": 3.0, "time/update": 2.0, "batch/tokens": 10}
    ]
    for step in range(2, steps + 2):
        line = {"step": step, "phase": "rl_1", "reward/r1": step / 10, "reward/r2": 0.5, "reward/total": 0.7}
        line |= {"entropy": 1.0, "kl": 0.01 * step, "parse/valid": 0.9, "time/step": 2.0, "time/rollout": 1.5}
        line |= {"batch/tokens": 20, "dev/wf1": 0.4, "reward/lambda": None}
        line |= {"memory/host_peak_gib": 1.5, "memory/device_peak_gib": 2.0 if step == 3 else 1.0}
        line[f"reward/r1/{text or 'tiny'}"] = 0.5
        if step == 2:
            line["parse/E_PAIR"] = 0.5
        lines.append(line)
        write_lines(folder / "rollouts" / f"step_{step:06d}.jsonl", rollouts(step, prompts, group_size, text))
    lines.append({"step": steps + 2, "phase": "harvest_1", "harvest/accepted": 1.0, "time/step": 1.0})
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(folder / "flywheel.jsonl", flywheel(text))
    write(folder / "phases" / "02_harvest_1" / "harvest.json", json.dumps(harvest()))
    write_lines(folder / "eval" / "test_predictions.jsonl", predictions(right))
    write(folder / "eval" / "final.json", json.dumps(final(right, note, steps)))
    return folder


def rollouts(step: int, prompts: int, group_size: int, text: str) -> list[dict[str, Any]]:
    found = []
    for p in range(prompts):
        for g in range(group_size):
            words = " ".join(WORDS[(step * 7 + p * 3 + g + place) % len(WORDS)] for place in range(6))
            label = LABELS[(p + g) % 2]
            answer = f"<emotion>{label}:1.00</emotion>\n<self_emotion>joy:0.50</self_emotion>\n"
            answer += f"<response>{words} {text} n{step}x{p}x{g}</response>"
            found.append(
                {
                    "step": step, "sample_id": f"tiny/train/d{p}/1", "dataset": "tiny", "origin": "original",
                    "idx": g, "history": [["Ada", f"The {words} {text}"], ["Bo", "Why?"]] if g == 0 else None,
                    "gold": {"joy": 1.0}, "text": answer,
                    "parse": {
                        "valid": g != 2, "codes": [] if g != 2 else ["E_PAIR"], "emotion": {label: 1.0},
                        "self_emotion": {"joy": 0.5}, "response": words,
                    },
                    "finish": "stop", "r1": float(label == "joy"), "r2": 0.25, "R": 0.5 + g,
                    "advantage": -0.1 * g, "policy_versions": [step - 1],
                }
            )  # fmt: skip
    return found


def flywheel(text: str) -> list[dict[str, Any]]:
    """One dialogue with two accepted replies and its rejected end, and one that is rejected at once."""
    history = [["Ada", "Who left the gate open?"], ["Bo", f"First reply. {text}"], ["Ada", "Second reply."]]

    def record(name: str, depth: int, reply: str, sample: dict | None, reason: str) -> dict[str, Any]:
        return {
            "iteration": 1, "parent_id": name, "root_id": "tiny/train/d0", "dataset": "tiny", "depth": depth,
            "policy_version": 5, "accepted": sample is not None, "reason": reason, "reply": reply,
            "emotion": {"anger": 0.9}, "declared": {"joy": 0.3, "anger": 0.6},
            "select": {"r1": 0.9, "r2": 0.25, "R": 1.0, "n_valid": 3}, "completion_ids": [1, 2],
            "sample": sample,
        }  # fmt: skip

    def child(name: str, turns: int) -> dict[str, Any]:
        return {"id": name, "dataset": "tiny", "history": history[:turns], "responder": "Bo",
                "theme": "a gate", "gold": {"anger": 0.6, "joy": 0.3}}  # fmt: skip

    return [
        record("tiny/train/d0/0", 1, history[1][1], child("tiny/train/d0/0+1", 2), "accepted"),
        record("tiny/train/d1/0", 1, "No.", None, "low_reward"),
        record("tiny/train/d0/0+1", 2, history[2][1], child("tiny/train/d0/0+1+1", 3), "accepted"),
        record("tiny/train/d0/0+1+1", 3, "Third reply.", None, "near_duplicate"),
    ]


def harvest() -> dict[str, Any]:
    shares = {"tiny": {"joy": 0.75, "anger": 0.25}}
    return {"proposed": 4, "accepted": 2, "rejected": {"low_reward": 1}, "training": 2, "heldout": 0,
            "labels": {"human": shares, "accepted": shares}, "divergence": {"training": 0.125}}  # fmt: skip


def predictions(right: Sequence[int]) -> list[dict[str, Any]]:
    """Two inputs a dialogue; gold alternates; a wrong answer names no label."""
    return [
        {"id": f"tiny/test/d{place // 2}/{place}", "dataset": "tiny", "gold": LABELS[place % 2],
         "prediction": LABELS[place % 2] if hit else None}
        for place, hit in enumerate(right)
    ]  # fmt: skip


def final(right: Sequence[int], note: str, steps: int) -> dict[str, Any]:
    confusion = [[0, 0, 0], [0, 0, 0]]
    for place, hit in enumerate(right):
        confusion[place % 2][place % 2 if hit else 2] += 1
    support = [sum(row) for row in confusion]
    f1 = [2 * row[i] / (support[i] + row[i]) if row[i] else 0.0 for i, row in enumerate(confusion)]
    scores = {
        "accuracy": sum(right) / len(right),
        "weighted_f1": sum(a * b for a, b in zip(f1, support, strict=True)) / len(right),
        "macro_f1": sum(f1) / 2, "invalid_rate": 1 - sum(right) / len(right), "num": len(right), "r1": 0.5,
        "per_class": {label: {"f1": f1[i], "support": support[i]} for i, label in enumerate(LABELS)},
        "confusion": confusion, "majority": {"accuracy": 0.5, "weighted_f1": 1 / 3, "label": "joy"},
        "lenient": {"weighted_f1": 0.875}, "instructerc": {"weighted_f1": 0.625}, "mean_tokens": 12.5,
        "calibration": {"share": 0.75, "confidence": 0.6, "accuracy": 1.0, "ece": 0.4, "brier": 0.25,
                        "brier_prior": 0.5},
    }  # fmt: skip
    result = {"seconds": 1.0, "note": note, "sets": {"tiny": scores}}
    result["yardsticks"] = {"tiny": {
        name: {"weighted_f1": wf1, "accuracy": 0.5, "macro_f1": wf1, "parts": {}}
        for name, wf1 in (("majority", 1 / 3), ("stratified random", 0.45), ("TF-IDF + LR", 0.55))
    }}  # fmt: skip
    best = {"dev/wf1": 0.4, "global_step": steps, "phase": "rl_1"}
    return {"global_step": steps, "best": best, "note": note, "splits": {"test": result}}


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def write_clusters(folder: Path, personas: str) -> None:
    """The outputs of a study of persona clusters in a run's folder: two clusters and one persona in none."""
    clusters = [{"cluster": place, "name": f"kind_{place}", "count": 2 - place} for place in (0, 1)]
    write(folder / "study" / "clusters.json", json.dumps({"embedding": "TF-IDF", "clusters": clusters}))
    points = [{"persona": personas, "cluster": label, "point": [x, 1.0 - x]}
              for x, label in ((0.0, 0), (0.1, 0), (0.9, 1), (0.5, -1))]  # fmt: skip
    write_lines(folder / "study" / "persona_clusters.jsonl", points)


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    write(path, "".join(json.dumps(line) + "\n" for line in lines))


def write_phase(
    folder: Path, name: str, said: Sequence[tuple[str, str | None]], dataset: str = "tiny"
) -> None:
    """A finished phase that left its answers to dev: (gold, predicted) of each input."""
    lines = [
        {"id": f"{dataset}/dev/d{place}/0", "dataset": dataset, "gold": gold, "prediction": label}
        for place, (gold, label) in enumerate(said)
    ]
    path = folder / "phases" / name / "dev_predictions.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    write(folder / "phases" / name / "DONE", "")


def write_changes(folder: Path) -> None:
    """Two phases: of ten inputs of gold anger two are read as joy at the end of the first, nine of the
    second, and one angry answer to gold joy became right."""
    gold = [("anger", "anger")] * 8 + [("anger", "joy")] * 2
    write_phase(folder, "00_cold", [*gold, ("joy", "anger"), ("joy", None)])
    later = [("anger", "anger"), *[("anger", "joy")] * 9]
    write_phase(folder, "01_rl_1", [*later, ("joy", "joy"), ("joy", None)])
