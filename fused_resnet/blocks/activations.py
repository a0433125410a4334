"""The activation that a chain can hold, ReLU, by all the names that a forward has for it.

What it computes is ``ops/batch_norm_act/reference.py``'s; how another one is added, CONTRIBUTING.md says.
"""

import torch
import torch.nn.functional as F
from torch import nn

RELU = nn.ReLU
RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
