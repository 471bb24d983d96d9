"""scripts/card.py on tiny models: cut off after a row it goes on there, and its page says what its file says."""

from __future__ import annotations

import json
import lzma
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from qwen_image_finetune.config import ConfigError
from qwen_image_finetune.fitting import bench

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import card  # noqa: E402
import card_page  # noqa: E402
import card_wheels  # noqa: E402

ROWS = (
    card.Row("FluxKontext", "baseline"),
    card.Row("FluxKontext", "fp8-swapped", ratio=2.0),
    card.Row("FluxKontext", card.PLANNED, cap=24),
)


def test_a_call_that_is_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "STEPS", 1)
    monkeypatch.setattr(bench, "WARM_UP", 0)
    file = tmp_path / "card.json"

    def cut(line: str) -> None:
        raise KeyboardInterrupt(line)

    with pytest.raises(KeyboardInterrupt, match=r"FluxKontext baseline: .* were expected"):
        card.Study(file, True, ROWS).measure(time.monotonic() + 600, cut)
    (first,) = json.loads(file.read_text())["rows"].values()
    lines: list[str] = []
    assert card.Study(file, True, ROWS).measure(time.monotonic() - 1, lines.append)
    assert lines == ["1 of 3 rows are known; next: FluxKontext fp8-swapped"], "no row is begun after the end"
    assert card.Study(file, True, ROWS).measure(time.monotonic() + 600, lines.append)
    assert lines[-1] == "3 of 3 rows are known"
    written = json.loads(file.read_text())
    assert list(written["rows"]) == [row.name for row in ROWS]
    assert written["rows"]["FluxKontext baseline"] == first, "measured once"
    for row in written["rows"].values():
        assert row["found"]["milliseconds"] > 0
        assert row["predicted"]["card"] == "H100"
    assert "chosen: " in written["rows"]["FluxKontext auto 24 GiB"]["predicted"]["why"]

    page = card_page.section(written, (*ROWS, card.Row("FluxKontext", "kept")))
    swapped, kept = (
        next(line for line in page.splitlines() if f"| {name} |" in line) for name in ("fp8-swapped", "kept")
    )
    found = [row["found"]["milliseconds"] for row in written["rows"].values()]
    assert [cell.strip() for cell in swapped.split("|")[4:7]] == [f"{found[1]:.0f}", "2", f"{found[0] / found[1]:.2f}"]
    assert set(kept.split("|")[3:-1]) == {" "}, "what was not measured is blank"

    file.write_text(json.dumps(written | {"device": "another card"}))
    with pytest.raises(ConfigError, match="was measured on another card, and this is"):
        card.Study(file, True)


def test_the_page_is_written_from_the_file() -> None:
    text = card_page.section(json.loads(card.KNOWN.read_text()), card.ROWS)
    assert f"{card_page.BEGIN}\n\n{text}\n{card_page.END}" in card_page.PAGE.read_text(encoding="utf-8")
    assert len({row.name for row in card.ROWS}) == len(card.ROWS)
    assert all(row.beside in card.ROWS for row in card.ROWS if row.variant), "every ratio has its baseline"


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
    ((name, _),) = card_wheels.archive([wheel], tmp_path / "site.tar.xz")
    assert name == wheel.name
    with lzma.open(tmp_path / "site.tar.xz") as unpacked, tarfile.open(fileobj=unpacked) as tar:
        assert tar.getnames() == kept
        assert tar.extractfile(kept[1]).read() == kept[1].encode()  # type: ignore[union-attr]
