"""What fuse makes of every network that can be built here: what it finds, how long it takes, and whether it is right.

    python -m benchmarks.survey                             torchvision, timm (a few of every family), transformers
    python -m benchmarks.survey --package timm --all        everything that timm has
    python -m benchmarks.survey --only 'resnet|regnet'      those whose name matches; --list only says which
    python -m benchmarks.survey --write-docs docs/survey.md and a page of what was found, beside it a table as CSV

Networks have random weights; nothing is fetched. Each is measured in a process of its own, so that one which ends a
process is a row like any other:

  norms        batch norms of any kind, those over images, and those that run inside fused chains
  first, again seconds of fuse, and of unfuse and then fuse again; the package is warm, other networks' plans are not
  changed      what fuse, explain or unfuse wrote to: bytes and versions of parameters and buffers, the generators of
               Python, NumPy and torch, and after unfuse the modules' classes, modes and attributes
  raised       what fuse, explain or unfuse raised
  ended        how a process ended that did not come to its end, and where it was then
  verify       fused_resnet.verify in training mode, on 4 images of the smallest size that the stock network takes: ok;
               noise (right within what the network makes of one rounding of its input, or with two other inputs: a
               ReLU beside 0 may go the other way); failed; or skipped, and why

Rows are kept as they come. Interrupt it and start it again: what is there is not measured again, without --again.
"""

import argparse
import contextlib
import csv
import dataclasses
import datetime
import faulthandler
import functools
import hashlib
import importlib
import inspect
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import fused_resnet  # noqa: E402
from fused_resnet.blocks.fusion import plan_of  # noqa: E402
from fused_resnet.system import generators  # noqa: E402
from fused_resnet.system.atomic import replacing  # noqa: E402
from fused_resnet.system.environment import commit, installed  # noqa: E402
from fused_resnet.verification.runs import NOTHING_TO_COMPARE  # noqa: E402

PACKAGES = ("torchvision", "timm", "transformers")
RESULTS = ROOT / "build" / "survey.csv"
BATCH = 4
SIZES = (32, 64, 96, 128, 160, 224)
FRAMES = 16
# verify runs stock, fused, float64 and draws of noise, forward and backward, each on a copy
FORWARDS = 30
# the fewest models of a timm file, where it has so many
FEWEST = 3
PREFIXES = "(?:tf_|test_|legacy_|gluon_)?"  # of a timm family
# the words by which timm tells sizes; a name with none of them is between small and base
SMALL_TO_LARGE = (
    "test atto femto pico nano xxs xxt xxsmall xs xt xtiny x t ti tiny s mini lite micro small",
    "b base m medium",
    "l large xl xxl xxlarge xlarge 1b 3b so150m so400m 300m 412m 570m",
    "h huge giant gigantic enormous big 5b 7b",
)

# transformers: the tasks whose networks look at images or videos, and IMAGE, the headless ones
TASKS = (
    *("IMAGE_CLASSIFICATION", "BACKBONE", "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION", "UNIVERSAL_SEGMENTATION"),
    *("INSTANCE_SEGMENTATION", "DEPTH_ESTIMATION", "VIDEO_CLASSIFICATION", "IMAGE"),
)
# what the default config leaves out, and smaller networks of the same forward
CONFIGS: dict[str, dict[str, Any]] = {
    "EfficientNet": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 224},
    "TimmBackbone": {"backbone": "resnet18"},
    "Data2VecVision": {"num_hidden_layers": 12, "hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "DPT": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "image_size": 224},
}


@dataclass(frozen=True)
class Limits:
    """What a network may take.

    Attributes
    ----------
    seconds
        Of its process, after which it is ended.
    verify_seconds
        Of verify, after which it is given up.
    parameters
        With more, a network is not built.
    verify_parameters
        With more, a network is not verified.
    """

    seconds: float = 300
    verify_seconds: float = 120
    parameters: float = 150e6
    verify_parameters: float = 60e6


