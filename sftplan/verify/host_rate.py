"""How slow the host is just now at what a step makes it do: operations, modules, nodes of a backward pass.

Tensors are so small that the host waits for no device. The same host is a third slower and faster within
seconds, where others use it too: one reading says little, the mean of many between steps a lot.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it

from sftplan.cost.dispatch import FORWARD_US

if TYPE_CHECKING:
    from collections.abc import Callable

Tensor = torch.Tensor
CHAIN = 100  # operations of one kind in a row
BLOCKS = 8
WIDTH, HEADS = 64, 4
REPEATS = 3
# Of one block of `_Block` on the reference host, under autocast to bf16: beside chains of operations that took
# FORWARD_US (tests/bench/h200_host.py, two H200, torch 2.11, 2026-11-27).
BLOCK_FORWARD_S, BLOCK_BACKWARD_S = 0.586e-3, 0.874e-3


class _Block(torch.nn.Module):
    """A layer of a transformer as everybody writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.up, self.down = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)
        self.drop = torch.nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        parts = self.qkv(self.norm(x)).split(WIDTH, dim=2)
        q, k, v = (part.view(rows, length, HEADS, -1).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(mixed.transpose(1, 2).reshape(rows, length, WIDTH)))
        mlp: Tensor = self.drop(self.down(F.gelu(self.up(self.mlp_norm(x)))))
        return x + mlp


class HostProbe:
    """Reads the host's pace against that of the reference host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.blocks = torch.nn.Sequential(*(_Block() for _ in range(BLOCKS))).to(device)
        self.x = torch.randn(2, 32, WIDTH, device=device)
        self.links = _links(device)

    def scale(self) -> float:
        """Mean of three ratios: operations in a chain, blocks going forward, and back; some 0.1 s."""
        forward_s, backward_s = self.block_s()
        return statistics.fmean(
            (self.operations(), forward_s / BLOCK_FORWARD_S, backward_s / BLOCK_BACKWARD_S)
        )

    def mean_scale(self, seconds: float) -> float:
        """Mean over so many seconds."""
        end, scales = time.perf_counter() + seconds, [self.scale()]
        while time.perf_counter() < end:
            scales.append(self.scale())
        return statistics.fmean(scales)

    def operations(self) -> float:
        """Least over operations of measured / FORWARD_US, in chains that record a graph.

        What comes between makes one slower, none faster.
        """
        return min(self._link_s(link) / (FORWARD_US[n] * 1e-6) for n, link in self.links.items())

    def block_s(self) -> tuple[float, float]:
        """Median seconds of a block, forward and backward."""
        forward, backward = [], []
        for _ in range(REPEATS):
            self._wait()
            start = time.perf_counter()
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                loss = self.blocks(self.x).float().sum()
            forward.append((time.perf_counter() - start) / BLOCKS)
            self._wait()
            start = time.perf_counter()
            loss.backward()
            backward.append((time.perf_counter() - start) / BLOCKS)
            self.blocks.zero_grad()
        return statistics.median(forward), statistics.median(backward)

    def _link_s(self, link: Callable[[Tensor], Tensor]) -> float:
        self._wait()
        h = self.x
        start = time.perf_counter()
        for _ in range(CHAIN):
            h = link(h)
        return (time.perf_counter() - start) / CHAIN

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _links(device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Operations to chain, each with a weight whose gradient is wanted."""
    gain = torch.ones(WIDTH, device=device, requires_grad=True)
    weight = torch.randn(WIDTH, WIDTH, device=device).mul(0.1).requires_grad_()
    return {
        "add": lambda h: h + gain,
        "mul": lambda h: h * gain,
        "linear": lambda h: F.linear(h, weight),
        "layer_norm": lambda h: F.layer_norm(h, (WIDTH,), gain, gain),
    }
