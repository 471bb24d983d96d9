"""From a folder of pictures to a LoRA in a real browser: Chromium, a server process, and a toy model that trains.

Training is a process of its own; whatever else the server starts is forked from one that has imported torch
(tests/warm): importing takes longer than all that they do. On the way the server is killed and started again, two tabs
write the same caption, and a hundred requests come at once.
What is seen is kept in build/studio.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
    pytest.mark.timeout(600),
]
playwright = pytest.importorskip("playwright.sync_api")

ROOT = Path(__file__).parents[2]
SCREENS = ROOT / "build/studio"
WAIT = 180_000  # milliseconds; nothing is measured by it
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


# A run is known by the number of its process, which is that of its keeper's child.
PYTHON = """#!/bin/sh
case " $* " in
  *" train "*) exec {} "$@" ;;
  *) exec {} "$@" ;;
esac
"""
# `qif studio`, which starts other processes by PYTHON.
STUDIO = (
    "import os, runpy, sys; sys.executable = os.environ['WARM_PYTHON'];"
    "runpy.run_module('qwen_image_finetune.cli', run_name='__main__', alter_sys=True)"
)


class Server:
    """`qif studio` as a process; started again, it takes the same port."""

    def __init__(self, folder: Path, warm: Path) -> None:
        self.folder, self.port = folder, 0
        python = folder.parent / "python"
        python.write_text(PYTHON.format(sys.executable, warm / "python"))
        python.chmod(0o755)
        self.environment = {**os.environ, "WARM_PYTHON": str(python)}
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", STUDIO, "studio", str(self.folder), "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=self.environment)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        assert found, line
        self.port = int(found[1])

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A toy model, a configuration, and seven pairs that are yet to be sent."""
    shelf = tmp_path / "wedding"
    shutil.copytree(ROOT / "toy/qwen-image-edit", shelf / "model")
    shutil.copytree(ROOT / "data/face_seg", tmp_path / "camera")
    config = yaml.safe_load((ROOT / "configs/demo_qwen_image_edit.yaml").read_text())
    config["model"]["pretrained_model_name_or_path"] = "model"
    config["data"]["init_args"] |= {"dataset_path": "masks", "image_size": [32, 32]}
    config["data"]["batch_size"] = 1
    config["train"] |= {"max_train_steps": 100_000, "checkpointing_steps": 1000}  # it is stopped
    config["cache"] = {"use_cache": True, "cache_dir": "cache"}
    config["logging"] = {"output_dir": "output", "report_to": "none", "tracker_project_name": "masks"}
    config["validation"] = {
        "enabled": True, "steps": 20, "share": 0.2, "num_validation_samples": 1, "num_inference_steps": 2,
        "num_loss_pairs": 1, "num_loss_sigmas": 1,
    }  # fmt: skip
    (shelf / "start.yaml").write_text(yaml.safe_dump(config))
    return shelf


@pytest.fixture
def server(folder: Path, warm: Path) -> Iterator[Server]:
    running = Server(folder, warm)
    yield running
    running.kill()
    for process in psutil.process_iter(["cwd"]):
        if process.info["cwd"] == str(folder):
            process.kill()


@contextmanager
def browser() -> Iterator[playwright.Browser]:
    playwright.expect.set_options(timeout=WAIT)
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield opened
        opened.close()


def opened(chromium: playwright.Browser, width: int, scheme: str, said: list[str]) -> playwright.Page:
    """A window; whatever its console says is collected."""
    page = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    page.set_default_timeout(WAIT)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("dialog", lambda dialog: dialog.accept())
    return page


def arrived(page: playwright.Page, text: str) -> None:
    """Wait for the words and for the page's script: before it has run, a click does nothing that it should."""
    page.get_by_text(text).first.wait_for()
    page.wait_for_load_state()


def kept(page: playwright.Page, name: str) -> None:
    SCREENS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENS / f"{name}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, f"{name} sticks out sideways"


def test_the_journey(server: Server, folder: Path) -> None:
    said: list[str] = []
    with browser() as chromium:
        page = opened(chromium, 1440, "light", said)
        page.goto(server.address)
        bring_pictures(page, folder.parent / "camera")
        two_tabs(page, said)
        a_hundred_at_once(page)
        start_run(page)
        survive(page, server, folder, said)
        stop_and_go_on(page, folder)
        judge(page)
        try_it(page, folder)
        assert said == []
        for width, scheme in ((390, "dark"), (1440, "dark")):  # the journey itself was light
            every_page(opened(chromium, width, scheme, said), server.address, f"{width}-{scheme}")
        assert said == []


