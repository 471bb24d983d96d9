"""The families that a test goes through."""

from qwen_image_finetune.families import FAMILIES

EVERY = sorted(FAMILIES)

# For what no family has a line of its own in: two that differ in everything stand for all, and the one of test_made_up.
TWO = [name for name in ("FluxKontext", "QwenImageEdit", "MadeUp") if name in FAMILIES]
