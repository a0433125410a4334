"""What is known of one network, and its line in a file."""

import csv
import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_resnet.system.atomic import replacing


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
    left: str = ""  # why the others are in none, without their names: REASON ×N; …
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


def one_line(error: BaseException) -> str:
    """Return what an error says, with its class, as a row has it."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
