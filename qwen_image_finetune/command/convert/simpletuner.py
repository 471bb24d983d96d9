"""SimpleTuner: config.json, and multidatabackend.json with the data sets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_image_finetune.command.convert.ledger import ConvertError, Ledger
from qwen_image_finetune.command.convert.pairs import (
    Folder,
    Pair,
    beside,
    named,
    pictures,
    readable,
    several_lines,
    some,
)
from qwen_image_finetune.command.convert.terms import (
    CACHED,
    NO_CLASS,
    PRECISIONS,
    RATE,
    SCHEDULES,
    TARGETS,
    base_format,
    found,
    full_rank,
    optimizer,
    settle_adafactor,
)

MODELS = {
    ("flux", "kontext"): "black-forest-labs/FLUX.1-Kontext-dev",
    ("flux2", "dev"): "black-forest-labs/FLUX.2-dev",
    ("flux2", "klein-4b"): "black-forest-labs/FLUX.2-klein-base-4B",
    ("flux2", "klein-9b"): "black-forest-labs/FLUX.2-klein-base-9B",
    ("qwen_image", "edit-v1"): "Qwen/Qwen-Image-Edit",
    ("qwen_image", "edit-v2"): "Qwen/Qwen-Image-Edit-2509",
    ("qwen_image", "edit-v2+"): "Qwen/Qwen-Image-Edit-2509",
    ("qwen_image", "edit-v3"): "Qwen/Qwen-Image-Edit-2511",
}
FLUX_TARGETS = {
    "all": ["to_k", "to_q", "to_v", "add_k_proj", "add_q_proj", "add_v_proj", "to_out.0", "to_add_out"],
    "all+ffs": "all-linear",
}
SAME = {
    "learning_rate": RATE, "train_batch_size": "data.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps", "seed": "train.seed",
    "gradient_checkpointing": "train.gradient_checkpointing", "max_grad_norm": "train.max_grad_norm",
    "lora_rank": "model.lora.r", "lora_alpha": "model.lora.lora_alpha", "lora_dropout": "model.lora.lora_dropout",
    "checkpoint_step_interval": "train.checkpointing_steps", "checkpointing_steps": "train.checkpointing_steps",
    "checkpoints_total_limit": "train.checkpoints_total_limit", "output_dir": "logging.output_dir",
    "resume_from_checkpoint": "train.resume_from_checkpoint", "lr_warmup_steps": "lr_scheduler.warmup_steps",
    "caption_dropout_probability": "data.init_args.caption_dropout_rate", "flow_schedule_shift": "train.sigma_shift",
    "validation_guidance": "validation.guidance_scale", "validation_seed": "validation.seed",
    "validation_num_inference_steps": "validation.num_inference_steps", "dataloader_prefetch_qlen":
    "data.prefetch_factor", "musubi_blocks_to_swap": "train.blocks_to_swap", "init_lora":
    "model.lora.pretrained_weight", "revision": "model.revision", "tracker_project_name":
    "logging.tracker_project_name", "use_ema": "train.ema.enabled", "ema_decay": "train.ema.decay",
    "ema_update_interval": "train.ema.every", "lr_num_cycles": "lr_scheduler.num_cycles", "lr_power":
    "lr_scheduler.power", "use_dora": "model.lora.use_dora",
}  # fmt: skip
SO_HERE = {
    "model_family": "in model.pretrained_model_name_or_path", "model_flavour": "in model.pretrained_model_name_or_path",
    "data_backend_config": "read: its keys are those below `data`", "aspect_bucket_rounding":
    "every picture keeps its shape", "disable_benchmark": "no picture of the base is drawn first",
    "quantize_via":
    "quantised while it is read", "lora_type": "a LoRA", "delete_invalid_checkpoints":
    "a checkpoint is whole or not there", "vae_batch_size": "pictures are encoded one by one",
    "attention_mechanism": "attention is chosen by train.attention",
    "write_batch_size": "the cache is written entry by entry",
    "preserve_data_backend_cache": "the cache is kept, by content",
}  # fmt: skip
LOST = {
    "validation_resolution": "samples have the size of their reference, as the model makes it",
    "validation_guidance_rescale": "", "validation_prompt": "write it as one of validation.samples, with its reference",
    "validation_prompt_library": "write them as validation.samples", "user_prompt_library":
    "write them as validation.samples", "num_eval_images": "see validation.num_loss_pairs",
    "push_to_hub": "qif push sends a run when it is there", "push_checkpoints_to_hub":
    "qif push sends a run when it is there", "hub_model_id": "qif push sends a run when it is there",
    "tracker_run_name": "runs are called v0, v1, ...", "fuse_qkv_projections": "",
    "gradient_checkpointing_interval": "see train.keep_activations", "text_encoder_1_precision":
    "encoders run once, before the transformer is loaded", "conditioning_multidataset_sampling":
    "all references of a pair are shown together", "lycoris_config": "see model.lora.type",
    "eval_dataset_id": "see validation.dataset_path",
}  # fmt: skip
LEFT_OUT = {  # there
    "minimum_image_size": "no pair is left out: small pictures are enlarged, and named by qif check",
    "minimum_aspect_ratio": "no pair is left out by its shape",
    "maximum_aspect_ratio": "no pair is left out by its shape",
}  # fmt: skip
OF_DATA = {
    "cache_dir_vae": "the cache is one folder, by content: cache.cache_dir", "cache_dir":
    "the cache is one folder, by content: cache.cache_dir", "vae_cache_clear_each_epoch": "see cache.num_variations",
    "maximum_image_size": "pictures are resized once", "target_downsample_size": "pictures are resized once",
    "skip_file_discovery": "folders are listed at every start",
    "preserve_data_backend_cache": "the cache is kept, by content",
    "metadata_backend": "folders are listed at every start", "text_embeds": "one cache for all",
    "image_embeds": "one cache for all", "conditioning_image_embeds":
    "one cache for all", "default": "one cache for all", "dataset_type": "", "ignore_epochs": "",
}  # fmt: skip


def read(tree: Mapping[str, Any], file: Path) -> tuple[Ledger, list[Folder]]:
    """The ledger and the data sets of a config.json.

    Raises:
        ConvertError: a model or a way of training that is not here, or the file of the data sets is not there.
    """
    options = {name.lstrip("-"): value for name, value in tree.items()}
    sets = _backends(options, file)
    lycoris = _lycoris(options, file)
    ledger = Ledger({**options, "data": sets, **({"lycoris": lycoris} if lycoris else {})})
    model = (str(options.get("model_family")), str(options.get("model_flavour")))
    known = MODELS.get(model)
    if known is None and "pretrained_model_name_or_path" not in ledger:
        all_models = ", ".join(map(" ".join, MODELS))
        raise ConvertError(f"{file}: {' '.join(model)} edits no pictures; {all_models} can be converted")
    ledger.values["model.pretrained_model_name_or_path"] = known
    ledger.same("", {"pretrained_model_name_or_path": "model.pretrained_model_name_or_path"})
    ledger.becomes("model_type", {"model.lora": None} if options.get("model_type") == "full" else {})
    ledger.is_so("model_type", "a LoRA")
    folders = _folders(ledger, sets, options)
    for name, ours in (("max_train_steps", "train.max_train_steps"), ("num_train_epochs", "train.num_epochs")):
        if int(ledger.get(name, 0)) > 0:
            ledger.same("", {name: ours})
        ledger.is_so(name, "0: the other one counts")
    if lycoris:
        _lycoris_kind(ledger, lycoris)
    if options.get("lora_type", "standard") != "standard":
        ledger.lost("lora_type", "LoKr, LoHa and OFT are model.lora.type")
    ledger.same("", SAME)
    ledger.default("lora_alpha", options.get("lora_rank", 16), {"model.lora.lora_alpha": options.get("lora_rank", 16)})
    ledger.read("optimizer", "optimizer.class_path", optimizer, NO_CLASS)
    settle_adafactor(ledger)
    ledger.read("lr_scheduler", "lr_scheduler.scheduler_type", SCHEDULES)
    ledger.read("mixed_precision", "train.mixed_precision", PRECISIONS)
    if options.get("base_model_precision") in ("no_change", "no", "bf16"):
        ledger.is_so("base_model_precision", "as the checkpoint is")
    ledger.read("base_model_precision", "model.quantize", base_format, "fp8, int8, nf4 and fp4 are the formats here")
    tracker = options.get("report_to")
    ledger.read("report_to", "logging.report_to", {name: name for name in ("none", "wandb", "tensorboard", "swanlab")})
    if tracker == "all":
        ledger.becomes("report_to", {"logging.report_to": ["tensorboard", "wandb"]})
    if "validation_steps" in ledger:
        steps = int(ledger.get("validation_steps"))
        ledger.becomes("validation_steps", {"validation.enabled": True, "validation.steps": steps})
    for name in ("resolution", "resolution_type"):
        ledger.is_so(name, "of the data sets that have none, see below")
    ledger.is_so("data_backend_sampling", "shares of the data sets, see below")
    if options.get("model_family") == "flux" and options.get("model_type") == "lora" and not lycoris:
        ledger.read("flux_lora_target", TARGETS, FLUX_TARGETS, f"see {TARGETS}")
        ledger.default("flux_lora_target", "all", {TARGETS: FLUX_TARGETS["all"]})
    ledger.values[CACHED] = True
    ledger.table("", SO_HERE, lost=False)
    ledger.table("", LOST | LEFT_OUT)
    return ledger, folders


def _lycoris(options: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """What the file of lycoris_config holds; nothing where none is named, or it is not there."""
    place = found(str(options.get("lycoris_config", "")), file) if options.get("lora_type") == "lycoris" else None
    try:
        tree = json.loads(place.read_text(encoding="utf-8-sig")) if place is not None else {}
    except ValueError as error:
        raise ConvertError(f"{place}: no JSON ({error})") from error
    return tree if isinstance(tree, dict) else {}


def _lycoris_kind(ledger: Ledger, tree: Mapping[str, Any]) -> None:
    """Kind, rank and factor of an adapter of LyCORIS; a LoKr of a rank beyond every layer's has a whole matrix."""
    kind, at = str(tree.get("algo", "lora")).lower(), "lycoris."
    ledger.is_so("lycoris_config", "read: its keys are those below `lycoris`")
    ledger.becomes("lora_type", {"model.lora.type": {"locon": "lora"}.get(kind, kind)})
    ledger.is_so(f"{at}algo", "in model.lora.type")
    whole = full_rank(tree.get("linear_dim", 16)) if kind == "lokr" else {}
    ledger.becomes(f"{at}linear_dim", whole or {"model.lora.r": tree.get("linear_dim")})
    if whole:
        ledger.is_so(f"{at}linear_alpha", "a whole matrix is not scaled")
    ledger.becomes(f"{at}linear_alpha", {"model.lora.lora_alpha": tree.get("linear_alpha")})
    factor = int(tree.get("factor", -1))
    ledger.becomes(f"{at}factor", {"model.lora.decompose_factor": factor} if kind == "lokr" and factor > 0 else {})
    ledger.is_so(f"{at}factor", "near the root")
    if float(tree.get("multiplier", 1.0)) == 1.0:
        ledger.is_so(f"{at}multiplier", "1")
    for key in ledger.below(f"{at}apply_preset"):
        ledger.lost(key, f"see {TARGETS}")
    for name in ("lora_rank", "lora_alpha"):
        ledger.is_so(name, "lycoris_config counts")


