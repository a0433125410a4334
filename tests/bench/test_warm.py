"""``fused-resnet warm``: what it runs, on the CPU; that it compiles anything only a GPU can show."""

import pytest
import torch

from fused_resnet import cli
from fused_resnet.bench import warm as warming
from fused_resnet.bench.network import Workload
from fused_resnet.bench.peers import Peer

CPU = torch.device("cpu")


def test_every_distinct_block_is_run_and_then_the_network():
    first = warming.warm(Workload("resnet20", 2, 32, "fp32", CPU), Peer("fused", "cpu"), processes=2)
    assert first > 0


def test_what_fails_in_a_process_is_raised():
    with pytest.raises(Exception, match="cannot serve"):
        warming.warm(Workload("resnet20", 2, 32, "fp32", CPU), Peer("fused", "triton"), processes=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet19"], "NAME must be one of resnet18, "),
        (["--processes", "0"], "--processes must be at least 1, got 0"),
        (["--device", "cuda:99"], "--device cuda:99 is not there"),
        (["--device", "cpu"], "the engine cpu serves bf16 on cpu, whose kernels are compiled already"),
    ],
    ids=["model", "processes", "device", "nothing to compile"],
)
def test_bad_input_is_answered_in_one_line(capsys, arguments, message):
    assert cli.main(["warm", *arguments]) == 2
    assert f"fused-resnet warm: error: {message}" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_warmed_network_compiles_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    workload = Workload("resnet18", 4, 64, "bf16", torch.device("cuda"))
    warming.warm(workload, Peer("fused", "triton"), processes=2)
    compiled = sorted(path.name for path in tmp_path.iterdir())
    warming.warm(workload, Peer("fused", "triton"), processes=2)
    assert compiled == sorted(path.name for path in tmp_path.iterdir())
