"""The ratios of a run as a picture."""

from collections.abc import Sequence
from typing import BinaryIO

from fused_resnet.bench.peers import COMPILED, LEAN, LEAN_STAGE, MAX_AUTOTUNE, STAGE, TIMM
from fused_resnet.bench.rows import FUSED, STOCK, Row

COLORS = {
    FUSED: "#1f5fbf",
    STAGE: "#6a9ae0",
    LEAN: "#2a9d8f",
    LEAN_STAGE: "#7cc7bd",
    COMPILED: "#8a8f98",
    MAX_AUTOTUNE: "#5c6066",
    TIMM: "#c9a227",
}

DRAWN = ("op", "block", "model", "memory")


def drawable(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that compare a peer with stock."""
    return [row for row in rows if row.suite in DRAWN and row.compared()]


def draw(rows: Sequence[Row], title: str, file: BinaryIO) -> None:
    """Draw a bar for every row and peer, from its 20th to its 80th percentile; a panel for every suite; stock is 1.

    Parameters
    ----------
    rows : sequence of Row
        One row that `drawable` returns, or more.
    title : str
        The figure's heading.
    file : binary file
        Where the PNG is written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    suites = {row.suite: [r for r in rows if r.suite == row.suite] for row in rows}
    heights = [sum(len(row.compared()) for row in of_suite) + 2.5 for of_suite in suites.values()]
    # a figure of its own, not pyplot's: no global state, no display
    figure = Figure(figsize=(8, 0.9 + 0.24 * sum(heights)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    panels = figure.subplots(len(suites), squeeze=False, height_ratios=heights)[:, 0]

    for axes, of_suite in zip(panels, suites.values(), strict=True):
        bars = [(row, peer) for row in of_suite for peer in row.compared()]
        several = len({(peer, row.engine if peer == FUSED else "") for row, peer in bars}) > 1
        labels = [" ".join([*row.case.values(), *(_who(row, peer) if several else [])]) for row, peer in bars]
        ratios = [row.ratio(peer) for row, peer in bars]
        medians = [ratio.median for ratio in ratios]
        whiskers = [[r.median - r.p20 for r in ratios], [r.p80 - r.median for r in ratios]]
        colors = [COLORS[peer] for _, peer in bars]
        positions = range(len(bars))
        axes.barh(positions, medians, xerr=whiskers, color=colors, height=0.7, error_kw={"linewidth": 0.8})
        for position, ratio in zip(positions, ratios, strict=True):
            axes.annotate(
                f"{ratio.median:.2f}",
                (ratio.p80, position),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
        axes.set_yticks(positions, labels, fontsize=7, family="monospace")
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlim(0, 1.12 * max(1.0, *(ratio.p80 for ratio in ratios)))
        row = of_suite[0]
        axes.set_xlabel(f"{row.suite}: {row.quantity.ratio} ({STOCK} is 1)", fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    # without matplotlib's version in the file: the same rows give the same bytes
    figure.savefig(file, format="png", metadata={"Software": None})


def _who(row: Row, peer: str) -> list[str]:
    return [peer, row.engine] if peer == FUSED else [peer]
