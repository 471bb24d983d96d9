"""The demo in short: a LoRA of a toy base draws masks of faces it has never seen, and the base alone does not."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_image_finetune.config import load_config
from qwen_image_finetune.toy.measure import foreground_iou
from qwen_image_finetune.training.train import train

ROOT = Path(__file__).parents[2]
HELD_OUT = ROOT / "data/face_seg_held_out"
PROMPT = "draw the segmentation mask of this face"
FACES = 8
STEPS = 100  # `make demo` takes 800, from 16 variations


@pytest.mark.parametrize("name", ["flux_kontext", "qwen_image_edit"])
def test_a_lora_from_twenty_pairs_segments_faces_nobody_trained_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import draw_many

    overrides = [f"train.max_train_steps={STEPS}", f"cache.cache_dir={tmp_path / 'cache'}", "cache.num_variations=4",
                 f"logging.output_dir={tmp_path / 'output'}", "logging.report_to=none",
                 "validation.enabled=false"]  # fmt: skip
    config = load_config(ROOT / f"configs/demo_{name}.yaml", overrides)
    version = train(config)
    assert version is not None

    base = ROOT / config.model.pretrained_model_name_or_path
    predictor = draw_many.open_base(config.train.trainer, base, 64)
    files = sorted((HELD_OUT / "control_images").glob("*.jpg"))[:FACES]
    faces = [Image.open(file).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS) for file in files]
    masks = [Image.open(HELD_OUT / "training_images" / f"{file.stem}.png").convert("RGB") for file in files]
    masks = [mask.resize((64, 64), Image.Resampling.NEAREST) for mask in masks]

    def score(draw: Callable[..., list[Image.Image]]) -> float:
        drawn = draw(predictor, [(face, PROMPT) for face in faces], 8)
        return float(np.mean([foreground_iou(*pair) for pair in zip(drawn, masks, strict=True)]))

    before = score(draw_many.draw)
    draw_many.add_lora(predictor, next(version.glob("checkpoint-*")) / "pytorch_lora_weights.safetensors")
    after = score(draw_many.draw)
    assert before < 0.3
    assert after > 0.7, after  # 0.80 and 0.83 were seen
