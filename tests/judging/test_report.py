"""Pages about runs: whole, self-contained, and true to what stands in the run's folder."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from qwen_image_finetune.command.cli import main
from qwen_image_finetune.config import Config
from qwen_image_finetune.data.sources import read_folder
from qwen_image_finetune.drawing.samples import side_by_side
from qwen_image_finetune.encoding.remembered import content_of
from qwen_image_finetune.judging.compare import compare
from qwen_image_finetune.judging.pages.curves import MOST_POINTS, Curve, Series, charts, thinned
from qwen_image_finetune.judging.pages.html import table
from qwen_image_finetune.judging.pages.reading import Version
from qwen_image_finetune.judging.pages.shapes import ReportError
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


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, flux_folder: Path, pairs: Path, write_pairs: Callable[..., Path]
) -> Path:
    """Six steps with held-out pairs, samples and an evaluation, one caption of which would break a careless page."""
    folder = tmp_path_factory.mktemp("report")
    held_out = write_pairs(folder / "held", [(64, 64), (64, 64)], seed=3)
    (held_out / "training_images" / "0.txt").write_text('</figcaption><script>alert("1 & 2")</script>')
    written = {
        "model": {"pretrained_model_name_or_path": str(flux_folder), "lora": {"r": 4, "lora_alpha": 4}},
        "data": {"init_args": {"dataset_path": str(pairs), "resolution": 64}},
        "train": {"max_train_steps": 6, "checkpointing_steps": 3, "mixed_precision": "no"},
        "optimizer": {"init_args": {"lr": 1e-2}},
        "cache": {"use_cache": True, "cache_dir": str(folder / "cache")},
        "validation": {"enabled": True, "steps": 3, "num_validation_samples": 2, "num_inference_steps": 1,
                       "dataset_path": str(held_out)},
        "logging": {"output_dir": str(folder), "report_to": "none", "tracker_project_name": "project"},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(written))
    assert main(["train", str(folder / "config.yaml")]) == 0
    assert main(["evaluate", str(folder / "project/v0"), str(held_out), "--steps", "1", "--guidance", "1"]) == 0
    return folder / "project/v0"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to write into."""
    return Path(shutil.copytree(made, tmp_path / "project/v0"))


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
    for title in ("Training loss", "Held-out loss", "Learning rate", "Gradient norm", "Time of a step", "Peak memory"):
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


def test_lines_keep_their_means() -> None:
    points = [(float(step), float(step % 7)) for step in range(50_000)]
    thin = thinned(points)
    assert len(thin) <= MOST_POINTS
    assert sum(value for _, value in thin) / len(thin) == pytest.approx(3, abs=0.01)
    assert thinned(points[:5]) == points[:5] and thinned([]) == []


def test_the_numbers_of_a_curve_stand_in_the_page() -> None:
    series = Series("a </script> b", [(0, 0.0), (10, 1.0), (20, float("nan"))], colour=9, band=[(0, -1.0, 1.0)])
    html = charts([Curve("x", [series], "s", zero=True), Curve("nothing", [Series("n", [(1, float("inf"))])])])
    assert html.count("</script>") == 1
    (found,) = json.loads(html.split('json">')[1].rpartition("</script>")[0])
    assert found == {"title": "x", "unit": "s", "zero": True, "series": [
        {"name": "a </script> b", "colour": 1, "smooth": False, "points": [[0, 0.0], [10, 1.0]],
         "band": [[0, -1.0, 1.0]]}]}  # fmt: skip
    assert charts([]) == ""
    assert table(["", "a<b"], [["1", "&"]]).count("&amp;") == 1


