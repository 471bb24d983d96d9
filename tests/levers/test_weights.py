"""Loading: what diffusers and bitsandbytes would load, bit for bit, in whatever precision a checkpoint is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_transformers import run, tiny_transformer
from torch import Tensor, nn

from qwen_image_finetune.config import ConfigError, ModelConfig
from qwen_image_finetune.levers import model_files, weights
from qwen_image_finetune.levers.quantize import Report, quantize
from qwen_image_finetune.levers.quantized_linear import E4M3, QuantizedLinear
from qwen_image_finetune.levers.recompute import blocks
from qwen_image_finetune.levers.stored_precision import WEIGHTS, base_precision
from qwen_image_finetune.levers.swap import spread
from tests.levers.live_bytes import LiveBytes

FORMATS = ("fp8", "int8", "nf4", "fp4")
FAMILIES = ("flux", "qwen")


def load(folder: Path, format: Any = False, dtype: torch.dtype = torch.float32) -> tuple[Any, Report | None]:
    """What every load reads, and what the headers alone say of it before."""
    cls = model_files.model_class(folder)
    weights.check_tensors(model_files.skeleton(cls, folder), folder)
    model = ModelConfig(pretrained_model_name_or_path="x", quantize=format)
    return weights.load(cls, folder, base_precision(folder, model), dtype)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def save(
    model: Any, folder: Path, tensors: dict[str, Tensor], quantization_config: dict[str, Any] | None = None
) -> Path:
    """A model folder in diffusers layout with these tensors."""
    model.save_config(folder)
    if quantization_config is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization_config}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    return folder


# Full precision, and quantised while loading


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_from_pretrained(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_transformer(family)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    loaded, report = load(tmp_path, dtype=dtype)
    theirs = type(model).from_pretrained(tmp_path, dtype=dtype)
    ours, reference = loaded.state_dict(), theirs.state_dict()
    assert list(ours) == list(reference)
    assert all(torch.equal(ours[key], reference[key]) and ours[key].dtype == dtype for key in ours)
    for model in (loaded, theirs):  # views of files lie anywhere, and some processors round by where a matrix begins
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    assert torch.equal(run(loaded), run(theirs))
    assert report is None
    assert dict(loaded.config).keys() | {"_name_or_path"} == dict(theirs.config).keys() | {"_name_or_path"}
    assert loaded.training == theirs.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", FORMATS)
def test_quantised_while_loading_equals_quantised_in_memory(family: str, format: str, tmp_path: Path) -> None:
    model = tiny_transformer(family)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    report = quantize(model, format)
    loaded, loaded_report = load(tmp_path, format)
    assert loaded_report == report
    assert report.num_quantised > 20
    ours, reference = loaded.state_dict(), model.state_dict()
    assert ours.keys() == reference.keys()
    assert all(torch.equal(ours[key], reference[key]) for key in ours)
    assert torch.equal(run(loaded), run(model))


def test_loading_twice_gives_the_same_bits_whatever_the_shards(tmp_path: Path) -> None:
    model = tiny_transformer("qwen")
    states = []
    for size in ("1GB", "20KB"):
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        states.append(load(tmp_path / size, "nf4")[0].state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_file_may_change_after_loading(tmp_path: Path) -> None:
    """Nothing of what was loaded is still a view of the file."""
    model = tiny_transformer("flux")
    model.save_pretrained(tmp_path)
    for format in (False, "fp8"):
        loaded, _ = load(tmp_path, format)
        before = run(loaded)
        content = (tmp_path / WEIGHTS).read_bytes()
        with (tmp_path / WEIGHTS).open("r+b") as file:
            file.seek(len(content) // 2)
            file.write(bytes(len(content) // 2))
        assert torch.equal(run(loaded), before)
        (tmp_path / WEIGHTS).write_bytes(content)


@pytest.fixture(scope="module")
def larger_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight blocks of layers of up to 0.4 M weights, 38 MB in bfloat16, in shards."""
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        in_channels=8, out_channels=2, num_layers=8, attention_head_dim=64, num_attention_heads=4,
        axes_dims_rope=(16, 24, 24), joint_attention_dim=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("larger")
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="10MB")
    return folder


