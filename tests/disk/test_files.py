"""Files and folders that are whole or not there: killed writers, full disks, damaged bytes."""

from __future__ import annotations

import builtins
import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from qwen_image_finetune.disk.files import (
    DiskFull,
    clean_leftovers,
    remove_folder,
    staged_file,
    staged_folder,
    write_atomic,
)
from qwen_image_finetune.disk.manifest import MANIFEST, verify_folder

# `QIF_FAULTS=full` runs the counts that the documentation quotes; otherwise a sample that fits CI.
FULL = os.environ.get("QIF_FAULTS") == "full"
KILLED = -9


def fill(folder: Path, version: int) -> None:
    """Files of several sizes, in two levels, different for every version."""
    (folder / "weights.bin").write_bytes(random.Random(version).randbytes(20_000))
    (folder / "sub").mkdir()
    (folder / "sub" / "state.json").write_text(json.dumps({"version": version}))
    (folder / "empty").touch()


def save(final: Path, version: int) -> None:
    with staged_folder(final) as folder:
        fill(folder, version)


def version_in(folder: Path) -> int:
    """Which call of `save` wrote the folder, judged by every byte of it."""
    assert verify_folder(folder) is None
    version = int(json.loads((folder / "sub" / "state.json").read_text())["version"])
    assert (folder / "weights.bin").read_bytes() == random.Random(version).randbytes(20_000)
    return version


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def run_until_call(number: int, work: Callable[[], None]) -> int:
    """Run `work` in a forked process that kills itself with SIGKILL just before its `number`-th call to the system.

    Returns the exit status: -9, or 0 where the work made fewer calls.
    """
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        calls = 0

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                nonlocal calls
                calls += 1
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return call

        for owner, names in (
            (os, ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "open")),
            (builtins, ("open",)),
            (Path, ("unlink", "open")),
        ):
            for name in names:
                setattr(owner, name, counted(getattr(owner, name)))
        work()
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs more rights than these")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


# Whole or not there


