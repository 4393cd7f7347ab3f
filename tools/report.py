#!/usr/bin/env python
"""Report: one HTML file that says how a run went, or compares several; no server, no network, readable without scripts.

Verdict, curves, speed and what bounds it, settings and where they come from, data, faults, evaluations with their
diagrams and mistakes, environment, checkpoints. Several runs are grouped by settings: seeds have mean and interval.
Everything comes from the runs' files; TRAIN.REPORT True writes <run>/report.html whenever a run ends.

examples:
  python tools/report.py output/dat_tiny/default
  python tools/report.py output/dat_tiny/default --data-path /imagenet --pictures cat.jpg dog.jpg
  python tools/report.py output/seed0/dat_micro/digits output/seed1/dat_micro/digits --out seeds.html
"""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import config
from analysis.pages import picture
from analysis.predictions import escape_returns
from analysis.report import Recipes, Thumbnails, make_report
from analysis.runs import flatten, read_run
from data.decode import UNREADABLE, decode
from data.readers import Reader, open_split
from utils.errors import ConfigError, DataError, as_exit_code
from utils.files import require_folder_of, write_atomically
from utils.logging import logger
from utils.yaml_nodes import to_dict

SIDE = 144  # pixels of a misclassified picture


def load_recipe(file: str) -> tuple[dict, str] | None:
    """The settings and the text of a configuration file; None if it is gone or no longer valid."""
    path = Path(file)
    try:
        return flatten(to_dict(config.load(file))), path.read_text(encoding="utf-8")
    except (ConfigError, OSError, UnicodeDecodeError):
        return None


def recipes(*, several: bool) -> Recipes:
    """What the settings of a run, or of `several`, are compared with."""
    ignored = frozenset()
    if several:
        # It imports torch, for which a single run need not wait.
        from engine.compat import IGNORED

        ignored = frozenset(IGNORED)
    defaults = {key.name: key.default for key in config.SCHEMA}
    return Recipes(defaults, load_recipe, ignored)


class Mistakes:
    """Thumbnails of images of the data set at `root`; DataError where there is no such folder.

    A split that is not there is a warning, and its images have none.
    """

    def __init__(self, root: Path):
        if not root.is_dir():
            raise DataError(f"--data-path {root}: no such folder")
        self.root = root

    def __call__(self, source: str, file: str) -> str | None:
        """The image as a data URI, None where it cannot be read; `source` is the path that the evaluation read."""
        split = "train" if Path(source).name.partition(".")[0] == "train" else "val"
        reader, index = self._open(split)
        if file not in index:
            return None
        try:
            image = decode(reader.read(index[file]))
        except UNREADABLE:
            return None
        image.thumbnail((SIDE, SIDE))
        return picture(np.asarray(image), quality=80)

    @functools.cache  # noqa: B019, there is one for the page
    def _open(self, split: str) -> tuple[Reader | None, dict[str, int]]:
        try:
            reader = open_split(self.root, split)
        except DataError as error:
            logger.warning(f"{error}; the pictures of mistakes are left out")
            return None, {}
        names = [name.decode(errors="backslashreplace") for name in reader.names.tolist()]
        return reader, {escape_returns(name): i for i, name in enumerate(names)}


def explore_pictures(run: Path, pictures: list[Path]) -> list[tuple[str, str]]:
    """What the run's best weights attend to, one still picture per image and stage with deformable attention."""
    # Without pictures a report needs no model.
    from analysis.explorer import draw_overall
    from tools import explore

    words = [*map(str, pictures), "--resume", str(run), "--blocks", "last"]
    (classifier,) = explore.load_models(explore.parse(words))
    drawn = [
        still
        for path in pictures
        for still in draw_overall(explore.explore(classifier, path, heads=False, last=True))
    ]
    if not drawn:
        raise ConfigError(
            f"--pictures: {classifier.title} has no deformable attention to show; leave it out"
        )
    return drawn


@as_exit_code
def main(arguments: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    parser.add_argument(
        "--out",
        type=Path,
        help="file to write; default: report.html in the run, or here for several",
    )
    parser.add_argument(
        "--eval", nargs="*", type=Path, default=[], help="folders of further evaluations"
    )
    parser.add_argument(
        "--data-path", type=Path, help="data set, for pictures of the most confident mistakes"
    )
    parser.add_argument(
        "--pictures", nargs="*", type=Path, default=[], help="images on which to show the attention"
    )
    args = parser.parse_args(arguments)
    if args.pictures and len(args.runs) > 1:
        raise ConfigError("--pictures needs one run; leave it out to compare several")
    if len({run.resolve() for run in args.runs}) < len(args.runs):
        raise ConfigError("a run is named twice")
    runs = [read_run(run) for run in args.runs]
    out = args.out or (args.runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    require_folder_of(out)
    thumbnails = Thumbnails(
        **({"picture": Mistakes(args.data_path)} if args.data_path else {}),
        explored=explore_pictures(args.runs[0], args.pictures) if args.pictures else [],
    )
    page = make_report(
        runs, recipes(several=len(runs) > 1), evaluations=args.eval, thumbnails=thumbnails
    )
    write_atomically(out, page)
    print(f"{out}: {len(page.encode()) / 1e3:.0f} kB")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
