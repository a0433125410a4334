"""``docs/benchmarks.md`` and its plots, made from the recorded files alone."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fused_resnet.bench.peers import MAX_AUTOTUNE
from fused_resnet.bench.plot import draw, drawable
from fused_resnet.bench.record import Record, read_record
from fused_resnet.bench.rows import FUSED, Row, base_of
from fused_resnet.bench.suites import SUITES
from fused_resnet.system.atomic import replacing

# what `fused-resnet tune` found in the same session stands beside the records
TUNING = "tuning.json"

INTRODUCTION = """\
# Benchmarks

Made by `fused-resnet bench report` from [`benchmarks/results/`](../benchmarks/results), one file for each run, one
folder for each device; do not edit. Peers take turns in one process, with the same inputs, weights and settings; a
result is checked against float64 before it is timed. Times are medians; a ratio is the median of those within the
rounds, in brackets their 20th and 80th percentile. What the figures mean is said in [performance.md](performance.md).
"""


def write_report(results: Path, page: Path) -> list[Path]:
    """Make the page and its plots, in the page's folder, and return what was written.

    Parameters
    ----------
    results : Path
        Holds a folder for each device, each with the records of its runs.
    page : Path
        The Markdown file.

    Raises
    ------
    ValueError
        There is no record, or a file is none.
    """
    paths = [path for path in results.glob("*/*.json") if path.name != TUNING]
    records = [read_record(path) for path in sorted(paths, key=_by_number)]
    if not records:
        raise ValueError(f"--results must hold DEVICE/WHAT.json, got {results}, where there is none")
    written = [page]
    with replacing(page) as file:
        file.write("\n".join(_page(records)).encode())
    for record in records:
        rows = drawable(record.rows)
        if rows:
            path = page.parent / _plot_name(record)
            with replacing(path) as file:
                draw(rows, f"{record.path.parent.name}: {record.path.stem}", file)
            written.append(path)
    return written


def _by_number(path: Path) -> list[str]:
    """Order batch-8 before batch-32."""
    return [part.zfill(9) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


def _page(records: Sequence[Record]) -> Iterator[str]:
    yield INTRODUCTION
    device = None
    for record in records:
        if record.path.parent.name != device:
            device = record.path.parent.name
            yield f"## {device}\n"
        yield from _run(record)


def _run(record: Record) -> Iterator[str]:
    here, settings = record.environment, record.settings
    yield f"### {_link(record)}\n"
    machine = here.get("gpu") or f"{here['cpu']} {here['instruction_set']}, {here['threads']} threads"
    versions = [f"{name} {here[name]}" for name in ("torch", "triton", "cudnn", "driver") if here.get(name)]
    yield f"`{record.command}`  "
    yield f"{machine}; {', '.join(versions)}; commit `{(here['commit'] or 'unknown')[:12]}`; {record.time}  "
    graphed = ", CUDA graphs" if settings.get("cuda_graph") else ""
    mode = settings.get("mode", "train")
    size = settings["image_size"]
    yield f"{settings['batch_size']} images of {size}×{size}, {mode}{graphed}, channels_last\n"
    for suite in dict.fromkeys(row.suite for row in record.rows):
        yield from _table(suite, [row for row in record.rows if row.suite == suite])
    if drawable(record.rows):
        yield f"![ratios to stock]({_plot_name(record)})\n"


def _link(record: Record) -> str:
    folder, name = record.path.parent.name, record.path.name
    return f"[{record.path.stem}](../benchmarks/results/{folder}/{name})"


def _plot_name(record: Record) -> str:
    return f"bench-{record.path.parent.name}-{record.path.stem}.png"


def _table(suite: str, rows: Sequence[Row]) -> Iterator[str]:
    peers = list(dict.fromkeys(peer for row in rows for peer in (*row.values, *row.refused)))
    case = list(rows[0].case)
    engines = len({row.engine for row in rows}) > 1
    head = [*case, *(["engine"] if engines else []), *(f"{_label(peer)}, {rows[0].quantity.symbol}" for peer in peers)]
    if len({row.quantity for row in rows}) > 1:
        head = [*case, *peers]
    base = base_of(peers)
    compared = [peer for peer in peers if peer != base and rows[0].quantity.ratio and base in peers]
    head += [f"{_label(peer)}, {rows[0].quantity.ratio}" for peer in compared]
    title = SUITES[suite].title if suite in SUITES else suite
    engine = f"; engine {rows[0].engine}" if rows[0].engine and not engines else ""
    yield f"**{suite}**: {title}{engine}\n"
    yield _line(head)
    yield _line(["---"] * len(head))
    for row in rows:
        cells = [*row.case.values(), *([row.engine] if engines else [])]
        cells += [_value(row, peer, several=len({r.quantity for r in rows}) > 1) for peer in peers]
        cells += [_ratio(row, peer) for peer in compared]
        yield _line(cells)
    yield ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _label(peer: str) -> str:
    return "max-autotune" if peer == MAX_AUTOTUNE else peer


def _value(row: Row, peer: str, *, several: bool) -> str:
    if peer in row.refused:
        return f"refused: {row.refused[peer]}"
    if peer not in row.values:
        return ""
    scaled = row.spread(peer).median * row.quantity.scale
    text = f"{scaled:.3f}" if scaled < 10 else f"{scaled:.1f}" if scaled < 1000 else f"{scaled:.0f}"
    if several:
        text += f" {row.quantity.symbol}"
    part = row.part_of_limit(peer)
    if part is not None:
        text += f" ({part:.0%} of the limit)"
    elif row.images:
        text += f" ({row.images / row.spread(peer).median:.0f} img/s)"
    return text


def _ratio(row: Row, peer: str) -> str:
    if peer not in row.compared():
        return ""
    ratio = row.ratio(peer)
    spread = f" ({ratio.p20:.2f}–{ratio.p80:.2f})" if len(row.values[peer]) > 1 else ""
    text = f"{ratio.median:.2f}{spread}"
    return f"**{text}**" if peer == FUSED else text
