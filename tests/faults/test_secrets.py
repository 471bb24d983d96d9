"""Tokens in the environment, in runs that end well and badly."""

from __future__ import annotations

import pytest
from lab import FAMILIES, Lab, full_or, record

NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "SWANLAB_API_KEY", "AWS_SECRET_ACCESS_KEY",
         "OPENAI_API_KEY", "MY_PASSWORD", "DATABASE_URL")  # fmt: skip


@pytest.mark.timeout(900)
def test_secrets_are_written_nowhere(lab: Lab) -> None:
    environment = {name: f"canary-{number}-of-{name.lower()}" for number, name in enumerate(NAMES)}
    drawing = {"enabled": True, "steps": 2, "num_validation_samples": 1, "num_inference_steps": 1}
    endings = {
        "finished": ([], None, 0),
        "refused": (["optimizer.class_path=os.system"], None, 2),
        "out of memory": ([], "no_memory:cuda,qwen_image_finetune.flow:loss,2", 2),
        "crashed": ([], "no_model:x", 1),
        "not finite": ([], "not_finite:loss,nan,1,1000", 2),
    }
    lost, tried = [], 0
    for family in FAMILIES[: full_or(2, 1)]:
        for name, (overrides, sabotage, code) in endings.items():
            config = lab.config(
                f"secret-{family}-{name}", family, own_cache=True, logging={"report_to": "tensorboard"},
                validation=drawing, train={"max_train_steps": 4},
            )  # fmt: skip
            lab.run(config, *overrides, sabotage=sabotage, environment=environment, expect=code)
            tried += 1
            for path in (path for path in config.parent.rglob("*") if path.is_file()):
                content = path.read_bytes()
                lost += [(path, value) for value in environment.values() if value.encode() in content]
    record("secrets in the environment", tried, lost, f"{len(NAMES)} canaries in every file and log")
