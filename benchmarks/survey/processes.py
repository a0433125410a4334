"""A process for each network, and what ended it."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

from benchmarks.survey.measure import measure, versions
from benchmarks.survey.rows import Limits, Row


@dataclass
class Running:
    """A process that measures a network, until when it may, and the files that it leaves."""

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
                        rows.append(finish(job, limits))
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


def finish(job: Running, limits: Limits) -> Row:
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
