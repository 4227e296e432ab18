"""Folders that look like finished runs, as far as studies of predictions read them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from selfemo_jax.study.significance import accuracy, dialogue_counts, weighted_f1

NOTE = "plumbing run, not a result"


def predictions(dataset: str, answers: Mapping[str, Sequence[tuple[str, str | None]]]) -> list[dict]:
    """Lines of predictions; ``answers`` maps a dialogue to (gold, predicted) of its turns."""
    return [
        {"id": f"{dataset}/test/{dialogue}/{turn}", "dataset": dataset, "gold": gold, "prediction": said,
         "lenient": said or gold}
        for dialogue, turns in answers.items()
        for turn, (gold, said) in enumerate(turns)
    ]  # fmt: skip


def evaluated(folder: Path, lines: Sequence[Mapping], *, labels: Sequence[str] = ("joy", "fear")) -> Path:
    """The folder of a run that was scored on test."""
    (folder / "eval").mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "eval" / "test_predictions.jsonl").write_text(text)
    sets = {}
    for name in sorted({line["dataset"] for line in lines}):
        counts = dialogue_counts([line for line in lines if line["dataset"] == name], labels).sum(0)
        scores = {"accuracy": float(accuracy(counts)), "weighted_f1": float(weighted_f1(counts))}
        sets[name] = scores | {"per_class": {label: {} for label in labels}}
    (folder / "eval" / "test.json").write_text(json.dumps({"note": NOTE, "sets": sets}))
    (folder / "eval" / "final.json").write_text(
        json.dumps({"note": NOTE, "splits": {"test": {"sets": sets}}})
    )
    (folder / "config.yaml").write_text(f"note: {NOTE}\nflywheel: {{retrain: {{init: cold}}}}\n")
    return folder