def test_pictures_and_curves_answer(run: Path, tmp_path: Path) -> None:
    """Values under the pointer, zoom and a log axis; a picture as large as the screen, base and truth one key away."""
    playwright = pytest.importorskip("playwright.sync_api")
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed")
    page_file = report(run, tmp_path / "report.html")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1440, "height": 900}, color_scheme="dark")
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(page_file.resolve().as_uri())
        chart = page.locator(".chart").first
        chart.scroll_into_view_if_needed()
        # To scale: the first of six steps at the left edge of the axes, the last at the right.
        points = chart.locator("polyline.line").last.get_attribute("points").split()
        assert [float(point.split(",")[0]) for point in (points[0], points[-1])] == [50.0, 412.0]
        losses = [
            json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line
        ]
        box = chart.locator("svg").bounding_box()
        page.mouse.move(box["x"] + box["width"] * 50 / 420 + 1, box["y"] + 40)
        assert chart.locator("output").inner_text() == f"step 1: {float(f'{losses[0]:.3g}'):g}"
        chart.get_by_role("button", name="log").click()
        assert chart.get_by_role("button", name="log").get_attribute("aria-pressed") == "true"
        assert "10" in chart.locator("svg text").all_text_contents(), "a power of ten"
        chart.get_by_role("button", name="log").click()
        box = chart.locator("svg").bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 40)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + 40, steps=3)
        page.mouse.up()
        assert "6" not in chart.locator("svg text").all_text_contents(), "zoomed in"
        chart.locator("svg").dblclick()
        assert "6" in chart.locator("svg text").all_text_contents()

        page.locator(".sides").first.click()
        large = page.locator("dialog.large img")
        drawn = large.get_attribute("src")
        assert large.bounding_box()["width"] == 1440
        seen = {key: (page.keyboard.press(key), large.get_attribute("alt"))[1] for key in ("t", "b", "r", "d")}
        assert seen["t"].startswith("truth") and seen["b"].startswith("base") and seen["r"].startswith("reference")
        assert large.get_attribute("src") == drawn
        page.keyboard.press("ArrowDown")
        assert "step 3" in large.get_attribute("alt")
        page.keyboard.press("ArrowRight")
        assert large.get_attribute("alt") != seen["d"]
        page.keyboard.press("Escape")
        assert page.locator("dialog.large[open]").count() == 0
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 17, 16)"
        chromium.close()
    assert said == []


