"""Every profile and every offer is there, loads and is plausible; published figures hold."""

from __future__ import annotations

import csv
from dataclasses import fields
from pathlib import Path

import pytest

from sftplan.errors import UsageError
from sftplan.facts.hardware import Hardware, Source
from sftplan.facts.profile_file import dump_profile, parse_profile
from sftplan.facts.profile_schema import GPU, RATES
from sftplan.facts.profiles import (
    all_offers,
    all_profiles,
    load_hardware,
    normal_name,
    offer_names,
    profile_names,
    profiles_of_nvml_name,
)
from sftplan.units import GIB, MIB

ROOT = Path(__file__).parents[2] / "profiles"
PROFILES = all_profiles()
OFFERS = all_offers()


def test_numbers_and_names() -> None:
    names = [each.name for each in (*PROFILES, *OFFERS)]
    assert len(PROFILES) == 36
    assert len(OFFERS) == 150
    assert len(names) == len(set(names))
    assert all(name == name.lower() and " " not in name for name in names)
    assert profile_names() == [each.name for each in PROFILES]
    assert offer_names() == [each.name for each in OFFERS]
    assert [path.stem for path in sorted((ROOT / "gpus").glob("*.toml"))] == profile_names()


@pytest.mark.parametrize("hardware", PROFILES, ids=lambda each: each.name)
def test_a_profile_is_plausible(hardware: Hardware) -> None:
    gpu, rates = hardware.gpu, hardware.rates
    assert 8 * GIB <= gpu.memory_bytes <= 300 * GIB
    assert gpu.unusable_bytes < 0.05 * gpu.memory_bytes
    assert 2e11 <= gpu.hbm_bytes_per_s <= 1e13
    peak = gpu.bf16_flops_per_s if gpu.bf16_native else gpu.fp16_flops_per_s
    assert peak is not None
    assert gpu.fp32_flops_per_s < peak
    assert gpu.bf16_native is (gpu.bf16_flops_per_s is not None)
    # No part moves its memory more than a few hundred times per operation it does on it.
    assert 50 <= peak / gpu.hbm_bytes_per_s <= 500 or hardware.name == "h20"
    assert 0.4 <= rates.matmul_fraction <= 1.1
    assert 0.7 <= rates.hbm_fraction <= 0.95
    assert hardware.usd_per_hour is None


@pytest.mark.parametrize("hardware", PROFILES, ids=lambda each: each.name)
def test_every_figure_has_a_source(hardware: Hardware) -> None:
    sources = hardware.provenance.sources
    text = {"name", "nvml_name", "vendor", "architecture", "bf16_native"}
    present = {key for key in GPU if getattr(hardware.gpu, key) is not None} - text
    assert set(sources) == present
    assert set(hardware.rates.sources) == {
        key for key in RATES if getattr(hardware.rates, key) is not None
    }
    assert hardware.provenance.as_of
    assert hardware.provenance.confidence in ("high", "medium", "low")
    assert hardware.provenance.references
    assert set(hardware.provenance.unverified) <= present
    assert all(sources[key] is Source.ASSUMED for key in hardware.provenance.unverified)


def test_the_schema_knows_every_field() -> None:
    gpu = PROFILES[0].gpu
    assert {each.name for each in fields(gpu)} == set(GPU)
    assert {each.name for each in fields(PROFILES[0].rates)} == {*RATES, "sources"}


@pytest.mark.parametrize("hardware", PROFILES, ids=lambda each: each.name)
def test_a_profile_reads_back(hardware: Hardware) -> None:
    assert parse_profile(dump_profile(hardware), "saved.toml") == hardware


@pytest.mark.parametrize("hardware", OFFERS, ids=lambda each: each.name)
def test_an_offer_is_plausible(hardware: Hardware) -> None:
    offer = hardware.offer
    assert offer is not None
    assert load_hardware(hardware.name) == hardware
    assert hardware.usd_per_hour is not None
    assert 0.05 <= hardware.usd_per_hour / hardware.gpus_per_node <= 20
    assert hardware.gpus_per_node in (1, 2, 4, 8)
    assert hardware.host.memory_bytes is not None
    assert hardware.host.memory_bytes >= 16 * GIB
    assert hardware.host.num_cpus
    assert hardware.price_as_of
    assert offer.region
    assert offer.tier in ("catalog", "secondary")
    assert offer.source
    spot = offer.spot_usd_per_hour
    assert spot is None or 0 < spot < hardware.usd_per_hour


