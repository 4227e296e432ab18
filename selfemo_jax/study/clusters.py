"""Clusters of persona sentences (Fig. 4, Tables 6 and 7): what kinds of speakers there are.

    python -m selfemo_jax.study clusters --run RUN [--checkpoint DIR] [--out DIR]

Names are masked, sentences become vectors (the policy's mean hidden state, or TF-IDF reduced by an SVD),
HDBSCAN finds the clusters, and the terms that tell a cluster from the others (class-based TF-IDF) name it.
What belongs to no cluster is counted as noise.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.cluster import HDBSCAN  # pyrefly: ignore[missing-module-attribute]
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.preprocessing import normalize

from selfemo_jax.appendlog import atomic_write
from selfemo_jax.study import showing
from selfemo_jax.study.reading import joined_notes, run_note

MASK = "someone"
NOISE = -1
SVD_DIMS = 50
NUM_TERMS = 4
STOP_WORDS = ("a", "an", "and", "in", "is", "of", "the", "to", "who")


@dataclass(frozen=True, kw_only=True)
class Persona:
    """One speaker of one dialogue."""

    root: str
    speaker: str
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """Which cluster each persona is in; clusters are numbered by size, the largest is 0."""

    labels: np.ndarray
    """[N]; -1 is noise."""
    names: tuple[str, ...]
    """Terms joined by "_", one name a cluster."""
    counts: tuple[int, ...]
    points: np.ndarray
    """[N, 2], for the picture."""

    @property
    def noise_share(self) -> float:
        """Share of personas in no cluster."""
        return float(np.mean(self.labels == NOISE)) if len(self.labels) else 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``study clusters``."""
    parser.add_argument("--run", type=Path, help="run whose personas are read: its experts', else its data's")
    parser.add_argument(
        "--personas", type=Path, help="JSON lines with root, speaker and persona, in place of it"
    )
    words = "splits whose personas are clustered: train, and dev or test where their inputs have any"
    parser.add_argument("--splits", nargs="+", default=["train"], help=words)
    parser.add_argument("--checkpoint", help="policy that embeds the sentences; default: TF-IDF and an SVD")
    parser.add_argument("--min-cluster-size", type=int, default=50, help="personas of a cluster at least")
    parser.add_argument("--min-samples", type=int, default=10, help="neighbours that make a point dense")
    parser.add_argument("--most", type=int, default=12, help="clusters that the picture colours")
    parser.add_argument("--out", type=Path, help="folder; default: study/ in the run")


def main(args: argparse.Namespace) -> int:
    """Cluster, print the counts, write ``clusters.json``, ``persona_clusters.jsonl`` and ``clusters.png``."""
    if (args.run is None) == (args.personas is None):
        raise ValueError("name either --run or --personas")
    found = read_personas(args.personas) if args.personas else personas_of_run(args.run, splits=args.splits)
    out = args.out or (args.run / "study" if args.run else args.personas.parent / "study")
    masked = mask_names(found)
    if args.checkpoint:
        vectors, how = policy_vectors(masked, args.checkpoint), f"mean hidden state of {args.checkpoint}"
    else:
        vectors, how = tfidf_vectors(masked), f"TF-IDF, SVD to at most {SVD_DIMS} dimensions"
    result = cluster(masked, vectors, min_cluster_size=args.min_cluster_size, min_samples=args.min_samples)
    sources = [args.run or args.personas.parent, *([Path(args.checkpoint)] if args.checkpoint else [])]
    note = joined_notes([run_note(source) for source in sources])
    write(out, found, result, how=how, most=args.most, note=note)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(showing.titled(f"{len(result.labels)} personas; {how}", note), markup=False, soft_wrap=True)
    console.print(cluster_table(result))
    return 0


