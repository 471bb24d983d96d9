"""Settings that the training guide shows: each loads on top of a small base and arrives where it belongs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from qwen_image_finetune.config import Config, ConfigError, load_config
from qwen_image_finetune.config.tree import find

KONTEXT = "black-forest-labs/FLUX.1-Kontext-dev"
BASE = "model: {pretrained_model_name_or_path: Qwen/Qwen-Image-Edit}\ncache: {use_cache: true, cache_dir: stored}\n"

BASIC = """
model:
  pretrained_model_name_or_path: "MODEL"
  quantize: false  # a comment
  lora:
    r: 16
    lora_alpha: 32
    init_lora_weights: true
    target_modules: ["to_q", "to_v", "to_k", "to_out.0"]

data:
  class_path: "src.data.dataset.ImageDataset"
  init_args:
    dataset_path: "data/face_seg"
    batch_size: 2
    caption_dropout_rate: 0.1
    prompt_image_dropout_rate: 0.1

train:
  num_epochs: 10
  gradient_accumulation_steps: 4
  gradient_checkpointing: true
  mixed_precision: "bf16"
  max_grad_norm: 1.0
  max_train_steps: 1000
  checkpointing_steps: 500
  checkpoints_total_limit: 3

optimizer:
  class_path: "torch.optim.AdamW"
  init_args:
    lr: 1e-4
    betas: [0.9, 0.999]
    weight_decay: 0.01
    eps: 1e-8

lr_scheduler:
  scheduler_type: "cosine"
  warmup_steps: 100

cache:
  use_cache: true
  cache_dir: "cache/face_seg"
  vae_encoder_device: "cuda:1"
  text_encoder_device: "cuda:2"

logging:
  output_dir: "output/face_seg_training"
  logging_dir: "logs"
  report_to: "tensorboard"
  tracker_project_name: "qwen_image_finetune"
