"""A disk that fills up at every write in turn: cache, checkpoints, metrics, configuration, event files."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import FAMILIES, Lab, checkpoints, difference, full_or, half_written, outcome, record, versions

from qwen_image_finetune.disk.manifest import verify_folder
from qwen_image_finetune.encoding.store import Store

SIZE = 4 << 20  # of the disk, bytes
PAGE = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs more rights than these")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def leave(disk: Path, free: int) -> None:
    """Fill the disk so that `free` bytes are left."""
    import os

    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    room = os.statvfs(disk).f_bavail * PAGE
    filler.write_bytes(bytes(max(0, room - free)))


@pytest.mark.timeout(3600)
def test_a_disk_that_fills_up_at_any_write(lab: Lab, disk: Path) -> None:
    settings = {"train": {"resume_from_checkpoint": "latest", "checkpoints_total_limit": 2}}
    drawing = {"enabled": True, "steps": 5, "num_validation_samples": 1, "num_inference_steps": 1}
    expected = {}
    places = {}
    families = FAMILIES[: full_or(2, 1)]  # both write the same files
    for family in families:
        config = lab.config(
            f"roomy-{family}", family, own_cache=True, logging={"report_to": "tensorboard"}, validation=drawing,
            **settings,
        )  # fmt: skip
        lab.run(config)
        expected[family] = outcome(versions(config)[0])
        used = sum(-(-path.stat().st_size // PAGE) * PAGE for path in config.parent.rglob("*") if path.is_file())
        places[family] = used // PAGE + 20  # what is deleted on the way takes room as well

    tried, lost, failures = 0, [], 0
    for family in families:
        pages = range(places[family]) if full_or(1, 0) else range(1, places[family], places[family] // 6)
        for page in pages:
            tried += 1
            place = disk / f"{family}-{page}"
            config = lab.config(
                f"full-{family}-{page}", family, validation=drawing,
                cache={"cache_dir": str(place / "cache")},
                logging={"output_dir": str(place / "output"), "report_to": "tensorboard"}, **settings,
            )  # fmt: skip
            leave(disk, page * PAGE)
            trial = lab.start(config)
            code = trial.wait()
            said, problem = trial.said(), None
            found = sorted((place / "output" / "project").glob("v*"))
            if code:
                failures += 1
                # Where not even an empty folder can be made there is no file whose size could be said.
                clear = re.search(r"error: .*(no space left to write .* it needs |No space left on device)", said)
                problem = None if code == 2 and clear else f"exit code {code}, {said}"
            if half_written(disk):
                problem = f"half-written: {half_written(disk)}"
            for version in found:
                damage = [verify_folder(folder) for folder in checkpoints(version).values()]
                problem = problem or next(filter(None, damage), None)
            store = Store(place / "cache")
            damaged = [path.name for path in store.folder.glob("??/*.safetensors") if not store.verify(path.stem)]
            problem = problem or (f"damaged entries {damaged}" if damaged else None)

            (disk / "filler").unlink()
            lab.run(config)
            last = sorted((place / "output" / "project").glob("v*"))[-1]
            problem = problem or difference(expected[family], outcome(last))
            if problem:
                lost.append((family, page, problem))
            subprocess.run(["rm", "-rf", str(place), str(config.parent)], check=True)
    assert failures > tried / 2
    record("disk full at any write", tried, lost, f"{failures} ended with the message, then resumed; page by page")
