"""scripts/card.py: what was cut off is tried again, in which order, and its page says what its file says."""

from __future__ import annotations

import functools
import json
import lzma
import os
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_image_finetune.config import ConfigError
from qwen_image_finetune.fitting import bench

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import card  # noqa: E402
import card_measure  # noqa: E402
import card_page  # noqa: E402
import card_rows  # noqa: E402
import card_tests  # noqa: E402
import card_wheels  # noqa: E402
import card_worker  # noqa: E402

ROWS = (
    card.Row(card.TESTS),
    card.Row("FluxKontext", "baseline"),
    card.Row("FluxKontext", "fp8-swapped", ratio=2.0),
    card.Row("FluxKontext", "auto", cap=24),
)
FOUND = {"milliseconds": 100.0, "first_step_seconds": 1.0, "peak_bytes": None}
EXPECTED = {"milliseconds": 50.0, "peak_bytes": 1 << 30, "guess": False, "card": "H100"}


class Told:
    """Answers by what it is told: a number of milliseconds, or what it raises."""

    def __init__(self, *answers: float | BaseException) -> None:
        self.answers, self.asked = list(answers), [(card.Row(""), 0.0)][:0]

    def start(self, seconds: float) -> None:
        assert seconds > 0

    def ask(self, row: card.Row, seconds: float) -> Any:
        self.asked.append((row, seconds))
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return {"predicted": EXPECTED, "found": FOUND | {"milliseconds": answer}}

    def end(self) -> None:
        raise AssertionError("nothing is broken")


def nothing(seconds: float) -> Any:
    raise AssertionError("there is no card")


def call(file: Path, told: Told, seconds: float = 600, said: Callable[[str], None] = print) -> dict[str, Any]:
    """A call of so many seconds; returns what is written then."""
    card.Study(file, True, ROWS).measure(time.monotonic() + seconds, told, nothing, said)
    assert not told.answers
    return dict(json.loads(file.read_text())["rows"])


def test_every_row_without_a_figure_says_why_and_is_tried_again(tmp_path: Path) -> None:
    file, lines = tmp_path / "card.json", [""][:0]
    rows = call(file, Told(), -1, lines.append)
    assert lines == ["0 of 4 rows are known; next: tests/gpu"], "no row is begun after the end"
    assert list(rows) == [row.name for row in ROWS]
    assert {row["missing"]["why"] for row in rows.values()} == {"not begun: 3 s were expected and 0 were left"}

    first = Told(TimeoutError(), 100.0, ChildProcessError("its process ended with exit code -9"))
    rows = call(file, first)
    assert [row.name for row, _ in first.asked] == [row.name for row in ROWS[1:]]
    assert rows["FluxKontext baseline"]["missing"] == {"why": "not ended after 60 s, on try 1", "tries": 1}
    assert rows["FluxKontext baseline"]["share_seconds"] == 60
    assert rows["FluxKontext auto 24 GiB"]["missing"]["why"] == "its process ended with exit code -9"
    assert "missing" not in rows["FluxKontext fp8-swapped"]

    with pytest.raises(KeyboardInterrupt):  # a second call, which is cut off
        call(file, Told(KeyboardInterrupt()))
    why = json.loads(file.read_text())["rows"]["FluxKontext baseline"]["missing"]["why"]
    assert why == "cut off with the call, on try 2"

    last = Told(50.0)
    rows = call(file, last, said=lines.append)
    assert [(row.name, seconds) for row, seconds in last.asked] == [("FluxKontext auto 24 GiB", 120)], "twice the share"
    assert lines[-1] == "3 of 4 rows are known; given up after 2 tries: 1"
    call(file, Told())  # nothing is due


def test_what_was_tried_once_comes_after_what_was_not(tmp_path: Path) -> None:
    file = tmp_path / "card.json"
    with pytest.raises(KeyboardInterrupt):
        call(file, Told(KeyboardInterrupt()))
    told = Told(3.0, 2.0, 1.0)
    call(file, told)
    assert [row.variant for row, _ in told.asked] == ["fp8-swapped", "auto", "baseline"]


def test_what_is_measured_is_written_and_stands_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "card.json"
    monkeypatch.setattr(bench, "WARM_UP", 0)
    measurer = card_measure.Measurer("CPU", True)
    answer = measurer(ROWS[-1])
    torch.compiler.set_stance("default")
    assert answer["found"]["milliseconds"] > 0
    assert answer["found"]["not_compiled"]
    assert "chosen: " in answer["predicted"]["why"]
    assert answer["predicted"]["card"] == "H100"

    call(file, Told(200.0, 100.0, TimeoutError()))
    written = json.loads(file.read_text())
    page = card_page.section(written, (*ROWS, card.Row("FluxKontext", "kept")))
    swapped, kept = (
        next(line for line in page.splitlines() if f"| {name} |" in line) for name in ("fp8-swapped", "kept")
    )
    assert [cell.strip() for cell in swapped.split("|")[3:7]] == ["50", "100", "2", "2.00"]
    assert set(kept.split("|")[3:-1]) == {" "}, "what was not measured is blank"
    assert "- FluxKontext auto 24 GiB: not ended after 60 s, on try 1" in page

    file.write_text(json.dumps(written | {"device": "another card"}))
    with pytest.raises(ConfigError, match="was measured on another card, and this is"):
        card.Study(file, True)