@dataclass
class Row:
    """What is known of one network; texts are empty where there is nothing to say, numbers None where not measured."""

    name: str
    versions: str = ""  # of its package, of torch and of this one
    not_built: str = ""
    parameters: int | None = None
    norms: int | None = None
    norms_2d: int | None = None
    in_chains: int | None = None
    chains: int | None = None
    first: float | None = None
    again: float | None = None
    changed: str = ""
    raised: str = ""
    ended: str = ""
    verify: str = ""
    worst: float | None = None  # the largest error ÷ what is allowed
    input: str = ""
    note: str = ""
    seconds: float | None = None

    @property
    def package(self) -> str:
        return self.name.partition(":")[0]

    @property
    def remarkable(self) -> str:
        """What somebody should look into."""
        failed = f"verify: {self.note}" if self.verify == "failed" else ""
        named = (("ended", self.ended), ("raised", self.raised), ("changed", self.changed))
        return "; ".join(filter(None, (*(f"{key}: {text}" for key, text in named if text), failed)))


FIELDS = [field.name for field in dataclasses.fields(Row)]


# --- which networks there are


def networks(packages: Iterable[str] = PACKAGES, *, everything: bool = False) -> list[str]:
    """Return the names, PACKAGE:NETWORK, of what is installed."""
    listing = {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}
    return [f"{p}:{name}" for p in packages if installed(p) is not None for name in listing[p](everything)]


def _torchvision(everything: bool) -> list[str]:
    import torchvision

    return list(torchvision.models.list_models())


def _timm(everything: bool) -> list[str]:
    """Return, of every file of timm, the smallest of each family, and the smallest until they are ``FEWEST``."""
    import timm

    if everything:
        return list(timm.list_models())
    chosen = []
    for file in timm.list_modules():
        names = sorted(timm.list_models(module=file), key=_timm_size)
        families = {_family(name): name for name in reversed(names)}
        taken = set(families.values())
        rest = [name for name in names if name not in taken][: max(0, FEWEST - len(taken))]
        chosen += sorted(taken | set(rest))
    return chosen


def _family(name: str) -> str:
    found = re.match(f"{PREFIXES}[a-z]+", name)
    return found.group() if found else name


def _timm_size(name: str) -> tuple[Any, ...]:
    """Return what a name is sorted by: the word for its size, then its numbers."""
    tokens = name.split("_")
    words = " ".join(SMALL_TO_LARGE).split()
    ranks = [words.index(token) for token in tokens if token in words]
    middle = len(SMALL_TO_LARGE[0].split()) - 0.5
    parts = [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]
    return (max(ranks) if ranks else middle, len(tokens), parts)


def _transformers(everything: bool) -> list[str]:
    """Return the classes for images; a headless one only where its kind has no other, or with ``everything``."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    classes: dict[str, None] = {}
    kinds: set[str] = set()
    for task in TASKS:
        for kind, found in getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}).items():
            if task != "IMAGE" or everything or kind not in kinds:
                classes.update(dict.fromkeys([found] if isinstance(found, str) else found))
            kinds.add(kind)
    return list(classes)


# --- building one, and its input


def build(name: str) -> nn.Module:
    """Build a network with random weights."""
    package, _, network = name.partition(":")
    module = importlib.import_module(package)
    if package == "torchvision":
        given = inspect.signature(module.models.get_model_builder(network)).parameters
        keywords = {"weights_backbone": None} if "weights_backbone" in given else {}
        built = module.models.get_model(network, weights=None, **keywords)
    elif package == "timm":
        built = module.create_model(network, pretrained=False)
    else:
        module.logging.set_verbosity_error()
        cls = getattr(module, network)
        changes = next((config for start, config in CONFIGS.items() if network.startswith(start)), {})
        built = cls(cls.config_class(**changes))
    return built


def too_large(name: str, limit: float) -> str:
    """Say where a network has more parameters than a limit, without their memory."""
    with contextlib.suppress(Exception), torch.device("meta"):
        count = sum(p.numel() for p in build(name).parameters())
        if count > limit:
            return f"{count / 1e6:.0f} M parameters, more than {limit / 1e6:.0f} M"
    return ""


class Detector(nn.Module):
    """torchvision's detector without what chooses by rank: its backbone, and its heads on fixed boxes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list[Any]:
        model: Any = self.model
        features = model.backbone(images)
        if not hasattr(model, "rpn"):
            return [model.head(list(features.values()))]
        size = float(images.shape[-1])
        boxes = [images.new_tensor([[0, 0, size, size], [size / 4, 0, size, size / 2]])] * len(images)
        shapes = [(images.shape[-2], images.shape[-1])] * len(images)
        heads = model.roi_heads
        outputs = [model.rpn.head(list(features.values()))]
        outputs.append(heads.box_predictor(heads.box_head(heads.box_roi_pool(features, boxes, shapes))))
        if getattr(heads, "mask_head", None) is not None:
            outputs.append(heads.mask_head(heads.mask_roi_pool(features, boxes, shapes)))
        if getattr(heads, "keypoint_head", None) is not None:
            outputs.append(heads.keypoint_head(heads.keypoint_roi_pool(features, boxes, shapes)))
        return outputs


