"""A small card played by a bigger one: PyTorch gets no more memory than the small one would have.

Memory is judged, time is not: kernels run at the big card's speed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.errors import DriftError, UsageError
from sftplan.facts.profiles import load_hardware
from sftplan.units import format_gib

if TYPE_CHECKING:
    from sftplan.facts.hardware import Hardware
    from sftplan.plan.record import Plan


def cap_bytes(plan: Plan, name: str) -> int:
    """What PyTorch may reserve in the rehearsal: the small card's memory less its context.

    Raises:
        UsageError: There is no such profile, or the plan is for another card.
    """
    small = load_hardware(name)
    planned = plan.inputs.hardware.gpu.name
    if small.gpu.name != planned:
        message = f"--as {name}: the plan is for {planned}, not for {small.gpu.name}"
        raise UsageError(message, f"`sftplan plan ... --hardware {name}` makes one that is")
    return reservable_bytes(plan)


def reservable_bytes(plan: Plan) -> int:
    """capacity - context: of the card that was planned for."""
    gpu = plan.memory.gpu
    outside = gpu.used_bytes - gpu.peak_reserved_bytes  # context, and NCCL where there are several
    return gpu.capacity_bytes - outside


def check_larger(plan: Plan, machine: Hardware) -> None:
    """Refuse to rehearse a card on a smaller one.

    Raises:
        DriftError: This machine's GPU has less memory than the one that was planned for.
    """
    here = machine.gpu.memory_bytes - machine.gpu.unusable_bytes - machine.memory_taken_bytes
    wanted = plan.memory.gpu.capacity_bytes
    if here < wanted:
        gpu = plan.inputs.hardware.gpu.name
        message = (
            f"{machine.gpu.name} has {format_gib(here)} GiB to give, a rehearsal of "
            f"{gpu} takes {format_gib(wanted)}"
        )
        raise DriftError(message, "rehearse on a larger GPU, or `--no-gpu`")
