"""The JSON file of a run: every value, and where and how it was measured."""

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fused_resnet.atomic import replacing
from fused_resnet.bench.harness import Row
from fused_resnet.bench.suites import Settings
from fused_resnet.environment import environment

FORMAT = 1


def make_record(command: str, settings: Settings, rows: Sequence[Row]) -> dict[str, Any]:
    """Return a run as plain data."""
    return {
        "format": FORMAT,
        "command": command,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(settings.device),
        "settings": {name: _plain(value) for name, value in vars(settings).items()},
        "rows": [row.record() for row in rows],
    }


def _plain(value: object) -> object:
    return str(value) if isinstance(value, torch.device) else value


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write the file, whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(record, indent=2) + "\n").encode())
