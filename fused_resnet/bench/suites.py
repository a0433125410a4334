"""Which cases are measured; a row comes as soon as it is."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch

from fused_resnet import engines
from fused_resnet.bench.accuracy import WrongResult, check
from fused_resnet.bench.harness import BYTES, SECONDS, STOCK, Quantity, Row, make_clock, take_turns
from fused_resnet.bench.memory import activation_bytes, peak_bytes
from fused_resnet.bench.peers import COMPILED, DTYPES, EXACT, FUSED, Operation, TrainingStep, Workload

# Float64 is slow and large: a step is checked on no more images than this.
CHECKED_IMAGES = 4

# What a ResNet-50 of 224x224 images normalises most often: channels and size inside its blocks, and at their ends.
INSIDE = ((64, 112), (64, 56), (128, 28), (256, 14), (512, 7))
ENDS = ((256, 56), (512, 28), (1024, 14), (2048, 7))


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """What a run measures, and how often.

    Attributes
    ----------
    models
        Networks of the suites ``model`` and ``memory``.
    batch_size, image_size
        Of every suite; the shapes of ``op`` are those of a ResNet-50 on such images.
    dtypes
        Names of `peers.DTYPES`.
    device
        Where everything runs.
    engine
        Of the fused peer.
    compile
        Whether ``compile`` is a peer of the suite ``model``.
    op_repeats, model_repeats
        Rounds that count.
    largest_only
        Only one shape for each kind of shortcut.
    """

    models: tuple[str, ...] = ("resnet18", "resnet50")
    batch_size: int = 8
    image_size: int = 224
    dtypes: tuple[str, ...] = tuple(DTYPES)
    device: torch.device = CPU
    engine: str = "auto"
    compile: bool = False
    op_repeats: int = 30
    model_repeats: int = 10
    largest_only: bool = False

    def quick(self) -> "Settings":
        """Return settings that show in seconds whether everything works; their figures mean little."""
        return replace(
            self,
            models=("resnet20",),
            batch_size=8,
            image_size=32,
            op_repeats=3,
            model_repeats=3,
            largest_only=True,
        )

    def serving_engine(self, dtype: str) -> str:
        """Return the engine that serves the fused peer."""
        return engines.choose(self.engine, self.device.type, DTYPES[dtype])


def op_cases(settings: Settings) -> Iterator[tuple[tuple[int, int, int, int], str]]:
    """Yield the shapes [N, C, H, W] of the suite ``op``, each with its shortcut."""

    def shapes(kind: tuple[tuple[int, int], ...]) -> Iterator[tuple[int, int, int, int]]:
        for channels, size in kind[:1] if settings.largest_only else kind:
            scaled = max(1, round(size * settings.image_size / 224))
            yield settings.batch_size, channels, scaled, scaled

    for shortcut, kind in (("none", INSIDE), ("residual", ENDS), ("dual", ENDS)):
        for shape in shapes(kind):
            yield shape, shortcut


def measure_op(settings: Settings) -> Iterator[Row]:
    """Time the operation at every shape."""
    clock = make_clock(settings.device)
    for dtype in settings.dtypes:
        engine = settings.serving_engine(dtype)
        for shape, shortcut in op_cases(settings):
            stock = Operation.make(shape, shortcut, DTYPES[dtype], settings.device, settings.engine)
            peers = {STOCK: stock, FUSED: stock.by(FUSED)}
            refused = refusal({name: peer.by(name) for name, peer in peers.items()}, stock.by(EXACT))
            passes: dict[str, dict[str, Callable[[], object]]] = {
                "forward": {name: peer.forward for name, peer in peers.items()},
                "forward+backward": {name: peer.forward_backward for name, peer in peers.items()},
            }
            for name, runs in passes.items():
                values = {} if refused else take_turns(runs, clock, warmup=3, repeats=settings.op_repeats)
                case = {"shape": "x".join(map(str, shape)), "shortcut": shortcut, "dtype": dtype, "pass": name}
                yield Row("op", case, engine, SECONDS, values, refused)


def measure_model(settings: Settings) -> Iterator[Row]:
    """Time a whole training step of every network."""
    clock = make_clock(settings.device)
    for workload in workloads(settings):
        names = model_peers(settings)
        refused = step_refusal(workload, names)
        values = {}
        if not refused:
            steps = {name: TrainingStep(workload, name) for name in names}
            values = take_turns(steps, clock, warmup=2, repeats=settings.model_repeats)
        case = {"model": workload.model, "dtype": workload.dtype}
        yield Row("model", case, settings.serving_engine(workload.dtype), SECONDS, values, refused)


def measure_memory(settings: Settings) -> Iterator[Row]:
    """Count what a training step of every network keeps for its backward, and on a GPU its peak."""
    for workload in workloads(settings):
        refused = step_refusal(workload, (STOCK, FUSED))
        measures: dict[str, Callable[[TrainingStep], int]] = {
            "activations": lambda step: activation_bytes(lambda: step.loss(step.logits()), step.state())
        }
        if workload.device.type == "cuda":
            measures["peak"] = lambda step: peak_bytes(step, step.workload.device)
        for name, measure in measures.items():
            values = (
                {} if refused else {peer: (float(measure(TrainingStep(workload, peer))),) for peer in (STOCK, FUSED)}
            )
            case = {"model": workload.model, "dtype": workload.dtype, "memory": name}
            yield Row("memory", case, settings.serving_engine(workload.dtype), BYTES, values, refused)


def workloads(settings: Settings) -> Iterator[Workload]:
    """Yield every network in every dtype."""
    for name in settings.models:
        for dtype in settings.dtypes:
            yield Workload(name, settings.batch_size, settings.image_size, dtype, settings.device, settings.engine)


def refusal(peers: Mapping[str, Operation] | Mapping[str, TrainingStep], exact: Operation | TrainingStep) -> str | None:
    """Run every peer once; return which one is wrong, or None where all are right."""
    reference = exact.result()
    results = {name: peer.result() for name, peer in peers.items()}
    try:
        for name, result in results.items():
            if name != STOCK:
                check(name, result, results[STOCK], reference)
    except WrongResult as error:
        return str(error)
    return None


@cache
def step_refusal(workload: Workload, names: tuple[str, ...]) -> str | None:
    """Return which peer's training step is wrong, or None; asked by two suites, computed once."""
    small = replace(workload, batch_size=min(workload.batch_size, CHECKED_IMAGES))
    return refusal({name: TrainingStep(small, name) for name in names}, TrainingStep(small, EXACT))


