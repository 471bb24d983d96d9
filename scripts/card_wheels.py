"""The packages that a machine with a card and torch, but without a network, lacks, in few bytes.

Wheels are downloaded for that machine and laid into one tree; compiled files for other versions of CUDA stay away. The
tree is packed once, by xz as for machine code, and cut into parts small enough to be carried one by one. There:

    mkdir /tmp/site && cat FOLDER/site.tar.xz.* | tar -xJ -C /tmp/site && export PYTHONPATH=/tmp/site
"""

from __future__ import annotations

import lzma
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

PYTHON, CUDA = "3.12", "130"  # of the machine that they are for
MEBIBYTE = 1 << 20
PART = 28 * MEBIBYTE  # beside a checkout of the repository: with it under 64
PLATFORMS = ("2_34", "2_28", "2_27", "2_24", "2_17")  # of glibc, the newest first
# What does not come with torch, transformers, accelerate and peft; in the versions of requirements.lock, where named.
NAMES = (
    "diffusers", "importlib-metadata", "omegaconf", "pydantic", "pydantic-core", "annotated-types",
    "typing-inspection", "argcomplete", "bitsandbytes", "flash-attn-4", "quack-kernels", "apache-tvm-ffi",
    "torch-c-dlpack-ext", "nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-base", "nvidia-cutlass-dsl-libs-cu13",
)  # fmt: skip
LOCK = Path(__file__).parents[1] / "requirements.lock"
OTHER_DEVICE = re.compile(r"libbitsandbytes_(?!cpu|cuda" + CUDA + r")\w+\.so$")
NOT_USED = re.compile(r"/stubs/|\.a$")  # for linking programs of one's own
FILTERS = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 64 * MEBIBYTE}]


def pack(folder: Path) -> None:
    """Fill `folder` with the parts of the archive and say what is in them. Takes minutes.

    Raises:
        SystemExit: a package cannot be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part in folder.glob("site.tar.xz*"):
        part.unlink()
    with tempfile.TemporaryDirectory() as fresh:
        _download(Path(fresh))
        whole = folder / "site.tar.xz"
        for name, size in archive(sorted(Path(fresh).glob("*.whl")), whole):
            print(f"{size / MEBIBYTE:6.1f} MiB  {name}", flush=True)
    data = whole.read_bytes()
    whole.unlink()
    for number, first in enumerate(range(0, len(data), PART)):
        part = folder / f"{whole.name}.{number:02}"
        part.write_bytes(data[first : first + PART])
        print(f"{part.stat().st_size / MEBIBYTE:6.1f} MiB  {part}")
    print(f"{len(data) / MEBIBYTE:6.1f} MiB  together, for Python {PYTHON} and CUDA {CUDA[:-1]}.{CUDA[-1]}")


def archive(wheels: Iterable[Path], target: Path) -> Iterable[tuple[str, int]]:
    """Write what is needed of some wheels, as it lies when installed; yields each name and the bytes it took."""
    with target.open("wb") as file:
        before = 0
        with (
            lzma.open(file, "wb", format=lzma.FORMAT_XZ, filters=FILTERS) as packed,
            tarfile.open(fileobj=packed, mode="w|") as tar,
        ):
            for wheel in wheels:
                with zipfile.ZipFile(wheel) as opened:
                    for entry in opened.infolist():
                        if not (
                            entry.is_dir() or OTHER_DEVICE.search(entry.filename) or NOT_USED.search(entry.filename)
                        ):
                            about = tarfile.TarInfo(entry.filename)
                            about.size = entry.file_size
                            tar.addfile(about, opened.open(entry))
                yield wheel.name, file.tell() - before
                before = file.tell()


def _download(folder: Path) -> None:
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE))
    names = [f"{name}=={locked[name]}" if name in locked else name for name in NAMES]
    platforms = [f"--platform=manylinux_{version}_x86_64" for version in PLATFORMS] + [
        "--platform=manylinux2014_x86_64"
    ]
    for name in names:
        early = ["--pre"] * (name == "flash-attn-4")  # there are betas only
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp", *platforms, *early,
                   "--dest", str(folder), name]  # fmt: skip
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise SystemExit(f"{name}: {ended.stderr.strip().splitlines()[-1]}")
