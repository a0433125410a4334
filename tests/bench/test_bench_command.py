import argparse
import json
import re

import pytest

from fused_resnet.bench import command
from fused_resnet.bench.harness import take_turns
from fused_resnet.bench.operation import Operation
from fused_resnet.bench.suites import op


@pytest.fixture
def wrong_operation(monkeypatch):
    """Make the fused operation wrong by one percent."""
    right = Operation.forward
    monkeypatch.setattr(Operation, "forward", lambda self: right(self) * (1.01 if self.peer.name == "fused" else 1))


def test_a_quick_run_of_everything(bench, tmp_path, capsys):
    traces = tmp_path / "trace.json"
    words = ("--json", tmp_path / "run.json", "--plot", tmp_path / "run.png", "--trace", traces)
    assert bench("all", "--quick", *words) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    assert len(re.findall(r"^resnet20 .* activations ", shown, re.MULTILINE)) == 4  # memory and roofline, two dtypes
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.glob("trace-resnet20-*.json"))) == 4

    record = json.loads((tmp_path / "run.json").read_text())
    assert record.keys() == {"format", "command", "time", "environment", "settings", "rows"}
    assert {"torch", "triton", "python", "cpu", "gpu", "threads", "fused_resnet", "commit"} <= record[
        "environment"
    ].keys()
    assert record["settings"]["models"] == ["resnet20"]
    counts = {name: [row["suite"] for row in record["rows"]].count(name) for name in ("op", "block", "model", "memory")}
    assert counts == {"op": 12, "block": 2, "model": 2, "memory": 2}
    assert {row["suite"] for row in record["rows"]} - counts.keys() == {
        "ceilings",
        "conv",
        "pointwise",
        "profile",
        "roofline",
    }
    for row in record["rows"]:
        assert row["refused"] == {}
        if row["suite"] in counts:
            assert row["peers"].keys() == {"stock", "fused"}
            assert all(0 < peer["p20"] <= peer["median"] <= peer["p80"] for peer in row["peers"].values())
        if row["suite"] in ("op", "block"):
            assert row["limit"]["seconds"] > 0


def test_a_wrong_result_is_refused_and_never_timed(bench, wrong_operation, monkeypatch, tmp_path, capsys):
    def only_stock(peers, *arguments, **options):
        assert {peer.name for peer in peers} <= {"stock"}, "a wrong result was timed"
        return take_turns(peers, *arguments, **options)

    monkeypatch.setattr(op, "take_turns", only_stock)
    assert bench("op", "--quick", "--dtype", "fp32", "--json", tmp_path / "run.json") == 1
    shown = capsys.readouterr()
    assert len(re.findall(r"refused: fused \w+ is wrong: output z", shown.out)) == 6
    assert "6 of 8 cases have a refused peer" in shown.err
    rows = [row for row in json.loads((tmp_path / "run.json").read_text())["rows"] if row["suite"] == "op"]
    assert all("is wrong" in row["refused"]["fused"] and row["peers"].keys() == {"stock"} for row in rows)


def test_a_peer_that_cannot_run_does_not_cost_the_others_their_figures(bench, monkeypatch, tmp_path, capsys):
    right = Operation.result

    def out_of_memory(self):
        if self.peer.engine == "reference":
            raise MemoryError("no 4 GiB left\nand more")
        return right(self)

    monkeypatch.setattr(Operation, "result", out_of_memory)
    words = ("--engine", "auto", "reference", "--dtype", "fp32", "--json", tmp_path / "run.json")
    assert bench("op", "--quick", *words) == 1
    assert "refused: fused reference cannot run: MemoryError: no 4 GiB left\n" in capsys.readouterr().out
    rows = [row for row in json.loads((tmp_path / "run.json").read_text())["rows"] if row["suite"] == "op"]
    assert {row["engine"]: sorted(row["peers"]) for row in rows if row["engine"] == "reference"} == {
        "reference": ["stock"]
    }
    assert all(sorted(row["peers"]) == ["fused", "stock"] for row in rows if row["engine"] != "reference")


def test_a_network_that_does_not_fit_is_refused_by_name(bench, monkeypatch, capsys):
    from fused_resnet.bench.suites import model

    warm_step = model.warm_step

    def too_large(workload, peer, **options):
        if peer.name == "fused":
            raise MemoryError("no 4 GiB left")
        return warm_step(workload, peer, **options)

    monkeypatch.setattr(model, "warm_step", too_large)
    assert bench("model", "profile", "--quick", "--dtype", "fp32") == 1
    shown = capsys.readouterr().out
    assert re.search(r"resnet20 +fp32 +stock +\d", shown)
    assert re.search(r"resnet20 +fp32 +conv fprop +\d+\.\d+ ms", shown)
    assert "cannot run: MemoryError: no 4 GiB left" in shown


