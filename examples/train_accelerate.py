"""Accelerate: fuse before ``prepare``, which wraps the model in DDP or FSDP and compiles it, as the launcher says.

The order is fuse -> DDP or FSDP -> torch.compile.

    python examples/train_accelerate.py                                       on the CPU, in seconds
    torchrun --nproc-per-node 2 examples/train_accelerate.py                  data-parallel
    accelerate launch --dynamo_backend inductor examples/train_accelerate.py  compiled
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import digits
from torch.utils.data import DataLoader

import fused_resnet
from fused_resnet import models

EPOCHS = 2

# processes, precision and compilation are the launcher's
accelerator = Accelerator(cpu=not torch.cuda.is_available())
set_seed(0)

model = models.resnet20().to(accelerator.device, memory_format=torch.channels_last)
model = fused_resnet.fuse(model)  # first
accelerator.print(fused_resnet.explain(model))

train, test = digits()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
model, optimizer, loader, test_loader = accelerator.prepare(  # second and third
    model,
    optimizer,
    DataLoader(train, 64 // accelerator.num_processes, shuffle=True, drop_last=True),
    DataLoader(test, 120),
)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer.optimizer, 0.1, total_steps=EPOCHS * len(loader))

for epoch in range(1, EPOCHS + 1):
    model.train()
    losses = []
    for images, labels in loader:
        loss = F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())

    model.eval()
    wrong = 0
    with torch.no_grad():
        for images, labels in test_loader:
            predicted, labels = accelerator.gather_for_metrics((model(images).argmax(1), labels))
            wrong += (predicted != labels).sum()
    loss = accelerator.reduce(torch.stack(losses).mean(), reduction="mean")
    accelerator.print(f"epoch {epoch}: loss {loss:.4f}, test error {wrong / len(test):.2%}", flush=True)

accelerator.end_training()
