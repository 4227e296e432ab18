"""The model card and the data card that lie beside every exported policy: `README.md` and `DATA_CARD.md`.

They say what the weights are, what they were trained on, what they are worth as far as that is known, and
what must not be done with them. All is read from the run that the weights lie in; they hold no line of any
corpus and no path.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from selfemo_jax.appendlog import atomic_write, read_json
from selfemo_jax.data.manifest import SOURCES

MODEL_CARD, DATA_CARD = "README.md", "DATA_CARD.md"
PAPER = "https://arxiv.org/abs/2604.18003"
NOT_PUBLISHED = (
    "**Not to be published by default.** Synthetic dialogues begin with lines of the corpora named here, "
    "whose spoken text is that of television scripts (MELD, EmoryNLP) or of a corpus under a research "
    "licence (IEMOCAP); what the policy wrote onto them derives from that text. Neither these dialogues "
    "nor rollouts of the run are free to be passed on because the weights are. Weights trained on them "
    "may carry passages of them: ask the holders of the rights, or keep them to yourself."
)
LIMITS = (
    "Recognition was learned from scripted English dialogue; labels of real people's feelings it is not made "
    "for. Scores of sets that share scenes with training data are given apart as shared and clean. What the "
    "base policy read before is not known."
)
NO_RUN = "The run that trained these weights is not at hand"
Record = Mapping[str, Any]


def write_cards(folder: Path, run_dir: Path | None, *, library: str = "selfemo_jax") -> None:
    """Write both cards into an exported folder (``certificate.json`` is there); ``run_dir`` is the run that
    trained it, None where there was none. The same files give the same cards."""
    certificate, run = _json(folder / "certificate.json"), _read_run(run_dir) if run_dir else {}
    atomic_write(folder / MODEL_CARD, model_card(certificate, run, library=library))
    atomic_write(folder / DATA_CARD, data_card(run, trained=_trained(certificate)))


def write_cards_of_copy(source: Path, folder: Path, *, library: str) -> None:
    """Both cards beside the converted copy of ``source``: from the run that trained it and that it lies in;
    else those beside ``source``, which are of the same weights; else of weights of others."""
    run = run_above(source) if _trained(_json(folder / "certificate.json")) else None
    if run is None and (source / MODEL_CARD).is_file() and (source / DATA_CARD).is_file():
        card = (source / MODEL_CARD).read_text(encoding="utf-8")
        own = re.sub(r"^library_name: .*$", f"library_name: {library}", card, count=1, flags=re.MULTILINE)
        atomic_write(folder / MODEL_CARD, own)
        atomic_write(folder / DATA_CARD, (source / DATA_CARD).read_text(encoding="utf-8"))
    else:
        write_cards(folder, run, library=library)


def run_above(folder: Path) -> Path | None:
    """The run that a folder of weights lies in; None outside of any."""
    parents = [folder.resolve(), *folder.resolve().parents][:4]
    return next(
        (p for p in parents if (p / "config.yaml").is_file() and (p / "metrics.jsonl").is_file()), None
    )


def model_card(certificate: Record, run: Record, *, library: str) -> str:
    """Text of the model card; ``run`` holds `config`, `env` and `final` as far as they are known."""
    config, note = run.get("config", {}), certificate.get("note") or run.get("config", {}).get("note", "")
    trained, source = _trained(certificate), certificate.get("source", {})
    scores = list(_scores(certificate, run))
    results = [
        EvalResult(
            task_type="text-classification", task_name="emotion recognition in conversation",
            dataset_type=name,
            dataset_name=name, dataset_split=split, metric_type="f1", metric_name="weighted F1 (strict)",
            metric_value=round(100 * scored["weighted_f1"], 2),
        )
        for split, name, scored in scores
        if "parts" in scored
    ]  # fmt: skip
    header = ModelCardData(
        library_name=library, tags=["emotion-recognition-in-conversation", "self-emo"], license="other",
        license_name="see-below", language="en",
        model_name="SELF-EMO policy" if trained else source.get("name", "converted weights"),
        eval_results=results if results and not note else None,
    )  # fmt: skip
    lines = [
        "---",
        header.to_yaml().strip(),
        "---",
        "",
        "# SELF-EMO policy" if trained else "# Converted weights",
        "",
    ]
    if note:
        lines += [f"> **{note}**", ""]
    lines += list(_what(certificate, config, trained))
    lines += ["", "## Scores", "", *_score_table(scores, note)]
    if trained and config:
        lines += ["", "## Training", "", *_training(config, run.get("env", {}))]
    lines += ["", "## Licence", "", *_licence(config, trained)]
    lines += ["", "## Limits", "", LIMITS if trained else "Those of the original weights."]
    return "\n".join(lines) + "\n"


def data_card(run: Record, *, trained: bool) -> str:
    """Text of the data card."""
    config, data = run.get("config", {}), run.get("config", {}).get("data", {})
    if trained and not config:
        return f"# Data\n\n{NO_RUN}, and so neither is what they were trained on.\n\n{NOT_PUBLISHED}\n"
    if not run:
        return "# Data\n\nThese weights were converted; this project trained them on nothing.\n"
    lines = ["# Data", "", "## Corpora", ""]
    for name in data.get("sets", []):
        if name == "sample":
            lines.append("- sample: the invented dialogues that come with selfemo_jax (Apache-2.0)")
        else:
            lines.append(
                f"- {Path(name).name}: {SOURCES.get(name, 'a corpus of the user; ask for its licence')}"
            )
    digest = run.get("env", {}).get("data", {}).get("inputs", "unknown")
    dropped = "left out of training" if data.get("decontaminate") else "left in (the paper's setting)"
    lines += [
        "",
        f"Training dialogues that repeat scenes of an evaluation split: {dropped}. SHA-256 over all inputs: "
        f"`{digest}`.", "", "## Synthetic dialogues", "",
    ]  # fmt: skip
    harvests = run.get("harvests", {})
    for name, harvest in harvests.items():
        lines.append(
            f"- {name}: {harvest['proposed']} proposed, {harvest['accepted']} accepted, "
            f"{harvest['training']} used for "
            "training"
        )
    lines += [] if harvests else ["None so far."]
    biography = config.get("output", {}).get("biography", "none")
    if biography != "none":
        lines += [
            "",
            f"Prompts tell a biography of the speaker, made from the training split alone ({biography}).",
        ]
    if set(data.get("sets", [])) - {"sample"}:
        lines += ["", NOT_PUBLISHED]
    return "\n".join(lines) + "\n"


def _trained(certificate: Record) -> bool:
    return certificate.get("source", {}).get("kind") == "trained"


def _what(certificate: Record, config: Record, trained: bool) -> Iterator[str]:
    if not trained:
        source = certificate.get("source", {})
        what = f"The weights of `{source.get('name', 'another format')}`, converted by selfemo_jax"
        if source.get("kind") == "gguf":
            yield f"{what}: the numbers that the file's blocks stand for (`certificate.json`)."
        else:
            yield f"{what}, every bit equal (`certificate.json`)."
        return
    source = certificate["source"]
    base = config.get("model", {}).get("path")
    begun = f"Begun from `{Path(base).name}`." if base else "Begun from random weights."
    begun = begun if config else f"{NO_RUN}."
    yield (
        f"A policy that names the emotions of the last speaker of a dialogue, its own, and replies "
        f"([SELF-EMO]({PAPER})). "
        f"Trained with selfemo_jax; phase `{source.get('phase', 'unknown')}`, step "
        f"{source.get('global_step', '?')} of "
        f"its run. {begun}"
    )


def _scores(certificate: Record, run: Record) -> Iterator[tuple[str, str, Record]]:
    """(split, set, scores) of these weights, a part as a set of its own; nothing where another policy was
    scored."""
    final = run.get("final", {})
    scored = (final.get("best") or final).get("global_step")
    if scored is None or certificate.get("source", {}).get("global_step") != scored:
        return
    for split, result in final["splits"].items():
        for name, scores in result["sets"].items():
            yield split, name, scores
            parts = scores.get("parts", {})
            for part, of_part in parts.items() if len(parts) > 1 else ():
                yield split, f"{name}, {part}", of_part


def _score_table(scores: list[tuple[str, str, Record]], note: str) -> Iterator[str]:
    if not scores:
        yield "Not known: these weights were not scored on whole splits."
        return
    yield "Strict: an answer outside the grammar is wrong. Percent." + (
        f" {note.capitalize()}." if note else ""
    )
    yield ""
    yield "| split | set | n | accuracy | weighted F1 | invalid | majority w-F1 |"
    yield "|---|---|---|---|---|---|---|"
    for split, name, scored in scores:
        values = (
            scored["accuracy"],
            scored["weighted_f1"],
            scored["invalid_rate"],
            scored["majority"]["weighted_f1"],
        )
        yield f"| {split} | {name} | {scored['num']} | " + " | ".join(f"{100 * v:.2f}" for v in values) + " |"


def _training(config: Record, env: Record) -> Iterator[str]:
    commit = env.get("commit") or "unknown"
    sets = ", ".join(Path(name).name for name in config.get("data", {}).get("sets", []))
    yield f"- data sets: {sets}; see `{DATA_CARD}`"
    yield f"- phases: {config.get('phases', 'all')}; seed {config.get('seed', 'unknown')}"
    changed = " with changes" if env.get("dirty") else ""
    yield f"- commit {commit}{changed}; backend {env.get('backend', 'unknown')}"
    if config.get("cold_start", {}).get("source") in ("expert", "mixed"):
        yield "- cold-start answers by expert models, whose terms of use hold for what was learned from them"


def _licence(config: Record, trained: bool) -> Iterator[str]:
    if not trained:
        yield "That of the original weights."
        return
    if not config:
        yield f"{NO_RUN}. {NOT_PUBLISHED}"
        return
    if config.get("model", {}).get("path"):
        yield "The licence of the base policy holds for these weights too."
    if set(config.get("data", {}).get("sets", [])) - {"sample"}:
        yield f"The corpora have licences of their own (`{DATA_CARD}`). {NOT_PUBLISHED}"
    else:
        yield "Trained on the invented dialogues of selfemo_jax (Apache-2.0)."


def _read_run(run_dir: Path) -> dict[str, Any]:
    config = run_dir / "config.yaml"
    harvests = sorted(run_dir.glob("phases/*/harvest.json"))
    return {
        "config": yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {},
        "env": _json(run_dir / "env.json"),
        "final": _json(run_dir / "eval" / "final.json"),
        "harvests": {path.parent.name.partition("_")[2]: _json(path) for path in harvests},
    }


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
