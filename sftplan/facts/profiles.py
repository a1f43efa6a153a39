"""Hardware by name: a GPU profile, a cloud's offer, a file, or the user's own profile.

A file `NAME.toml` in the user's folder (`~/.config/sftplan/profiles`) takes the place of the
built-in profile of that name; the hardware's notes say so.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from sftplan.errors import UsageError, did_you_mean
from sftplan.facts.calibration import calibrated
from sftplan.facts.folders import config_folder
from sftplan.facts.offers import OfferRow, offered_hardware, read_offers
from sftplan.facts.profile_file import read_profile

if TYPE_CHECKING:
    from sftplan.facts.hardware import Hardware

_PACKAGE = Path(__file__).parent.parent
_MAX_SUGGESTIONS = 6


@lru_cache(maxsize=1)
def _folder() -> Path:
    """Where the profiles are: inside the wheel, or beside the package in a source checkout."""
    installed = _PACKAGE / "_profiles"
    return installed if installed.is_dir() else _PACKAGE.parent / "profiles"


def user_folder() -> Path | None:
    """The user's own profiles; None where there is no home."""
    base = config_folder()
    return None if base is None else base / "profiles"


def _stems(folder: Path | None) -> list[str]:
    if folder is None:
        return []
    try:
        return sorted(path.stem for path in folder.glob("*.toml"))
    except OSError:
        return []


def profile_names() -> list[str]:
    """Names of all GPU profiles, the user's own included."""
    return sorted({*_stems(_folder() / "gpus"), *_stems(user_folder())})


def offer_names() -> list[str]:
    """Names of all offers, as `aws/p5.4xlarge`, by cloud and in the order of its file."""
    return list(_offers())


@lru_cache(maxsize=1)
def _offers() -> dict[str, OfferRow]:
    paths = sorted((_folder() / "offers").glob("*.csv"))
    return {name: row for path in paths for name, row in read_offers(path).items()}


def normal_name(name: str) -> str:
    """A name as the files have it.

    >>> normal_name("RTX 4090"), normal_name("H200_SXM"), normal_name("aws/P5.4xlarge")
    ('rtx-4090', 'h200-sxm', 'aws/p5.4xlarge')
    """
    return name.strip().lower().replace(" ", "-").replace("_", "-")


@lru_cache(maxsize=64)
def _built_in(name: str) -> Hardware | None:
    path = _folder() / "gpus" / f"{name}.toml"
    return read_profile(path) if path.is_file() else None


def _users_own(name: str) -> Hardware | None:
    folder = user_folder()
    path = None if folder is None else folder / f"{name}.toml"
    if path is None or not path.is_file():
        return None
    note = f"profile {name} is {path}"
    if (_folder() / "gpus" / f"{name}.toml").is_file():
        note += ", in place of the built-in one"
    own = read_profile(path)
    return replace(own, notes=(*own.notes, note))


def _profile(name: str) -> Hardware | None:
    if not name or "/" in name or "\\" in name or "\0" in name or name.startswith("."):
        return None
    return _users_own(name) or _built_in(name)


def _offer(name: str) -> Hardware | None:
    cloud, slash, _ = name.partition("/")
    path = _folder() / "offers" / f"{cloud}.csv"
    if not slash or not cloud.isalnum() or not path.is_file():
        return None
    for row in read_offers(path).values():
        if normal_name(row.name) == name:
            return _offered(row)
    return None


def _offered(row: OfferRow) -> Hardware:
    profile = _profile(row.gpu)
    assert profile is not None, row.gpu
    return offered_hardware(row, profile)


def load_hardware(name: str, *, gpus: int | None = None, nodes: int | None = None) -> Hardware:
    """Hardware by a profile's name, an offer's name or a file's path.

    `gpus` is per node; of an offer it cannot exceed what the machine has.
    """
    wanted = normal_name(name)
    profile = _profile(wanted)
    found = _offer(wanted) if profile is None else calibrated(profile)
    if found is None:
        if not _looks_like_file(name):
            message = f"no hardware {name!r}"
            raise UsageError(message, _suggestion(wanted))
        found = read_profile(Path(name).expanduser())
    return _resized(found, gpus, nodes)


def _looks_like_file(name: str) -> bool:
    if name.endswith(".toml"):
        return True
    try:
        return Path(name).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):
        return False


def _suggestion(wanted: str) -> str:
    names = [*profile_names(), *offer_names()]
    alike = [name for name in names if wanted and (name.startswith(wanted) or wanted in name)]
    if len(alike) > 1:
        more = ", ..." if len(alike) > _MAX_SUGGESTIONS else ""
        return f"did you mean one of {', '.join(alike[:_MAX_SUGGESTIONS])}{more}?"
    return did_you_mean(wanted, names) or "`sftplan profiles` lists all; a file ends with .toml"


def _resized(hardware: Hardware, gpus: int | None, nodes: int | None) -> Hardware:
    for option, value in (("--gpus", gpus), ("--nodes", nodes)):
        if value is not None and value < 1:
            message = f"{option} {value}: must be at least 1"
            raise UsageError(message)
    notes = hardware.notes
    has = hardware.gpus_per_node
    is_machine = hardware.offer is not None or hardware.host.memory_bytes is not None
    if is_machine and gpus is not None and gpus > has:
        message = f"--gpus {gpus}: {hardware.name} has {has}"
        raise UsageError(message, "--nodes takes several machines of that kind")
    if gpus is not None and gpus < has and hardware.usd_per_hour is not None:
        notes += (f"{gpus} of {has} GPUs are used; the price is of the whole machine",)
    num_nodes = nodes or hardware.num_nodes
    if num_nodes > 1 and hardware.internode_bytes_per_s is None:
        notes += ("the bandwidth between machines is not known; a hardware file can state it",)
    return replace(hardware, gpus_per_node=gpus or has, num_nodes=num_nodes, notes=notes)


def all_profiles() -> list[Hardware]:
    """Every GPU profile, one GPU each, by name."""
    found = (_profile(name) for name in profile_names())
    return [hardware for hardware in found if hardware is not None]


def all_offers() -> list[Hardware]:
    """Every offer of every cloud."""
    return [_offered(row) for row in _offers().values()]


def profiles_of_nvml_name(nvml_name: str) -> list[Hardware]:
    """Profiles of GPUs that NVML calls so; variants differ in memory. The user's own come first.

    Older drivers leave out the maker's name.
    """
    wanted = _bare(nvml_name)
    own = [_users_own(name) for name in _stems(user_folder())]
    found = [each for each in own if each is not None and _bare(each.gpu.nvml_name) == wanted]
    taken = {each.gpu.name for each in found}
    for path in sorted((_folder() / "gpus").glob("*.toml")):
        # Reading the text is a tenth of the work of parsing it.
        if f'{wanted}"' in path.read_text(encoding="utf-8"):
            hardware = _built_in(path.stem)
            if hardware is not None and _bare(hardware.gpu.nvml_name) == wanted:
                found += [hardware] if hardware.gpu.name not in taken else []
    return found


def _bare(nvml_name: str) -> str:
    return nvml_name.removeprefix("NVIDIA ").strip()
