"""A transformer that was tuned as a whole, as the one file that ComfyUI loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_flux_transformer_checkpoint_to_diffusers,
)
from safetensors import safe_open
from safetensors.torch import load_file

from qwen_image_finetune.command.cli import main
from qwen_image_finetune.families import get_family
from qwen_image_finetune.lora.export import authors_state, export
from qwen_image_finetune.lora.header import LoraFileError
from tests.levers.tiny_transformers import tiny_transformer

NAMINGS = {"flux": get_family("FluxKontext").naming, "qwen": get_family("QwenImageEdit").naming}


def tuned(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A checkpoint as training leaves it, in several shards."""
    model = tiny_transformer(family, dtype)
    model.save_pretrained(folder / "transformer", max_shard_size="30KB")
    return model


def test_diffusers_reads_authors_names_back_to_the_same_weights() -> None:
    """Its own way from the published file of FLUX.1 to its layout, which knows the heights of the published model."""
    with init_empty_weights():
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=2, guidance_embeds=True)
    generator = torch.Generator().manual_seed(1)
    state = {key: torch.randn(tensor.shape[0], *(1,) * (tensor.ndim - 1), generator=generator)
             for key, tensor in model.state_dict().items()}  # fmt: skip
    written = authors_state(state, NAMINGS["flux"].native, Path("x"))
    assert not [key for key in written if "transformer_blocks" in key or ".to_q" in key]
    back = convert_flux_transformer_checkpoint_to_diffusers(dict(written))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    del state["transformer_blocks.0.attn.to_k.weight"]
    with pytest.raises(LoraFileError, match=r"double_blocks\.0\.img_attn\.qkv\.weight is made of .*; missing are"):
        authors_state(state, NAMINGS["flux"].native, Path("x"))


def test_diffusers_reads_authors_names_of_flux_2_back_too() -> None:
    with init_empty_weights():
        model = Flux2Transformer2DModel(num_layers=1, num_single_layers=1)
    generator = torch.Generator().manual_seed(1)
    state = {key: torch.randn(tensor.shape[0], *(1,) * (tensor.ndim - 1), generator=generator)
             for key, tensor in model.state_dict().items()}  # fmt: skip
    back = convert_flux2_transformer_checkpoint_to_diffusers(
        authors_state(state, get_family("Flux2").naming.native, Path("x"))
    )
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_one_file_with_every_weight_as_it_was_saved(family: str, tmp_path: Path) -> None:
    model = tuned(tmp_path / "v0" / "checkpoint-1-10", family)
    assert len(list((tmp_path / "v0").rglob("*.safetensors"))) > 1
    name = {"flux": "FluxKontext", "qwen": "QwenImageEdit"}[family]
    assert main(["export", str(tmp_path / "v0"), str(tmp_path / "x.safetensors"), "--family", name]) == 0
    state = load_file(tmp_path / "x.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in state.values()) == sum(p.numel() for p in model.parameters())
    if family == "qwen":  # its authors have diffusers' names
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert json.loads(json.dumps(file.metadata())) == {"format": "pt"}
    with pytest.raises(LoraFileError, match="already a folder as diffusers loads it"):
        export(tmp_path / "v0", tmp_path / "y.safetensors", "diffusers", NAMINGS[family])
