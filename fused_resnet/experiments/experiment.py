"""An experiment: networks that differ in one thing, trained alike, each from several seeds."""

import csv
import dataclasses
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fused_resnet.system.atomic import replacing
from fused_resnet.training import EpochMetrics, Recipe, RunFolder, Trainer
from fused_resnet.training.recipe import require


@dataclass(frozen=True)
class Network:
    """A network as an experiment names it, and what makes it.

    Parameters
    ----------
    label : str
        In the figure, in the table and in the name of the run's folder.
    model : str
        A name that `fused_resnet.models.create` knows.
    shortcut : str, optional
        The model's option of the paper's section 3.3; its own default otherwise.
    """

    label: str
    model: str
    shortcut: str | None = None


@dataclass(frozen=True)
class Panel:
    """Networks that are drawn into one pair of axes, and compared: the first is what the last is measured against."""

    title: str
    networks: Sequence[Network]


@dataclass(frozen=True)
class Result:
    """What one network did from one seed: its metrics after every epoch."""

    network: Network
    seed: int
    history: Sequence[EpochMetrics]


@dataclass(frozen=True)
class Experiment:
    """Networks, grouped into panels, each trained by `recipe` from the seeds 0, 1, ...

    Parameters
    ----------
    name : str
        Of the files: ``NAME.csv``, ``NAME.png``.
    title : str
        The figure's heading.
    panels : sequence of Panel
        The networks.
    recipe : Recipe
        What all runs have in common; model, shortcut and seed are each run's own.
    seeds : int
        Runs of each network.
    """

    name: str
    title: str
    panels: Sequence[Panel]
    recipe: Recipe
    seeds: int

    def __post_init__(self) -> None:
        require("seeds", self.seeds, self.seeds >= 1, "at least 1")

    @property
    def networks(self) -> list[Network]:
        """Every network, panel by panel."""
        return [network for panel in self.panels for network in panel.networks]

    def trainers(self, folder: Path) -> Iterator[tuple[Network, Trainer]]:
        """Yield a trainer for every run, seed by seed, that continues what is in its subfolder ``LABEL-seed-N``.

        Raises
        ------
        ValueError
            A subfolder holds a run by another recipe.
        OSError
            A subfolder cannot be made or read.
        """
        for seed in range(self.seeds):
            for network in self.networks:
                recipe = dataclasses.replace(self.recipe, model=network.model, shortcut=network.shortcut, seed=seed)
                yield network, continue_or_start(recipe, folder / f"{network.label}-seed-{seed}")


def continue_or_start(recipe: Recipe, path: Path) -> Trainer:
    """Return a trainer for the run in a folder, which is a new one unless the folder holds one by the same recipe.

    Raises
    ------
    ValueError
        It holds one by another recipe; the message names what differs.
    """
    if not RunFolder(path).checkpoint.exists():
        return Trainer.start(recipe, path)
    trainer = Trainer.resume(path)
    wanted, found = dataclasses.asdict(recipe), dataclasses.asdict(trainer.recipe)
    differing = [f"{name} {found[name]}, not {wanted[name]}" for name in wanted if wanted[name] != found[name]]
    if differing:
        raise ValueError(
            f"{path} holds a run with {'; '.join(differing)}: take the same options to continue it, or another --out"
        )
    return trainer


def write_csv(results: Sequence[Result], path: Path) -> None:
    """Write a row for every network, seed and epoch; errors are fractions of the images."""
    columns = [f.name for f in dataclasses.fields(EpochMetrics) if f.name not in ("images_per_second", "seconds")]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["network", "seed", *columns])
    for result in results:
        for metrics in result.history:
            values = [f"{getattr(metrics, column):.6g}" for column in columns]
            rows.writerow([result.network.label, result.seed, *values])
    with replacing(path) as file:
        file.write(text.getvalue().encode())
