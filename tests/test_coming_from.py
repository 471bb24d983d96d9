"""The page for people who come from another trainer names keys, values and verbs that exist here."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from qwen_image_finetune.command.cli import VERBS
from qwen_image_finetune.config import Config
from qwen_image_finetune.config.words import known_keys

PAGE = (Path(__file__).parent.parent / "docs/coming-from.md").read_text()


def test_keys_and_verbs_exist() -> None:
    ours = "\n".join(line.split("|")[2] for line in PAGE.splitlines() if line.startswith("| `") or line.count("|") == 3)
    words = re.findall(r"`([^`]+)`", ours)
    keys = {key for word in words for key in re.findall(r"^[a-z]\w*(?:\.\w+)+(?=$|[:=])", word)}
    known = {*known_keys(), "optimizer.init_args.lr", "metadata.jsonl"}
    assert len(keys) > 25 and keys - known == set()
    verbs = {word.split()[1] for word in words if word.startswith("qif ")}
    assert {"train", "cache", "studio", "export"} <= verbs <= {verb.__name__ for verb in VERBS}


def test_values_are_taken() -> None:
    assigned = re.findall(r"`([a-z]\w*(?:\.\w+)+): ([^`]+)`", PAGE)
    assert len(assigned) >= 15
    for key, text in assigned:
        tree: object = yaml.safe_load(text)
        for part in reversed(key.split(".")):
            tree = {part: tree}
        assert isinstance(tree, dict)
        tree.setdefault("model", {})["pretrained_model_name_or_path"] = "owner/name"
        tree.setdefault("train", {}).setdefault("gradient_checkpointing", True)  # as the page says where it is needed
        if key.startswith("loss."):
            tree["data"] = {"init_args": {"use_edit_mask": True}}
        Config.model_validate(tree)
