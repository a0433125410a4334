"""A timm model with timm's optimizer, schedule, loss and averaged weights.

The order is fuse -> averaged weights -> DDP or FSDP -> torch.compile, as in timm's own training script.

    python examples/train_timm.py                                on the CPU, in seconds
    python examples/train_timm.py --model seresnet18             squeeze-and-excitation between fused chains
    torchrun --nproc-per-node 2 examples/train_timm.py           data-parallel
"""

import argparse

import timm
import torch
from digits import digits
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, init_distributed_device
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import fused_resnet

parser = argparse.ArgumentParser(description="Train a timm model with fused blocks on handwritten digits.")
parser.add_argument("--model", default="resnet10t", help="one of timm.list_models() (default: %(default)s)")
parser.add_argument("--epochs", type=int, default=3, help="(default: %(default)s)")
parser.add_argument("--compile", action="store_true", help="compile the fused model")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
options = parser.parse_args()

device = init_distributed_device(options)  # reads what torchrun sets, and adds rank and world_size to the options
torch.manual_seed(0)

model = timm.create_model(options.model, num_classes=10).to(device, memory_format=torch.channels_last)
model = fused_resnet.fuse(model)  # first
if options.rank == 0:
    print(fused_resnet.explain(model))
average = ModelEmaV3(model, decay=0.99, use_warmup=True)  # a deep copy, fused as well
network = DistributedDataParallel(model) if options.distributed else model  # second
if options.compile:  # third
    network = torch.compile(network)

train, test = digits()
sampler = DistributedSampler(train, options.world_size, options.rank, drop_last=True)
loader = DataLoader(train, 64 // options.world_size, sampler=sampler, drop_last=True)
optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, momentum=0.9, weight_decay=1e-4, filter_bias_and_bn=True)
scheduler, _ = create_scheduler_v2(
    optimizer,
    sched="cosine",
    num_epochs=options.epochs,
    warmup_epochs=1,
    warmup_lr=0.005,
    step_on_epochs=False,
    updates_per_epoch=len(loader),
)
criterion = LabelSmoothingCrossEntropy(smoothing=0.1)

updates = 0
for epoch in range(1, options.epochs + 1):
    network.train()
    sampler.set_epoch(epoch)
    losses = []
    for images, labels in loader:
        with torch.autocast(device.type, torch.bfloat16):
            loss = criterion(network(images.to(device, memory_format=torch.channels_last)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        updates += 1
        scheduler.step_update(updates)
        average.update(model, step=updates)
        losses.append(loss.detach())
    with torch.no_grad():  # of the averaged weights, which are in evaluation mode
        wrong = sum((average(x.to(device)).argmax(1) != y.to(device)).sum() for x, y in DataLoader(test, 120))
    if options.rank == 0:
        print(f"epoch {epoch}: loss {torch.stack(losses).mean():.4f}, test error {wrong / len(test):.2%}", flush=True)

if options.distributed:
    distributed.destroy_process_group()
