"""LoRA files: what diffusers makes of ours, what we make of others', and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxKontextPipeline, QwenImageEditPipeline
from diffusers.loaders.lora_conversion_utils import swap_scale_shift
from huggingface_hub import constants
from peft.utils import get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_image_finetune.config import Config, ConfigError, LoraConfig
from qwen_image_finetune.disk.files import clean_leftovers
from qwen_image_finetune.disk.versions import LORA_WEIGHTS
from qwen_image_finetune.families import get_family
from qwen_image_finetune.lora import adapters
from qwen_image_finetune.lora import export as exporting
from qwen_image_finetune.lora import files as lora_files
from qwen_image_finetune.lora.export import check_same, export
from qwen_image_finetune.lora.files import load_lora, save_lora
from qwen_image_finetune.lora.header import LoraFileError, declared_alpha
from qwen_image_finetune.lora.layers import Layer
from qwen_image_finetune.lora.metadata import run_metadata
from qwen_image_finetune.lora.reading import read_lora
from qwen_image_finetune.lora.targets import endings
from tests.levers.tiny_transformers import PIPELINES, disturb, run, tiny_transformer

FAMILIES = ["flux", "qwen"]
FLUX, QWEN = (get_family(name).naming for name in ("FluxKontext", "QwenImageEdit"))
NAMINGS = {"flux": FLUX, "qwen": QWEN}
EVERY_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def config(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, **fields})  # a scale that is neither 1 nor a power of two


def trained(family: str, **fields: Any) -> Any:
    model = tiny_transformer(family)
    adapters.add_adapter(model, config(**fields), seed=1)
    disturb(model)
    return model


def saved(folder: Path, family: str, **fields: Any) -> tuple[Any, Path]:
    """A trained model and its file."""
    model = trained(family, **fields)
    save_lora(folder / LORA_WEIGHTS, model, config(**fields), {})
    return model, folder / LORA_WEIGHTS


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def deltas(model: Any, name: str = "default") -> dict[str, Tensor]:
    return {module: layer.delta() for module, layer in adapters.adapter_layers(model, name).items()}


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What diffusers and peft complain about; diffusers' loggers do not hand their messages on."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            # diffusers says this of every LoRA without a text encoder, its own files included
            if "prefix='text_encoder'" not in record.getMessage():
                messages.append(record.getMessage())

    handler = Keep(logging.WARNING)
    logging.getLogger("diffusers").addHandler(handler)
    yield messages
    logging.getLogger("diffusers").removeHandler(handler)


# --- our file in diffusers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [True, "pissa", "olora"])
@pytest.mark.parametrize("family, pipeline_class", [("flux", FluxKontextPipeline), ("qwen", QwenImageEditPipeline)])
def test_a_pipeline_with_our_file_is_the_trained_model(
    family: str, pipeline_class: Any, init: bool | str, tmp_path: Path, request: Any, warnings: list[str], recwarn: Any
) -> None:
    pipe = pipeline_class.from_pretrained(request.getfixturevalue(f"{family}_folder"))
    transformer = pipe.transformer
    inputs = pipeline_inputs(transformer)
    targets = [*EVERY_ATTENTION, "proj_out"]
    fields = config(lora_alpha=8, init_lora_weights=init, adapter_name="mine", target_modules=targets)
    adapters.add_adapter(transformer, fields, seed=1)
    disturb(transformer)
    with torch.no_grad():
        expected = transformer(**inputs)[0]
    save_lora(tmp_path / LORA_WEIGHTS, transformer, fields, {"ss_steps": "12"})

    fresh = pipeline_class.from_pretrained(request.getfixturevalue(f"{family}_folder"))
    warnings.clear()
    recwarn.clear()
    fresh.load_lora_weights(tmp_path)
    assert not warnings
    assert not [str(warning.message) for warning in recwarn if "peft" in str(warning.filename)]
    with torch.no_grad():
        actual = fresh.transformer(**inputs)[0]
    if init is True:
        assert torch.equal(actual, expected)
    else:  # the two halves of a rank 2r are summed in another order
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    assert metadata_of(tmp_path / LORA_WEIGHTS)["ss_steps"] == "12"


def pipeline_inputs(transformer: Any) -> dict[str, Any]:
    """Inputs of a transformer of the tiny pipelines, whatever its widths."""
    generator = torch.Generator().manual_seed(3)
    widths = transformer.config
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(1, 6, widths.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, widths.joint_attention_dim, generator=generator),
        "timestep": torch.tensor([0.4]),
        "return_dict": False,
    }
    if "pooled_projection_dim" in widths:
        inputs["pooled_projections"] = torch.randn(1, widths.pooled_projection_dim, generator=generator)
        inputs |= {"guidance": torch.tensor([2.5]), "img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(5, 3)}
    else:
        inputs |= {"encoder_hidden_states_mask": torch.ones(1, 5), "img_shapes": [[(1, 2, 3)]]}
    return inputs


def test_the_file_describes_itself(tmp_path: Path) -> None:
    model = trained("flux", target_modules=EVERY_ATTENTION)
    save_lora(tmp_path / LORA_WEIGHTS, model, config(), {"ss_steps": "7", "modelspec.title": "masks"})
    about = metadata_of(tmp_path / LORA_WEIGHTS)
    peft_part = json.loads(about["lora_adapter_metadata"])
    assert (peft_part["transformer.r"], peft_part["transformer.lora_alpha"]) == (4, 4)  # the scale is in the factors
    assert peft_part["transformer.target_modules"] == sorted(EVERY_ATTENTION)
    expected = {
        "format": "pt",
        "ss_steps": "7",
        "modelspec.title": "masks",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "qif.lora_alpha": "6",
    }
    assert expected.items() <= about.items()
    assert about["modelspec.sai_model_spec"] == "1.0.0"
    tensors = load_file(tmp_path / LORA_WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    weights = {f"transformer.{name}" for name in get_peft_model_state_dict(model)}
    assert tensors.keys() == weights
    assert list(tmp_path.iterdir()) == [tmp_path / LORA_WEIGHTS]
    with pytest.raises(ValueError, match="ss_steps"):
        save_lora(tmp_path / "other.safetensors", model, config(), {"ss_steps": 7})  # type: ignore[dict-item]


def test_a_run_describes_itself() -> None:
    run_config = Config(
        model={"pretrained_model_name_or_path": "/home/me/models/Kontext"},  # type: ignore[arg-type]
        data={"init_args": {"image_size": [64, 48], "dataset_path": "/home/me/private"}},  # type: ignore[arg-type]
    )
    about = run_metadata(run_config, 12, Path("/home/me/models/Kontext"))
    expected = {
        "ss_base_model_version": "Kontext",
        "ss_steps": "12",
        "ss_resolution": "(64, 48)",
        "ss_learning_rate": "0.0001",
    }
    assert expected.items() <= about.items()
    assert about["modelspec.resolution"] == "64x48"
    assert not [value for value in about.values() if "/home/me" in value] and "qif.base" not in about
    commit = "0123456789" * 4
    pinned = run_metadata(run_config, 12, Path(f"/home/me/hub/models--Qwen--Qwen-Image-Edit-2509/snapshots/{commit}"))
    assert (pinned["qif.base"], pinned["qif.base_revision"]) == ("Qwen/Qwen-Image-Edit-2509", commit)


def test_a_snapshot_can_be_saved_in_place_of_the_weights(tmp_path: Path) -> None:
    model = trained("flux", init_lora_weights="pissa")
    expected = deltas(model)
    snapshot = {name: tensor.clone() for name, tensor in adapters.trainable_state(model).items()}
    disturb(model, seed=6)
    save_lora(tmp_path / LORA_WEIGHTS, model, config(init_lora_weights="pissa"), {}, snapshot)
    layers = read_lora(tmp_path / LORA_WEIGHTS, FLUX).layers
    for name, layer in layers.items():
        torch.testing.assert_close(layer.delta(), expected[name])


# --- dialects -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dialect", ["diffusers", "comfy", "kohya"])
@pytest.mark.parametrize("targets", [["to_q", "to_v"], ["to_k", "net.2"], EVERY_ATTENTION, "all-linear"])
@pytest.mark.parametrize("init", [True, "pissa"])
def test_every_dialect_changes_the_weights_alike(
    family: str, dialect: Any, targets: Any, init: bool | str, tmp_path: Path
) -> None:
    model, source = saved(tmp_path, family, target_modules=targets, init_lora_weights=init)
    exported = tmp_path / "new folder" / "exported.safetensors"
    export(source, exported, dialect, NAMINGS[family])
    other = tiny_transformer(family)
    load_lora(other, exported, NAMINGS[family])
    expected, actual = deltas(model), deltas(other)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(run(other), run(model), atol=1e-4, rtol=1e-4)
    assert other.peft_config["default"].r == (8 if init == "pissa" else 4)  # fused adapters come apart again
    assert not any(parameter.requires_grad for name, parameter in other.named_parameters() if "lora_" in name)


# FLUX in the comfy dialect is left out: diffusers reads no authors' names with lora_A and lora_B.
@pytest.mark.parametrize("name, dialect", [("qwen", "comfy"), ("qwen", "kohya"), ("flux", "kohya")])
def test_diffusers_reads_exported_files(
    name: str, dialect: Any, tmp_path: Path, request: Any, warnings: list[str]
) -> None:
    pipe = PIPELINES[name].from_pretrained(request.getfixturevalue(f"{name}_folder"))
    inputs = pipeline_inputs(pipe.transformer)
    # diffusers has the width of the published model written into its conversion of single blocks
    targets = r"transformer_blocks\..*(to_q|to_k|to_v|add_q_proj|to_out\.0|net\.2)"
    fields = config(target_modules=targets)
    adapters.add_adapter(pipe.transformer, fields, seed=1)
    disturb(pipe.transformer)
    with torch.no_grad():
        expected = pipe.transformer(**inputs)[0]
    save_lora(tmp_path / LORA_WEIGHTS, pipe.transformer, fields, {})
    export(tmp_path / LORA_WEIGHTS, tmp_path / "exported.safetensors", dialect, NAMINGS[name])
    fresh = PIPELINES[name].from_pretrained(request.getfixturevalue(f"{name}_folder"))
    warnings.clear()
    fresh.load_lora_weights(tmp_path / "exported.safetensors")
    assert not warnings
    with torch.no_grad():
        torch.testing.assert_close(fresh.transformer(**inputs)[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dialect, down, up", [("comfy", "lora_A", "lora_B"), ("kohya", "lora_down", "lora_up")])
def test_fused_matrices_hold_the_changes_of_their_parts(dialect: Any, down: str, up: str, tmp_path: Path) -> None:
    model, source = saved(tmp_path, "flux", target_modules="all-linear")
    export(source, tmp_path / "x.safetensors", dialect, FLUX)
    state, parts = load_file(tmp_path / "x.safetensors"), deltas(model)

    def fused(module: str) -> Tensor:
        key = f"diffusion_model.{module}" if dialect == "comfy" else "lora_unet_" + module.replace(".", "_")
        lower, upper = state[f"{key}.{down}.weight"], state[f"{key}.{up}.weight"]
        return state[f"{key}.alpha"] / lower.shape[0] * (upper @ lower)

    double, single = "transformer_blocks.1", "single_transformer_blocks.0"
    qkv = torch.cat([parts[f"{double}.attn.to_{letter}"] for letter in "qkv"])
    torch.testing.assert_close(fused("double_blocks.1.img_attn.qkv"), qkv)
    text = torch.cat([parts[f"{double}.attn.add_{letter}_proj"] for letter in "qkv"])
    torch.testing.assert_close(fused("double_blocks.1.txt_attn.qkv"), text)
    linear1 = torch.cat([*(parts[f"{single}.attn.to_{letter}"] for letter in "qkv"), parts[f"{single}.proj_mlp"]])
    torch.testing.assert_close(fused("single_blocks.0.linear1"), linear1)
    torch.testing.assert_close(fused("double_blocks.0.img_mod.lin"), parts["transformer_blocks.0.norm1.linear"])
    torch.testing.assert_close(fused("time_in.in_layer"), parts["time_text_embed.timestep_embedder.linear_1"])
    # diffusers' own function turns the authors' (shift, scale) into its (scale, shift)
    torch.testing.assert_close(swap_scale_shift(fused("final_layer.adaLN_modulation.1")), parts["norm_out.linear"])
    assert not [key for key in state if "transformer_blocks" in key]


@pytest.mark.parametrize("part", ["to_q", "to_k", "to_v"])
def test_a_part_that_changes_nothing_keeps_its_place(part: str, tmp_path: Path) -> None:
    """As the projection of a text that nothing looks at any more: training goes on from an export of it."""
    fields = {"target_modules": ["to_q", "to_k", "to_v"]}
    model = trained("flux", **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{part}.lora_B" in name:
                parameter.zero_()
    save_lora(tmp_path / LORA_WEIGHTS, model, config(**fields), {})
    export(tmp_path / LORA_WEIGHTS, tmp_path / "x.safetensors", "comfy", FLUX)
    again = tiny_transformer("flux")
    load_lora(again, tmp_path / "x.safetensors", FLUX, config(**fields))
    torch.testing.assert_close(deltas(again), deltas(model))


def test_a_fused_matrix_trained_as_one_comes_apart_exactly(tmp_path: Path) -> None:
    state = random_factors("lora_unet_single_blocks_1_linear1", 8, 32, 3 * 32 + 128, alpha=2.0)
    state |= random_factors("lora_unet_double_blocks_0_img_attn_qkv", 6, 32, 96, alpha=3.0)
    save_file(state, tmp_path / "x.safetensors")
    model = tiny_transformer("flux")
    load_lora(model, tmp_path / "x.safetensors", FLUX)
    change = deltas(model)
    single = [f"single_transformer_blocks.1.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    double = [f"transformer_blocks.0.attn.to_{letter}" for letter in "qkv"]
    assert change.keys() == {*single, *double}
    for key, names, scale in (
        ("single_blocks_1_linear1", single, 2 / 8),
        ("double_blocks_0_img_attn_qkv", double, 0.5),
    ):
        up, down = state[f"lora_unet_{key}.lora_up.weight"], state[f"lora_unet_{key}.lora_down.weight"]
        torch.testing.assert_close(torch.cat([change[name] for name in names]), scale * (up @ down))


def random_factors(key: str, rank: int, width: int, height: int, alpha: float | None) -> dict[str, Tensor]:
    """One layer as kohya writes it."""
    generator = torch.Generator().manual_seed(len(key))
    state = {
        f"{key}.lora_down.weight": torch.randn(rank, width, generator=generator),
        f"{key}.lora_up.weight": torch.randn(height, rank, generator=generator),
    }
    return state if alpha is None else {**state, f"{key}.alpha": torch.tensor(alpha)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha, scale", [(2.0, 0.25), (None, 1.0)])
def test_alpha_beside_the_weights_is_obeyed(
    dtype: torch.dtype, alpha: float | None, scale: float, tmp_path: Path
) -> None:
    state = random_factors("lora_unet_transformer_blocks_0_attn_to_add_out", 8, 32, 32, alpha)
    state = {key: tensor.to(dtype) for key, tensor in state.items()}
    save_file(state, tmp_path / "x.safetensors")
    model = tiny_transformer("qwen")
    load_lora(model, tmp_path / "x.safetensors", QWEN)
    down, up = (
        state[f"lora_unet_transformer_blocks_0_attn_to_add_out.lora_{p}.weight"].float() for p in ("down", "up")
    )
    torch.testing.assert_close(deltas(model)["transformer_blocks.0.attn.to_add_out"], scale * up @ down)


@pytest.mark.parametrize("prefix", [
    "transformer.", "diffusion_model.", "base_model.model.", "pipe.dit.", "", "model.diffusion_model.", "unet.",
    "transformer.transformer.", "base_model.model.transformer.", "module._orig_mod.", "model.",
])  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_prefixes_of_other_trainers(prefix: str, family: str, tmp_path: Path) -> None:
    model, source = saved(tmp_path, family)
    state = {key.replace("transformer.", prefix, 1).replace(".weight", ".default.weight"): tensor / 2
             for key, tensor in load_file(source).items()}  # fmt: skip
    save_file(state, tmp_path / "x.safetensors")
    other = tiny_transformer(family)
    load_lora(other, tmp_path / "x.safetensors", NAMINGS[family])
    for name, delta in deltas(other).items():
        torch.testing.assert_close(delta, deltas(model)[name] / 4)


def test_dialects_that_only_diffusers_knows(tmp_path: Path) -> None:
    key = "double_blocks.1.processor.proj_lora1"
    state = {f"{key}.down.weight": torch.randn(4, 32), f"{key}.up.weight": torch.randn(32, 4)}
    save_file(state, tmp_path / "x.safetensors")
    model = tiny_transformer("flux")
    load_lora(model, tmp_path / "x.safetensors", FLUX)
    expected = {"transformer_blocks.1.attn.to_out.0": state[f"{key}.up.weight"] @ state[f"{key}.down.weight"]}
    torch.testing.assert_close(deltas(model), expected)


def test_export_reads_kohya_files_too(tmp_path: Path) -> None:
    model, source = saved(tmp_path, "qwen")
    export(source, tmp_path / "kohya.safetensors", "kohya", QWEN)
    export(tmp_path / "kohya.safetensors", tmp_path / "back.safetensors", "diffusers", QWEN)
    layers = read_lora(tmp_path / "back.safetensors", QWEN).layers
    for name, delta in deltas(model).items():
        torch.testing.assert_close(layers[name].delta(), delta)


def test_an_export_keeps_what_the_file_says_about_itself(tmp_path: Path) -> None:
    model = trained("flux", target_modules=["to_q", "to_v"])
    save_lora(tmp_path / LORA_WEIGHTS, model, config(), {"ss_steps": "7"})
    export(tmp_path / LORA_WEIGHTS, tmp_path / "x.safetensors", "kohya", FLUX)
    about = metadata_of(tmp_path / "x.safetensors")
    assert about["ss_steps"] == "7"
    assert "lora_adapter_metadata" not in about  # diffusers would apply its alpha on top of the one beside the weights
    with pytest.raises(LoraFileError, match=r"ends in \.safetensors"):
        export(tmp_path / LORA_WEIGHTS, tmp_path / "x.pt", "kohya", FLUX)


def test_an_export_for_another_family_is_refused(tmp_path: Path) -> None:
    """Attention is called alike in both: the file would come out with names that its model does not have."""
    model = trained("qwen")
    save_lora(tmp_path / LORA_WEIGHTS, model, config(), {"qif.family": "QwenImageEdit"})
    with pytest.raises(LoraFileError, match="is a LoRA of QwenImageEdit, not of FluxKontext: export"):
        export(tmp_path / LORA_WEIGHTS, tmp_path / "x.safetensors", "comfy", FLUX)
    assert not (tmp_path / "x.safetensors").exists()
    export(tmp_path / LORA_WEIGHTS, tmp_path / "x.safetensors", "comfy", QWEN)


def test_an_export_that_does_not_say_the_same_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, source = saved(tmp_path, "flux")
    write_state = exporting.write_state

    def a_thousandth_off(*arguments: Any) -> dict[str, Tensor]:
        state = write_state(*arguments)
        one = next(tensor for key, tensor in state.items() if "lora_B" in key)
        one[(one.abs() == one.abs().max()).nonzero()[0].tolist()] *= 1.001
        return state

    monkeypatch.setattr(exporting, "write_state", a_thousandth_off)
    with pytest.raises(LoraFileError, match="was not written"):
        export(source, tmp_path / "x.safetensors", "comfy", FLUX)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_WEIGHTS]


def test_the_gate_measures_rows_of_changes_that_are_not_multiplied_out() -> None:
    generator = torch.Generator().manual_seed(4)
    first, second = (
        Layer(torch.randn(rank, 50, generator=generator), torch.randn(30, rank, generator=generator), alpha)
        for rank, alpha in ((4, 3.0), (7, 5.0))
    )
    difference = first.delta().double() - second.delta().double()
    torch.testing.assert_close(exporting.row_norms([first, exporting.negated(second)]), difference.norm(dim=1))
    same = Layer(2 * first.down, first.up / 2, first.alpha)
    check_same({"x": first}, {"x": same}, Path("x"))
    nothing = Layer(first.down, torch.zeros_like(first.up), 1.0)
    check_same({"x": first, "y": nothing}, {"x": same}, Path("x"))
    for other in ({"x": second}, {}, {"x": Layer(first.down, first.up.mul(float("nan")), 3.0)}):
        with pytest.raises(LoraFileError, match="x would not change as in the source"):
            check_same({"x": first}, other, Path("x"))


def test_a_killed_export_leaves_only_what_is_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").mkdir()
    _, source = saved(tmp_path / "source", "flux")
    out, write = tmp_path / "out", lora_files.save_file

    def copy_what_lies_there(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        write(tensors, path, metadata)
        shutil.copytree(out, tmp_path / "killed")

    monkeypatch.setattr(lora_files, "save_file", copy_what_lies_there)
    export(source, out / "x.safetensors", "comfy", FLUX)
    assert [path.name for path in out.iterdir()] == ["x.safetensors"]
    assert len(list((tmp_path / "killed").iterdir())) == 1
    clean_leftovers(tmp_path / "killed")
    assert not list((tmp_path / "killed").iterdir())


def test_modules_of_different_rank_and_alpha(tmp_path: Path) -> None:
    state: dict[str, Tensor] = {}
    for number, (rank, alpha) in enumerate([(2, 1.0), (4, 3.0), (4, 4.0), (4, 4.0)]):
        block, letter = divmod(number, 2)
        state |= random_factors(f"lora_unet_transformer_blocks_{block}_attn_to_{'qk'[letter]}", rank, 32, 32, alpha)
    save_file(state, tmp_path / "x.safetensors")
    model = tiny_transformer("qwen")
    load_lora(model, tmp_path / "x.safetensors", QWEN)
    added = model.peft_config["default"]
    assert (added.r, added.lora_alpha, len(deltas(model))) == (4, 4.0, 4)
    assert set(endings(deltas(model))) == {"attn.to_k", "attn.to_q"}
    first = "lora_unet_transformer_blocks_0_attn_to_q"
    expected = 0.5 * state[f"{first}.lora_up.weight"] @ state[f"{first}.lora_down.weight"]
    torch.testing.assert_close(deltas(model)["transformer_blocks.0.attn.to_q"], expected)
    save_lora(tmp_path / "again.safetensors", model, config(), {})
    again = tiny_transformer("qwen")
    again.load_lora_adapter(tmp_path / "again.safetensors", use_safetensors=True)  # diffusers reads our patterns
    torch.testing.assert_close(run(again), run(model))


@pytest.mark.parametrize("dialect", ["diffusers", "comfy", "kohya"])
def test_parts_of_a_fused_matrix_may_differ_in_rank_and_alpha(dialect: Any, tmp_path: Path) -> None:
    sizes = {
        "transformer_blocks.0.attn.to_q": (2, 32, 32, 1.0),
        "transformer_blocks.0.attn.to_k": (4, 32, 32, 6.0),
        "single_transformer_blocks.1.attn.to_v": (4, 32, 32, 4.0),
        "single_transformer_blocks.1.proj_mlp": (3, 32, 128, 6.0),
        "single_transformer_blocks.1.proj_out": (4, 160, 32, 4.0),
        "proj_out": (2, 32, 8, 3.0),  # its name is the ending of the one before
    }
    state: dict[str, Tensor] = {}
    for module, (rank, width, height, alpha) in sizes.items():
        factors = random_factors(f"transformer.{module}", rank, width, height, alpha)
        state |= {key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): x for key, x in factors.items()}
    save_file(state, tmp_path / "source.safetensors")
    expected = {
        name: alpha / rank * state[f"transformer.{name}.lora_B.weight"] @ state[f"transformer.{name}.lora_A.weight"]
        for name, (rank, _, _, alpha) in sizes.items()
    }
    export(tmp_path / "source.safetensors", tmp_path / "x.safetensors", dialect, FLUX)
    model = tiny_transformer("flux")
    load_lora(model, tmp_path / "x.safetensors", FLUX)
    torch.testing.assert_close(deltas(model), expected)
    for name, layer in adapters.lora_layers(model):
        assert layer.r["default"] == sizes[name][0] or dialect != "diffusers"
        assert (
            layer.lora_alpha["default"] == layer.r["default"] or dialect != "diffusers"
        )  # the scale is in the factors


# --- a LoRA to start from -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("there_already", [True, False])
@pytest.mark.parametrize("fields", [{}, {"lora_alpha": 32}, {"init_lora_weights": "pissa"}, {"adapter_name": "mine"}])
def test_training_goes_on_from_a_file(family: str, there_already: bool, fields: Any, tmp_path: Path) -> None:
    model, source = saved(tmp_path, family)
    other, wanted = tiny_transformer(family), config(**fields)
    if there_already:
        adapters.add_adapter(other, wanted, seed=3)
    load_lora(other, tmp_path, NAMINGS[family], wanted)
    torch.testing.assert_close(run(other), run(model), atol=1e-4, rtol=1e-4)
    trainable = {name for name, parameter in other.named_parameters() if parameter.requires_grad}
    assert len(trainable) == len(load_file(source))
    assert all(f".{wanted.adapter_name}." in name for name in trainable)
    assert other.peft_config[wanted.adapter_name].lora_alpha == wanted.lora_alpha


@pytest.mark.parametrize("fields, parts", [
    ({"r": 8}, ["rank 4", "r=8"]),
    ({"target_modules": ["to_q", "to_k", "to_v"]}, ["attn.to_out.0", "['to_q', 'to_k', 'to_v']", "only in the file"]),
    ({"target_modules": EVERY_ATTENTION}, ["attn.to_out.0", "to_add_out", "only in the config"]),
])  # fmt: skip
def test_a_file_of_another_rank_or_other_targets_is_refused(fields: Any, parts: list[str], tmp_path: Path) -> None:
    saved(tmp_path, "qwen")
    with pytest.raises(ConfigError, match=r"model\.lora\.pretrained_weight") as error:
        load_lora(tiny_transformer("qwen"), tmp_path, QWEN, config(**fields))
    assert all(part in str(error.value) for part in parts)


def test_two_loras_in_one_file_are_refused(tmp_path: Path) -> None:
    """The one read last would win, and the other be gone without a word."""
    _, path = saved(tmp_path, "qwen")
    state = {key.replace(".weight", ".first.weight"): tensor for key, tensor in load_file(path).items()}
    second = {key.replace(".first.", ".second."): 2 * tensor for key, tensor in state.items()}
    save_file({**state, **second}, tmp_path / "two.safetensors")
    with pytest.raises(LoraFileError, match=r"is the second down of transformer_blocks\..*; a file must hold one LoRA"):
        load_lora(tiny_transformer("qwen"), tmp_path / "two.safetensors", QWEN)


def test_two_loras_at_once(tmp_path: Path) -> None:
    saved(tmp_path, "flux")
    model = tiny_transformer("flux")
    load_lora(model, tmp_path, FLUX)
    with pytest.raises(ValueError, match="already has an adapter 'default'"):
        load_lora(model, tmp_path, FLUX)
    load_lora(model, tmp_path, FLUX, adapter_name="second")
    assert adapters.adapter_names(model) == ("default", "second")


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.bin", "x.pt", "x.ckpt", "x.PTH"])
def test_pickles_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(LoraFileError, match="can execute code"):
        load_lora(tiny_transformer("flux"), tmp_path / name, FLUX)
    with pytest.raises(LoraFileError, match="has no pytorch_lora_weights") as error:
        load_lora(tiny_transformer("flux"), tmp_path, FLUX)
    assert "can execute code" in str(error.value)


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = tiny_transformer("flux")
    with pytest.raises(LoraFileError, match="does not exist"):
        load_lora(model, tmp_path / "nothing.safetensors", FLUX)
    with pytest.raises(LoraFileError, match="nobody/nothing is neither here nor could it be had from the hub"):
        load_lora(model, "nobody/nothing", FLUX)
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    with pytest.raises(LoraFileError, match=r"name one of a\.safetensors, b\.safetensors"):
        load_lora(model, tmp_path, FLUX)


@pytest.mark.parametrize("source", ["someone/a-lora", "someone/a-lora/pytorch_lora_weights.safetensors"])
def test_a_lora_of_the_hub(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--someone--a-lora", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    model, _ = saved(repository / "snapshots" / commit, "flux")
    other = tiny_transformer("flux")
    load_lora(other, source, FLUX)
    torch.testing.assert_close(run(other), run(model))


def header_file(path: Path, header: bytes, length: int | None = None, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


@pytest.mark.parametrize("header, length, data, message", [
    (b"", 2**40, b"", "announces a header of 1099511627776 bytes"),
    (b"{}", 10**9, b"", "announces a header"),
    (b"{", None, b"", "broken safetensors header"),
    (b"[]", None, b"", "broken safetensors header"),
    (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', None, b"1234", "where its header says"),
    (b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,8]}}', None, b"12345678", "contradict each other"),
    (b'{"a":{"dtype":"F32","shape":[-2,-1],"data_offsets":[0,8]}}', None, b"12345678", "contradict each other"),
    (b'{"a":{"dtype":"F32"}}', None, b"", "broken safetensors header"),
    (b"[" * 100_000, None, b"", "broken safetensors header"),
    (b"{}", None, b"", "holds no LoRA layers"),
    (b'{"__metadata__":[]}', None, b"", "broken safetensors header"),
])  # fmt: skip
def test_broken_files_are_refused(header: bytes, length: int | None, data: bytes, message: str, tmp_path: Path) -> None:
    path = header_file(tmp_path / "x.safetensors", header, length, data)
    with pytest.raises(LoraFileError, match=message) as error:
        load_lora(tiny_transformer("flux"), path, FLUX)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("declared, message", [
    ('{"lora_alpha": null}', "lora_alpha is None; it must be a number"),
    ('{"lora_alpha": true}', "lora_alpha is True; it must be a number"),
    ('{"lora_alpha": NaN}', "lora_alpha is nan; it must be a number"),
    ('{"lora_alpha": 1' + "0" * 400 + "}", "lora_alpha is 1000.*; it must be a number"),
    ('{"lora_alpha": 8, "use_rslora": "no"}', "use_rslora is 'no'; it must be true or false"),
    ('{"lora_alpha": 8, "alpha_pattern": ["to_q"]}', r"alpha_pattern is \['to_q'\]; it must be an object"),
    ('{"lora_alpha": 8, "alpha_pattern": {"to_q": "8"}}', "alpha_pattern 'to_q' is '8'; it must be a number"),
    ('{"lora_alpha": 8, "alpha_pattern": {"[": 1}}', "'.' is not read; names of modules are"),
    ('{"lora_alpha": 8, "alpha_pattern": {"[z-a]": 1}}', r"'\[z-a\]' is no regular expression"),
    ('{"lora_alpha": 8, "alpha_pattern": {"(.+)+x": 1}}', r"'\(\.\+\)\+x' is not read"),
    ('{"lora_alpha": 8, "alpha_pattern": {".*.*.*x": 1}}', "at most two of"),
    ('{"lora_alpha": 8, "alpha_pattern": {"' + "a" * 201 + '": 1}}', "up to 200 characters"),
    (json.dumps({"lora_alpha": 8, "alpha_pattern": {f".*{n}": 1 for n in range(17)}}), "more than 16 times"),
    ("[" * 100_000, "is not JSON"),
    ("[]", "is not a JSON object"),
])  # fmt: skip
def test_alphas_that_mean_nothing_are_refused(declared: str, message: str, tmp_path: Path) -> None:
    state = load_file(saved(tmp_path, "flux")[1])
    save_file(state, tmp_path / "x.safetensors", {"lora_adapter_metadata": declared.replace('{"', '{"transformer.', 1)})
    with pytest.raises(LoraFileError, match=rf"x\.safetensors: metadata lora_adapter_metadata.*{message}") as error:
        read_lora(tmp_path / "x.safetensors", FLUX)
    assert len(str(error.value)) < 1000


def test_alpha_is_looked_up_as_peft_does() -> None:
    patterns = {
        "^blocks.0.attn.to_q": 1, r"^blocks\.1\.attn\.to\_q": 2, "to_k|to_v": 3, r"blocks\.\d+\.ff.*": 4,
        "[0-2].out$": 5, "attn.to_q": 6, "proj-x y": 7, "": 8,
    }  # fmt: skip
    text = json.dumps({"transformer.lora_alpha": 9, "transformer.alpha_pattern": patterns})
    declared = declared_alpha({"lora_adapter_metadata": text}, Path("x"))
    names = [
        *(f"{start}{block}.{part}" for start in ("", "single_", "x.") for block in ("blocks.0", "blocks.1", "blocks.12")
          for part in ("attn.to_q", "attn.to_k", "to_vv", "to_v", "ff", "ff.0.net", "out", "0.out", "proj-x y")),
        "to_k", "xto_k", "0.out", "a.",
    ]  # fmt: skip
    expected = [float(patterns.get(get_pattern_key(list(patterns), name), 9)) for name in names]
    assert [declared.alpha_of(name, 4) for name in names] == expected
    assert set(expected) == set(range(1, 10))


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    _, path = saved(tmp_path, "flux")
    whole = path.read_bytes()
    for length in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(LoraFileError):
            load_lora(tiny_transformer("flux"), path, FLUX)


@pytest.mark.parametrize("changes, message", [
    ({"transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector": (31,)}, r"magnitudes of \(31,\); a DoRA"),
    ({"transformer.transformer_blocks.0.attn.to_q.lokr_w1": (4, 4)}, "LoKr"),
    ({"text_encoder.layers.0.q_proj.lora_A.weight": (4, 32), "text_encoder.layers.0.q_proj.lora_B.weight": (32, 4)},
     "2 of 34 keys.*a text encoder"),
    ({"transformer.blocks.9.to_q.lora_A.weight": (4, 32), "transformer.blocks.9.to_q.lora_B.weight": (32, 4)},
     r"no module is called so.*: transformer\.blocks\.9\.to_q"),
    ({"transformer.proj_out.lora_A.weight": (4, 32)}, "has down only"),
    ({"transformer.proj_out.lora_A.weight": (4, 32), "transformer.proj_out.lora_B.weight": (8, 3)}, "do not multiply"),
    ({"transformer.proj_out.lora_A.weight": (0, 32), "transformer.proj_out.lora_B.weight": (8, 0)}, "do not multiply"),
    ({"transformer.proj_out.lora_A.weight": (4, 32), "transformer.proj_out.lora_B.weight": (8, 4),
      "transformer.proj_out.alpha": (2,)}, "an alpha of 2 numbers"),
    ({"transformer.proj_out.lora_A.weight": (4, 32), "transformer.proj_out.lora_B.weight": (9, 4)},
     "proj_out is 8 x 32 in this transformer and 9 x 32 in the file"),
    ({"lora_unet_double_blocks_0_nonsense.lora_down.weight": (4, 32)}, "1 of 33 keys have no place"),
])  # fmt: skip
def test_a_key_that_finds_no_place_is_an_error(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    state = load_file(saved(tmp_path, "flux", target_modules=["to_q", "to_k", "to_v", "proj_mlp", "proj_out"])[1])
    state = {key: tensor for key, tensor in state.items() if "blocks" in key}
    assert len(state) == 32
    save_file({**state, **{key: torch.ones(shape) for key, shape in changes.items()}}, tmp_path / "x.safetensors")
    with pytest.raises(LoraFileError, match=message):
        load_lora(tiny_transformer("flux"), tmp_path / "x.safetensors", FLUX)


def test_an_export_is_written_again_and_nothing_else_is(tmp_path: Path) -> None:
    _, source = saved(tmp_path, "flux")
    mine = tmp_path / "mine.safetensors"
    for _ in range(2):
        export(source, tmp_path / "x.safetensors", "comfy", FLUX)
    save_file({"a": torch.zeros(1)}, mine)
    with pytest.raises(ValueError, match="is there already"):
        export(source, mine, "comfy", FLUX)
    assert list(load_file(mine)) == ["a"]
