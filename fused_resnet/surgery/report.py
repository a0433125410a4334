"""Say what is fused in a model, by which engine, and what is left stock and why."""

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import nn

from fused_resnet import engines
from fused_resnet.blocks.fusion import fusion_of
from fused_resnet.blocks.layers import child
from fused_resnet.blocks.plan import BlockPaths, ChainPaths, UnitPaths
from fused_resnet.blocks.prepare import PreparedChain, prepare
from fused_resnet.blocks.refusals import NO_PLAN, why_not_pool
from fused_resnet.chain.forward import keeps_y
from fused_resnet.chain.spec import Padded, make_chain, split_parameters
from fused_resnet.ops.activation import Act
from fused_resnet.surgery.finder import NO_NORM, Finder, Place, places
from fused_resnet.surgery.rules import is_norm
from fused_resnet.surgery.steps import Steps, trace


class Row(NamedTuple):
    """One line of a report: a module, what is fused in it or None, the engine, why (not), its steps where traced."""

    module: str
    what: str | None
    engine: str
    reason: str
    steps: Steps | None = None


@dataclass(frozen=True)
class Report:
    """What :func:`explain` found; prints as a table."""

    rows: list[Row]

    @property
    def fused(self) -> list[Row]:
        """The rows of chains that are fused."""
        return [row for row in self.rows if row.what is not None]

    @property
    def left(self) -> list[Row]:
        """The rows of what was left stock, with the reason."""
        return [row for row in self.rows if row.what is None]

    def __str__(self) -> str:
        head = f"{len(self.fused)} chains fused, {len(self.left)} places left stock"
        width = max((len(row.module) for row in self.rows), default=0)
        lines = [head]
        traced = [row.steps for row in self.rows if row.steps is not None]
        if traced:
            lines[0] += "; what the chains move and compute in a step and keep for backward:"
            lines.append(f"  {'':<{width}}  {_costs(functools.reduce(operator.add, traced))}  all chains")
        for row in self.rows:
            note = f"; {row.reason}" if row.reason else ""
            text = f"{row.what}  [{row.engine}]{note}" if row.what is not None else f"stock: {row.reason}"
            if traced:
                text = f"{_costs(row.steps)}  {text}"
            lines.append(f"  {row.module:<{width}}  {text}")
        return "\n".join(lines)


def _costs(steps: Steps | None) -> str:
    """Write the columns of what a chain costs; without it, their width in spaces."""
    if steps is None:
        return " " * len(_costs(Steps((), (), 0)))
    return f"{steps.bytes / 1e6:9.1f} MB{steps.flop / 1e9:9.2f} GFLOP{steps.kept / 1e6:9.1f} MB kept"


def explain(model: nn.Module, input_shape: Sequence[int] | None = None, *, dtype: torch.dtype | None = None) -> Report:
    """Say what is fused in a model, by which engine, and what is left stock and why; printable.

    It looks at the modules as they are now: a hook put on a fused block's convolution is named here.

    Parameters
    ----------
    model
        Any module.
    input_shape
        Of the model's input, [N, C, H, W]: with it, every fused chain's training step is traced without data, and its
        row says what it moves, computes and keeps for backward.  ``report.fused[0].steps`` prints kernel by kernel.
    dtype
        What autocast gives the convolutions, ``torch.bfloat16`` or ``torch.float16``; default: no autocast.

    Raises
    ------
    TypeError
        Where ``model`` is no module.
    ValueError
        Where the model takes no input of that shape.

    Examples
    --------
    >>> report = fused_resnet.explain(model, (32, 3, 224, 224), dtype=torch.bfloat16)
    >>> print(report)
    >>> print(report.fused[1].steps)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    steps = {} if input_shape is None else trace(model, input_shape, dtype)
    return report_on(model, places(model, Finder(("auto", "fast"))), steps, dtype)


def report_on(
    model: nn.Module,
    places: Iterable[Place],
    steps: Mapping[tuple[str, int], Steps] = MappingProxyType({}),
    dtype: torch.dtype | None = None,
) -> Report:
    """Write what was found in a model."""
    rows: list[Row] = []
    for name, module, plans in places:
        shown = name or f"({type(model).__name__})"
        plan = plans if isinstance(plans, str) else plans.get(module.training, NO_PLAN)
        chains = plan if isinstance(plan, str) else prepare(module, plan)
        if isinstance(plan, str) or isinstance(chains, str):
            rows.append(Row(shown, None, "", str(chains)))
            continue
        for i, (paths, chain) in enumerate(zip(plan.chains, chains, strict=True)):
            if isinstance(chain, str):
                rows.append(Row(shown, None, "", f"{_describe(paths)}: {chain}"))
            elif fusion_of(module) is not None:
                engine = _serving_engine(plan.options[0], chain.parameters, dtype)
                notes = (
                    _not_kept(paths, chain, engine, dtype),
                    _synchronized(chain),
                    _copies(engine, chain.parameters),
                    _stock_pool(module, chain),
                    _last_call(module),
                )
                reason = "; ".join(filter(None, notes))
                rows.append(Row(shown, _describe(paths), engine, reason, steps.get((name, i))))
            else:
                rows.append(Row(shown, None, "", f"not fused: {_describe(paths)} can be"))
        fused = set(plan.modules)
        rows += [
            Row(".".join(filter(None, (name, child_name))), None, "", plan.left.get(child_name, NO_NORM))
            for child_name, inner in module.named_children()
            if is_norm(inner) and (child_name,) not in fused
        ]
    return Report(rows)


def _serving_engine(engine: str, parameters: list[torch.Tensor], dtype: torch.dtype | None) -> str:
    weight = parameters[0]
    try:
        return engines.choose(engine, weight.device.type, dtype or weight.dtype)
    except engines.EngineError as error:
        return str(error)


def _not_kept(paths: ChainPaths, prepared: PreparedChain, engine: str, dtype: torch.dtype | None) -> str:
    """Name the convolutions whose raw output backward does without."""
    chain = make_chain(prepared.signature)
    with torch.device("meta"):  # a cast needs no memory here
        weights = [torch.empty(p.shape, dtype=dtype or p.dtype) for p in prepared.parameters]
    by_block = zip(paths, chain.blocks, chain.by_block(split_parameters(chain, weights)), strict=True)
    names = [
        ".".join(path.conv)
        for block_paths, block, parameters in by_block
        for i, path in enumerate((*block_paths.units, block_paths.shortcut))
        if isinstance(path, UnitPaths)
        and path.conv
        and not keeps_y(block, i, parameters[i].conv_weight, engine, chain.options.memory)
    ]
    return f"{' and '.join(names)} not kept" if names else ""


def _synchronized(prepared: PreparedChain) -> str:
    """Say where a chain's statistics are those of several processes."""
    if not any(block.synchronized for block in make_chain(prepared.signature).blocks):
        return ""
    on_cpu = prepared.parameters[0].device.type == "cpu"
    return "batch norm synchronized" + (", which stock PyTorch refuses on the CPU" if on_cpu else "")


