"""What must be true of a release: `make release-check` runs it. The archives are left in dist/.

Builds source archive and wheel, checks their metadata and what they hold, installs the wheel apart from the checkout
(dependencies are those of this environment), runs the demonstration from it in a folder of its own, and checks links.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

from qwen_image_finetune import __version__

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "qwen_image_finetune"
MOST_MIB = 60  # of an archive; the package index takes 100
NEEDED = ("py.typed", "judging/pages/page.css", "studio/static", "demo_files/toy", "demo_files/data/face_seg")


def main() -> None:
    """Each check ends the script where it fails."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    expect(f"\n## {__version__}\n" in changelog, f"CHANGELOG.md has no part about {__version__}")
    tags = output("git", "tag", "--points-at", "HEAD").split()
    strange = [tag for tag in tags if re.match(r"v\d", tag) and tag != f"v{__version__}"]
    expect(not strange, f"this commit is tagged {strange}, and the package says {__version__}")
    wheel = build()
    with tempfile.TemporaryDirectory() as folder:
        demonstrate(wheel, Path(folder))
    run(sys.executable, "-m", "pytest", "-q", "tests/test_docs.py", "-k", "link")
    print(f"\n{wheel.relative_to(ROOT)} is ready; tag this commit v{__version__}")


def build() -> Path:
    """Source archive and the wheel that is made from it; returns the latter."""
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    run(str(Path(sys.executable).with_name("uv")), "build", "--no-build-isolation", "--quiet", "--out-dir", "dist")
    (archive,), (wheel,) = (ROOT / "dist").glob("*.tar.gz"), (ROOT / "dist").glob("*.whl")
    for file in (archive, wheel):
        size = file.stat().st_size / 2**20
        print(f"{file.relative_to(ROOT)}: {size:.1f} MiB")
        expect(size < MOST_MIB, f"more than {MOST_MIB} MiB")
    with tarfile.open(archive) as held:
        names = held.getnames()
    expect(any(name.endswith("/tests/test_flow.py") for name in names), f"{archive.name} lacks the tests")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        about = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(packed.read(about), validate=True)
    tops = {name.split("/")[0] for name in names}
    expect(tops == {PACKAGE, about.split("/")[0]}, f"{wheel.name} brings {sorted(tops)}")
    for needed in NEEDED:
        expect(any(name.startswith(f"{PACKAGE}/{needed}") for name in names), f"{wheel.name} lacks {needed}")
    expect(str(metadata.version) == __version__, f"{wheel.name} is of version {metadata.version}")
    return wheel


def demonstrate(wheel: Path, folder: Path) -> None:
    """Install into an empty folder, and run the demonstration there."""
    site = folder / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    apart = {**os.environ, "PYTHONPATH": str(site)}
    where = subprocess.run(
        [sys.executable, "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)"],
        cwd=folder, env=apart, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    expect(where.startswith(str(site)), f"{where.strip()} is not what was installed")
    subprocess.run([sys.executable, site / "bin" / "qif", "demo", "here"], cwd=folder, env=apart, check=True)
    expect((folder / "here/demo/output/demo.html").is_file(), "the demonstration wrote no page")


def run(*command: str) -> None:
    print("$", *command, flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        sys.exit(f"no release: {otherwise}")


if __name__ == "__main__":
    main()
