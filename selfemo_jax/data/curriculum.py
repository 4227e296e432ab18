"""From easy dialogues to hard ones: how much the feelings in them shift.

A dialogue is harder the more often the label changes from one labelled turn to the next, and from a
speaker's turn to the same speaker's next turn, which counts double: a weighted share of emotional shifts,
in the manner of PRC-Emo; the weights are this project's. Only training labels are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from selfemo_jax.data.dialogues import Dialogue, heaviest_label

SAME_SPEAKER, NEIGHBOURS = 2.0, 1.0
NUM_STAGES = 5
"""Parts of about equal size that a pass goes through, easiest first; inside a part the order is random."""


def difficulty(turns: Iterable[tuple[str, str]]) -> float:
    """From 0 (one feeling throughout) to 1 (another at every turn) for (speaker, label) pairs in spoken
    order."""
    shifts = pairs = 0.0
    previous: str | None = None
    last_of: dict[str, str] = {}
    for speaker, label in turns:
        for weight, before in ((NEIGHBOURS, previous), (SAME_SPEAKER, last_of.get(speaker))):
            if before is not None:
                pairs += weight
                shifts += weight * (before != label)
        previous = last_of[speaker] = label
    return shifts / pairs if pairs else 0.0


def difficulties(train: Mapping[str, Dialogue]) -> dict[str, float]:
    """Root id of each training dialogue -> its difficulty."""
    return {
        root: difficulty(
            (turn.speaker, heaviest_label(turn.labels)) for turn in dialogue.turns if turn.labels
        )
        for root, dialogue in train.items()
    }


def root_of(item: Any) -> str:
    """Dialogue that an item of training belongs to: a sample, an example, or the tuple of those of a
    dialogue."""
    while isinstance(item, tuple):
        item = item[0]
    return item.root_id
