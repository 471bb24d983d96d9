"""What a verb writes never damages a run, and replaces nothing else unasked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from qwen_image_finetune.data.writing import is_drawn, write_picture
from qwen_image_finetune.disk.files import staged_folder
from qwen_image_finetune.disk.outputs import OutputError, check_output
from qwen_image_finetune.disk.runs import claim_version
from qwen_image_finetune.judging.pages.html import document, is_page


@pytest.fixture
def version(tmp_path: Path) -> Path:
    run = claim_version(tmp_path / "project")
    (run.path / "config.yaml").touch()
    run.record(5, {"loss": 1.0})
    with staged_folder(run.checkpoint_path(0, 5)) as folder:
        (folder / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    run.finish("finished", 5)
    run.close()
    return run.path


OWN = [
    "config.yaml", "run.json", "run.lock", "metrics.jsonl", "log.txt", "best.json", "environment.json", "data.json",
    "checkpoint-0-5/pytorch_lora_weights.safetensors", "checkpoint-0-5/manifest.json", "checkpoint-0-5/new.safetensors",
    "checkpoint-7-9/a.safetensors", "superseded/x", "samples/step-3/0.png", "samples/base/0.png",
    "events.out.tfevents.1",
]  # fmt: skip


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_what_belongs_to_a_run_is_refused(version: Path, name: str, overwrite: bool, tmp_path: Path) -> None:
    """There already or to come, by its own path or through a link."""
    before = {path: path.read_bytes() for path in version.rglob("*") if path.is_file()}
    (tmp_path / "link").symlink_to(version)
    for path in (version / name, tmp_path / "link" / name):
        with pytest.raises(OutputError, match="belongs to the run"):
            check_output(path, overwrite, lambda _: True)
    assert {path: path.read_bytes() for path in version.rglob("*") if path.is_file()} == before


def test_a_checkpoint_outside_of_its_run_is_one_as_well(version: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(version / "checkpoint-0-5", tmp_path / "for a friend"))
    with pytest.raises(OutputError, match="belongs to the run"):
        check_output(copy / "pytorch_lora_weights.safetensors", overwrite=True)
    check_output(copy / "comfy.safetensors", overwrite=False)


def test_new_files_may_stand_beside_those_of_a_run(version: Path, tmp_path: Path) -> None:
    check_output(version / "report.html", overwrite=False)
    check_output(version / "evaluation", overwrite=False, folder=True)
    check_output(tmp_path / "new" / "folder" / "page.html", overwrite=False)
    (tmp_path / "v3").mkdir()  # of somebody else: no run
    check_output(tmp_path / "v3" / "config.yaml", overwrite=False)
    (tmp_path / "v3" / "run.json").touch()
    with pytest.raises(OutputError, match="belongs to the run"):  # which it was not before
        check_output(tmp_path / "v3" / "config.yaml", overwrite=False)


def test_anything_else_is_replaced_only_if_that_was_said(tmp_path: Path) -> None:
    file, folder = tmp_path / "mine.png", tmp_path / "pictures"
    file.touch()
    folder.mkdir()
    check_output(folder, overwrite=False, folder=True)  # empty
    (folder / "mine").touch()
    for path in (file, folder):
        with pytest.raises(OutputError, match=r"is there already: .* with --overwrite"):
            check_output(path, overwrite=False, folder=path.is_dir())
        check_output(path, overwrite=True, folder=path.is_dir())
        check_output(path, overwrite=False, ours=lambda _: True, folder=path.is_dir())
    with pytest.raises(OutputError, match="is a folder, and a file is to be written"):
        check_output(folder, overwrite=True)
    with pytest.raises(OutputError, match="is a file, and a folder is to be written"):
        check_output(file, overwrite=True, folder=True)
    with pytest.raises(OutputError, match="cannot be written to"):
        check_output(file / "below" / "x.png", overwrite=True)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".jpeg", ".webp", ".PNG"])
def test_a_picture_says_that_it_was_drawn(ending: str, tmp_path: Path) -> None:
    picture = Image.effect_noise((64, 48), 90).convert("RGB")
    write_picture(tmp_path / f"drawn{ending}", picture)
    assert is_drawn(tmp_path / f"drawn{ending}")
    again = Image.open(tmp_path / f"drawn{ending}")
    assert again.size == picture.size and (
        ending.lower() != ".png" or again.convert("RGB").tobytes() == picture.tobytes()
    )
    picture.save(tmp_path / f"other{ending}")
    assert not is_drawn(tmp_path / f"other{ending}")


def test_a_picture_that_does_not_fit_on_the_disk_leaves_the_one_that_was_there(tmp_path: Path) -> None:
    """A limit on the size of files cuts the write short, as a full disk does."""
    import resource
    import signal

    small, large = Image.new("RGB", (8, 8)), Image.effect_noise((400, 400), 90).convert("RGB")
    write_picture(tmp_path / "o.png", small)
    before = (tmp_path / "o.png").read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_picture(tmp_path / "o.png", large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "o.png").read_bytes() == before and os.listdir(tmp_path) == ["o.png"]


@pytest.mark.timeout(60)
def test_what_is_no_file_of_ours(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(document("A run", "", []))
    (tmp_path / "mine.html").write_text("<html></html>")
    os.mkfifo(tmp_path / "pipe")
    assert is_page(tmp_path / "page.html") and not is_page(tmp_path / "mine.html")
    assert not is_page(tmp_path / "pipe") and not is_drawn(tmp_path / "pipe") and not is_drawn(tmp_path / "absent")


def test_transparency_is_laid_over_white_where_a_format_has_none(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    for ending, colour in ((".jpg", (255, 255, 255)), (".png", (255, 0, 0, 0))):
        write_picture(tmp_path / f"one{ending}", clear)
        with Image.open(tmp_path / f"one{ending}") as found:
            assert found.getpixel((4, 4)) == colour
