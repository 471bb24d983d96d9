"""One reader for every verb: names of real programs are resolved by what they end in, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_image_finetune.families import get_family
from qwen_image_finetune.lora.export import export
from qwen_image_finetune.lora.files import load_lora
from qwen_image_finetune.lora.header import LoraFileError
from qwen_image_finetune.lora.names import Places
from qwen_image_finetune.lora.reading import read_lora
from tests.levers.tiny_transformers import run, tiny_transformer

NAMINGS = {"flux": get_family("FluxKontext").naming, "qwen": get_family("QwenImageEdit").naming}
MODULES = {
    "flux": ("transformer_blocks.1.attn.to_q", "single_transformer_blocks.0.proj_mlp", "x_embedder"),
    "qwen": ("transformer_blocks.1.attn.to_q", "transformer_blocks.0.img_mlp.net.2", "norm_out.linear"),
}  # fmt: skip
AUTHORS = ("double_blocks.0.img_attn.proj", "single_blocks.1.linear2", "time_in.in_layer")  # of FLUX.1
DOTTED = (
    "", "transformer.", "transformer.transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.",
    "base_model.model.transformer.", "unet.", "pipe.dit.", "module.", "_orig_mod.", "diffusion_model._orig_mod.",
)  # fmt: skip
FLAT = ("lora_unet_", "lora_transformer_", "lycoris_", "lora_prior_unet_", "transformer.lora_unet_", "")
ENDINGS = (
    ("lora_A.weight", "lora_B.weight"), ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_A.my-adapter.2.weight", "lora_B.my-adapter.2.weight"), ("lora_down.weight", "lora_up.weight"),
    ("lora.down.weight", "lora.up.weight"),
)  # fmt: skip


def factors(model: Any, module: str, rank: int = 2) -> tuple[Tensor, Tensor]:
    """(down, up) of one module, the same at every call."""
    generator = torch.Generator().manual_seed(len(module))
    layer = model.get_submodule(module)
    down = torch.randn(rank, layer.in_features, generator=generator)
    return down, torch.randn(layer.out_features, rank, generator=generator)


def written(path: Path, model: Any, modules: tuple[str, ...], name: str = "transformer.{}", **more: Tensor) -> Path:
    """A file with a layer for each module; {} of `name` stands for it."""
    state = dict(more)
    for module in modules:
        down, up = factors(model, module)
        state |= {f"{name.format(module)}.lora_A.weight": down, f"{name.format(module)}.lora_B.weight": up}
    save_file(state, path)
    return path


@pytest.mark.parametrize("family", NAMINGS)
def test_names_of_programs_are_resolved_by_what_they_end_in(family: str, tmp_path: Path) -> None:
    """By a transformer and, as an export does, by the list of the published modules alone."""
    naming, model = NAMINGS[family], tiny_transformer(family)
    own = list(dict.fromkeys(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)))
    names = [(f"{prefix}{module}", module) for prefix in DOTTED for module in MODULES[family]]
    names += [(f"{prefix}{module.replace('.', '_')}", module) for prefix in FLAT for module in MODULES[family]]
    if family == "flux":
        names += [(f"{prefix}{name}", name) for prefix in DOTTED for name in AUTHORS]
        names += [(f"{prefix}{name.replace('.', '_')}", name) for prefix in FLAT for name in AUTHORS]
    for modules in (own, naming.modules):
        places = Places(modules, naming.native)
        assert [name for name, module in names if places.find(name) != module] == []
    for down, up in ENDINGS:
        key = f"diffusion_model.{MODULES[family][0]}"
        pair = factors(model, MODULES[family][0])
        save_file({f"{key}.{down}": pair[0], f"{key}.{up}": pair[1]}, tmp_path / "x.safetensors")
        assert list(read_lora(tmp_path / "x.safetensors", naming).layers) == [MODULES[family][0]]


@pytest.mark.parametrize("family, name", [
    ("flux", "transformer.transformer_blocks.0.attn.to_qq"), ("flux", "transformer_blocks.19.attn.to_q"),
    ("flux", "lora_unet_single_blocks_38_linear1"), ("flux", "blocks.0.attn.a_to_qkv"),  # DiffSynth's name
    ("flux", "single_blocks.0.to_qkv_mlp"), ("flux", "lora_unet_double_blocks_0_txt_attn_qkvo"),
    ("flux", "diffusion_model.transformer_blocks.0.img_mlp.net.2"),  # of Qwen
    ("flux", "controlnet.transformer_blocks.0.attn.to_q"), ("qwen", "transformer_blocks.60.attn.to_q"),
    ("qwen", "diffusion_model.double_blocks.0.img_attn.qkv"), ("qwen", "single_transformer_blocks.0.attn.to_q"),
    ("qwen", "lora_unet_single_transformer_blocks_0_attn_to_q"), ("qwen", "lora_te_transformer_blocks_0_attn_to_q"),
])  # fmt: skip
def test_modules_that_there_are_not_are_refused_by_every_verb(family: str, name: str, tmp_path: Path) -> None:
    source = tmp_path / "x.safetensors"
    save_file({f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)}, source)
    for dialect in ("diffusers", "comfy", "kohya"):
        with pytest.raises(LoraFileError, match="2 of 2 keys have no place in this transformer"):
            export(source, tmp_path / "out.safetensors", dialect, NAMINGS[family])  # type: ignore[arg-type]
    with pytest.raises(LoraFileError, match="2 of 2 keys have no place in this transformer"):
        load_lora(tiny_transformer(family), source, NAMINGS[family])
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_refusal_names_what_is_nearest_and_no_kind_that_the_file_is_not(tmp_path: Path) -> None:
    name = "model.diffusion_model.double_blocks.0.txt_attn_qkv"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(96, 2)},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(LoraFileError) as error:
        read_lora(tmp_path / "x.safetensors", NAMINGS["flux"])
    assert "the nearest is double_blocks.0.txt_attn.qkv)" in str(error.value)
    assert "weight differences" not in str(error.value)


def test_a_module_that_is_changed_twice_is_refused(tmp_path: Path) -> None:
    model, module = tiny_transformer("flux"), "transformer_blocks.0.attn.to_out.0"
    down, up = factors(model, module)
    fused = {"double_blocks.0.img_attn.proj.lora_A.weight": down, "double_blocks.0.img_attn.proj.lora_B.weight": up}
    with pytest.raises(LoraFileError, match=r"changes transformer_blocks\.0\.attn\.to_out\.0 a second time"):
        read_lora(written(tmp_path / "x.safetensors", model, (module,), **fused), NAMINGS["flux"])


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "alpha"])
def test_numbers_that_are_not_finite_are_refused_by_name(
    number: float, dtype: torch.dtype, part: str, tmp_path: Path
) -> None:
    module = "transformer_blocks.0.attn.to_q"
    source = written(tmp_path / "x.safetensors", tiny_transformer("qwen"), (module,))
    state = {key: tensor.to(dtype) for key, tensor in load_file(source).items()}
    state[f"transformer.{module}.alpha"] = torch.tensor(2.0)
    state[f"transformer.{module}.{part}"].view(-1)[-1] = number
    save_file(state, source)
    with pytest.raises(LoraFileError, match=rf"x\.safetensors: transformer\.{module}\.{part} holds 1 numbers that are"):
        read_lora(source, NAMINGS["qwen"])


# --- alpha beside the weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_a_folder_of_peft_means_what_peft_takes_it_for(rank_stabilised: bool, tmp_path: Path) -> None:
    """Written by peft itself: alpha stands in adapter_config.json alone, with a pattern."""
    described = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["to_q", "to_k"], alpha_pattern={"to_k": 3}, use_rslora=rank_stabilised,
        init_lora_weights=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = peft.get_peft_model(tiny_transformer("qwen"), described)
    model.save_pretrained(tmp_path / "peft")
    ours = tiny_transformer("qwen")
    load_lora(ours, tmp_path / "peft", NAMINGS["qwen"])
    torch.testing.assert_close(run(ours), run(model.get_base_model()))
    export(tmp_path / "peft", tmp_path / "out.safetensors", "comfy", NAMINGS["qwen"])
    exported = read_lora(tmp_path / "out.safetensors", NAMINGS["qwen"]).layers
    wanted = {"to_q": 8.0, "to_k": 3.0}
    scales = {ending: alpha / 4 ** (0.5 if rank_stabilised else 1) for ending, alpha in wanted.items()}
    assert all(layer.scale == pytest.approx(scales[name.rpartition(".")[2]]) for name, layer in exported.items())


def test_what_is_assumed_about_alpha_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, module = tiny_transformer("qwen"), "transformer_blocks.0.attn.to_q"
    source = written(tmp_path / "x.safetensors", model, (module,))
    for assumed, config in ((True, None), (False, {"lora_alpha": 8}), (True, {"r": 2})):
        (tmp_path / "adapter_config.json").unlink(missing_ok=True)
        if config is not None:
            (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        load_lora(tiny_transformer("qwen"), tmp_path, NAMINGS["qwen"])
        said = capsys.readouterr().out
        assert (f"note: {source}: the alpha of 1 layers is written neither" in said) == assumed
        notes = export(source, tmp_path / "out" / "y.safetensors", "comfy", NAMINGS["qwen"], overwrite=True)
        assert any("is taken for the rank" in note for note in notes) == assumed
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": "8"}')
    with pytest.raises(LoraFileError, match=r"adapter_config\.json: lora_alpha is '8'; it must be a number"):
        read_lora(source, NAMINGS["qwen"])