def model_peers(settings: Settings) -> tuple[str, ...]:
    """Return who trains: the compiled peer only where it is asked for."""
    return (STOCK, FUSED, COMPILED) if settings.compile else (STOCK, FUSED)


@dataclass(frozen=True)
class Suite:
    """A set of cases that are measured alike.

    Attributes
    ----------
    name, title
        What it is called, and what it measures.
    columns
        What its cases are told apart by, each with the width of its widest entry.
    quantity
        What is measured.
    peers
        Who is measured, stock first.
    measure
        The rows, each as soon as it is measured.
    """

    name: str
    title: str
    columns: Mapping[str, int]
    quantity: Quantity
    peers: Callable[[Settings], tuple[str, ...]]
    measure: Callable[[Settings], Iterator[Row]]


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "op",
            "relu(batch_norm(x) + shortcut) at the shapes of a ResNet-50",
            {"shape": 14, "shortcut": 8, "dtype": 5, "pass": 16},
            SECONDS,
            lambda _: (STOCK, FUSED),
            measure_op,
        ),
        Suite(
            "model",
            "a training step: forward, cross entropy, backward, SGD",
            {"model": 9, "dtype": 5},
            SECONDS,
            model_peers,
            measure_model,
        ),
        Suite(
            "memory",
            "activations that a training step keeps for its backward",
            {"model": 9, "dtype": 5, "memory": 11},
            BYTES,
            lambda _: (STOCK, FUSED),
            measure_memory,
        ),
    )
}
