"""AdamW on fp32 masters of bf16 weights, one kernel over all tensors. Needs CUDA and triton.

A master is the weight and 16 bits more (halves.py): 10 bytes a parameter with the moments, no copy of the
weights. The gradient is read in bf16 as it came: 26 bytes a parameter pass through memory (gradient 2; weight,
rest and two moments 12 in and 12 out), where fp32 copies of the gradients and torch's own kernel take 40.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sftplan.train.halves import HALF, QUIET_NAN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.train.settings import Settings

Tensor = torch.Tensor
# A program takes a chunk block by block: looking up whose it is costs it about 2 µs, a block moves in 4 µs.
CHUNK_ELEMENTS = 16384
BLOCK_ELEMENTS = 2048  # 8 a thread
WARPS = 8
PARTS = {"rest": torch.int16, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}
POINTERS = 2 + len(PARTS)  # of a weight: its gradient, itself, the parts of its state


@triton.jit
def _move(
    pointers, at, numel, rate, decay, rest1, rest2, epsilon, inverse, bias1, bias2_root,
    masked: tl.constexpr, size: tl.constexpr, block: tl.constexpr, half: tl.constexpr, nan: tl.constexpr,
):  # fmt: skip
    """A chunk of one weight from place `at` on; decay first, as torch.optim.AdamW has it."""
    gradients = tl.multiple_of(tl.load(pointers).to(tl.pointer_type(tl.bfloat16)), 16)
    weights = tl.multiple_of(tl.load(pointers + 1).to(tl.pointer_type(tl.int16)), 16)
    rests = tl.multiple_of(tl.load(pointers + 2).to(tl.pointer_type(tl.int16)), 16)
    firsts = tl.multiple_of(tl.load(pointers + 3).to(tl.pointer_type(tl.float32)), 16)
    seconds = tl.multiple_of(tl.load(pointers + 4).to(tl.pointer_type(tl.float32)), 16)
    for start in range(0, size, block):
        place = tl.multiple_of(at + start, block) + tl.arange(0, block)
        inside = place < numel if masked else None
        gradient = tl.load(gradients + place, mask=inside).to(tl.float32) * inverse
        upper = tl.load(weights + place, mask=inside).to(tl.int32) << 16
        bits = upper + tl.load(rests + place, mask=inside).to(tl.int32)
        master = bits.to(tl.float32, bitcast=True)
        first = tl.load(firsts + place, mask=inside)
        second = tl.load(seconds + place, mask=inside)
        master -= rate * decay * master
        first += rest1 * (gradient - first)
        second += rest2 * (gradient * gradient - second)
        root = tl.sqrt_rn(second) / bias2_root + epsilon
        master -= (rate / bias1) * first / root
        bits = master.to(tl.int32, bitcast=True)
        high = (bits + half) >> 16
        rest = bits - (high << 16)
        high = tl.where(master == master, high, nan)
        tl.store(rests + place, rest.to(tl.int16), mask=inside)
        tl.store(firsts + place, first, mask=inside)
        tl.store(seconds + place, second, mask=inside)
        tl.store(weights + place, high.to(tl.int16), mask=inside)


@triton.jit
def _adamw(
    pointers, numels, decays, corrections, owners, places, factors, rate, rest1, rest2, epsilon,
    columns: tl.constexpr, size: tl.constexpr, block: tl.constexpr, half: tl.constexpr, nan: tl.constexpr,
):  # fmt: skip
    """Program i moves chunk `places[i]` of weight `owners[i]`, unless it has no gradient or all stay."""
    owner = tl.load(owners + tl.program_id(0))
    mine = pointers + owner * columns
    if tl.load(factors + 1) == 0.0 and tl.load(mine) != 0:
        at = tl.load(places + tl.program_id(0)).to(tl.int64) * size
        numel = tl.load(numels + owner)
        decay = tl.load(decays + owner)
        inverse = tl.load(factors)
        bias1, bias2_root = tl.load(corrections + 2 * owner), tl.load(corrections + 2 * owner + 1)
        # fmt: off
        if at + size <= numel:
            _move(mine, at, numel, rate, decay, rest1, rest2, epsilon, inverse, bias1, bias2_root,
                  False, size, block, half, nan)
        else:
            _move(mine, at, numel, rate, decay, rest1, rest2, epsilon, inverse, bias1, bias2_root,
                  True, size, block, half, nan)
        # fmt: on


class MasterAdamW:
    """Moves bf16 `weights`; decay on what has more than one dimension.

    `state` is what `torch.optim.AdamW` would hold of each weight's master, step, exp_avg and exp_avg_sq, and
    in place of the master its `rest`.
    """

    def __init__(self, weights: Sequence[torch.nn.Parameter], settings: Settings) -> None:
        self.weights, self.settings = list(weights), settings
        self.state: dict[torch.nn.Parameter, dict[str, Tensor]] = {}
        device = self.weights[0].device
        sizes = [weight.numel() for weight in self.weights]
        chunks = [-(-size // CHUNK_ELEMENTS) for size in sizes]
        decays = [settings.weight_decay if weight.ndim > 1 else 0.0 for weight in self.weights]
        owners = [owner for owner, count in enumerate(chunks) for _ in range(count)]
        places = [place for count in chunks for place in range(count)]
        self._numels = torch.tensor(sizes, dtype=torch.int64, device=device)
        self._decays = torch.tensor(decays, dtype=torch.float32, device=device)
        self._owners = torch.tensor(owners, dtype=torch.int32, device=device)
        self._places = torch.tensor(places, dtype=torch.int32, device=device)
        self._steps = torch.zeros(len(self.weights), device=device)
        self._known: list[int] = []  # addresses of the gradients that these two are of
        self._pointers = self._moved = torch.empty(0, device=device)
        self._create()

    def _create(self) -> None:
        """Zeros where nothing else is known."""
        for weight, step in zip(self.weights, self._steps, strict=True):
            known = self.state.get(weight) or {}
            for part, dtype in PARTS.items():
                if part not in known:
                    known[part] = torch.zeros_like(weight, dtype=dtype)
            if "step" in known:
                step.copy_(known["step"])
            self.state[weight] = known | {"step": step}

    def restored(self) -> None:
        """Take over what was put into `state`, of some weights or all."""
        self._create()
        self._known = []

    def _look_up(self) -> None:
        """Addresses for the kernel, (weights, 5), unless gradients lie where they lay; 0 where there is none."""
        gradients = [weight.grad for weight in self.weights]
        known = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
        if known == self._known:
            return
        rows = []
        for address, gradient, weight in zip(known, gradients, self.weights, strict=True):
            assert gradient is None or gradient.stride() == weight.stride()
            state = self.state[weight]
            rows += [address, weight.data_ptr(), *(state[part].data_ptr() for part in PARTS)]
        device = self._steps.device
        table = torch.tensor(rows, dtype=torch.int64, pin_memory=True)
        moved = torch.tensor([float(address > 0) for address in known], pin_memory=True)
        self._pointers = table.to(device, non_blocking=True)
        self._moved = moved.to(device, non_blocking=True)
        self._known = known

    @torch.no_grad()
    def step(self, *, learning_rate: float, divisor: Tensor, skip: Tensor) -> None:
        """Move all weights by their gradients / `divisor`, or none where `skip` is 1; both stay on the GPU."""
        self._look_up()
        chosen = self.settings
        self._steps += self._moved * (1.0 - skip)
        steps = self._steps.double()
        bias1, bias2 = 1 - chosen.beta1**steps, 1 - chosen.beta2**steps
        corrections = torch.stack([bias1, bias2.sqrt()], dim=1).float()
        factors = torch.stack([1 / divisor, skip]).float()
        _adamw[(len(self._owners),)](
            self._pointers, self._numels, self._decays, corrections, self._owners, self._places, factors,
            learning_rate, 1 - chosen.beta1, 1 - chosen.beta2, chosen.epsilon,
            columns=POINTERS, size=CHUNK_ELEMENTS, block=BLOCK_ELEMENTS, half=HALF, nan=QUIET_NAN,
            num_warps=WARPS,
        )  # fmt: skip
