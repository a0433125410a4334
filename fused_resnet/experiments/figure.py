"""The figure of an experiment, as the paper draws it: error against iterations."""

from collections.abc import Sequence
from typing import Any, BinaryIO

from fused_resnet.experiments.experiment import Panel, Result

COLORS = ("#c9a227", "#c0392b", "#1f5fbf", "#2a9d8f", "#8a8f98")


def draw(panels: Sequence[Panel], results: Sequence[Result], title: str, file: BinaryIO) -> None:
    """Draw the errors of every panel's networks side by side on the same axes: training dashed, test bold.

    A line is the mean over a network's runs, a band goes from the lowest to the highest.

    Parameters
    ----------
    panels : sequence of Panel
        Left to right; networks at the same place in their panels have the same color.
    results : sequence of Result
        At least one of every network.
    title : str
        The figure's heading.
    file : binary file
        Where the PNG is written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter

    # a figure of its own, not pyplot's: no global state, no display
    figure = Figure(figsize=(4.4 * max(2, len(panels)), 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    row = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    styles: dict[str, dict[str, Any]] = {
        "train_error": {"linewidth": 1.2, "linestyle": (0, (4, 2))},
        "test_error": {"linewidth": 2.4},
    }

    for axes, panel in zip(row, panels, strict=True):
        for network, color in zip(panel.networks, COLORS, strict=False):
            runs = [result.history for result in results if result.network == network]
            iterations = [metrics.iteration for metrics in runs[0]]
            for error, style in styles.items():
                # [epochs][runs]
                values = [[100 * getattr(metrics, error) for metrics in epoch] for epoch in zip(*runs, strict=True)]
                mean = [sum(epoch) / len(epoch) for epoch in values]
                label = network.label if error == "test_error" else None
                axes.plot(iterations, mean, color=color, label=label, **style)
                low, high = [min(epoch) for epoch in values], [max(epoch) for epoch in values]
                axes.fill_between(iterations, low, high, color=color, alpha=0.12, linewidth=0)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel("iterations")
        axes.set_ylim(-1, 100)  # a line at zero is not the axis
        axes.set_xlim(0)
        axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
        axes.grid(axis="y", color="#e4e6ea")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper right")
    row[0].set_ylabel("error")
    key = [Line2D([], [], color="black", **style) for style in styles.values()]
    figure.legend(key, ["training", "test"], frameon=False, loc="outside lower center", ncols=2)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    # without matplotlib's version in the file: the same results give the same bytes
    figure.savefig(file, format="png", metadata={"Software": None})