def callable_model(model: nn.Module) -> nn.Module:
    """Return what verify is given of a model."""
    return Detector(model) if type(model).__module__.startswith("torchvision.models.detection") else model


def input_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Yield shapes of a model's input, the smallest images first, its own size last."""
    config = getattr(model, "config", None)
    own: Any = getattr(config, "image_size", None)
    channels = getattr(config, "num_channels", 3)
    if hasattr(model, "pretrained_cfg"):  # timm
        channels, *own = model.pretrained_cfg.get("input_size", (3, 224, 224))  # type: ignore[union-attr, operator]
    pair = tuple(own) if isinstance(own, (tuple, list)) else (own or SIZES[-1],) * 2
    for size in dict.fromkeys([*((size, size) for size in SIZES), pair]):
        if type(model).__module__.startswith("torchvision.models.video"):
            yield (BATCH, channels, FRAMES, *size)
        elif "ForVideo" in type(model).__name__:
            yield (BATCH, getattr(config, "num_frames", FRAMES), channels, *size)
        else:
            yield (BATCH, channels, *size)


def model_input(model: nn.Module, shape: tuple[int, ...], seed: int = 1) -> tuple[Tensor, ...]:
    """Return what a model is called with: images, or two for optical flow."""
    generator = torch.Generator().manual_seed(seed)
    frames = 2 if type(model).__name__ == "RAFT" else 1
    return tuple(torch.randn(shape, generator=generator) for _ in range(frames))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of an output."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(inner)


def find_input(model: nn.Module, network: nn.Module) -> tuple[tuple[Tensor, ...], float] | str:
    """Return the smallest input that a network takes in training, with the seconds of its forward; or why none."""
    said = ""
    for shape in input_shapes(model):
        inputs = model_input(model, shape)
        start = time.perf_counter()
        try:
            with torch.no_grad():
                outputs = list(tensors_in(network(*inputs)))
        except Exception as error:
            said = _said(error)
            continue
        if outputs and all(t.isfinite().all() and t.numel() for t in outputs):
            return inputs, time.perf_counter() - start
        said = "stock's own output is empty or not finite"
    return f"stock takes none of the inputs tried: {said}"


# --- what is measured, in a process of its own


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


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def norms_in_chains(model: nn.Module) -> int:
    """Count the batch norms that the plans of a fused model run, in the mode that its modules are in."""
    reached: set[nn.Module] = set()
    for module in model.modules():
        plan = plan_of(module)
        paths = [] if plan is None else plan.modules
        reached |= {module.get_submodule(".".join(path)) for path in paths}
    return sum(isinstance(inner, _BatchNorm) for inner in reached)


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
            self.row.raised = "; ".join(filter(None, (self.row.raised, f"{name}: {_said(error)}")))


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
        row.not_built = _said(error)
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
        row.in_chains = norms_in_chains(model)
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
    reason = _why_not_verified(row, limits)
    found: tuple[tuple[Tensor, ...], float] | str = reason
    network = callable_model(model)
    if not reason:
        try:
            with at_most(limits.verify_seconds):
                found = find_input(model, network)
        except OutOfTime:
            found = f"no input found in {limits.verify_seconds:.0f} s"
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


