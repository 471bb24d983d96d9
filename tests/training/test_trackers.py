"""Every online tracker, run for real without a network: what it keeps on disk is what the run measured and drew."""

from __future__ import annotations

import json
import socket
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from qwen_image_finetune.config import Config
from qwen_image_finetune.training.online import unavailable
from qwen_image_finetune.training.train import train

VALIDATION = "{enabled: true, share: 0.3, steps: 2, num_validation_samples: 2, num_inference_steps: 1}"
HELD_OUT, SAMPLES = ("pair", "loss", "base", "difference"), ("pair", "prompt", "psnr", "colour_drift", "displacement")
LORA_RANK = 4


@dataclass
class Kept:
    """What a tracker kept of a run."""

    rank: Any  # of the LoRA, in the configuration
    tables: dict[str, list[tuple[tuple[str, ...], list[list[Any]]]]]  # (columns, rows) of each round
    pictures: list[Path]
    captions: str  # or whatever holds them


def of_wandb(run: Path, folder: Path) -> Kept:
    (kept,) = (run / "logs" / "wandb").glob("offline-run-*")
    tables = {}
    for name in ("held_out_pairs", "sample_measures"):
        files = sorted((kept / "files" / "media" / "table").glob(f"{name}_*.json"), key=step_of)
        found = [json.loads(file.read_text()) for file in files]
        tables[name] = [(tuple(table["columns"]), table["data"]) for table in found]
    (log,) = kept.glob("run-*.wandb")
    said = unframed(log.read_bytes()).decode(errors="replace")
    rank = LORA_RANK if f'"r":{LORA_RANK},' in said.replace(" ", "") else None
    return Kept(rank, tables, list((kept / "files" / "media" / "images" / "samples").glob("*.png")), said)


def step_of(file: Path) -> int:
    return int(file.name.rsplit("_", 2)[1])


def unframed(log: bytes) -> bytes:
    """A log in LevelDB's format without the headers of its parts: blocks of 32 KiB, 7 bytes before each part."""
    at, found = 7, b""
    while at + 7 <= len(log):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length = int.from_bytes(log[at + 4 : at + 6], "little")
        found += log[at + 7 : at + 7 + length]
        at += 7 + length
    return found


def of_swanlab(run: Path, folder: Path) -> Kept:
    (kept,) = (run / "logs").glob("run-*")
    tables: dict[str, list[tuple[tuple[str, ...], list[list[Any]]]]] = {"held_out_pairs": [], "sample_measures": []}
    for file in sorted((kept / "media" / "echarts").glob("*.json"), key=lambda file: file.name[:3]):
        table = json.loads(file.read_text())
        columns = tuple(column["field"] for column in table["colDefs"])
        rows = [[row[column] for column in columns] for row in table["rowData"]]
        tables["held_out_pairs" if "loss" in columns else "sample_measures"].append((columns, rows))
    (log,) = kept.glob("*.swanlab")
    settings = yaml.safe_load((kept / "files" / "config.yaml").read_text())
    pictures = list((kept / "media" / "image").glob("*.png"))
    return Kept(settings["model"]["value"]["lora"]["r"], tables, pictures, log.read_bytes().decode(errors="replace"))


def of_trackio(run: Path, folder: Path) -> Kept:
    with sqlite3.connect(folder / "trackio" / "project.db") as kept:
        ((settings,),) = kept.execute("select config from configs").fetchall()
        lines = [json.loads(line) for (line,) in kept.execute("select metrics from metrics order by id")]
    tables = {}
    for name in ("held_out_pairs", "sample_measures"):
        found = [line[name]["_value"] for line in lines if name in line]
        tables[name] = [(tuple(rows[0]), [list(row.values()) for row in rows]) for rows in found]
    shown = [value for line in lines for key, value in line.items() if key.startswith("samples/")]
    pictures = [folder / "trackio" / "media" / value["file_path"] for value in shown]
    captions = " ".join(value["caption"] for value in shown)
    return Kept(json.loads(settings)["model.lora.r"], tables, pictures, captions)


def of_mlflow(run: Path, folder: Path) -> Kept:
    with sqlite3.connect(run / "logs" / "mlflow.db") as kept:
        ((rank,),) = kept.execute("select value from params where key = 'model.lora.r'").fetchall()
        ((listed,),) = kept.execute("select value from tags where key = 'mlflow.loggedArtifacts'").fetchall()
    (artifacts,) = (run / "logs" / "mlartifacts").glob("*/artifacts")
    tables = {}
    for name in ("held_out_pairs", "sample_measures"):
        assert f"{name}.json" in listed
        whole = json.loads((artifacts / f"{name}.json").read_text())
        assert whole["columns"][0] == "step"
        rounds = [[row[1:] for row in whole["data"] if row[0] == step] for step in (2, 4)]
        tables[name] = [(tuple(whole["columns"][1:]), rows) for rows in rounds]
    captions = (artifacts / "captions.json").read_text()
    return Kept(int(rank), tables, list((artifacts / "images").glob("*.png")), captions)


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses outside of this machine that this process asked for; none of them answers."""
    asked: list[Any] = []
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            asked.append(address)
            raise OSError("no network in tests")
        connect(self, address)

    def resolved(host: Any, *rest: Any, **more: Any) -> Any:
        if host not in (None, "127.0.0.1", "::1", "localhost"):
            asked.append(host)
            raise socket.gaierror("no network in tests")
        return resolve(host, *rest, **more)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    return asked


@pytest.mark.parametrize("name", ["wandb", "swanlab", "trackio", "mlflow"])
def test_a_tracker_shows_what_was_measured_and_drawn(
    name: str, configure: Callable[..., Config], reached: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if unavailable([name]):
        pytest.skip(f"{name} is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read where trackio is imported
    trackers = f"logging.report_to=[tensorboard, {name}]"
    run = train(configure("FluxKontext", trackers, "train.max_train_steps=4", f"validation={VALIDATION}"))
    assert run is not None
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    kept = {"wandb": of_wandb, "swanlab": of_swanlab, "trackio": of_trackio, "mlflow": of_mlflow}[name](run, tmp_path)
    assert kept.rank == LORA_RANK

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if "held_out_loss" in line]
    held_out, samples = kept.tables["held_out_pairs"], kept.tables["sample_measures"]
    assert len(rounds) == len(held_out) == len(samples) == 2
    for line, (columns, rows), (measures, drawn) in zip(rounds, held_out, samples, strict=True):
        assert (columns, measures) == (HELD_OUT, SAMPLES)
        assert np.mean([row[1] for row in rows]) == pytest.approx(line["held_out_loss"])
        assert np.mean([row[3] for row in rows]) == pytest.approx(line["held_out_difference"])
        assert np.mean([row[2] for row in drawn]) == pytest.approx(line["sample_psnr"])
        assert [row[1] for row in drawn] == [f"edit number {row[0]}" for row in drawn]

    strips = {Image.open(file).tobytes() for file in run.glob("samples/step-*/*.png")}
    shown = {Image.open(file).convert("RGB").tobytes() for file in kept.pictures}
    assert len(strips) == 4 and shown == strips
    for row in samples[0][1]:
        assert f"{row[0]}: {row[1]} (reference, base, drawn, truth)" in kept.captions
    assert not reached
