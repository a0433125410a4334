#!/usr/bin/env bash
# torch 2.13.0, onnxscript 0.7.2: a batch norm exported to ONNX in training mode becomes one of inference.
#
# torch.onnx.export(dynamo=True), the default, says that `training` is deprecated and to set the model's own mode.  With
# the model in training mode (and `training=TRAINING` besides) its graph still normalises by the running statistics: the
# BatchNormalization written is the one of inference, and optimised it is folded into the convolution in front of it.
# Only a warning speaks of the mode.  dynamo=False writes the node of training, and gives what the model gives then.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 'numpy<2.4'
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import io

import onnx
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
x = torch.randn(8, 3, 6, 6) * 3 + 1
by_eval = model.eval()(x).detach().numpy()
print("torch", torch.__version__, "onnx", onnx.__version__)


def exported(dynamo, optimize):
    file = io.BytesIO()
    model.train()
    options = {"optimize": optimize} if dynamo else {"do_constant_folding": False}
    mode = torch.onnx.TrainingMode.TRAINING
    torch.onnx.export(model, (x,), file, dynamo=dynamo, training=mode, verbose=False, **options)
    graph = onnx.load_from_string(file.getvalue())
    (y, *_) = ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: x.numpy()})
    return [node.op_type for node in graph.graph.node], y


found = {which: exported(*which) for which in ((True, True), (True, False), (False, False))}
by_train = model.train()(x).detach().numpy()
for (dynamo, optimize), (nodes, y) in found.items():
    print(f"dynamo={dynamo} optimize={optimize}: {nodes}")
    print(f"  from the model in training {abs(y - by_train).max():.1e}, in evaluation {abs(y - by_eval).max():.1e}")
folded, kept = found[True, True], found[False, False]
assert folded[0] == ["Conv"] and abs(folded[1] - by_eval).max() < 1e-4 < abs(folded[1] - by_train).max(), (
    "this has changed: see the head of this file"
)
assert "BatchNormalization" in kept[0] and abs(kept[1] - by_train).max() < 1e-4, (
    "this has changed: see the head of this file"
)
PYTHON
