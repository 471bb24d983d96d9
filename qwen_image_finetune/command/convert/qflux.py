"""qflux: the later style of the framework that this configuration comes from. Most keys are ours; some moved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_image_finetune.command.convert.ledger import Ledger
from qwen_image_finetune.command.convert.pairs import Folder, Pair, beside, named, pictures, readable, some
from qwen_image_finetune.config.words import known_keys
from qwen_image_finetune.data.sources import REFERENCES, TARGETS

TARGET_FOLDERS = (TARGETS, "images", "target_images", "target", "targets")
REFERENCE_FOLDERS = (REFERENCES, "control", "condition_images", "controls")
MOVED = {
    "trainer": "train.trainer", "resume": "train.resume_from_checkpoint", "train.train_batch_size": "data.batch_size",
    "model.pretrained_model_path": "model.pretrained_model_name_or_path", "loss.forground_weight":
    "loss.foreground_weight", "validation.validation_steps": "validation.steps", "validation.max_samples":
    "validation.num_validation_samples", "logging.sampling.enable": "validation.enabled",
    "logging.sampling.validation_steps": "validation.steps", "logging.sampling.num_samples":
    "validation.num_validation_samples", "logging.sampling.seed": "validation.seed",
    "predict.devices.dit": "predict.devices.transformer", "cache.devices.vae": "cache.vae_encoder_device",
    "train.fit_device.vae_encoder": "train.vae_encoder_device", "train.fit_device.vae": "train.vae_encoder_device",
    "data.init_args.cache_dir": "cache.cache_dir", "data.init_args.use_cache": "cache.use_cache",
    "data.init_args.cache_drop_rate": "data.init_args.caption_dropout_rate",
    "data.init_args.prompt_empty_drop_keys": "cache.prompt_empty_drop_keys", "validation.max_steps": "validation.steps",
    "data.dataset_path": "data.init_args.dataset_path",
    **{f"{place}.{name}": f"{ours}.{name}_device" for place, ours in (("cache.devices", "cache"),
       ("train.fit_device", "train")) for name in ("vae_encoder", "text_encoder", "text_encoder_2")},
}  # fmt: skip
LOST = {
    "model.pretrained_embeddings": "every part comes from the checkpoint", "logging.tags": "", "logging.notes": "",
    "model.use_vlm_prompt_enhancer": "prompts are read as they are", "mode": "qif train, qif cache and qif predict",
    "loss.class_path": "see loss.type", "loss.init_args": "see loss.type",
    "data.init_args.selected_control_indexes": "all references of a pair are shown",
    "cache.devices.dit": "the transformer takes no part in it", "predict.devices.prompt_enhancer": "",
}  # fmt: skip
PROCESSOR = "data.init_args.processor."


def read(tree: Mapping[str, Any], file: Path) -> tuple[Ledger, list[Folder]]:
    """The ledger and the data sets of a configuration, whose references to other keys are resolved."""
    ledger = Ledger(tree)
    ledger.is_so("data.class_path", "the data set is ours")
    folders = _folders(ledger, tree)
    _sizes(ledger)
    _empties(ledger)
    samples = ((tree.get("logging") or {}).get("sampling") or {}).get("validation_data")
    _samples(ledger, samples, (tree.get("validation") or {}).get("samples"))
    for key in ledger.below(""):
        value = ledger.get(key)
        if value is None:
            continue
        if key in MOVED and MOVED[key] not in ledger.values:
            ledger.becomes(key, {MOVED[key]: value})
        elif key in MOVED:
            ledger.is_so(key, f"{MOVED[key]} has a value already")
        elif key in known_keys() or key.startswith("optimizer.init_args."):
            ledger.becomes(key, {key: _plain(key, value)})
    for name, usual in (("gradient_accumulation_steps", 4), ("num_epochs", 3), ("max_train_steps", 1000),
                        ("gradient_checkpointing", True)):  # fmt: skip
        if name not in (tree.get("train") or {}):
            ledger.default(f"train.{name}", usual, {f"train.{name}": usual})
    ledger.table("", LOST)
    return ledger, folders


def _plain(key: str, value: Any) -> Any:
    if key == "model.lora.init_lora_weights":
        return {"normal": "gaussian", "zero": True}.get(value, value)
    return value.rstrip("/") if key == "logging.tracker_project_name" else value


def _empties(ledger: Ledger) -> None:
    """Names of text embeddings, which had several spellings."""
    key = "cache.prompt_empty_drop_keys"
    if key in ledger:
        names = [str(name).removeprefix("empty_") for name in ledger.get(key)]
        plural = {"prompt_embed": "prompt_embeds", "pooled_prompt_embed": "pooled_prompt_embeds"}
        ledger.becomes(key, {key: [plural.get(name, name) for name in names]})


def _sizes(ledger: Ledger) -> None:
    at = f"{PROCESSOR}init_args."
    kind = ledger.get(f"{at}process_type", "center_crop")
    several = ledger.get(f"{at}multi_resolutions", ledger.get(f"{at}multi_resolutions.target"))
    for name in ("multi_resolutions", "multi_resolutions.target"):
        sides = [round(_pixels(each) ** 0.5) for each in (several or [])]
        ledger.becomes(at + name, {"data.init_args.resolution": sides if len(sides) > 1 else (sides or [512])[0]})
    if several is None and f"{at}target_pixels" in ledger:
        side = round(_pixels(ledger.get(f"{at}target_pixels")) ** 0.5)
        ledger.becomes(f"{at}target_pixels", {"data.init_args.resolution": side})
    size = ledger.get(f"{at}target_size")
    if kind in ("center_crop", "resize") and size and several is None:
        ledger.becomes(f"{at}target_size", {"data.init_args.image_size": list(size)})
    words = {
        "process_type": "scaled to cover the size, the overhang cropped" if kind == "center_crop" else
        "scaled to cover the size, where theirs was stretched or padded", "resize_mode":
        "the resize of the model's pipeline",
        "controls_size": "the first reference has the size of the target, others their own shape",
        "controls_pixels": "references have the area of the target", "max_aspect_ratio": "no limit but the model's",
        "target_size": "the number of pixels counts", "target_pixels": "target_size counts",
        "resize_controls_mask_to_image": "references keep their own shape",
        "multi_resolutions.controls": "references have the area of the target",
    }  # fmt: skip
    ledger.table(at, words, lost=False)
    ledger.is_so(f"{PROCESSOR}class_path", "pictures are made by the model's own rule")


def _pixels(expression: Any) -> int:
    """A number of pixels, or WIDTH*HEIGHT."""
    first, _, second = str(expression).partition("*")
    return int(first) * int(second or 1)


def _samples(ledger: Ledger, pairs: Any, samples: Any) -> None:
    given = [*(pairs if isinstance(pairs, list) else []), *(samples or [])]
    ours = []
    for one in given:
        pictured = one.get("images", one.get("control", []))
        ours.append({"prompt": one.get("prompt", ""), "references": pictured})
    if isinstance(pairs, str):
        ledger.becomes("logging.sampling.validation_data", {"validation.dataset_path": pairs})
    for at in ("logging.sampling.validation_data[", "validation.samples["):
        for key in ledger.below(at):
            name = key.rpartition(".")[2]
            if name in ("prompt", "control") or ".images" in key:
                ledger.becomes(key, {"validation.samples": ours})
            else:
                ledger.lost(key, "samples differ in prompt, references and seed")


def _folders(ledger: Ledger, tree: Mapping[str, Any]) -> list[Folder]:
    key = "data.init_args.dataset_path"
    given = ((tree.get("data") or {}).get("init_args") or {}).get("dataset_path") or (tree.get("data") or {}).get(
        "dataset_path")  # fmt: skip
    entries = given if isinstance(given, list) else [given] if given else []
    found = []
    for place, entry in enumerate(entries):
        own = f"{key}[{place}]" if any(isinstance(each, dict) for each in entries) else key
        if isinstance(entry, dict):
            ours = {"path": f"hf://{entry.get('repo_id')}", "split": entry.get("split") or "train"}
            ledger.on_hub.append(ours)
            for part in ledger.below(own):
                ledger.is_so(part, f"in data.init_args.dataset_path: {ours['path']}")
        else:
            found.append(_folder(own, Path(str(entry)).expanduser()))
            ledger.is_so(own, f"{len(found[-1].pairs)} pairs, see below")
    return found


def _folder(key: str, root: Path) -> Folder:
    targets = next((root / name for name in TARGET_FOLDERS if (root / name).is_dir()), root / TARGETS)
    homes = next((root / name for name in REFERENCE_FOLDERS if (root / name).is_dir()), root / REFERENCES)
    pairs, without = list[Pair](), list[Path]()
    for target in pictures(targets, nested=False):
        if target.stem.endswith("_mask"):
            continue
        captions = [beside(target, ".txt"), homes / f"{target.stem}.txt"]
        caption = next((path for path in captions if path.is_file()), None)
        if caption is None:
            without.append(target)
            continue
        first, number, references = named(homes, target.stem), 1, []
        if first is not None:
            references = [first]
            while (more := named(homes, f"{target.stem}_control_{number}")) is not None:
                references.append(more)
                number += 1
        mask = named(targets, f"{target.stem}_mask") or named(homes, f"{target.stem}_mask")
        pairs.append(Pair(target, tuple(references), caption, mask))
    kept, other = readable(pairs)
    said = [f"left out: {some(without)} without a caption"] if without else []
    return Folder(key, kept, targets, [*said, *other])