def read_personas(path: Path) -> list[Persona]:
    """Personas of a file with one JSON object a line, each with root, speaker and persona."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            found.append(Persona(root=record["root"], speaker=record["speaker"], sentence=record["persona"]))
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with root, speaker and persona"
            ) from None
    return found


def personas_of_run(run_dir: Path, *, splits: Sequence[str] = ("train",)) -> list[Persona]:
    """The personas of a run's dialogues: those that experts wrote for it, else the data's own.

    One sentence for each speaker of a dialogue, however many pieces of the dialogue the experts read: in
    training dialogues the one that self-play told the policy, in evaluation splits, where only those who
    respond are described, the first, which knows least of what is said later.
    """
    from selfemo_jax.config_io import read_config
    from selfemo_jax.run_data import load_data
    from selfemo_jax.run_personas import with_personas

    if not (run_dir / "config.yaml").exists():
        raise ValueError(f"--run {run_dir}: no run is there; expected its config.yaml")
    config = replace(read_config(run_dir / "config.yaml"), run_dir=str(run_dir))
    data = load_data(config)
    found = []
    for split in dict.fromkeys(splits):
        told = with_personas(config, data, split=split)
        by_speaker: dict[tuple[str, str], str] = {}
        if split == "train":
            for root, personas in told.personas.items():
                by_speaker |= {(root, speaker): sentence for speaker, sentence in personas.items()}
        else:
            for sample in told.split(split):
                if sample.persona:
                    by_speaker.setdefault((sample.root_id, sample.responder), sample.persona)
        if not by_speaker:
            advice = "persona.source expert lets a model write them"
            if split != "train":
                advice += f" of the splits in persona.splits, now {', '.join(config.persona.splits)}"
            raise ValueError(f"{run_dir}: its {split} data has no personas; {advice}")
        found += [
            Persona(root=root, speaker=speaker, sentence=sentence)
            for (root, speaker), sentence in by_speaker.items()
        ]
    return found


def mask_names(found: Sequence[Persona]) -> list[str]:
    """The sentences with every name of a speaker of their dialogue replaced, so that no cluster is one
    person's."""
    names: dict[str, set[str]] = {}
    for persona in found:
        names.setdefault(persona.root, set()).add(persona.speaker)
        # A full name is also met by its parts.
        names[persona.root] |= {part for part in persona.speaker.split() if len(part) > 2}
    masked = []
    for persona in found:
        ordered = sorted(names[persona.root], key=len, reverse=True)
        pattern = "|".join(re.escape(name) for name in ordered)
        masked.append(re.sub(rf"(?<!\w)(?:{pattern})(?!\w)", MASK, persona.sentence, flags=re.IGNORECASE))
    return masked


def tfidf_vectors(sentences: Sequence[str]) -> np.ndarray:
    """Unit vectors [N, at most 50] of TF-IDF weights of words and word pairs, reduced by an SVD."""
    weights = TfidfVectorizer(
        stop_words=[*STOP_WORDS, MASK], ngram_range=(1, 2), sublinear_tf=True
    ).fit_transform(sentences)
    dims = min(SVD_DIMS, min(weights.shape) - 1)
    if dims < 2:
        raise ValueError(f"{len(sentences)} personas are too few to cluster; expected 3 or more")
    return normalize(TruncatedSVD(dims, random_state=0).fit_transform(weights))


