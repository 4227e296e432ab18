"""Whatever stands in a file where something else is expected, a reader says so in words and never crashes."""

import copy
import json
import pickle
import random
from pathlib import Path

import pytest

from selfemo_jax.data.emorynlp import read_emorynlp
from selfemo_jax.data.iemocap import read_iemocap
from selfemo_jax.data.jsonl import read_folder

NUM = 400
JUNK = (None, 5, -1, 1.5, True, "x", "", [], {}, [1], {"a": 1}, [[]], "Ses01F_impro01")

OWN = {
    "dialogue_id": "d1",
    "turns": [
        {"speaker": "A", "text": "Hi.", "label": "up"},
        {"speaker": "B", "text": "Yo.", "labels": {"up": 0.5, "down": 0.5}},
    ],
    "personas": {"A": "calm"},
    "theme": "a lift",
}
UTTERANCE = {
    "utterance_id": "s01_e02_c04_u002",
    "speakers": ["Ada"],
    "transcript": "Is it?",
    "emotion": "Sad",
}
SCENES = {"episodes": [{"scenes": [{"scene_id": "s01_e02_c04", "utterances": [UTTERANCE]}]}]}
COLUMNS = {"Ses01F_impro01": {"labels": [0, 1], "sentences": ["a b", "c d"], "genders": ["M", "F"]}}
TURNS = [[{"text": "a b", "speaker": "Ses01F_impro01_F", "label": "hap"}]]
TABLES = [
    {"Ses01F_impro01": ["M", "F"], "Ses01F_impro02": ["M"], "Ses05F_impro01": ["F"]},
    {"Ses01F_impro01": [0, 1], "Ses01F_impro02": [2], "Ses05F_impro01": [3]},
    {"Ses01F_impro01": ["a", "b"], "Ses01F_impro02": ["c"], "Ses05F_impro01": ["d"]},
]
SIX = [*TABLES, ["Ses01F_impro01"], ["Ses05F_impro01"], ["Ses01F_impro02"]]
NINE = [{}, *TABLES[:2], {}, {}, {}, TABLES[2], ["Ses01F_impro01", "Ses01F_impro02"], ["Ses05F_impro01"]]


def places(node, path=()):
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def mutated(content, rng: random.Random):
    """The content with something else, or nothing, in one place."""
    content = copy.deepcopy(content)
    *above, last = rng.choice([path for path in places(content) if path])
    node = content
    for key in above:
        node = node[key]
    if isinstance(node, dict) and rng.random() < 0.25:
        del node[last]
    else:
        node[last] = rng.choice(JUNK)
    return content


def write_own(folder: Path, rng: random.Random) -> None:
    (folder / "dataset.json").write_text('{"name": "own", "labels": ["up", "down"]}')
    (folder / "train.jsonl").write_text(json.dumps(mutated(OWN, rng)))


def write_scenes(folder: Path, rng: random.Random) -> None:
    for name in ("trn", "dev", "tst"):
        (folder / f"emotion-detection-{name}.json").write_text(json.dumps(mutated(SCENES, rng)))


def write_splits(folder: Path, rng: random.Random) -> None:
    for name in ("train", "dev", "test"):
        (folder / f"{name}.json").write_text(json.dumps(mutated(rng.choice((COLUMNS, TURNS)), rng)))


def write_pickle(folder: Path, rng: random.Random) -> None:
    content = mutated(SIX, rng) if rng.random() < 0.5 else tuple(mutated(NINE, rng))
    (folder / "iemocap.pkl").write_bytes(pickle.dumps(content))


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (write_own, read_folder),
        (write_scenes, lambda folder: read_emorynlp(folder, context="json")),
        (write_splits, read_iemocap),
        (write_pickle, read_iemocap),
    ],
)
def test_no_reader_crashes_on_something_else(write, read, tmp_path):
    rng, refused = random.Random(11), 0
    for _ in range(NUM):
        write(tmp_path, rng)
        try:
            read(tmp_path)
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert len(str(error)) > 20
    # Some changes leave a file as good as it was; if nearly all did, nothing was tried.
    assert refused > 0.3 * NUM
