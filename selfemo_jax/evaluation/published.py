"""The published rows of Table 1 (arXiv:2604.18003), as numbers to stand beside ours.

The paper prints the headings "LLM-based" and "Traditional" the wrong way round; `group` has them right.
Systems of the groups `traditional` and `llm` are trained for one set each; BiosERC and PRC-Emo read turns
after the one to recognise (five on both sides), which neither SELF-EMO nor this project does; InstructERC's
released code picks its epoch on the test split. `unified` is one model for all three sets: the rows to
compare with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

TABLE = "Table 1 of arXiv:2604.18003"
SETS = ("iemocap", "meld", "emorynlp")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One system: percent, None where the paper has none."""

    group: str
    name: str
    scores: tuple[tuple[float | None, float | None], ...]
    """(accuracy, weighted F1) of IEMOCAP, MELD, EmoryNLP."""
    average: tuple[float | None, float | None] = (None, None)
    """Printed mean accuracy and weighted F1 over the three sets."""

    def of(self, dataset: str) -> tuple[float | None, float | None]:
        """Accuracy and weighted F1 on a set, in percent."""
        return self.scores[SETS.index(dataset)]


def _row(group: str, name: str, *numbers: float | None) -> Row:
    """The numbers as they are printed: those of the sets, then the two means where there are any."""
    pairs = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    return Row(group=group, name=name, scores=pairs[:3], average=(*pairs[3:], (None, None))[0])


ROWS = (
    _row("traditional", "DialogueRNN", 63.40, 62.75, 60.27, 57.03, None, 31.70, None, 50.49),
    _row("traditional", "ICON", 64.00, 63.50, None, 56.30, None, None),
    _row("traditional", "DialogueGCN", 65.25, 64.18, None, 58.10, None, None),
    _row("traditional", "COSMIC", None, 65.28, None, 65.21, None, 38.11, None, 56.20),
    _row("traditional", "MMGCN", None, 66.22, None, 58.65, None, None),
    _row("traditional", "DAG-ERC", 67.53, 68.03, 63.98, 63.63, None, 39.02, None, 56.89),
    _row("traditional", "LR-GCN", 68.50, 68.30, None, 65.60, None, None),
    _row("traditional", "MultiDAG+CL", 69.11, 69.08, None, 64.00, None, None),
    _row("traditional", "CBERL", 69.36, 69.27, 67.78, 66.89, None, None),
    _row("traditional", "DER-GCN", 69.70, 69.40, 66.80, 66.10, None, None),
    _row("traditional", "LSDGNN+ICL", 70.35, 70.24, 64.67, 64.07, None, None),
    _row("llm", "InstructERC (LLaMA2-7B)", None, 71.39, None, 69.15, None, 41.39),
    _row("llm", "BiosERC (LLaMA2-13B)", None, 71.19, None, 69.83, None, 41.68),
    _row("llm", "PRC-Emo (Qwen2.5/3)", 71.03, 71.95, 71.50, 70.44, None, None),
    _row("unified", "Seed-1.8", 18.30, 18.54, 26.82, 25.31, 21.85, 20.99, 22.32, 21.61),
    _row("unified", "DeepSeek-V3.2", 19.90, 19.84, 20.69, 20.57, 19.82, 18.55, 20.13, 19.65),
    _row("unified", "Qwen3-4B", 56.07, 55.83, 60.96, 59.55, 41.87, 41.50, 52.96, 52.29),
    _row("unified", "Qwen3-8B", 57.67, 57.33, 59.43, 59.21, 43.19, 42.71, 53.43, 53.08),
    _row("unified", "BiosERC (LLaMA2-13B)", 28.53, 28.84, 62.13, 61.59, 19.83, 20.55, 36.83, 36.99),
    _row("unified", "PRC-Emo (Qwen3-8B)", 27.39, 27.53, 64.07, 63.88, 22.53, 21.94, 37.99, 37.78),
    _row("unified", "SELF-EMO (Qwen3-4B)", 64.60, 63.57, 67.74, 67.32, 45.52, 44.98, 59.29, 58.62),
    _row("unified", "SELF-EMO (Qwen3-8B)", 66.11, 64.81, 71.92, 70.30, 47.87, 47.61, 61.97, 60.91),
)


def rows_for(datasets: Sequence[str]) -> tuple[Row, ...]:
    """The rows that have a number for any of the sets; none for sets that are not the paper's."""
    known = [name for name in datasets if name in SETS]
    return tuple(row for row in ROWS if any(value is not None for name in known for value in row.of(name)))
