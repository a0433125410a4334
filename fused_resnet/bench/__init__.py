"""Measurements of the fused operations and networks beside stock PyTorch.

================  ==================================================================================
``peers``         what is compared: one operation, or one training step, as each peer computes it
``accuracy``      no figure of a wrong result: every peer is checked against float64 first
``harness``       times peers by turns; medians, quartiles, ratios of neighbours
``memory``        bytes that autograd keeps for backward
``suites``        which cases are measured: ``op``, ``model``, ``memory``
``report``        the table, as rows come in
``record``        the JSON file: every value, and where and how it was measured
``plot``          the ratios as a picture
``command``       ``fused-resnet bench``
================  ==================================================================================
"""
