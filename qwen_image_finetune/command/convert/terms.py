"""Words that the trainers share: optimizers, schedules, precisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_image_finetune.command.convert.ledger import Ledger

# Theirs, and not torch's, whose rate is always a share of a weight's size: an adapter, which begins at zero, would
# learn nothing at their rates.
ADAFACTOR = "transformers.optimization.Adafactor"
OPTIMIZERS = {
    "adam": "torch.optim.Adam",
    "adamw": "torch.optim.AdamW",
    "adam8bit": "bitsandbytes.optim.Adam8bit",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "pagedadamw": "bitsandbytes.optim.PagedAdamW",
    "pagedadamw8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "ademamix8bit": "bitsandbytes.optim.AdEMAMix8bit",
    "lion": "bitsandbytes.optim.Lion",
    "lion8bit": "bitsandbytes.optim.Lion8bit",
    "sgd": "torch.optim.SGD",
    "adagrad": "torch.optim.Adagrad",
    "rmsprop": "torch.optim.RMSprop",
    "adafactor": ADAFACTOR,
    "prodigy": "prodigyopt.Prodigy",
    "ademamix": "bitsandbytes.optim.AdEMAMix",
    "came": "pytorch_optimizer.CAME",
    "muon": "pytorch_optimizer.Muon",
    "adamwschedulefree": "schedulefree.AdamWScheduleFree",
    "schedulefreeadamw": "schedulefree.AdamWScheduleFree",
}
# Of a class that is named by its path.
PACKAGES = tuple(
    f"{package}."
    for package in (
        "torch.optim",
        "bitsandbytes.optim",
        "transformers.optimization",
        "pytorch_optimizer",
        "schedulefree",
        "prodigyopt",
    )
)
SCHEDULES = {
    name: name for name in ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts",
                            "polynomial")
}  # fmt: skip
PRECISIONS = {
    "bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "fp32": "no", "float32": "no",
    "float": "no", "no": "no", False: "no",
}  # fmt: skip
CACHED = "cache.use_cache"
NO_CLASS = "no class of it is known; AdamW is the default"
RATE = "optimizer.init_args.lr"
FINDS_ITS_RATE = ("relative_step", "warmup_init")  # Adafactor's; it takes no rate with these, and schedules need one
FULL_RANK = 8192  # the largest rank; a LoKr whose rank is no limit has a whole matrix for its second one
TARGETS, EXCLUDED = "model.lora.target_modules", "model.lora.exclude_modules"


def targets(expression: str | None) -> dict[str, Any]:
    """Every linear layer, but for those whose names `expression` matches anywhere."""
    return {TARGETS: "all-linear"} | ({} if expression is None else {EXCLUDED: expression})


def outside_blocks(left_out: Sequence[str] = (), wanted: Sequence[str] = ()) -> str:
    """An expression for layers that are in no block, have one of `left_out` in their names or, where there are such,
    none of `wanted`."""
    parts = [r"(?!.*transformer_blocks\.).*"]
    parts += [f".*({'|'.join(left_out)}).*"] if left_out else []
    parts += [without(wanted)] if wanted else []
    return "|".join(parts)


def without(wanted: Sequence[str]) -> str:
    """An expression for names that have none of `wanted` in them."""
    return f"(?!.*({'|'.join(wanted)})).*"


def full_rank(rank: Any) -> dict[str, Any]:
    """Rank and alpha of a LoKr that are so large that its second matrix is a whole one; nothing of others."""
    return {"model.lora.r": FULL_RANK, "model.lora.lora_alpha": FULL_RANK} if int(rank) >= FULL_RANK else {}


def optimizer(name: Any) -> str | None:
    """The class of an optimizer by any of its names; None for those that nobody here has."""
    if not isinstance(name, str):
        return None
    plain = name.lower().replace("_", "").replace("-", "").removeprefix("optimi").removeprefix("bnb")
    plain = plain.removesuffix("bf16").removesuffix("fp32")
    return OPTIMIZERS.get(plain) or (name if name.startswith(PACKAGES) else None)


def settle_adafactor(ledger: Ledger) -> None:
    """Adafactor, if it is that, takes the rate of the configuration as it stands, where nothing else was said."""
    if ledger.values.get("optimizer.class_path") == ADAFACTOR:
        for name in ("scale_parameter", "relative_step"):
            ledger.default(name, False, {f"optimizer.init_args.{name}": False}, f"the rate is {RATE}, as it stands")


def base_format(name: Any) -> str | None:
    """model.quantize for the name of a format in any trainer: by its bits, and floats apart from integers."""
    text = str(name).lower()
    if any(part in text for part in ("nf4", "nfloat_4", "uint4", "int4", "4bit")):
        return "nf4"
    if "fp4" in text or "float4" in text:
        return "fp4"
    if any(part in text for part in ("int8", "int_8", "int_w8")):
        return "int8"
    return "fp8" if any(part in text for part in ("fp8", "float8", "float_8", "float_w8")) else None


def found(name: str | Path, file: Path) -> Path | None:
    """A file that another one names: its path begins where the program was started, or beside that file, or above."""
    name = Path(name).expanduser()
    places = (name, file.parent / name, file.parent / name.name, *(above / name for above in file.resolve().parents))
    return next((place for place in places if place.is_file()), None)


def common(settings: list[Mapping[str, Any]], name: str) -> Any:
    """The value that all data sets have for a key; None where they differ or have none."""
    values = [each.get(name) for each in settings]
    return values[0] if values and all(value == values[0] for value in values) else None
