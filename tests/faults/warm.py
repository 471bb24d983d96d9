"""Imported once by the server that forks the runs: everything a run imports or builds once, so that none need do it."""

import os
from pathlib import Path

import bitsandbytes  # noqa: F401
import diffusers.guiders  # noqa: F401
import peft.tuners.lora.bnb  # noqa: F401
import prodigyopt  # noqa: F401
import torch
import torch.utils.tensorboard  # noqa: F401
from diffusers import optimization  # noqa: F401
from PIL import Image
from tensorboard.compat.proto import summary_pb2  # noqa: F401
from torchvision.transforms.v2 import functional  # noqa: F401

import qwen_image_finetune.preparation
import qwen_image_finetune.train
import sabotages  # noqa: F401
from qwen_image_finetune import loading
from qwen_image_finetune.families import get_family

torch.set_num_threads(1)
Image.init()
# transformers compiles a thousand patterns when the first model loads. Nothing is run here: no threads, no state.
for name, folder in (pair.split("=", 1) for pair in os.environ["QIF_LAB_CHECKPOINTS"].split(os.pathsep)):
    loading.load_encoders(get_family(name), Path(folder), torch.float32, {"default": "cpu"})
