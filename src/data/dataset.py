"""`src.data.dataset`: the import path that configurations name for the data set class."""

from qwen_image_finetune.data.dataset import ImageDataset

__all__ = ["ImageDataset"]