def test_pages_in_a_browser(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing on the console, and nothing that sticks out sideways, on a phone and on a desktop."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import look_at_pages
    finally:
        sys.path.pop(0)
    if look_at_pages.CHROMIUM is None:
        pytest.skip("chromium is not installed")
    monkeypatch.setattr(sys, "argv", ["look_at_pages.py", str(tmp_path / "seen"), str(report(run))])
    with pytest.raises(SystemExit) as ended:
        look_at_pages.main()
    assert ended.value.code == 0
    broken = tmp_path / "broken.html"
    broken.write_text(
        "<!doctype html><script>nothing()</script><div style='width: 5000px'>x</div>"
        "<pre style='width: 50px; overflow-x: auto'>a line that is much longer than that</pre>"
    )
    problems = "\n".join(look_at_pages.look(broken, tmp_path / "seen"))
    assert "CONSOLE" in problems and "sticks out" in problems and "cut off" in problems and "pre" in problems


def a_run(folder: Path, config: Config, steps: int = 0, state: str = "running", **lines: object) -> Path:
    """The folder of a run as training leaves it, without training."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    recorded = [json.dumps({"step": step, "loss": 0.5, **lines}) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in recorded))
    (folder / "run.json").write_text(json.dumps({"state": state, "step": steps}))
    return folder


def with_rounds(run: Path, averaged_from: int) -> Path:
    """Rounds of samples at steps 2, 4 and 6: grey as dark as the step, what the average drew a little brighter."""
    for step in (2, 4, 6):
        shades = {"base": 0, "drawn": 20 * step, "averaged": 20 * step + 100, "truth": 255}
        if step < averaged_from:
            del shades["averaged"]
        strip, places = side_by_side(
            [(name, Image.new("RGB", (32, 32), (shade,) * 3)) for name, shade in shades.items()], 32
        )
        folder = run / f"samples/step-{step}"
        folder.mkdir(parents=True)
        strip.save(folder / "0.png")
        (folder / "layout.json").write_text(json.dumps([{"key": "a", "prompt": "b", "parts": places}]))
    return run


def test_what_the_average_drew_is_shown_round_by_round(configure: Configure, tmp_path: Path) -> None:
    run = with_rounds(a_run(tmp_path / "v0", configure("FluxKontext"), 6, "finished"), averaged_from=4)
    text = report(run).read_text(encoding="utf-8")
    shown = [(image["data-step"], image["alt"]) for image in Page(text).images if image.get("data-name") == "averaged"]
    assert shown == [("2", "a: no average yet at step 2"), ("4", "a drawn by the average at step 4"),
                     ("6", "a drawn by the average at step 6")]  # fmt: skip
    assert "R and A are" in text and "<option>averaged</option>" in text
    compared = compare([run, run], tmp_path / "compare.html").read_text(encoding="utf-8")
    assert compared.count("step 6, the average") == 2
    without = with_rounds(a_run(tmp_path / "v1", configure("FluxKontext"), 6, "finished"), averaged_from=9)
    assert "averaged</option>" not in report(without).read_text(encoding="utf-8")

    playwright = pytest.importorskip("playwright.sync_api")
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page()
        page.goto((run / "report.html").resolve().as_uri())
        page.locator("[data-control=left]").select_option("averaged")
        seen = []
        for place in range(3):
            page.locator("[data-control=step]").fill(str(place))
            (before,) = page.locator(".before img:visible").all()
            seen.append((page.locator("output").first.inner_text(), before.get_attribute("alt")))
        assert seen == shown
        page.locator(".sides").first.click()
        page.keyboard.press("a")
        assert page.locator("dialog.large img").get_attribute("alt") == shown[2][1]
        page.keyboard.press("ArrowDown")
        assert page.locator("dialog.large img").get_attribute("alt") == shown[1][1]
        chromium.close()


def test_what_is_configured_and_still_to_come_is_said(configure: Configure, tmp_path: Path) -> None:
    def page(name: str, state: str, *options: str) -> str:
        folder = a_run(tmp_path / name, configure("FluxKontext", *options), 2, state)
        text = Page(report(folder, tmp_path / f"{name}.html").read_text(encoding="utf-8")).text
        compared = compare([folder, folder], tmp_path / f"{name}-compared.html").read_text(encoding="utf-8")
        assert ("samples come after step" in text) == ("samples come after step" in compared)
        return text

    rounds = "validation={enabled: true, share: 0.2, steps: 4}"
    ended = page("v0", "finished", rounds, "train.checkpointing_steps=3")
    assert "samples come after step 4; the run ended at step 2" in ended
    assert "losses of held-out pairs come after step 3; the run ended" in ended
    assert "validation.enabled=true" not in ended and "validation.share" not in ended.partition("All settings")[0][-9:]
    without = page("v1", "finished")
    assert "validation.enabled=true draws them" in without and "No held-out loss" in without
    only_drawn = page("v2", "finished", "validation={enabled: true, steps: 4}")
    assert "samples come after step 4" in only_drawn and "No held-out loss" in only_drawn


def test_pairs_that_were_trained_on_and_held_out_are_counted(configure: Configure, pairs: Path, tmp_path: Path) -> None:
    config = configure("FluxKontext")
    known = [(row.key, content_of(row)) for row in read_folder(pairs, masks=False)[0]]
    splits = {"v0": (known, []), "v1": (known[2:], known[:2]), "v2": (known[:5], known[5:])}
    runs = []
    for name, (trained, held_out) in splits.items():
        runs.append(a_run(tmp_path / name, config, 2, "finished"))
        (runs[-1] / "pairs.json").write_text(json.dumps({"trained": trained, "held_out": held_out}))
    text = Page(report(runs[1]).read_text(encoding="utf-8")).text
    assert "pairs trained on 5" in text and "pairs held out 2" in text
    assert text.count("(held out)") == 2
    different = Page(compare(runs, tmp_path / "compare.html").read_text(encoding="utf-8")).text
    assert "pairs trained on 7 (content" in different and different.count("5 (content") == 2
    alike = Page(compare([runs[1], runs[1]], tmp_path / "alike.html").read_text(encoding="utf-8")).text
    assert "None: all were set alike" in alike, "and 5 of other content are not"
    assert "None: all were set alike" not in Page(compare(runs[1:], tmp_path / "c.html").read_text()).text


METRIC = {"unit": "dB", "better": "higher", "words": "w"}
SOUND = {"dataset": "d", "pictures": 1, "seed": 0, "num_inference_steps": 1, "guidance_scale": 1.0,
         "metrics": {"psnr": METRIC}, "notes": [], "candidates": [{"name": "base", "means": {}}]}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("evaluation/evaluation.json", []),
        ("evaluation/evaluation.json", {name: value for name, value in SOUND.items() if name != "metrics"}),
        ("evaluation/evaluation.json", SOUND | {"candidates": [{"name": "base", "means": {"psnr": {"mean": "x"}}}]}),
        ("metrics.jsonl", {"step": 3, "loss": "much"}),
        ("best.json", {"step": 3}),
        ("best.json", 7),
        ("environment.json", {"packages": ["torch"]}),
        ("pairs.json", {"trained": [["a", "b"]]}),
        ("samples/step-2/layout.json", {"key": "a"}),
        ("samples/step-2/layout.json", [{"key": "a", "prompt": "b", "parts": [{"name": "drawn"}]}]),
    ],
)
def test_a_file_that_is_not_what_a_run_writes_is_named(
    file: str, content: object, configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "v0", configure("FluxKontext"), 2, "finished")
    (run / file).parent.mkdir(parents=True, exist_ok=True)
    (run / file).write_text(json.dumps(content))
    for words in (["report", str(run)], ["compare", str(run), str(run), "--output", str(tmp_path / "c.html")]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert str(run / file) in said and "damaged" in said and len(said.splitlines()) == 1


def test_a_measure_that_is_lacking_is_left_out(configure: Configure, tmp_path: Path) -> None:
    run = a_run(tmp_path / "v0", configure("FluxKontext"), 2, "finished")
    (run / "evaluation").mkdir()
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(SOUND))
    assert "1 pairs, d; 1 sampler steps" in Page(report(run).read_text(encoding="utf-8")).text
    compare([run, run], tmp_path / "compare.html")
