"""`qif lora`: each tool against the matrices themselves, and what it wrote against diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_image_finetune import loading
from qwen_image_finetune.command.cli import main
from qwen_image_finetune.command.lora import merge as merging
from qwen_image_finetune.command.lora.show import dialect_of
from qwen_image_finetune.config import LoraConfig
from qwen_image_finetune.families import get_family
from qwen_image_finetune.levers.single_file import SingleFile
from qwen_image_finetune.lora import adapters, factoring
from qwen_image_finetune.lora.files import save_lora
from qwen_image_finetune.lora.layers import Layer
from qwen_image_finetune.lora.reading import read_lora
from tests.levers.live_bytes import LiveBytes

FAMILY = get_family("FluxKontext")
NAMING = FAMILY.naming


@pytest.fixture(scope="module")
def folder(tiny_checkpoints: dict[str, Path]) -> Path:
    return tiny_checkpoints["FluxKontext"]


@pytest.fixture(scope="module")
def write(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`write(seed, rank)`: a LoRA file in which nothing is zero."""

    def build(seed: int, rank: int = 6, targets: Any = ("to_q", "to_k", "ff.net.2"), **more: Any) -> Path:
        model: Any = loading.load_transformer(FAMILY, folder, torch.float32)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), **more)
        adapters.add_adapter(model, config, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
        path = tmp_path_factory.mktemp("lora") / f"{seed}.safetensors"
        save_lora(path, model, config, {"qif.family": "FluxKontext", "ss_steps": "7"})
        return path

    return build


@pytest.fixture(scope="module")
def one(write: Callable[..., Path]) -> Path:
    return write(1)


def deltas(path: Path) -> dict[str, Tensor]:
    layers = read_lora(path, NAMING).layers
    return {name: layer.delta().double() for name, layer in layers.items() if isinstance(layer, Layer)}


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_best_of_a_rank(shape: tuple[int, int]) -> None:
    """Against the singular values of the matrix itself, in float64."""
    generator = torch.Generator().manual_seed(0)
    layer = Layer(torch.randn(8, shape[1], generator=generator), torch.randn(shape[0], 8, generator=generator), 4.0)
    values = torch.linalg.svdvals(layer.delta().double())
    for rank in (1, 3, 8, 20):
        made = factoring.resized(layer, rank=rank)
        assert made.layer.rank == min(rank, 8)
        rest = layer.delta().double() - made.layer.delta().double()
        expected = float(values[rank:].norm())
        assert float(rest.norm()) == pytest.approx(expected, abs=1e-5)
        assert made.left == pytest.approx(expected, abs=1e-5) and made.norm == pytest.approx(float(values.norm()))
    share = values.square().cumsum(0) / values.square().sum()
    for energy in (0.3, 0.9, 1.0):
        assert (
            factoring.resized(layer, energy=energy).layer.rank == int((share < energy - 1e-12).sum()) + 1 or energy == 1
        )
    assert factoring.resized(layer, energy=1.0).layer.rank == 8
    assert factoring.extracted(layer.delta(), rank=3).error == pytest.approx(
        factoring.resized(layer, 3).error, rel=1e-4
    )
    assert factoring.extracted(layer.delta(), energy=0.9).layer.rank == factoring.resized(layer, energy=0.9).layer.rank


def test_a_large_change_is_decomposed_at_random_and_measured() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(200, 5, generator=generator) @ torch.randn(5, 150, generator=generator)
    change = low + 0.01 * torch.randn(200, 150, generator=generator)
    values = torch.linalg.svdvals(change.double())
    made = factoring.extracted(change, rank=5)
    assert made.left == pytest.approx(float(values[5:].norm()), rel=1e-3)
    assert made.left == pytest.approx(float((change - made.layer.delta()).norm()), rel=1e-6)


def test_show(one: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lora", "show", str(one)]) == 0
    said = capsys.readouterr().out
    assert "LoRA for FluxKontext" in said and "rank 6, scale 1" in said and "transformer_blocks.0" in said
    assert "ComfyUI reads" in said
    assert main(["lora", "show", str(one), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    total = sum(float(delta.norm()) ** 2 for delta in deltas(one).values()) ** 0.5
    assert sum(value**2 for value in found["norms"].values()) ** 0.5 == pytest.approx(total, rel=1e-5)
    assert found["metadata"]["ss_steps"] == "7" and found["ranks"] == [6]


def test_show_a_rotation(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """How long its change is, nobody can say who has not the weights."""
    path = write(1, type="oft", oft_block_size=8)
    assert main(["lora", "show", str(path)]) == 0
    said = capsys.readouterr().out
    assert "OFT for FluxKontext" in said and "the weight decides" in said and "#" not in said


def test_convert_and_back(one: Path, tmp_path: Path) -> None:
    for dialect in ("comfy", "kohya", "diffusers"):
        output = tmp_path / f"{dialect}.safetensors"
        assert main(["lora", "convert", str(one), str(output), "--format", dialect]) == 0
        found = deltas(output)
        for name, expected in deltas(one).items():
            assert torch.allclose(found[name], expected, rtol=1e-5, atol=1e-7)


def test_resize(one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "small.safetensors"
    assert main(["lora", "resize", str(one), str(output), "--rank", "2"]) == 0
    said = capsys.readouterr().out
    before, after = deltas(one), deltas(output)
    lacking = sum(float(torch.linalg.svdvals(delta)[2:].square().sum()) for delta in before.values())
    whole = sum(float(delta.square().sum()) for delta in before.values())
    assert f"left out: {(lacking / whole) ** 0.5:.2%}" in said
    assert all(torch.linalg.matrix_rank(delta, rtol=1e-5) == 2 for delta in after.values())
    assert main(["lora", "resize", str(one), str(output), "--overwrite"]) == 2
    assert "Give --rank, --energy" in capsys.readouterr().err


@pytest.mark.parametrize("dialect", ["diffusers", "comfy", "kohya"])
def test_another_size_is_in_the_same_dialect(dialect: str, one: Path, tmp_path: Path) -> None:
    """That of the first, where several become one."""
    given, small, both = (tmp_path / f"{name}.safetensors" for name in ("given", "small", "both"))
    assert main(["lora", "convert", str(one), str(given), "--format", dialect]) == 0
    assert main(["lora", "resize", str(given), str(small), "--rank", "2"]) == 0
    assert main(["lora", "add", str(given), str(one), "--output", str(both)]) == 0
    assert dialect_of(given) == dialect_of(small) == dialect_of(both) == dialect


def test_add(one: Path, write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, output = write(2, 3, ("to_q", "to_v")), tmp_path / "sum.safetensors"
    words = ["lora", "add", str(one), str(other), "--strength", "0.5", "--strength", "-1", "--output", str(output)]
    assert main(words) == 0
    first, second, found = deltas(one), deltas(other), deltas(output)
    assert found.keys() == first.keys() | second.keys()
    for name, delta in found.items():
        expected = 0.5 * first.get(name, torch.zeros(())) - second.get(name, torch.zeros(()))
        assert torch.allclose(delta, expected, rtol=1e-4, atol=1e-6)
    assert main([*words[:-1], str(tmp_path / "x.safetensors"), "--strength", "2"]) == 2
    assert "2 files and 3 strengths" in capsys.readouterr().err


def test_compare(one: Path, write: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    other = write(2, 3, ("to_q", "to_v"))
    assert main(["lora", "compare", str(one), str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first, second = deltas(one), deltas(other)
    for name, layer in found["layers"].items():
        angle = torch.nn.functional.cosine_similarity(first[name].flatten(), second[name].flatten(), dim=0)
        assert layer["cosine"] == pytest.approx(float(angle), abs=1e-6)
    assert found["layers"] and set(found["only in the first"]) == first.keys() - second.keys()
    assert main(["lora", "compare", str(one), str(one)]) == 0
    assert "cosine 1.0000" in capsys.readouterr().out


@pytest.fixture(scope="module")
def merged(one: Path, folder: Path) -> dict[str, Tensor]:
    """The weights that peft makes of it, in float32."""
    model: Any = loading.load_transformer(FAMILY, folder, torch.float32)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for name, layer in read_lora(one, NAMING, dict(model.named_modules())).layers.items():
        state[f"{name}.weight"] += 0.7 * layer.delta()
    return state


def test_merge_into_a_checkpoint(one: Path, folder: Path, merged: dict[str, Tensor], tmp_path: Path) -> None:
    """diffusers opens the whole of it; each weight is the nearest bfloat16."""
    output = tmp_path / "merged"
    assert main(["lora", "merge", str(folder), str(one), "--strength", "0.7", "--output", str(output)]) == 0
    transformer = FAMILY.pipeline.from_pretrained(output).transformer
    for key, tensor in transformer.state_dict().items():
        expected = merged[key]
        assert bool(((tensor - expected).abs() <= 2.0**-8 * expected.abs()).all()), key
    assert not (output / "transformer" / "manifest.json").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_merge_into_one_file(
    precision: str, one: Path, folder: Path, merged: dict[str, Tensor], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Fused and under the authors' names; read back as model.transformer_file is."""
    output = tmp_path / "merged.safetensors"
    words = ["lora", "merge", str(folder), str(one), "--strength", "0.7", "--output", str(output), "--single-file"]
    assert main([*words, "--precision", precision]) == 0
    assert "of the change" in capsys.readouterr().out
    names = load_file(output).keys()
    assert "double_blocks.0.img_attn.qkv.weight" in names
    assert ("double_blocks.0.img_attn.qkv.weight_scale" in names) == (precision == "fp8")
    from qwen_image_finetune.levers import model_files

    with model_files.opened(SingleFile(output, FAMILY.file_names)) as file:
        from qwen_image_finetune.command.lora.base import number

        for key, expected in merged.items():
            bound = 2.0**-4 if f"{key}_scale" in file.tensors else 2.0**-8
            found = number(file, key)
            assert float((found - expected).abs().max()) <= 1.1 * bound * float(expected.abs().max()), key


def test_what_is_written_wrongly_is_not_kept(
    one: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = merging.TensorFile.write

    def spoiled(self: Any, name: str, tensor: Tensor) -> None:
        write(self, name, tensor * 1.01 if name.endswith("0.img_attn.proj.weight") else tensor)

    monkeypatch.setattr(merging.TensorFile, "write", spoiled)
    output = tmp_path / "merged.safetensors"
    assert main(["lora", "merge", str(folder), str(one), "--output", str(output), "--single-file"]) == 2
    assert "img_attn.proj.weight would not be what it should" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_extract(one: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was merged comes out again; what no LoRA can hold is said."""
    tuned = tmp_path / "tuned"
    words = ["lora", "merge", str(folder), str(one), "--precision", "fp32", "--output", str(tuned)]
    assert main(words) == 0
    file = tuned / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["x_embedder.bias"] = state["x_embedder.bias"] + 0.1
    save_file(state, file, {"format": "pt"})
    output = tmp_path / "out.safetensors"
    assert main(["lora", "extract", str(tuned), str(folder), str(output), "--rank", "6"]) == 0
    said = capsys.readouterr().out
    assert "the change of 1 biases" in said and "x_embedder.bias" in said
    found = deltas(output)
    for name, expected in deltas(one).items():
        assert float((found[name] - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-6, name


def test_refusals(one: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "x.safetensors"
    cases = {
        ("merge", folder, one, "--precision", "fp8", "--output", tmp_path / "y"): "add --single-file",
        ("merge", "nobody/nothing", one, "--output", tmp_path / "y"): "hf download nobody/nothing",
        ("extract", folder, folder, output, "--rank", "4"): "no weight of a linear layer differs",
        ("extract", folder, folder, output): "Give --rank, --energy",
        ("add", one, "--output", output): "two LoRA files or more",
        ("show", tmp_path / "none.safetensors"): "does not exist",
    }
    for words, said in cases.items():
        assert main(["lora", *map(str, words)]) == 2
        assert said in capsys.readouterr().err, words
    assert list(tmp_path.iterdir()) == []


class Filled(LiveBytes):
    """Without parameters of modules that are made for their shapes alone: nobody ever writes to those."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.empty.memory_format:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("tool", ["checkpoint", "file", "extract"])
def test_memory_does_not_grow_with_the_model(tool: str, one: Path, folder: Path, tmp_path: Path) -> None:
    """Of a base with many blocks as much as of one with two is held at once: what one of its matrices takes."""

    def most(depth: int) -> tuple[int, int]:
        base, output = Path(shutil.copytree(folder, tmp_path / f"{depth}")), tmp_path / f"{depth}-made"
        shutil.rmtree(base / "transformer")
        about = FAMILY.transformer.load_config(folder, subfolder="transformer")
        torch.manual_seed(0)
        model: Any = FAMILY.transformer.from_config({**about, "num_single_layers": depth})
        model.save_pretrained(base / "transformer")
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        words = ["merge", base, one, "--output", output]
        if tool == "file":
            words = ["merge", base, one, "--single-file", "--output", f"{output}.safetensors"]
        if tool == "extract":
            tuned = Path(shutil.copytree(base, tmp_path / f"{depth}-tuned"))
            with torch.no_grad():
                model.transformer_blocks[0].attn.to_q.weight.add_(0.1)
            model.save_pretrained(tuned / "transformer")
            words = ["extract", tuned, base, f"{output}.safetensors", "--rank", "2"]
        del model
        with Filled() as live:
            assert main(["lora", *map(str, words)]) == 0
        return live.peak, size

    (few, _), (many, size) = most(2), most(24)
    assert 0 < many < 1.05 * few and many < size / 4
