"""What `qif demo` needs: two toy bases, two small data sets, two configurations. A wheel brings them along."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from qwen_image_finetune.disk.files import staged_file, staged_folder
from qwen_image_finetune.machine.console import say

PACKAGE = Path(__file__).resolve().parent.parent
BROUGHT = PACKAGE / "demo_files"  # setup.py puts them there
FOLDERS = ("toy/flux-kontext", "toy/qwen-image-edit", "data/face_seg", "data/face_seg_held_out")
FILES = ("configs/demo_flux_kontext.yaml", "configs/demo_qwen_image_edit.yaml")


class DemoError(ValueError):
    """The demonstration cannot run as asked."""


def put_there(folder: Path) -> None:
    """Put what is missing into a folder, which is made if need be, and say so.

    Raises:
        DemoError: the files came neither with a wheel nor with a checkout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if brought := lay_out(folder):
        say(f"{folder}: two toy bases, two data sets and two configurations ({len(brought)} new)")


def lay_out(folder: Path) -> list[Path]:
    """Put what is missing into a folder, at the places that the configurations name; returns what was put there.

    Raises:
        DemoError: the files came neither with a wheel nor with a checkout.
    """
    source = BROUGHT if BROUGHT.is_dir() else PACKAGE.parent
    missing = [name for name in (*FOLDERS, *FILES) if not (folder / name).exists()]
    absent = [name for name in missing if not (source / name).exists()]
    if absent:
        raise DemoError(f"{source} lacks {absent[0]}: install qwen-image-finetune from its wheel, or run in a checkout")
    return list(_copied(source, folder, missing))


def _copied(source: Path, folder: Path, names: list[str]) -> Iterator[Path]:
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in FOLDERS:
            with staged_folder(target, sealed=False) as staged:
                shutil.copytree(source / name, staged, dirs_exist_ok=True)
        else:
            with staged_file(target) as staged:
                shutil.copyfile(source / name, staged)
        yield target
