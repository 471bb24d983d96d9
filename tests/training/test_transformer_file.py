"""model.transformer_file: a base in one file, as people have it beside ComfyUI, is the same base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import GGUFQuantizationConfig, QwenImageTransformer2DModel
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_image_finetune import loading
from qwen_image_finetune.command.cli import main
from qwen_image_finetune.config import BaseLora, Config, ConfigError, ModelConfig
from qwen_image_finetune.drawing.build import build_predictor
from qwen_image_finetune.families import get_family
from qwen_image_finetune.fitting.estimate import Estimator
from qwen_image_finetune.levers import parallel
from qwen_image_finetune.levers.model_files import opened
from qwen_image_finetune.levers.quantized_linear import E4M3, QuantizedLinear
from qwen_image_finetune.levers.single_file import SingleFile
from qwen_image_finetune.levers.stored_precision import local_checkpoint
from qwen_image_finetune.lora.export import authors_state
from qwen_image_finetune.training.train import train
from tests.levers.live_bytes import LiveBytes
from tests.training.test_base_loras import lora

Configure = Callable[..., Config]
BuildOnce = Callable[[str, Callable[[Path], object]], Path]
FAMILIES = ("FluxKontext", "QwenImageEditPlus", "Flux2Klein", "QwenImage21")
PREFIX = "model.diffusion_model."


@pytest.fixture
def cache_folder(tmp_path: Path) -> Path:
    """Its own: what is encoded is looked at."""
    return tmp_path / "cache"


def base_of(folder: Path) -> dict[str, Tensor]:
    return {key: value for path in (folder / "transformer").glob("*.safetensors")
            for key, value in load_file(path).items()}  # fmt: skip


def in_blocks(key: str, tensor: Tensor) -> bool:
    return "blocks." in key and key.endswith(".weight") and tensor.ndim == 2


def scaled(state: dict[str, Tensor], scale_name: str, by_row: bool = False) -> dict[str, Tensor]:
    """e4m3 with scales in the blocks, bfloat16 elsewhere, as ComfyUI's files are."""
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if not in_blocks(key, tensor):
            found[key] = tensor.bfloat16()
            continue
        largest = tensor.float().abs().amax(1, keepdim=True) if by_row else tensor.float().abs().amax()
        found[key] = (tensor.float() / (largest / 448)).to(E4M3)
        found[key.removesuffix("weight") + scale_name] = (largest / 448).clone()
    return found


@pytest.fixture(scope="session")
def files(build_once: BuildOnce, tiny_checkpoints: dict[str, Path]) -> Path:
    """For each family NAME.safetensors in bfloat16 and NAME-scaled.safetensors in e4m3, under the authors' names."""

    def build(folder: Path) -> None:
        for name in FAMILIES:
            state = authors_state(base_of(tiny_checkpoints[name]), get_family(name).file_names, folder)
            plain = {f"{PREFIX}{key}": tensor.bfloat16() for key, tensor in state.items()}
            beside = {"vae.decoder.conv_in.weight": torch.zeros(2)} if name == "FluxKontext" else {}
            save_file(plain | beside, folder / f"{name}.safetensors")
            by_row = name == "QwenImage21"  # where the newer words stand
            found = scaled(state, "weight_scale" if by_row else "scale_weight", by_row)
            about = {"layers": {key.removesuffix(".weight"): {"format": "float8_e4m3fn"}
                                for key, tensor in found.items() if tensor.dtype == E4M3}}  # fmt: skip
            for key in [key for key, tensor in found.items() if tensor.dtype == E4M3]:
                layer = key.removesuffix("weight")
                note = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
                found |= {f"{layer}comfy_quant": note} if by_row else {f"{layer}scale_input": torch.tensor(1.0)}
            found |= {} if by_row else {"scaled_fp8": torch.zeros(2, dtype=E4M3)}
            save_file(found, folder / f"{name}-scaled.safetensors",
                      metadata={"_quantization_metadata": json.dumps(about)} if by_row else None)  # fmt: skip

    return build_once("transformer-files", build)


