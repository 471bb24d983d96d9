"""`qif check`: every picture, every problem, and no model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_image_finetune.command.saying import loading, read_config, tell


def check(config_file: Path, overrides: Sequence[str], maps: Path | None) -> dict[str, Any]:
    """Check configuration and data, and print what was found; returns it as `--json` says it.

    Args:
        maps: folder for maps of where pairs differ, with loss.mask_loss=difference.

    Raises:
        ConfigError: with all problems.
    """
    config = read_config(config_file, overrides)
    loading()
    from qwen_image_finetune.config import resolve_family
    from qwen_image_finetune.data.images import DataError
    from qwen_image_finetune.encoding.pairs import check_all_prompts, open_pairs
    from qwen_image_finetune.families import get_family
    from qwen_image_finetune.training.check import model_notes, refusal, run_problems

    tell(model_notes(config))
    problems = run_problems(config)
    family = get_family(resolve_family(config)[0])
    try:
        pairs = open_pairs(config, family, decode=True)
        if not problems:  # among them would be a checkpoint without tokenizers
            check_all_prompts(config, family, pairs)
    except DataError as error:
        more = [line for line in error.problems if not any(line in said for said in problems)]
        raise refusal([*problems, *more]) from error
    beside = "" if pairs.held_out is None else f" to train on, {len(pairs.held_out)} to validate on"
    print(f"{len(pairs.training)} pairs{beside}, all readable")
    left_out = pairs.training.left_out
    for row in left_out:
        print(f"left out: {row}")
    if config.loss.mask_loss == "difference":
        from qwen_image_finetune.data.difference import show_maps

        print(show_maps(pairs.training, maps))
    if problems:
        raise refusal(problems)
    held_out = 0 if pairs.held_out is None else len(pairs.held_out)
    found = {"family": family.name, "pairs": len(pairs.training), "held_out": held_out, "problems": []}
    return found | ({"left_out": [str(row) for row in left_out]} if left_out else {})
