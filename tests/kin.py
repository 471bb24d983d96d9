"""Families that the loop, processes, validation and prediction meet as they meet another one.

Those rooms see a family through its interface alone. What is a family's own (conditioning, pictures, LoRA files, cache)
is tested for every family; what a room does with it is tested for those that are unlike. EVERY_FAMILY=1 tests all.
"""

from __future__ import annotations

import os

from qwen_image_finetune.families import FAMILIES

# With the family it is like there: one reference that the text encoder sees, and two passes for guidance.
KIN = {"LongCatImageEdit": "QwenImageEdit"}

assert KIN.keys() <= FAMILIES.keys() and set(KIN.values()) <= FAMILIES.keys() - KIN.keys()

UNLIKE = sorted(FAMILIES if os.environ.get("EVERY_FAMILY") else FAMILIES.keys() - KIN.keys())
