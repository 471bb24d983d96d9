"""Which families a test has to go through.

The loop, processes, validation and prediction see a family through its interface alone. What is a family's own
(conditioning, pictures, LoRA files, cache) is tested for every family; what a room does with it is tested for those
that are unlike, or for two. EVERY_FAMILY=1 tests all.
"""

from __future__ import annotations

import os

from qwen_image_finetune.families import FAMILIES, get_family

# With the family it is like there: references that the text encoder sees and two passes for guidance, or references
# that it does not see, behind a prompt of one length.
KIN = {
    "JoyImageEdit": "QwenImage21",
    "LongCatImageEdit": "QwenImageEdit",
    "Flux2": "Flux2Klein",
    "Flux3Klein": "Flux2Klein",
}

# A family that draws from words alone has weights and code of one that edits (families/test_words_alone.py), which is
# trained without references too: of those two, what differs is tested with the first, all else with the second.
EDITING = sorted(name for name in FAMILIES if get_family(name).max_references)
WORDS_ALONE = sorted(FAMILIES.keys() - set(EDITING))

assert KIN.keys() <= set(EDITING) and set(KIN.values()) <= set(EDITING) - KIN.keys()

EVERY = bool(os.environ.get("EVERY_FAMILY"))
UNLIKE = EDITING if EVERY else sorted(set(EDITING) - KIN.keys())

# For what no family has a line of its own in: two that differ in everything, and the one of families/test_made_up.py.
TWO = EDITING if EVERY else [name for name in ("FluxKontext", "QwenImageEdit", "MadeUp") if name in FAMILIES]
