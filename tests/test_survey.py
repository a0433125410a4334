"""A dozen of other people's networks, each in a process of its own; ``python -m benchmarks.survey`` has them all."""

import dataclasses
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # also for the processes that the survey starts
    sys.path.insert(0, str(ROOT))

from benchmarks.survey.__main__ import main  # noqa: E402
from benchmarks.survey.measure import Record, Snapshot  # noqa: E402
from benchmarks.survey.networks import PACKAGES, networks  # noqa: E402
from benchmarks.survey.page import findings, summary  # noqa: E402
from benchmarks.survey.processes import Running, finish, survey  # noqa: E402
from benchmarks.survey.rows import Limits, Row, read_rows, write_rows  # noqa: E402

NETWORKS = (
    "torchvision:resnet18",
    "torchvision:regnet_y_400mf",
    "torchvision:mobilenet_v2",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:squeezenet1_1",  # no batch norm: nothing to fuse
    "torchvision:lraspp_mobilenet_v3_large",
    "torchvision:quantized_resnet18",
    "timm:resnet10t",
    "timm:seresnet18",
    "timm:regnetx_002",
    "timm:test_byobnet",
    "timm:ese_vovnet19b_slim_dw",
    "transformers:MobileNetV1ForImageClassification",
)


def test_what_is_fused_is_right_and_nothing_else_is_touched():
    for package in PACKAGES:
        pytest.importorskip(package)
    rows = {row.name: row for row in survey(NETWORKS, Limits(seconds=120, verify_seconds=60))}
    assert list(rows) == list(NETWORKS)
    assert not [f"{row.name}: {row.not_built or row.remarkable}" for row in rows.values() if row.not_built]
    assert not [f"{row.name}: {row.remarkable}" for row in rows.values() if row.remarkable]
    assert rows["torchvision:squeezenet1_1"].note == "nothing is fused"
    for row in rows.values():
        assert 0 <= row.in_chains <= row.norms, row
        assert not row.chains or row.verify in ("ok", "noise"), row
    for name in ("torchvision:resnet18", "timm:resnet10t"):
        assert rows[name].in_chains == rows[name].norms_2d == rows[name].norms > 0, rows[name]


def end_by_a_signal(name, made_with, limits, path, log):
    record = Record(Row(name, made_with, norms=3), path)
    record.enter("fuse")
    os.kill(os.getpid(), signal.SIGSEGV)


def never_end(name, made_with, limits, path, log):
    Record(Row(name, made_with), path).enter("verify")
    signal.pause()


@pytest.mark.parametrize(
    ("target", "ended"),
    [(end_by_a_signal, "ended by signal 11 in fuse"), (never_end, "out of time after 1 s in verify")],
)
def test_a_process_that_ends_is_a_row(tmp_path, target, ended):
    """The processes are forks of this one: what they do is Python's alone."""
    path = tmp_path / "0.json"
    process = multiprocessing.get_context("fork").Process(
        target=target, args=("timm:x", "timm 1", Limits(), path, path.with_suffix(".log"))
    )
    process.start()
    job = Running("timm:x", process, 0.0, path, path.with_suffix(".log"))
    process.join(timeout=60 if target is end_by_a_signal else 1)  # a busy machine takes its time to end it
    row = finish(job, Limits(seconds=1))
    assert row.ended == ended
    assert row.versions == "timm 1"
    assert "ended: " in row.remarkable


def test_rows_come_back_from_their_file(tmp_path):
    rows = [
        Row("timm:a", "timm 1, torch 2", parameters=12, norms=3, norms_2d=2, in_chains=1, chains=1, first=0.5),
        Row("timm:b", not_built='ValueError: "no", says it', seconds=1.25),
    ]
    write_rows(tmp_path / "rows.csv", rows)
    assert list(read_rows(tmp_path / "rows.csv").values()) == rows
    (tmp_path / "rows.csv").write_text("name,other\n")
    with pytest.raises(ValueError, match="other columns"):
        read_rows(tmp_path / "rows.csv")


def test_the_summary_counts_what_was_built():
    row = Row("timm:a", norms=4, norms_2d=4, in_chains=3, chains=2, first=0.5, verify="ok", parameters=1)
    rows = [
        row,
        dataclasses.replace(row, name="torchvision:b", verify="failed", note="conv1", first=2.0),
        Row("timm:c", not_built="ImportError: none"),
        dataclasses.replace(row, name="timm:d", ended="ended by signal 11 in verify", verify=""),
    ]
    *_, timm, everything = summary(rows).splitlines()
    cells = [cell.strip() for cell in timm.strip("|").split("|")]
    assert " ".join(cells).startswith("timm 2 2 8 6 75% 4 1 0 0 1 0 0 0 ")
    assert "2.00 s (b)" in everything
    found = findings(rows)
    assert "`torchvision:b`: verify: conv1" in found
    assert "`timm:c`: ImportError: none" in found
    assert "`timm:d`: ended: ended by signal 11 in verify" in found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m[0].weight.data.add_(1), "0.weight (bytes)"),
        (lambda m: m[1].running_mean.add_(0), "1.running_mean (version 1 → 2)"),
        (lambda m: m[1].eval(), "1: attributes ['training']"),
        (lambda m: setattr(m[0], "more", 1), "0: attributes ['more']"),
        (lambda m: m[0].register_forward_hook(lambda *_: None), "0: attributes ['_forward_hooks']"),
        (lambda m: torch.rand(1), "torch's generator"),
    ],
)
def test_a_snapshot_sees_what_changed(change, said):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = Snapshot(model)
    assert Snapshot(model).differences(before, modules=True) == ""
    change(model)
    assert Snapshot(model).differences(before, modules=True) == said


def test_the_default_selection_has_every_file_of_timm():
    timm = pytest.importorskip("timm")
    chosen = {name.partition(":")[2] for name in networks(["timm"])}
    for file in timm.list_modules():
        assert len(chosen & set(timm.list_models(module=file))) >= min(3, len(timm.list_models(module=file))), file


def test_bad_input_says_what_was_wanted(capsys, tmp_path):
    results = ["--results", str(tmp_path / "rows.csv")]
    assert main(["--only", "no such network", *results]) == 2
    assert "no network of" in capsys.readouterr().err
    assert main(["--only", "(", *results]) == 2
    assert main(["--jobs", "0", *results]) == 2
    assert "--jobs must be 1 or more, got 0" in capsys.readouterr().err
