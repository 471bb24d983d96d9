"""Door to the Qwen-Image-Edit trainer."""

from qwen_image_finetune.trainer import QwenImageEditTrainer

__all__ = ["QwenImageEditTrainer"]
