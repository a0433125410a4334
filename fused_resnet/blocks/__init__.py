"""What a fused module is: the plan of its chains, what every call reads and refuses, and how a call runs."""

from fused_resnet.blocks.fusion import Fusion
from fused_resnet.blocks.module import restore
from fused_resnet.blocks.plan import BlockPaths, Container, UnitPaths, _restore_plan

# by which the pickles of fused models made before 0.1.0 know them
__all__ = ["BlockPaths", "Container", "Fusion", "UnitPaths", "_restore_plan", "restore"]
