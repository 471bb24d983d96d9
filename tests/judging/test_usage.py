"""What reports and cards print of a LoRA's use, run as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModularPipeline
from peft.tuners.lora import LoraLayer

from qwen_image_finetune.config import LoraConfig
from qwen_image_finetune.families import FAMILIES, get_family
from qwen_image_finetune.judging.usage import family_of, loading_words, pipeline_words
from qwen_image_finetune.lora import adapters
from qwen_image_finetune.lora.files import save_lora

UNREAD = [name for name, entry in FAMILIES.items() if not entry.loads_loras]


def test_the_registry_knows_what_pipelines_can() -> None:
    for name, entry in FAMILIES.items():
        assert entry.loads_loras == hasattr(get_family(name).pipeline, "load_lora_weights"), name
        assert entry.modular == issubclass(get_family(name).pipeline, ModularPipeline), name


def trained(name: str, checkpoint: Path, file: Path, seed: int) -> dict[str, torch.Tensor]:
    """A LoRA as training writes it, and what it adds to each weight."""
    family = get_family(name)
    model: Any = family.transformer.from_pretrained(checkpoint, subfolder="transformer")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=list(family.adapter_targets))
    adapters.add_adapter(model, config, seed=seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    save_lora(file, model, config, {"qif.family": name})
    return {module: layer.delta() for module, layer in adapters.adapter_layers(model, "default").items()}


@pytest.mark.parametrize("name", UNREAD)
def test_peft_loads_what_diffusers_does_not(name: str, tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Alone, and on top of another at the strength that it had in training."""
    family, folder = get_family(name), tiny_checkpoints[name]
    files = [tmp_path / "under.safetensors", tmp_path / "pytorch_lora_weights.safetensors"]
    below, above = (trained(name, folder, file, seed) for seed, file in enumerate(files))
    for under, expected in (
        ([], above),
        ([{"file": str(files[0]), "strength": 0.5}], {key: 0.5 * below[key] + above[key] for key in above}),
    ):
        pipe: Any = family.pipeline.from_pretrained(folder, text_encoder=None, vae=None)
        words = loading_words({"model.base_loras": under}, str(files[1]), files[1])
        assert "load_lora_weights" not in words
        exec(words, {"pipe": pipe})
        layers = {key: layer for key, layer in pipe.transformer.named_modules() if isinstance(layer, LoraLayer)}
        assert layers.keys() == expected.keys()
        for module, layer in layers.items():
            found = sum(
                layer.scaling[one] * layer.lora_B[one].weight @ layer.lora_A[one].weight
                for one in layer.active_adapters
            )
            torch.testing.assert_close(found, expected[module], rtol=1e-5, atol=1e-5)
    hub = loading_words({}, "somebody/my-lora", files[1])
    assert 'hf_hub_download("somebody/my-lora", "pytorch_lora_weights.safetensors")' in hub
    compile(hub, "hub", "exec")


def run(words: str) -> Any:
    """The pipeline that printed lines make, on the CPU."""
    found: dict[str, Any] = {}
    exec(words.replace('"cuda"', '"cpu"'), found)
    return found["pipe"]


@pytest.mark.parametrize("name", ["FluxKontext", "Flux3Klein"])
def test_the_printed_lines_make_the_pipeline(name: str, tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """One of diffusers' ordinary pipelines, and one of modular blocks; with a LoRA, and with another transformer."""
    family, folder, file = get_family(name), tiny_checkpoints[name], tmp_path / "pytorch_lora_weights.safetensors"
    expected = trained(name, folder, file, seed=1)
    words = f"{pipeline_words(family_of(file), str(folder))}\n{loading_words({}, str(file), file)}"
    pipe = run(words)
    assert type(pipe).__name__ == FAMILIES[name].pipeline and pipe.vae is not None and pipe.text_encoder is not None
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16
    layers = {key: layer for key, layer in pipe.transformer.named_modules() if isinstance(layer, LoraLayer)}
    assert layers.keys() == expected.keys()

    model: Any = family.transformer.from_pretrained(folder, subfolder="transformer")
    torch.nn.init.ones_(next(model.parameters()))
    model.save_pretrained(tmp_path / "mine/transformer")
    pipe = run(pipeline_words(name, str(folder), str(tmp_path / "mine")))
    assert pipe.transformer.dtype == torch.bfloat16 and bool((next(pipe.transformer.parameters()) == 1).all())
    assert pipe.vae is not None and pipe.text_encoder is not None
