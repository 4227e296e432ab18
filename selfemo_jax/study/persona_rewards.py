"""Mean reward by persona cluster (Table 3), with intervals over dialogues and numbers.

    python -m selfemo_jax.study personas RUN [RUN ...] [--clusters DIR] [--last 20] [--out DIR]

Each recorded rollout of a run's RL steps belongs to the persona of its responder; `study clusters` says which
cluster that persona is in (``persona_clusters.jsonl``, of the first run unless ``--clusters`` names a
folder). r1 and accuracy are averaged over the rollouts of each cluster, the most frequent clusters first.
Rollouts of a dialogue are not independent: the intervals draw dialogues. Rollouts whose responder has no
persona, or one of no cluster, are counted apart.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfemo_jax.study import showing
from selfemo_jax.study.compare import percent
from selfemo_jax.study.reading import joined_notes, read_jsonl, run_note, short_names
from selfemo_jax.study.significance import NUM_SAMPLES, estimate, mean_of_sums, sums_by_dialogue

NOISE, UNKNOWN = -1, -2
OTHER = {NOISE: "in no cluster", UNKNOWN: "responder without a clustered persona"}
Key = tuple[str, str]
"""Root dialogue and speaker."""


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """What `study clusters` wrote."""

    of_persona: Mapping[Key, int]
    names: Mapping[int, str]


@dataclass(frozen=True, kw_only=True)
class Earned:
    """What one rollout earned."""

    root: str
    cluster: int
    r1: float
    right: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``study personas``."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run with its rollouts")
    words = "folder of `study clusters`; default: study/ in the first run"
    parser.add_argument("--clusters", type=Path, help=words)
    parser.add_argument("--last", type=int, default=20, help="RL steps at the end of the run that count")
    parser.add_argument("--most", type=int, default=5, help="clusters of the table, the most frequent first")
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES, help="bootstrap samples")
    parser.add_argument("--out", type=Path, help="folder; default: study/ in the first run")


def main(args: argparse.Namespace) -> int:
    """Print the table, write ``persona_rewards.json``, ``.md`` and ``.png``."""
    if args.last < 1 or args.most < 1:
        raise ValueError(f"--last {args.last} and --most {args.most}: expected 1 or more")
    clusters = read_clusters(args.clusters or args.runs[0] / "study")
    rows, told = [], []
    for run_dir, name in zip(args.runs, short_names(args.runs), strict=True):
        earned = rewards_of(run_dir, clusters, last=args.last)
        found = cluster_rows(earned, clusters, most=args.most, num=args.samples)
        rows += [{"run": name} | row for row in found]
        if not persona_told(run_dir):
            told.append(f"{name}: its policy was not told the personas (data.persona is false)")
    note = joined_notes([run_note(run_dir) for run_dir in args.runs])
    title = showing.titled(
        f"mean r1 and accuracy in percent by the responder's persona cluster, last {args.last} RL steps", note
    )
    showing.print_table(title, rows)
    for line in told:
        print(line)
    out = args.out or args.runs[0] / "study"
    content = {"note": note, "last_steps": args.last, "remarks": "; ".join(told), "clusters": rows}
    showing.write_json(out / "persona_rewards.json", content)
    showing.atomic_write(out / "persona_rewards.md", showing.markdown(title, rows))
    draw(out / "persona_rewards.png", rows, title=title)
    print(f"written: {out}/persona_rewards.json, .md, .png")
    return 0


def read_clusters(folder: Path) -> Clusters:
    """Clusters of a study's folder; ValueError says how to make them."""
    hint = "`python -m selfemo_jax.study clusters --run RUN` writes it"
    lines = read_jsonl(folder / "persona_clusters.jsonl", hint=hint)
    path = folder / "clusters.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {hint}")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return Clusters(
            of_persona={(line["root"], line["speaker"]): int(line["cluster"]) for line in lines},
            names={int(row["cluster"]): str(row["name"]) for row in summary["clusters"]},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: not what `study clusters` writes ({error!r}); run it anew") from None


def rewards_of(run_dir: Path, clusters: Clusters, *, last: int) -> list[Earned]:
    """r1 and accuracy of the rollouts of a run's last RL steps, each with the cluster of its responder."""
    responders = responders_of(run_dir)
    rl = {
        line["step"]
        for line in read_jsonl(run_dir / "metrics.jsonl", hint="expected a run")
        if "loss" in line
    }
    files = {
        int(path.stem.removeprefix("step_")): path for path in (run_dir / "rollouts").glob("step_*.jsonl")
    }
    steps = sorted(rl & files.keys())[-last:]
    if not steps:
        raise ValueError(
            f"{run_dir}: no recorded rollouts of an RL step in rollouts/; rollout.keep decides how many stay"
        )
    earned = []
    for step in steps:
        for line in read_jsonl(files[step], hint="the run wrote it; it is damaged"):
            name = line["sample_id"]
            root = name.rsplit("/", 1)[0]
            place = clusters.of_persona.get((root, responders.get(name, "")), UNKNOWN)
            emotion = line["parse"]["emotion"] if line["parse"]["valid"] else {}
            said = max(emotion, key=lambda label: emotion[label]) if emotion else None
            gold = max(line["gold"], key=lambda label: line["gold"][label])
            earned.append(Earned(root=root, cluster=place, r1=float(line["r1"]), right=said == gold))
    return earned


def responders_of(run_dir: Path) -> dict[str, str]:
    """Input's id -> who answers it: original inputs from the run's data, synthetic ones from its
    flywheel."""
    from selfemo_jax.config_io import read_config
    from selfemo_jax.run_data import load_data

    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir}: no config.yaml; expected the folder of a run")
    data = load_data(read_config(run_dir / "config.yaml"))
    found = {sample.id: sample.responder for sample in data.all_train()}
    flywheel = run_dir / "flywheel.jsonl"
    if flywheel.is_file():
        for line in read_jsonl(flywheel, hint="the run wrote it; it is damaged"):
            if line.get("sample"):
                found[line["sample"]["id"]] = line["sample"]["responder"]
    return found


