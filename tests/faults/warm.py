"""Imported once by the server that forks the runs: everything a run imports or builds once, so that none need do it."""

import gc
import importlib
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from qwen_image_finetune import loading
from qwen_image_finetune.families import get_family
from qwen_image_finetune.judging import metrics

for module in (
    "bitsandbytes", "diffusers.guiders", "diffusers.optimization", "peft.tuners.lora.bnb", "prodigyopt", "sabotages",
    "tensorboard.compat.proto.summary_pb2", "torch.utils.tensorboard", "torchvision.transforms.v2.functional",
    "qwen_image_finetune.training.job", "qwen_image_finetune.training.train",
):  # fmt: skip
    importlib.import_module(module)
torch.set_num_threads(1)
Image.init()
# Measured once, samples have brought in what skimage and scipy import when it is first needed.
truth, drawn, source = np.random.default_rng(0).random((3, 32, 32, 3))
metrics.measure(drawn, truth, source)
# transformers compiles a thousand patterns when the first model loads. Nothing is run here: no threads, no state.
for name, folder in (pair.split("=", 1) for pair in os.environ["QIF_LAB_CHECKPOINTS"].split(os.pathsep)):
    loading.load_encoders(get_family(name), Path(folder), torch.float32, {"default": "cpu"})
# Else the collector of each child goes through all of this, and every page that it touches is copied: half of a run.
gc.collect()
gc.freeze()
