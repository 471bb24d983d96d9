"""Door to `qwen_image_finetune.config`."""

from qwen_image_finetune.config import load_config as load_config_from_yaml

__all__ = ["load_config_from_yaml"]
