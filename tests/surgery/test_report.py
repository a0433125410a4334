"""explain: what is fused, by which engine, and what could be."""

from torch import nn

import fused_resnet
from tests.support.hand_written import Basic, make


def test_explain_names_what_is_fused_by_which_engine():
    report = fused_resnet.explain(fused_resnet.fuse(make(nn.Sequential, Basic(), Basic(8, 16, 2)), engine="reference"))
    assert [row.module for row in report.fused] == ["0", "1"]
    assert {row.engine for row in report.fused} == {"reference"}
    assert report.fused[0].what == "conv1 bn1 relu conv2 bn2 + x relu"
    assert report.fused[1].what == "conv1 bn1 relu conv2 bn2 + (downsample.0 downsample.1) relu"
    assert str(report).startswith("2 chains fused, 0 places left stock\n")


def test_explain_before_fuse_says_what_could_be():
    report = fused_resnet.explain(make(Basic))
    assert not report.fused
    assert "conv1 bn1 relu conv2 bn2 + x relu can be" in report.left[0].reason
