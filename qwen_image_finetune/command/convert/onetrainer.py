"""OneTrainer: one JSON file of a preset or a saved run, with its concepts in it or in a file that it names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_image_finetune.command.convert.ledger import ConvertError, Ledger
from qwen_image_finetune.command.convert.pairs import Folder, Pair, beside, pictures, readable, several_lines
from qwen_image_finetune.command.convert.terms import (
    ADAFACTOR,
    CACHED,
    NO_CLASS,
    RATE,
    SCHEDULES,
    base_format,
    found,
    optimizer,
    settle_adafactor,
    targets,
    without,
)

EDITING = {
    "FLUX_DEV_1": "black-forest-labs/FLUX.1-Kontext-dev",
    "FLUX_2": "black-forest-labs/FLUX.2-dev",
    "QWEN": "Qwen/Qwen-Image-Edit",
}
FROM_WORDS = ("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512", "black-forest-labs/FLUX.1-dev")  # and not from pictures
SAME = {
    "learning_rate": RATE, "batch_size": "data.batch_size", "epochs": "train.num_epochs",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps", "clip_grad_norm": "train.max_grad_norm",
    "lora_rank": "model.lora.r", "lora_alpha": "model.lora.lora_alpha", "dropout_probability":
    "model.lora.lora_dropout", "lora_decompose": "model.lora.use_dora", "lora_model_name":
    "model.lora.pretrained_weight", "latent_caching": CACHED, "cache_dir": "cache.cache_dir",
    "workspace_dir": "logging.output_dir", "compile": "train.compile", "dataloader_threads": "data.num_workers",
    "ema_decay": "train.ema.decay", "ema_update_step_interval": "train.ema.every",
    "huber_delta": "loss.huber_delta",
}  # fmt: skip
SO_HERE = {
    "model_type": "read from the checkpoint", "output_model_format": "LoRAs are .safetensors; qif export writes others",
    "weight_dtype": "weights are read as they are needed",
    "vae": "read in its own precision", "aspect_ratio_bucketing": "every picture keeps its shape",
    "train_device": "the first card that is seen; CUDA_VISIBLE_DEVICES chooses", "temp_device": "the CPU",
    "attention_mechanism": "attention is chosen by train.attention", "fallback_train_dtype": "train.mixed_precision",
    "backup_before_save": "every checkpoint can be resumed", "rolling_backup": "see train.checkpoints_total_limit",
    "concept_file_name": "its concepts are read", "tensorboard_port": "", "tensorboard_expose": "",
    "tensorboard_always_on": "", "__version": "", "clear_cache_before_training": "the cache is kept, by content",
    "debug_mode": "", "debug_dir": "", "enable_autocast_cache": "", "async_offloading": "",
    "quantization": "the layers that the format is for", "concepts": "", "noising_weight": "", "noising_bias": "",
    "lora_weight_dtype": "an adapter is trained in float32", "layer_filter_preset": "as layer_filter says",
    "layer_filter_regex": "as layer_filter says",
}  # fmt: skip
LOST = {
    "text_encoder": "encoders are never trained", "text_encoder_2": "encoders are never trained",
    "output_model_destination": "runs are in logging.output_dir", "sample_definition_file_name":
    "write them as validation.samples", "samples": "write them as validation.samples", "backup_after":
    "checkpoints are counted in steps: train.checkpointing_steps", "secrets":
    "secrets belong in the environment: HF_TOKEN", "cloud": "docs/clouds.md", "layer_filter":
    "all weights are trained", "output_dtype":
    "LoRAs are saved in the precision that they are trained in", "unmasked_probability":
    "the mask counts at every visit",
    "learning_rate_min_factor": "schedules end at 0", "scheduler_params": "see lr_scheduler", "text_encoder_3": "",
    "text_encoder_4": "", "prior": "", "decoder": "", "effnet_encoder": "", "unet": "", "optimizer_defaults": "",
    "embedding": "", "additional_embeddings": "",
}  # fmt: skip


def read(tree: Mapping[str, Any], file: Path) -> tuple[Ledger, list[Folder]]:
    """The ledger and the data sets of a configuration.

    Raises:
        ConvertError: a model or a way of training that is not here.
    """
    concepts = _concepts(tree, file)
    ledger = Ledger({**tree, "concepts": concepts})
    _model(ledger, tree, file)
    _transformer(ledger, tree)
    folders = _folders(ledger, concepts, bool(tree.get("masked_training")), bool(tree.get("custom_conditioning_image")))
    ledger.same("", SAME)
    for name, value, ours in (("lora_alpha", 1.0, "model.lora.lora_alpha"), ("epochs", 100, "train.num_epochs"),
                              ("learning_rate", 3e-6, RATE)):  # fmt: skip
        if not (ours.startswith("model.lora.") and tree.get("training_method") == "FINE_TUNE"):
            ledger.default(name, value, {ours: value})
    kind = ledger.get("optimizer.optimizer")
    ledger.read("optimizer.optimizer", "optimizer.class_path", optimizer, NO_CLASS)
    if isinstance(ledger.get("optimizer"), str):
        ledger.read("optimizer", "optimizer.class_path", optimizer, NO_CLASS)
    betas = [ledger.get(f"optimizer.beta{number}") for number in (1, 2)]
    if kind and all(value is not None for value in betas):
        ledger.becomes("optimizer.beta1", {"optimizer.init_args.betas": betas})
        ledger.is_so("optimizer.beta2", "in optimizer.init_args.betas")
    _arguments(ledger, kind)
    for key in ledger.below("optimizer."):
        if ledger.get(key) in (False, None):
            ledger.is_so(key, "off")
        else:
            ledger.lost(key, "see optimizer.init_args")
    ledger.read("learning_rate_scheduler", "lr_scheduler.scheduler_type", lambda name: SCHEDULES.get(
        {"cosine_with_hard_restarts": "cosine_with_restarts"}.get(str(name).lower(), str(name).lower())))  # fmt: skip
    warmup = ledger.get("learning_rate_warmup_steps")
    if warmup is not None and float(warmup) >= 1:
        ledger.becomes("learning_rate_warmup_steps", {"lr_scheduler.warmup_steps": int(warmup)})
    ledger.lost("learning_rate_warmup_steps", "a share of the run: lr_scheduler.warmup_steps counts steps")
    ledger.read("learning_rate_cycles", "lr_scheduler.num_cycles", lambda value: float(value)
                if ledger.values.get("lr_scheduler.scheduler_type") == "cosine_with_restarts" else None)  # fmt: skip
    ledger.read("train_dtype", "train.mixed_precision", {"BFLOAT_16": "bf16", "FLOAT_16": "fp16", "FLOAT_32": "no",
                                                         "TFLOAT_32": "no"})  # fmt: skip
    checkpointing = ledger.get("gradient_checkpointing")
    ledger.becomes("gradient_checkpointing", {"train.gradient_checkpointing": checkpointing not in ("OFF", False)} | (
        {"train.offload_activations": True} if checkpointing == "CPU_OFFLOADED" else {}))  # fmt: skip
    levels = {"LOGIT_NORMAL": "logit_normal", "UNIFORM": "uniform"}
    ledger.read("timestep_distribution", "train.sigma_distribution", levels)
    if ledger.get("dynamic_timestep_shifting"):
        ledger.becomes("dynamic_timestep_shifting", {"train.sigma_shift": "model"})
        ledger.is_so("timestep_shift", "the dynamic shift counts")
    else:
        ledger.becomes("timestep_shift", {"train.sigma_shift": float(ledger.get("timestep_shift", 1.0))})
        ledger.default("timestep_shift", 1.0, {"train.sigma_shift": 1.0})
        ledger.is_so("dynamic_timestep_shifting", "as timestep_shift says")
    low, high = float(ledger.get("min_noising_strength", 0.0)), float(ledger.get("max_noising_strength", 1.0))
    for name in ("min_noising_strength", "max_noising_strength"):
        ledger.becomes(name, {"loss.sigma_range": [low, high]})
    strengths = {"mse_strength": "mse", "mae_strength": "l1", "huber_strength": "huber"}
    on = {name: kind for name, kind in strengths.items() if float(ledger.get(name, 1.0 if kind == "mse" else 0.0)) > 0}
    for name in strengths:
        if name in on and len(on) == 1:
            ledger.becomes(name, {"loss.type": on[name]})
        elif name in on:
            ledger.lost(name, "one loss.type at a time")
        ledger.is_so(name, "off")
    if ledger.get("masked_training"):
        ledger.becomes("masked_training", {"loss.mask_loss": True, "data.init_args.use_edit_mask": True})
        weight = float(ledger.get("unmasked_weight", 0.1))
        weights = {"loss.background_weight": weight, "loss.foreground_weight": 1.0}
        ledger.becomes("unmasked_weight", weights)
        ledger.default("unmasked_weight", weight, weights)
    ledger.is_so("masked_training", "no masks")
    ledger.lost("unmasked_weight", "no masks")
    ledger.becomes("ema", {"train.ema.enabled": ledger.get("ema") not in ("OFF", None)})
    _moments(ledger)
    trackers = "tensorboard" if ledger.get("tensorboard", True) else "none"
    ledger.becomes("tensorboard", {"logging.report_to": trackers})
    ledger.becomes("continue_last_backup", {"train.resume_from_checkpoint": "latest"
                                            if ledger.get("continue_last_backup") else None})  # fmt: skip
    ledger.is_so("resolution", "of the data sets, see below")
    for folder in folders:
        size = folder.settings.setdefault("resolution", _sides(tree.get("resolution", "512")))
        if isinstance(size, dict):
            folder.settings.pop("resolution")
            folder.settings.update(size)
    ledger.table("", SO_HERE, lost=False)
    ledger.table("", LOST)
    return ledger, folders


def _model(ledger: Ledger, tree: Mapping[str, Any], file: Path) -> None:
    kind, name = str(ledger.get("model_type")), str(ledger.get("base_model_name", ""))
    known = EDITING.get(kind)
    if known is None:
        raise ConvertError(f"{file}: model_type {kind} edits no pictures; {', '.join(EDITING)} can be converted")
    method = ledger.get("training_method")
    if method not in ("LORA", "FINE_TUNE"):
        raise ConvertError(f"{file}: training_method {method!r}; LORA and FINE_TUNE can be converted")
    ledger.becomes("training_method", {"model.lora": None} if method == "FINE_TUNE" else {})
    ledger.is_so("training_method", "a LoRA")
    if name in FROM_WORDS or not name:
        ledger.becomes("base_model_name", {"model.pretrained_model_name_or_path": known}, "its sibling that edits")
    ledger.becomes("base_model_name", {"model.pretrained_model_name_or_path": name})
    if ledger.get("peft_type", "LORA") != "LORA":
        ledger.becomes("peft_type", {"model.lora.type": str(ledger.get("peft_type")).lower().replace("_2", "")})
    ledger.is_so("peft_type", "a LoRA")
    if method == "LORA":
        names = [part.strip() for part in str(ledger.get("layer_filter", "")).split(",") if part.strip()]
        wanted = [name if tree.get("layer_filter_regex") else re.escape(name) for name in names]
        where = targets(without(wanted) if wanted else None)
        ledger.becomes("layer_filter", where)
        ledger.default("layer_filter", "all linear layers", where)
    ledger.becomes("oft_block_size", {"model.lora.oft_block_size": ledger.get("oft_block_size")}
                   if str(tree.get("peft_type", "")).startswith("OFT") else {})  # fmt: skip
    ledger.is_so("oft_block_size", "of an OFT")


def _transformer(ledger: Ledger, tree: Mapping[str, Any]) -> None:
    kind = ledger.get("transformer.weight_dtype", "NONE")
    if (base := base_format(kind)) is not None and tree.get("training_method") == "LORA":
        ledger.becomes("transformer.weight_dtype", {"model.quantize": base})
    ledger.is_so("transformer.weight_dtype", "as the checkpoint is")
    ledger.is_so("transformer.train", "it is the transformer that is trained")
    path = Path(str(ledger.get("transformer.model_name", ""))).expanduser()
    if path.is_file() and path.suffix in (".safetensors", ".gguf"):
        ledger.becomes("transformer.model_name", {"model.transformer_file": str(path)})
    ledger.read("transformer.guidance_scale", "train.guidance_scale", float)
    for name in ("transformer.offload_fraction", "layer_offload_fraction"):
        if float(ledger.get(name, 0)) > 0:
            ledger.becomes(name, {"train.memory": "auto"}, "the fastest setting that fits this card")
        ledger.is_so(name, "nothing is offloaded")
    for key in ledger.below("transformer."):
        ledger.lost(key)


def _moments(ledger: Ledger) -> None:
    """Saves and samples, which may be counted in minutes there."""
    for name, ours in (("save_every", {"train.checkpointing_steps": 0}),
                       ("sample_after", {"validation.steps": 0, "validation.enabled": True})):  # fmt: skip
        value, unit = ledger.get(name), ledger.get(f"{name}_unit")
        if unit == "STEP" and value:
            ledger.becomes(name, {key: int(value) if given == 0 else given for key, given in ours.items()})
            ledger.is_so(f"{name}_unit", "steps")
        for key in (name, f"{name}_unit"):
            ledger.lost(key, f"counted in steps: {next(iter(ours))}")


def _arguments(ledger: Ledger, kind: Any) -> None:
    """Numbers of the optimizer that it has here too."""
    names = {"weight_decay", "eps"}
    if optimizer(kind) == ADAFACTOR:
        names = {"weight_decay", "clip_threshold", "decay_rate", "scale_parameter"}
        if all(f"optimizer.{name}" in ledger for name in ("eps", "eps2")):
            both = [ledger.get("optimizer.eps"), ledger.get("optimizer.eps2")]
            ledger.becomes("optimizer.eps", {"optimizer.init_args.eps": both})
            ledger.is_so("optimizer.eps2", "in optimizer.init_args.eps")
    ledger.same("optimizer.", {name: f"optimizer.init_args.{name}" for name in sorted(names)})
    settle_adafactor(ledger)


def _concepts(tree: Mapping[str, Any], file: Path) -> list[dict[str, Any]]:
    if tree.get("concepts") is not None:
        return list(tree["concepts"])
    name = Path(str(tree.get("concept_file_name") or "training_concepts/concepts.json"))
    if (place := found(name, file)) is not None:
        return [one for one in json.loads(place.read_text(encoding="utf-8-sig")) if isinstance(one, dict)]
    raise ConvertError(f"{file}: its concepts are neither in it nor in {name}, which is neither here nor beside it")


def _folders(ledger: Ledger, concepts: list[dict[str, Any]], masks: bool, conditioned: bool) -> list[Folder]:
    folders = []
    for place, one in enumerate(concepts):
        at = f"concepts[{place}]."
        if not one.get("enabled", True) or one.get("type", "STANDARD") != "STANDARD":
            kind = "disabled" if not one.get("enabled", True) else str(one.get("type"))
            for key in ledger.below(at):
                ledger.lost(key, f"{kind}: see validation.dataset_path" if kind == "VALIDATION" else kind)
            continue
        folders.append(_folder(ledger, at, one, masks, conditioned))
    ledger.is_so("custom_conditioning_image", "STEM-condlabel.png is the reference" if conditioned else "no references")
    return folders


def _folder(ledger: Ledger, at: str, one: Mapping[str, Any], masks: bool, conditioned: bool) -> Folder:
    root, text = Path(str(one.get("path", ""))).expanduser(), one.get("text") or {}
    nested = bool(one.get("include_subdirectories"))
    source = text.get("prompt_source", "sample")
    whole = Path(str(text.get("prompt_path", ""))).expanduser()
    pairs = []
    for target in pictures(root, nested):
        if target.stem.endswith(("-masklabel", "-condlabel")):
            continue
        mask, reference = beside(target, "-masklabel.png"), beside(target, "-condlabel.png")
        caption: Path | str = beside(target, ".txt")
        if source == "filename":
            caption = target.stem
        elif source == "concept":
            caption = whole if whole.is_file() else ""
        elif isinstance(caption, Path) and not caption.is_file():
            caption = ""
        pairs.append(Pair(target, (reference,) if conditioned and reference.is_file() else (), caption,
                          mask if masks and mask.is_file() else None))  # fmt: skip
    without = [pair.target for pair in pairs if conditioned and not pair.references]
    kept, other = readable([pair for pair in pairs if pair.target not in without])
    said = [f"left out: {len(without)} without STEM-condlabel.png"] if without else []
    for name in ("path", "name", "enabled", "type", "include_subdirectories", "text.prompt_source", "text.prompt_path"):
        ledger.is_so(at + name, f"{len(kept)} pairs, see data.init_args.dataset_path")
    settings: dict[str, Any] = {}
    visits = float(one.get("balancing", one.get("repeats", 1.0)))
    if one.get("balancing_strategy", "REPEATS") == "SAMPLES" and kept:  # so many visits of an epoch, to all together
        visits /= len(kept)
    for name in ("balancing", "balancing_strategy", "repeats"):
        ledger.is_so(at + name, "of the data set, see below")
    if source in ("sample", "concept") and several_lines(kept):
        settings["prompt_per_line"] = True
    image = one.get("image") or {}
    if image.get("enable_resolution_override"):
        settings["resolution"] = _sides(image.get("resolution_override", "512"))
        ledger.is_so(f"{at}image.resolution_override", "of the data set, see below")
        ledger.is_so(f"{at}image.enable_resolution_override", "of the data set, see below")
    settings["random_flip"] = bool(image.get("enable_random_flip"))
    ledger.is_so(f"{at}image.enable_random_flip", "of the data set, see below")
    on = tuple(name.removeprefix("enable_") for name, given in {**image, **text}.items() if given is True)
    for key in ledger.below(at):
        value, name = ledger.get(key), key.rpartition(".")[2]
        if value is not True and value in (False, None, 0, 1, "", {}):
            ledger.is_so(key, "off, or once")
        elif value is True or name.startswith(on) or not key.startswith((f"{at}text.", f"{at}image.")):
            ledger.lost(key)
        else:
            ledger.is_so(key, "of something that is off")
    return Folder(f"{at}path", kept, root, [*said, *other], settings, visits)


def _sides(text: Any) -> Any:
    """A resolution as OneTrainer writes it: 512, several with commas, or 832x576; a fixed size is a section."""
    parts = [part.strip() for part in str(text).split(",") if part.strip()]
    if len(parts) == 1 and (sides := re.fullmatch(r"(\d+)\s*x\s*(\d+)", parts[0])):
        return {"image_size": [int(sides[1]), int(sides[2])]}
    several = [int(part) for part in parts if part.isdigit()]
    return several[0] if len(several) == 1 else several or 512
