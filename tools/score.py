#!/usr/bin/env python
"""Scores of evaluations: accuracy with 95 % intervals, calibration, ReaL, mCE, worst classes; or a paired comparison.

    python tools/score.py output/dat_tiny/default/eval/375300-ema             # writes scores.json and scores.md there
    python tools/score.py EVAL_A EVAL_B [EVAL_C …] [--out DIR]                # McNemar, difference, q

An evaluation is the folder that main.py --eval --sets writes. Its images and the model are not needed.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis import scores, tables
from utils.errors import ConfigError, as_exit_code


@as_exit_code
def main(arguments: list[str]) -> None:
    """Print the tables of one evaluation, or of the comparison of several, and write them as Markdown and JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("evaluation", nargs="+", type=Path, metavar="EVAL")
    parser.add_argument("--out", type=Path, help="folder for comparison.json and comparison.md")
    parser.add_argument(
        "--imagenet-x", type=Path, metavar="FILE", help="imagenet_x_val_multi_factor.jsonl"
    )
    args = parser.parse_args(arguments)
    if len(args.evaluation) == 1:
        if args.out is not None:
            raise ConfigError(
                "--out belongs to a comparison; one evaluation's scores are written beside it"
            )
        found = scores.write_scores(args.evaluation[0], args.imagenet_x)
        print(tables.format_scores(found, details=False), end="")
        print(f"\nWorst classes and confusions: {args.evaluation[0] / 'scores.md'}")
        return
    if args.imagenet_x is not None:
        raise ConfigError("--imagenet-x belongs to the scores of one evaluation; name one")
    comparison = scores.compare_evaluations(args.evaluation)
    print(tables.format_comparison(comparison), end="")
    if args.out is not None:
        scores.write_comparison(args.out, comparison)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
