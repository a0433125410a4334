"""Measurements of the fused operations and networks beside stock PyTorch.

=============================  =====================================================================================
``peers``                      who is compared: stock, this package, torch.compile, timm
``convolution pointwise``      what they run: one convolution, a 1×1 with its batch norm part by part,
``operation block network``    one operation between convolutions, one residual block, one step of a network
``accuracy``                   no figure of a wrong result: every peer is checked against float64 first
``harness graphs``             times peers by turns; captures their work into CUDA graphs
``libraries``                  networks of timm and torchvision: are they there, what are they given
``ceilings roofline``          what a machine can do, measured; what must be moved and computed, counted from shapes
``recorded``                   the same of any network, from a step that runs
``memory``                     bytes that autograd keeps for backward, and the peak
``profile kernel_classes``     seconds by class of kernel
``settings suites``            which cases are measured, and how often
``rows``                       what was measured: medians, percentiles, ratios of neighbours
``table record plot report``   the terminal's table, the JSON file, the picture, ``docs/benchmarks.md``
``command``                    ``fused-resnet bench``
=============================  =====================================================================================
"""