def test_all_offer_files_have_the_same_columns() -> None:
    headers = set()
    for path in (ROOT / "offers").glob("*.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        headers.add(tuple(rows[0]))
        assert all(len(row) == len(rows[0]) for row in rows)
        assert all(row[0].startswith(f"{path.stem}/") for row in rows[1:])
    assert len(headers) == 1


@pytest.mark.parametrize(
    ("name", "field", "expected"),
    [
        ("h200-sxm", "memory_bytes", 143_771 * MIB),
        ("h200-sxm", "unusable_bytes", 644_939_776),
        ("h200-sxm", "bf16_flops_per_s", 989.4e12),
        ("h200-sxm", "hbm_bytes_per_s", 4.8e12),
        ("h200-sxm", "nvlink_bytes_per_s", 450e9),
        ("h100-sxm", "hbm_bytes_per_s", 3.35e12),
        ("h100-pcie", "bf16_flops_per_s", 756e12),
        ("a100-80gb-sxm", "bf16_flops_per_s", 312e12),  # 624 is with sparsity
        ("a100-40gb-pcie", "memory_bytes", 40_960 * MIB),
        ("rtx-4090", "bf16_flops_per_s", 165.2e12),  # fp32 accumulation: half of 330.3
        ("rtx-4090", "memory_bytes", 24_564 * MIB),
        ("rtx-3090", "bf16_flops_per_s", 71e12),
        ("a10g", "bf16_flops_per_s", 70e12),  # not the A10's 125
        ("t4", "bf16_flops_per_s", None),
        ("t4", "fp16_flops_per_s", 65e12),
        ("l4", "hbm_bytes_per_s", 300e9),
        ("mi300x", "bf16_flops_per_s", 1307.4e12),
        ("rtx-4060ti-16gb", "pcie_bytes_per_s", 15.75e9),  # eight lanes
    ],
)
def test_published_figures(name: str, field: str, expected: float | None) -> None:
    assert getattr(load_hardware(name).gpu, field) == expected


def test_published_prices() -> None:
    assert load_hardware("aws/p5.48xlarge").usd_per_hour == 55.04  # 98.32 is stale
    assert load_hardware("aws/p5.4xlarge").usd_per_hour == 6.88
    assert load_hardware("lambda/gpu_8x_h100_sxm5").usd_per_hour == 31.92


def test_what_the_h200_was_measured_at() -> None:
    rates = load_hardware("h200-sxm").rates
    assert (rates.context_bytes, rates.device_bytes) == (804_061_184, 644_939_776)
    assert rates.sources["context_bytes"] is Source.MEASURED
    assert rates.sources["hbm_fraction"] is Source.MEASURED


def test_names_are_forgiving() -> None:
    for name in ("RTX 4090", "rtx_4090", " RTX-4090 "):
        assert load_hardware(name).name == "rtx-4090"
    assert load_hardware("LAMBDA/gpu-8x-h100-sxm5").name == "lambda/gpu_8x_h100_sxm5"
    assert normal_name("A100 80GB SXM") in profile_names()


@pytest.mark.parametrize(
    ("name", "hint"),
    [("h100", "h100-pcie"), ("rtx4090", "rtx-4090"), ("aws/p5.48", "aws/p5.48xlarge"),
     ("zzz", "sftplan profiles"), ("", "sftplan profiles"), ("../gpus/t4", "sftplan profiles"),
     ("a\0b", "sftplan profiles")],
)  # fmt: skip
def test_unknown_names_get_a_suggestion(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_hardware(name)
    assert hint in (caught.value.hint or "")


def test_gpus_and_nodes() -> None:
    assert load_hardware("h100-sxm", gpus=8, nodes=2).num_gpus == 16
    part = load_hardware("aws/p5.48xlarge", gpus=4)
    assert part.gpus_per_node == 4
    assert part.usd_per_hour == 55.04
    assert any("whole machine" in note for note in part.notes)
    with pytest.raises(UsageError, match="has 1"):
        load_hardware("aws/p5.4xlarge", gpus=8)
    for wrong in ({"gpus": 0}, {"nodes": -1}):
        with pytest.raises(UsageError, match="at least 1"):
            load_hardware("h100-sxm", **wrong)


def test_a_file_and_the_users_own_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "sftplan" / "profiles"
    folder.mkdir(parents=True)
    text = dump_profile(load_hardware("l4")).replace('"l4"', '"mine"', 1)
    (folder / "l4.toml").write_text(text.replace("hbm_fraction = 0.783", "hbm_fraction = 0.7"))
    (folder / "mine.toml").write_text(text)
    assert load_hardware(str(folder / "mine.toml")).name == "mine"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    own = load_hardware("l4")

    assert own.rates.hbm_fraction == 0.7
    assert any("in place of the built-in" in note for note in own.notes)
    assert load_hardware("mine").notes[-1].startswith("profile mine is")
    assert "mine" in profile_names()
    assert load_hardware("t4").notes == ()
    assert profiles_of_nvml_name("NVIDIA L4")[0].rates.hbm_fraction == 0.7


def test_nvml_names_with_and_without_the_maker() -> None:
    assert [each.name for each in profiles_of_nvml_name("NVIDIA H200")] == ["h200-sxm"]
    assert [each.name for each in profiles_of_nvml_name("A100-SXM4-80GB")] == ["a100-80gb-sxm"]
    assert profiles_of_nvml_name("NVIDIA H300") == []
