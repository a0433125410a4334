"""The JSON file of a run: every value, and where and how it was measured."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fused_resnet.bench.rows import Row
from fused_resnet.bench.settings import Settings
from fused_resnet.system.atomic import replacing

FORMAT = 2
READABLE = (1, 2)


def make_record(
    command: str, environment: Mapping[str, Any], settings: Settings, rows: Sequence[Row]
) -> dict[str, Any]:
    """Return a run as plain data; `environment` is what ``fused_resnet.system.environment`` said at its start."""
    return {
        "format": FORMAT,
        "command": command,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": dict(environment),
        "settings": {name: _plain(value) for name, value in vars(settings).items()},
        "rows": [row.record() for row in rows],
    }


def _plain(value: object) -> object:
    return str(value) if isinstance(value, torch.device | Path) else value


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write the file, whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(record, indent=2) + "\n").encode())


@dataclass(frozen=True)
class Record:
    """A run that was kept.

    Attributes
    ----------
    path
        Its file.
    command, time
        What was typed, and when the last row was measured, UTC.
    environment, settings
        As they were written.
    rows
        What was measured.
    """

    path: Path
    command: str
    time: str
    environment: dict[str, Any]
    settings: dict[str, Any]
    rows: tuple[Row, ...]


def read_record(path: Path) -> Record:
    """Read a file that `write_record` wrote.

    Raises
    ------
    ValueError
        It is no such file, or from a format that this version does not know.
    """
    try:
        data = json.loads(path.read_text())
        if data["format"] not in READABLE:
            raise ValueError(f"its format is {data['format']}, this version reads {READABLE}")
        rows = tuple(map(Row.read, data["rows"]))
        return Record(path, data["command"], data["time"], data["environment"], data["settings"], rows)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must be a record of fused-resnet bench --json: {error!r}") from error
