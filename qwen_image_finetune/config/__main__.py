"""`python -m qwen_image_finetune.config` prints the reference of the configuration."""

import sys

from qwen_image_finetune.config.reference import reference

sys.stdout.write(reference())
