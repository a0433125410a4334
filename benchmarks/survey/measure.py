"""What is done with one network, in a process of its own."""

import contextlib
import dataclasses
import faulthandler
import functools
import hashlib
import json
import os
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import fused_resnet
from benchmarks.survey.networks import build, callable_model, find_input, model_input, too_large
from benchmarks.survey.rows import Limits, Row, one_line
from fused_resnet.blocks.fusion import fusion_of, plan_of
from fused_resnet.system import generators
from fused_resnet.system.atomic import replacing
from fused_resnet.system.environment import commit, installed
from fused_resnet.verification.runs import NOTHING_TO_COMPARE

# verify runs stock, fused, float64 and draws of noise, forward and backward, each on a copy
FORWARDS = 30


class OutOfTime(BaseException):
    """Not an Exception: verify would take that for the network's."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTime after so many seconds."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _bytes_of(t: Tensor) -> str:
    data = t.detach().to_dense().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(data.numpy(), digest_size=8).hexdigest()


class Snapshot:
    """What a model and the generators are now."""

    def __init__(self, model: nn.Module):
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.tensors = {name: (t, _bytes_of(t), t._version) for name, t in named}
        self.generators = generators.state()
        self.modules = {
            name: (module, type(module), {key: (value, _keys(value)) for key, value in vars(module).items()})
            for name, module in model.named_modules(remove_duplicate=False)
        }

    def differences(self, before: "Snapshot", *, modules: bool) -> str:
        """Say in what this one differs from an earlier one."""
        found = [] if list(self.tensors) == list(before.tensors) else ["the names of tensors"]
        for name in before.tensors.keys() & self.tensors.keys():
            (t, data, version), (old, old_data, old_version) = self.tensors[name], before.tensors[name]
            what = (t is not old and "another tensor") or (data != old_data and "bytes")
            what = what or (version != old_version and f"version {old_version} → {version}")
            found += [f"{name} ({what})"] if what else []
        found += [
            f"{whose} generator" for whose in before.generators if self.generators[whose] != before.generators[whose]
        ]
        if modules:
            found += [] if list(self.modules) == list(before.modules) else ["the names of modules"]
            for name in before.modules.keys() & self.modules.keys():
                what = _module_difference(self.modules[name], before.modules[name])
                found += [f"{name or 'the model'}: {what}"] if what else []
        return _first(found)


def _keys(value: Any) -> list[Any] | None:
    return list(value) if isinstance(value, dict) else None


def _module_difference(now: tuple[Any, type, dict[str, Any]], before: tuple[Any, type, dict[str, Any]]) -> str:
    if now[0] is not before[0] or now[1] is not before[1]:
        return f"{before[1].__name__} is {now[1].__name__}"
    if list(now[2]) != list(before[2]):
        return f"attributes {sorted(now[2].keys() ^ before[2].keys()) or 'in another order'}"
    changed = [k for k, (value, keys) in now[2].items() if value is not before[2][k][0] or keys != before[2][k][1]]
    return f"attributes {changed}" if changed else ""


def _first(found: list[str], count: int = 3) -> str:
    more = f" and {len(found) - count} more" if len(found) > count else ""
    return ", ".join(sorted(found)[:count]) + more


def norms_in_chains(model: nn.Module) -> int:
    """Count the batch norms that the plans of a fused model run, in the mode that its modules are in.

    What the last call left to stock does not count.
    """
    return sum(isinstance(inner, _BatchNorm) for inner in _norms_reached(model))


def _norms_reached(model: nn.Module) -> set[nn.Module]:
    reached: set[nn.Module] = set()
    for module in model.modules():
        plan, fusion = plan_of(module), fusion_of(module)
        paths = [] if plan is None or fusion is None or fusion.last else plan.modules
        reached |= {module.get_submodule(".".join(path)) for path in paths}
    return reached


def why_norms_are_left(model: nn.Module) -> str:
    """Say why batch norms are in no chain, by reason, the most frequent first."""
    reached = _norms_reached(model)
    reasons = {row.module: row.reason for row in fused_resnet.explain(model).rows if row.reason}
    left: Counter[str] = Counter()
    for name, norm in model.named_modules():
        if isinstance(norm, _BatchNorm) and norm not in reached:
            nearest = [name.rsplit(".", n)[0] for n in range(name.count(".") + 1)] + [f"({type(model).__name__})"]
            reason = next((reasons[place] for place in nearest if place in reasons), "of its root")
            left[re.sub(r"^\S+ (?=follows|is called)", "", reason)] += 1
    return "; ".join(f"{reason.replace(';', ',')} ×{count}" for reason, count in left.most_common())


class Record:
    """The row of a network as far as it has come; kept in a file, so that it outlives its process."""

    def __init__(self, row: Row, path: Path):
        self.row = row
        self.path = path
        self.start = time.perf_counter()

    def enter(self, phase: str) -> None:
        self.row.seconds = time.perf_counter() - self.start
        with replacing(self.path) as file:
            file.write(json.dumps({"phase": phase, "row": dataclasses.asdict(self.row)}).encode())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note what a call raises."""
        self.enter(name)
        try:
            yield
        except Exception as error:
            self.row.raised = "; ".join(filter(None, (self.row.raised, f"{name}: {one_line(error)}")))


def measure(name: str, made_with: str, limits: Limits, path: Path, log: Path) -> None:
    """Measure one network, in this process, which is its own, and leave the row in a file."""
    os.setsid()  # what it starts is ended with it
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    faulthandler.enable(file=sys.stderr)
    warnings.simplefilter("ignore")
    os.environ["FUSED_RESNET_TUNING"] = "0"  # what was measured on this machine decides nothing here
    torch.set_num_threads(1)
    record = Record(Row(name, made_with), path)
    record.enter("build")
    model = _built(record.row, limits)
    if model is not None:
        _warm()
        _measure_surgery(model, record)
        _measure_verify(model, limits, record)
    record.enter("done")


