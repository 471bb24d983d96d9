"""A studio of a small folder, and a client that speaks as its own page does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from qwen_image_finetune.studio.app import application
from qwen_image_finetune.studio.routes_common import Studio

ADDRESS = "http://127.0.0.1:8642"


@pytest.fixture
def folder(tmp_path: Path, write_pairs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shelf with the data set `faces` of five pairs; beside it, outside, `secret.png` and `secret.txt`."""
    from PIL import Image

    shelf = tmp_path / "shelf"
    write_pairs(shelf / "faces", [(64, 48)] * 5, masks=True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "secret.png")
    (tmp_path / "secret.txt").write_text("outside")
    monkeypatch.chdir(shelf)  # as `serve` does
    return shelf


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    """Asks as the studio's own page would; the queue's clock stands still."""
    app = application(folder, starts_jobs=False)
    headers = {"origin": ADDRESS, "sec-fetch-site": "same-origin"}
    with TestClient(app, base_url=ADDRESS, headers=headers, raise_server_exceptions=True) as asking:
        yield asking


@pytest.fixture
def studio(client: TestClient) -> Studio:
    """What answers the client."""
    found = client.app.state.studio  # type: ignore[attr-defined]
    assert isinstance(found, Studio)
    return found
