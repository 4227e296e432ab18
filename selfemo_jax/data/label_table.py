"""The labels that rows of labels choose among; apart, so that the update needs no tokenizer for it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    """The labels of all sets, one after the other; a target is a position in it. Hashable."""

    names: tuple[tuple[str, str], ...]
    """(data set, label)."""
    token_ids: tuple[int, ...]
    """The token that tells the label apart from the others of its set."""
    sets: tuple[int, ...]
    """Number of the label's set."""
    openings: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Data set -> ids of an answer up to that token."""

    def opening(self, dataset: str) -> tuple[int, ...]:
        """Ids between the prompt and the label."""
        return dict(self.openings)[dataset]

    def index(self, dataset: str, label: str) -> int:
        """Position of a label."""
        return self.names.index((dataset, label))
