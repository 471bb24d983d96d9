"""Runs as the page sees them: from the files that they write, wherever they were started."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from qwen_image_finetune.config import Config
from qwen_image_finetune.disk.runs import Run, claim_version
from qwen_image_finetune.studio.jobs import Jobs, Step
from qwen_image_finetune.studio.routes_common import Studio
from qwen_image_finetune.studio.watching import seconds_left

NAME = "output/faces/v0"


@pytest.fixture
def run(folder: Path) -> Run:
    """A run that this very process owns, as a terminal's would."""
    config = Config.model_validate(
        {
            "model": {"pretrained_model_name_or_path": "Qwen/Qwen-Image-Edit"},
            "data": {"init_args": {"dataset_path": "faces"}},
            "train": {"max_train_steps": 20},
        }
    )
    made = claim_version(folder / "output/faces")
    (made.path / "config.yaml").write_text(config.to_yaml())
    (made.path / "data.json").write_text(json.dumps({"training": {}, "held_out": {"3": ["a", "b"]}}))
    for step in range(1, 6):
        made.record(step, {"loss": 1 / step, "step_seconds": 2.0})
    return made


def live(client: TestClient, offset: int = 0) -> dict[str, object]:
    found: dict[str, object] = client.get("/watch/live", params={"run": NAME, "offset": offset}).json()
    return found


def test_a_run_of_a_terminal_is_seen(client: TestClient, run: Run) -> None:
    assert "faces/v0" in client.get("/").text
    told = live(client)
    assert (told["state"], told["step"], told["total"], told["seconds_left"]) == ("running", 5, 20, 30.0)
    run.finish("finished", 20)
    run.close()
    assert live(client)["state"] == "finished"


def test_a_killed_run_is_told_from_one_that_runs(client: TestClient, run: Run) -> None:
    run.close()
    assert live(client)["state"] == "killed"


