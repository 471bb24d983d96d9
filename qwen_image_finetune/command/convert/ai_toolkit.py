"""ai-toolkit: a YAML file whose config.process has the network, the data sets, the training and the samples."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_image_finetune.command.convert.ledger import ConvertError, Ledger
from qwen_image_finetune.command.convert.pairs import Folder, Pair, beside, named, pictures, readable, some
from qwen_image_finetune.command.convert.terms import (
    CACHED,
    FINDS_ITS_RATE,
    FULL_RANK,
    NO_CLASS,
    PRECISIONS,
    RATE,
    SCHEDULES,
    base_format,
    full_rank,
    optimizer,
    outside_blocks,
    settle_adafactor,
    targets,
)
from qwen_image_finetune.config.registry import FAMILIES

TRAINERS = ("sd_trainer", "diffusion_trainer", "ui_trainer")
ARCHITECTURES = {
    "flux_kontext": "FluxKontext",
    "qwen_image_edit": "QwenImageEdit",
    "qwen_image_edit_plus": "QwenImageEditPlus",
    "flux2": "Flux2",
    "flux2_klein_4b": "Flux2Klein",
    "flux2_klein_9b": "Flux2Klein",
}
NOISE_LEVELS = {
    "sigmoid": ("logit_normal", ""),
    "linear": ("uniform", ""),
    "shift": ("uniform", "shifted as the model's sampler does"),
    "weighted": ("uniform", "the weights that it gives the levels have no counterpart"),
}
LOSSES = {"mse": "mse", "mae": "l1", "pseudo_huber": "pseudo_huber"}
FLAG = re.compile(r"\s--(\w+)\s+")

NETWORK = {"linear": "model.lora.r", "linear_alpha": "model.lora.lora_alpha", "dropout": "model.lora.lora_dropout",
           "pretrained_lora_path": "model.lora.pretrained_weight"}  # fmt: skip
TRAIN = {
    "steps": "train.max_train_steps", "lr": RATE, "batch_size": "data.batch_size",
    "gradient_checkpointing": "train.gradient_checkpointing", "max_grad_norm": "train.max_grad_norm",
}  # fmt: skip
SAVE = {"save_every": "train.checkpointing_steps", "max_step_saves_to_keep": "train.checkpoints_total_limit"}
SAMPLE = {"sample_steps": "validation.num_inference_steps", "guidance_scale": "validation.guidance_scale",
          "seed": "validation.seed"}  # fmt: skip
SO_HERE = {
    "type": "the trainer of pairs is the one there is here",
    "device": "the first card that is seen; CUDA_VISIBLE_DEVICES chooses",
    "model.arch": "read from the checkpoint, and compared with train.trainer",
    "model.is_flux": "read from the checkpoint",
    "model.dtype": "weights are read as train.mixed_precision needs them",
    "train.train_unet": "it is the transformer that is trained",
    "train.noise_scheduler": "all models here are flows",
    "train.skip_first_sample": "the first samples are drawn after validation.steps",
    "train.cache_text_embeddings": "cache.use_cache keeps texts and pictures alike",
    "save.save_format": "LoRAs are .safetensors",
    "sample.sampler": "the model's own",
    "network.type": "a LoRA",
    "network.transformer_only": "encoders are never trained",
}
LOST = {
    "performance_log_every": "timings are in every line of the log",
    "sqlite_db_path": "runs are files; qif studio shows them",
    "model.quantize_te": "encoders run once, before the transformer is loaded",
    "model.qtype_te": "encoders run once, before the transformer is loaded",
    "network.conv": "convolutions are not trained",
    "network.conv_alpha": "convolutions are not trained",
    "network.network_kwargs": "see model.lora.target_modules",
    "save.dtype": "LoRAs are saved in the precision that they are trained in",
    "save.push_to_hub": "qif push sends a run when it is there",
    "save.hf_repo_id": "qif push sends a run when it is there",
    "save.hf_private": "qif push sends a run when it is there",
    "sample.sample_start_step": "samples are drawn every validation.steps",
    "sample.width": "samples have the size of their reference, as the model makes it",
    "sample.height": "samples have the size of their reference, as the model makes it",
    "sample.neg": "models with guidance have their own negative prompt",
    "train.train_text_encoder": "encoders are never trained",
    "logging.log_every": "every step is logged",
}
OF_DATA = {
    "shuffle_tokens": "captions are sentences", "keep_tokens": "captions are sentences",
    "token_dropout_rate": "captions are sentences",
    "flip_y": "pictures are mirrored left to right alone",
    "control_transparent_color": "transparency is laid over white",
}  # fmt: skip
OF_SHAPES = {
    "buckets": "every picture keeps its shape, or has data.init_args.image_size",
    "bucket_tolerance": "sides are multiples of what the model takes",
    "type": "pictures",
}


def read(tree: Mapping[str, Any], file: Path) -> tuple[Ledger, list[Folder]]:
    """The ledger and the data sets of a configuration.

    Raises:
        ConvertError: it trains something else than an editing model on pictures.
    """
    processes = tree["config"].get("process") or [{}]
    kind = processes[0].get("type")
    if kind not in TRAINERS:
        raise ConvertError(f"{file}: its process is of type {kind!r}; {', '.join(TRAINERS)} can be converted")
    ledger = Ledger(tree)
    ledger.is_so("job", "qif train")
    at = "config.process[0]."
    ledger.becomes("config.name", {"logging.tracker_project_name": str(ledger.get("config.name")).replace("/", "_")})
    for key in ledger.below("meta."):
        ledger.lost(key, "what a run knows of itself is written beside it")
    for key in ledger.below("config.process["):
        if not key.startswith(at):
            ledger.lost(key, "one run a configuration: the first process is converted")
    folders = [_folder(ledger, f"{at}datasets[{place}].", processes[0])
               for place in range(len(processes[0].get("datasets") or []))]  # fmt: skip
    _model(ledger, at, file)
    _network(ledger, at, processes[0])
    _training(ledger, at)
    _samples(ledger, at, processes[0].get("sample") or {})
    ledger.same(f"{at}save.", SAVE)
    ledger.default(f"{at}save.max_step_saves_to_keep", 5, {"train.checkpoints_total_limit": 5})
    ledger.becomes(f"{at}training_folder", {"logging.output_dir": ledger.get(f"{at}training_folder")})
    trackers = ["tensorboard", "wandb"] if ledger.get(f"{at}logging.use_wandb") else "tensorboard"
    ledger.becomes(f"{at}logging.use_wandb", {"logging.report_to": trackers})
    ledger.table(at, SO_HERE, lost=False)
    ledger.table(at, LOST)
    return ledger, folders


def _model(ledger: Ledger, at: str, file: Path) -> None:
    name, arch = ledger.get(f"{at}model.name_or_path"), ledger.get(f"{at}model.arch")
    if arch is not None and str(arch).partition(":")[0] not in ARCHITECTURES:
        raise ConvertError(f"{file}: {arch} is not a model that is trained here; there are {', '.join(FAMILIES)}")
    ledger.becomes(f"{at}model.name_or_path", {"model.pretrained_model_name_or_path": name})
    if arch is not None:
        ledger.becomes(f"{at}model.arch", {"train.trainer": ARCHITECTURES[str(arch).partition(":")[0]]})
    qtype, quantised = ledger.get(f"{at}model.qtype", "qfloat8"), ledger.get(f"{at}model.quantize")
    if quantised and (found := base_format(str(qtype).partition("|")[0])):
        words = "without the adapter that repairs the base" if "|" in str(qtype) else ""
        ledger.becomes(f"{at}model.quantize", {"model.quantize": found}, words)
        ledger.is_so(f"{at}model.qtype", f"model.quantize: {found}")
    elif quantised:
        ledger.becomes(f"{at}model.quantize", {"model.quantize": "nf4"}, f"the nearest to {qtype}")
        ledger.lost(f"{at}model.qtype", "nf4 is the smallest format here")
    else:
        ledger.becomes(f"{at}model.quantize", {"model.quantize": False})
        ledger.lost(f"{at}model.qtype", "the base is not quantised")
    for name in ("low_vram", "layer_offloading", "auto_memory"):
        if ledger.get(f"{at}model.{name}"):
            ledger.becomes(f"{at}model.{name}", {"train.memory": "auto"})
        ledger.is_so(f"{at}model.{name}", "as it is written")
    ledger.same(f"{at}model.", {"compile": "train.compile"})
    ledger.read(f"{at}model.lora_path", "model.base_loras", lambda path: [{"file": path}])


def _network(ledger: Ledger, at: str, process: Mapping[str, Any]) -> None:
    network = process.get("network")
    if not network:
        raise ConvertError(f"{at}network is missing: full fine-tuning is `model.lora: null` (docs/training.md)")
    kind = str(network.get("type", "lora")).lower()
    if kind != "lora":
        ledger.becomes(f"{at}network.type", {"model.lora.type": kind})
    own = network.get("network_kwargs") or {}
    left_out, wanted = ([re.escape(str(name).removeprefix("transformer.")) for name in own.get(key) or []] for key in
                        ("ignore_if_contains", "only_if_contains"))  # fmt: skip
    where = targets(outside_blocks(left_out, wanted))
    for key in ("ignore_if_contains", "only_if_contains"):
        ledger.becomes(f"{at}network.network_kwargs.{key}", where if own.get(key) else {})
        ledger.is_so(f"{at}network.network_kwargs.{key}", "none")
    ledger.default(f"{at}network.network_kwargs.only_if_contains", "all linear layers of the blocks", where)
    if kind == "lokr":
        if (factor := int(ledger.get(f"{at}network.lokr_factor", -1))) > 0:
            ledger.becomes(f"{at}network.lokr_factor", {"model.lora.decompose_factor": factor})
        ledger.is_so(f"{at}network.lokr_factor", "near the root")
        whole = full_rank(FULL_RANK) if network.get("lokr_full_rank", True) else {}
        ledger.becomes(f"{at}network.lokr_full_rank", whole)
        ledger.is_so(f"{at}network.lokr_full_rank", "as the rank says")
        ledger.default(f"{at}network.lokr_full_rank", True, whole)
        for name in ("linear", "rank", "linear_alpha", "alpha") if whole else ():
            ledger.is_so(f"{at}network.{name}", "lokr_full_rank counts")
    for name in ("lokr_factor", "lokr_full_rank"):
        ledger.is_so(f"{at}network.{name}", "of a LoKr")
    rank = next((name for name in ("linear", "rank") if f"{at}network.{name}" in ledger), "rank")
    ledger.same(f"{at}network.", {**NETWORK, rank: "model.lora.r"})
    if "model.lora.lora_alpha" in ledger.values:
        ledger.lost(f"{at}network.alpha", "linear_alpha counts")
    ledger.same(f"{at}network.", {"alpha": "model.lora.lora_alpha"})
    ledger.default(f"{at}network.linear_alpha", 1.0, {"model.lora.lora_alpha": 1.0})


def _training(ledger: Ledger, at: str) -> None:
    at = f"{at}train."
    ledger.same(at, TRAIN)
    for name, value, ours in (("steps", 1000, "train.max_train_steps"), ("lr", 1e-6, RATE),
                              ("gradient_checkpointing", True, "train.gradient_checkpointing")):  # fmt: skip
        ledger.default(at + name, value, {ours: value})
    for name in ("gradient_accumulation", "gradient_accumulation_steps"):
        if int(ledger.get(at + name, 1)) > 1:
            ledger.same(at, {name: "train.gradient_accumulation_steps"})
        ledger.is_so(at + name, "1 is the default")
    ledger.read(f"{at}optimizer", "optimizer.class_path", optimizer, NO_CLASS)
    for key in ledger.below(f"{at}optimizer_params."):
        if key.endswith(FINDS_ITS_RATE) and ledger.get(key):
            ledger.lost(key, f"the rate is {RATE}, as it stands")
        ledger.becomes(key, {f"optimizer.init_args.{key.rpartition('.')[2]}": ledger.get(key)})
    settle_adafactor(ledger)
    ledger.read(f"{at}lr_scheduler", "lr_scheduler.scheduler_type", SCHEDULES)
    for key in ledger.below(f"{at}lr_scheduler_params."):
        schedule = {"num_warmup_steps": "lr_scheduler.warmup_steps", "num_cycles": "lr_scheduler.num_cycles"}
        ledger.read(key, schedule.get(key.rpartition(".")[2], ""), lambda value: value)
    ledger.read(f"{at}dtype", "train.mixed_precision", PRECISIONS)
    if (kind := NOISE_LEVELS.get(ledger.get(f"{at}timestep_type", ""))) is not None:
        ledger.becomes(f"{at}timestep_type", {"train.sigma_distribution": kind[0]}, kind[1])
    ledger.read(f"{at}loss_type", "loss.type", LOSSES)
    if ledger.get(f"{at}content_or_style") == "balanced":
        ledger.is_so(f"{at}content_or_style", "no end of the noise levels is preferred")
    if ledger.get(f"{at}cache_text_embeddings"):
        ledger.becomes(f"{at}cache_text_embeddings", {CACHED: True})
    ledger.same(f"{at}ema_config.", {"use_ema": "train.ema.enabled", "ema_decay": "train.ema.decay"})


def _samples(ledger: Ledger, at: str, sample: Mapping[str, Any]) -> None:
    """Prompts and their pictures; the seed of each is the next where theirs walks."""
    disabled = ledger.get(f"{at}train.disable_sampling", False)
    ledger.becomes(f"{at}train.disable_sampling", {"validation.enabled": not disabled})
    every = ledger.get(f"{at}sample.sample_every")
    ledger.becomes(f"{at}sample.sample_every", {"validation.enabled": not disabled, "validation.steps": every})
    ledger.same(f"{at}sample.", SAMPLE)
    walks = bool(ledger.get(f"{at}sample.walk_seed", False))
    ledger.is_so(f"{at}sample.walk_seed", "each of validation.samples has the next seed" if walks
                 else "all have validation.seed")  # fmt: skip
    given = list(sample.get("samples") or [])
    prompts = [{"prompt": text} for text in sample.get("prompts") or []]
    ours: list[dict[str, Any]] = []
    for number, written in enumerate([*prompts, *given]):
        one = {**written, **_flags(str(written.get("prompt", "")))}
        references = [one[name] for name in ("ctrl_img", "ctrl_img_1", "ctrl_img_2", "ctrl_img_3") if one.get(name)]
        seed = one.get("seed", sample.get("seed", 0) + number if walks else None)
        ours.append({"prompt": one["prompt"], "references": references}
                    | ({"seed": int(seed)} if seed is not None else {}))  # fmt: skip
    if prompts:
        ledger.becomes(f"{at}sample.prompts", {"validation.samples": ours})
    for key in ledger.below(f"{at}sample.samples["):
        name = key.rpartition(".")[2]
        if name == "prompt":
            ledger.becomes(key, {"validation.samples": ours})
        elif name.startswith("ctrl_img") or name == "seed":
            ledger.is_so(key, "in validation.samples")
        else:
            ledger.lost(key, "samples differ in prompt, references and seed")


def _flags(text: str) -> dict[str, Any]:
    """A prompt and what stands behind it, as --ctrl_img PATH."""
    prompt, *rest = FLAG.split(f"{text} ")
    flags = dict(zip(rest[::2], (value.strip() for value in rest[1::2]), strict=True))
    found: dict[str, Any] = {"prompt": prompt.strip()}
    if "ctrl_img" in flags:
        found["ctrl_img"] = flags["ctrl_img"]
    seed = str(flags.get("seed", flags.get("d", "")))
    return found | {"seed": int(seed)} if seed.isdigit() else found


def _folder(ledger: Ledger, at: str, process: Mapping[str, Any]) -> Folder:
    place = f"{at}folder_path" if f"{at}folder_path" in ledger else f"{at}dataset_path"
    root = Path(str(ledger.get(place, ""))).expanduser()
    controls = ledger.get(f"{at}control_path") or []
    controls = [controls] if isinstance(controls, str) else list(controls)
    own = [ledger.get(f"{at}control_path_{number}") for number in (1, 2, 3)]
    homes = [Path(home).expanduser() for home in ([each for each in own if each] or controls)]
    ending = "." + str(ledger.get(f"{at}caption_ext", ledger.get(f"{at}caption_type", "txt"))).lstrip(".")
    trigger = ledger.get(f"{at}trigger_word", process.get("trigger_word"))
    usual = ledger.get(f"{at}default_caption")
    masks = ledger.get(f"{at}mask_path")
    pairs, left_out = list[Pair](), list[str]()
    for target in pictures(root, nested=True):
        references = [named(home, target.stem) for home in homes]
        if any(reference is None for reference in references):
            left_out.append(str(target))
            continue
        mask = named(Path(masks).expanduser(), target.stem) if masks else None
        pairs.append(Pair(target, tuple(filter(None, references)), _caption(target, ending, usual, trigger), mask))
    kept, other = readable(pairs)
    missing = [f"left out: {some(left_out)} without a picture of its name in every control folder"] if left_out else []
    said = f"{len(kept)} pairs"
    for key in (place, *(f"{at}control_path{end}" for end in ("", "_1", "_2", "_3"))):
        ledger.is_so(key, f"{said}, see data.init_args.dataset_path")
    ledger.is_so(f"{at}caption_ext", "captions are .txt there")
    for key, words in ((f"{at}default_caption", "written where there is no caption"),
                       (f"{at}trigger_word", "written into the captions"),
                       (f"{at.partition('datasets')[0]}trigger_word", "written into the captions")):  # fmt: skip
        ledger.is_so(key, words)
    visits = float(ledger.get(f"{at}num_repeats", 1))
    ledger.is_so(f"{at}num_repeats", "of the data set, see below")
    return Folder(place, kept, root, [*missing, *other], dict(_settings(ledger, at, bool(masks))), visits)


def _caption(target: Path, ending: str, usual: str | None, trigger: str | None) -> Path | str:
    file = beside(target, ending)
    text = file.read_text(encoding="utf-8-sig").strip() if file.is_file() else ""
    wanted = text or usual or ""
    wanted = wanted.replace("[trigger]", trigger or "").replace("[name]", trigger or "")
    if trigger and trigger not in wanted:
        wanted = f"{trigger} {wanted}"
    return file if file.is_file() and wanted == text else wanted


def _settings(ledger: Ledger, at: str, masks: bool) -> Iterator[tuple[str, Any]]:
    """What a data set has of its own."""
    names = {"caption_dropout_rate": "caption_dropout_rate", "resolution": "resolution", "flip_x": "random_flip",
             "random_crop": "random_crop"}  # fmt: skip
    for theirs, ours in names.items():
        if f"{at}{theirs}" in ledger:
            yield ours, ledger.get(f"{at}{theirs}")
            ledger.is_so(f"{at}{theirs}", "of the data set, see below")
        elif theirs == "resolution":
            yield ours, 512  # their default
    for name in ("cache_latents_to_disk", "cache_latents", "cache_text_embeddings"):
        if ledger.get(at + name):
            ledger.becomes(at + name, {CACHED: True})
    if masks:
        ledger.becomes(f"{at}mask_path", {"data.init_args.use_edit_mask": True, "loss.mask_loss": True})
        least = ledger.get(f"{at}mask_min_value", 0.0)
        ledger.becomes(f"{at}mask_min_value", {"loss.foreground_weight": 1.0, "loss.background_weight": float(least)})
        ledger.default(f"{at}mask_min_value", 0.0, {"loss.foreground_weight": 1.0, "loss.background_weight": 0.0})
    ledger.table(at, OF_DATA)
    ledger.table(at, OF_SHAPES, lost=False)