def loaded(name: str, folder: Path, file: Path | None, dtype: torch.dtype = torch.bfloat16, **keys: Any) -> Any:
    family = get_family(name)
    model = ModelConfig(
        pretrained_model_name_or_path=str(folder), transformer_file=None if file is None else str(file), **keys
    )
    loading.check_base(family, folder, model)  # by headers
    return loading.load_transformer(family, folder, dtype, model)


def newest(run: Path | None) -> Path:
    assert run is not None
    return max(run.glob("checkpoint-*-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))


# The same base


@pytest.mark.parametrize("name", FAMILIES)
def test_the_file_is_the_folder_tensor_by_tensor(name: str, files: Path, tiny_checkpoints: dict[str, Path]) -> None:
    folder = tiny_checkpoints[name]
    ours = loaded(name, folder, files / f"{name}.safetensors").state_dict()
    theirs = get_family(name).transformer.from_pretrained(folder / "transformer", dtype=torch.bfloat16).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)


@pytest.mark.parametrize("name", FAMILIES)
def test_fp8_stays_fp8_and_means_what_its_scales_say(name: str, files: Path, tiny_checkpoints: dict[str, Path]) -> None:
    family, file = get_family(name), files / f"{name}-scaled.safetensors"
    stored = load_file(file)
    widened = {}  # ComfyUI's formula, on the authors' matrices
    for key, tensor in stored.items():
        scale = next((stored[other] for ending in ("scale_weight", "weight_scale")
                      if (other := key.removesuffix("weight") + ending) in stored and other != key), None)  # fmt: skip
        if tensor.dtype == E4M3 and scale is not None:
            widened[key] = tensor.float() * scale
    model = loaded(name, tiny_checkpoints[name], file)
    layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    whole = authors_state(
        {f"{key}.weight": layer.dequantised(torch.float32) for key, layer in layers.items()}, family.file_names, file
    )
    assert whole.keys() == widened.keys()
    assert all(torch.equal(whole[key], widened[key]) for key in whole)
    codes = authors_state({f"{key}.weight": layer.weight for key, layer in layers.items()}, family.file_names, file)
    assert all(torch.equal(codes[key], stored[key].view(torch.uint8)) for key in codes)  # rounded a single time


@pytest.mark.parametrize(
    ("cls", "name", "layers"),
    [
        ("FluxTransformer2DModel", "FluxKontext", {"num_layers": 1, "num_single_layers": 2, "guidance_embeds": True}),
        ("Flux2Transformer2DModel", "Flux2Klein", {"num_layers": 1, "num_single_layers": 2}),
        ("QwenImage21Transformer2DModel", "QwenImage21", {"num_layers": 2}),
    ],
)
def test_names_and_rows_are_those_of_diffusers_converter(
    cls: str, name: str, layers: dict[str, Any], tmp_path: Path
) -> None:
    """At the heights of the published models, one number a row."""
    family = get_family(name)
    with init_empty_weights():
        model = family.transformer(**layers)
    generator = torch.Generator().manual_seed(1)
    state = {key: torch.randn(tensor.shape[0], *(1,) * (tensor.ndim - 1), generator=generator)
             for key, tensor in model.state_dict().items()}  # fmt: skip
    written = {PREFIX + key: tensor for key, tensor in authors_state(state, family.file_names, tmp_path).items()}
    save_file(written, tmp_path / "x.safetensors")
    theirs = SINGLE_FILE_LOADABLE_CLASSES[cls]["checkpoint_mapping_fn"](
        {key.removeprefix(PREFIX): tensor for key, tensor in written.items()}
    )
    with opened(SingleFile(tmp_path / "x.safetensors", family.file_names)) as file:
        assert file.tensors.keys() == theirs.keys() == state.keys()
        for key, tensor in theirs.items():
            assert torch.equal(file.read(key), tensor)
            assert file.tensors[key].shape == tuple(tensor.shape)
    assert not file.unread


def test_plain_e4m3_is_read_without_scales_whatever_is_in_it(flux_folder: Path, tmp_path: Path) -> None:
    """Biases, norms and what is outside of the blocks too, as some files have it; under diffusers' names here."""
    state = {key: tensor.to(E4M3) for key, tensor in base_of(flux_folder).items()}
    save_file(state, tmp_path / "x.safetensors")
    model = loaded("FluxKontext", flux_folder, tmp_path / "x.safetensors", torch.float32)
    for key, tensor in state.items():
        layer = model.get_submodule(key.rpartition(".")[0])
        wide = isinstance(layer, QuantizedLinear) and key.endswith(".weight")
        assert torch.equal(layer.dequantised(torch.float32) if wide else model.get_parameter(key), tensor.float())


def test_the_host_never_holds_fp8_widened(files: Path, tiny_checkpoints: dict[str, Path]) -> None:
    folder, file = tiny_checkpoints["FluxKontext"], files / "FluxKontext-scaled.safetensors"
    stored = load_file(file)
    wide = sum(tensor.nbytes for tensor in stored.values() if tensor.dtype != E4M3)
    largest = max(2 * tensor.numel() for tensor in stored.values())
    scales = 4 * sum(tensor.shape[0] for tensor in stored.values() if tensor.dtype == E4M3)
    family = get_family("FluxKontext")
    model = ModelConfig(pretrained_model_name_or_path="x", transformer_file=str(file))
    del stored
    with LiveBytes() as live:
        loading.load_transformer(family, folder, torch.bfloat16, model)
    assert 0 < live.peak <= wide + scales + 4 * largest


@pytest.mark.parametrize(("format", "more"), [(False, 1), ("fp8", 16)])
def test_the_host_holds_the_model_and_little_more(
    format: Any, more: int, tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """One tensor beside what stays; where it is quantised, its copies in float32 while its error is measured."""
    folder, family = tiny_checkpoints["FluxKontext"], get_family("FluxKontext")
    whole = loading.load_transformer(family, folder, torch.bfloat16)
    stored = {name: tensor.contiguous() for name, tensor in whole.state_dict().items()}
    file = tmp_path / "whole.safetensors"
    save_file(stored, file)
    largest = max(tensor.nbytes for tensor in stored.values())
    del whole, stored
    model = ModelConfig.model_validate(
        {"pretrained_model_name_or_path": "x", "transformer_file": str(file), "quantize": format}
    )
    with LiveBytes() as live:
        loaded = loading.load_transformer(family, folder, torch.bfloat16, model)
    stays = sum(tensor.nbytes for tensor in (*loaded.parameters(), *loaded.buffers()) if tensor.is_floating_point())
    assert stays <= live.peak <= stays + more * largest


def test_gguf_holds_what_diffusers_reads_of_it(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder, path = tiny_checkpoints["QwenImageEditPlus"], tmp_path / "x.gguf"
    writer = GGUFWriter(path, "qwen_image")
    for key, tensor in base_of(folder).items():
        blocks = in_blocks(key, tensor) and tensor.shape[1] % 32 == 0
        kind = GGMLQuantizationType.Q8_0 if blocks and "attn" in key else GGMLQuantizationType.Q4_0
        numbers = tensor.float().numpy()
        if blocks:
            writer.add_tensor(key, quants.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = QwenImageTransformer2DModel.from_single_file(
        str(path), config=str(folder), subfolder="transformer", dtype=torch.float32,
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
    )  # fmt: skip
    theirs.dequantize()
    ours = loaded("QwenImageEditPlus", folder, path, torch.float32).state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours[key], tensor.float()) for key, tensor in theirs.state_dict().items())
    again = loaded("QwenImageEditPlus", folder, path, quantize="fp8")
    assert sum(isinstance(module, QuantizedLinear) for module in again.modules()) > 20
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"x\.gguf is broken"):
        loaded("QwenImageEditPlus", folder, path)
    family = get_family("JoyImageEditPlus")
    with pytest.raises(ConfigError, match=r"diffusers reads no GGUF of a JoyImageEditPlusTransformer3DModel"):
        loading.transformer_file(family, ModelConfig(pretrained_model_name_or_path="x", transformer_file=str(path)))


def test_processes_that_share_the_base_read_their_parts_of_the_file(
    files: Path, tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """A group of one, which goes the same way; with a LoRA under the training, fused matrices on both sides."""
    name = "FluxKontext"
    family, folder = get_family(name), tiny_checkpoints[name]
    under = lora(tmp_path / "under.safetensors", name, folder, 1)
    model = ModelConfig(
        pretrained_model_name_or_path=str(folder), transformer_file=str(files / f"{name}.safetensors"),
        base_loras=[BaseLora(file=str(under))],
    )  # fmt: skip
    whole = loading.load_transformer(family, folder, torch.bfloat16, model).state_dict()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        shared: Any = loading.empty_transformer(family, folder, torch.bfloat16)
        parallel.shard(shared, parallel.Sharding(), torch.device("cpu"))
        source, change = loading.transformer_file(family, model), loading.base_change(family, folder, model)
        assert source is not None
        parallel.fill(shared, source, torch.bfloat16, torch.device("cpu"), change)
        for key, tensor in shared.state_dict().items():
            assert torch.equal(parallel.whole(tensor), whole[key])
    finally:
        torch.distributed.destroy_process_group()


def test_a_file_with_wide_layers_among_its_blocks_is_planned_with_them(
    files: Path, configure: Configure, tmp_path: Path
) -> None:
    name = "FluxKontext"
    narrow, wide = load_file(files / f"{name}-scaled.safetensors"), load_file(files / f"{name}.safetensors")
    for key in [key for key in narrow if key.startswith("single_blocks.") and key.endswith("linear1.weight")]:
        narrow[key] = wide[PREFIX + key]
        del narrow[key.removesuffix("weight") + "scale_weight"]
    save_file(narrow, tmp_path / "mixed.safetensors")
    sizes = []
    for file in (files / f"{name}-scaled.safetensors", tmp_path / "mixed.safetensors", files / f"{name}.safetensors"):
        config = configure(name, "train.mixed_precision=bf16", f"model.transformer_file={file}")
        folder = Path(config.model.pretrained_model_name_or_path)
        planned = Estimator(get_family(name), config, folder).estimate().device["weights"]
        model: Any = loaded(name, folder, file)
        held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        assert planned == pytest.approx(held, rel=0.1)
        sizes.append(planned)
    assert sizes == sorted(sizes)


def test_of_a_checkpoint_of_the_hub_the_transformer_is_not_needed(
    files: Path, flux_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    (snapshot / "transformer").mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    shutil.copy(flux_folder / "transformer" / "config.json", snapshot / "transformer")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = ModelConfig(pretrained_model_name_or_path="owner/name")
    assert local_checkpoint(model) is None
    file = files / "FluxKontext.safetensors"
    assert local_checkpoint(model.model_copy(update={"transformer_file": str(file)})) == snapshot


# Runs


def test_a_run_is_that_of_the_folder_with_its_cache_and_names_the_file(
    files: Path, configure: Configure, tmp_path: Path
) -> None:
    same = ("train.max_train_steps=2", "train.mixed_precision=bf16")
    of_folder = newest(train(configure("QwenImage21", *same)))
    cached = sorted(path for path in (tmp_path / "cache").rglob("*.safetensors"))
    file = files / "QwenImage21.safetensors"
    of_file = newest(train(configure("QwenImage21", *same, f"model.transformer_file={file}")))
    assert sorted((tmp_path / "cache").rglob("*.safetensors")) == cached
    first, second = (load_file(checkpoint / "adapter.safetensors") for checkpoint in (of_folder, of_file))
    assert all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(ConfigError, match=r"model\.transformer_file.*what was learnt belongs to that base"):
        train(configure("QwenImage21", *same, f"train.resume_from_checkpoint={of_file}"))


def test_a_run_on_scaled_fp8_resumes_to_the_bit_and_is_planned_and_drawn_with(
    files: Path, configure: Configure, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = files / "FluxKontext-scaled.safetensors"
    same = (f"model.transformer_file={file}", "train.max_train_steps=4", "train.checkpointing_steps=2")
    whole = train(configure("FluxKontext", *same))
    assert whole is not None
    assert "frozen base in fp8 as stored" in capsys.readouterr().out
    first = next(whole.glob("checkpoint-*-2"))
    other = (f"train.resume_from_checkpoint={first}", "logging.tracker_project_name=other")
    resumed = newest(train(configure("FluxKontext", *same, *other)))
    for name in ("adapter.safetensors", "optimizer.safetensors"):
        theirs = load_file(newest(whole) / name)
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in load_file(resumed / name).items())
    with safe_open(resumed / "pytorch_lora_weights.safetensors", "pt") as lora:
        about = json.loads(lora.metadata()["qif.transformer_file"])
    assert about == {"file": file.name, "sha256": sha256(file.read_bytes()).hexdigest()}

    config = configure("FluxKontext", *same)
    family, folder = get_family("FluxKontext"), Path(config.model.pretrained_model_name_or_path)
    estimator = Estimator(family, config, folder)
    wide = Estimator(family, configure("FluxKontext"), folder)
    assert estimator.format == "fp8"
    assert estimator.estimate().device["weights"] < wide.estimate().device["weights"] / 2
    assert main(["train", str(tmp_path / "config.yaml"), "--dry-run", *same]) == 0
    assert f"its transformer from {file}" in capsys.readouterr().out
    picture = tmp_path / "drawn.png"
    reference = next((config.data.init_args.folders[0] / "control_images").glob("*.png"))
    options = ["--prompt", "x", "--image", str(reference), "--output", str(picture), "--steps", "1"]
    assert main(["predict", str(tmp_path / "config.yaml"), *same, *options]) == 0
    assert picture.is_file()


# Wrong files


def changed(files: Path, name: str, path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    state = load_file(files / f"{name}.safetensors")
    change(state)
    save_file(state, path)
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop(f"{PREFIX}img_in.weight"), r"1 weights of a FluxTransformer2DModel are missing \['x_embedder"),
        (lambda s: s.update({f"{PREFIX}more.weight": torch.zeros(2)}), r"1 of its tensors are not known .*more"),
        (lambda s: s.update({f"{PREFIX}txt_in.weight": torch.zeros(2, 2)}), r"context_embedder\.weight is \(2, 2\)"),
        (lambda s: s.update({f"{PREFIX}double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 2)}), "cannot share"),
        (lambda s: s.update({"x_embedder.weight": torch.zeros(2)}), "are both x_embedder.weight"),
        (lambda s: s.update({f"{PREFIX}img_in.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'),
                                                                         dtype=torch.uint8)}), "'nvfp4'"),
        (lambda s: s.update({f"{PREFIX}img_in.weight": torch.zeros(2, dtype=torch.float8_e5m2)}), "e5m2"),
        (lambda s: s.update({f"{PREFIX}img_in.weight.quant_state.bitsandbytes__nf4": torch.zeros(2)}), "in 4 bits"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_by_its_header(
    change: Callable[[dict[str, Tensor]], object], words: str, files: Path, flux_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"x\.safetensors.*{words}"):
        loaded("FluxKontext", flux_folder, changed(files, "FluxKontext", tmp_path / "x.safetensors", change))


def test_what_is_no_transformer_of_the_model_is_refused_before_anything_loads(
    files: Path, configure: Configure, tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((files / "FluxKontext.safetensors").read_bytes()[:-100])
    for file, words in (
        (files / "Flux2Klein.safetensors", "of another model than model.pretrained_model_name_or_path"),
        (torn, "torn.safetensors is broken"),
    ):
        for run in (train, build_predictor):
            with pytest.raises(ConfigError, match=words):
                run(configure("FluxKontext", f"model.transformer_file={file}"))
    for value, words in (("nowhere.safetensors", "not in"), (".", "ends in"), ("x.ckpt", "ends in")):
        with pytest.raises(ConfigError, match=rf"model\.transformer_file='{value}'.*{words}"):
            configure("FluxKontext", f"model.transformer_file={value}")
    with pytest.raises(ConfigError, match=r"Write model\.transformer_file="):
        configure("FluxKontext", f"model.pretrained_model_name_or_path={files / 'FluxKontext.safetensors'}")
    marked = changed(files, "QwenImageEditPlus", tmp_path / "2511.safetensors",
                     lambda state: state.update({f"{PREFIX}__index_timestep_zero__": torch.zeros(0)}))  # fmt: skip
    folder = tiny_checkpoints["QwenImageEditPlus"]
    config = json.loads((folder / "transformer" / "config.json").read_text())
    if config["zero_cond_t"]:
        loaded("QwenImageEditPlus", folder, marked)
        folder = tiny_checkpoints["QwenImageEdit"]
    with pytest.raises(ConfigError, match="is of Qwen-Image-Edit-2511"):
        loaded("QwenImageEdit", tiny_checkpoints["QwenImageEdit"], marked)
