"""The examples' data: scikit-learn's 1797 handwritten digits, which come with the package, as 3x16x16 images."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import Dataset, TensorDataset, random_split


def digits() -> tuple[Dataset, Dataset]:
    """Return the training and the test set: standardized float32 images [3, 16, 16] and int64 labels."""
    bundled = load_digits()
    gray = torch.from_numpy(bundled.images).float().unsqueeze(1)
    images = F.interpolate((gray - gray.mean()) / gray.std(), size=(16, 16), mode="bilinear").expand(-1, 3, -1, -1)
    whole = TensorDataset(images, torch.from_numpy(bundled.target).long())
    train, test = random_split(whole, [0.8, 0.2], generator=torch.Generator().manual_seed(0))
    return train, test
