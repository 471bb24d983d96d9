"""Twenty thousand steps: memory, open files, the event file; and what a checkpoint costs the loop."""

from __future__ import annotations

import re
import struct
import time
from pathlib import Path

import psutil
import pytest
from lab import FULL, Lab, Trial, checkpoints, curve, full_or, record, versions

MASK_DELTA = 0xA282EAD8  # masked CRC32C, as TFRecord defines it


def masked_crc(data: bytes) -> int:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c

    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + MASK_DELTA) & 0xFFFFFFFF


def steps_in_events(path: Path) -> list[int]:
    """The step of every scalar event; raises where a record is torn or its checksum is wrong."""
    from tensorboard.compat.proto.event_pb2 import Event

    data, place, steps = path.read_bytes(), 0, []
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        body = data[place + 12 : place + 12 + length]
        assert struct.unpack_from("<I", data, place + 8)[0] == masked_crc(data[place : place + 8])
        assert struct.unpack_from("<I", data, place + 12 + length)[0] == masked_crc(body)
        event = Event.FromString(body)
        steps += [event.step] if any(value.tag == "loss" for value in event.summary.value) else []
        place += 16 + length
    return steps


def sample(trial: Trial, config: Path, total: int) -> list[tuple[int, int, int]]:
    """(step, resident bytes, open files) now and then while a run goes on."""
    process, found = psutil.Process(trial.pid), []
    while trial.process.exitcode is None:
        time.sleep(1 if FULL else 0.2)
        metrics = next(config.parent.glob("output/project/v*/metrics.jsonl"), None)
        steps = metrics.read_bytes().count(b"\n") if metrics else 0
        if 0 < steps < total:
            try:
                found.append((steps, process.memory_info().rss, process.num_fds()))
            except psutil.NoSuchProcess:
                break
    return found


@pytest.mark.timeout(7200)
def test_a_long_run_grows_no_memory_and_leaks_no_files(lab: Lab) -> None:
    steps = full_or(20_000, 400)
    config = lab.config(
        "long", train={"max_train_steps": steps, "checkpointing_steps": steps // 10, "checkpoints_total_limit": 2},
        logging={"report_to": "tensorboard"},
    )  # fmt: skip
    trial = lab.start(config)
    samples = sample(trial, config, steps)
    assert trial.wait(3600) == 0, trial.said()
    (version,) = versions(config)
    lost = []
    # After the first tenth: by then every lazy buffer exists and one checkpoint was written.
    settled = [item for item in samples if item[0] > steps // 10 + 20]
    early, late = settled[: len(settled) // 4 or 1], settled[-(len(settled) // 4 or 1) :]
    before, after = (sum(item[1] for item in part) / len(part) for part in (early, late))
    growth = (after - before) / before
    files = {item[2] for item in settled}
    if growth > (0.01 if FULL else 0.05):
        lost.append(f"memory grew by {growth:.2%}")
    if max(files) - min(files) > 2:  # a checkpoint that is being written holds one or two
        lost.append(f"open files {sorted(files)}")
    (events,) = version.glob("events.out.tfevents.*")
    if steps_in_events(events) != list(range(1, steps + 1)) or len(curve(version)) != steps:
        lost.append("the event file is not sound")
    if len(checkpoints(version)) != 2:
        lost.append(str(checkpoints(version)))
    note = f"resident memory {before / 1e6:.1f} -> {after / 1e6:.1f} MB ({growth:+.2%}), open files {sorted(files)}"
    record(f"a run of {steps:,} steps", 1, lost[:1], note + ", event file sound")


@pytest.mark.timeout(1800)
def test_what_a_checkpoint_costs_the_loop(lab: Lab) -> None:
    """The loop stands still while tensors are copied; what is written in the background is not waited for."""
    from diffusers import FluxTransformer2DModel

    heads = full_or(8, 1)
    folder = lab.folder / "wide-flux"
    import shutil

    shutil.copytree(lab.checkpoints["FluxKontext"], folder)
    shutil.rmtree(folder / "transformer")
    FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=64, num_attention_heads=heads,
        joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(16, 24, 24),
    ).save_pretrained(folder / "transformer")  # fmt: skip
    config = lab.config(
        "timed",
        model={"pretrained_model_name_or_path": str(folder), "lora": None},
        train={"max_train_steps": full_or(61, 13), "checkpointing_steps": full_or(20, 4)},
    )
    said = lab.run(config, sabotage="time_saving:x").said()
    times = {name: [float(value) for value in re.findall(rf"{name} took ([\d.]+) s", said)] for name in
             ("copying", "writing", "blocking", "waiting")}  # fmt: skip
    # The last save of a run waits for its own file; the others only for a previous one that is not finished.
    blocking, copying = times["blocking"][:-1], times["copying"][:-1]
    assert len(blocking) == 3 and len(times["writing"]) == 4
    size = sum(
        path.stat().st_size for path in checkpoints(versions(config)[0])[full_or(61, 13)].rglob("*") if path.is_file()
    )
    note = (
        f"{size / 1e6:.0f} MB: the loop stood still for {1e3 * sorted(blocking)[1]:.1f} ms, of which copying took "
        f"{1e3 * sorted(copying)[1]:.1f} ms; writing took {1e3 * sorted(times['writing'])[1]:.0f} ms in the background"
    )
    record("a checkpoint holds the loop up for its copy", 3, [], note + " (medians)")
