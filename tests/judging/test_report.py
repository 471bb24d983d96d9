"""Pages about runs: whole, self-contained, and true to what stands in the run's folder."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qwen_image_finetune.command.cli import main
from qwen_image_finetune.config import Config
from qwen_image_finetune.judging.pages.curves import MOST_POINTS, Series, curve, moving_mean, nice_ticks, thinned
from qwen_image_finetune.judging.pages.html import table
from qwen_image_finetune.judging.pages.reading import ReportError, Version
from qwen_image_finetune.judging.report import report
from qwen_image_finetune.training.train import train

ROOT = Path(__file__).parents[2]
Configure = Callable[..., Config]
EMPTY = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """What a page holds; refuses elements that are closed in another order than they were opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sections: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in EMPTY:
            self.open.append(tag)
        if tag == "section":
            self.sections.append(str(found["id"]))
        if tag == "img":
            self.images.append(found)
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "action", "srcset", "data")]
        self.links += [] if tag not in ("iframe", "object", "embed", "base") else [tag]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture
def run(configure: Configure, write_pairs: Callable[..., Path], tmp_path: Path) -> Path:
    """Six steps with held-out pairs, samples and an evaluation, one caption of which would break a careless page."""
    held_out = write_pairs(tmp_path / "held", [(64, 64), (64, 64)], seed=3)
    (held_out / "training_images" / "0.txt").write_text('</figcaption><script>alert("1 & 2")</script>')
    rounds = {"enabled": True, "steps": 3, "num_validation_samples": 2, "num_inference_steps": 1,
              "dataset_path": str(held_out)}  # fmt: skip
    options = ("train.checkpointing_steps=3", f"validation={json.dumps(rounds)}")
    version = train(configure("FluxKontext", *options))
    assert version is not None
    assert main(["evaluate", str(version), str(held_out), "--steps", "1", "--guidance", "1"]) == 0
    return version


def assert_self_contained(text: str) -> Page:
    page = Page(text)
    assert page.links and all(link.startswith("data:") for link in page.links)
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp", text)
    return page


def test_the_page_holds_everything(run: Path) -> None:
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text(encoding="utf-8")
    page = assert_self_contained(text)
    assert page.sections == ["samples", "curves", "metrics", "data", "files", "settings", "versions"]
    assert text.count("<script>") == 1, "a caption is text, whatever stands in it"
    assert '<script>alert("1 & 2")</script>' in page.text
    assert all(image["alt"] for image in page.images)
    steps = {image["data-step"] for image in page.images if "data-step" in image}
    names = {image["data-name"] for image in page.images if "data-name" in image}
    assert (steps, names) == ({"3", "6"}, {"reference", "base", "truth"})
    for title in ("training loss", "held-out loss", "learning rate", "gradient norm", "seconds a step", "peak memory"):
        assert title in page.text
    best = json.loads((run / "best.json").read_text())["checkpoint"]
    assert f"--lora {run / best / 'pytorch_lora_weights.safetensors'}" in page.text
    assert "copy of the input" in page.text and "peak signal-to-noise" in page.text
    assert "optimizer.init_args.lr" in page.text and "packages.torch" in page.text


def test_a_run_without_anything_is_a_page_that_says_so(configure: Configure, tmp_path: Path) -> None:
    empty = tmp_path / "v3"
    empty.mkdir()
    (empty / "config.yaml").write_text(configure("QwenImageEdit", "data.init_args.dataset_path=/gone").to_yaml())
    page = Page(report(empty, tmp_path / "page.html").read_text(encoding="utf-8"))
    for words in (
        "not on this machine",
        "No step was recorded",
        "No samples were drawn",
        "No checkpoint",
        "qif evaluate",
    ):
        assert words in page.text
    with pytest.raises(ReportError, match=r"holds no config\.yaml"):
        Version(tmp_path / "elsewhere")
    assert main(["compare", str(empty)]) == 2


def test_runs_side_by_side(run: Path, configure: Configure, tmp_path: Path) -> None:
    other = train(configure("FluxKontext", "optimizer.init_args.lr=0.002", "train.max_train_steps=5"))
    assert other is not None
    output = tmp_path / "compare.html"
    assert main(["compare", str(run), str(other), "--output", str(output)]) == 0
    page = assert_self_contained(output.read_text(encoding="utf-8"))
    assert page.sections == ["runs", "difference", "curves", "samples", "metrics"]
    assert "optimizer.init_args.lr" in page.text and "0.002" in page.text
    assert "data.batch_size" not in page.text, "what is alike is left out"


def test_samples_are_cut_out_of_their_strips(run: Path) -> None:
    from PIL import Image

    sample = Version(run).samples[0]
    strip = Image.open(run / "samples" / "step-6" / "0.png").convert("RGB")
    assert sample.drawn[6].tobytes() == strip.crop((128, 0, 192, 64)).tobytes()
    assert sample.pictures["truth"].tobytes() == strip.crop((192, 0, 256, 64)).tobytes()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.5, 1]), (0.13, 0.92, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 900, [-500, 0, 500, 1000])],
)
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(expected)
    assert nice_ticks(2, 2)[0] < 2 < nice_ticks(2, 2)[-1]


def test_lines_keep_their_means() -> None:
    points = [(float(step), float(step % 7)) for step in range(5000)]
    thin = thinned(points)
    assert len(thin) <= MOST_POINTS
    assert sum(value for _, value in thin) / len(thin) == pytest.approx(3, abs=0.01)
    assert moving_mean([(step, 2.0) for step in range(50)]) == [(step, 2.0) for step in range(50)]
    middle = moving_mean([(step, float(step == 25)) for step in range(51)])
    assert middle[25] == (25, pytest.approx(1 / 5)) and middle[20][1] == 0


def test_a_curve_is_drawn_to_scale() -> None:
    svg = curve("x", [Series("a", [(0, 0.0), (10, 1.0), (20, float("nan"))])])
    assert 'points="52.0,198.0 412.0,8.0"' in svg
    assert curve("x", [Series("a", [])]) == ""
    assert table(["a<b"], [["1", "&"]]).count("&amp;") == 1


def test_pages_in_a_browser(run: Path, tmp_path: Path) -> None:
    """Nothing on the console, and nothing that sticks out sideways, on a phone and on a desktop."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import look_at_pages
    finally:
        sys.path.pop(0)
    if look_at_pages.CHROMIUM is None:
        pytest.skip("chromium is not installed")
    page = report(run)
    assert look_at_pages.look(page, tmp_path / "seen") == []
    broken = tmp_path / "broken.html"
    broken.write_text("<script>nothing()</script><div style='width: 5000px'>x</div>")
    problems = "\n".join(look_at_pages.look(broken, tmp_path / "seen"))
    assert "CONSOLE" in problems and "sticks out" in problems
    command = [sys.executable, ROOT / "scripts" / "look_at_pages.py", tmp_path / "seen", page]
    assert subprocess.run(command, check=False).returncode == 0
