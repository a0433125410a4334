"""Measures with pytest-benchmark what ``fused-resnet bench`` measures; the peers and their check are the same.

    python -m pytest benchmarks                                               every case, stock and fused side by side
    python -m pytest benchmarks -k "resnet18 and bf16"                        some of them
    python -m pytest benchmarks --benchmark-autosave                          keep a run ...
    python -m pytest benchmarks --benchmark-compare                           ... and compare the next one with it

Here a peer's rounds follow each other, so that the machine's drift is part of a difference between two peers: for a
ratio take ``fused-resnet bench``, where they take turns; take this for how one peer changes from commit to commit.
"""

import pytest
import torch

from fused_resnet.bench.rows import FUSED, STOCK
from fused_resnet.bench.settings import Settings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = Settings.on(DEVICE)
# with SiLU, depthwise convolutions and squeeze-and-excitation; skipped where timm is not installed
LIBRARY_MODELS = ("timm:efficientnet_b0",)


@pytest.fixture(scope="session")
def settings():
    return SETTINGS


@pytest.fixture(params=[STOCK, FUSED])
def peer(request, dtype):
    """Return stock, or this package with the engine that ``auto`` takes."""
    return next(peer for peer in SETTINGS.contenders(dtype) if peer.name == request.param)


@pytest.fixture
def synchronized():
    """Return a function that waits until the device has done what another function asked for."""

    def wait_for(run):
        def synchronized_run():
            run()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize(DEVICE)

        return synchronized_run

    return wait_for


def pytest_generate_tests(metafunc):
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", SETTINGS.dtypes, scope="module")
    if "model" in metafunc.fixturenames:
        metafunc.parametrize("model", [*SETTINGS.models, *LIBRARY_MODELS])
