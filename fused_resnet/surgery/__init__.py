"""Find the chains of a model, swap them in and out, and say what was done and why not."""

from fused_resnet.surgery.report import Report, Row, explain
from fused_resnet.surgery.swap import NothingToFuse, fuse, unfuse

__all__ = ["NothingToFuse", "Report", "Row", "explain", "fuse", "unfuse"]
