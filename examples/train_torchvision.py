"""A torchvision ResNet in a loop like torchvision's reference: SGD, one-cycle rate, label smoothing, bfloat16.

The order is fuse -> DDP or FSDP -> torch.compile.

    python examples/train_torchvision.py                                          on the CPU, in seconds
    python examples/train_torchvision.py --model resnet50 --epochs 5 --compile
    torchrun --nproc-per-node 2 examples/train_torchvision.py --parallel fsdp     data-parallel; DDP by default
"""

import argparse
import os

import torch
from digits import digits
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import models

import fused_resnet

parser = argparse.ArgumentParser(description="Train a torchvision ResNet with fused blocks on handwritten digits.")
parser.add_argument("--model", default="resnet18", help="one of torchvision's ResNets (default: %(default)s)")
parser.add_argument("--epochs", type=int, default=2, help="(default: %(default)s)")
parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="under torchrun (default: %(default)s)")
parser.add_argument("--compile", action="store_true", help="compile the fused model")
options = parser.parse_args()

device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
parallel = options.parallel if "RANK" in os.environ else None  # set by torchrun
if parallel:
    distributed.init_process_group()
rank, world_size = (distributed.get_rank(), distributed.get_world_size()) if parallel else (0, 1)
torch.manual_seed(0)

model = models.get_model(options.model, num_classes=10).to(device)
if parallel != "fsdp":  # which shards contiguous parameters only; the images are channels_last in any case
    model = model.to(memory_format=torch.channels_last)
model = fused_resnet.fuse(model)  # first
if rank == 0:
    print(fused_resnet.explain(model))
if parallel == "fsdp":  # second
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4, model):
        fully_shard(stage)
elif parallel == "ddp":
    model = DistributedDataParallel(model)
if options.compile:  # third
    model = torch.compile(model)

train, test = digits()
sampler = DistributedSampler(train, world_size, rank, drop_last=True)
loader = DataLoader(train, 64 // world_size, sampler=sampler, drop_last=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=options.epochs * len(loader))
criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

for epoch in range(1, options.epochs + 1):
    model.train()
    sampler.set_epoch(epoch)
    losses = []
    for images, labels in loader:
        with torch.autocast(device.type, torch.bfloat16):
            loss = criterion(model(images.to(device, memory_format=torch.channels_last)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    model.eval()
    with torch.no_grad():  # the test set is small: every process sees all of it
        wrong = sum((model(x.to(device)).argmax(1) != y.to(device)).sum() for x, y in DataLoader(test, 120))
    if rank == 0:
        print(f"epoch {epoch}: loss {torch.stack(losses).mean():.4f}, test error {wrong / len(test):.2%}", flush=True)

if parallel:
    distributed.destroy_process_group()