def _verdict(network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[str, float | None, str]:
    """Return what verify says in a word, the largest error ÷ what is allowed, and which results are not simply ok."""
    try:
        result = fused_resnet.verify(network, *inputs)
    except Exception as error:
        return "failed", None, _said(error)
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


# --- many of them


@dataclass
class Running:
    name: str
    process: Any
    until: float
    path: Path
    log: Path


def survey(
    names: Iterable[str], limits: Limits, *, jobs: int = 1, on_row: Callable[[Row], None] = lambda row: None
) -> list[Row]:
    """Measure networks, each in a process of its own, some at once; return the rows in the order in which they came."""
    waiting = list(names)[::-1]
    running: list[Running] = []
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="survey-") as folder:
        context = _context({name.partition(":")[0] for name in waiting})
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(_start(context, waiting.pop(), limits, Path(folder) / f"{len(waiting)}.json"))
                soonest = min(job.until for job in running) - time.monotonic()
                ended = connection.wait([job.process.sentinel for job in running], timeout=max(0.0, soonest))
                for job in running.copy():
                    if job.process.sentinel in ended or time.monotonic() >= job.until:
                        running.remove(job)
                        rows.append(_finish(job, limits))
                        on_row(rows[-1])
        finally:
            for job in running:
                _kill(job)
    return rows


def _context(packages: set[str]) -> Any:
    """Return what starts processes: forks of one that has imported the packages, and no more."""
    context = multiprocessing.get_context("forkserver")
    preload = ["fused_resnet", "fused_resnet.verification", *sorted(packages)]
    context.set_forkserver_preload(preload + (["transformers.modeling_utils"] if "transformers" in packages else []))
    wanted = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def _start(context: Any, name: str, limits: Limits, path: Path) -> Running:
    log = path.with_suffix(".log")
    process = context.Process(target=measure, args=(name, versions(name), limits, path, log))
    process.start()
    return Running(name, process, time.monotonic() + limits.seconds, path, log)


def _kill(job: Running) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(job.process.pid, signal.SIGKILL)  # its own group, once it has one
    job.process.kill()
    job.process.join()


def _finish(job: Running, limits: Limits) -> Row:
    """Return the row of a process that has ended, or is ended now."""
    out_of_time = job.process.is_alive()
    if out_of_time:
        _kill(job)
    job.process.join()
    code = job.process.exitcode
    left: dict[str, Any] = {"phase": "start", "row": {"name": job.name}}
    if job.path.exists():
        left = json.loads(job.path.read_bytes())
    row = Row(**left["row"])
    log = job.log.read_text(errors="replace") if job.log.exists() else ""
    if left["phase"] != "done":
        how = f"ended by signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        how = f"out of time after {limits.seconds:.0f} s" if out_of_time else how
        row.ended = f"{how} in {left['phase']}{_where(log)}"
    job.path.unlink(missing_ok=True)
    job.log.unlink(missing_ok=True)
    return row


def _where(log: str) -> str:
    """Say where a process was, by what faulthandler or a traceback left."""
    frames = re.findall(r"^  File (\".*?\", line \d+ in \w+)", log, re.MULTILINE)[:1]
    lines = [line.strip() for line in log.splitlines() if line.strip()][-1:]
    return "".join(f": {text[:200]}" for text in frames or lines)


# --- rows in files, and what they say together


def read_rows(path: Path) -> dict[str, Row]:
    """Return the rows of a file by name; none where it is not there or has other columns."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != FIELDS:
            raise ValueError(f"{path} has other columns than {','.join(FIELDS)}: move it away, or name other --results")
        return {line["name"]: Row(**{key: _parse(key, text) for key, text in line.items()}) for line in reader}


def _parse(key: str, text: str) -> Any:
    kind = str(Row.__annotations__[key])
    if "None" not in kind:
        return text
    return None if text == "" else (int if "int" in kind else float)(text)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows to a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as binary:
        lines: list[str] = []
        writer = csv.DictWriter(_Lines(lines), FIELDS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _short(value) for key, value in dataclasses.asdict(row).items()})
        binary.write("".join(lines).encode())


class _Lines:
    """A file, to csv, that is a list of lines."""

    def __init__(self, lines: list[str]):
        self.write = lines.append


def _short(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) and math.isfinite(value) else value


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
sequences and volumes, too), and those of them that run inside a fused chain in training. *Changed* means that `fuse`,
`explain` or `unfuse` wrote to a parameter, a buffer or a random number generator, or that `unfuse` did not bring back
every module's class, mode and attributes. *Verified* is what `fused_resnet.verify` says of a training step in float32,
on {BATCH} images of the smallest size that the stock network takes, of the networks in which something is fused; of
torchvision's detectors, the backbone and the heads on fixed boxes. *By noise* is right within what the network itself
makes of one rounding of its input, or with two other inputs where it was not with the first: in so small a step, one
ReLU that goes the other way decides. Times of `fuse` are seconds on one core, of networks with batch norms.

{findings(rows)}
"""
    with replacing(path) as file:
        file.write((page.rstrip() + "\n").encode())
    write_rows(table, rows)


