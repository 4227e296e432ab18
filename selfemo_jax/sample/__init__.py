"""The bundled corpus, all of it invented, and its tokenizer: paths only, read through importlib.resources."""

from importlib.resources import files
from importlib.resources.abc import Traversable

__all__ = ["NAMES", "SPLITS", "dataset", "tokenizer"]

NAMES = ("meld", "emorynlp", "iemocap")
"""Folders of the corpus: one for each of the three label lists."""

SPLITS = ("train", "dev", "test")


def dataset(name: str) -> Traversable:
    """Folder of one part of the corpus: dataset.json and {train,dev,test}.jsonl.

    ValueError on a name that is not in `NAMES`.
    """
    if name not in NAMES:
        raise ValueError(f"sample/{name} does not exist; expected sample/ and one of {', '.join(NAMES)}")
    return files(__name__) / name


def tokenizer() -> Traversable:
    """Folder of the byte-level tokenizer, which `tools/train_tokenizer.py` builds from the corpus."""
    return files(__name__) / "tokenizer"
