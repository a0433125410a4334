import argparse
import json
import re

import pytest

from fused_resnet.bench import command, suites
from fused_resnet.bench.harness import take_turns
from fused_resnet.bench.peers import Operation


@pytest.fixture
def bench():
    """Return a function that runs ``bench`` with the given words."""
    parser = argparse.ArgumentParser(prog="fused-resnet")
    command.add_bench(parser.add_subparsers())

    def run(*words):
        options = parser.parse_args(["bench", *map(str, words)])
        return options.run(options)

    return run


@pytest.fixture
def wrong_operation(monkeypatch):
    """Make the fused operation wrong by one percent."""
    right = Operation.forward
    monkeypatch.setattr(Operation, "forward", lambda self: right(self) * (1.01 if self.peer == "fused" else 1))


def test_a_quick_run_of_everything(bench, tmp_path, capsys):
    assert bench("--quick", "--json", tmp_path / "run.json", "--plot", tmp_path / "run.png") == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    assert len(re.findall(r"^resnet20 .* activations ", shown, re.MULTILINE)) == 2
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")

    record = json.loads((tmp_path / "run.json").read_text())
    assert record.keys() == {"format", "command", "time", "environment", "settings", "rows"}
    assert {"torch", "triton", "python", "cpu", "gpu", "threads", "fused_resnet", "commit"} <= record[
        "environment"
    ].keys()
    assert record["settings"]["models"] == ["resnet20"]
    assert [row["suite"] for row in record["rows"]] == ["op"] * 12 + ["model"] * 2 + ["memory"] * 2
    for row in record["rows"]:
        assert row["refused"] is None
        assert row["peers"].keys() == {"stock", "fused"}
        for peer in row["peers"].values():
            assert 0 < peer["low"] <= peer["median"] <= peer["high"]


def test_a_wrong_result_is_refused_and_never_timed(bench, wrong_operation, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(suites, "take_turns", lambda *_, **__: pytest.fail("a wrong result was timed"))
    assert bench("op", "--quick", "--dtype", "fp32", "--json", tmp_path / "run.json") == 1
    shown = capsys.readouterr()
    assert shown.out.count("refused: fused is wrong: output z") == 6
    assert "6 of 6 cases refused" in shown.err
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert all("fused is wrong" in row["refused"] and row["peers"] == {} for row in rows)


def test_rows_are_kept_as_they_come(bench, monkeypatch, tmp_path):
    calls = []

    def interrupted_at_the_third(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return take_turns(*arguments, **options)

    monkeypatch.setattr(suites, "take_turns", interrupted_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        bench("op", "--quick", "--json", tmp_path / "run.json")
    assert len(json.loads((tmp_path / "run.json").read_text())["rows"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", 1], "--batch-size must be at least 2, got 1"),
        (["--image-size", 8], "--image-size must be at least 32, got 8"),
        (["--repeats", 0], "--repeats must be at least 1, got 0"),
        (["--device", "gpu"], "--device must be cpu, cuda, cuda:1 ...; got 'gpu'"),
        (["--device", "cuda:99"], "--device cuda:99 is not there"),
        (["--json", "nowhere/run.json"], "the folder of nowhere/run.json does not exist"),
    ],
)
def test_bad_input_is_named_before_anything_is_measured(bench, monkeypatch, tmp_path, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert bench("--quick", *words) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


def test_help_teaches_by_examples(bench, capsys):
    with pytest.raises(SystemExit):
        bench("--help")
    shown = capsys.readouterr().out
    assert "examples:" in shown
    assert "fused-resnet bench --quick" in shown
