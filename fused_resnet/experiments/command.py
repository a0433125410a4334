"""``fused-resnet experiment``: the paper's comparisons, on handwritten digits in minutes or on any other data set."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fused_resnet.engines import EngineError
from fused_resnet.experiments.experiment import Experiment, Result, write_csv
from fused_resnet.experiments.figure import draw
from fused_resnet.experiments.paper import degradation, shortcuts
from fused_resnet.experiments.table import comparisons, table
from fused_resnet.system.atomic import replacing
from fused_resnet.training import TrainingDiverged, data
from fused_resnet.training.command import INTERRUPTED

if TYPE_CHECKING:
    Subcommands = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLES = """\
examples:
  fused-resnet experiment degradation               plain and residual networks of 20 and 56 layers, on digits
  fused-resnet experiment degradation --depths 20 32 44 56 --data cifar10        the paper's figure 6 by its recipe
  fused-resnet experiment degradation --depths 18 34 --data imagenet --data-dir /data/ilsvrc         its figure 4
  fused-resnet experiment shortcuts                 options A, B and C, and none, in 32 layers

The same command again continues what was interrupted. The folder holds NAME.csv (a row for each network, seed and
epoch; errors are fractions), NAME.png, and a folder of each run, as fused-resnet train leaves it.
"""


def add_experiment(subcommands: "Subcommands") -> None:
    """Declare ``experiment``."""
    parser = subcommands.add_parser(
        "experiment",
        help="repeat the paper's comparisons: degradation, shortcuts",
        description="Train several networks by one recipe from several seeds; draw their errors and print a table.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    experiments = parser.add_subparsers(title="experiments", metavar="EXPERIMENT", required=True)

    one = add_one(experiments, "degradation", degradation, "plain beside residual networks of several depths")
    one.add_argument("--depths", type=int, nargs="+", default=[20, 56], metavar="N", help="(default: 20 56)")

    one = add_one(experiments, "shortcuts", shortcuts, "the shortcuts A, B and C, and none, at one depth")
    one.add_argument("--depth", type=int, default=32, metavar="N", help="(default: %(default)s)")


def add_one(
    experiments: "Subcommands", name: str, design: Callable[..., Experiment], summary: str
) -> argparse.ArgumentParser:
    """Declare an experiment with the options that all have."""
    parser = experiments.add_parser(
        name,
        help=summary,
        description=f"Train and compare {summary}.",
        argument_default=argparse.SUPPRESS,  # what is not given is left to the recipe
    )
    parser.set_defaults(run=run_experiment, design=design, name=name)
    add = parser.add_argument
    add("--out", type=Path, metavar="FOLDER", default=None, help=f"(default: runs/{name}-DATA)")
    add("--data", metavar="NAME", default="digits8x8", help=f"{', '.join(data.names())} (default: %(default)s)")
    add("--data-dir", metavar="FOLDER", help="where the data set is (default: data/NAME)")
    add("--seeds", type=int, metavar="N", default=3, help="runs of each network (default: %(default)s)")
    add("--epochs", type=int, metavar="N", help="of each run (default: the recipe's)")
    add("--lr", type=float, help="first learning rate (default: the recipe's)")
    add("--device", help="auto (the GPU if there is one), cpu, cuda (default: auto)")
    add("--stock", dest="fuse", action="store_false", help="train without fusion")
    add("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    return parser


def run_experiment(options: argparse.Namespace) -> int:
    """Train what is left to train, then write the figure and the rows, and print the table."""
    given = vars(options)
    name, folder, design = given.pop("name"), given.pop("out"), given.pop("design")
    given.pop("run")
    folder = folder or Path("runs") / f"{name}-{options.data}"
    try:
        experiment = design(**given)
        results = train(experiment, folder)
        figure = write(experiment, results, folder)
    except (ValueError, OSError, ImportError, EngineError) as error:
        print(f"fused-resnet experiment: error: {error}", file=sys.stderr)
        return 2
    except TrainingDiverged as error:
        print(f"fused-resnet experiment: error: {error}; what was trained is in {folder}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was trained is in {folder}, and the same command continues it")
        return INTERRUPTED
    print(table(experiment.panels, results))
    print(*comparisons(experiment.panels, results), sep="\n")
    print(f"{figure} and {figure.with_suffix('.csv')}")
    return 0


def train(experiment: Experiment, folder: Path) -> list[Result]:
    """Run or continue every run, with a progress bar over them on a terminal, and a line for each."""
    from tqdm import tqdm

    results = []
    with tqdm(
        total=experiment.seeds * len(experiment.networks),
        unit=" runs",
        dynamic_ncols=True,
        file=sys.stdout,
        disable=not sys.stdout.isatty(),
    ) as bar:
        for network, trainer in experiment.trainers(folder):
            seed = trainer.recipe.seed
            bar.set_description(f"{network.label}, seed {seed}")
            trainer.run(report=lambda metrics: None)
            last = trainer.history[-1]
            errors = f"training error {last.train_error:.2%}, test error {last.test_error:.2%}"
            bar.write(f"{network.label}, seed {seed}: {errors}", file=sys.stdout)
            bar.update()
            results.append(Result(network, seed, trainer.history))
    return results


def write(experiment: Experiment, results: list[Result], folder: Path) -> Path:
    """Write the rows and the figure; return where that is."""
    write_csv(results, folder / f"{experiment.name}.csv")
    figure = folder / f"{experiment.name}.png"
    with replacing(figure) as file:
        draw(experiment.panels, results, experiment.title, file)
    return figure
