"""Who may ask the studio for anything: each of these requests is one that a hostile page or machine could send."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from qwen_image_finetune.command import extras
from qwen_image_finetune.command.cli import main
from qwen_image_finetune.studio.app import application
from qwen_image_finetune.studio.guard import COOKIE

ADDRESS = "http://127.0.0.1:8642"

TOKEN = "a-long-key-that-nobody-guesses"
ASK = {"set": "faces", "key": "0", "before": "edit number 0", "after": "changed"}


@pytest.mark.parametrize("host", ["127.0.0.1:8642", "localhost:9000", "[::1]:8642", "LOCALHOST"])
def test_this_machine_is_known_by_its_names(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["attacker.example", "127.0.0.1.attacker.example:8642", "localhost.attacker.example", "10.0.0.5:8642", ""]
)
def test_a_rebound_name_is_refused(client: TestClient, host: str) -> None:
    """DNS rebinding: the attacker's name points to 127.0.0.1, and his page asks as if it were the studio's own."""
    answer = client.get("/", headers={"host": host, "origin": f"http://{host}"})
    assert answer.status_code == 421
    assert "faces" not in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://attacker.example"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "http://localhost:8642"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_another_page_changes_nothing(client: TestClient, folder: Path, headers: dict[str, str]) -> None:
    assert client.post("/data/caption", json=ASK, headers=headers).status_code == 403
    assert (folder / "faces/training_images/0.txt").read_text() == "edit number 0"


def test_a_request_without_origin_changes_nothing(folder: Path) -> None:
    with TestClient(application(folder, starts_jobs=False), base_url=ADDRESS) as asking:
        assert asking.post("/data/caption", json=ASK).status_code == 403


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_only_json_is_an_action(client: TestClient, kind: str) -> None:
    """The kinds that a form of another site can send without asking first."""
    answer = client.post("/data/caption", content=b'{"set": "faces"}', headers={"content-type": kind})
    assert answer.status_code == 415


def test_an_action_takes_what_it_knows_and_nothing_else(client: TestClient) -> None:
    assert client.post("/data/caption", json={**ASK, "verb": "train"}).status_code == 400
    assert client.post("/data/caption", json={**ASK, "key": 0}).status_code == 400
    assert client.post("/data/caption", content=b"[", headers={"content-type": "application/json"}).status_code == 400
    too_long = client.post("/data/caption", json={**ASK, "after": "x" * 3_000_000})
    assert too_long.status_code == 413
    assert client.post("/data/caption", json=ASK).json() == {"caption": "changed"}


def test_other_sites_do_not_get_pictures(client: TestClient) -> None:
    address = "/thumbnail?side=160&picture=faces/training_images/0.png"
    assert client.get(address).status_code == 200
    elsewhere = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert client.get(address, headers=elsewhere).status_code == 403
    assert client.get("/", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}).status_code == 200


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH"])
def test_no_other_methods(client: TestClient, method: str) -> None:
    assert client.request(method, "/").status_code == 405


@pytest.mark.parametrize(
    "address", ["/", "/data?set=faces", "/thumbnail?side=160&picture=faces/training_images/0.png", "/nowhere"]
)
def test_every_answer_forbids_what_is_not_needed(client: TestClient, address: str) -> None:
    headers = client.get(address).headers
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["cross-origin-resource-policy"] == "same-origin"


class TestToken:
    """With --host, others can reach the studio; the link holds a key."""

    @pytest.fixture
    def asking(self, folder: Path) -> TestClient:
        app = application(folder, host="0.0.0.0", token=TOKEN, starts_jobs=False)
        return TestClient(app, base_url="http://192.168.1.20:8642", follow_redirects=False)

    @pytest.mark.parametrize("address", ["/", "/?token=wrong", "/?token=", "/data?set=faces", "/static/studio.css"])
    def test_nothing_without_it(self, asking: TestClient, address: str) -> None:
        answer = asking.get(address)
        assert answer.status_code == 401
        assert COOKIE not in answer.headers.get("set-cookie", "")

    def test_the_link_gives_a_cookie_and_takes_the_key_out_of_the_address(self, asking: TestClient) -> None:
        answer = asking.get(f"/data?set=faces&token={TOKEN}")
        assert answer.status_code == 303
        assert answer.headers["location"] == "/data?set=faces"
        assert re.search(r"HttpOnly.*SameSite=strict", answer.headers["set-cookie"])
        assert asking.get("/").status_code == 200

    def test_a_wrong_cookie_is_refused(self, asking: TestClient) -> None:
        assert asking.get("/", headers={"cookie": f"{COOKIE}=wrong"}).status_code == 401
        assert (
            asking.get("/", headers={"cookie": f"{COOKIE}=\udcff".encode("latin-1", "replace").decode()}).status_code
            == 401
        )

    def test_a_key_does_not_open_other_names(self, asking: TestClient) -> None:
        answer = asking.get(f"/?token={TOKEN}", headers={"host": "attacker.example"})
        assert answer.status_code == 421


def test_it_listens_on_this_machine_alone(folder: Path) -> None:
    from qwen_image_finetune.studio.server import listen

    listening = listen("127.0.0.1", 0)
    assert listening.getsockname()[0] == "127.0.0.1"
    listening.close()


def test_the_key_lasts_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    from qwen_image_finetune.studio.server import kept_token

    first = kept_token(tmp_path / "token")
    assert len(first) >= 32
    assert kept_token(tmp_path / "token") == first
    assert (tmp_path / "token").stat().st_mode & 0o077 == 0


def test_the_printed_link_is_the_key(folder: Path) -> None:
    """The whole command, as on a server that others reach."""
    command = [
        sys.executable,
        "-m",
        "qwen_image_finetune.cli",
        "studio",
        str(folder),
        "--host",
        "0.0.0.0",
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        printed = server.stdout.readline()
        found = re.search(r"http://[^:]+:(\d+)/\?token=([\w-]{32,})", printed)
        assert found, printed
        address = f"http://127.0.0.1:{found[1]}/"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(address)
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(f"{address}?token={found[2]}") as answer:
            assert answer.url == address
            assert b"faces" in answer.read()
        server.terminate()


def test_without_its_packages_it_says_which(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    assert main(["studio", "."]) == 2
    assert "pip install 'qwen-image-finetune[studio]'" in capsys.readouterr().err


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_image_finetune.studio.jobs import without_secrets

    monkeypatch.setitem(os.environ, "HF_TOKEN", "hf_abcdefghijklmnop")
    assert without_secrets("login with hf_abcdefghijklmnop failed") == "login with *** failed"
