"""Door for `python -m src.main --config C [--cache] [--dry-run] [section.key=value ...]`."""

import sys
from pathlib import Path

from qwen_image_finetune.command.arguments import Parser
from qwen_image_finetune.command.cli import guarded, parse
from qwen_image_finetune.command.running import run_training


def main() -> int:
    """The guide's way to start a run; the package's own command is `qif`."""
    parser = Parser("src.main", description="Train, or with --cache compute the embeddings.")
    parser.add_argument("--config", type=Path, required=True, help="the configuration, a YAML file")
    parser.add_argument("--cache", action="store_true", help="compute the embeddings and stop")
    parser.add_argument("--dry-run", action="store_true", help="say what would be loaded, trained and written")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="instead of what the file says")
    options = parse(parser)
    return guarded(lambda o: run_training(o.config, o.overrides, o.dry_run, o.cache), options)


if __name__ == "__main__":
    sys.exit(main())
