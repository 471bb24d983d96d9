"""A family is one file and one line: what iterates the registry passes on one the package has never heard of."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_image_finetune.config import Config, ConfigError
from qwen_image_finetune.families import FAMILIES

ROOT = Path(__file__).parents[2]
REGISTERED = "MadeUp" in FAMILIES  # in the processes that the first test starts

# What a family decides, and where it is tested. The registry of the other process has one more line.
JOURNEY = (
    "families/test_conditioning.py", "families/test_lora_pictures.py", "levers/test_timestep.py",
    "training/test_train.py",
    "training/test_data_parallel_wrap.py::test_equals_backward_passes",
    "test_contract.py::test_training_starts_from_a_lora_of_any_dialect",
    "judging/test_evaluate.py::test_a_sweep_over_checkpoints_and_strengths",
    "encoding/test_cache.py::test_only_what_decides_an_embedding_misses",
    "drawing/test_predict.py::test_guidance_scale_is_obeyed", "families/test_made_up.py",
)  # fmt: skip


@pytest.mark.skipif(REGISTERED, reason="it is the process that this test starts")
@pytest.mark.timeout(1200)
def test_the_registrys_tests_pass(warm: Path) -> None:
    places = [f"tests/{place}" for place in JOURNEY]
    # Learning one pair by heart says nothing of a family that its resumed runs do not.
    chosen = ["-p", "tests.families.made_up", "-k", "(MadeUp or made_up) and not overfitted", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [warm / "python", "-m", "pytest", *chosen, "-p", "no:xdist", *places]
    run = subprocess.run(
        command, cwd=ROOT, env={**environment, "WARM": str(warm)}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
    assert " 0 passed" not in run.stdout and "passed" in run.stdout


registered = pytest.mark.skipif(not REGISTERED, reason="runs in the process of the first test")


@registered
def test_made_up_is_planned(configure: Callable[..., Config]) -> None:
    from qwen_image_finetune.fitting.plan_words import describe

    said = describe(configure("MadeUp", "train.mixed_precision=bf16"), "24GB")
    assert "MadeUp" in said
    assert "fits" in said


@registered
def test_made_up_is_benched() -> None:
    from qwen_image_finetune.fitting.bench import BASELINE, Options, run

    chosen = ("fp8-swapped", "attention")  # neither is compiled
    rows = run(Options("MadeUp", chosen, tiny=True, steps=1, rounds=1, rank=4), lambda line: None)
    assert [row["variant"] for row in rows] == [BASELINE, *chosen]
    assert all(0.5 < row["loss"] < 5 for row in rows)


@registered
def test_made_up_is_checked(configure: Callable[..., Config]) -> None:
    from qwen_image_finetune.training.check import check_run

    check_run(configure("MadeUp"))
    with pytest.raises(ConfigError, match=r"'to_qq' matches no linear layer \(did you mean .*to_q"):
        check_run(configure("MadeUp", "model.lora.target_modules=[to_qq]"))


@registered
def test_made_up_is_shared_by_two_processes(configure: Callable[..., Config], warm: Path, tmp_path: Path) -> None:
    """FSDP2 learns what the whole model learns; the processes are those of tests/distributed."""
    from qwen_image_finetune.disk.history import read_metrics
    from qwen_image_finetune.training.train import train

    options = ["train.max_train_steps=3", "optimizer.class_path=torch.optim.SGD", "optimizer.init_args={lr: 0.1}"]
    whole = train(configure("MadeUp", *options, "train.gradient_accumulation_steps=2"))
    assert whole is not None
    tasks = tmp_path / "tasks.json"
    job = {"config": str(tmp_path / "config.yaml"), "overrides": [*options, "logging.tracker_project_name=shared"]}
    tasks.write_text(json.dumps([{**job, "shared": True, "family": "tests.families.made_up"}]))
    command = [warm / "torchrun", "--standalone", "--nproc_per_node", "2", "tests/distributed/runs.py", str(tasks)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    shared = Path(json.loads((tmp_path / "tasks.0.json").read_text())[0]["run"])
    losses = [[line["loss"] for line in read_metrics(version)] for version in (shared, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