def _stock_pool(module: nn.Module, chain: PreparedChain) -> str:
    """Say where a chain's pool has become one that the kernels do not know, and runs behind the chain."""
    if chain.pool is None:
        return ""
    reason = why_not_pool(child(module, chain.pool), chain.pool) or f"{'.'.join(chain.pool)} has a hook"
    return f"the pool is stock: {reason}"


def _last_call(module: nn.Module) -> str:
    """Say why the last call went to stock modules, where it did."""
    fusion = fusion_of(module)
    return f"stock in the last call: {fusion.last}" if fusion is not None and fusion.last else ""


def _copies(engine: str, parameters: list[torch.Tensor]) -> str:
    """Say where a chain makes copies that a channels_last model would not need."""
    weights = [p for p in parameters if p.dim() == 4]
    if engine not in engines.GPU_NAMES or all(w.is_contiguous(memory_format=torch.channels_last) for w in weights):
        return ""
    return "copies a contiguous input to channels_last: model.to(memory_format=torch.channels_last), and its input too"


def _describe(paths: ChainPaths) -> str:
    """Say what is in a chain: a block's modules, or those of several blocks, the names of equal ones together."""
    if len(paths) == 1:
        return _describe_block(paths[0])
    names: dict[str, list[str]] = {}
    for block in paths:
        common = 0
        while len({path[common] for path in block.modules}) == 1:
            common += 1
        inner = _describe_block(_without_prefix(block, common))
        names.setdefault(inner, []).append(".".join(block.modules[0][:common]))
    return "; ".join(f"{', '.join(blocks)}: {inner}" for inner, blocks in names.items())


def _without_prefix(block: BlockPaths, n: int) -> BlockPaths:
    """Return a block's paths without their first ``n`` names."""

    def unit(u: UnitPaths) -> UnitPaths:
        return UnitPaths(u.conv and u.conv[n:], u.norm[n:], u.act if isinstance(u.act, Act) else u.act and u.act[n:])

    shortcut = unit(block.shortcut) if isinstance(block.shortcut, UnitPaths) else block.shortcut
    return block._replace(units=tuple(map(unit, block.units)), shortcut=shortcut, pool=block.pool and block.pool[n:])


def _describe_block(paths: BlockPaths) -> str:
    def unit(u: UnitPaths) -> list[str]:
        act = [] if u.act is None or u.is_norm_act else [str(u.act) if isinstance(u.act, Act) else ".".join(u.act)]
        return [".".join(path) for path in (u.conv, u.norm) if path is not None] + act

    *inner, last = paths.units
    words = [word for u in inner for word in unit(u)] + unit(last._replace(act=None))
    if isinstance(paths.shortcut, UnitPaths):
        words.append(f"+ ({' '.join(unit(paths.shortcut))})")
    elif isinstance(paths.shortcut, Padded):
        (rows, columns), before, after = paths.shortcut
        words.append(f"+ pad(x[:, :, ::{rows}, ::{columns}], {before}, {after})")
    elif paths.shortcut is not None:
        words.append("+ x")
    words += unit(last)[len(unit(last._replace(act=None))) :]
    if paths.pool is not None:
        words.append(".".join(paths.pool))
    return " ".join(words)