# --- the command


def bar(total: int) -> Any:
    """Return a progress bar, or None where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, unit="network", smoothing=0.05, dynamic_ncols=True)


def run(names: list[str], kept: dict[str, Row], limits: Limits, jobs: int, results: Path) -> None:
    """Measure networks and keep every row as it comes."""
    progress = bar(len(names))
    done = 0

    def keep(row: Row) -> None:
        nonlocal done
        kept[row.name] = row
        write_rows(results, kept.values())
        done += 1
        say = print if progress is None else progress.write
        if row.remarkable or progress is None:
            say(f"[{done}/{len(names)}] {row.name}  {row.remarkable or row.not_built or row.verify}")
        if progress is not None:
            progress.set_postfix_str(row.name.partition(":")[2][:24], refresh=False)
            progress.update()

    try:
        survey(names, limits, jobs=jobs, on_row=keep)
    finally:
        if progress is not None:
            progress.close()


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_argument_group("which networks")
    which.add_argument("--package", nargs="+", choices=PACKAGES, default=PACKAGES, help="default: all three")
    which.add_argument("--only", metavar="PATTERN", help="a regular expression found in PACKAGE:NETWORK")
    which.add_argument("--all", action="store_true", help="all of timm, and transformers' networks without heads, too")
    which.add_argument("--list", action="store_true", help="print the names, and end")
    limits = parser.add_argument_group("limits of one network")
    limits.add_argument("--seconds", type=float, default=Limits.seconds, help="(default: %(default)s)")
    limits.add_argument("--verify-seconds", type=float, default=Limits.verify_seconds, help="(default: %(default)s)")
    limits.add_argument(
        "--parameters", type=float, default=Limits.parameters, help="that it is built with (default: %(default)g)"
    )
    limits.add_argument(
        "--verify-parameters",
        type=float,
        default=Limits.verify_parameters,
        help="that it is verified with (default: %(default)g)",
    )
    parser.add_argument("--jobs", type=int, default=2, help="at once, of one thread each (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="CSV", help="rows (default: build/survey.csv)")
    parser.add_argument("--again", action="store_true", help="measure again what has a row")
    parser.add_argument("--write-docs", type=Path, metavar="PAGE", help="a page of all rows, and PAGE's name with .csv")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Measure what is asked for; return 1 where there is something to look into, 2 for bad input, 130 after Ctrl-C."""
    options = build_parser().parse_args(arguments)
    try:
        names = networks(options.package, everything=options.all)
        names = [name for name in names if options.only is None or re.search(options.only, name)]
        if options.jobs < 1:
            raise ValueError(f"--jobs must be 1 or more, got {options.jobs}")
        if not names:
            raise ValueError(f"no network of {', '.join(options.package)} matches {options.only!r}; try --list, --all")
        kept = {} if options.list else read_rows(options.results)
    except (ValueError, re.error) as error:
        print(f"survey: error: {error}", file=sys.stderr)
        return 2
    if options.list:
        print(*names, sep="\n")
        return 0
    left = [name for name in names if options.again or name not in kept]
    old = [name for name in names if name not in left and kept[name].versions != versions(name)]
    if old:
        print(f"{len(old)} rows in {options.results} are of other versions; --again measures them again")
    limits = Limits(options.seconds, options.verify_seconds, options.parameters, options.verify_parameters)
    try:
        run(left, kept, limits, options.jobs, options.results)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {len(kept)} rows are in {options.results}, the next run goes on", file=sys.stderr)
        return 130
    rows = [kept[name] for name in names]
    print(f"\n{summary(rows)}\n\n{findings(rows)}")
    if options.write_docs is not None:
        write_docs(options.write_docs, rows)
    return int(any(row.remarkable for row in rows))


if __name__ == "__main__":
    sys.exit(main())
