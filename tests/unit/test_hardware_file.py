"""Hardware files: what is written reads back; what is wrong is named with file, line and field."""

from __future__ import annotations

import contextlib
import string
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftplan.errors import SftplanError, UsageError
from sftplan.facts.hardware import Hardware, Host, Source
from sftplan.facts.profile_file import dump_profile, parse_profile, read_profile
from sftplan.facts.profiles import load_hardware

if TYPE_CHECKING:
    from pathlib import Path

GOOD = """\
name = "mine"

[gpu]
nvml_name = "NVIDIA Mine"
memory_bytes = 25_769_803_776
hbm_bytes_per_s = 9.36e11
bf16_flops_per_s = 7.1e13
fp32_flops_per_s = 3.56e13
pcie_bytes_per_s = 3.15e10
"""


def fails(text: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        parse_profile(text, "mine.toml")
    return caught.value


def test_the_least_file_gets_assumed_rates() -> None:
    hardware = parse_profile(GOOD, "mine.toml")
    assert hardware.gpu.memory_bytes == 24 * 2**30
    assert hardware.gpu.name == "NVIDIA Mine"
    assert set(hardware.rates.sources.values()) == {Source.ASSUMED}


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("memory_bytes = 25_769_803_776", "memory_bytes = 0",
         "line 5: gpu.memory_bytes = 0 must lie between", None),
        ("memory_bytes = 25_769_803_776", "memory_bytes = 24",
         "line 5: gpu.memory_bytes = 24 must", "24 GiB are 25_769_803_776"),
        ("memory_bytes = 25_769_803_776", 'memory_bytes = "24GiB"',
         "line 5: gpu.memory_bytes = '24GiB' must be a whole number", "written 25_769_803_776"),
        ("memory_bytes = 25_769_803_776", "memory_gib = 24",
         "line 5: gpu.memory_gib is no field", "memory_bytes"),
        ("memory_bytes = 25_769_803_776", "memory_bytes = true",
         "gpu.memory_bytes = True must be a number", None),
        ("hbm_bytes_per_s = 9.36e11", "hbm_bytes_per_s = nan",
         "line 6: gpu.hbm_bytes_per_s = nan must be a finite number", None),
        ("hbm_bytes_per_s = 9.36e11", "hbm_bytes_per_s = -1.0", "line 6: gpu.hbm", None),
        ("hbm_bytes_per_s = 9.36e11", "hbm_bytes_per_s = 936", "must lie between", None),
        ("hbm_bytes_per_s = 9.36e11", "", "gpu.hbm_bytes_per_s is missing", None),
        ("bf16_flops_per_s = 7.1e13", "", "gpu.bf16_flops_per_s is missing", "fp32 accumulation"),
        ('name = "mine"', 'name = "mine"\nusd_per_hour = -1.5',
         "line 2: usd_per_hour = -1.5 must", None),
        ('name = "mine"', 'name = "mine"\nusd_per_hour = inf', "finite", None),
        ('name = "mine"', 'name = ""', "line 1: name = '' must be text", None),
        ('name = "mine"', 'name = "mine"\nhost = 3', "line 2: host must be a table", None),
        ('name = "mine"', 'name = "mine"\ngpus_per_node = 10000000000000000000000',
         "gpus_per_node", None),
        ('name = "mine"', "name = mine", "is not TOML", None),
        ("[gpu]", "[gpus]", "gpus is no field", "gpu"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(old: str, new: str, message: str, hint: str | None) -> None:
    error = fails(GOOD.replace(old, new))
    assert message in error.message
    assert error.message.startswith("mine.toml")
    assert hint is None or hint in (error.hint or "")


def test_sources_are_checked() -> None:
    error = fails(GOOD + '[rates]\nhbm_fraction = 0.9\n[rates.sources]\nhbm_fraction = "guess"\n')
    assert "'guess' is no source" in error.message
    assert "line 12" in error.message
    error = fails(GOOD + '[rates.sources]\nspeed = "measured"\n')
    assert "names speed" in error.message


def test_unreadable_files(tmp_path: Path) -> None:
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.toml", tmp_path, binary):
        with pytest.raises(UsageError, match=str(path)):
            read_profile(path)


def test_deep_nesting_is_an_error_and_no_crash() -> None:
    with pytest.raises(UsageError):
        parse_profile("name = " + "[" * 5000, "deep.toml")


@given(st.text(alphabet=string.printable, max_size=200))
def test_no_text_is_more_than_a_usage_error(text: str) -> None:
    for document in (text, GOOD + text, f"name = {text}"):
        with contextlib.suppress(SftplanError):
            parse_profile(document, "any.toml")


@given(
    name=st.text(min_size=1).filter(lambda text: text.strip() != ""),
    notes=st.lists(st.text(), max_size=3),
    memory=st.integers(2**28, 2**42),
    bandwidth=st.floats(1e9, 1e14),
    price=st.none() | st.floats(0, 1e6),
    host=st.builds(
        Host,
        memory_bytes=st.none() | st.integers(2**28, 2**60),
        num_cpus=st.none() | st.integers(1, 1000),
    ),
)
def test_round_trip(
    name: str,
    notes: list[str],
    memory: int,
    bandwidth: float,
    price: float | None,
    host: Host,
) -> None:
    base = load_hardware("rtx-3090")
    hardware = replace(
        base,
        name=name,
        notes=tuple(notes),
        gpu=replace(base.gpu, memory_bytes=memory, hbm_bytes_per_s=bandwidth),
        usd_per_hour=price,
        host=host,
    )
    text = dump_profile(hardware)
    assert "\r" not in text
    assert parse_profile(text, "saved.toml") == hardware


def test_what_others_hold_now_is_not_saved() -> None:
    base: Hardware = load_hardware("l4")
    assert parse_profile(dump_profile(replace(base, memory_taken_bytes=5)), "x") == base
