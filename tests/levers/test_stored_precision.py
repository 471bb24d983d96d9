"""Recognition of quantised checkpoints from their own files, and contradictions with model.quantize."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qwen_image_finetune.config import ConfigError, ModelConfig
from qwen_image_finetune.levers import stored_precision
from qwen_image_finetune.levers.stored_precision import WEIGHTS, Precision, base_precision, stored_format, tensor_index

E4M3 = torch.float8_e4m3fn
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
SAYS_NF4 = "says that the weights are nf4 (quantization_config), but the safetensors files beside it hold "
PLAIN = {"a.weight": torch.zeros(2, 2)}
FP8 = {"a.weight": torch.zeros(2, 2, dtype=E4M3)}


def packed(code: str) -> dict[str, Tensor]:
    zeros = torch.zeros(2, 1, dtype=torch.uint8)
    about = f"a.weight.quant_state.bitsandbytes__{code}"
    return {"a.weight": zeros, "a.weight.absmax": torch.ones(1), about: zeros.clone()}


def eight_bits() -> dict[str, Tensor]:
    return {"a.weight": torch.zeros(2, 2, dtype=torch.int8), "a.SCB": torch.ones(2)}


def write(folder: Path, tensors: dict[str, Tensor], quantization_config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    about = {} if quantization_config is None else {"quantization_config": quantization_config}
    (folder / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"} | about))
    save_file(tensors, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize(
    ("tensors", "config", "expected"),
    [
        (PLAIN, None, None),
        (PLAIN, {}, None),
        (FP8, None, "fp8"),
        (PLAIN | {"b.weight": torch.zeros(2, 2, dtype=E4M3)}, None, "fp8"),
        (packed("nf4"), NF4, "nf4"),
        (packed("nf4"), None, "nf4"),
        (packed("fp4"), FP4, "fp4"),
        (eight_bits(), INT8, "int8"),
    ],
)  # fmt: skip
def test_recognised_from_its_files(
    tensors: dict[str, Tensor], config: dict[str, Any] | None, expected: str | None, tmp_path: Path
) -> None:
    """Whatever the folder is called."""
    found = stored_format(write(tmp_path / "model-nf4-fp8-fp16", tensors, config))
    assert (found and found[0]) == expected


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (PLAIN, NF4, SAYS_NF4 + "full precision"),
        (packed("fp4"), NF4, SAYS_NF4 + "fp4"),
        (PLAIN, {"quant_method": "torchao"}, "weights quantised by 'torchao' cannot be used here"),
        (PLAIN, {"bits": 4}, "weights quantised by None cannot be used here"),
        ({"a.weight": torch.zeros(2, 2, dtype=torch.float8_e5m2)}, None, "are e5m2; of the 8-bit floats only e4m3"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(
    tensors: dict[str, Tensor], config: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        stored_format(write(tmp_path, tensors, config))


def model(quantize: Any, **other: Any) -> ModelConfig:
    return ModelConfig(pretrained_model_name_or_path="x", quantize=quantize, **other)


@pytest.mark.parametrize(
    ("tensors", "quantize", "expected"),
    [
        (PLAIN, False, Precision(None, False, "")),
        (PLAIN, True, Precision("fp8", False, "model.quantize")),
        (PLAIN, "nf4", Precision("nf4", False, "model.quantize")),
        (FP8, False, Precision("fp8", True, "dtypes of its safetensors files")),
        (FP8, True, Precision("fp8", True, "dtypes of its safetensors files")),
        (packed("nf4"), "nf4", Precision("nf4", True, "dtypes of its safetensors files")),
    ],
)  # fmt: skip
def test_precision_of_the_base(tensors: dict[str, Tensor], quantize: Any, expected: Precision, tmp_path: Path) -> None:
    assert base_precision(write(tmp_path, tensors), model(quantize)) == expected


@pytest.mark.parametrize(
    ("tensors", "quantize", "written"),
    [(FP8, "nf4", "'nf4'"), (packed("fp4"), True, "true"), (packed("fp4"), "nf4", "'nf4'")],
)
def test_contradiction_names_both(tensors: dict[str, Tensor], quantize: Any, written: str, tmp_path: Path) -> None:
    found = "fp8" if tensors is FP8 else "fp4"
    message = f"model.quantize={written}, but the weights in {tmp_path} are already {found} (dtypes"
    with pytest.raises(ConfigError, match=re.escape(message)):
        base_precision(write(tmp_path, tensors), model(quantize))


def test_a_quantised_checkpoint_cannot_be_fully_fine_tuned(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.lora=null, but the weights in .* are fp8"):
        base_precision(write(tmp_path, FP8), model(False, lora=None))
    assert base_precision(tmp_path).format == "fp8", "without a configuration it is what it is"


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    """A file that the index does not name, another variant say, is not looked at."""
    write(tmp_path, FP8)
    save_file(PLAIN, tmp_path / "one.safetensors")
    save_file({"b.weight": torch.zeros(3)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}}
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    found = tensor_index(tmp_path)
    assert {name: (entry.file.name, entry.dtype, entry.shape) for name, entry in found.items()} == {
        "a.weight": ("one.safetensors", "F32", (2, 2)),
        "b.weight": ("two.safetensors", "F32", (3,)),
    }
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"two\.safetensors is missing"):
        tensor_index(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}garbage"])
def test_broken_files_are_named(content: bytes, tmp_path: Path) -> None:
    write(tmp_path, PLAIN)
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{WEIGHTS} is broken"):
        tensor_index(tmp_path)
    (tmp_path / "config.json").write_text("{")
    save_file(PLAIN, tmp_path / WEIGHTS)
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        stored_format(tmp_path)


def test_recognition_needs_no_torch(tmp_path: Path) -> None:
    """It is part of every dry run."""
    write(tmp_path, FP8)
    program = (
        "import sys; from pathlib import Path; from qwen_image_finetune.levers.stored_precision import stored_format;"
        f"print(stored_format(Path({str(tmp_path)!r}))[0], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["fp8", "False"]


@pytest.mark.parametrize("stored", [NF4, INT8, None])
def test_what_bitsandbytes_wrote_is_refused_without_it(
    stored: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoders in any of its formats, which transformers loads with it; the transformer in four bits."""
    write(tmp_path / "transformer", PLAIN)
    write(tmp_path / "text_encoder", PLAIN, stored)
    model = ModelConfig(pretrained_model_name_or_path=str(tmp_path))
    stored_precision.check_installed(model, tmp_path)  # it is installed where the tests run
    monkeypatch.setattr(stored_precision, "find_spec", lambda name: None)
    if stored is None:
        stored_precision.check_installed(model, tmp_path)
    else:
        with pytest.raises(ConfigError, match=r"text_encoder, stored in .* needs bitsandbytes.*pip install"):
            stored_precision.check_installed(model, tmp_path)
    write(tmp_path / "text_encoder", PLAIN)
    write(tmp_path / "transformer", packed("nf4"), NF4)
    with pytest.raises(ConfigError, match="a checkpoint in nf4 needs bitsandbytes"):
        stored_precision.check_installed(model, tmp_path)
    with pytest.raises(ConfigError, match="quantize='fp4' needs bitsandbytes"):
        stored_precision.check_installed(model.model_copy(update={"quantize": "fp4"}), None)
