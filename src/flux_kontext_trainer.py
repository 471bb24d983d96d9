"""Door to the FLUX Kontext trainer."""

from qwen_image_finetune.trainer import FluxKontextLoraTrainer

__all__ = ["FluxKontextLoraTrainer"]