def test_activations_are_named_where_not_all_are_relu(bench, tmp_path, capsys):
    words = ("--quick", "--dtype", "fp32", "--repeats", 1, "--json", tmp_path / "run.json")
    assert bench("op", *words, "--act", "relu", "silu", "gelu_tanh", "silu") == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^act (\w+)$", shown, re.MULTILINE) == ["relu", "silu", "gelu_tanh"]
    assert max(map(len, shown.splitlines())) <= 100
    rows = [row for row in json.loads((tmp_path / "run.json").read_text())["rows"] if row["suite"] == "op"]
    assert [row["case"]["act"] for row in rows[::6]] == ["relu", "silu", "gelu_tanh"]
    assert all(row["peers"].keys() == {"stock", "fused"} for row in rows)

    assert bench("op", *words) == 0
    assert "act relu" not in capsys.readouterr().out
    rows = [row for row in json.loads((tmp_path / "run.json").read_text())["rows"] if row["suite"] == "op"]
    assert not any("act" in row["case"] for row in rows)


def test_engines_have_a_row_each_and_share_what_stock_took(bench, tmp_path):
    words = ("--engine", "auto", "reference", "--dtype", "fp32", "--json", tmp_path / "run.json")
    assert bench("op", "--quick", *words) == 0
    rows = [row for row in json.loads((tmp_path / "run.json").read_text())["rows"] if row["suite"] == "op"]
    first, second = rows[:2]
    assert second["engine"] == "reference" != first["engine"]
    assert first["case"] == second["case"]
    assert first["peers"]["stock"]["values"] == second["peers"]["stock"]["values"]
    assert first["peers"]["fused"]["values"] != second["peers"]["fused"]["values"]


def test_eval_and_memory_of_stock_alone(bench, capsys):
    words = ("--quick", "--mode", "eval", "--peers", "stock", "--dtype", "fp32")
    assert bench("model", "memory", *words) == 0
    shown = capsys.readouterr().out
    assert "; eval" in shown
    assert "fused " not in shown.split("channels_last", 1)[1]


def test_the_roofline_needs_no_measurement(bench, monkeypatch, capsys):
    from fused_resnet.bench.suites import ceilings

    monkeypatch.setattr(ceilings, "measure_copy", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setattr(ceilings, "measure_matmul", lambda *_, **__: pytest.fail("measured"))
    words = ("--model", "resnet50", "--dtype", "bf16", "--batch-size", 256, "--copy", 4300, "--matmul", 790)
    words += ("--engine", "triton")  # as if it were here
    assert bench("roofline", *words) == 0
    shown = capsys.readouterr().out
    figures = re.search(r"DRAM bytes per image" + 6 * r"\s+([\d.]+)" + " MB", shown)
    eager, pointwise, fused, lean, stage, lean_stage = map(float, figures.groups())
    assert (eager, pointwise) == (480.92, 374.90)  # counted from shapes
    assert pointwise > fused >= stage > lean > lean_stage


def test_rows_are_kept_as_they_come(bench, monkeypatch, tmp_path):
    calls = []

    def interrupted_at_the_third(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return take_turns(*arguments, **options)

    monkeypatch.setattr(op, "take_turns", interrupted_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        bench("op", "--quick", "--json", tmp_path / "run.json")
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert [row["suite"] for row in rows].count("op") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", 1], "--batch-size must be at least 2, got 1"),
        (["--image-size", 8], "--image-size must be at least 32, got 8"),
        (["--repeats", 0], "--repeats must be at least 1, got 0"),
        (["--copy", 0], "--copy must be more than 0, got 0.0"),
        (["--device", "gpu"], "--device must be cpu, cuda, cuda:1 ...; got 'gpu'"),
        (["--device", "meta"], "--device must be cpu, cuda, cuda:1 ...; got 'meta'"),
        (["--device", "cuda:99"], "--device cuda:99 is not there"),
        (["--cuda-graph"], "--cuda-graph needs --device cuda, got cpu"),
        (["--trace", "trace.json"], "--trace belongs to the suite profile, got ceilings op model memory"),
        (["--json", "nowhere/run.json"], "the folder of nowhere/run.json does not exist"),
        (["--peers", "timm"], "--peers timm needs models that timm has, got --model resnet20"),
        (
            ["models"],
            "SUITE must be one of ceilings, conv, pointwise, op, block, model, memory, profile, roofline, all, report, "
            "got",
        ),
        (["report", "op"], "report goes alone"),
        (["report", "--results", "nowhere"], "--results must hold DEVICE/WHAT.json, got nowhere"),
    ],
)
def test_bad_input_is_named_before_anything_is_measured(bench, monkeypatch, tmp_path, capsys, words, message):
    if "timm" in words:
        pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    assert bench("--quick", *words) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


def test_an_engine_that_cannot_serve_is_named_before_anything_is_measured(bench, capsys):
    assert bench("--quick", "--engine", "triton") == 2
    assert "engine='triton' cannot serve" in capsys.readouterr().err


def test_help_teaches_by_examples(bench, capsys):
    with pytest.raises(SystemExit):
        bench("--help")
    shown = capsys.readouterr().out
    assert "examples:" in shown
    assert "fused-resnet bench --quick" in shown


def test_the_examples_of_the_help_are_understood():
    parser = argparse.ArgumentParser(prog="fused-resnet")
    command.add_bench(parser.add_subparsers())
    joined = command.EXAMPLES.replace("\\\n", " ")
    lines = [re.split(r"\s{3,}| && ", line.strip())[0] for line in joined.splitlines() if "fused-resnet" in line]
    assert len(lines) == 12
    for line in lines:
        options = parser.parse_args(line.split()[1:])
        command.read_suites(options)
