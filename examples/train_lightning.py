"""Lightning: fuse where the module makes its network; Lightning's strategy wraps what it is given.

The order is fuse -> DDP, and compilation in place between the two: ``network.compile()`` leaves no wrapper behind.

    python examples/train_lightning.py                     on the CPU, in seconds
    python examples/train_lightning.py --devices 2         data-parallel
    python examples/train_lightning.py --compile
"""

import argparse

import lightning
import torch
import torch.nn.functional as F
from digits import digits
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import models

import fused_resnet


class Classifier(lightning.LightningModule):
    """A fused ResNet-18 under SGD with one-cycle learning rate."""

    def __init__(self, compiled: bool) -> None:
        super().__init__()
        network = models.resnet18(num_classes=10).to(memory_format=torch.channels_last)
        self.network = fused_resnet.fuse(network)  # first; the strategy comes when fit is called
        if compiled:
            self.network.compile()

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self.network(images.contiguous(memory_format=torch.channels_last)), labels)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """Count the images that are not given their label."""
        images, labels = batch
        self.log("test error", (self.network(images).argmax(1) != labels).float().mean(), sync_dist=True)

    def on_train_epoch_end(self) -> None:
        """Print the epoch's figures, once."""
        loss, error = (self.trainer.callback_metrics[name] for name in ("loss", "test error"))
        self.print(f"epoch {self.current_epoch + 1}: loss {loss:.4f}, test error {error:.2%}", flush=True)

    def configure_optimizers(self) -> dict:
        """Return the optimizer and a schedule that moves with every step."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a fused ResNet-18 with Lightning on handwritten digits.")
    parser.add_argument("--devices", default=1, type=int, help="processes or GPUs (default: %(default)s)")
    parser.add_argument("--epochs", default=2, type=int, help="(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the fused network")
    options = parser.parse_args()

    lightning.seed_everything(0)
    module = Classifier(compiled=options.compile)
    print(fused_resnet.explain(module.network))
    train, test = digits()
    trainer = lightning.Trainer(
        devices=options.devices,
        max_epochs=options.epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(train, 64 // options.devices, shuffle=True, drop_last=True)
    trainer.fit(module, loader, DataLoader(test, 120))
