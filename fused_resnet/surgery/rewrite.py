"""Write a forward again, with its chains in it."""

import re
from types import ModuleType
from typing import Any

from torch import fx

from fused_resnet.surgery.rules import Match


def write_forward(graph: fx.Graph, chains: list[Match]) -> str:
    """Replace every chain in a graph by ``chains.run`` or ``run_beside`` and write the graph as Python source."""
    first = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_before(first):
        runner = graph.placeholder("chains")
    replaced: dict[fx.Node, fx.Node] = {}
    for i, match in enumerate(chains):
        shortcut = match.shortcut and replaced.get(match.shortcut, match.shortcut)
        with graph.inserting_after(match.end):
            x = replaced.get(match.x, match.x)
            if shortcut is None:
                run = graph.call_method("run", (runner, i, x, None))
            else:
                run = graph.call_method("run_beside", (runner, i, x, shortcut))
        match.end.replace_all_uses_with(run)
        replaced[match.end] = run
        for node in reversed([node for node in graph.nodes if node in match.nodes]):
            graph.erase_node(node)
    code = graph.python_code("self")
    used = {name: value for name, value in code.globals.items() if re.search(rf"\b{name}\b", code.src)}
    return "\n".join([*(_define(name, value) for name, value in used.items()), code.src.strip(), ""])


def _define(name: str, value: Any) -> str:
    """Return the line of source that gives a traced forward one of its globals."""
    if isinstance(value, ModuleType):
        return f"import {value.__name__} as {name}"
    if isinstance(value, float):  # inf, nan
        return f"{name} = float('{value}')"
    return f"from {value.__module__} import {value.__qualname__} as {name}"
