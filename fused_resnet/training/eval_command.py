"""``fused-resnet eval``."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fused_resnet import models
from fused_resnet.engines import EngineError
from fused_resnet.models.weights import load_weights
from fused_resnet.surgery import fuse
from fused_resnet.training import data
from fused_resnet.training.device import resolve_device
from fused_resnet.training.evaluation import Evaluation, evaluate
from fused_resnet.training.extras import require_extras
from fused_resnet.training.files import FORMAT_KEY, RunFolder, read_weights
from fused_resnet.training.network import make_network
from fused_resnet.training.precision import PRECISIONS, Forward, memory_format
from fused_resnet.training.published import Published, published
from fused_resnet.training.recipe import Recipe, require

if TYPE_CHECKING:
    Subcommands = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLES = """\
examples:
  fused-resnet eval runs/NAME                        the test error of a run, on its own data set
  fused-resnet eval runs/NAME --crops 10             the paper's ten crops, their probabilities averaged
  fused-resnet eval --model torchvision:resnet50 --weights IMAGENET1K_V1 --data imagenet --data-dir /data/ilsvrc
  fused-resnet eval weights.pth --model resnet18 --data folder --data-dir pictures

A test image of imagenet or folder is resized to a shorter side of 256 pixels for crops of 224, and standardized by
ImageNet's mean and deviation for each channel.
"""


@dataclass(frozen=True)
class Subject:
    """What is evaluated, on what: of a checkpoint's recipe where it has one, and of the options."""

    model: str
    shortcut: str | None
    data: str
    data_dir: Path | None
    image_size: int


