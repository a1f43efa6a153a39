"""`sftplan detect`: this machine as a hardware profile."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sftplan.api
from sftplan.cli.help import command
from sftplan.cli.options import common_options, option
from sftplan.cli.output import print_json, print_text, talk
from sftplan.errors import NotReadyError, SftplanError, UsageError

if TYPE_CHECKING:
    from sftplan.detect.gpus import Machine
    from sftplan.facts.hardware import Hardware, Host


@command(
    "detect",
    examples=[
        "sftplan detect",
        "sftplan detect --json",
        "sftplan detect --save my-machine.toml",
        "sftplan detect --calibrate",
    ],
)
@option("--save", metavar="FILE", help="Write the machine as a file for --hardware.")
@option("--calibrate", is_flag=True,
        help="Measure what the GPU and its host reach, for the plans to come.")  # fmt: skip
@common_options
def detect(*, save: str | None, calibrate: bool, as_json: bool, quiet: bool, verbose: int) -> None:
    """Show what this machine has: GPUs, memory, processors."""
    from sftplan.detect.gpus import find_machine, hardware_of
    from sftplan.detect.host import detect_host

    try:
        machine = find_machine()
    except NotReadyError as error:
        _print_without_gpu(detect_host(), error, as_json=as_json)
        raise
    try:
        hardware = hardware_of(machine)
    except UsageError as error:
        _print_unknown(machine, error, as_json=as_json)
        if save is None:
            raise
        _save_skeleton(machine, save)
        talk(f"wrote {save}: it loads when the rates that it asks for are filled in", quiet=quiet)
        return
    if calibrate:
        talk("measuring, under a minute; the GPU should have nothing else to do", quiet=quiet)
        path = sftplan.api.calibrate()
        talk(f"wrote {path}", quiet=quiet)
        hardware = hardware_of(machine)
    _print_hardware(hardware, machine, as_json=as_json)
    if save is not None:
        _save(hardware, save)
        talk(f"wrote {save}; use it as --hardware {save}", quiet=quiet)


def _document(machine: Machine) -> dict[str, Any]:
    devices = [asdict(device) for device in machine.devices]
    return {"driver_version": machine.driver_version, "devices": devices}


def _print_hardware(hardware: Hardware, machine: Machine, *, as_json: bool) -> None:
    from sftplan.report.hardware import hardware_document, render_hardware

    if as_json:
        print_json({**hardware_document(hardware), **_document(machine)})
    else:
        print_text(f"{render_hardware(hardware)}\n\nDriver {machine.driver_version or 'unknown'}")


def _print_without_gpu(host: Host, error: SftplanError, *, as_json: bool) -> None:
    from sftplan.report.hardware import render_host

    if as_json:
        document: dict[str, Any] = {
            "name": None,
            "num_gpus": 0,
            "gpu": None,
            "host": asdict(host),
            "devices": [],
        }
        print_json({**_head(), **document, "problem": error.message})
    else:
        print_text("\n".join(["no GPU", *render_host(host)]))


def _print_unknown(machine: Machine, error: SftplanError, *, as_json: bool) -> None:
    from sftplan.report.hardware import render_host
    from sftplan.units import format_gib

    if as_json:
        document: dict[str, Any] = {"name": None, "num_gpus": len(machine.devices), "gpu": None}
        rest = {"host": asdict(machine.host), "problem": error.message}
        print_json({**_head(), **document, **rest, **_document(machine)})
        return
    lines = [
        f"{device.name}, {format_gib(device.memory_bytes)} GiB, "
        f"compute capability {device.compute_capability or 'unknown'}"
        for device in machine.devices
    ]
    print_text("\n".join([*lines, *render_host(machine.host)]))


def _head() -> dict[str, Any]:
    return {"format": "sftplan.hardware", "format_version": 1}


def _save(hardware: Hardware, save: str) -> None:
    from sftplan.facts.profile_file import dump_profile

    _write(save, dump_profile(replace(hardware, name=_name_of(save))))


def _save_skeleton(machine: Machine, save: str) -> None:
    from sftplan.detect.skeleton import skeleton

    _write(save, skeleton(machine, _name_of(save)))


def _name_of(save: str) -> str:
    """The profile's name: that of its file, by which it is found in the user's folder."""
    from sftplan.facts.profiles import normal_name

    return normal_name(Path(save).stem) or "this-machine"


def _write(save: str, text: str) -> None:
    try:
        Path(save).write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        message = f"{save}: cannot be written: {getattr(error, 'strerror', None) or error}"
        raise UsageError(message) from None
