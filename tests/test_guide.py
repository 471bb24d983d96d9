"""The training guide, followed to the letter: its commands and its script, with paths that exist here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from qwen_image_finetune.config import Config
from src.main import main

ROOT = Path(__file__).parent.parent
CONFIGURATIONS = [
    "face_seg_fp4_4090",
    "face_seg_flux_kontext_fp16",
    "face_seg_flux_kontext_fp8",
    "face_seg_flux_kontext_fp4",
]
Configure = Callable[..., Config]


Shell = Callable[[str], str]


@pytest.fixture
def cache_folder(tmp_path: Path) -> Path:
    """Its own: what is encoded is looked at."""
    return tmp_path / "cache"


@pytest.fixture
def shell(warm: Path) -> Shell:
    """Runs a line of the guide in a shell whose python and accelerate have everything loaded."""
    paths = {"PATH": f"{warm}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}

    def run(command: str) -> str:
        done = subprocess.run(command, shell=True, cwd=ROOT, env={**os.environ, **paths}, capture_output=True,
                              text=True, check=False)  # fmt: skip
        assert done.returncode == 0, f"$ {command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


def test_the_example_dataset_is_complete(shell: Shell) -> None:
    said = shell(
        'echo "Control images: $(ls data/face_seg/control_images/*.jpg | wc -l)"\n'
        'echo "Target images: $(ls data/face_seg/training_images/*.png | wc -l)"\n'
        'echo "Text files: $(ls data/face_seg/training_images/*.txt | wc -l)"'
    )
    assert said.split("\n")[:3] == ["Control images: 20", "Target images: 20", "Text files: 20"]


@pytest.fixture
def my_config(configure: Configure, tmp_path: Path) -> Callable[[str], Path]:
    """A configuration as the guide writes them, of five steps."""

    def write(family: str) -> Path:
        configure(family)
        path = tmp_path / "config.yaml"
        values = yaml.safe_load(path.read_text())
        values["train"] |= {"trainer": family, "max_train_steps": 5, "checkpointing_steps": 5}
        values["logging"]["report_to"] = "tensorboard"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def test_cache_then_train_then_launch(shell: Shell, my_config: Callable[[str], Path], tmp_path: Path) -> None:
    config, project = my_config("QwenImageEdit"), tmp_path / "output" / "project"

    assert "encoding texts" in shell(f"python -m src.main --config {config} --cache")
    assert not project.exists(), "--cache trains nothing"

    said = shell(f"python -m src.main --config {config}")
    assert "complete" in said and "encoding" not in said
    assert shell(f"ls {project}/").split() == ["v0"]
    assert shell(f"ls {project}/v0/events.out.tfevents.*")
    assert shell(f"ls -d {project}/v*/checkpoint-*").split() == [f"{project}/v0/checkpoint-0-5"]

    # the version after it, and the same numbers: one process under the launcher is one process
    shell(f"accelerate launch --config_file accelerate_config.yaml -m src.main --config {config}")
    assert shell(f"ls {project}/").split() == ["v0", "v1"]
    first, second = (
        [json.loads(line)["loss"] for line in (project / version / "metrics.jsonl").read_text().splitlines()]
        for version in ("v0", "v1")
    )
    assert len(first) == 5 and first == second


def test_inference_example(shell: Shell, my_config: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    """The guide's script, verbatim but for its four paths."""
    config = my_config("FluxKontext")
    said = shell(f"accelerate launch --config_file accelerate_config.yaml -m src.main --config {config}")
    assert "encoding texts" in said, "without --cache before it, training encodes what is missing"
    weights = tmp_path / "output" / "project" / "v0" / "checkpoint-0-5"
    shutil.copy(pairs / "control_images" / "0.png", tmp_path / "input_image.png")
    (tmp_path / "example.py").write_text(f'''
# Inference with trained FLUX Kontext LoRA model
from src.flux_kontext_trainer import FluxKontextLoraTrainer
from src.data.config import load_config_from_yaml
from PIL import Image

# Load configuration
config = load_config_from_yaml("{config}")

# Initialize FLUX Kontext trainer
trainer = FluxKontextLoraTrainer(config)

# Load trained LoRA weights
trainer.load_lora("{weights}")

# Setup for inference
trainer.setup_predict()

# Load input image
input_image = Image.open("{tmp_path}/input_image.png")

# Generate with FLUX Kontext
result = trainer.predict(
    prompt_image=input_image,
    prompt="transform the image with your editing instruction",
    num_inference_steps=28,  # FLUX typically uses more steps
    guidance_scale=3.5       # FLUX guidance scale
)

# Save result
result[0].save("{tmp_path}/flux_output.png")
''')
    shell(f"PYTHONPATH=. python {tmp_path}/example.py")
    assert Image.open(tmp_path / "flux_output.png").size == (64, 64)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_copied_configuration_loads_and_says_what_it_would_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m src.main --config ... --dry-run`, in this process; the tests above start others."""
    shutil.copy(ROOT / f"configs/{name}.yaml", tmp_path / "my_config.yaml")
    monkeypatch.setattr(sys, "argv", ["src.main", "--config", str(tmp_path / "my_config.yaml"), "--dry-run"])
    assert main() == 0
    plan = capsys.readouterr().out.split("# plan")[1]
    assert ("FluxKontext" if "flux" in name else "QwenImageEdit") in plan
    assert "data/face_seg" in plan and "a LoRA of rank" in plan
