"""What the memory of kernels depends on in a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from sftplan.units import KIB, MIB

LT_WORKSPACE_BYTES = MIB  # CUDABlas.cpp, _parseChosenWorkspaceSize of cuBLASLt


@dataclass(frozen=True, slots=True)
class Chip:
    """What the kernels' memory depends on; `compute_capability` decides.

    cuBLAS' workspace is 32 MiB from Hopper on and 8.125 MiB before (CUDABlas.cpp,
    getChosenWorkspaceSize); cuDNN's attention is preferred from Hopper on (sdp_utils.cpp).
    """

    workspace_bytes: int = 32 * MIB
    has_cudnn_attention: bool = True
    multiprocessors: int = 132  # of an H100 or H200 SXM; scratch of reductions grows with it
    l2_bytes: int = 60 * MIB  # as an H200 gives it


HOPPER = Chip()
# Their L2 cache is an A100's.
BEFORE_HOPPER = Chip(workspace_bytes=8320 * KIB, has_cudnn_attention=False, l2_bytes=40 * MIB)