def _backends(options: Mapping[str, Any], file: Path) -> list[dict[str, Any]]:
    """What the file of the data sets holds; its path begins where SimpleTuner was started."""
    name = Path(str(options.get("data_backend_config", "multidatabackend.json")))
    if (place := found(name, file)) is None:
        raise ConvertError(f"{file}: data_backend_config={str(name)!r} is neither in this folder nor beside that file")
    try:
        return [one for one in json.loads(place.read_text(encoding="utf-8-sig")) if isinstance(one, dict)]
    except ValueError as error:
        raise ConvertError(f"{place}: no JSON ({error})") from error


def _folders(ledger: Ledger, sets: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> list[Folder]:
    by_id = {one.get("id"): one for one in sets}
    conditioning = {name for one in sets for name in _listed(one.get("conditioning_data"))}
    folders = []
    for place, one in enumerate(sets):
        at = f"data[{place}]."
        kind = one.get("dataset_type", "image")
        if one.get("id") in conditioning or kind == "conditioning":
            for key in ledger.below(at):
                ledger.is_so(key, "references of the data sets that name it")
        elif kind != "image":
            for key in ledger.below(at):
                ledger.is_so(key, "one cache for all, by content: cache.cache_dir")
        elif one.get("disabled") or one.get("disable"):
            for key in ledger.below(at):
                ledger.lost(key, "a data set that is disabled")
        elif one.get("type", "local") == "huggingface" and "dataset_name" in one:
            _hub(ledger, at, one, [by_id[name] for name in _listed(one.get("conditioning_data")) if name in by_id])
        elif one.get("type", "local") != "local":
            for key in ledger.below(at):
                ledger.lost(key, f"data of type {one['type']} is not read: bring it to this machine")
        else:
            others = [by_id[name] for name in _listed(one.get("conditioning_data")) if name in by_id]
            folders.append(_folder(ledger, at, one, others, options))
    return folders


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _hub(ledger: Ledger, at: str, one: Mapping[str, Any], references: Sequence[Mapping[str, Any]]) -> None:
    """A data set on the hub, whose references are a column of the same rows."""
    about = one.get("huggingface") or {}
    columns = {
        "target": about.get("image_column", "image"), "prompt": about.get("caption_column", "caption"),
        "references": [(other.get("huggingface") or {}).get("image_column", "image") for other in references],
    }  # fmt: skip
    path = f"hf://{one['dataset_name']}" + (f"@{one['revision']}" if one.get("revision") else "")
    ledger.on_hub.append({"path": path, "split": one.get("split", "train"), "columns": columns})
    for name in ("id", "type", "dataset_name", "split", "revision", "conditioning_data", "caption_strategy",
                 "metadata_backend", "huggingface.image_column", "huggingface.caption_column"):  # fmt: skip
        ledger.is_so(at + name, f"in data.init_args.dataset_path: {path}")
    for key in ledger.below(at):
        ledger.lost(key, "of a data set on the hub")


def _folder(
    ledger: Ledger,
    at: str,
    one: Mapping[str, Any],
    references: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> Folder:
    root = Path(str(one.get("instance_data_dir", ""))).expanduser()
    homes = [Path(str(other.get("instance_data_dir", ""))).expanduser() for other in references]
    strategy, instance = one.get("caption_strategy", "filename"), one.get("instance_prompt") or ""
    pairs, without = list[Pair](), list[Path]()
    for target in pictures(root, nested=True):
        inside = target.relative_to(root)
        shown = [home / inside if (home / inside).is_file() else named((home / inside).parent, target.stem)
                 for home in homes]  # fmt: skip
        if any(each is None for each in shown):
            without.append(target)
            continue
        pairs.append(Pair(target, tuple(filter(None, shown)), _caption(target, str(strategy), instance)))
    kept, other = readable(pairs)
    said = [f"left out: {some(without)} without a reference of the same name"] if without else []
    for name in ("instance_data_dir", "conditioning_data", "id", "type"):
        ledger.is_so(at + name, f"{len(kept)} pairs, see data.init_args.dataset_path")
    if strategy in ("textfile", "filename", "instanceprompt"):
        ledger.is_so(f"{at}caption_strategy", "captions are .txt there")
    ledger.lost(f"{at}caption_strategy", "captions are taken from .txt: write others there")
    prepended = one.get("prepend_instance_prompt", options.get("prepend_instance_prompt")) and instance
    prepended = prepended and strategy != "instanceprompt"
    ledger.is_so(f"{at}instance_prompt", "the caption" if strategy == "instanceprompt" else
                 "the prefix" if prepended else "not used")  # fmt: skip
    ledger.is_so(f"{at}prepend_instance_prompt", "of the data set, see below")
    lines = strategy == "textfile" and not one.get("disable_multiline_split") and several_lines(kept)
    ledger.is_so(f"{at}disable_multiline_split", "of the data set, see below")
    ledger.is_so(f"{at}only_instance_prompt", "captions are what caption_strategy says")
    random = one.get("crop_style") == "random"
    square = bool(one.get("crop")) and one.get("crop_aspect", "square") == "square"
    if square and one.get("crop_style", "center") not in ("random", "center"):
        ledger.lost(f"{at}crop_style", "the middle is kept")
    for name in ("crop", "crop_style", "crop_aspect"):
        ledger.is_so(at + name, "of the data set, see below" if square else "every picture keeps its shape")
    for name in ("resolution", "resolution_type", "repeats", "probability"):
        ledger.is_so(at + name, "of the data set, see below")
    ledger.is_so(f"{at}disabled", "it is on")
    ledger.table(at, LEFT_OUT)
    ledger.table(at, OF_DATA, lost=False)
    settings: dict[str, Any] = {"random_crop": square and random}
    settings |= ({"prefix": f"{instance} "} if prepended else {}) | ({"prompt_per_line": True} if lines else {})
    size = one.get("resolution", ledger.get("resolution"))
    if size is not None:
        kind = one.get("resolution_type", ledger.get("resolution_type", "pixel_area"))
        side = round(float(size) ** 0.5 * 1000) if kind == "area" else int(size)
        settings |= {"image_size": [side, side]} if square else {"resolution": side}
    visits, likely = int(one.get("repeats") or 0) + 1, float(one.get("probability", 1.0))  # beyond the first visit
    # A data set is drawn for each batch: by what it has, times its probability, or by that alone.
    share = likely if options.get("data_backend_sampling") == "uniform" else None
    return Folder(f"{at}instance_data_dir", kept, root, [*said, *other], settings, visits * likely, share)


def _caption(target: Path, strategy: str, instance: str) -> Path | str:
    if strategy == "instanceprompt":
        return instance
    if strategy == "filename":
        return target.stem.replace("_", " ")
    file = beside(target, ".txt")
    return file if file.is_file() else ""
