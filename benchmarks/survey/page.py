"""What rows say together: a table, what somebody should look into, and a page of both."""

import datetime
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks.survey.networks import BATCH, PACKAGES
from benchmarks.survey.rows import Row, write_rows
from fused_resnet.system.atomic import replacing

HEADS = "package|networks|with batch norms|batch norms|in chains|share|chains|process ended|raised|changed"
HEADS += "|verified: ok|by noise|failed|skipped|fuse, median|slowest"


def summary(rows: Iterable[Row]) -> str:
    """Return a table of what was found, a line for each package, in Markdown."""
    rows = list(rows)
    groups = {package: [row for row in rows if row.package == package] for package in PACKAGES}
    groups = {package: group for package, group in groups.items() if group}
    heads = HEADS.split("|")
    lines = [f"| {' | '.join(heads)} |", f"|---{'|--:' * (len(heads) - 1)}|"]
    for package, group in {**groups, **({"**all**": rows} if len(groups) > 1 else {})}.items():
        lines.append(f"| {' | '.join([package, *_totals(group)])} |")
    return "\n".join(lines)


def _totals(rows: list[Row]) -> list[str]:
    built = [row for row in rows if not row.not_built]
    norms, inside, chains = (sum(getattr(row, key) or 0 for row in built) for key in ("norms", "in_chains", "chains"))
    verdicts = Counter(row.verify for row in built if row.chains)
    times = [row.first for row in built if row.first is not None and row.norms]
    slowest = max((row for row in built if row.first is not None), key=lambda row: row.first or 0, default=None)
    return [
        str(len(built)),
        str(sum(bool(row.norms) for row in built)),
        str(norms),
        str(inside),
        f"{inside / norms:.0%}" if norms else "",
        str(chains),
        *(str(sum(bool(getattr(row, key)) for row in rows)) for key in ("ended", "raised", "changed")),
        *(str(verdicts[key]) for key in ("ok", "noise", "failed", "skipped")),
        f"{statistics.median(times):.2f} s" if times else "",
        f"{slowest.first:.2f} s ({slowest.name.partition(':')[2]})" if slowest else "",
    ]


# of a reason, and what it says
KINDS = {
    "follows": "alone: no convolution of its own in front, no activation or add behind: nothing to save",
    "cannot be traced": "in a forward of which it is not proved what it does",
    "the last call": "called with what its forward was not traced with",
    "": "another reason",
}


def left_stock(rows: Iterable[Row]) -> str:
    """Return, in Markdown, why batch norms are in no chain, how many, and the networks with the most of them."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for row in rows:
        for text in filter(None, row.left.split("; ")):
            reason, _, count = text.rpartition(" ×")
            counts[next(kind for kind in KINDS if kind in reason)][row.name] += int(count)
    lines = ["| batch norms | why they are stock's | most of them in |", "|--:|---|---|"]
    for kind, networks in counts.items():
        if networks:
            most = ", ".join(f"`{name}` {count}" for name, count in networks.most_common(6))
            lines.append(f"| {networks.total()} | {KINDS[kind]} | {most} |")
    return "\n".join(lines)


def findings(rows: Iterable[Row]) -> str:
    """Return, in Markdown, every network that somebody should look into, and why others were not measured."""
    rows = list(rows)
    lines = [f"- `{row.name}`: {row.remarkable}" for row in rows if row.remarkable]
    not_built = [f"- `{row.name}`: {row.not_built}" for row in rows if row.not_built]
    skipped = [row for row in rows if row.chains and row.verify == "skipped"]
    sections = [
        ("To look into", lines),
        ("Fused and not verified", [f"- `{row.name}`: {row.note}" for row in skipped]),
        ("Not built, and in no count above", not_built),
    ]
    return "\n\n".join(f"## {title}\n\n" + "\n".join(found) for title, found in sections if found)


def write_docs(path: Path, rows: Iterable[Row]) -> None:
    """Write a page, and beside it the rows as CSV, without what is only so on this machine today."""
    rows = list(rows)
    made_with = sorted({part for row in rows for part in row.versions.split(", ") if part})
    table = path.with_suffix(".csv")
    page = f"""# Survey: what `fuse` makes of other people's networks

Made by `python -m benchmarks.survey --write-docs {path.name}` on {datetime.date.today()}, with {", ".join(made_with)};
every network is a line of [{table.name}]({table.name}).

{summary(rows)}

Each network was built with random weights, in a process of its own. Counted are batch norms of every kind (over
sequences and volumes, too), and those of them that ran inside a fused chain in a call in training. *Changed* means
that `fuse`, `explain` or `unfuse` wrote to a parameter, a buffer or a random number generator, or that `unfuse` did
not bring back every module's class, mode and attributes. *Verified* is what `fused_resnet.verify` says of a training
step in float32, on {BATCH} images of the smallest size that the stock network takes, of the networks in which
something is fused; of torchvision's detectors, the backbone and the heads on fixed boxes. *By noise* is right within
what the network itself makes of one rounding of its input, or with two other inputs where it was not with the first:
in so small a step, one ReLU that goes the other way decides. Times of `fuse` are seconds on one core, of networks
with batch norms.

## Left stock

{left_stock(rows)}

{findings(rows)}
"""
    with replacing(path) as file:
        file.write((page.rstrip() + "\n").encode())
    write_rows(table, rows)
