"""What a training step costs more because several processes share it.

    torchrun --nproc-per-node 8 benchmarks/distributed.py --model resnet50 --precision bf16 --batch-size 2048
    torchrun --nproc-per-node 2 benchmarks/distributed.py --model resnet18 --batch-size 8 --image-size 64    on a CPU

Every rank takes steps on random images under DistributedDataParallel and, by turns, the same steps under its no_sync,
which leaves the gradients where they are. What the first take longer is the share of communication; that a rank waits
for a slower one counts as such.
"""

import argparse
import dataclasses
import shlex
import statistics
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from fused_resnet.bench.harness import make_clock, take_turns
from fused_resnet.bench.record import write_record
from fused_resnet.system.environment import environment
from fused_resnet.training import Recipe, RunFolder, Trainer, named
from fused_resnet.training.distributed import World
from fused_resnet.training.step import EagerStep

WARMUP = 5
TIMEOUT = 300  # seconds


def read_options() -> argparse.Namespace:
    """Read the command line."""
    summary, *_ = __doc__.partition("\n")
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--model", metavar="NAME", default="resnet50", help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="images of all ranks (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224, help="(default: %(default)s)")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16 or fp16 (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu (default: %(default)s)")
    parser.add_argument("--stock", action="store_true", help="without fusion")
    parser.add_argument("--compile", action="store_true", help="under torch.compile")
    parser.add_argument("--sync-batch-norm", action="store_true", help="batch norm over the batch of all ranks")
    parser.add_argument("--repeats", type=int, metavar="N", default=20, help="rounds (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="record every value and the environment")
    return parser.parse_args()


def measure(trainer: Trainer, repeats: int) -> dict[str, Any]:
    """Return the seconds of every step, shared and alone, and what this rank makes of them."""
    recipe, step = trainer.recipe, trainer.step
    assert isinstance(step, EagerStep)
    batch = trainer.world.columns(torch.arange(recipe.batch_size)[None])
    ((images, labels),) = trainer.data.train_batches(batch, recipe.augmentation, recipe.seed, epoch=1)
    trainer.model.train()

    def shared() -> None:
        step(images, labels)

    def alone() -> None:
        with step.no_sync():
            step(images, labels)

    clock = make_clock(trainer.device)
    seconds = take_turns({"shared": shared, "alone": alone}, clock, warmup=WARMUP, repeats=repeats)
    shares = [1 - alone / shared for shared, alone in zip(seconds["shared"], seconds["alone"], strict=True)]
    return {
        "rank": trainer.world.rank,
        "seconds": seconds,
        "images_per_second": len(images) / statistics.median(seconds["shared"]),
        "communication": statistics.median(shares),
    }


def main() -> None:
    """Measure on every rank; print and record on rank 0."""
    options = read_options()
    fields = {field.name for field in dataclasses.fields(Recipe)}
    changes = {name: value for name, value in vars(options).items() if name in fields}
    # a learning rate at which noise does no harm
    recipe = named(data="synthetic", fuse=not options.stock, lr=1e-3, iterations=1, **changes)
    world = World.join(TIMEOUT)
    torch.backends.cudnn.benchmark = True
    trainer = Trainer(recipe, RunFolder(Path()), world)  # which writes nothing until it runs
    ranks = world.gather(measure(trainer, options.repeats))
    if world.first:
        images = recipe.batch_size // world.world_size
        print(f"{recipe.model}, {recipe.precision}, {images} images a rank, {trainer.device.type}; medians")
        print("rank   images/s   communication")
        for row in ranks:
            print(f"{row['rank']:4d}   {row['images_per_second']:8.1f}   {row['communication']:13.1%}")
        print(f" all   {sum(row['images_per_second'] for row in ranks):8.1f}")
    if world.first and options.json is not None:
        record = {
            "command": shlex.join(["torchrun", *sys.argv]),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "environment": environment(trainer.device),
            "recipe": dataclasses.asdict(recipe),
            "ranks": ranks,
        }
        write_record(options.json, record)
    world.leave()


if __name__ == "__main__":
    main()
