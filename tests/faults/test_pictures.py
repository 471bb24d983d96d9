"""Sixty picture files that are none, or not whole, or of another kind than they say."""

from __future__ import annotations

import io
import pickle
import random
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from lab import FAMILIES, Lab, record, versions, write_pairs
from PIL import Image


def encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    """A random picture of 48 x 48 pixels in a file format."""
    rng = np.random.default_rng(1)
    picture = Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (48, 48), colour) for colour in ("red", "green", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def bad_files() -> list[tuple[str, bytes]]:
    """(suffix, content) of sixty files that nobody can train on."""
    chance = random.Random(0)
    files: list[tuple[str, bytes]] = []
    for suffix, kind in ((".png", "PNG"), (".jpg", "JPEG"), (".webp", "WEBP")):
        whole = encoded(kind)
        files += [(suffix, whole[: int(len(whole) * share)]) for share in (0.02, 0.1, 0.25, 0.5, 0.7, 0.9)]
        files += [(suffix, b""), (suffix, b"\x00" * 5000), (suffix, chance.randbytes(3000)), (suffix, whole[:12])]
        files += [(suffix, b"<html>not found</html>"), (suffix, pickle.dumps({"a": 1})), (suffix, whole[::-1])]
        files += [(suffix, encoded("TIFF")), (suffix, b"\xff\xd8\xff\xe0" + bytes(20))]
    files += [(".png", animated(kind)) for kind in ("GIF", "PNG", "WEBP")]
    files += [(".png", bomb(*size)) for size in ((50_000, 50_000), (2**31 - 1, 2**31 - 1), (200_000_000, 2), (0, 0))]
    png = encoded("PNG")
    damaged = bytearray(png)
    damaged[len(png) // 2] ^= 0xFF
    files += [
        (".png", bytes(damaged)),
        (".png", png[:8] + png[40:]),
        (".png", b"\x89PNG\r\n\x1a\n"),
        (".jpg", b"GIF89a"),
    ]
    files += [(".webp", b"RIFF\xff\xff\xff\x7fWEBPVP8 "), (".png", b"BM" + bytes(60))]
    files += [(".jpg", b"%PDF-1.7\n"), (".png", b'<svg xmlns="http://www.w3.org/2000/svg"/>')]
    return files


def fine_files() -> list[tuple[str, bytes]]:
    """Modes that are rare and can be read."""
    rng = np.random.default_rng(2)
    deep = io.BytesIO()
    Image.fromarray(rng.integers(0, 65536, (48, 48), dtype=np.uint16)).save(deep, "PNG")
    modes = [(".png", encoded("PNG", mode)) for mode in ("1", "L", "LA", "P", "RGBA")]
    modes += [(".jpg", encoded("JPEG", mode)) for mode in ("L", "CMYK")]
    modes += [(".jpg", encoded("JPEG", progressive=True)), (".webp", encoded("WEBP", "RGBA", lossless=True))]
    return [*modes, (".png", deep.getvalue())]


@pytest.mark.timeout(900)
def test_bad_pictures_are_listed_by_name_before_any_model_loads(lab: Lab, tmp_path: Path) -> None:
    bad = bad_files()
    assert len(bad) == 60
    pairs = write_pairs(tmp_path / "pairs", 4)
    names = []
    for number, (suffix, content) in enumerate(bad):
        # As a target or as a reference in turn; the other one of the pair is sound.
        folders = ["control_images", "training_images"][:: 1 if number % 2 else -1]
        name = f"bad-{number}{suffix}"
        (pairs / folders[0] / name).write_bytes(content)
        (pairs / folders[1] / f"bad-{number}.png").write_bytes(encoded("PNG"))
        (pairs / "training_images" / f"bad-{number}.txt").write_text("x")
        names.append(f"{folders[0]}/{name}")
    lost = []
    for family, cached in zip(FAMILIES, (True, False), strict=True):
        config = lab.config(
            f"bad-{cached}", family, data={"init_args": {"dataset_path": str(pairs)}}, cache={"use_cache": cached}
        )  # fmt: skip
        trial = lab.run(config, expect=2, sabotage="no_model:x")
        said = trial.said()
        lost = [name for name in names if f"{name}:" not in said]
        lost += [name for name in ("0.png", "3.png", "Traceback") if f"/{name}" in said]
        assert not versions(config) or not any((version / "metrics.jsonl").exists() for version in versions(config))
    record("bad pictures", len(bad), lost, "listed by name before a model loads, in one report")


@pytest.mark.timeout(900)
def test_damage_behind_the_header_alone_is_found_before_any_model_loads(lab: Lab, tmp_path: Path) -> None:
    """No header is wrong, so the quick look at headers finds nothing."""
    pairs = write_pairs(tmp_path / "pairs", 4)
    for cached in (True, False):
        config = lab.config(
            f"behind-{cached}", data={"init_args": {"dataset_path": str(pairs)}}, cache={"use_cache": cached}
        )  # fmt: skip
        for name in ("1", "2"):
            path = pairs / "training_images" / f"{name}.png"
            path.write_bytes(encoded("PNG")[:-400])
        said = lab.run(config, expect=2, sabotage="no_model:x").said()
        assert "2 problems" in said and "training_images/1.png" in said and "training_images/2.png" in said


@pytest.mark.timeout(900)
def test_rare_modes_are_trained_on(lab: Lab, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", 1)
    for number, (suffix, content) in enumerate(fine_files()):
        for folder in ("control_images", "training_images"):
            (pairs / folder / f"fine-{number}{suffix}").write_bytes(content)
        (pairs / "training_images" / f"fine-{number}.txt").write_text("x")
    config = lab.config("fine", data={"init_args": {"dataset_path": str(pairs)}}, train={"max_train_steps": 2})
    assert "11 pairs" in lab.run(config).said()
    shutil.rmtree(config.parent)
