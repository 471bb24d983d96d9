"""Door for launchers that start a module: `torchrun -m qwen_image_finetune.cli` is the command `qif`."""

import sys

from qwen_image_finetune.command.cli import main

if __name__ == "__main__":
    sys.exit(main())
