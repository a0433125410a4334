"""The learning curves of a run as a picture."""

from collections.abc import Sequence
from typing import BinaryIO

from fused_resnet.training.files import EpochMetrics


def draw_curves(history: Sequence[EpochMetrics], title: str, file: BinaryIO) -> None:
    """Draw training and test error over the epochs, as in the paper's figures: training thin, test bold.

    Parameters
    ----------
    history : sequence of EpochMetrics
        At least one epoch.
    title : str
        The figure's heading.
    file : binary file
        Where the PNG is written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    # a figure of its own, not pyplot's: no global state, no display
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()

    epochs = [row.epoch for row in history]
    train = [100 * row.train_error for row in history]
    test = [100 * row.test_error for row in history]
    axes.plot(epochs, train, color="#8a8f98", linewidth=1.4, marker="o", markersize=2.5, label="training error")
    axes.plot(epochs, test, color="#1f5fbf", linewidth=2.4, marker="o", markersize=4, label="test error")
    axes.annotate(
        f"{test[-1]:.2f}%",
        (epochs[-1], test[-1]),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        color="#1f5fbf",
        fontweight="bold",
        annotation_clip=False,
    )

    # the first epochs may lie far above: the axis shows where the curves end
    axes.set_ylim(0, min(100, max(5, 10 * max(train[-1], test[-1]))))
    axes.set_xlim(1 - 0.02 * len(epochs), epochs[-1] + 0.02 * len(epochs))
    axes.set_xlabel("epoch")
    axes.set_ylabel("error")
    axes.set_title(title, loc="left", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.grid(axis="y", color="#e4e6ea")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(file, format="png")
