"""Look at the corpora before training on them.

    python tools/data.py stats meld emorynlp --root DIR      counts, repairs and warnings of the readers
    python tools/data.py fetch [meld emorynlp] --root DIR    get the public files, each checked by its SHA-256
    python tools/data.py fetch --list --root DIR             which files are there, where the others come from
    python tools/data.py audit meld emorynlp --root DIR      what training and evaluation share

Without names: every data set found under the root; without a root the bundled corpora. The root is
SELFEMO_DATA if not given.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from selfemo_jax.data.audit import PARTS, decontaminate, leakage_warnings, root_id, scored_parts, title
from selfemo_jax.data.dialogues import SPLITS, Corpus, load_corpora
from selfemo_jax.data.fetch import fetch_files, files_of, state_of
from selfemo_jax.data.leakage import cross_tables, tables
from selfemo_jax.data.manifest import SHA256, SOURCES, URLS
from selfemo_jax.run_data import same_source


def main(argv: Sequence[str] | None = None) -> None:
    """Run one subcommand."""
    parser = argparse.ArgumentParser(prog="tools/data.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add_stats(commands)
    add_audit(commands)
    add_fetch(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


def add_stats(commands: argparse._SubParsersAction) -> None:
    """The subcommand `stats`."""
    parser = commands.add_parser("stats", help="counts by split and label, repairs, warnings")
    _add_corpora(parser)
    parser.set_defaults(run=stats)


def add_audit(commands: argparse._SubParsersAction) -> None:
    """The subcommand `audit`."""
    parser = commands.add_parser("audit", help="dialogues in both training and evaluation splits")
    _add_corpora(parser)
    parser.add_argument(
        "--policy", choices=("official", "strict"), default="official", help="strict: overlap fails"
    )
    parser.add_argument(
        "--rule", choices=("wide", "strict"), default="wide", help="rule that drops training dialogues"
    )
    parser.set_defaults(run=audit)


def add_fetch(commands: argparse._SubParsersAction) -> None:
    """The subcommand `fetch`."""
    parser = commands.add_parser("fetch", help="get MELD and EmoryNLP from their public homes")
    parser.add_argument("names", nargs="*", help="meld, emorynlp; default: both")
    parser.add_argument("--root", default=os.environ.get("SELFEMO_DATA"), help="folder above meld/, ...")
    parser.add_argument("--list", action="store_true", help="only say which files are there; no network")
    parser.add_argument("--mirror", help="base URL of a copy laid out as below the root; same checksums")
    parser.add_argument("--force", action="store_true", help="replace files of other bytes")
    parser.set_defaults(run=fetch)


def stats(args: argparse.Namespace) -> None:
    """Print, and save if asked, the report of each reader."""
    corpora = load_corpora(*_named(args))
    for corpus in corpora:
        report = corpus.report
        print(
            f"{title(corpus.name)}: "
            + " ".join(f"{label:>10}" for label in ("rows", *corpus.label_set.display))
        )
        for split in SPLITS:
            counts = (report.rows[split], *report.labels[split].values())
            print(
                f"  {split:<6}{report.dialogues[split]:>6,} dialogues "
                + " ".join(f"{n:>10,}" for n in counts)
            )
        for kind in ("repairs", "warnings", "infos"):
            for line in getattr(report, kind):
                print(f"  {kind.removesuffix('s')}: {line}")
        for what, count in report.skipped.items():
            print(f"  skipped: {count:,} {what}")
    _save({corpus.name: corpus.report.to_json() for corpus in corpora}, args.json)


def audit(args: argparse.Namespace) -> None:
    """Print, and save if asked, what training and evaluation share."""
    names, root = _named(args)
    corpora = load_corpora(names, root)
    by_name = {corpus.name: corpus for corpus in corpora}
    for corpus in corpora:
        for line in leakage_warnings(corpus, policy=args.policy):
            print(f"{title(corpus.name)}: {line}")
    beside, unread = same_source(names, root)
    for corpus in beside:
        print(f"{title(corpus.name)}: not named, but its training decides shared and clean too, as in scores")
    for name, reason in unread.items():
        print(
            f"{title(name)} cannot be read: shared and clean are not those of scores that have it ({reason})"
        )
    parts = scored_parts(by_name, beside=beside)
    print_parts(corpora, parts)
    counted = tables(by_name)
    print_overlap(counted)
    cleaned, report = decontaminate(by_name, rule=args.rule)
    for line in report["messages"]:
        print(line)
    print(f"decontaminate=True drops {len(report['dropped'])} training dialogues ({report['rows']:,} rows)")
    residual = cross_tables(cleaned)
    print_residual(counted["cross"], residual)
    parts_from = sorted([*by_name, *(corpus.name for corpus in beside)])
    _save(
        {
            **report,
            "parts": parts,
            "parts_from": parts_from,
            "unread": unread,
            "overlap": counted,
            "residual": residual,
        },
        args.json,
    )


def print_parts(corpora: Sequence[Corpus], parts: Mapping[str, str]) -> None:
    """How many dialogues of each evaluation split are scored in which part."""
    for corpus in corpora:
        for split in ("dev", "test"):
            found = [parts[root_id(dialogue)] for dialogue in corpus.splits[split]]
            told = ", ".join(f"{found.count(part)} {part}" for part in PARTS if part in found)
            print(f"{title(corpus.name)} {split}, dialogues by the part they are scored in: {told or 'none'}")


def print_overlap(counted: Mapping[str, Mapping[str, Mapping[str, int]]]) -> None:
    """Line by line: what of each split is in its own training data, and in that of other sets."""
    for where, own in counted["own"].items():
        share = 100 * own["exact"] / max(1, own["rows"])
        print(
            f"{where}: {share:.1f} % of rows are training rows word for word (of {own['long']:,} "
            f"rows with six words or more: {own['long_exact']}); of {own['informative']:,} rows with five "
            f"words or more {own['verbatim']} word for word, {own['near']} nearly; {own['identical']} "
            f"dialogues identical, {own['shared']} share a scene"
        )
    for where, cross in counted["cross"].items():
        aligned = 100 * cross["rows_aligned"] / max(1, cross["rows"])
        print(
            f"{where}: {cross['shared']} of {cross['dialogues']} dialogues share a scene "
            f"({cross['rows_in_shared']:,} of "
            f"{cross['rows']:,} rows; {cross['rows_aligned']} aligned, {aligned:.1f} %); of "
            f"{cross['informative']:,} rows "
            f"with five words or more the same speaker says {cross['verbatim']} word for word, "
            f"{cross['near']} nearly"
        )


def print_residual(before: Mapping[str, Mapping[str, int]], after: Mapping[str, Mapping[str, int]]) -> None:
    """Line by line: what decontamination leaves of the overlap between sets."""
    for where, left in after.items():
        shares = [100 * counts["near"] / max(1, counts["informative"]) for counts in (before[where], left)]
        print(
            f"left after that, {where}: of {left['informative']:,} rows with five words or more the same "
            f"speaker says {left['verbatim']} word for word, {left['near']} nearly ({shares[1]:.1f} %, was "
            f"{shares[0]:.1f} %)"
        )


def fetch(args: argparse.Namespace) -> None:
    """Download what is missing; with --list print each corpus' source and the state of its files."""
    if args.list:
        list_files(Path(args.root) if args.root else Path("DIR"))
        return
    if not args.root:
        raise ValueError("fetch: no folder to put the files into; give --root DIR or set SELFEMO_DATA")
    files, urls = files_of(args.names or ["meld", "emorynlp"]), dict(URLS)
    if args.mirror:
        urls = {file: f"{args.mirror.rstrip('/')}/{file}" for file in files}
    done = fetch_files(files, Path(args.root), urls=urls, force=args.force)
    print(", ".join(f"{list(done.values()).count(word)} {word}" for word in ("fetched", "kept", "left")))
    for name in dict.fromkeys(file.split("/")[0] for file in files):
        print(f"{title(name)}: {SOURCES[name]}")
    print(f"IEMOCAP: {SOURCES['iemocap']}")


def list_files(root: Path) -> None:
    """Print each corpus' source and the state of its files under the root."""
    for name, source in SOURCES.items():
        print(f"{title(name)}: {source}\n  into {root / name}")
        for file in (file for file in SHA256 if file.startswith(f"{name}/")):
            print(f"    {(root / file).name:<28}{state_of(root / file, SHA256[file])}")


def _add_corpora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", help="meld, emorynlp, iemocap, sample or a folder of your own")
    parser.add_argument(
        "--root", default=os.environ.get("SELFEMO_DATA"), help="folder above meld/, emorynlp/, ..."
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")


def _named(args: argparse.Namespace) -> tuple[list[str], Path | None]:
    root = Path(args.root) if args.root else None
    found = [name for name in ("meld", "emorynlp", "iemocap") if root and (root / name).is_dir()]
    if root and not args.names and not found:
        raise ValueError(
            f"{root}: no folder meld, emorynlp or iemocap in it; get the files by `python tools/data.py "
            f"fetch --root {root}`, or name what to read, such as sample"
        )
    return args.names or found or ["sample"], root


def _save(content: object, path: Path | None) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