@pytest.mark.parametrize("format", [False, *FORMATS])
def test_never_more_in_full_precision_than_what_stays_so_and_one_layer(format: Any, larger_folder: Path) -> None:
    with LiveBytes() as live:
        loaded, _ = load(larger_folder, format, torch.bfloat16)
    sizes = {
        name: p.numel()
        for name, p in model_files.skeleton(model_files.model_class(larger_folder), larger_folder).named_parameters()
    }
    stays = sum(p.nbytes for p in loaded.parameters() if p.is_floating_point())
    scales = sum(buffer.nbytes for buffer in loaded.buffers())
    largest = max(sizes.values())
    whole = 2 * sum(sizes.values())
    assert live.peak >= stays, "the count sees what stays"
    if format is False:
        assert live.peak < 1.2 * whole
    else:
        # one layer: stored values, their float32 copy, what is rounded, what that means, and the difference
        assert live.peak < stays + scales + 16 * largest < 0.5 * whole
        assert stays < 0.1 * whole


@pytest.mark.parametrize("format", [False, "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_blocks_stay_on_the_host_and_all_else_goes_to_the_card(
    family: str, format: Any, tmp_path: Path
) -> None:
    """A card without memory stands for one: "meta". What came quantised is moved without a computation."""
    model = tiny_transformer(family)
    if format:
        save(model, tmp_path, fp8_tensors(model, "weight_scale", True))
    else:
        model.save_pretrained(tmp_path)
    precision = base_precision(tmp_path, ModelConfig(pretrained_model_name_or_path="x"))
    loaded, _ = weights.load(type(model), tmp_path, precision, torch.float32, "meta", blocks_to_swap=1)
    whole, _ = weights.load(type(model), tmp_path, precision, torch.float32)
    (number,) = spread(1, len(blocks(loaded)))
    home = {"cpu": blocks(loaded)[number].state_dict(), "all": loaded.state_dict()}
    there = blocks(whole)[number].state_dict()
    assert home["cpu"].keys() == there.keys()
    assert all(torch.equal(tensor, there[name]) for name, tensor in home["cpu"].items())
    assert sum(not tensor.is_meta for tensor in home["all"].values()) == len(there)


# Checkpoints that come quantised


def bitsandbytes_tensors(
    model: Any, make: Callable[[nn.Linear], nn.Module], chosen: Callable[[str], bool]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors as bitsandbytes' own layers write them, and the layers."""
    tensors = dict(model.state_dict())
    layers: dict[str, Any] = {}
    for name, layer in linear_layers(model).items():
        if chosen(name):
            layers[name] = make(layer)
            del tensors[f"{name}.weight"]
            tensors.pop(f"{name}.bias", None)
            tensors |= {f"{name}.{key}": value for key, value in layers[name].state_dict().items()}
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}, layers


def four_bit_layer(layer: nn.Linear, code: str, nested: bool = True, storage: torch.dtype = torch.uint8) -> Any:
    packed = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, quant_type=code, compute_dtype=torch.float32
    )
    packed.bias = layer.bias
    packed.weight = bitsandbytes.nn.Params4bit(
        layer.weight.data.clone(), quant_type=code, compress_statistics=nested, quant_storage=storage, blocksize=64
    )
    return packed.to("cpu")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("code", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("nested", "storage"), [(True, torch.uint8), (False, torch.uint8), (True, torch.bfloat16)], ids=str
)
def test_four_bit_checkpoint_of_bitsandbytes(
    family: str, code: str, nested: bool, storage: torch.dtype, tmp_path: Path
) -> None:
    """Every linear layer packed, also those outside the blocks, as the published checkpoints are."""
    model = tiny_transformer(family)
    tensors, layers = bitsandbytes_tensors(
        model, lambda layer: four_bit_layer(layer, code, nested, storage), lambda _: True
    )
    about = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": code}
    loaded, report = load(save(model, tmp_path, tensors, about))
    assert report is not None
    assert (report.format, report.stored, report.num_quantised) == (code, True, len(layers))
    assert "as stored" in report.words()
    for name, layer in linear_layers(loaded).items():
        theirs = layers[name]
        expected = bitsandbytes.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
        assert isinstance(layer, QuantizedLinear)
        assert torch.equal(layer.dequantised(torch.float32), expected.float())
        input = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        assert torch.equal(layer(input), theirs(input))
    assert not any(p.element_size() > 1 for name, p in loaded.named_parameters() if name.endswith(tuple(
        f"{layer}.weight" for layer in layers)))  # fmt: skip
    assert bool(run(loaded).isfinite().all())


