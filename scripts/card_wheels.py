"""The packages that a machine with a card and torch, but without a network, lacks, in few bytes.

They are taken in order of worth, a group only whole, and only where it still fits by the sizes that the index tells:
nothing is downloaded to be left out. Wheels are laid into one tree, without files compiled for other versions of CUDA.
The tree is packed once, by xz as for machine code, and cut into parts small enough to be carried one by one. There:

    mkdir /tmp/site && cat FOLDER/site.tar.xz.* | tar -xJ -C /tmp/site && export PYTHONPATH=/tmp/site
"""

from __future__ import annotations

import json
import lzma
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import Version

PYTHON, CUDA = "3.12", "130"  # of the machine that they are for
MEBIBYTE = 1 << 20
PART = 28 * MEBIBYTE  # beside a checkout of the repository: with it under 64
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in (34, 28, 27, 24, 17)), "manylinux2014_x86_64")
# What does not come with torch, transformers, accelerate and peft; in the versions of requirements.lock, where named.
# In order of worth, with what is lost without a group.
GROUPS = {
    "nothing runs without": (
        "diffusers", "importlib-metadata", "omegaconf", "pydantic", "pydantic-core", "annotated-types",
        "typing-inspection", "argcomplete",
    ),
    "nf4 rows need": ("bitsandbytes",),
    "attention is flash in place of flash4 without": (
        "flash-attn-4", "quack-kernels", "apache-tvm-ffi", "torch-c-dlpack-ext", "nvidia-cutlass-dsl",
        "nvidia-cutlass-dsl-libs-base", "nvidia-cutlass-dsl-libs-cu13",
    ),
}  # fmt: skip
INDEX = "https://pypi.org/simple"
LOCK = Path(__file__).parents[1] / "requirements.lock"
OTHER_DEVICE = re.compile(r"libbitsandbytes_(?!cpu|cuda" + CUDA + r")\w+\.so$")
NOT_USED = re.compile(r"/stubs/|\.a$")  # for linking programs of one's own
FILTERS = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 64 * MEBIBYTE}]


@dataclass(frozen=True)
class Wheel:
    """A file of the index."""

    name: str  # of the package
    version: Version
    size: int  # bytes


def pack(folder: Path, limit: float) -> None:
    """Fill `folder` with the parts of the archive and say what is in them, and what is not.

    Args:
        limit: MiB of the archive; the size of a wheel in the index counts until it is packed.

    Raises:
        SystemExit: a package cannot be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part in folder.glob("site.tar.xz*"):
        part.unlink()
    whole = folder / "site.tar.xz"
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE))
    with Packed(whole) as packed:
        for why, names in GROUPS.items():
            group = [newest(name, _files(name), locked.get(name)) for name in names]
            if not fits(packed.size, group, limit):
                print(f"left out: {_in_words(group)}; {packed.size / MEBIBYTE:.1f} of {limit:g} are taken; {why} it")
                continue
            with tempfile.TemporaryDirectory() as fresh:
                for path in _downloaded(group, Path(fresh)):
                    print(f"{packed.add(path) / MEBIBYTE:6.1f} MiB  {path.name}", flush=True)
    data = whole.read_bytes()
    whole.unlink()
    for number, first in enumerate(range(0, len(data), PART)):
        part = folder / f"{whole.name}.{number:02}"
        part.write_bytes(data[first : first + PART])
        print(f"{part.stat().st_size / MEBIBYTE:6.1f} MiB  {part}")
    print(f"{len(data) / MEBIBYTE:6.1f} MiB  together, for Python {PYTHON} and CUDA {CUDA[:-1]}.{CUDA[-1]}")


def fits(taken: int, group: Iterable[Wheel], limit: float) -> bool:
    """Whether a group may be downloaded, beside the bytes that are packed already."""
    return taken + sum(wheel.size for wheel in group) <= limit * MEBIBYTE


def newest(name: str, files: Sequence[dict[str, Any]], locked: str | None = None) -> Wheel:
    """The wheel of a package for that machine: of the version that is locked, else the newest; a version before the
    release only where there is no other.

    Args:
        files: of the index, each with `filename` and `size`.

    Raises:
        SystemExit: there is none.
    """
    wanted = tuple(int(part) for part in PYTHON.split("."))
    abi = f"cp{PYTHON.replace('.', '')}"
    tags: set[Tag] = {*cpython_tags(wanted, [abi], PLATFORMS), *compatible_tags(wanted, abi, [*PLATFORMS, "any"])}
    found = []
    for file in files:
        try:
            _, version, _, its = parse_wheel_filename(file["filename"])
        except InvalidWheelFilename:  # an archive of the source, or older than the rules
            continue
        if its & tags and not file.get("yanked") and locked in (None, str(version)):
            found.append(Wheel(name, version, file["size"]))
    if not found:
        raise SystemExit(f"{name}: no wheel{'' if locked is None else f' of {locked}'} for Python {PYTHON} on x86-64")
    return max(found, key=lambda wheel: (not wheel.version.is_prerelease, wheel.version))


class Packed:
    """An archive that grows by a wheel at a time, as it lies when installed, less what is for other devices."""

    def __init__(self, target: Path) -> None:
        with ExitStack() as opened:
            self.file = opened.enter_context(target.open("wb"))
            stream = opened.enter_context(lzma.open(self.file, "wb", format=lzma.FORMAT_XZ, filters=FILTERS))
            self.tar = opened.enter_context(tarfile.open(fileobj=stream, mode="w|"))
            self.closing = opened.pop_all()

    def __enter__(self) -> Packed:
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.close()

    @property
    def size(self) -> int:
        """Bytes that are written; up to a block of the coder may wait."""
        return self.file.tell()

    def add(self, wheel: Path) -> int:
        """Returns the bytes that it took."""
        before = self.size
        with zipfile.ZipFile(wheel) as opened:
            for entry in opened.infolist():
                if not (entry.is_dir() or OTHER_DEVICE.search(entry.filename) or NOT_USED.search(entry.filename)):
                    about = tarfile.TarInfo(entry.filename)
                    about.size = entry.file_size
                    self.tar.addfile(about, opened.open(entry))
        return self.size - before


def _in_words(group: Sequence[Wheel]) -> str:
    total, largest = sum(wheel.size for wheel in group), max(group, key=lambda wheel: wheel.size)
    names = f"{', '.join(wheel.name for wheel in group)}: {total / MEBIBYTE:.1f} MiB in the index"
    return names if len(group) == 1 else f"{names}, {largest.name} alone {largest.size / MEBIBYTE:.1f}"


def _files(name: str) -> list[dict[str, Any]]:
    asked = urllib.request.Request(f"{INDEX}/{name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return list(json.load(answer)["files"])
    except OSError as error:
        raise SystemExit(f"{name}: {INDEX} does not answer: {error}") from error


def _downloaded(wheels: Iterable[Wheel], folder: Path) -> list[Path]:
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    names = [f"{wheel.name}=={wheel.version}" for wheel in wheels]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp", *platforms,
               "--dest", str(folder), *names]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{', '.join(names)}: {ended.stderr.strip().splitlines()[-1]}")
    return sorted(folder.glob("*.whl"))
