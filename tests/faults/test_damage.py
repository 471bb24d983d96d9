"""Files of a checkpoint or of the cache cut short or with changed bytes."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from lab import FAMILIES, Lab, checkpoints, difference, full_or, outcome, record, versions

from qwen_image_finetune.disk.versions import find_checkpoint
from qwen_image_finetune.encoding.store import DamagedEntry, Store


def damage(data: bytes, chance: random.Random) -> bytes:
    """Another content: cut, lengthened, one bit or byte changed, or a stretch of zeros as a power failure leaves."""
    kind = chance.choice(["cut", "cut to nothing", "append", "bit", "byte", "zeros"])
    place = chance.randrange(len(data))
    if kind == "cut":
        return data[:place]
    if kind == "cut to nothing":
        return b""
    if kind == "append":
        return data + chance.randbytes(1)
    changed = bytearray(data)
    if kind == "bit":
        changed[place] ^= 1 << chance.randrange(8)
    elif kind == "byte":
        changed[place] = (changed[place] + chance.randrange(1, 256)) % 256
    else:
        changed[place:] = bytes(len(data) - place)
    return bytes(changed)


def damaged(path: Path, chance: random.Random) -> Callable[[], object]:
    """Damage a file; the returned call mends it."""
    whole = path.read_bytes()
    while (changed := damage(whole, chance)) == whole:
        pass
    path.write_bytes(changed)
    return lambda: path.write_bytes(whole)


@pytest.mark.timeout(3600)
def test_damaged_checkpoints_are_passed_over(lab: Lab) -> None:
    """Any damage to any file of the newest checkpoints: the newest whole one is found, and every other is named."""
    chance, tried, lost, warned = random.Random(0), full_or(1000, 100), [], []
    projects = {}
    for family in FAMILIES:
        config = lab.config(f"sound-{family}", family)
        lab.run(config)
        projects[family] = config.parent / "output" / "project"
    for number in range(tried):
        project = projects[FAMILIES[number % 2]]
        folders = list(checkpoints(project / "v0").values())[::-1]
        broken = number % 3 + 1
        undo = []
        for folder in folders[:broken]:
            files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
            undo.append(damaged(chance.choice(files), chance))
        warned.clear()
        found = find_checkpoint(project, "latest", warned.append)
        named = all(any(folder.name in line for line in warned) for folder in folders[:broken])
        if found != folders[broken] or len(warned) != broken or not named:
            lost.append((number, found, list(warned)))
        for mend in undo:
            mend()
    record("damaged files of a checkpoint", tried, lost)


@pytest.mark.timeout(3600)
def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_says_so(lab: Lab) -> None:
    chance, tried, lost = random.Random(1), full_or(30, 1), []
    for number in range(tried):
        family = FAMILIES[number % 2]
        whole = lab.config(f"undamaged-{family}", family)
        if not versions(whole):
            lab.run(whole)
        config = lab.config(f"fallen-{number}", family, train={"resume_from_checkpoint": "latest"})
        shutil.copytree(whole.parent / "output", config.parent / "output")
        folders = list(checkpoints(versions(config)[0]).values())[::-1]
        for folder in folders[:2]:
            damaged(chance.choice([path for path in folder.rglob("*") if path.is_file()]), chance)
        said = lab.run(config).said()
        problem = difference(outcome(versions(whole)[0]), outcome(versions(config)[0]))
        if problem or said.count("passed over") != 2 or f"continuing {folders[2]}" not in said:
            lost.append((number, problem, said))
    record("runs over damaged checkpoints", tried, lost)


@pytest.mark.timeout(3600)
def test_damaged_cache_entries_are_detected_and_rebuilt(lab: Lab) -> None:
    chance, tried, lost = random.Random(2), full_or(1000, 100), []
    config = lab.config("cached", own_cache=True, train={"max_train_steps": 2})
    lab.run(config)
    store = Store(config.parent / "cache")
    entries = sorted(store.folder.glob("??/*.safetensors"))
    for number in range(tried):
        path = chance.choice(entries)
        mend = damaged(path, chance)
        try:
            store.read(path.stem)
            read = True
        except DamagedEntry:
            read = False
        if read or store.verify(path.stem):
            lost.append((number, path.name, read))
        mend()
    for length in (b"\xff" * 8, b"\x00" * 7 + b"\x80", b"\x00" * 8):  # a header longer than any integer of C holds
        whole = entries[0].read_bytes()
        entries[0].write_bytes(length + whole[8:])
        assert not store.verify(entries[0].stem)
        entries[0].write_bytes(whole)
    record("damaged files of the cache", tried, lost)

    tried, lost = full_or(10, 1), []
    before = {path: path.read_bytes() for path in entries}
    for number in range(tried):
        chosen = chance.sample(entries, 3)
        for path in chosen:
            damaged(path, chance)
        said = lab.run(config).said()
        if "3 damaged cache entries are encoded again" not in said:
            lost.append((number, said))
        if {path: path.read_bytes() for path in entries} != before:
            lost.append((number, "rebuilt to something else"))
    record("caches rebuilt", tried, lost)
