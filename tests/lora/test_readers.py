"""The table of programs that read our files, held by their own rules: diffusers' is asked, others' are written down."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qwen_image_finetune.config import LoraConfig
from qwen_image_finetune.families import get_family
from qwen_image_finetune.lora import adapters
from qwen_image_finetune.lora.dialects import under_authors_names, write_state
from qwen_image_finetune.lora.export import export
from qwen_image_finetune.lora.files import save_lora
from qwen_image_finetune.lora.layers import Layer
from qwen_image_finetune.lora.names import flattened
from tests.kin import EDITING
from tests.levers.tiny_transformers import disturb, tiny_transformer

DIALECTS = ("diffusers", "comfy", "kohya")


@cache
def everything(name: str) -> dict[str, Layer]:
    """A layer of rank 1 on every linear layer of the published model, as high as that and one wide."""
    layers = {}
    for model in get_family(name).published_transformers():
        for module, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                layers[module] = Layer(torch.ones(1, 1), torch.ones(layer.out_features, 1), 1.0)
    return layers


def modules_read(program: str, dialect: str, name: str) -> set[str]:
    """Diffusers' names of what a program takes of a file in which everything is."""
    family, layers = get_family(name), everything(name)
    state = write_state(layers, family.lora_names, dialect)
    homes = homes_of(name)
    if program == "diffusers" and not hasattr(family.pipeline, "lora_state_dict"):
        return set()
    if program == "diffusers":
        try:
            read = family.pipeline.lora_state_dict(dict(state))
        except ValueError:  # FLUX.2: an alpha beside the weights is no key that it knows
            return set()
        read = read[0] if isinstance(read, tuple) else read
        if not all("lora" in key for key in read):  # load_lora_weights refuses the file
            return set()
        keys = [key for key in read if key.startswith("transformer.") or not family.lora_names]
        return {re.sub(r"^transformer\.|\.lora_[AB]\.weight$", "", key) for key in keys} & layers.keys()
    stems = {re.sub(r"\.(lora_[AB]\.weight|lora_(down|up)\.weight|alpha)$", "", key) for key in state}
    if program == "ComfyUI":  # comfy/lora.py: model_lora_keys_unet
        # Only of models whose maps it has: JoyImage's are not among them, and FLUX.1's serves for LongCat.
        mapped = set() if name.startswith("JoyImage") else set(layers)
        if name == "LongCatImageEdit":
            mapped = {module for module in layers if not module.startswith("time_embed.")}
        flux = {f"transformer.{module}": {module} for module in mapped}
        known = {f"diffusion_model.{name}": parts for name, parts in homes.items()}
        known |= {f"lora_unet_{flattened(name)}": parts for name, parts in homes.items()}
        return set().union(*(({**known, **flux}).get(stem, set()) for stem in stems))
    # kohya's tools: modules named lora_unet_..., from the blocks; sd-scripts also from five embedders
    if program == "musubi-tuner" and dialect != "kohya":  # convert_lora.py: a prefix goes, dots become underscores
        stems = {"lora_unet_" + flattened(stem.split(".", 1)[1]) for stem in stems}
    if (
        program == "sd-scripts" and dialect == "diffusers"
    ):  # convert_flux_lora.py: from diffusers' names to the authors'
        stems = {f"lora_unet_{flattened(name)}" for name in homes if "blocks" in name}
    prefixes: tuple[str, ...] = ("lora_unet_double_blocks", "lora_unet_single_blocks")
    if not family.lora_names:
        prefixes = ("lora_unet_transformer_blocks",)
    if program == "sd-scripts":
        prefixes += tuple(f"lora_unet_{name}" for name in ("img_in", "time_in", "vector_in", "guidance_in", "txt_in"))
    known = {f"lora_unet_{flattened(name)}": parts for name, parts in homes.items()}
    return set().union(*(known.get(stem, set()) for stem in stems if stem.startswith(prefixes)))


@cache
def homes_of(name: str) -> dict[str, set[str]]:
    """diffusers' modules under each name of the authors."""
    homes: dict[str, set[str]] = {}
    for module, layer in everything(name).items():
        [authors] = under_authors_names({module: layer}, get_family(name).lora_names)
        homes.setdefault(authors, set()).add(module)
    return homes