def add_eval(subcommands: "Subcommands") -> None:
    """Declare ``eval``."""
    parser = subcommands.add_parser(
        "eval",
        help="top-1 and top-5 error of a checkpoint, with the paper's beside it",
        description="Measure the top-1 and top-5 error of a network on test images.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run_eval)
    what = parser.add_argument_group("what").add_argument
    what(
        "checkpoint",
        type=Path,
        nargs="?",
        metavar="CHECKPOINT",
        help="a run folder, its checkpoint.pt, or a file of weights (a state_dict) for --model",
    )
    what("--model", metavar="NAME", help=f"{', '.join(models.names())}, torchvision:NAME or timm:NAME")
    what("--shortcut", metavar="OPTION", help="the model's shortcuts (default: the run's, else the model's own)")
    what("--weights", metavar="NAME", help="weights that the model knows by name, such as IMAGENET1K_V1")
    what("--data", metavar="NAME", help=f"{', '.join(data.names())} (default: the run's)")
    what("--data-dir", type=Path, metavar="FOLDER", help="where the data set is (default: the run's, else data/NAME)")
    what("--image-size", type=int, metavar="PIXELS", help="of a crop (default: the run's, else 224)")

    how = parser.add_argument_group("how").add_argument
    how("--crops", type=int, choices=data.TEST_CROPS, default=1, help="views of an image (default: %(default)s)")
    how("--batch-size", type=int, metavar="N", default=64, help="images at a time (default: %(default)s)")
    how("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda (default: %(default)s)")
    how("--precision", choices=PRECISIONS, default="fp32", help="(default: %(default)s)")
    how("--engine", default="auto", help="that serves the fused blocks (default: %(default)s)")
    how("--stock", action="store_true", help="without fusion")
    how("--workers", type=int, metavar="N", help="processes that decode image files (default: one for each core)")
    how("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    how("--json", action="store_true", help="print JSON")


def run_eval(options: argparse.Namespace) -> int:
    """Measure and print."""
    try:
        subject, model, source = prepare(options)
    except (ValueError, OSError, ImportError, EngineError) as error:
        print(f"fused-resnet eval: error: {error}", file=sys.stderr)
        return 2
    forward = Forward(model.eval(), options.precision, channels_last=True)
    start = time.perf_counter()
    batches = source.test_batches(options.batch_size, options.crops)
    result = evaluate(forward, with_progress(batches, source.test_size))
    speed = result.images / (time.perf_counter() - start)
    beside = published(subject.data, subject.model, options.crops)
    if options.json:
        json.dump(record(subject, options, result, beside), sys.stdout, indent=2)
        print()
        return 0
    crops = "1 crop" if options.crops == 1 else f"{options.crops} crops"
    print(
        f"{subject.model} on {subject.data}: {result.images} images, {crops}, {options.precision}, {speed:.0f} images/s"
    )
    print(f"  top-1 error {result.top1:7.2%}   top-5 error {result.top5:7.2%}   loss {result.loss:.4f}")
    for row in beside:
        top5 = "      -" if row.top5 is None else f"{row.top5:6.2f}%"
        shortcut = f", shortcuts {row.shortcut}" if row.shortcut else ""
        print(f"  published   {row.top1:6.2f}%               {top5}   {row.source}{shortcut}")
    return 0


def prepare(options: argparse.Namespace) -> tuple[Subject, nn.Module, data.Source]:
    """Return what the options ask for, the network with its weights, and the data set."""
    for name, least in (("batch_size", 1), ("threads", 1), ("workers", 0), ("image_size", 32)):
        value = getattr(options, name)
        require(f"--{name.replace('_', '-')}", value, value is None or value >= least, f"at least {least}")
    path, recipe = read_checkpoint(options)
    subject = read_subject(options, recipe)
    require_extras(subject.data, run=False)
    device = resolve_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    source = data.load(
        subject.data, subject.data_dir, image_size=subject.image_size, workers=options.workers, device=device
    )
    model = make_network(
        subject.model,
        channels=source.channels,
        num_classes=source.num_classes,
        shortcut=subject.shortcut,
        weights=options.weights,
    )
    if path is not None:
        load_weights(model, subject.model, path)
    model.to(device).to(memory_format=memory_format(channels_last=True))  # type: ignore[call-overload]
    if not options.stock:
        fuse(model, engine=options.engine)
    return subject, model, source


def read_checkpoint(options: argparse.Namespace) -> tuple[Path | None, dict[str, Any]]:
    """Return the checkpoint's path and the recipe in it, which is empty in those of others."""
    if options.checkpoint is None:
        if options.weights is None:
            raise ValueError("nothing to evaluate: name a run folder or a checkpoint, or --model with --weights")
        return None, {}
    path: Path = RunFolder(options.checkpoint).checkpoint if options.checkpoint.is_dir() else options.checkpoint
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint to evaluate: {path} does not exist")
    if options.weights is not None:
        raise ValueError(f"--weights {options.weights} and {path} are both weights: leave one out")
    state = read_weights(path)
    return path, state["recipe"] if isinstance(state, dict) and FORMAT_KEY in state else {}


def read_subject(options: argparse.Namespace, recipe: dict[str, Any]) -> Subject:
    """Return what is evaluated: the options', else the recipe's."""
    model = options.model or recipe.get("model")
    if model is None:
        raise ValueError("--model must be the name of the network that these weights are for; got none")
    name = options.data or recipe.get("data")
    if name not in data.names():
        raise ValueError(f"--data must be one of {', '.join(data.names())}; got {name!r}")
    folder = options.data_dir
    if folder is None and name == recipe.get("data") and recipe.get("data_dir") is not None:
        folder = Path(recipe["data_dir"])
    size = options.image_size or recipe.get("image_size") or Recipe.image_size
    return Subject(model, options.shortcut or recipe.get("shortcut"), name, folder, size)


def with_progress(batches: Iterable[tuple[Tensor, Tensor]], images: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches, with a progress bar on a terminal."""
    from tqdm import tqdm

    shown = sys.stderr.isatty()
    with tqdm(total=images, unit=" images", leave=False, dynamic_ncols=True, disable=not shown) as bar:
        for views, labels in batches:
            yield views, labels
            bar.update(len(labels))


def record(
    subject: Subject, options: argparse.Namespace, result: Evaluation, beside: list[Published]
) -> dict[str, Any]:
    """Return the result for JSON; errors are fractions, but for the published ones, in percent."""
    return {
        "model": subject.model,
        "data": subject.data,
        "crops": options.crops,
        "precision": options.precision,
        **dataclasses.asdict(result),
        "published": [row._asdict() for row in beside],
    }
