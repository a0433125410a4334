"""Hold a fused model against stock PyTorch and float64."""

from fused_resnet.verification.report import Row, Verification
from fused_resnet.verification.runs import verify

__all__ = ["Row", "Verification", "verify"]