@pytest.mark.parametrize("name", EDITING)
def test_the_table_says_what_programs_read(name: str) -> None:
    family, layers = get_family(name), everything(name)
    homes = homes_of(name)
    for reader in family.lora_readers:
        written = layers if reader.dialect == "diffusers" else homes
        left = {one for one in written if reader.leaves is not None and re.fullmatch(reader.leaves, one)}
        expected = set(written) - left
        if reader.dialect != "diffusers":
            expected = {part for one in expected for part in homes[one]}
        found = modules_read(reader.program, reader.dialect, name)
        assert found == expected, f"{reader}: {sorted(found ^ expected)[:5]}"
    assert {reader.dialect for reader in family.lora_readers} == set(DIALECTS)


def test_what_programs_leave_is_said_at_an_export(tmp_path: Path) -> None:
    """Of tensors, three a layer, kohya's tools leave 6 and 30 of 942 of FLUX.1, and 18 of 2538 of Qwen-Image."""
    for name, program, left, layers in (
        ("FluxKontext", "sd-scripts", 2, 314), ("FluxKontext", "musubi-tuner", 10, 314),
        ("QwenImageEdit", "musubi-tuner", 6, 846),
    ):  # fmt: skip
        family = get_family(name)
        names = list(under_authors_names(everything(name), family.lora_names))
        [words] = [r.words(names) for r in family.lora_readers if (r.program, r.dialect) == (program, "kohya")]
        assert f"leaves {left} of its {layers} layers" in words
        model = tiny_transformer("flux" if name == "FluxKontext" else "qwen")
        config = LoraConfig(r=2, target_modules="all-linear")
        adapters.add_adapter(model, config, seed=0)
        save_lora(tmp_path / "x.safetensors", model, config, {})
        said = export(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "kohya", family.naming, overwrite=True)
        assert any(line.startswith(f"{program} reads it, but leaves {left} of its ") for line in said)
    said = export(
        tmp_path / "x.safetensors", tmp_path / "y.safetensors", "comfy", get_family(name).naming, overwrite=True
    )
    assert "ComfyUI reads all of it" in said


# --- the file of a checkpoint, whatever alpha ---------------------------------------------------------------------


def comfy_scale(state: dict[str, Tensor], stem: str, rank: int) -> float:
    """comfy/weight_adapter/lora.py: alpha / rank where there is an alpha beside the weights, else 1."""
    alpha = state.get(f"{stem}.alpha")
    return 1.0 if alpha is None else float(alpha) / rank


def kohya_scale(state: dict[str, Tensor], stem: str, rank: int) -> float:
    """convert_lora.py and convert_flux_lora.py: where there is no alpha, it is set to the rank."""
    return float(state.get(f"{stem}.alpha", torch.tensor(float(rank)))) / rank


@pytest.mark.parametrize("family", ["flux", "qwen"])
@pytest.mark.parametrize("rank, alpha", [(16, 32), (16, 16), (4, 6), (8, 1)])
def test_one_file_changes_every_weight_alike_in_every_program(
    family: str, rank: int, alpha: int, tmp_path: Path
) -> None:
    """diffusers reads alpha in the metadata, ComfyUI and kohya's tools beside the weights or not at all."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear")
    model = tiny_transformer(family)
    adapters.add_adapter(model, config, seed=1)
    disturb(model)
    wanted = {module: layer.delta() for module, layer in adapters.adapter_layers(model, "default").items()}
    save_lora(tmp_path / "pytorch_lora_weights.safetensors", model, config, {})
    state = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    for module, delta in wanted.items():
        stem = f"transformer.{module}"
        product = state[f"{stem}.lora_B.weight"] @ state[f"{stem}.lora_A.weight"]
        for scale in (comfy_scale, kohya_scale):
            torch.testing.assert_close(scale(state, stem, rank) * product, delta, atol=1e-6, rtol=1e-5)
    other: Any = tiny_transformer(family)
    other.load_lora_adapter(tmp_path / "pytorch_lora_weights.safetensors", use_safetensors=True)  # diffusers' own
    found = {module: layer.delta() for module, layer in adapters.adapter_layers(other, "default_0").items()}
    assert found.keys() == wanted.keys()
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