def test_write_atomic_writes_and_replaces(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.json", "first")
    with (tmp_path / "a.json").open() as reader:
        write_atomic(tmp_path / "a.json", b"\x00second")
        assert reader.read() == "first", "the old file is replaced, never written into"
    assert (tmp_path / "a.json").read_bytes() == b"\x00second"
    assert os.listdir(tmp_path) == ["a.json"]


def test_write_atomic_keeps_the_old_file_when_flushing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "a", "old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskFull, match=r"no space left to write .*/a: it needs 3 bytes") as raised:
        write_atomic(tmp_path / "a", "new")
    assert (raised.value.needed, raised.value.errno) == (3, errno.ENOSPC)
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_write_atomic_passes_other_errors_on(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "missing" / "a", "x")


def test_staged_folder_appears_at_the_end(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with staged_folder(final) as folder:
        fill(folder, 1)
        assert visible(tmp_path) == set()
        assert folder.parent == tmp_path
    assert os.listdir(tmp_path) == ["final"]
    assert version_in(final) == 1
    entries = json.loads((final / MANIFEST).read_text())["files"]
    assert set(entries) == {"weights.bin", "sub/state.json", "empty"}
    data = (final / "weights.bin").read_bytes()
    assert entries["weights.bin"] == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_staged_folder_replaces_a_complete_one(tmp_path: Path) -> None:
    save(tmp_path / "final", 1)
    save(tmp_path / "final", 2)
    assert os.listdir(tmp_path) == ["final"]
    assert version_in(tmp_path / "final") == 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_staged_folder_leaves_nothing_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    save(tmp_path / "final", 1)
    with pytest.raises(error), staged_folder(tmp_path / "final") as folder:
        fill(folder, 2)
        raise error
    assert os.listdir(tmp_path) == ["final"]
    assert version_in(tmp_path / "final") == 1


def test_staged_folder_refuses_links(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a file nor a folder"), staged_folder(tmp_path / "final") as folder:
        (folder / "link").symlink_to("/etc/hostname")
    assert os.listdir(tmp_path) == []


# Killed at every call


def test_write_atomic_killed_at_every_call(tmp_path: Path) -> None:
    path, number = tmp_path / "a", 0
    status = KILLED
    while status == KILLED:
        number += 1
        path.write_text("old")
        status = run_until_call(number, lambda: write_atomic(path, "new"))
        assert status in (0, KILLED)
        assert path.read_text() in ("old", "new")
        clean_leftovers(tmp_path)
        assert os.listdir(tmp_path) == ["a"]
    assert path.read_text() == "new"
    assert number > 4, "the calls were not counted"


@pytest.mark.parametrize("existing", [False, True])
def test_staged_folder_killed_at_every_call(tmp_path: Path, existing: bool) -> None:
    """Whatever the moment: the old folder or the new one is there, whole, after the leftovers are cleaned."""
    number, status = 0, KILLED
    outcomes = []
    while status == KILLED:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        if existing:
            save(folder / "final", 1)
        status = run_until_call(number, partial(save, folder / "final", 2))
        assert status in (0, KILLED)
        assert visible(folder) <= {"final"}
        if (folder / "final").exists():
            assert version_in(folder / "final") in (1, 2)
        clean_leftovers(folder)
        assert os.listdir(folder) in ([], ["final"])
        outcomes.append(version_in(folder / "final") if (folder / "final").exists() else 0)
    assert outcomes == sorted(outcomes), "once the new folder is there it stays"
    assert set(outcomes) == {1 if existing else 0, 2}
    assert number > 15, "the calls were not counted"


def test_remove_folder_killed_at_every_call(tmp_path: Path) -> None:
    number, status = 0, KILLED
    while status == KILLED:
        number += 1
        save(tmp_path / "final", 1)
        status = run_until_call(number, lambda: remove_folder(tmp_path / "final"))
        assert status in (0, KILLED)
        if (tmp_path / "final").exists():
            assert version_in(tmp_path / "final") == 1
        clean_leftovers(tmp_path)
        assert os.listdir(tmp_path) in ([], ["final"])
    assert os.listdir(tmp_path) == []


def test_clean_leftovers_touches_nothing_else(tmp_path: Path) -> None:
    for name in (".hidden", ".git", "x.partial-1-00000000", ".x.partial-1", ".x.backup-1-00000000"):
        (tmp_path / name).mkdir()
    before = set(os.listdir(tmp_path))
    (tmp_path / ".x.partial-1-0123abcd").mkdir()
    (tmp_path / ".y.trash-99-0123abcd").write_text("")
    (tmp_path / ".z.partial-7-0123abcd").symlink_to(tmp_path / ".git")
    clean_leftovers(tmp_path)
    assert set(os.listdir(tmp_path)) == before


# Full disks


def test_disk_full_at_every_write_of_a_folder(small_disk: Path) -> None:
    """A filler leaves less and less room: whichever write fails, the older folder stays and nothing else does."""
    filler = small_disk.parent / "disk" / "filler"
    save(small_disk / "old", 1)
    failures = 0
    for free in range(0, 80 * 1024, 4096):
        filler.unlink(missing_ok=True)
        room = os.statvfs(small_disk).f_bavail * 4096
        filler.write_bytes(bytes(max(0, room - free)))
        try:
            save(small_disk / "new", 2)
        except DiskFull as error:
            failures += 1
            assert "it needs" in str(error)
            assert error.path == small_disk / "new"
            assert set(os.listdir(small_disk)) == {"old", "filler"}
        else:
            assert version_in(small_disk / "new") == 2
            remove_folder(small_disk / "new")
        assert version_in(small_disk / "old") == 1
    assert 5 < failures < 20


def test_disk_full_said_before_the_first_write(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match="it needs 1,000,000,000,000 MB"), staged_folder(tmp_path / "final", 10**18):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == []


def test_disk_full_in_write_atomic(small_disk: Path) -> None:
    write_atomic(small_disk / "a", "old")
    with pytest.raises(DiskFull, match="300,000 bytes"):
        write_atomic(small_disk / "a", bytes(300_000))
    assert os.listdir(small_disk) == ["a"]
    assert (small_disk / "a").read_text() == "old"


def test_a_staged_file_appears_when_its_block_ends(tmp_path: Path) -> None:
    final = tmp_path / "a.bin"
    final.write_text("old")
    with pytest.raises(KeyError), staged_file(final) as partial:
        partial.write_text("half")
        raise KeyError
    assert (final.read_text(), os.listdir(tmp_path)) == ("old", ["a.bin"])
    with staged_file(final) as partial:
        partial.write_text("new")
        assert final.read_text() == "old"
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy" / partial.name).touch()  # as a killed process would leave it
    assert final.read_text() == "new"
    clean_leftovers(tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.bin", "copy"]


def test_disk_full_as_safetensors_words_it(small_disk: Path) -> None:
    import torch
    from safetensors.torch import save_file

    with pytest.raises(DiskFull), staged_file(small_disk / "b.safetensors") as partial:
        save_file({"a": torch.zeros(100_000)}, partial)
    with pytest.raises(DiskFull), staged_folder(small_disk / "new") as folder:
        save_file({"a": torch.zeros(100_000)}, folder / "a.safetensors")
    assert os.listdir(small_disk) == []


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_gives(umask: int, mode: int, tmp_path: Path) -> None:
    """safetensors writes for the owner alone: a ComfyUI of another user could not open what stands beside the rest."""
    import torch
    from safetensors.torch import save_file

    before = os.umask(umask)
    try:
        with staged_file(tmp_path / "a.safetensors") as partial:
            save_file({"a": torch.zeros(1)}, partial)
        write_atomic(tmp_path / "a.json", "{}")
        with staged_folder(tmp_path / "checkpoint") as folder:
            fill(folder, 0)
            save_file({"a": torch.zeros(1)}, folder / "sub" / "a.safetensors")
        with staged_folder(tmp_path / "by hand", sealed=False) as folder:
            save_file({"a": torch.zeros(1)}, folder / "a.safetensors")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 8
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}


# Damage


def test_every_kind_of_damage_is_detected(tmp_path: Path) -> None:
    """Bits flipped, bytes replaced, files cut or lengthened or removed, the manifest included."""
    folder = tmp_path / "final"
    save(folder, 3)
    names = ["weights.bin", "sub/state.json", MANIFEST]
    chance = random.Random(0)
    for trial in range(10_000 if FULL else 600):
        path = folder / names[trial % 3]
        whole = path.read_bytes()
        position = chance.randrange(len(whole))
        kind = chance.choice(["flip", "byte", "cut", "append", "remove"])
        if kind == "flip":
            damaged = bytearray(whole)
            damaged[position] ^= 1 << chance.randrange(8)
        elif kind == "byte":
            damaged = bytearray(whole)
            damaged[position] = (damaged[position] + chance.randrange(1, 256)) % 256
        else:
            damaged = bytearray(whole[:position] if kind == "cut" else whole + chance.randbytes(1))
        path.write_bytes(damaged)
        if kind == "remove":
            path.unlink()
        problem = verify_folder(folder)
        assert problem is not None, (path.name, kind, position)
        assert path.name in problem
        path.write_bytes(whole)
    assert verify_folder(folder) is None


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    save(tmp_path / "final", 3)
    path = tmp_path / "final" / MANIFEST
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in range(8) if FULL else (0, 5):  # bit 5 turns a letter of a checksum into its capital
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            assert verify_folder(tmp_path / "final") is not None, position


def test_sizes_alone_tell_unfinished_from_complete(tmp_path: Path) -> None:
    save(tmp_path / "final", 3)
    path = tmp_path / "final" / "weights.bin"
    path.write_bytes(bytes(20_000))
    assert verify_folder(tmp_path / "final", checksums=False) is None
    path.write_bytes(bytes(19_999))
    assert "19999 bytes instead of 20000" in str(verify_folder(tmp_path / "final", checksums=False))


def test_files_beside_the_manifest_are_nobodys_business(tmp_path: Path) -> None:
    save(tmp_path / "final", 3)
    (tmp_path / "final" / "notes.txt").write_text("mine")
    assert verify_folder(tmp_path / "final") is None


def test_nothing_outside_the_folder_is_read(tmp_path: Path) -> None:
    """A manifest that names a file elsewhere, and a file that is a link to one, both with right sums."""
    save(tmp_path / "final", 3)
    folder = tmp_path / "final"
    (tmp_path / "secret").write_bytes((folder / "weights.bin").read_bytes())
    (folder / "weights.bin").unlink()
    (folder / "weights.bin").symlink_to(tmp_path / "secret")
    assert "is a link or lies outside" in str(verify_folder(folder))

    files = {"../secret": {"size": 1, "sha256": "0"}}
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({"files": files, "sha256": own}, indent=1, sort_keys=True) + "\n")
    assert "is damaged" in str(verify_folder(folder))


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"files": []}', "[" * 100_000, '{"files": {"a": 3}}', "\xff"]
)
def test_manifests_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    assert "is damaged" in str(verify_folder(tmp_path))


def test_folders_that_are_none(tmp_path: Path) -> None:
    assert "is not a folder" in str(verify_folder(tmp_path / "missing"))
    assert "no readable manifest.json" in str(verify_folder(tmp_path))
