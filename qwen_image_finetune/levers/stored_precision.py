"""In which precision a checkpoint keeps its transformer, read from its own files and never from its name.

Only config.json and the headers of the files with weights are looked at: no weights, no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qwen_image_finetune.config import ConfigError, ModelConfig
from qwen_image_finetune.config.tree import shown

WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name; with ".index.json" the list of its shards
FP8_SCALES = ("weight_scale", "scale_weight")  # one number, or one a row; the weight is what is stored, times this
SIDE_NOTES = (  # nothing that weights are computed from
    "scaled_fp8", "input_scale", "scale_input", "weight_format", "comfy_quant", "__index_timestep_zero__",
)  # fmt: skip
FOUR_BITS = ("nf4", "fp4")
GGUF = ".gguf"
PACKED = "weight.quant_state.bitsandbytes__"  # followed by nf4 or fp4


# What to do without it
BITSANDBYTES = (
    "bitsandbytes, not installed here: pip install 'qwen-image-finetune[bitsandbytes]', or use a checkpoint in full "
    "precision with model.quantize=fp8 or int8"
)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    file: Path
    dtype: str  # in the words of safetensors: F32, BF16, F8_E4M3, U8, ...; in those of GGUF what only that has
    shape: tuple[int, ...]
    key: str = ""  # its name in the file, where that is another
    rows: tuple[tuple[int, int], ...] = ()  # (first, behind the last) of the file's tensor that make it, where not all


@dataclass(frozen=True)
class Precision:
    """What the frozen base of a run is kept in."""

    format: str | None  # fp8, int8, nf4 or fp4; None is not quantised
    stored: bool  # the checkpoint came so
    source: str  # where that was learnt


def local_checkpoint(model: ModelConfig) -> Path | None:
    """Folder of the configured checkpoint where its transformer is on this machine: its own, or one of the hub's cache.

    No network is used. A download that was cut short does not count.
    """
    name = model.pretrained_model_name_or_path
    if (folder := Path(name).expanduser()).is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "transformer/config.json", revision=model.revision)
    if not isinstance(cached, str):
        return None
    transformer = Path(cached).parent
    whole = model.transformer_file is not None or all(path.is_file() for path in _shards(transformer))
    return transformer.parent if whole else None


def base_precision(folder: Path, model: ModelConfig | None = None) -> Precision:
    """Precision of the transformer in `folder`, or in model.transformer_file, under model.quantize; without a
    configuration, as it is stored.

    Raises:
        ConfigError: the checkpoint is quantised in another way than model.quantize says, in one that is not known here,
            or at all although model.lora=null wants to train it; or its files are missing, broken or contradict each
            other.
    """
    asked = None if model is None else model.asked_format
    file = None if model is None else model.transformer_path
    found = stored_format(folder) if file is None else file_format(file)
    folder = file or folder
    if found is None:
        if file is not None and file.suffix == GGUF and model is not None and model.lora is None:
            raise ConfigError(
                f"model.lora=null, but {file} is GGUF: name a .safetensors in full precision or give model.lora"
            )
        return Precision(asked, stored=False, source="model.quantize" if asked else "")
    format, source = found
    if model is not None and asked not in (None, format):
        raise ConfigError(
            f"model.quantize={shown(model.quantize)}, but the weights in {folder} are already {format} ({source}): set "
            "model.quantize=false to keep them so, or name a checkpoint in full precision"
        )
    if model is not None and model.lora is None:
        raise ConfigError(
            f"model.lora=null, but the weights in {folder} are {format} ({source}): a quantised base is frozen and "
            "cannot be fully fine-tuned; name a checkpoint in full precision or give model.lora"
        )
    return Precision(format, stored=True, source=source)


def stored_format(folder: Path) -> tuple[str, str] | None:
    """(format, where that is written) of a transformer folder that is already quantised, else None.

    Raises:
        ConfigError: it is quantised in a way that is not known here, or its files contradict each other.
    """
    tensors = tensor_index(folder)
    found = format_of(tensors, folder)
    declared = _declared(folder)
    if declared is not None and found != declared:
        raise ConfigError(
            f"{folder / 'config.json'} says that the weights are {declared} (quantization_config), but the safetensors "
            f"files beside it hold {found or 'full precision'}: download the checkpoint again, or mend its config.json"
        )
    if found is None:
        return None
    return found, "quantization_config of its config.json" if declared else "dtypes of its safetensors files"


def file_format(path: Path) -> tuple[str, str] | None:
    """The same of a transformer in one file.

    Raises:
        ConfigError: it is not there, broken, or quantised in a way that is not known here.
    """
    found = format_of(header(path), path)
    return None if found is None else (found, "dtypes of its tensors")


def check_installed(model: ModelConfig, checkpoint: Path | None) -> None:
    """Refuse weights that are, or are to be, in a format of bitsandbytes where that is not installed: the transformer's
    in 4 bits, and any of its formats in the encoders, which transformers loads.

    Args:
        checkpoint: its folder; None where it is not on this machine yet.

    Raises:
        ConfigError: names what asks for it.
    """
    if model.transformer_path is not None and model.transformer_path.suffix == GGUF and find_spec("gguf") is None:
        raise ConfigError(
            f"model.transformer_file={model.transformer_file!r} needs gguf, not installed here: pip install "
            "'qwen-image-finetune[gguf]', or name a .safetensors"
        )
    if find_spec("bitsandbytes") is not None:
        return
    wanted_by = None
    if checkpoint is not None:
        format = base_precision(checkpoint / "transformer", model).format
        for file in sorted(checkpoint.glob("*/config.json")):
            declared = _read_json(file).get("quantization_config") or {}
            if file.parent.name != "transformer" and declared.get("quant_method") == "bitsandbytes":
                wanted_by = f"{file.parent}, stored in one of its formats,"
    else:
        format = model.asked_format
    if format in FOUR_BITS:
        wanted_by = f"model.quantize={shown(model.quantize)}" if model.asked_format else f"a checkpoint in {format}"
    if wanted_by is not None:
        raise ConfigError(f"{wanted_by} needs {BITSANDBYTES}")


def tensor_index(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder in diffusers layout, in the order of its shards.

    Raises:
        ConfigError: files are missing or broken.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in _shards(folder):
        tensors |= header(path)
    return tensors


def header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file.

    Raises:
        ConfigError: the file is missing or broken.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ConfigError(f"{path} is missing: download the checkpoint again")
    if path.suffix == GGUF:
        from qwen_image_finetune.levers.gguf_file import gguf_header

        return gguf_header(path)
    try:
        with safe_open(path, framework="np") as file:
            entries = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            return {
                key: StoredTensor(path, entry.get_dtype(), tuple(entry.get_shape())) for key, entry in entries.items()
            }
    except SafetensorError as error:
        raise ConfigError(f"{path} is broken ({error}): download the checkpoint again") from error


def refuse_scaled_fp8(folder: Path) -> None:
    """Raise ConfigError for a model that its own library would load wrongly: it takes e4m3 numbers without scales.

    Text encoders and the VAE are loaded by transformers and diffusers: in the precision that bitsandbytes gave them, or
    widened from plain e4m3, which is exact. Scales beside e4m3 weights they leave aside with no more than a warning.
    """
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                if key.endswith(FP8_SCALES):
                    raise ConfigError(
                        f"{path} holds fp8 with scales ({key}), which is read for the transformer alone; put this part "
                        "in full precision, plain e4m3, or a bitsandbytes format in its place"
                    )


def _shards(folder: Path) -> list[Path]:
    listed = folder / f"{WEIGHTS}.index.json"
    names = sorted(set(_read_json(listed)["weight_map"].values())) if listed.is_file() else [WEIGHTS]
    return [folder / name for name in names]


def format_of(tensors: dict[str, StoredTensor], folder: Path) -> str | None:
    """fp8, int8, nf4 or fp4 by the dtypes and names of tensors; None of full precision, to which GGUF is widened.

    Args:
        folder: or file that they lie in.

    Raises:
        ConfigError: they are e5m2.
    """
    kinds = {entry.dtype for entry in tensors.values()}
    if "F8_E5M2" in kinds:
        raise ConfigError(f"the weights in {folder} are e5m2; of the 8-bit floats only e4m3 can be used here")
    for format in ("nf4", "fp4"):
        if any(key.endswith(PACKED + format) for key in tensors):
            return format
    if any(key.endswith(".SCB") for key in tensors):
        return "int8"
    return "fp8" if "F8_E4M3" in kinds else None


def _declared(folder: Path) -> str | None:
    """What quantization_config in config.json says, None where there is none."""
    config: dict[str, Any] | None = _read_json(folder / "config.json").get("quantization_config")
    if not config:
        return None
    method = config.get("quant_method")
    if method != "bitsandbytes":
        raise ConfigError(
            f"{folder / 'config.json'}: weights quantised by {method!r} cannot be used here; known are bitsandbytes "
            "(nf4, fp4, int8) and e4m3 weights with or without scales"
        )
    if config.get("load_in_8bit"):
        return "int8"
    return str(config.get("bnb_4bit_quant_type", "fp4"))  # bitsandbytes' own default


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): download the checkpoint again") from error
    return content
