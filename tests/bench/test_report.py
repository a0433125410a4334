import dataclasses
import json
from pathlib import Path

import pytest
import torch

from fused_resnet.bench.record import make_record, read_record, write_record
from fused_resnet.bench.report import TUNING, write_report
from fused_resnet.bench.rows import BYTES, IMAGES_PER_SECOND, SECONDS, Limit, Row
from fused_resnet.bench.settings import Settings

ROOT = Path(__file__).parents[2]
HERE = {
    "gpu": "NVIDIA H200",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "cudnn": 91500,
    "driver": "580.1",
    "commit": "0123456789abcdef",
    "cpu": "a CPU",
    "instruction_set": "AVX512",
    "threads": 2,
}
ROWS = (
    Row(
        "op",
        {"shape": "64x56x56", "shortcut": "none", "dtype": "bf16", "pass": "fwd"},
        "triton",
        SECONDS,
        {"stock": (2e-3, 2e-3, 2e-3), "fused": (1e-3, 1e-3, 1e-3)},
        limit=Limit(8e6, 0, 8e-4),
    ),
    Row(
        "model",
        {"model": "resnet50", "dtype": "bf16"},
        "triton",
        SECONDS,
        {"stock": (0.2, 0.2, 0.2), "compile": (0.16, 0.16, 0.16)},
        {"fused": "fused triton is wrong: output logits"},
        images=256,
    ),
    Row("memory", {"model": "resnet50", "memory": "peak"}, "cuda", BYTES, {"stock": (4e9,), "fused": (3e9,)}),
    Row("roofline", {"figure": "DRAM"}, "", BYTES, {"eager": (480e6,), "fused": (388e6,)}),
    Row("roofline", {"figure": "speed"}, "", IMAGES_PER_SECOND, {"eager": (6000.0,), "fused": (7000.0,)}),
)


@pytest.fixture
def kept(tmp_path):
    """A folder of results with one device and one run."""
    path = tmp_path / "results" / "nvidia-h200" / "model.json"
    path.parent.mkdir(parents=True)
    settings = dataclasses.replace(Settings(), batch_size=256, device=torch.device("cuda"), cuda_graph=True)
    record = make_record("fused-resnet bench model", HERE, settings, ROWS)
    write_record(path, record | {"time": "2026-01-01T00:00:00+00:00"})
    return path


def test_a_record_is_read_as_it_was_written(kept):
    record = read_record(kept)
    assert record.rows == ROWS
    assert record.environment == HERE
    assert record.settings["device"] == "cuda"
    assert record.settings["cuda_graph"] is True


def test_the_page_is_made_of_records_alone(kept, tmp_path):
    write_report(tmp_path / "results", tmp_path / "without.md")
    (kept.parent / TUNING).write_text("{}")
    write_report(tmp_path / "results", tmp_path / "with.md")
    assert (tmp_path / "without.md").read_text() == (tmp_path / "with.md").read_text()


def test_the_page_says_where_how_and_what(kept, tmp_path):
    page = tmp_path / "docs" / "benchmarks.md"
    page.parent.mkdir()
    assert write_report(kept.parents[1], page) == [page, page.parent / "bench-nvidia-h200-model.png"]
    lines = page.read_text().splitlines()
    for line in (
        "## nvidia-h200",
        "### [model](../benchmarks/results/nvidia-h200/model.json)",
        "`fused-resnet bench model`  ",
        "NVIDIA H200; torch 2.11.0, triton 3.6.0, cudnn 91500, driver 580.1; commit `0123456789ab`; "
        "2026-01-01T00:00:00+00:00  ",
        "256 images of 224×224, train, CUDA graphs, channels_last",
        "| 64x56x56 | none | bf16 | fwd | 2.000 (40% of the limit) | 1.000 (80% of the limit) | **2.00 (2.00–2.00)** |",
        "| resnet50 | bf16 | 200.0 (1280 img/s) | 160.0 (1600 img/s) | refused: fused triton is wrong: output logits "
        "| 1.25 (1.25–1.25) |  |",
        "| resnet50 | peak | 4000 | 3000 | **0.75** |",
        "| DRAM | 480.0 MB | 388.0 MB |",
        "| speed | 6000 img/s | 7000 img/s |",
        "![ratios to stock](bench-nvidia-h200-model.png)",
    ):
        assert line in lines


def test_the_same_records_give_the_same_bytes(kept, tmp_path):
    pages = [tmp_path / name / "benchmarks.md" for name in ("one", "two")]
    for page in pages:
        page.parent.mkdir()
    first, second = ([path.read_bytes() for path in write_report(kept.parents[1], page)] for page in pages)
    assert first == second


def test_the_page_of_this_checkout_is_what_its_records_say(tmp_path):
    page = tmp_path / "benchmarks.md"
    write_report(ROOT / "benchmarks" / "results", page)
    assert (ROOT / "docs" / "benchmarks.md").read_text() == page.read_text(), "run: fused-resnet bench report"


def test_what_the_page_links_to_is_there():
    import re

    text = (ROOT / "docs" / "benchmarks.md").read_text()
    linked = re.findall(r"\]\(([^)]+)\)", text)
    assert linked
    assert [link for link in linked if not (ROOT / "docs" / link).exists()] == []


def test_runs_are_in_the_order_of_their_numbers(kept, tmp_path):
    for name in ("batch-32", "batch-8"):
        (kept.parent / f"{name}.json").write_bytes(kept.read_bytes())
    page = tmp_path / "benchmarks.md"
    write_report(kept.parents[1], page)
    heads = [line for line in page.read_text().splitlines() if line.startswith("### ")]
    assert [line[5 : line.index("]")] for line in heads] == ["batch-8", "batch-32", "model"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", json.dumps({"format": 99, "command": "", "time": "", "environment": {}, "settings": {}})]
)
def test_another_file_is_no_record(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run.json must be a record of fused-resnet bench --json"):
        read_record(path)


def test_no_record_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"--results must hold DEVICE/WHAT\.json"):
        write_report(tmp_path, tmp_path / "page.md")
