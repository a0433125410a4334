"""What fuse makes of every network that can be built here: what it finds, how long it takes, and whether it is right.

    python -m benchmarks.survey                             torchvision, timm (a few of every family), transformers
    python -m benchmarks.survey --package timm --all        everything that timm has
    python -m benchmarks.survey --only 'resnet|regnet'      those whose name matches; --list only says which
    python -m benchmarks.survey --write-docs docs/survey.md and a page of what was found, beside it a table as CSV

That is for the root of the repository; from elsewhere it is run by its path: python PATH/benchmarks/survey

Networks have random weights; nothing is fetched. Each is measured in a process of its own, so that one which ends a
process is a row like any other:

  norms        batch norms of any kind, those over images, and those that run inside fused chains
  first, again seconds of fuse, and of unfuse and then fuse again; the package is warm, other networks' plans are not
  changed      what fuse, explain or unfuse wrote to: bytes and versions of parameters and buffers, the generators of
               Python, NumPy and torch, and after unfuse the modules' classes, modes and attributes
  raised       what fuse, explain or unfuse raised
  ended        how a process ended that did not come to its end, and where it was then
  verify       fused_resnet.verify in training mode, on 4 images of the smallest size that the stock network takes: ok;
               noise (right within what the network makes of one rounding of its input, or with two other inputs: a
               ReLU beside 0 may go the other way); failed; or skipped, and why

Rows are kept as they come. Interrupt it and start it again: what is there is not measured again, without --again.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
if not __package__:  # run by its path: the folder stands where the root should be
    sys.path[0] = str(ROOT)

from benchmarks.survey.measure import versions  # noqa: E402
from benchmarks.survey.networks import PACKAGES, networks  # noqa: E402
from benchmarks.survey.page import findings, summary, write_docs  # noqa: E402
from benchmarks.survey.processes import survey  # noqa: E402
from benchmarks.survey.rows import Limits, Row, read_rows, write_rows  # noqa: E402

RESULTS = ROOT / "build" / "survey.csv"


def bar(total: int) -> Any:
    """Return a progress bar, or None where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, unit="network", smoothing=0.05, dynamic_ncols=True)


def run(names: list[str], kept: dict[str, Row], limits: Limits, jobs: int, results: Path) -> None:
    """Measure networks and keep every row as it comes."""
    progress = bar(len(names))
    done = 0

    def keep(row: Row) -> None:
        nonlocal done
        kept[row.name] = row
        write_rows(results, kept.values())
        done += 1
        say = print if progress is None else progress.write
        if row.remarkable or progress is None:
            say(f"[{done}/{len(names)}] {row.name}  {row.remarkable or row.not_built or row.verify}")
        if progress is not None:
            progress.set_postfix_str(row.name.partition(":")[2][:24], refresh=False)
            progress.update()

    try:
        survey(names, limits, jobs=jobs, on_row=keep)
    finally:
        if progress is not None:
            progress.close()


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.survey",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_argument_group("which networks")
    which.add_argument("--package", nargs="+", choices=PACKAGES, default=PACKAGES, help="default: all three")
    which.add_argument("--only", metavar="PATTERN", help="a regular expression found in PACKAGE:NETWORK")
    which.add_argument("--all", action="store_true", help="all of timm, and transformers' networks without heads, too")
    which.add_argument("--list", action="store_true", help="print the names, and end")
    limits = parser.add_argument_group("limits of one network")
    limits.add_argument("--seconds", type=float, default=Limits.seconds, help="(default: %(default)s)")
    limits.add_argument("--verify-seconds", type=float, default=Limits.verify_seconds, help="(default: %(default)s)")
    limits.add_argument(
        "--parameters", type=float, default=Limits.parameters, help="that it is built with (default: %(default)g)"
    )
    limits.add_argument(
        "--verify-parameters",
        type=float,
        default=Limits.verify_parameters,
        help="that it is verified with (default: %(default)g)",
    )
    parser.add_argument("--jobs", type=int, default=2, help="at once, of one thread each (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="CSV", help="rows (default: build/survey.csv)")
    parser.add_argument("--again", action="store_true", help="measure again what has a row")
    parser.add_argument("--write-docs", type=Path, metavar="PAGE", help="a page of all rows, and PAGE's name with .csv")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Measure what is asked for; return 1 where there is something to look into, 2 for bad input, 130 after Ctrl-C."""
    options = build_parser().parse_args(arguments)
    try:
        names = networks(options.package, everything=options.all)
        names = [name for name in names if options.only is None or re.search(options.only, name)]
        if options.jobs < 1:
            raise ValueError(f"--jobs must be 1 or more, got {options.jobs}")
        if not names:
            raise ValueError(f"no network of {', '.join(options.package)} matches {options.only!r}; try --list, --all")
        kept = {} if options.list else read_rows(options.results)
    except (ValueError, re.error) as error:
        print(f"survey: error: {error}", file=sys.stderr)
        return 2
    if options.list:
        print(*names, sep="\n")
        return 0
    left = [name for name in names if options.again or name not in kept]
    old = [name for name in names if name not in left and kept[name].versions != versions(name)]
    if old:
        print(f"{len(old)} rows in {options.results} are of other versions; --again measures them again")
    limits = Limits(options.seconds, options.verify_seconds, options.parameters, options.verify_parameters)
    try:
        run(left, kept, limits, options.jobs, options.results)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {len(kept)} rows are in {options.results}, the next run goes on", file=sys.stderr)
        return 130
    rows = [kept[name] for name in names]
    print(f"\n{summary(rows)}\n\n{findings(rows)}")
    if options.write_docs is not None:
        write_docs(options.write_docs, rows)
    return int(any(row.remarkable for row in rows))


if __name__ == "__main__":
    sys.exit(main())