def persona_told(run_dir: Path) -> bool:
    """Whether the policy's training prompts held personas."""
    from selfemo_jax.config_io import read_config

    return read_config(run_dir / "config.yaml").data.persona


def cluster_rows(
    earned: Sequence[Earned], clusters: Clusters, *, most: int, num: int
) -> list[dict[str, Any]]:
    """One row for each of the most frequent clusters, for the rest, for noise, and for all clusters
    together (each counting once, as the paper's average, and by rollouts)."""
    by_cluster: dict[int, list[Earned]] = {}
    for one in earned:
        by_cluster.setdefault(one.cluster, []).append(one)
    real = sorted((c for c in by_cluster if c >= 0), key=lambda c: (-len(by_cluster[c]), c))
    rows = [_row(clusters.names.get(c, str(c)), by_cluster[c], num=num) for c in real[:most]]
    if rows:
        shown = {"cluster": f"mean of these {len(rows)}", "rollouts": sum(row["rollouts"] for row in rows)}
        rows.append(shown | {key: sum(row[key] for row in rows) / len(rows) for key in ("r1", "accuracy")})
    if rest := [one for c in real[most:] for one in by_cluster[c]]:
        rows.append(_row(f"{len(real) - most} smaller clusters", rest, num=num))
    rows += [_row(OTHER[c], by_cluster[c], num=num) for c in (NOISE, UNKNOWN) if c in by_cluster]
    return [*rows, _row("all rollouts", earned, num=num)]


def _row(name: str, earned: Sequence[Earned], *, num: int) -> dict[str, Any]:
    ids = [f"{one.root}/0" for one in earned]
    row: dict[str, Any] = {"cluster": name, "rollouts": len(earned), "dialogues": len(set(ids))}
    for key, values in (("r1", [one.r1 for one in earned]), ("accuracy", [one.right for one in earned])):
        found = estimate([[sums_by_dialogue(values, ids)]], mean_of_sums, num=num)
        row[key] = percent(found.value)
        # One dialogue says nothing about others.
        row[f"{key} ci"] = [percent(found.low), percent(found.high)] if row["dialogues"] > 1 else None
    return row


def draw(path: Path, rows: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """r1 of each row with its interval, one colour a run."""
    figure = showing.new_figure(9, 1 + 0.35 * len(rows))
    axes = figure.add_subplot()
    axes.set_title(title, fontsize="small", loc="left")
    runs = list(dict.fromkeys(row["run"] for row in rows))
    for place, row in enumerate(rows):
        low, high = row.get("r1 ci") or (row["r1"], row["r1"])
        error = [[max(0.0, row["r1"] - low)], [max(0.0, high - row["r1"])]]
        axes.errorbar(row["r1"], place, xerr=error, fmt="o", capsize=3, color=f"C{runs.index(row['run'])}")
    axes.set_yticks(range(len(rows)), [_short(row, runs) for row in rows], fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel="mean r1, percent")
    axes.grid(axis="x", alpha=0.3)
    showing.save_figure(figure, path)


def _short(row: Mapping[str, Any], runs: Sequence[str]) -> str:
    name = row["cluster"] if len(row["cluster"]) < 48 else row["cluster"][:45] + "..."
    return f"{name} ({row['rollouts']})" if len(runs) == 1 else f"{row['run']}: {name} ({row['rollouts']})"
