"""Older spellings and second homes of a key move to today's place before anything is validated."""

from __future__ import annotations

from typing import Any

from qwen_image_finetune.config.tree import ABSENT, find, put, remove, shown

CAPTION_DROPOUT = "data.init_args.caption_dropout_rate"

# Older names of text embeddings in cache.prompt_empty_drop_keys.
EMBEDDINGS = {"prompt_embed": "prompt_embeds", "pooled_prompt_embed": "pooled_prompt_embeds"}

# Older spellings and second homes of a key: (where configurations have it, where it lives). Today's place wins.
SPELLINGS: tuple[tuple[str, str], ...] = (
    ("model.rank", "model.lora.r"),
    ("resume_from_checkpoint", "train.resume_from_checkpoint"),
    *((f"data.init_args.{key}", f"data.{key}")
      for key in ("batch_size", "num_workers", "prefetch_factor", "persistent_workers", "shuffle")),
    *((f"data.{key}", f"data.init_args.{key}") for key in ("caption_dropout_rate", "prompt_image_dropout_rate")),
    *((f"data.{place}{key}", f"cache.{key}") for place in ("", "init_args.") for key in ("use_cache", "cache_dir")),
    ("data.init_args.cache_drop_rate", CAPTION_DROPOUT),
    ("data.cache_drop_rate", CAPTION_DROPOUT),
    ("validation.validation_steps", "validation.steps"),
    ("loss.forground_weight", "loss.foreground_weight"),
)  # fmt: skip


def canonicalise(tree: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Move every older spelling in `tree`, resolved and nested, to today's place, in place.

    Returns:
        notes about spellings that were overruled, and problems.
    """
    notes, problems = [], []
    for older, today in SPELLINGS:
        if (given := find(tree, older)) is ABSENT:
            continue
        remove(tree, older)
        current = find(tree, today)
        if current is not ABSENT:
            # In the files that have both, the rate of the cache is the one that a cached run was trained with.
            wins = older if today == CAPTION_DROPOUT and "cache_" in older and _is_cached(tree) else today
            if wins == older:
                put(tree, today, given)
            if current != given:
                notes.append(f"{older}={shown(given)} and {today}={shown(current)} disagree; {wins} wins")
        elif (obstacle := put(tree, today, given)) is not None:
            problems.append(
                f"{older}={shown(given)} contradicts {obstacle}={shown(find(tree, obstacle))}, which leaves no {today} "
                "to set: drop one of them"
            )
    return [*notes, *_read_older_values(tree)], problems


def _is_cached(tree: dict[str, Any]) -> bool:
    return find(tree, "cache.use_cache") is True


def _read_older_values(tree: dict[str, Any]) -> list[str]:
    """Read values that were written otherwise, embeddings in the singular, a project with a slash behind it; notes."""
    keys, project = find(tree, "cache.prompt_empty_drop_keys"), find(tree, "logging.tracker_project_name")
    if isinstance(keys, list):
        names = [EMBEDDINGS.get(name, name) if isinstance(name, str) else name for name in keys]
        put(tree, "cache.prompt_empty_drop_keys", names)
    if isinstance(project, str) and project.endswith("/") and (name := project.rstrip("/")):
        put(tree, "logging.tracker_project_name", name)
        return [f"logging.tracker_project_name={shown(project)} is read as {shown(name)}"]
    return []
