"""Shortcuts without parameters: what is fused of them, and that they are as accurate as stock."""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F

import fused_resnet
from fused_resnet import models
from fused_resnet.surgery import NothingToFuse
from tests.support.accuracy import assert_fused_is_as_accurate_as_stock
from tests.support.hand_written import FunctionShortcut, OptionA, OptionAOfAnother, images, make

WHOLE = "conv1 bn1 relu conv2 bn2 + pad(x[:, :, ::2, ::2], 4, 4) relu"
PADDED = "conv1 bn1 relu conv2 bn2 + pad(x[:, :, ::1, ::1], 4, 4) relu"  # of what stock makes
STOCK = "conv1 bn1 relu conv2 bn2 + x relu"
# what a block adds, 8 channels of 6x6 made 16 of 3x3, and what is fused of it
SHORTCUTS = {
    "positional": (lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0), WHOLE),
    "keywords": (lambda x: F.pad(x[:, :, ::2, ::2], pad=[0, 0, 0, 0, 4, 4], mode="constant", value=0.0), WHOLE),
    "no value": (lambda x: F.pad(x[..., ::2, ::2], (0, 0, 0, 0, 4, 4), value=None), WHOLE),
    "begins at 0": (lambda x: F.pad(x[:, :, 0::2, 0::2], (0, 0, 0, 0, 4, 4)), PADDED),
    "an offset": (lambda x: F.pad(x[:, :, 1::2, ::2], (0, 0, 0, 0, 4, 4)), PADDED),
    "an end": (lambda x: F.pad(x[:, :, :5:2, ::2], (0, 0, 0, 0, 4, 4)), PADDED),
    "every other channel": (lambda x: F.pad(x[:, ::2, ::2, ::2], (0, 0, 0, 0, 4, 8)), PADDED.replace("4, 4", "4, 8")),
    "pooled": (lambda x: F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 4, 4)), PADDED),
    "not zeros": (lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), value=1.5), STOCK),
    "space": (lambda x: F.pad(x[:, :, :4:2, :4:2], (1, 0, 0, 1, 4, 4)), STOCK),
    "cropped": (lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 10, -2)), STOCK),
    "replicated": (lambda x: F.pad(x.repeat(1, 2, 1, 1)[:, :, ::4, ::4], (0, 1, 0, 1), "replicate"), STOCK),
    "the batch": (lambda x: F.pad(x[:-1, :, ::2, ::2], (0, 0, 0, 0, 4, 4, 0, 1)), STOCK),
    "concatenated": (lambda x: torch.cat([x[:, :, ::2, ::2]] * 2, 1), STOCK),
}


@pytest.mark.parametrize("name", SHORTCUTS)
def test_what_is_fused_of_a_shortcut_without_parameters(name, chains_run):
    function, what = SHORTCUTS[name]

    class InTheBlock(FunctionShortcut):
        def forward(self, x):
            out = self.relu(self.bn1(self.conv1(x)))
            return self.relu(self.bn2(self.conv2(out)) + function(x))

    x = images()
    for cls in (FunctionShortcut, InTheBlock):
        fused = assert_fused_is_as_accurate_as_stock(make(cls, function), x, images(seed=3), images(seed=4))
        (row,) = fused_resnet.explain(fused).fused
        in_a_layer = cls is FunctionShortcut and what != WHOLE  # which the block's own trace does not go into
        assert row.what == (STOCK if in_a_layer else what)
    assert len(chains_run) == 6


def test_zeros_that_another_reads_too_stay_stock():
    class Shared(OptionA):
        def forward(self, x):
            shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
            return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut), shortcut

    fused = assert_fused_is_as_accurate_as_stock(make(Shared), images())
    assert fused_resnet.explain(fused).fused[0].what == STOCK


def test_a_shortcut_changed_in_place_before_the_sum_is_honoured():
    class Changed(OptionA):
        def forward(self, x):
            source = x * 1
            shortcut = F.pad(source[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
            out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            source += 1
            return F.relu(out + shortcut) + source.mean()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingToFuse)
        assert_fused_is_as_accurate_as_stock(make(Changed), images())


def test_a_network_of_option_a_is_fused_whole():
    model = fused_resnet.fuse(models.create("resnet20", shortcut="A"))
    report = fused_resnet.explain(model)
    assert len(report.fused) == 1 + 9
    assert not report.left
    padded = {row.module: row.what for row in report.fused if "pad(" in row.what}
    assert padded == {
        f"layer{i}.0": f"conv1 bn1 relu conv2 bn2 + pad(x[:, :, ::2, ::2], 0, {channels}) relu"
        for i, channels in ((2, 16), (3, 32))
    }
    assert list(model.state_dict()) == list(models.create("resnet20", shortcut="A").state_dict())


@pytest.mark.parametrize("cls", [OptionA, OptionAOfAnother, FunctionShortcut])
def test_compiled_a_shortcut_without_parameters_is_as_accurate_as_stock(cls, chains_run):
    torch.compiler.reset()
    compiled = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    assert_fused_is_as_accurate_as_stock(make(cls), *(images(seed=seed) for seed in range(3)), compile=compiled)