def bring_pictures(page: playwright.Page, camera: Path) -> None:
    """A new set: pairs by name, a mismatch that is mended, captions, flaws, and one pair into the bin and back."""
    before, after = ([camera / side / f"face_0{n}.{kind}" for n in range(7)]
                     for side, kind in (("control_images", "jpg"), ("training_images", "png")))  # fmt: skip
    lone = camera / "other name.png"
    after[6].rename(lone)
    page.get_by_role("button", name="New set of pictures").first.click()
    page.get_by_label("Name").fill("masks")
    page.get_by_role("button", name="Make it").click()
    page.wait_for_url("**/data?set=masks")
    page.get_by_label("pictures before the edit").set_input_files(before)
    arrived(page, "Arrived: 0 whole pairs, 7 halves")
    page.get_by_role("button", name="Add pictures").click()
    page.get_by_label("pictures after the edit").set_input_files([*after[:6], lone])
    arrived(page, "6 whole pairs, 2 halves")
    kept(page, "arrived")
    page.get_by_label("after the edit of face_06").select_option("other name")
    arrived(page, "7 whole pairs")
    page.get_by_label("Caption for those without one").fill("draw the mask")
    page.get_by_role("button", name="Add 7 pairs").click()
    arrived(page, "7 pairs in masks")
    page.get_by_role("button", name="look for flaws").click()
    page.get_by_role("link", name="small picture 7").wait_for()
    page.get_by_role("button", name="Change captions").click()
    page.get_by_label("Before every caption").fill("portrait: ")
    page.get_by_text("7 captions change").wait_for()
    page.get_by_role("button", name="Write", exact=True).click()
    playwright.expect(page.get_by_label("caption of face_00")).to_have_value("portrait: draw the mask")
    page.wait_for_load_state()
    slider = page.get_by_label("before and after of face_00")
    slider.focus()
    page.keyboard.press("End")
    playwright.expect(page.locator(".sides").first).to_have_attribute("style", re.compile("--cut: 100%"))
    page.get_by_label("choose face_01").check()
    page.get_by_role("button", name="Delete").click()
    arrived(page, "6 pairs in masks")
    page.get_by_role("link", name="Bin").click()
    page.wait_for_url("**/bin")
    page.get_by_role("button", name="Put back").click()
    page.get_by_text("The bin is empty").wait_for()
    page.get_by_role("link", name="Pictures").click()
    page.get_by_text("7 pairs").wait_for()
    kept(page, "pictures")


def two_tabs(page: playwright.Page, said: list[str]) -> None:
    """The second to write the same caption is told so, and overwrites nothing."""
    page.goto(page.url.rstrip("/") + "/data?set=masks")
    other = page.context.new_page()
    other.goto(page.url)
    for tab, words in ((page, "first"), (other, "second")):
        field = tab.get_by_label("caption of face_02")
        field.fill(words)
        field.press("Control+Enter")
        tab.get_by_text("Caption written." if tab is page else "changed elsewhere").wait_for()
    other.reload()
    assert other.get_by_label("caption of face_02").input_value() == "first"
    other.close()
    assert not [line for line in said if "409" not in line]
    said.clear()


def a_hundred_at_once(page: playwright.Page) -> None:
    answers = page.evaluate(
        "Promise.all([...Array(100).keys()].map((n) => fetch(n % 2 ? '/data?set=masks' : `/queue?n=${n}`)"
        ".then((answer) => answer.status)))"
    )
    assert answers == [200] * 100


def start_run(page: playwright.Page) -> None:
    """The form: a mistake is said at its key, the text follows, the plan says that it fits."""
    page.goto(re.sub(r"/data.*", "/new?from=start.yaml", page.url))
    field = page.get_by_label("Pairs a step")
    field.fill("many")
    field.press("Tab")
    page.get_by_text("'many' is refused; allowed: whole number from 1 to 10^9").wait_for()
    assert page.get_by_role("button", name="Put it in the queue").is_disabled()
    kept(page, "form")
    field.fill("1")
    field.press("Tab")
    page.get_by_text("The same as text").click()
    playwright.expect(page.get_by_label("the configuration as YAML")).to_have_value(re.compile("batch_size: 1\n"))
    page.get_by_label("card", exact=True).select_option("24GB")
    page.get_by_text("It fits").wait_for()
    page.get_by_role("button", name="Put it in the queue").click()
    page.wait_for_url("**/watch?**")


