"""What an installed wheel has to do, whatever torch it meets; ``environments.py`` runs it in each of its environments.

It needs nothing but the wheel and its torch: no compiler, no pytest.  Prints one JSON object, a row of the table.
"""

import json
import shutil
import subprocess
import sys
from copy import deepcopy
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fused_resnet
from fused_resnet import engines
from fused_resnet.engines import libraries


class Recorder(TorchDispatchMode):
    """Keeps every call of an operation of this package."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fused_resnet":
            self.calls.append((func, detached(args), kwargs or {}))
        return func(*args, **(kwargs or {}))


def detached(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return type(value)(map(detached, value)) if isinstance(value, (list, tuple)) else value


def network():
    torch.manual_seed(0)
    return fused_resnet.models.resnet20()


def images():
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def train_step(model, x):
    """One step of SGD; returns the gradients and what it made of the parameters and buffers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    return gradients, model.state_dict()


def off(values, exact):
    """The relative error of every tensor against float64, the largest."""
    return max(
        ((values[name].double() - t.double()).norm() / t.double().norm().clamp(min=1e-12)).item()
        for name, t in exact.items()
    )


def check_it_is_the_installed_one():
    assert Path(fused_resnet.__file__).is_relative_to(sys.prefix), fused_resnet.__file__


def check_opcheck():
    """Schemas and fakes of what an eager step calls, and of what a traced one does."""
    model = fused_resnet.fuse(network())
    with Recorder() as recorder:
        model(images()).sum().backward()
        with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
            model(images()).sum().backward()
    calls = {str(func): (func, args, kwargs) for func, args, kwargs in recorder.calls}
    assert {"fused_resnet.chain_forward.default", "fused_resnet.chain_backward.default"} <= set(calls)
    for func, args, kwargs in calls.values():
        torch.library.opcheck(func, args, kwargs, test_utils=("test_schema", "test_faketensor"))
    return f"{len(calls)} operations"


def check_a_step_is_as_accurate_as_stock():
    """The error of gradients, parameters and buffers after a step of training, against float64."""
    exact = train_step(network().double(), images().double())
    stock, fused = train_step(network(), images()), train_step(fused_resnet.fuse(network()), images())
    ratios = [off(f, e) / off(s, e) for f, s, e in zip(fused, stock, exact, strict=True)]
    assert max(ratios) <= 2, f"errors of gradients and state are {ratios} times stock's"
    return f"{max(ratios):.2f}"


def check_a_compiled_step_gives_the_eager_one():
    model = fused_resnet.fuse(network())
    compiled = torch.compile(deepcopy(model), fullgraph=True, backend="aot_eager")
    gradients, _ = train_step(model, images())
    traced, _ = train_step(compiled, images())
    assert off({name.removeprefix("_orig_mod."): t for name, t in traced.items()}, gradients) < 1e-6


def cuda_library(capability, cuda):
    """Why the native CUDA library cannot serve such a GPU and torch (or None), and what ``auto`` takes then."""
    for cached in (engines.choose, libraries.load_cuda_library, libraries.load_triton):
        cached.cache_clear()
    with (
        mock.patch.object(engines, "_why_no_gpu", return_value=None),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
        mock.patch.object(torch.version, "cuda", cuda),
    ):
        return engines.why_not("cuda", "cuda"), engines.choose("auto", "cuda", torch.bfloat16)


def check_the_cuda_library():
    """It loads where torch has its CUDA; where it does not fit, one line says why, and another engine serves."""
    fallback = "triton" if find_spec("triton") else "reference"
    built = libraries.build_record().get("cuda")
    if built is None:
        reason, engine = cuda_library((9, 0), "13.0")
        assert "libfused_resnet_cuda.so is missing: " in reason
        assert engine == fallback
        return "none"
    major = int(built["version"].split(".")[0])
    misfits = {
        (11, 0): (f"{major}.0", "has no code for sm_110"),
        (9, 0): (f"{major - 1}.8", f"install the wheel with +cu{major - 1} in its name"),
    }
    for capability, (cuda, expected) in misfits.items():
        reason, engine = cuda_library(capability, cuda)
        assert expected in reason, reason
        assert "\n" not in reason, reason
        assert engine == fallback, engine
    if torch.version.cuda is None:
        assert "was built without CUDA" in libraries._why_no_gpu()
        return "torch has no CUDA"
    reason, _ = cuda_library((9, 0), torch.version.cuda)
    if int(torch.version.cuda.split(".")[0]) != major:
        return f"misfit, said: CUDA {built['version']} for {torch.version.cuda}"
    assert reason is None, reason
    for name in ("batch_norm_stats", "batch_norm_act", "batch_norm_act_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_resnet::{name}", "CUDA"), name
    return "loads"


def check_doctor():
    """It ends well, knows how the wheel was built, and says how to get whatever is missing."""
    run = subprocess.run([sys.executable, "-m", "fused_resnet", "doctor", "--json"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert {"commit", "files"} <= set(report["native build"])
    absent = {name for name in ("triton", "torchvision") if find_spec(name) is None}
    absent |= {name for name in ("c++", "nvcc") if shutil.which(name) is None}
    assert absent <= set(report["missing"]), report["missing"]
    assert all(": " in told for told in report["missing"].values())
    return "names " + ", ".join(report["missing"])


def main():
    torch.set_num_threads(1)
    check_it_is_the_installed_one()
    row = {
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "fused_resnet": version("fused_resnet"),
        "CPU engine": engines.choose("auto", "cpu", torch.float32),
        "opcheck": check_opcheck(),
        "step's error ÷ stock's": check_a_step_is_as_accurate_as_stock(),
        "CUDA library": check_the_cuda_library(),
        "doctor": check_doctor(),
    }
    check_a_compiled_step_gives_the_eager_one()
    print(json.dumps(row))


if __name__ == "__main__":
    main()
