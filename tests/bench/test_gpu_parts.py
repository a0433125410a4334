"""The half hour on a GPU, rehearsed on the CPU: every step is understood, and none takes another down with it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from fused_resnet import cli
from fused_resnet.bench.command import read_settings, read_suites

PATH = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
CPU = torch.device("cpu")
PARTS = ("facts", "kernels", "networks")


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def bench_words(gpu, part, device, *, quick):
    steps = [step for step in gpu.parts(device)[part] if step.records]
    assert steps
    return [gpu.command(step, device, Path("out"), quick=quick)[3:] for step in steps]


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("part", PARTS)
def test_every_step_is_understood(gpu, part, quick):
    for words in bench_words(gpu, part, CPU, quick=quick):
        options = cli.build_parser().parse_args(words)
        settings = read_settings(options, read_suites(options))
        assert settings.batch_size == (8 if quick else 256)
        assert options.json.parent == Path("out")


@pytest.mark.parametrize("part", PARTS)
def test_a_gpu_gets_graphs_both_half_precisions_and_full_batches(gpu, part):
    cuda = torch.device("cuda")
    commands = bench_words(gpu, part, cuda, quick=False)
    for words in commands:
        options = cli.build_parser().parse_args(words)  # its settings would need the GPU
        assert (options.device, options.batch_size) == ("cuda", 256)
        assert set(options.dtype) <= {"bf16", "fp16"}
    assert any("--cuda-graph" in words for words in commands)
    assert any({"bf16", "fp16"} <= set(words) for words in commands)


def test_steps_write_to_files_of_their_own(gpu):
    names = [step.name for steps in gpu.parts(CPU).values() for step in steps]
    assert len(set(names)) == len(names)


def test_the_tests_that_it_runs_are_there(gpu):
    assert all((PATH.parents[1] / path).exists() for path in (*gpu.GPU_TESTS, *gpu.POINTWISE_TESTS))


@pytest.mark.parametrize(("words", "ended"), [("pass", "done"), ("raise SystemExit(3)", "exit status 3")])
def test_how_a_step_ended_is_told(gpu, words, ended):
    assert gpu.run([sys.executable, "-c", words], 60) == ended


def test_a_step_out_of_time_is_ended_with_all_that_it_started(gpu, tmp_path):
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu.run([sys.executable, "-c", parent], 1.5) == "out of time after 2 s"
    import time

    time.sleep(4)
    assert not (tmp_path / "late").exists()


def test_a_failed_step_does_not_keep_the_next_from_running(gpu, monkeypatch, tmp_path, capsys):
    def steps(device):
        fails = gpu.Step("fails", ("-c", "raise SystemExit(1)"), 60, records=False)
        return {"facts": (fails, gpu.bench("roofline", "roofline --copy 4300 --matmul 790", 60))}

    monkeypatch.setattr(gpu, "parts", steps)
    assert gpu.main(["facts", "--device", "cpu", "--quick", "--out", str(tmp_path / "new" / "folder")]) == 1
    shown = capsys.readouterr().out
    assert "exit status 1" in shown
    rows = json.loads((tmp_path / "new" / "folder" / "roofline.json").read_text())["rows"]
    assert {row["suite"] for row in rows} == {"ceilings", "roofline"}


def test_a_part_out_of_time_begins_nothing_more(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "PART_LIMIT", 1)
    monkeypatch.setattr(gpu, "run", lambda *_: pytest.fail("began"))
    assert gpu.main(["kernels", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 1
    steps = gpu.parts(torch.device("cpu"))["kernels"]
    assert capsys.readouterr().out.count("not begun: the part is out of time") == len(steps)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_rehearsal_is_named(gpu, capsys):
    assert gpu.main(["facts"]) == 2
    assert "rehearse with --device cpu --quick" in capsys.readouterr().err