def survive(page: playwright.Page, server: Server, folder: Path, said: list[str]) -> None:
    """The server is killed in the middle of the run: the run goes on, the page finds it again."""
    page.wait_for_url("**/watch?run=**")
    page.locator("[data-curves] svg polyline").first.wait_for()
    page.locator(".samples figure img").first.wait_for()
    server.kill()
    page.get_by_text("The studio does not answer").wait_for()
    server.start()
    page.get_by_text("The studio is back").wait_for()
    assert [path.name for path in (folder / "output/masks").iterdir() if path.is_dir()] == ["v0"]
    said.clear()  # the browser notes that the server was away


def stop_and_go_on(page: playwright.Page, folder: Path) -> None:
    """SIGTERM saves; the rest is a job that goes on in the same version."""
    page.get_by_role("button", name="Stop").click()
    page.locator(".tag.stopped").wait_for()
    steps = page.locator("[data-figures] dd").first
    before = steps.text_content()
    assert before is not None
    page.get_by_role("button", name="Go on").click()
    page.wait_for_url("**/watch?run=**job=**")
    page.locator(".tag.running").wait_for()
    kept(page, "going on")
    playwright.expect(steps).not_to_have_text(before)
    playwright.expect(steps).to_have_text(re.compile("of 100,000"))
    page.get_by_role("button", name="Stop").click()
    page.locator(".tag.stopped").wait_for()
    assert [path.name for path in (folder / "output/masks").iterdir() if path.is_dir()] == ["v0"]
    page.locator(".samples figure img").first.wait_for()
    page.keyboard.press("t")
    assert page.get_by_label("left side").input_value() == "truth"
    kept(page, "watch")


def judge(page: playwright.Page) -> None:
    """Measured, taken away, on one page, side by side."""
    run = page.url
    page.get_by_label("How many").fill("1")
    page.get_by_role("button", name="Measure").click()
    page.wait_for_url("**/watch?job=**")
    page.get_by_role("rowheader", name="copy of the input").wait_for()
    kept(page, "measured")
    with page.expect_download() as download:
        page.locator("a[href*='format=diffusers']").first.click()
    assert re.fullmatch(r"masks-v0-step\d+-diffusers\.safetensors", download.value.suggested_filename)
    page.goto(run)
    with page.expect_popup() as popup:
        page.get_by_role("link", name="Report page").click()
    popup.value.get_by_role("heading", name="Run masks/v0").wait_for()
    popup.value.close()
    page.get_by_role("link", name="Compare").click()
    page.locator(".chart svg polyline").first.wait_for()
    kept(page, "compare")


def try_it(page: playwright.Page, folder: Path) -> None:
    page.get_by_role("link", name="Try").click()
    page.wait_for_url("**/try**")
    page.get_by_label("picture to be edited").set_input_files(folder.parent / "camera/control_images/face_10.jpg")
    page.get_by_alt_text("the picture").wait_for()
    page.get_by_label("Strengths").fill("1.0")
    page.get_by_label("Sampler steps").fill("2")
    page.get_by_role("button", name="Draw").click()
    page.locator(".cell img").first.wait_for()
    assert page.locator(".cell").count() == 2
    kept(page, "try")


def every_page(page: playwright.Page, address: str, name: str) -> None:
    """Nothing sticks out, nothing is said on the console."""
    run = "output/masks/v0"
    pages = {
        "pictures": "/", "set": "/data?set=masks", "form": "/new?from=start.yaml", "runs": "/runs", "bin": "/bin",
        "watch": f"/watch?run={run}", "compare": f"/compare?run={run}", "try": f"/try?run={run}",
    }  # fmt: skip
    for each, path in pages.items():
        page.goto(address + path)
        page.wait_for_timeout(200)  # for what its script draws
        kept(page, f"{each}-{name}")


def test_a_folder_is_open_in_one_studio(server: Server, folder: Path) -> None:
    command = [sys.executable, "-m", "qwen_image_finetune.cli", "studio", str(folder), "--port", "0"]
    second = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ}, timeout=60)
    assert second.returncode == 2
    assert f"open in another studio already (process {server.process.pid}, port {server.port})" in second.stderr