def policy_vectors(sentences: Sequence[str], checkpoint: str, *, batch_size: int = 32) -> np.ndarray:
    """Unit vectors [N, D]: the policy's hidden states after the final norm, averaged over a sentence's
    tokens, less their mean over all sentences, which every sentence shares."""
    import jax
    import jax.numpy as jnp

    from selfemo_jax.checkpoint import find_checkpoint
    from selfemo_jax.config_io import read_config
    from selfemo_jax.model.decoder import forward
    from selfemo_jax.parts import build_parts, weights_of

    found = find_checkpoint(checkpoint)
    assert found.config_file is not None
    parts = build_parts(found.settings(read_config(found.config_file)))
    params = weights_of(parts, found.weights)
    ids = [parts.codec.encode_data(sentence) for sentence in sentences]
    longest = -(-max(map(len, ids)) // 32) * 32

    @jax.jit
    def pooled(params, tokens, mask):
        positions = jnp.broadcast_to(jnp.arange(longest, dtype=jnp.int32), tokens.shape)
        hidden = forward(
            params,
            parts.model,
            parts.compute,
            tokens=tokens,
            positions=positions,
            segment_ids=mask.astype(jnp.int32),
            prefix_ids=jnp.full(tokens.shape, -1, jnp.int32),
        )
        hidden = hidden.astype(jnp.float32) * mask[..., None]
        return hidden.sum(axis=1) / mask.sum(axis=1, keepdims=True)

    rows = []
    for start in range(0, len(ids), batch_size):
        tokens = np.zeros((batch_size, longest), np.int32)
        mask = np.zeros((batch_size, longest), np.float32)
        for row, one in enumerate(ids[start : start + batch_size]):
            tokens[row, : len(one)], mask[row, : len(one)] = one, 1.0
        mask[mask.sum(axis=1) == 0, 0] = 1.0  # rows that fill up the last batch
        rows.append(np.asarray(pooled(params, tokens, mask)))
    vectors = np.concatenate(rows)[: len(ids)]
    return normalize(vectors - vectors.mean(axis=0))


def cluster(
    sentences: Sequence[str], vectors: np.ndarray, *, min_cluster_size: int, min_samples: int
) -> Clustering:
    """HDBSCAN on unit vectors [N, D] with euclidean distances; clusters by size, named by their terms."""
    if len(sentences) < max(3, min_cluster_size, min_samples):
        raise ValueError(
            f"{len(sentences)} personas, but --min-cluster-size is {min_cluster_size} and --min-samples "
            f"{min_samples}; lower them for a small collection"
        )
    raw = HDBSCAN(min_cluster_size=min_cluster_size, min_samples=min_samples, copy=True).fit_predict(vectors)
    sizes = Counter(int(label) for label in raw if label != NOISE)
    order = {label: place for place, (label, _) in enumerate(sizes.most_common())}
    labels = np.array([order.get(int(label), NOISE) for label in raw])
    return Clustering(
        labels=labels,
        names=cluster_names(sentences, labels),
        counts=tuple(count for _, count in sizes.most_common()),
        points=PCA(2, random_state=0).fit_transform(vectors),
    )


def cluster_names(sentences: Sequence[str], labels: np.ndarray) -> tuple[str, ...]:
    """The heaviest terms of each cluster by class-based TF-IDF, joined by "_".

    The sentences of a cluster are one document; a term's weight is its frequency there times
    log(1 + mean words of a cluster / frequency of the term in all of them) (BERTopic, arXiv:2203.05794).
    """
    num = int(labels.max(initial=NOISE)) + 1
    if num == 0:
        return ()
    joined = [
        " ".join(s for s, label in zip(sentences, labels, strict=True) if label == c) for c in range(num)
    ]
    counter = CountVectorizer(stop_words="english", token_pattern=r"(?u)\b[^\W\d_]{3,}\b")
    counts = np.asarray(counter.fit_transform(joined).todense(), np.float64)  # pyrefly: ignore
    terms = counter.get_feature_names_out()
    counts[:, terms == MASK] = 0
    frequency = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    weights = frequency * np.log1p(counts.sum() / num / np.maximum(counts.sum(axis=0), 1))
    names = []
    for row in weights:
        best = sorted(range(len(terms)), key=lambda place: (-row[place], terms[place]))[:NUM_TERMS]
        names.append("_".join(terms[place] for place in best if row[place] > 0))
    return tuple(names)


def write(out: Path, found: Sequence[Persona], result: Clustering, *, how: str, most: int, note: str) -> None:
    """The counts, the persona of every point, and the picture; ``note`` is what the numbers carry."""
    summary = {
        "note": note,
        "personas": len(found),
        "embedding": how,
        "noise_share": round(result.noise_share, 4),
        "clusters": [
            {"cluster": place, "name": name, "count": count}
            for place, (name, count) in enumerate(zip(result.names, result.counts, strict=True))
        ],
    }
    atomic_write(out / "clusters.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    atomic_write(out / "persona_clusters.jsonl", "".join(_lines(found, result)))
    draw(out / "clusters.png", result, most=most, note=note)


def draw(path: Path, result: Clustering, *, most: int, note: str) -> None:
    """A 2-D picture: the largest clusters in colour with their names and counts, the rest in grey."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = min(most, len(result.names))
    rest = (result.labels == NOISE) | (result.labels >= shown)
    axes.scatter(*result.points[rest].T, s=8, color="0.8", label=f"other, noise: {int(rest.sum())}")
    colours = colormaps["tab20"]
    for place in range(shown):
        label = f"{result.names[place]}: {result.counts[place]}"
        axes.scatter(*result.points[result.labels == place].T, s=12, color=colours(place % 20), label=label)
    axes.set(xlabel="first principal component", ylabel="second principal component")
    axes.set_title(showing.titled(f"{len(result.names)} clusters of {len(result.labels)} personas", note))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def cluster_table(result: Clustering) -> Table:
    """Clusters, largest first, and the share of noise."""
    noise = int((result.labels == NOISE).sum())
    table = Table(
        title=f"{len(result.names)} clusters, {noise} in none ({100 * result.noise_share:.1f} %)",
        title_justify="left",
    )
    table.add_column("cluster")
    table.add_column("personas", justify="right")
    for name, count in zip(result.names, result.counts, strict=True):
        table.add_row(name, str(count))
    return table


def _lines(found: Sequence[Persona], result: Clustering) -> Iterable[str]:
    for persona, label, point in zip(found, result.labels.tolist(), result.points.tolist(), strict=True):
        record: Mapping[str, Any] = {
            "root": persona.root,
            "speaker": persona.speaker,
            "persona": persona.sentence,
            "cluster": label,
            "point": [round(value, 5) for value in point],
        }
        yield json.dumps(record, ensure_ascii=False) + "\n"
