"""Studies of runs: ``python -m selfemo_jax.study NAME ...``; ``--help`` after a name shows its flags."""

import argparse
import sys
from collections.abc import Sequence

from selfemo_jax.study import (
    arms,
    clusters,
    compare,
    confusions,
    curves,
    entropy,
    judge,
    learning,
    persona_rewards,
    replies,
    seeds,
)

STUDIES = {
    "arms": (arms, "train every config of a folder with several seeds and print their table"),
    "clusters": (clusters, "cluster persona sentences, name the clusters and draw them"),
    "compare": (compare, "scores of runs with intervals, and paired tests between them"),
    "confusions": (confusions, "which labels are taken for each other more often from phase to phase"),
    "curves": (curves, "accuracy and IoU over training: rise, roughness, rank correlation"),
    "entropy": (entropy, "token entropy of the policy over training, and by part of the answer"),
    "judge": (judge, "blind comparison of two policies' replies by judges and people"),
    "learning": (learning, "train with several seeds and controls, and test whether RL raised greedy r1"),
    "personas": (persona_rewards, "mean reward by persona cluster"),
    "replies": (replies, "the same inputs answered by two checkpoints"),
    "seeds": (seeds, "train the same settings with several seeds and aggregate their scores"),
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of every study's flags."""
    parser = argparse.ArgumentParser(prog="selfemo_jax.study", description=__doc__)
    names = parser.add_subparsers(dest="study", required=True, metavar="NAME")
    for name, (module, words) in STUDIES.items():
        module.add_arguments(names.add_parser(name, help=words, description=module.__doc__))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one study; returns the exit status."""
    parser = make_parser()
    args, further = parser.parse_known_args(argv)
    study = STUDIES[args.study][0]
    try:
        if study is seeds:
            return seeds.main(args, further)
        if further:
            parser.error(f"unrecognized arguments: {' '.join(further)}")
        return study.main(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
