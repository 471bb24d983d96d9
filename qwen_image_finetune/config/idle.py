"""Keys that have no effect in a run: each is said once, so that nobody waits for what it promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qwen_image_finetune.config.data import OUR_DATASETS
from qwen_image_finetune.config.family import resolve_family
from qwen_image_finetune.config.root import Config
from qwen_image_finetune.config.tree import ABSENT, find, shown
from qwen_image_finetune.config.words import known_keys

Condition = Callable[[Config], bool]


def _own_class(config: Config) -> bool:
    return config.data.class_path not in OUR_DATASETS


def _without_cache(config: Config) -> bool:
    return not config.cache.use_cache


def _qwen(config: Config) -> bool:
    """Whether the checkpoint is known to be of a family that has one text encoder, and no guidance embedding."""
    family, source = resolve_family(config)
    return family.startswith("Qwen") and "assumed" not in source


def _all_fixed(config: Config) -> bool:
    arguments = config.data.init_args
    return all(arguments.sized_by(entry).image_size is not None for entry in arguments.entries)


def _schedule_is_not(*types: str) -> Condition:
    return lambda config: config.lr_scheduler.scheduler_type not in types


# (key, when it is idle, why). Keys at their default say nothing; of several reasons the first is given.
IDLE: tuple[tuple[str, Condition, str], ...] = (
    ("model.revision", lambda c: Path(c.model.pretrained_model_name_or_path).expanduser().is_dir(),
     "the model is a local folder"),
    ("model.lora.init_lora_weights", lambda c: c.model.lora is not None and c.model.lora.pretrained_weight is not None,
     "the adapter starts from model.lora.pretrained_weight"),
    ("data.persistent_workers", lambda c: True, "a run reads its data in one pass, in which workers live to its end"),
    ("data.init_args.center_crop_ratio", lambda c: not (c.data.init_args.center_crop or _own_class(c)),
     "data.init_args.center_crop is false"),
    *((f"data.init_args.{key}", lambda c: not (c.data.init_args.random_crop or _own_class(c)),
       "data.init_args.random_crop is false")
      for key in ("crop_size", "crop_scale")),
    ("data.init_args.max_buckets", _all_fixed, "every data set has an image_size"),
    ("data.init_args.use_edit_mask", lambda c: c.loss.mask_loss is not True and not _own_class(c),
     "loss.mask_loss is not true"),
    *((f"train.{key}_device", lambda c: c.cache.use_cache,
       f"cache.use_cache is true, and cache.{key}_device says where the encoder lives while caching")
      for key in ("vae_encoder", "text_encoder", "text_encoder_2")),
    ("train.save_precision", lambda c: c.model.lora is not None or c.train.weight_precision == "bf16",
     "a LoRA is saved in float32, and weights that are trained in bfloat16 as they are"),
    ("train.guidance_scale", _qwen, "Qwen-Image-Edit is not told a guidance"),
    ("train.keep_activations", lambda c: not c.train.gradient_checkpointing or c.train.memory == "auto",
     "train.gradient_checkpointing is false, or train.memory chooses"),
    *((f"train.{key}", lambda c: c.train.memory == "auto", "train.memory is 'auto', which chooses it")
      for key in ("gradient_checkpointing", "offload_activations", "blocks_to_swap")),
    *((f"train.ema.{key}", lambda c: not c.train.ema.enabled, "train.ema.enabled is false")
      for key in ("decay", "start_step", "every", "device")),
    ("lr_scheduler.warmup_steps", lambda c: c.lr_scheduler.scheduler_type == "constant",
     "lr_scheduler.scheduler_type is 'constant'; 'constant_with_warmup' warms up"),
    ("lr_scheduler.num_cycles", _schedule_is_not("cosine", "cosine_with_restarts"),
     "only the schedules cosine and cosine_with_restarts have cycles"),
    ("lr_scheduler.power", _schedule_is_not("polynomial"), "only the schedule polynomial has a power"),
    ("cache.cache_dir", _without_cache, "cache.use_cache is false, so training reads no cache"),
    *((f"cache.{key}_device", _without_cache,
       f"cache.use_cache is false, and train.{key}_device says where the encoder lives without the cache")
      for key in ("vae_encoder", "text_encoder", "text_encoder_2")),
    *((f"{section}.text_encoder_2{ending}", _qwen, "Qwen-Image-Edit has one text encoder")
      for section, ending in (("train", "_device"), ("cache", "_device"), ("predict.devices", ""))),
    ("cache.prompt_empty_drop_keys", lambda c: not c.data.init_args.drops_captions,
     "data.init_args.caption_dropout_rate is 0"),
    ("cache.num_variations", _without_cache, "cache.use_cache is false, and every visit has its own crop and flip"),
    ("cache.num_variations", lambda c: not c.data.is_random,
     "neither data.init_args.random_crop nor data.init_args.random_flip is true"),
    ("logging.logging_dir", lambda c: set(c.logging.trackers) <= {"tensorboard"},
     "no tracker in logging.report_to keeps files of its own"),
    *((f"validation.{key}", lambda c: not c.validation.enabled, "validation.enabled is false")
      for key in ("steps", "dataset_path", "share", "num_validation_samples", "samples", "num_inference_steps",
                  "guidance_scale", "seed")),
    *((f"validation.{key}",
       lambda c: not c.validation.enabled or (c.validation.dataset_path is None and c.validation.share == 0),
       "no pairs are held out: validation.enabled with validation.dataset_path or validation.share does that")
      for key in ("num_loss_pairs", "num_loss_sigmas")),
    *((f"loss.{key}", lambda c: c.loss.type not in ("huber", "pseudo_huber"),
       "loss.type is neither huber nor pseudo_huber")
      for key in ("huber_delta", "huber_schedule")),
    *((f"loss.preservation.{key}", lambda c: c.loss.preservation.weight == 0, "loss.preservation.weight is 0")
      for key in ("prompts", "dataset_path")),
    ("loss.preservation.prompts", lambda c: c.loss.preservation.dataset_path is not None,
     "the pairs of loss.preservation.dataset_path have prompts of their own"),
    *((f"loss.{key}_weight", lambda c: not c.loss.mask_loss, "loss.mask_loss is false")
      for key in ("foreground", "background")),
)  # fmt: skip


def _finds_its_own_rate(config: Config) -> bool:
    rate = config.optimizer.init_args.get("lr")
    return isinstance(rate, float | int) and rate < 0.1 and config.optimizer.finds_its_own_rate


def _warms_up_to_the_end(config: Config) -> bool:
    steps, schedule = config.max_steps, config.lr_scheduler  # fewer steps where train.num_epochs ends first
    return steps is not None and schedule.scheduler_type != "constant" and schedule.warmup_steps >= steps


def _descends_twice(config: Config) -> bool:
    """Schedule-free optimizers, of either package, are called so; warming up is what they want."""
    free = "ScheduleFree" in config.optimizer.class_path.rpartition(".")[2]
    return free and not config.lr_scheduler.scheduler_type.startswith("constant")


# (when, what to know): settings that work together in a way one might not expect; {c.section.key} is what they are.
ADVICE: tuple[tuple[Condition, str], ...] = (
    (lambda c: c.cache.use_cache and c.cache.num_variations == 1 and c.data.is_random and not _own_class(c),
     "random crops and flips with cache.use_cache=true: every sample keeps the one it is cached with; "
     "cache.num_variations stores more of them"),
    (lambda c: c.model.lora is not None and c.model.lora.type == "loha",
     "model.lora.type=loha: ComfyUI reads the file that this run writes, and diffusers does not (docs/adapters.md)"),
    (lambda c: c.model.lora is not None and c.model.lora.type == "oft",
     "model.lora.type=oft: turning blocks have neither rank nor scale, so model.lora.r and model.lora.lora_alpha have "
     "no effect, and neither diffusers nor ComfyUI reads the file that this run writes (docs/adapters.md)"),
    (_finds_its_own_rate,
     "optimizer.init_args.lr={c.optimizer.init_args[lr]} makes {c.optimizer.class_path} crawl: it finds the learning "
     "rate by itself, and lr is a factor on it, which should be 1.0"),
    (_descends_twice,
     "lr_scheduler.scheduler_type={c.lr_scheduler.scheduler_type} with {c.optimizer.class_path}: it averages its "
     "weights in place of a schedule, and wants constant"),
    (_warms_up_to_the_end,
     "lr_scheduler.warmup_steps={c.lr_scheduler.warmup_steps}, but the run ends after {c.max_steps} steps "
     "(train.max_train_steps): the learning rate never reaches optimizer.init_args.lr"),
)  # fmt: skip


def idle_notes(config: Config) -> list[str]:
    """One line for each key away from its default that has no effect in this run, then the advice."""
    values = config.model_dump()
    notes: dict[str, str] = {}
    for key, idle, why in IDLE:
        given = find(values, key)
        if given is ABSENT or given == known_keys()[key].get_default() or key in notes or not idle(config):
            continue
        notes[key] = f"{key}={shown(given)} has no effect: {why}"
    return [*notes.values()] + [words.format(c=config) for applies, words in ADVICE if applies(config)]
