"""The table of an experiment: what its networks came to, and whether each is worse than the first of its panel."""

from collections.abc import Sequence

from fused_resnet.experiments.experiment import Network, Panel, Result


def table(panels: Sequence[Panel], results: Sequence[Result]) -> str:
    """Return a Markdown table of errors in percent, each the mean over a network's runs with the lowest and highest.

    ``training`` and ``test`` are those of the last epoch, ``best test`` is the lowest of all epochs.
    """
    lines = [["network", "runs", "training error, %", "test error, %", "best test error, %"]]
    for network in (network for panel in panels for network in panel.networks):
        runs = [result.history for result in results if result.network == network]
        columns = (
            [run[-1].train_error for run in runs],
            [run[-1].test_error for run in runs],
            [min(metrics.test_error for metrics in run) for run in runs],
        )
        lines.append([network.label, str(len(runs)), *map(spread, columns)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head, *body = ("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)
    return "\n".join([head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body])


def spread(errors: Sequence[float]) -> str:
    """Return mean, lowest and highest of errors that are given as fractions, in percent."""
    mean, low, high = (100 * error for error in (sum(errors) / len(errors), min(errors), max(errors)))
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def comparisons(panels: Sequence[Panel], results: Sequence[Result]) -> list[str]:
    """Return, for every network but the first of its panel, in how many seeds it trains to a higher error than that."""

    def last(network: Network) -> list[float]:
        runs = sorted((result for result in results if result.network == network), key=lambda result: result.seed)
        return [run.history[-1].train_error for run in runs]

    sentences = []
    for panel in panels:
        first, *others = panel.networks
        for other in others:
            pairs = list(zip(last(first), last(other), strict=True))
            worse = sum(error > reference for reference, error in pairs)
            sentences.append(
                f"{other.label} ends with a higher training error than {first.label} in {worse} of {len(pairs)} seeds"
            )
    return sentences
