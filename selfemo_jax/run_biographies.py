"""Biographies of a run: counted when the data is read, or written by experts and kept in its folder."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from selfemo_jax.appendlog import atomic_write, read_json
from selfemo_jax.config import Config
from selfemo_jax.data.biographies import Biographies, expert_messages, kept_words, lines_to_read
from selfemo_jax.experts.ask import Question
from selfemo_jax.experts.panel import Panel
from selfemo_jax.run_data import RunData, tell_biographies

FILE = "biographies.json"


def add_biographies(config: Config, data: RunData, panel: Panel, folder: Path) -> RunData:
    """The data whose inputs are told what experts say of their speakers; leaves ``biographies.json``."""
    if config.output.biography != "expert":
        return data
    read = lines_to_read(data.dialogues, seed=config.seed)
    questions = []
    for (dataset, name), lines in read.items():
        system, user = expert_messages(name, lines)
        questions.append(Question(id=f"{dataset}/{name}", system=system, user=user))
    written, sources = {}, set()
    for speaker, answers in zip(read, panel.ask(questions, what="biographies"), strict=True):
        text = kept_words(answers[0].text) if answers and not answers[0].refused else None
        if text is not None:
            written[speaker] = text
            sources.add(answers[0].source)
    record = [
        {"dataset": dataset, "speaker": name, "text": text} for (dataset, name), text in written.items()
    ]
    content = {"source": ", ".join(sorted(sources)), "biographies": record}
    atomic_write(folder / FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return _told(data, content)


def with_biographies(config: Config, data: RunData) -> RunData:
    """The data with what experts wrote for the run that the settings are of; unchanged where they wrote
    nothing.

    ValueError where the settings ask for them and the run's folder has none.
    """
    if config.output.biography != "expert":
        return data
    path = Path(config.run_dir or ".") / FILE
    if not path.is_file():
        raise ValueError(
            f"output.biography is expert and {path} does not exist: the biographies lie in the folder of the "
            "run that asked for them; give it as --run_dir, or set output.biography to train_lines or none"
        )
    return _told(data, read_json(path))


def _told(data: RunData, content: Mapping) -> RunData:
    written = {(line["dataset"], line["speaker"]): line["text"] for line in content["biographies"]}
    found = Biographies(source=content["source"], written=written)
    return replace(tell_biographies(data, found), biographies=found)