"""

# (what is written, what arrives)
SNIPPETS: dict[str, tuple[str, dict[str, Any]]] = {
    "runtime fp8": (
        "model: {quantize: true, lora: {r: 16, lora_alpha: 32}}\n"
        "train: {gradient_checkpointing: true, mixed_precision: 'bf16'}\n"
        "data:\n  init_args:\n    batch_size: 4",
        {"model.quantize": True, "data.batch_size": 4, "train.gradient_checkpointing": True},
    ),
    "several GPUs": (
        "cache: {vae_encoder_device: 'cuda:1', text_encoder_device: 'cuda:2'}\n"
        "predict: {devices: {vae: 'cuda:0', text_encoder: 'cuda:1', transformer: 'cuda:2'}}\n"
        "train: {gradient_accumulation_steps: 2}",
        {"predict.devices.transformer": "cuda:2", "predict.devices.text_encoder_2": None},
    ),
    "Kontext, 16 bits": (
        f"model:\n  pretrained_model_name_or_path: {KONTEXT}\n  rank: 16\n  quantize: false\n"
        "  lora: {r: 16, lora_alpha: 16, init_lora_weights: gaussian, adapter_name: lora_edit,\n"
        "         target_modules: [to_k, to_q, to_v, to_out.0]}\n"
        "train: {trainer: FluxKontext, low_memory: true}\n"
        "cache: {vae_encoder_device: cuda:1, text_encoder_device: cuda:1, text_encoder_2_device: cuda:1}",
        {
            "model.lora.adapter_name": "lora_edit",
            "train.trainer": "FluxKontext",
            "cache.text_encoder_2_device": "cuda:1",
        },
    ),
    "Kontext, fp8": (
        "model: {pretrained_model_name_or_path: camenduru/flux1-kontext-dev_fp8_e4m3fn_diffusers, rank: 16}",
        {"model.lora.r": 16},
    ),
    "Kontext, fp4": (
        "model: {pretrained_model_name_or_path: eramth/flux-kontext-4bit-fp4, quantize: false}",
        {"model.quantize": False},
    ),
    "data of Kontext": (
        "data:\n  class_path: 'src.data.dataset.ImageDataset'\n  init_args:\n    dataset_path: data/your_flux_dataset\n"
        "    image_size: [1024, 1024]\n    caption_dropout_rate: 0.05\n    prompt_image_dropout_rate: 0.05\n"
        "    cache_dir: ${cache.cache_dir}\n    use_cache: ${cache.use_cache}\n  batch_size: 1",
        {"data.init_args.image_size": [1024, 1024], "cache.use_cache": True, "cache.cache_dir": "stored"},
    ),
    "encoders on cards of their own": (
        "train: {low_memory: true, vae_encoder_device: cuda:1, text_encoder_device: cuda:1}\n"
        "predict: {devices: {vae: cuda:1, text_encoder: cuda:1, text_encoder_2: cuda:1, transformer: cuda:1}}",
        {"train.vae_encoder_device": "cuda:1"},
    ),
    "a checkpoint to resume from": (
        "train: {resume_from_checkpoint: '/path/to/checkpoint-5-500'}",
        {"train.resume_from_checkpoint": "/path/to/checkpoint-5-500"},
    ),
    "a LoRA to start from": (
        "model: {lora: {r: 16, lora_alpha: 32, pretrained_weight: /path/to/pytorch_lora_weights.safetensors}}",
        {"model.lora.pretrained_weight": "/path/to/pytorch_lora_weights.safetensors"},
    ),
    "data loading": (
        "data: {init_args: {num_workers: 4, prefetch_factor: 2, persistent_workers: true}}",
        {"data.num_workers": 4, "data.prefetch_factor": 2, "data.persistent_workers": True},
    ),
    "8-bit Adam": (
        "optimizer: {class_path: bitsandbytes.optim.Adam8bit, init_args: {lr: 0.0001, betas: [0.9, 0.999]}}",
        {"optimizer.init_args": {"lr": 0.0001, "betas": [0.9, 0.999]}},
    ),
    "Prodigy": (
        "optimizer:\n  class_path: prodigyopt.Prodigy\n"
        "  init_args: {lr: 1.0, betas: [0.9, 0.999], use_bias_correction: true, safeguard_warmup: true}",
        {"optimizer.init_args.safeguard_warmup": True},
    ),
    "SGD": (
        "optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.01, momentum: 0.9, weight_decay: 1e-4}}",
        {"optimizer.init_args.weight_decay": 0.0001},
    ),
}


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_loads_and_arrives(tmp_path: Path, snippet: str) -> None:
    text, expected = SNIPPETS[snippet]
    merged = OmegaConf.merge(OmegaConf.load(io.StringIO(BASE)), OmegaConf.load(io.StringIO(text)))
    (tmp_path / "run.yaml").write_text(OmegaConf.to_yaml(merged))
    values = load_config(tmp_path / "run.yaml").model_dump()
    assert {key: find(values, key) for key in expected} == expected


def test_basic_configuration_as_typed(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(BASIC.replace("MODEL", "Qwen/Qwen-Image-Edit"))
    config = load_config(path)
    assert config.notes == ()
    assert config.optimizer.init_args == {"lr": 1e-4, "betas": [0.9, 0.999], "weight_decay": 0.01, "eps": 1e-8}
    assert (config.data.batch_size, config.max_steps, config.lr_scheduler.warmup_steps) == (2, 1000, 100)
    assert config.logging.project_dir == Path("output/face_seg_training/qwen_image_finetune")
    assert isinstance(config, Config)


def test_basic_configuration_names_a_language_model(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(BASIC.replace("MODEL", "Qwen/Qwen2-VL-7B-Instruct"))
    with pytest.raises(ConfigError, match=r"is a language model.*Qwen/Qwen-Image-Edit"):
        load_config(tmp_path / "run.yaml")


def test_older_keys_found_in_the_wild(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        BASE + "resume_from_checkpoint: latest\n"
        "data: {cache_drop_rate: 0.2, init_args: {dataset_path: [a, b], use_edit_mask: true, random_crop: true,\n"
        "       crop_size: [64, 32], crop_scale: [0.5, 1.0]}}\n"
        "loss: {mask_loss: true, forground_weight: 3, background_weight: 0}\n"
        "validation: {enabled: true, validation_steps: 7, num_validation_samples: 2}\n"
    )
    config = load_config(tmp_path / "run.yaml")
    assert config.train.resume_from_checkpoint == "latest"
    assert config.data.init_args.caption_dropout_rate == 0.2
    assert config.data.init_args.folders == (Path("a"), Path("b"))
    assert config.data.init_args.crop_size == [64, 32]
    assert (config.loss.foreground_weight, config.loss.background_weight) == (3, 0)
    assert config.validation.steps == 7
