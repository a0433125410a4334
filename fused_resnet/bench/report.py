"""The table of a run, a line as soon as it is measured."""

import textwrap

from fused_resnet.bench.harness import Row
from fused_resnet.bench.suites import Settings, Suite

WIDTH = 100  # characters, with a third peer

VALUE, RATIO, QUARTILES = 10, 8, 11
GAP = "  "


def heading(suite: Suite, settings: Settings) -> str:
    """Return the lines above a suite's rows, with what all of them have in common."""
    engines = ", ".join(dict.fromkeys(map(settings.serving_engine, settings.dtypes)))
    size = f"{settings.image_size}x{settings.image_size}"
    common = f"{suite.name}: {suite.title}; {settings.batch_size} images of {size}; engine {engines}"

    stock, *others = suite.peers(settings)
    symbol, ratio = suite.quantity.symbol, suite.quantity.ratio
    cells = [f"{name:<{width}}" for name, width in suite.columns.items()]
    cells.append(f"{f'{stock} {symbol}':>{VALUE}}")
    for peer in others:
        cells += [f"{f'{peer} {symbol}':>{VALUE}}", f"{ratio:>{RATIO}}", f"{'quartiles':>{QUARTILES}}"]
    return "\n".join([*textwrap.wrap(common, WIDTH), GAP.join(cells)])


def line(suite: Suite, row: Row) -> str:
    """Return a row of the table: figures, or why there are none."""
    cells = [f"{row.case[name]:<{width}}" for name, width in suite.columns.items()]
    if row.refused:
        return textwrap.fill(GAP.join([*cells, f"refused: {row.refused}"]), WIDTH, subsequent_indent="    ")
    for peer, values in row.values.items():
        cells.append(f"{row.spread(peer).median * row.quantity.scale:>{VALUE}.2f}")
        if peer in row.compared():
            ratio = row.ratio(peer)
            # what was measured once has no spread
            quartiles = f"{ratio.low:.2f}-{ratio.high:.2f}" if len(values) > 1 else ""
            cells += [f"{f'{ratio.median:.2f}x':>{RATIO}}", f"{quartiles:>{QUARTILES}}"]
    return GAP.join(cells).rstrip()