def test_a_worker_that_does_not_answer_is_ended() -> None:
    with card_worker.Worker(functools.partial, time.sleep) as worker:
        with pytest.raises(TimeoutError):
            worker.ask(600, seconds=2.0)
        assert worker.process is None
        assert worker.ask(0, seconds=60) is None, "another one answers"
    assert worker.process is None
    with card_worker.Worker(functools.partial, os._exit) as worker:
        worker.start(60)
        with pytest.raises(ChildProcessError, match="ended with exit code 3"):
            worker.ask(3, seconds=60)


def test_tests_that_do_not_end_leave_what_they_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "test_slow.py"
    file.write_text("import time\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): time.sleep(600)\n")
    monkeypatch.setattr(card_tests, "TESTS", str(file))
    monkeypatch.setattr(card_tests, "LAST_WORDS", 30)
    with pytest.raises(TimeoutError, match=r"until then 1 passed, 1 failed \['test_b'\]"):
        card_tests.tested(50)  # 20 seconds of tests, starting pytest included


def test_the_page_is_written_from_the_file() -> None:
    text = card_page.section(json.loads(card.KNOWN.read_text()), card.ROWS)
    assert f"{card_page.BEGIN}\n\n{text}\n{card_page.END}" in card_page.PAGE.read_text(encoding="utf-8")
    assert len({row.name for row in card.ROWS}) == len(card.ROWS)
    assert all(row.beside in card.ROWS for row in card.ROWS if row.variant), "every ratio has its baseline"
    assert card_rows.BASELINE == bench.BASELINE
    for row in card.ROWS:
        variant = bench.VARIANTS.get(row.variant)
        eager = row.variant in card_rows.EAGER
        assert variant is None or eager != bool(variant.train.get("compile")), row.name
        assert row.seconds(False)[0] < row.seconds(False)[1]


def test_what_is_carried_leaves_other_devices_out(tmp_path: Path) -> None:
    wheel = tmp_path / "some-1-py3-none-any.whl"
    kept = ["bitsandbytes/libbitsandbytes_cpu.so", "bitsandbytes/libbitsandbytes_cuda130.so", "bitsandbytes/a.py"]
    with zipfile.ZipFile(wheel, "w") as made:
        for name in (
            *kept,
            "bitsandbytes/libbitsandbytes_cuda118.so",
            "bitsandbytes/libbitsandbytes_rocm64.so",
            "x/b.a",
        ):
            made.writestr(name, name)
    with card_wheels.Packed(tmp_path / "site.tar.xz") as packed:
        packed.add(wheel)
    with lzma.open(tmp_path / "site.tar.xz") as unpacked, tarfile.open(fileobj=unpacked) as tar:
        assert tar.getnames() == kept
        assert tar.extractfile(kept[1]).read() == kept[1].encode()  # type: ignore[union-attr]


def test_what_is_carried_is_chosen_by_the_index() -> None:
    files = [
        {"filename": f"some_thing-{version}-{tag}.whl", "size": size}
        for version, tag, size in (
            ("1.0", "cp312-cp312-manylinux_2_28_x86_64", 10),
            ("1.1", "cp311-cp311-manylinux_2_28_x86_64", 11),
            ("0.9", "py3-none-any", 9),
            ("0.8", "cp39-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64", 8),
            ("2.0b1", "py3-none-any", 20),
            ("1.2", "py3-none-macosx_11_0_arm64", 12),
        )
    ]
    files += [{"filename": "some_thing-3.0.tar.gz", "size": 30}]
    assert card_wheels.newest("some-thing", files).size == 10, "of that Python and machine, and no beta"
    assert card_wheels.newest("some-thing", files, "0.8").size == 8
    assert card_wheels.newest("some-thing", files[4:]).size == 20, "there are betas only"
    with pytest.raises(SystemExit, match=r"some-thing: no wheel of 1.1 for Python 3.12"):
        card_wheels.newest("some-thing", files, "1.1")
    wheel = card_wheels.newest("some-thing", [files[0] | {"size": 40 << 20}])
    assert card_wheels.fits(20 << 20, [wheel], 60)
    assert not card_wheels.fits((20 << 20) + 1, [wheel], 60)


def test_what_is_expected_is_of_the_rows_own_batch() -> None:
    measurer = card_measure.Measurer("H100", tiny=True)
    one, four = (measurer.predict(card.Row("FluxKontext", "fp8-kept", batch=batch)) for batch in (1, 4))
    assert 3 < four["milliseconds"] / one["milliseconds"] <= 4
    assert one["peak_bytes"] < four["peak_bytes"]
