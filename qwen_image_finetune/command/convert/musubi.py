"""musubi-tuner: a TOML file of data sets, a TOML file of options, or the command line in a script."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_image_finetune.command.convert.ledger import ConvertError, Ledger
from qwen_image_finetune.command.convert.pairs import Folder, Pair, beside, pictures, readable, some
from qwen_image_finetune.command.convert.terms import (
    CACHED,
    FINDS_ITS_RATE,
    NO_CLASS,
    PRECISIONS,
    RATE,
    SCHEDULES,
    TARGETS,
    optimizer,
    outside_blocks,
    settle_adafactor,
    targets,
)

SCRIPT = re.compile(r"(\w+)_train(?:_network)?\.py")
FULL = re.compile(r"_train\.py")
MODELS = {
    "flux_kontext": "black-forest-labs/FLUX.1-Kontext-dev",
    "qwen_image:edit": "Qwen/Qwen-Image-Edit",
    "qwen_image:edit-2509": "Qwen/Qwen-Image-Edit-2509",
    "qwen_image:edit-2511": "Qwen/Qwen-Image-Edit-2511",
    "flux_2:dev": "black-forest-labs/FLUX.2-dev",
    "flux_2:klein-base-4b": "black-forest-labs/FLUX.2-klein-base-4B",
    "flux_2:klein-base-9b": "black-forest-labs/FLUX.2-klein-base-9B",
    "flux_2:klein-4b": "black-forest-labs/FLUX.2-klein-4B",
    "flux_2:klein-9b": "black-forest-labs/FLUX.2-klein-9B",
}
SAME = {
    "learning_rate": RATE, "max_train_steps": "train.max_train_steps", "max_train_epochs": "train.num_epochs",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps", "seed": "train.seed",
    "gradient_checkpointing": "train.gradient_checkpointing", "network_dim": "model.lora.r",
    "network_alpha": "model.lora.lora_alpha", "network_dropout": "model.lora.lora_dropout",
    "network_weights": "model.lora.pretrained_weight", "scale_weight_norms": "model.lora.max_norm",
    "max_data_loader_n_workers": "data.num_workers", "save_every_n_steps": "train.checkpointing_steps",
    "blocks_to_swap": "train.blocks_to_swap", "output_dir": "logging.output_dir",
    "output_name": "logging.tracker_project_name", "compile": "train.compile",
    "lr_warmup_steps": "lr_scheduler.warmup_steps", "lr_scheduler_power": "lr_scheduler.power",
    "gradient_checkpointing_cpu_offload": "train.offload_activations", "guidance_scale": "train.guidance_scale",
    "sample_every_n_steps": "validation.steps",
}  # fmt: skip
NETWORK_ARGUMENTS = {
    "loraplus_lr_ratio": "model.lora.lr_ratio", "rank_dropout": "model.lora.rank_dropout",
    "module_dropout": "model.lora.module_dropout", "factor": "model.lora.decompose_factor",
}  # fmt: skip
NOISE_LEVELS = {"uniform": "uniform", "sigmoid": "logit_normal", "shift": "logit_normal", "flux_shift": "logit_normal",
                "flux2_shift": "logit_normal", "qwen_shift": "logit_normal"}  # fmt: skip
ENCODER = "every part but the transformer comes from model.pretrained_model_name_or_path"
SO_HERE = {
    "sdpa": "attention is chosen by train.attention", "flash_attn": "attention is chosen by train.attention",
    "flash3": "attention is chosen by train.attention", "sage_attn": "attention is chosen by train.attention",
    "xformers": "attention is chosen by train.attention", "split_attn": "samples of a batch are masked",
    "vae": ENCODER, "text_encoder": ENCODER, "text_encoder1": ENCODER, "text_encoder2": ENCODER,
    "network_module": "a LoRA", "save_state": "every checkpoint can be resumed",
    "save_state_on_train_end": "every checkpoint can be resumed",
    "persistent_data_loader_workers": "workers live as long as the run",
    "model_version": "in model.pretrained_model_name_or_path", "config_file": "its options are read",
    "num_cpu_threads_per_process": "the launcher's", "fp8_scaled": "fp8 has a scale for each row",
}  # fmt: skip
LOST = {
    "save_every_n_epochs": "checkpoints are counted in steps: train.checkpointing_steps",
    "save_last_n_epochs": "see train.checkpoints_total_limit", "save_last_n_steps": "see train.checkpoints_total_limit",
    "sample_prompts": "write them as validation.samples", "sample_every_n_epochs": "see validation.steps",
    "sample_at_first": "the first samples are drawn after validation.steps",
    "fp8_vl": "encoders run once, before the transformer is loaded",
    "fp8_t5": "encoders run once, before the transformer is loaded",
    "fp8_text_encoder": "encoders run once, before the transformer is loaded",
    "training_comment": "", "metadata_title": "qif push writes a card", "metadata_author": "qif push writes a card",
    "wandb_api_key": "secrets belong in the environment: WANDB_API_KEY",
    "huggingface_token": "secrets belong in the environment: HF_TOKEN",
}  # fmt: skip
OF_DATA = {
    "enable_bucket": "every picture keeps its shape, or has data.init_args.image_size",
    "bucket_no_upscale": "small pictures are enlarged, and named by qif check",
    "cache_directory": "the cache is one folder, by content: cache.cache_dir",
    "debug_dataset": "qif check",
}  # fmt: skip
OF_CONTROLS = dict.fromkeys(
    ("no_resize_control", "control_resolution", "qwen_image_edit_no_resize_control", "flux_kontext_no_resize_control",
     "qwen_image_edit_control_resolution"), "references have the size that the model's pipeline gives them",
)  # fmt: skip


def read_data(tree: Mapping[str, Any], file: Path) -> tuple[Ledger, list[Folder]]:
    """A file of data sets alone."""
    ledger = Ledger(tree)
    ledger.is_so("dataset_config", str(file))
    return ledger, _folders(ledger, tree, "")


def read_options(options: Mapping[str, Any], file: Path, script: str, data: Mapping[str, Any]) -> tuple[
    Ledger, list[Folder]]:  # fmt: skip
    """Options of a training, and the data sets that they name.

    Args:
        script: the name of the program.
        data: content of the file of --dataset_config.
    """
    ledger = Ledger({**options, "data": data})
    ledger.is_so("dataset_config", "read: its keys are those below `data`")
    folders = _folders(ledger, data, "data.")
    _model(ledger, script, file)
    if FULL.search(script):
        ledger.values["model.lora"] = None
    else:
        _network(ledger)
    ledger.same("", SAME)
    ledger.default("network_alpha", 1.0, {} if FULL.search(script) else {"model.lora.lora_alpha": 1.0})
    steps = {} if "max_train_epochs" in options else {"train.max_train_steps": 1600}
    ledger.default("max_train_steps", 1600, steps)
    ledger.default("learning_rate", 2e-6, {RATE: 2e-6})
    limit = ledger.get("max_grad_norm", 1.0)
    ledger.becomes("max_grad_norm", {"train.max_grad_norm": limit or None})
    ledger.read("mixed_precision", "train.mixed_precision", PRECISIONS)
    ledger.read("lr_scheduler", "lr_scheduler.scheduler_type", SCHEDULES)
    if ledger.get("lr_scheduler") in (None, "cosine", "cosine_with_restarts"):
        cycles = float(ledger.get("lr_scheduler_num_cycles", 1))
        restarts = ledger.values.get("lr_scheduler.scheduler_type") == "cosine_with_restarts"
        ledger.becomes("lr_scheduler_num_cycles", {"lr_scheduler.num_cycles": cycles} if restarts else {})
    _optimizer(ledger)
    ledger.read("timestep_sampling", "train.sigma_distribution", NOISE_LEVELS)
    sampled = str(options.get("timestep_sampling", ""))
    if sampled in ("shift", "sigma"):
        ledger.becomes("discrete_flow_shift", {"train.sigma_shift": float(ledger.get("discrete_flow_shift", 1.0))})
        ledger.default("discrete_flow_shift", 1.0, {"train.sigma_shift": 1.0})
    elif sampled in ("uniform", "sigmoid"):
        ledger.default("discrete_flow_shift", "not used", {"train.sigma_shift": 1.0})
    ledger.lost("discrete_flow_shift", f"timestep_sampling {sampled or 'sigma'} does not use it")
    ledger.read("weighting_scheme", "loss.weighting", {"none": "none", "sigma_sqrt": "sigma_sqrt", "cosmap": "cosmap"})
    if ledger.get("fp8_base"):
        ledger.becomes("fp8_base", {"model.quantize": "fp8"})
    files, strengths = ledger.get("base_weights", []), ledger.get("base_weights_multiplier", [])
    loras = [{"file": name, "strength": float(strengths[place]) if place < len(strengths) else 1.0}
             for place, name in enumerate(files)]  # fmt: skip
    ledger.becomes("base_weights", {"model.base_loras": loras})
    ledger.is_so("base_weights_multiplier", "strengths of model.base_loras")
    ledger.becomes("sample_every_n_steps", {"validation.enabled": True})
    if "resume" in ledger:
        ledger.lost("resume", "a state of theirs; its LoRA can be read: model.lora.pretrained_weight")
    tracker = {"tensorboard": "tensorboard", "wandb": "wandb", "all": ["tensorboard", "wandb"]}
    ledger.read("log_with", "logging.report_to", tracker)
    ledger.table("", SO_HERE, lost=False)
    ledger.table("", LOST)
    return ledger, folders


def options_in(text: str) -> tuple[dict[str, Any], str]:
    """Options of the first training command in a script, and the name of its program.

    Raises:
        ConvertError: there is none.
    """
    joined = re.sub(r"\\\s*\n|\^\s*\n|`\s*\n", " ", text)
    line = next((line for line in joined.splitlines() if SCRIPT.search(line) and not line.lstrip().startswith("#")), "")
    if not line:
        raise ConvertError("no command of musubi-tuner (..._train_network.py) is in it")
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        raise ConvertError(f"its command cannot be read ({error})") from error
    start = next(place for place, word in enumerate(words) if SCRIPT.search(word))
    options: dict[str, Any] = {}
    name = ""
    for word in words[start + 1 :]:
        if word in ("&&", ";", "|", ">", "2>&1"):
            break
        if word.startswith("--"):
            name, _, value = word.removeprefix("--").partition("=")
            options[name] = _value(value) if value else True
        elif name:
            before = options[name]
            values = before if isinstance(before, list) else [before]
            options[name] = _value(word) if before is True else [*values, _value(word)]
    for several in ("base_weights", "base_weights_multiplier", "optimizer_args", "network_args"):
        if several in options and not isinstance(options[several], list):
            options[several] = [options[several]]
    return options, Path(words[start]).name


def _value(word: str) -> Any:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(word.lower(), word)


def _model(ledger: Ledger, script: str, file: Path) -> None:
    found = SCRIPT.search(script)
    name = found[1] if found else ""
    usual = {"flux_2": "dev"}.get(name, "edit" if ledger.get("edit") else "")
    version = ledger.get("model_version", "edit-2509" if ledger.get("edit_plus") else usual)
    known = MODELS.get(name) or MODELS.get(f"{name}:{version}")
    if known is None:
        raise ConvertError(
            f"{file}: {script or 'its program'} {version} trains no model that edits pictures here; "
            f"{', '.join(MODELS)} can be converted"
        )
    ledger.values["model.pretrained_model_name_or_path"] = known
    for key in ("edit", "edit_plus"):
        ledger.is_so(key, f"model.pretrained_model_name_or_path: {known}")
    path = Path(str(ledger.get("dit", ""))).expanduser()
    if path.is_file() and path.suffix in (".safetensors", ".gguf"):
        ledger.becomes("dit", {"model.transformer_file": str(path)}, f"the rest is that of {known}")
    ledger.lost("dit", f"no such file here: {known} is read; model.transformer_file names one file")


def _optimizer(ledger: Ledger) -> None:
    ledger.read("optimizer_type", "optimizer.class_path", optimizer, NO_CLASS)
    arguments = {}
    for word in ledger.get("optimizer_args", []):
        name, _, value = str(word).partition("=")
        if name not in FINDS_ITS_RATE or not _literal(value):
            arguments[f"optimizer.init_args.{name}"] = _literal(value)
    ledger.becomes("optimizer_args", arguments)
    settle_adafactor(ledger)


def _network(ledger: Ledger) -> None:
    """Kind and arguments of the adapter; it sits on all linear layers of the blocks, but for those that modulate."""
    kind = str(ledger.get("network_module", "")).rpartition(".")[2]
    ledger.becomes("network_module", {"model.lora.type": kind} if kind in ("loha", "lokr") else {})
    ours, lost = dict[str, Any](), list[str]()
    modulates = [r"_mod\.", r"norm\w*\.linear"]
    for word in ledger.get("network_args", []):
        name, _, value = str(word).partition("=")
        if name in NETWORK_ARGUMENTS:
            ours[NETWORK_ARGUMENTS[name]] = _literal(value)
        elif name == "exclude_mod" and _literal(value) is False:
            modulates = []
        else:
            lost.append(word)
    where = targets(outside_blocks(modulates))
    words = f"{', '.join(lost)}: no counterpart, see {TARGETS}" if lost else ""
    ledger.becomes("network_args", {**ours, **where}, words)
    ledger.default("network_args", "all linear layers of the blocks that do not modulate", where)


def _literal(text: str) -> Any:
    """A Python literal as it stands behind an option: numbers, True, None, tuples of them."""
    spelt = {"True": True, "False": False, "None": None}
    if text in spelt:
        return spelt[text]
    try:
        return json.loads(text.replace("(", "[").replace(")", "]"))
    except ValueError:
        return text.strip("\"'")


def _folders(ledger: Ledger, tree: Mapping[str, Any], at: str) -> list[Folder]:
    general = tree.get("general") or {}
    folders = []
    batches = []
    for place, given in enumerate(tree.get("datasets") or []):
        own, here = {**general, **given}, f"{at}datasets[{place}]."
        if any(name.startswith("video") for name in given):
            raise ConvertError(f"{here}video_directory: videos are not trained on")
        key = f"{here}image_jsonl_file" if "image_jsonl_file" in given else f"{here}image_directory"
        folders.append(_table(key, own) if key.endswith("file") else _directory(key, own))
        batches.append(own.get("batch_size", 1))
        for name in ("image_jsonl_file", "image_directory", "control_directory"):
            ledger.is_so(f"{here}{name}", f"{len(folders[-1].pairs)} pairs, see data.init_args.dataset_path")
    for here in (f"{at}general.", *(f"{at}datasets[{place}]." for place in range(len(folders)))):
        ledger.is_so(f"{here}caption_extension", "captions are .txt there")
        ledger.becomes(f"{here}batch_size", {"data.batch_size": max(batches)},
                       "" if len(set(batches)) == 1 else "the largest of them all")  # fmt: skip
        for name in ("resolution", "num_repeats"):
            ledger.is_so(here + name, "of the data set, see below")
        ledger.table(here, OF_DATA, lost=False)
        ledger.table(here, OF_CONTROLS)
    ledger.values.setdefault(CACHED, True)
    return folders


def _directory(key: str, own: Mapping[str, Any]) -> Folder:
    """Pictures with a caption beside them, and the control pictures of each, STEM or STEM_0, STEM_1, ..."""
    root = Path(own["image_directory"]).expanduser()
    ending = own.get("caption_extension", ".txt")
    targets = [path for path in pictures(root, nested=False) if beside(path, ending).is_file()]
    controls = pictures(Path(own["control_directory"]).expanduser(), nested=False) if "control_directory" in own else []
    taken: dict[Path, tuple[Path, ...]] = {}
    for target in sorted(targets, key=lambda path: -len(path.name)):  # the longer name has the first choice
        mine = [path for path in controls if path.stem == target.stem or path.stem.startswith(f"{target.stem}_")]
        controls = [path for path in controls if path not in mine]
        taken[target] = tuple(sorted(mine, key=lambda path: _number(path.stem, target.stem)))
    without = [target for target in targets if "control_directory" in own and not taken[target]]
    pairs = [Pair(target, taken[target], beside(target, ending)) for target in targets if target not in without]
    kept, other = readable(pairs)
    said = [f"left out: {some(without)} without a control picture"] if without else []
    bare = [path for path in pictures(root, nested=False) if path not in targets]
    said += [f"left out: {some(bare)} without a caption {ending}"] if bare else []
    return Folder(key, kept, root, [*said, *other], _settings(own), visits=float(own.get("num_repeats", 1)))


def _number(stem: str, base: str) -> int:
    digits = stem.removeprefix(base).rpartition("_")[2]
    return int(digits) + 1 if digits.isdigit() else 0


def _table(key: str, own: Mapping[str, Any]) -> Folder:
    """A JSONL file: image_path, control_path or control_path_0, ..., caption."""
    file = Path(own["image_jsonl_file"]).expanduser()
    pairs = []
    for text in file.read_text(encoding="utf-8-sig").splitlines() if file.is_file() else []:
        if text.strip():
            fields = json.loads(text)
            names = sorted((name for name in fields if re.fullmatch(r"control_path(_\d+)?", name)),
                           key=lambda name: _number(name, "control_path"))  # fmt: skip
            references = tuple(Path(fields[name]) for name in names)
            pairs.append(Pair(Path(fields["image_path"]), references, fields["caption"]))
    kept, other = readable(pairs)
    return Folder(key, kept, file.parent, other, _settings(own), visits=float(own.get("num_repeats", 1)))


def _settings(own: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if (size := own.get("resolution")) is not None:
        width, height = (size, size) if isinstance(size, int) else size
        # With buckets it is an area; without them, the size of every picture.
        found |= ({"resolution": round((width * height) ** 0.5)} if own.get("enable_bucket")
                  else {"image_size": [width, height]})  # fmt: skip
    return found
