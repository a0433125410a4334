"""The paper's experiments: networks that differ in one thing, under one recipe and several seeds."""

from fused_resnet.experiments.experiment import Experiment, Network, Panel, Result
from fused_resnet.experiments.paper import degradation, shortcuts

__all__ = ["Experiment", "Network", "Panel", "Result", "degradation", "shortcuts"]
