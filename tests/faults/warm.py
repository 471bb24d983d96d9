"""Imported once by the server that forks the runs: everything a run imports, so that its children need not."""

import bitsandbytes  # noqa: F401
import prodigyopt  # noqa: F401
import torch
import torch.utils.tensorboard  # noqa: F401
from diffusers import optimization  # noqa: F401
from tensorboard.compat.proto import summary_pb2  # noqa: F401
from torchvision.transforms.v2 import functional  # noqa: F401

import qwen_image_finetune.preparation
import qwen_image_finetune.train
import sabotages  # noqa: F401
from qwen_image_finetune.families import FAMILIES, get_family

torch.set_num_threads(1)
for _name in FAMILIES:
    _family = get_family(_name)
    _ = (_family.pipeline, _family.transformer)