def test_curves_grow_by_what_is_new(client: TestClient, run: Run) -> None:
    first = live(client)
    assert [line["step"] for line in first["lines"]] == [1, 2, 3, 4, 5]  # type: ignore[attr-defined]
    offset = first["offset"]
    assert isinstance(offset, int)
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 0.1}\n{"step": 7, "lo')  # torn: it is being written
    second = live(client, offset)
    assert second["lines"] == [{"step": 6, "loss": 0.1}]
    run.truncate_metrics(2)  # as a resume does
    third = live(client, 10_000)
    assert third["again"] is True
    assert len(third["lines"]) == 2  # type: ignore[arg-type]


def test_values_that_are_no_numbers_are_left_out(client: TestClient, run: Run) -> None:
    run.record(6, {"loss": float("nan"), "grad_norm": 1.0})
    assert live(client)["lines"][-1] == {"step": 6, "grad_norm": 1.0}  # type: ignore[index]


def test_samples_are_cut_out_of_their_strips(client: TestClient, run: Run) -> None:
    samples = run.path / "samples/step-5"
    samples.mkdir(parents=True)
    strip = Image.new("RGB", (16, 8), "red")
    strip.paste("blue", (8, 0, 16, 8))
    strip.save(samples / "0.png")
    parts = [{"name": "reference", "left": 0, "width": 8}, {"name": "drawn", "left": 8, "width": 8}]
    (samples / "layout.json").write_text(json.dumps([{"key": "a", "prompt": "b", "parts": parts}]))
    assert live(client)["samples"]["steps"] == [5]  # type: ignore[index, call-overload]
    drawn = client.get("/watch/sample", params={"run": NAME, "step": 5, "place": 0, "part": 1})
    path = run.path / "seen.webp"
    path.write_bytes(drawn.content)
    with Image.open(path) as image:
        red, _, blue = image.convert("RGB").getpixel((4, 4))  # type: ignore[misc]
        assert image.size == (8, 8)
    assert blue > 200 > 60 > red
    for part, place in ((2, 0), (0, 1)):
        assert (
            client.get("/watch/sample", params={"run": NAME, "step": 5, "place": place, "part": part}).status_code
            == 404
        )


def test_pairs_that_are_kept_aside_are_marked(client: TestClient, run: Run) -> None:
    page = client.get("/data?set=faces").text
    assert page.count("kept aside</span>") == 1
    assert "the 1 kept aside" in client.get(f"/watch?run={NAME}").text
    text = (run.path / "config.yaml").read_text()
    (run.path / "config.yaml").write_text(text.replace("  dataset_path: null", "  dataset_path: elsewhere"))
    assert "elsewhere" in (run.path / "config.yaml").read_text()
    assert "kept aside</span>" not in client.get("/data?set=faces").text, "a pair of another folder is called alike"


def test_a_damaged_run_hides_no_other(client: TestClient, run: Run) -> None:
    broken = run.path.with_name("v1")
    broken.mkdir()
    for name in ("run.json", "best.json", "config.yaml", "metrics.jsonl", "data.json"):
        (broken / name).write_text('{"step": [')
    page = client.get("/")
    assert page.status_code == 200
    assert "faces/v0" in page.text
    assert "faces/v1" in page.text


def test_the_log_of_a_run_shows_no_secrets(client: TestClient, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "WANDB_API_KEY", "0123456789abcdef")
    (run.path / "log.txt").write_text("<b>login</b> 0123456789abcdef\n")
    assert live(client)["log"] == "<b>login</b> ***\n"


def test_a_job_finds_the_run_that_its_process_owns(studio: Studio, run: Run, folder: Path) -> None:
    import psutil

    job = Jobs(studio.shelf).add("train", "faces", [Step("train", [])], True, about={"project": "output/faces"})
    assert studio.runs.of_job(job) is None
    (job.folder / "started.json").write_text('{"at": 0}')
    born = psutil.Process().create_time()
    (job.folder / "process.json").write_text(json.dumps({"pid": os.getpid(), "born": born}))
    assert studio.runs.of_job(job) == NAME


def test_going_on_is_the_rest_of_the_same_version(
    client: TestClient, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_image_finetune.studio.queue import Queue

    monkeypatch.setattr(Queue, "tick", lambda self: None)
    assert client.post("/queue/continue", json={"run": NAME}).status_code == 409
    run.finish("interrupted", 5)
    run.close()
    assert "nothing was saved" in client.post("/queue/continue", json={"run": NAME}).json()["error"]
    (run.path / "checkpoint-0-5").mkdir()
    told = client.post("/queue/continue", json={"run": NAME}).json()
    text = (folder / ".studio/jobs" / told["job"] / "config.yaml").read_text()
    assert f"resume_from_checkpoint: {NAME}/checkpoint-0-5" in text


def test_drawing_asks_for_what_the_run_has(
    client: TestClient, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_image_finetune.studio.queue import Queue

    monkeypatch.setattr(Queue, "tick", lambda self: None)
    (run.path / "checkpoint-0-5").mkdir()
    ask = {
        "run": NAME, "picture": "faces/control_images/0.png", "prompt": "--lora=/etc/passwd", "seed": 7,
        "checkpoints": ["checkpoint-0-5"], "strengths": [0.5, 1.0],
    }  # fmt: skip
    told = client.post("/try/draw", json=ask).json()
    job = Jobs(studio_of(client).shelf).of(told["job"])
    (step,) = job.steps
    assert step.verb == "grid" and step.arguments[0] == str(job.folder / "config.yaml")
    lora = str(run.path / "checkpoint-0-5")
    assert json.loads(step.arguments[2]) == {
        "prompt": "--lora=/etc/passwd", "images": [str(folder / "faces/control_images/0.png")], "seed": 7,
        "steps": None,
        "cells": [None, [lora, 0.5], [lora, 1.0]],
    }  # fmt: skip
    assert client.get(told["address"]).status_code == 200
    for wrong in ({"checkpoints": ["../v1"]}, {"strengths": [9.0]}, {"prompt": " "}, {"steps": 0}, {"picture": None}):
        assert client.post("/try/draw", json={**ask, **wrong}).status_code in (400, 404)


def test_a_grid_draws_what_the_command_draws(configure: Callable[..., Config], pairs: Path, tmp_path: Path) -> None:
    """One model in memory, and every cell is to the bit what a process of its own would draw."""
    from qwen_image_finetune.command.cli import main
    from qwen_image_finetune.studio import grid
    from qwen_image_finetune.training.train import train

    config = configure("FluxKontext", "train.max_train_steps=2")
    trained = train(config)
    assert trained is not None
    lora, picture = str(trained / "checkpoint-0-2"), str(pairs / "control_images/0.png")
    cells: list[tuple[str, float] | None] = [(lora, 1.0), None, (lora, 0.5)]
    grid.draw_cells(tmp_path / "config.yaml", tmp_path, grid.Wish("draw", [picture], 3, 2, cells))
    for place, cell in enumerate(cells):
        words = ["predict", str(tmp_path / "config.yaml"), "--prompt", "draw", "--image", picture, "--seed", "3"]
        more = [] if cell is None else ["--lora", cell[0], "--strength", str(cell[1])]
        alone = tmp_path / f"alone-{place}.png"
        assert main([*words, *more, "--steps", "2", "--output", str(alone)]) == 0
        assert alone.read_bytes() == (tmp_path / f"{place}.png").read_bytes()
    assert len({(tmp_path / f"{place}.png").read_bytes() for place in range(3)}) == 3


def studio_of(client: TestClient) -> Studio:
    found = client.app.state.studio  # type: ignore[attr-defined]
    assert isinstance(found, Studio)
    return found


def test_runs_side_by_side(client: TestClient, run: Run, folder: Path) -> None:
    other = claim_version(folder / "output/faces")
    text = (run.path / "config.yaml").read_text().replace("max_train_steps: 20", "max_train_steps: 40")
    (other.path / "config.yaml").write_text(text)
    page = client.get("/compare", params=[("run", NAME), ("run", "output/faces/v1")]).text
    assert "Length, steps" in page
    assert "<td>20</td>" in page
    assert "Learning rate" not in page.partition("Curves")[0]


def test_what_was_measured_is_said_with_units(client: TestClient, run: Run) -> None:
    value = {"mean": 12.345, "low": 11.0, "high": 13.0}
    (run.path / "evaluation").mkdir()
    found = {
        "pictures": 3, "dataset": "<b>held out</b>", "seed": 0,
        "metrics": {"psnr": {"words": "w", "unit": "dB", "better": "higher"},
                    "lpips": {"words": "w", "unit": "", "better": "lower"}},
        "candidates": [{"name": "base", "means": {"psnr": value, "lpips": None}}],
    }  # fmt: skip
    (run.path / "evaluation/evaluation.json").write_text(json.dumps(found))
    for address in (f"/watch?run={NAME}", f"/compare?run={NAME}"):
        page = client.get(address).text
        assert "likeness to the truth (PSNR), dB ↑" in page
        assert "12.35" in page or "12.34" in page
        assert "LPIPS" not in page, "nothing was measured"
        assert "<b>held" not in page


@pytest.mark.parametrize(
    ("lines", "total", "seconds"),
    [
        ([{"step": 5, "step_seconds": 2.0}], 20, 30.0),
        ([{"step": 5, "step_seconds": 2.0}], None, None),
        ([{"step": 5}], 20, None),
        ([], 20, None),
        ([{"step": 25, "step_seconds": 2.0}], 20, 0),
    ],
)
def test_time_left(lines: list[dict[str, float]], total: int | None, seconds: float | None) -> None:
    assert seconds_left(lines, total) == seconds


def test_the_report_runs_its_script_and_reaches_nothing(
    client: TestClient, run: Run, write_pairs: Callable[..., Path]
) -> None:
    answer = client.get("/report", params={"run": NAME})
    assert answer.status_code == 200, answer.text
    policy = answer.headers["content-security-policy"]
    assert "sandbox allow-scripts" in policy
    assert "connect-src" not in policy
    assert "allow-same-origin" not in policy
