"""One small function per op: what it saves, what it holds while it runs, its work.

Which tensors an op saves stands in PyTorch's tools/autograd/derivatives.yaml; under autocast, which type
it runs in stands in aten/src/ATen/autocast_mode.h.
"""