def test_eight_bit_checkpoint_of_bitsandbytes(tmp_path: Path) -> None:
    model = tiny_transformer("flux")

    def pack(layer: nn.Linear) -> Any:
        packed = bitsandbytes.nn.Linear8bitLt(
            layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=False
        )
        packed.load_state_dict(layer.state_dict())
        return packed.to("cpu")

    tensors, layers = bitsandbytes_tensors(model, pack, lambda name: "blocks" in name)
    about = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    loaded, report = load(save(model, tmp_path, tensors, about))
    assert report is not None
    assert (report.format, report.stored, report.num_quantised) == ("int8", True, len(layers))
    for name, theirs in layers.items():
        layer = loaded.get_submodule(name)
        assert torch.equal(layer.weight, tensors[f"{name}.weight"])
        input = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(layer(input), theirs(input), rtol=1e-5, atol=1e-5)


def fp8_tensors(model: Any, ending: str | None, one_a_row: bool) -> dict[str, Tensor]:
    """Every matrix in e4m3, the rest too where there are no scales; with scales, as many as asked for."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 2 and ending is not None:
            absmax = tensor.abs().amax(1, keepdim=True) if one_a_row else tensor.abs().max()
            tensors[name] = (tensor * 448 / absmax).to(E4M3)
            tensors[f"{name.removesuffix('.weight')}.{ending}"] = absmax / 448
        else:
            tensors[name] = tensor.to(E4M3) if ending is None else tensor
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("ending", "one_a_row"), [(None, False), ("weight_scale", False), ("weight_scale", True), ("scale_weight", False)]
)
def test_fp8_checkpoint(family: str, ending: str | None, one_a_row: bool, tmp_path: Path) -> None:
    """With and without scales: the stored bytes are the layer's, and the numbers they mean are the checkpoint's."""
    model = tiny_transformer(family)
    tensors = fp8_tensors(model, ending, one_a_row)
    extra = {} if ending is None else {"scaled_fp8": torch.zeros(0), "proj_out.input_scale": torch.ones(())}
    loaded, report = load(save(model, tmp_path, tensors | extra), dtype=torch.bfloat16)
    assert report is not None
    assert (report.format, report.stored, report.num_quantised) == ("fp8", True, report.num_linear)
    for name, layer in linear_layers(loaded).items():
        assert isinstance(layer, QuantizedLinear)
        assert torch.equal(layer.weight.view(E4M3).float(), tensors[f"{name}.weight"].float())
        scale = tensors[f"{name}.{ending}"] if ending else torch.ones(())
        assert torch.equal(layer.dequantised(torch.float32), tensors[f"{name}.weight"].float() * scale)
        assert layer.may_compute_in_8_bits == ("blocks" in name), "layers outside the blocks round no activations"
    for name, parameter in loaded.named_parameters():
        if not name.endswith("weight") or parameter.ndim == 1:
            assert torch.equal(parameter, tensors[name].to(torch.bfloat16))


def test_fp8_checkpoint_is_never_widened(larger_folder: Path, tmp_path: Path) -> None:
    model, _ = load(larger_folder)
    folder = save(model, tmp_path, fp8_tensors(model, "weight_scale", True))
    with LiveBytes() as live:
        loaded, _ = load(folder, dtype=torch.bfloat16)
    held = sum(p.nbytes for p in loaded.parameters() if p.is_floating_point()) + sum(b.nbytes for b in loaded.buffers())
    assert live.peak < 2 * held + 1e6
    assert held < 0.02 * sum(p.numel() for p in loaded.parameters())


def test_what_is_stored_in_full_precision_beside_fp8_stays_so(tmp_path: Path) -> None:
    model = tiny_transformer("qwen")
    tensors = fp8_tensors(model, "weight_scale", False)
    name = "transformer_blocks.0.attn.to_q"
    tensors[f"{name}.weight"] = model.get_submodule(name).weight.detach()
    del tensors[f"{name}.weight_scale"]
    loaded, report = load(save(model, tmp_path, tensors))
    assert report is not None
    assert report.num_linear - report.num_quantised == 1
    assert torch.equal(loaded.get_submodule(name).weight, model.get_submodule(name).weight)


# Folders that cannot be loaded


def without(key: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[key]

    return change


def with_tensor(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key] = tensor

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("proj_out.bias"), r"1 weights of a QwenImageTransformer2DModel are missing \['proj_out.bias'\]"),
        (with_tensor("left.over", torch.zeros(1)), r"1 of its tensors are not known \['left.over'\]"),
        (with_tensor("proj_out.bias", torch.zeros(3)), r"proj_out.bias is \(3,\), config.json makes it \(8,\)"),
        (with_tensor("img_in.weight", torch.zeros(3, 3).to(E4M3)), r"img_in.weight is \(3, 3\), config.json makes"),
        (with_tensor("img_in.weight", torch.zeros(32, 8, dtype=torch.int8)), r"img_in.SCB is missing"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path) -> None:
    model = tiny_transformer("qwen")
    tensors = dict(model.state_dict())
    change(tensors)
    with pytest.raises(ConfigError, match=message):
        load(save(model, tmp_path, tensors))


def test_scales_of_blocks_are_refused(tmp_path: Path) -> None:
    model = tiny_transformer("qwen")
    tensors = fp8_tensors(model, "weight_scale", True)
    tensors["img_in.weight_scale"] = torch.ones(4, 2)
    with pytest.raises(
        ConfigError, match=r"img_in.weight_scale is \(4, 2\); known are one scale, or one for each of 32"
    ):
        load(save(model, tmp_path, tensors))


@pytest.mark.parametrize("change", [{"shape": [1, 2]}, {"nested_blocksize": 128}])
def test_packing_that_is_not_known_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_transformer("qwen")
    tensors, _ = bitsandbytes_tensors(model, lambda layer: four_bit_layer(layer, "nf4"), lambda name: name == "img_in")
    key = "img_in.weight.quant_state.bitsandbytes__nf4"
    about = json.loads(bytes(tensors[key].tolist())) | change
    tensors[key] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    with pytest.raises(ConfigError, match="img_in is packed as"):
        load(save(model, tmp_path, tensors))


def test_a_class_that_diffusers_does_not_have(tmp_path: Path) -> None:
    for name in ("NoSuchModel", "FluxKontextPipeline", "__name__", None):
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(ConfigError, match="is no model of the installed diffusers"):
            model_files.model_class(tmp_path)


def test_the_files_are_only_read(tmp_path: Path) -> None:
    model = tiny_transformer("flux")
    save(model, tmp_path, fp8_tensors(model, None, False))
    before = load_file(tmp_path / WEIGHTS)
    loaded, _ = load(tmp_path)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    after = load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)) for key in before)
