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


def test_the_lines_of_an_ordinary_pipeline() -> None:
    first = "import torch\nfrom diffusers import DiffusionPipeline\n\n"
    assert pipeline_words("FluxKontext", "a/b") == pipeline_words(None, "a/b")
    assert pipeline_words(None, "a/b") == (
        f'{first}pipe = DiffusionPipeline.from_pretrained("a/b", dtype=torch.bfloat16).to("cuda")'
    )
    assert pipeline_words(None, "a/b", "c/d").endswith(
        'transformer = AutoModel.from_pretrained("c/d", subfolder="transformer", dtype=torch.bfloat16)\n'
        'pipe = DiffusionPipeline.from_pretrained("a/b", transformer=transformer, dtype=torch.bfloat16).to("cuda")'
    )


def test_the_lines_of_modular_blocks_make_the_pipeline(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """With a LoRA, on a transformer of one's own."""
    name, folder = "Flux3Klein", tiny_checkpoints["Flux3Klein"]
    file = tmp_path / "pytorch_lora_weights.safetensors"
    expected = trained(name, folder, file, seed=1)
    model: Any = get_family(name).transformer.from_pretrained(folder, subfolder="transformer")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    model.save_pretrained(tmp_path / "mine/transformer")
    plain, words = (pipeline_words(family_of(file), str(folder), mine) for mine in (None, str(tmp_path / "mine")))
    assert set(plain.split("\n")) <= set(words.replace("AutoModel, ", "").split("\n"))
    found: dict[str, Any] = {}
    exec(f"{words}\n{loading_words({}, str(file), file)}".replace('"cuda"', '"cpu"'), found)
    pipe = found["pipe"]
    assert type(pipe).__name__ == FAMILIES[name].pipeline and pipe.vae is not None and pipe.text_encoder is not None
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16
    layers = {key: layer for key, layer in pipe.transformer.named_modules() if isinstance(layer, LoraLayer)}
    assert layers.keys() == expected.keys()
    assert all((layer.get_base_layer().weight == 1).all() for layer in layers.values())