def _warm() -> None:
    """Load the libraries and the compiler of plans, which are not the network's."""
    fused_resnet.fuse(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()))


def _built(row: Row, limits: Limits) -> nn.Module | None:
    torch.manual_seed(0)
    row.not_built = too_large(row.name, limits.parameters)
    if row.not_built:
        return None
    try:
        model = build(row.name).train()
    except Exception as error:
        row.not_built = one_line(error)
        return None
    row.parameters = sum(p.numel() for p in model.parameters())
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    row.norms = len(norms)
    row.norms_2d = sum(isinstance(norm, nn.BatchNorm2d) for norm in norms)
    return model


def _measure_surgery(model: nn.Module, record: Record) -> None:
    row = record.row
    before = Snapshot(model)
    changed = []

    def compare(call: str, earlier: Snapshot, modules: bool) -> Snapshot:
        now = Snapshot(model)
        what = now.differences(earlier, modules=modules)
        changed.extend([f"{call}: {what}"] if what else [])
        return now

    with record.phase("fuse"):
        start = time.perf_counter()
        fused_resnet.fuse(model)
        row.first = time.perf_counter() - start
    fused = compare("fuse", before, modules=False)
    with record.phase("explain"):
        row.chains = len(fused_resnet.explain(model).fused)
        row.in_chains, row.left = norms_in_chains(model), why_norms_are_left(model)
    explained = compare("explain", fused, modules=True)
    with record.phase("unfuse"):
        fused_resnet.unfuse(model)
    what = Snapshot(model)
    changed += [f"unfuse: {text}" for text in [what.differences(explained, modules=False)] if text]
    changed += [f"after unfuse: {text}" for text in [what.differences(before, modules=True)] if text]
    if not row.raised:
        with record.phase("fuse again"):
            fused_resnet.fuse(model)
            start = time.perf_counter()
            fused_resnet.fuse(fused_resnet.unfuse(model))
            row.again = time.perf_counter() - start
            fused_resnet.unfuse(model)
    row.changed = "; ".join(changed)


def _measure_verify(model: nn.Module, limits: Limits, record: Record) -> None:
    row = record.row
    record.enter("find an input")
    found: tuple[tuple[Tensor, ...], float] | str = ""
    network = callable_model(model)
    if not row.raised and row.chains:
        try:
            with at_most(limits.verify_seconds):
                found = find_input(model, network)
                if not isinstance(found, str):
                    _run_once(model, network, found[0], row)
        except OutOfTime:
            found = f"no input found in {limits.verify_seconds:.0f} s"
    found = _why_not_verified(row, limits) or found
    if isinstance(found, str):
        row.verify, row.note = "skipped", found
        return
    inputs, seconds = found
    row.input = "×".join(str(n) for n in inputs[0].shape)
    if seconds * FORWARDS > limits.verify_seconds:
        row.verify, row.note = "skipped", f"a forward takes {seconds:.1f} s"
        return
    record.enter("verify")
    try:
        with at_most(limits.verify_seconds):
            row.verify, row.worst, row.note = _verdict(network, inputs)
            if row.verify == "failed":
                others = [_verdict(network, model_input(model, tuple(inputs[0].shape), seed)) for seed in (2, 3)]
                if all(verdict != "failed" for verdict, _, _ in others):
                    row.verify, row.note = "noise", f"ok with two other inputs; with the first, not {row.note}"
    except OutOfTime:
        if row.verify != "failed":
            row.verify, row.note = "skipped", f"not done in {limits.verify_seconds:.0f} s"


def _run_once(model: nn.Module, network: nn.Module, inputs: tuple[Tensor, ...], row: Row) -> None:
    """Count again what is in chains, now that a call has shown what it leaves to stock for what it was called with."""
    fused_resnet.fuse(model)
    try:
        with torch.no_grad():
            network(*inputs)
        row.in_chains, row.left = norms_in_chains(model), why_norms_are_left(model)
    finally:
        fused_resnet.unfuse(model)


def _verdict(network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[str, float | None, str]:
    """Return what verify says in a word, the largest error ÷ what is allowed, and which results are not simply ok."""
    try:
        result = fused_resnet.verify(network, *inputs)
    except Exception as error:
        return "failed", None, one_line(error)
    if result.rows[0].note.startswith(NOTHING_TO_COMPARE):
        return "skipped", None, result.rows[0].note
    worst = max((r.fused / r.allowed for r in result.rows if r.fused is not None and r.allowed), default=0.0)
    broken = [f"{r.name}: {r.note}" for r in result.rows if not r.ok]
    by_noise = [r.name for r in result.rows if r.ok and r.noise is not None]
    verdict = "failed" if broken else "noise" if by_noise else "ok"
    named = broken or by_noise
    return verdict, worst, f"{len(named)} of {len(result.rows)} results: {_first(named)}" if named else ""


def _why_not_verified(row: Row, limits: Limits) -> str:
    if row.raised:
        return "fuse, explain or unfuse raised"
    if not row.chains:
        return "nothing is fused"
    if row.parameters is not None and row.parameters > limits.verify_parameters:
        return f"more than {limits.verify_parameters / 1e6:.0f} M parameters"
    return ""


def versions(name: str) -> str:
    """Return the versions that a row is measured with, now."""
    package = name.partition(":")[0]
    return f"{package} {installed(package)}, torch {torch.__version__}, fused_resnet {_own_version()}"


@functools.cache
def _own_version() -> str:
    """Return the commit that this process runs, in short, or the version of what has none."""
    full = commit()
    return fused_resnet.__version__ if full is None else full[:12] + full[40:]  # -dirty
