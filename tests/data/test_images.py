"""Files in the wild become upright RGB, or are refused by name."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from qwen_image_finetune.data.images import DataError, fitted, open_upright, resize, size_upright, to_rgb, upright

WIDTH, HEIGHT = 12, 7
SUFFIXES = (".jpg", ".png", ".webp")
Pixels = NDArray[np.uint8]
Read = Callable[[Path], object]


def pixels(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def stored(shown: Pixels, orientation: int) -> Pixels:
    """What a camera stores of `shown` (H, W, 3), from the definitions of tag 274 in TIFF 6.0: where row 0 and column 0
    of the file lie in the shown picture."""
    rows_are_columns = orientation >= 5
    row_zero_at_end = orientation in (3, 4, 6, 7)  # at the bottom, or for 5 to 8 at the right
    column_zero_at_end = orientation in (2, 3, 7, 8)  # at the right, or for 5 to 8 at the bottom
    array = shown.transpose(1, 0, 2) if rows_are_columns else shown
    array = array[::-1] if row_zero_at_end else array
    return np.ascontiguousarray(array[:, ::-1] if column_zero_at_end else array)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[274] = orientation
    return tags


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_ends_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    shown = pixels(HEIGHT, WIDTH, 3)
    path = tmp_path / f"turned{suffix}"
    lossless = {"lossless": True} if suffix == ".webp" else {}
    Image.fromarray(stored(shown, orientation)).save(path, exif=exif(orientation), **lossless)

    image = open_upright(path)
    assert size_upright(path) == image.size == (WIDTH, HEIGHT)
    if suffix == ".jpg":  # lossy: Pillow's own turn of the same file
        with Image.open(path) as file:
            assert np.array_equal(image, ImageOps.exif_transpose(file))
    else:
        assert np.array_equal(image, shown)


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path: Path, orientation: int) -> None:
    Image.fromarray(pixels(HEIGHT, WIDTH, 3)).save(tmp_path / "a.png", exif=exif(orientation))
    assert np.array_equal(open_upright(tmp_path / "a.png"), pixels(HEIGHT, WIDTH, 3))


def test_exif_behind_the_pixels_of_a_png(tmp_path: Path) -> None:
    path = tmp_path / "late.png"
    Image.fromarray(stored(pixels(HEIGHT, WIDTH, 3), 6)).save(path)
    data = exif(6).tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(data)) + b"eXIf" + data + struct.pack(">I", zlib.crc32(b"eXIf" + data))
    path.write_bytes(path.read_bytes().replace(b"\0\0\0\0IEND", chunk + b"\0\0\0\0IEND"))
    with Image.open(path) as file:
        assert "exif" not in file.info  # the header alone does not know
    assert size_upright(path) == (WIDTH, HEIGHT)
    assert np.array_equal(open_upright(path), pixels(HEIGHT, WIDTH, 3))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_picture_is_turned_once(tmp_path: Path) -> None:
    """What was read is handed on to places that take open pictures of any origin."""
    for name in ("a.png", "a.jpg", "a.webp"):
        Image.fromarray(stored(pixels(HEIGHT, WIDTH, 3), 6)).save(tmp_path / name, exif=exif(6))
        once = open_upright(tmp_path / name)
        assert upright(once).size == once.size == (WIDTH, HEIGHT)
        assert np.array_equal(upright(once), once)


def test_texts_and_broken_orientation_do_not_decide_whether_pixels_can_be_read(tmp_path: Path) -> None:
    shown = Image.fromarray(pixels(HEIGHT, WIDTH, 3))
    texts = PngInfo()
    texts.add_text("workflow", '{"node": "' + "x" * 2_000_000 + '"}', zip=True)
    shown.save(tmp_path / "text.png", pnginfo=texts)
    shown.save(tmp_path / "a.png", exif=b"Exif\0\0no TIFF header")
    shown.save(tmp_path / "a.jpg", exif=b"Exif\0\0no TIFF header")
    shown.save(tmp_path / "plain.jpg")
    for name, same, said in (
        ("text.png", shown, 0),
        ("a.png", shown, 1),
        ("a.jpg", Image.open(tmp_path / "plain.jpg"), 0),  # Pillow passes over it by itself
    ):
        remarks: list[str] = []
        assert size_upright(tmp_path / name) == (WIDTH, HEIGHT)
        assert np.array_equal(open_upright(tmp_path / name, remarks=remarks), same)
        assert len(remarks) == said and all("EXIF" in line for line in remarks)


def test_only_what_stands_before_the_end_of_a_png_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(pixels(HEIGHT, WIDTH, 3)).save(path)
    with open(path, "ab") as file:
        file.write(chunk(b"eXIf", exif(6).tobytes().removeprefix(b"Exif\0\0")))
        file.truncate(2**29)  # a hole: read on, it would be millions of empty chunks
    assert size_upright(path) == open_upright(path).size == (WIDTH, HEIGHT)
    with open(path, "ab") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(DataError, match="more than the 1073741824 that are read of a picture"):
        open_upright(path)


def test_a_png_with_more_data_than_its_size_can_have(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    at = content.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(content[:at] + chunk(b"IDAT", bytes(5_000_000)) + content[at:])
    with pytest.raises(DataError, match=r"a\.png: .*more data than a picture of its size"):
        open_upright(tmp_path / "a.png")


def test_an_animation_of_one_frame_is_a_picture(tmp_path: Path) -> None:
    shown = Image.fromarray(pixels(HEIGHT, WIDTH, 3))
    shown.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    at = content.index(b"IDAT") - 4
    frame = struct.pack(">IIIIIHHBB", 0, WIDTH, HEIGHT, 0, 0, 1, 10, 0, 0)
    one = chunk(b"acTL", struct.pack(">II", 1, 0)) + chunk(b"fcTL", frame)
    (tmp_path / "a.png").write_bytes(content[:at] + one + content[at:])
    assert np.array_equal(open_upright(tmp_path / "a.png"), shown)


def test_exif_as_a_text_of_a_png(tmp_path: Path) -> None:
    """As ImageMagick wrote it before PNG had a chunk for it."""
    raw = exif(6).tobytes()
    texts = PngInfo()
    texts.add_text("Raw profile type exif", f"\nexif\n{len(raw):8}\n{raw.hex()}\n", zip=True)
    Image.fromarray(stored(pixels(HEIGHT, WIDTH, 3), 6)).save(tmp_path / "a.png", pnginfo=texts)
    assert size_upright(tmp_path / "a.png") == (WIDTH, HEIGHT)
    assert np.array_equal(open_upright(tmp_path / "a.png"), pixels(HEIGHT, WIDTH, 3))


def test_an_open_picture_is_turned_too(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(stored(pixels(HEIGHT, WIDTH, 3), 8)).save(path, exif=exif(8))
    with Image.open(path) as file:
        assert np.array_equal(upright(file), pixels(HEIGHT, WIDTH, 3))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_over_white(tmp_path: Path, mode: str) -> None:
    channels = pixels(16, 16, len(mode))
    channels[0, :, -1], channels[1, :, -1] = 0, 255
    Image.fromarray(channels, mode).save(tmp_path / "a.png")
    share = channels[..., -1:] / 255
    expected = np.broadcast_to(channels[..., :-1] * share + 255 * (1 - share), (16, 16, 3))
    image = np.asarray(open_upright(tmp_path / "a.png"))
    assert np.abs(image - expected).max() <= 1  # Pillow rounds once for alpha, once for colour
    assert (image[0] == 255).all()
    assert np.array_equal(image[1], expected[1])
    black = np.asarray(open_upright(tmp_path / "a.png", mask=True))
    assert (black[0] == 0).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_a_colour_declared_transparent_is_white(tmp_path: Path, mode: str) -> None:
    """The tRNS chunk of PNG, in every colour type that may have it."""
    image = Image.new("RGB", (2, 1), "black").convert(mode)
    image.putpixel((1, 0), {"1": 255, "L": 90, "P": 1, "RGB": (90, 91, 92)}[mode])
    if mode == "P":
        image.putpalette([0, 0, 0, 90, 91, 92])
    image.save(tmp_path / "a.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
    other = {"1": (255, 255, 255), "L": (90, 90, 90)}.get(mode, (90, 91, 92))
    assert np.array_equal(open_upright(tmp_path / "a.png"), [[(255, 255, 255), other]])


def test_grey_and_palette(tmp_path: Path) -> None:
    grey = pixels(5, 5)
    Image.fromarray(grey).save(tmp_path / "grey.jpg", quality=100)
    image = np.asarray(open_upright(tmp_path / "grey.jpg"))
    assert image.shape == (5, 5, 3)
    assert (image == image[..., :1]).all()
    assert np.abs(image[..., 0].astype(int) - grey).max() <= 2
    colours = Image.fromarray(pixels(5, 5, 3)).quantize(25)
    colours.save(tmp_path / "palette.png")
    assert np.array_equal(open_upright(tmp_path / "palette.png"), colours.convert("RGB"))


def test_cmyk(tmp_path: Path) -> None:
    """Inks as printers define them: R = 255 (1 - C) (1 - K)."""
    inks = np.zeros((16, 16, 4), dtype=np.uint8)
    inks[:] = (51, 102, 153, 51)
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.jpg", quality=100)
    expected = [(255 - ink) * (255 - 51) / 255 for ink in (51, 102, 153)]
    assert np.abs(np.asarray(open_upright(tmp_path / "a.jpg")) - expected).max() <= 3


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint16)[None] * 257
    Image.fromarray(levels).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as file:
        assert file.mode.startswith("I")
        assert np.array_equal(np.asarray(upright(file))[0, :, 0], np.arange(256))
    assert np.array_equal(np.asarray(open_upright(tmp_path / "a.png"))[0], np.arange(256)[:, None].repeat(3, axis=1))


def test_sixteen_bits_with_a_transparent_grey(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 25700]], dtype=np.uint16)).save(tmp_path / "a.png")
    data = b"\0\0"  # tRNS: grey level 0; Pillow writes none for 16 bits
    chunk = struct.pack(">I", 2) + b"tRNS" + data + struct.pack(">I", zlib.crc32(b"tRNS" + data))
    content = (tmp_path / "a.png").read_bytes()
    at = content.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(content[:at] + chunk + content[at:])
    assert np.asarray(open_upright(tmp_path / "a.png"))[0, :, 0].tolist() == [255, 100]
    assert np.asarray(open_upright(tmp_path / "a.png", mask=True))[0, :, 0].tolist() == [0, 100]


def test_floats_and_long_integers() -> None:
    assert np.asarray(to_rgb(Image.fromarray(np.array([[0.0, 0.4, 1.0]], dtype=np.float32))))[0, :, 1].tolist() == [
        0,
        102,
        255,
    ]
    assert np.asarray(to_rgb(Image.fromarray(np.array([[0, 65535]], dtype=np.int32))))[0, :, 1].tolist() == [0, 255]
    for wrong in (np.array([[0.0, 200.0]], dtype=np.float32), np.array([[np.nan, 0]], dtype=np.float32)):
        with pytest.raises(DataError, match="mode F has values"):
            to_rgb(Image.fromarray(wrong))
    with pytest.raises(DataError, match="mode I has values from -1 to 5"):
        to_rgb(Image.fromarray(np.array([[-1, 5]], dtype=np.int32)))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (4000, 3000)])
def test_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("L", size, 77).save(tmp_path / "a.png")
    assert size_upright(tmp_path / "a.png") == open_upright(tmp_path / "a.png").size == size


def test_a_phone_jpeg_with_a_preview_is_a_picture(tmp_path: Path) -> None:
    shown, preview = (Image.fromarray(pixels(16, 16, 3, seed=seed)) for seed in (0, 1))
    shown.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[preview])
    shown.save(tmp_path / "b.jpg")
    with Image.open(tmp_path / "a.jpg") as file:
        assert (file.format, file.n_frames) == ("MPO", 2)
    assert np.array_equal(open_upright(tmp_path / "a.jpg"), open_upright(tmp_path / "b.jpg"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut{suffix}"
    Image.fromarray(pixels(64, 64, 3)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=f"^{path}: "):
        open_upright(path)
    if suffix != ".webp":  # its header says how long the file is
        assert size_upright(path) == (64, 64)  # no more than the header was read


@pytest.mark.parametrize("read", [open_upright, size_upright])
def test_what_is_no_picture(tmp_path: Path, read: Read) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("404 not found")
    (tmp_path / "page.png").write_text("<!DOCTYPE html><html>404 not found</html>")
    (tmp_path / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    Image.new("RGB", (8, 8)).save(tmp_path / "web.png", format="AVIF")
    Image.new("RGB", (8, 8)).save(tmp_path / "scan.png", format="TIFF")
    (tmp_path / "lfs.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name, words in {
        "empty.png": "an empty file",
        "text.png": "not a picture",
        "page.png": "a web page, whatever its name says",
        "phone.jpg": "a HEIC picture, whatever its name says",
        "web.png": "an AVIF picture, whatever its name says",
        "scan.png": "a TIFF picture",
        "lfs.png": "a pointer of Git LFS",
        "pipe.png": "no plain file",
        "folder.png": "a folder",
        "none.png": "no such file",
    }.items():
        with pytest.raises(DataError, match=f"{name}: {words}"):
            read(tmp_path / name)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
@pytest.mark.parametrize("read", [open_upright, size_upright])
def test_animations(tmp_path: Path, kind: str, read: Read) -> None:
    frames = [Image.fromarray(pixels(8, 8, 3, seed=seed)) for seed in (0, 1)]
    frames[0].save(tmp_path / "a.png", format=kind, save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=r"a\.png: an animation"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("limit", [40, 60])  # 100 pixels: Pillow raises above twice the limit, and only warns below
@pytest.mark.parametrize("read", [open_upright, size_upright])
def test_decompression_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, read: Read) -> None:
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    read(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=rf"a\.png: .*more than the {limit} "):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("size", [(64, 48), (31, 97), (200, 33), (40, 30)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_resize_is_the_pipelines_own(size: tuple[int, int], mode: str) -> None:
    image = Image.fromarray(pixels(30, 40, 3)).convert(mode)
    assert np.array_equal(resize(image, size), VaeImageProcessor().resize(image, size[1], size[0]))
    copy = resize(image, image.size)
    assert copy is not image
    assert np.array_equal(copy, image)


def test_what_stands_over_is_cut_off_on_both_sides() -> None:
    """The resize first, then the middle; the odd pixel goes to the right and below, as in diffusers."""
    image = Image.fromarray(pixels(30, 50, 3))
    assert np.array_equal(fitted(image, (50, 30), (45, 30)), image.crop((2, 0, 47, 30)))
    smaller = resize(image, (25, 15))
    assert np.array_equal(fitted(image, (25, 15), (16, 14)), smaller.crop((4, 0, 20, 14)))
    assert np.array_equal(fitted(image, (64, 16), (64, 16)), resize(image, (64, 16)))


def test_data_errors_survive_a_pipe_and_list_every_problem() -> None:
    error = pickle.loads(pickle.dumps(DataError(["a: gone", "b: empty"])))
    assert error.problems == ("a: gone", "b: empty")
    assert str(error).splitlines() == ["2 problems in the data:", "  a: gone", "  b: empty"]
    assert str(DataError("a: gone")) == "a: gone"


def test_the_data_package_is_light() -> None:
    script = "import sys, qwen_image_finetune.data.dataset, qwen_image_finetune.data.batches; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "diffusers", "transformers", "accelerate"} & set(run.stdout.split())
