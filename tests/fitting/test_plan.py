"""The plan: bytes against what autograd saves, predictions against measured steps, changes that make a run fit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qwen_image_finetune.command import dry_run
from qwen_image_finetune.config import Config, ConfigError, LoraConfig, load_config
from qwen_image_finetune.families import get_family
from qwen_image_finetune.fitting.estimate import AT_WORK, GIB, Estimator, transformer_config
from qwen_image_finetune.fitting.footprint import Footprint, footprint, places, stand_in
from qwen_image_finetune.fitting.plan import KEEPS, as_overrides, cheapest_change, memory_changes, parse_memory, settled
from qwen_image_finetune.fitting.plan_numbers import numbers
from qwen_image_finetune.fitting.plan_words import count_words, describe, estimator_of, size_words, summary
from qwen_image_finetune.fitting.speed import Step, card_called, seconds
from qwen_image_finetune.levers.stored_precision import WEIGHTS, local_checkpoint

FAMILIES = {"FluxKontext": "black-forest-labs/FLUX.1-Kontext-dev", "QwenImageEdit": "Qwen/Qwen-Image-Edit"}

# Measured on an H100 with torch 2.11: eager or compiled blocks, r 16, 8704 tokens, adapter in bfloat16.
# (family, base, keep, peak GiB). Modulation layers stayed in bfloat16 where the base is fp8.
MEASURED: list[tuple[str, str, Any, float]] = [
    ("FluxKontext", "bf16", "none", 26.4),
    ("FluxKontext", "nf4", "none", 10.1),
    ("FluxKontext", "fp8", "none", 18.5),
    ("FluxKontext", "fp8", 0.0, 21.3),
    ("FluxKontext", "fp8", 1.0, 51.0),
    ("QwenImageEdit", "bf16", "none", 42.5),
    ("QwenImageEdit", "fp8", "none", 29.9),
]
MODULATION = {"FluxKontext": 3072 * (19 * 12 + 38 * 3) * 3072, "QwenImageEdit": 3072 * 60 * 12 * 3072}


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def configured(tmp_path: Path, hub_cache: Path) -> Callable[..., Config]:
    def configured(family: str, *overrides: str) -> Config:
        path = tmp_path / "run.yaml"
        text = f"model: {{pretrained_model_name_or_path: {FAMILIES[family]}}}\ncache: {{use_cache: true}}\n"
        path.write_text(f"{text}train: {{trainer: {family}}}\n")
        return load_config(path, overrides)

    return configured


def predicted(found: Footprint, family: str, base: str, keep: Any) -> float:
    linear = sum(kind.count * kind.linear for kind in found.kinds.values())
    narrow = {"bf16": 0, "fp8": linear - MODULATION[family], "nf4": linear}[base]
    weights = 2 * (found.weights - narrow) + {"bf16": 2, "fp8": 1.0013, "nf4": 0.516}[base] * narrow
    largest = max(found.kinds.values(), key=lambda kind: kind.saved)
    return (weights + 8 * found.adapter + found.kept(keep) + largest.saved + AT_WORK * largest.inputs) / GIB


@pytest.mark.parametrize(("family", "base", "keep", "measured"), MEASURED)
def test_prediction_against_measured_peaks(
    family: str, base: str, keep: Any, measured: float, full_size: dict[str, Footprint]
) -> None:
    expected = predicted(full_size[family], family, base, keep)
    error = expected / measured - 1
    print(f"{family} {base} keep {keep}: predicted {expected:.1f} GiB, measured {measured}: {error:+.1%}")
    assert expected == pytest.approx(measured, rel=0.04)


def test_sizes_of_the_published_models(full_size: dict[str, Footprint]) -> None:
    assert full_size["FluxKontext"].weights / 1e9 == pytest.approx(11.9, abs=0.05)
    assert full_size["QwenImageEdit"].weights / 1e9 == pytest.approx(20.43, abs=0.05)
    # Products of 8704 tokens with all weights but embeddings and modulation, and attention, by hand.
    kinds = full_size["QwenImageEdit"].kinds.values()
    by_hand = 60 * 2 * 12 * 3072**2 * 8704
    assert sum(kind.count * kind.operations for kind in kinds) == pytest.approx(by_hand, rel=0.01)
    assert sum(kind.count * kind.attention_operations for kind in kinds) == 60 * 4 * 8704**2 * 3072


@pytest.mark.parametrize("name", ["FluxKontext", "QwenImageEdit"])
def test_saved_bytes_are_those_of_a_real_run(name: str, tiny_checkpoints: dict[str, Path]) -> None:
    """A tiny model with weights, its blocks watched by autograd's own hooks."""
    from qwen_image_finetune.levers.recompute import blocks
    from qwen_image_finetune.lora.adapters import add_adapter

    family, folder = get_family(name), tiny_checkpoints[name]
    about = transformer_config(family, folder)
    batch = stand_in(family, about, [(64, 96), (64, 64)], 2, 20).to("cpu", torch.float32)
    found = footprint(family, about, batch, LoraConfig(r=4), torch.float32)
    model: Any = family.transformer.from_pretrained(folder, subfolder="transformer")
    add_adapter(model, LoraConfig(r=4), seed=0)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive: list[Any] = []
    saved: dict[int, dict[int, int]] = {number: {} for number in range(len(blocks(model)))}
    running: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if running and storage.data_ptr() not in weights:
            saved[running[0]][storage.data_ptr()] = storage.nbytes()
        return tensor

    for number, block in enumerate(blocks(model)):
        block.register_forward_pre_hook(lambda *_, number=number: running.append(number))
        block.register_forward_hook(lambda *_: running.clear())
    guidance = 1.0 if family.distilled_guidance(model.config) else None
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        alive.append(family.velocity(model, batch.target, torch.full((2,), 0.5), batch, guidance))
    for number, block in enumerate(blocks(model)):
        if number > 0:  # the input of the very first one needs no gradient
            expected = found.kinds[places(model)[block]].saved  # positions are counted with the first kind alone
            assert sum(saved[number].values()) == pytest.approx(expected, rel=0.03)


def test_keeping_more_takes_memory_and_saves_operations(full_size: dict[str, Footprint]) -> None:
    for found in full_size.values():
        order: list[Any] = ["none", *reversed(KEEPS)]
        kept, operations = [found.kept(keep) for keep in order], [found.operations(keep) for keep in order]
        assert kept == sorted(kept)
        assert operations == sorted(operations, reverse=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cheapest_change_makes_it_fit(family: str, configured: Callable[..., Config]) -> None:
    estimator = Estimator(get_family(family), configured(family), None)
    losses = []
    for card in (140, 80, 48, 24, 16, 12, 8):
        found = cheapest_change(estimator, card * GIB)
        assert found is not None, card
        change, prediction = found
        assert prediction.fits(card * GIB)
        losses.append(prediction.operations)
        overrides = as_overrides(estimator.config, change.keys).split()
        checked = configured(family, *overrides)  # what it says is a configuration, and predicts the same
        assert Estimator(get_family(family), checked, None).estimate().peak == prediction.peak
    assert losses == sorted(losses)


def test_encoders_in_8_bits_are_proposed_where_16_do_not_fit(configured: Callable[..., Config]) -> None:
    estimator = Estimator(get_family("QwenImageEdit"), configured("QwenImageEdit", "cache.use_cache=true"), None)
    # Qwen2.5-VL 7B: 8.29 billion weights, of which 28 x (2 x 3584 x (3584 + 512) + 3 x 3584 x 18944) and
    # 32 x (4 x 1280 x 1280 + 3 x 1280 x 3420) are in its blocks; the VAE has 0.13.
    in_blocks = 28 * (2 * 3584 * (3584 + 512) + 3 * 3584 * 18944) + 32 * (4 * 1280**2 + 3 * 1280 * 3420)
    assert estimator.encoders() == pytest.approx(2 * 8.42e9)
    for card, keys in ((24, set()), (16, {"model.quantize_text_encoders"}), (8, {"cache.text_encoder_device"})):
        found = cheapest_change(estimator, card * GIB)
        assert found is not None
        change, estimate = found
        named = {"model.quantize_text_encoders", "cache.text_encoder_device"}.intersection(change.keys)
        assert named == keys, card
        if card == 16:
            assert "precision of the text embeddings" in change.price
            assert estimate.encoding == pytest.approx(2 * 8.42e9 - in_blocks, rel=0.002)


@pytest.mark.parametrize("name", FAMILIES)
def test_settings_are_tried_fastest_first(
    name: str, configured: Callable[..., Config], full_size: dict[str, Footprint]
) -> None:
    """By the times that are known of an H100; swapping and offloading, of which none is, come after."""
    estimator, card = Estimator(get_family(name), configured(name), None), card_called("H100")
    assert card is not None
    times, known = [], True
    for keys, _ in memory_changes(estimator):
        unknown = "train.blocks_to_swap" in keys or "train.offload_activations" in keys
        assert known or unknown
        known = not unknown
        if known:
            keep = keys["train.keep_activations"] if keys["train.gradient_checkpointing"] else None
            times.append(seconds(full_size[name], Step(keep, True, "fp8", "flash4"), card))
    assert len(times) > 5
    assert times == sorted(times)  # type: ignore[type-var]


def test_the_plan_of_a_card_by_name(configured: Callable[..., Config]) -> None:
    text = describe(configured("FluxKontext", "train.gradient_checkpointing=true"), "H100")
    assert "a step: about 1." in text and "measured on an H100 (flash attention, not compiled)" in text
    assert "fits a card of 80 GiB" in text
    accumulated = configured("FluxKontext", "train.gradient_checkpointing=true", "train.gradient_accumulation_steps=10")
    assert "a step: about 1" in describe(accumulated, "H100") and "a step: about 1." not in describe(
        accumulated, "H100"
    )
    unmeasured = describe(configured("FluxKontext", "model.quantize=nf4"), "RTX 4090")
    assert "by the data sheet of the RTX 4090; no such card was measured" in unmeasured
    assert "with it, a step: above" in unmeasured
    assert "a step: not said of a card that is not known by name, as are those of" in describe(accumulated, "24GB")
    swapped = configured("FluxKontext", "train.gradient_checkpointing=true", "train.blocks_to_swap=4")
    assert "swapped blocks were not measured" in describe(swapped, "H100")
    with pytest.raises(ConfigError, match=r"is no amount of memory.*H200"):
        describe(accumulated, "H900")
    for several in ("4xH100", "2 x 24GB", "H100x8", "8× RTX 4090"):
        with pytest.raises(ConfigError, match=r"one process on one card.*distributed\.md"):
            describe(accumulated, several)


def test_the_plan_decides_what_is_left_to_the_card(configured: Callable[..., Config]) -> None:
    automatic = configured("FluxKontext", "train.memory=auto")
    assert "memory: train.gradient_checkpointing=true train.keep_activations=" in describe(automatic, "40GB")
    assert "fits a card of 40 GiB" in describe(automatic, "40GB")
    assert "memory: nothing to change" in describe(automatic, "140GB")
    text = describe(automatic, "3GB")
    assert "GiB  weights" in text and "nothing that is known here makes it fit" in text and "model.quantize" in text


def test_full_fine_tuning_that_does_not_fit_is_advised_what_it_can_do(configured: Callable[..., Config]) -> None:
    config = configured("FluxKontext", "model.lora=null", "train.low_memory=true")
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            text = describe(config, "24GB")
    finally:
        torch.set_warn_always(False)
    assert "GiB  optimizer" in text and "does not fit a card of 24 GiB" in text
    assert "model.lora in place of null" in text and "configs/accelerate/fsdp2.yaml" in text
    assert "swap" not in text and "quantise" not in text


def test_full_fine_tuning_fits_by_what_it_can_do_without(configured: Callable[..., Config]) -> None:
    """Weights of four bytes and AdamW's state take 133 GiB, gradients 44; its state in 8 bits takes a quarter."""
    full = ("model.lora=null", "optimizer.init_args.lr=1e-5", "train.gradient_checkpointing=true")
    estimator = Estimator(get_family("FluxKontext"), configured("FluxKontext", *full), None)
    for card, last in ((141, "train.release_gradients=true"), (80, "optimizer.class_path=bitsandbytes"),
                       (55, "train.weight_precision=bf16")):  # fmt: skip
        found = cheapest_change(estimator, card * GIB)
        assert found is not None
        words = as_overrides(estimator.config, found[0].keys)
        assert "train.max_grad_norm=null" in words and last in words and ("optimizer" in words) == (card < 141)
        assert (
            Estimator(estimator.family, configured("FluxKontext", *full, *words.split()), None).estimate() == found[1]
        )
        assert ("weight_precision" in words) == (card == 55)
    assert cheapest_change(estimator, 44 * GIB) is None  # weights in 16 bits and a state in 8 take 44.3
    accumulated = Estimator(
        estimator.family, configured("FluxKontext", *full, "train.gradient_accumulation_steps=2"), None
    )
    found = cheapest_change(accumulated, 141 * GIB)
    assert found is not None and as_overrides(accumulated.config, found[0].keys).startswith("train.weight_precision")


def test_a_base_of_the_hubs_cache_is_planned_as_it_is_stored(
    configured: Callable[..., Config], hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published architecture, and files whose headers say fp8: on 24 GiB nothing of it has to be swapped."""
    family, repository = get_family("FluxKontext"), hub_cache / "models--someone--fp8"
    folder = repository / "snapshots" / "abc"
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "FluxKontextPipeline"}')
    (folder / "transformer" / "config.json").write_text(json.dumps(transformer_config(family, None)))
    save_file({"a.weight": torch.zeros(2, 2, dtype=torch.float8_e4m3fn)}, folder / "transformer" / WEIGHTS)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    config = configured("FluxKontext", "model.pretrained_model_name_or_path=someone/fp8", "train.low_memory=true",
                        "train.gradient_checkpointing=true", "train.keep_activations=none")  # fmt: skip

    text = describe(config, "24GB")
    assert "base in fp8" in text and "memory: nothing to change" in text and "not on this machine" not in text
    assert "frozen base in fp8, as the checkpoint is (dtypes" in "\n".join(dry_run.lines(config))
    found = [settled(config, family, place, [(1024, 1024)] * 2, 24 * GIB)[0].train.blocks_to_swap
             for place in (folder, None)]  # fmt: skip
    assert found[0] == 0
    assert found[1] != 0
    (folder / "transformer" / WEIGHTS).unlink()
    assert local_checkpoint(config.model) is None, "a download that was cut short"


def test_the_summary_of_a_dry_run(configured: Callable[..., Config], tmp_path: Path) -> None:
    config = configured("QwenImageEdit")
    lines = list(summary(config))
    peak = Estimator(get_family("QwenImageEdit"), config, None).estimate().peak
    assert lines[0].startswith(f"{peak / GIB:.1f} GiB on the card while training: kept activations ")
    (tmp_path / "model_index.json").write_text('{"_class_name": "QwenImageEditPipeline"}')
    with pytest.raises(ConfigError, match=r"transformer/\S+ is missing"):
        list(summary(configured("QwenImageEdit", f"model.pretrained_model_name_or_path={tmp_path}")))


def test_the_plan_in_words(configured: Callable[..., Config]) -> None:
    config = configured("FluxKontext")
    assert "fits a card of 80 GiB" in describe(config, "80GB")
    text = describe(config, "24GB")
    assert "does not fit a card of 24 GiB" in text
    assert "FLUX.1-Kontext-dev is not on this machine" in text
    assert "train.blocks_to_swap=" in text
    assert "TFLOP" in text
    assert "whether it fits is not said" in describe(config, None) or torch.cuda.is_available()


def test_memory_of_a_card() -> None:
    assert parse_memory("24GB") == parse_memory("24 GiB") == parse_memory("24") == 24 * GIB
    for wrong in ("24TB", "much", "0", "", "4090GB"):
        with pytest.raises(ConfigError, match="is no amount of memory"):
            parse_memory(wrong)


def test_auto_is_decided_for_the_card(configured: Callable[..., Config]) -> None:
    family, sizes = get_family("FluxKontext"), [(1024, 1024)] * 2

    def decided(card: int, *overrides: str) -> Any:
        return settled(configured("FluxKontext", *overrides), family, None, sizes, card * GIB)[0].train

    assert not decided(140, "train.memory=auto").gradient_checkpointing
    middling = decided(40, "train.memory=auto")
    assert middling.gradient_checkpointing
    assert 0 < middling.keep_activations < 1
    assert decided(16, "train.memory=auto").blocks_to_swap > 10
    low = ("train.low_memory=true", "train.gradient_checkpointing=true", "train.keep_activations=none")
    assert decided(80, *low).blocks_to_swap == 0
    assert 0 < decided(24, *low).blocks_to_swap < decided(16, *low).blocks_to_swap
    assert decided(80, "train.gradient_checkpointing=true", "train.keep_activations=auto").keep_activations == 1.0
    with pytest.raises(ConfigError, match="gradient_checkpointing=true"):
        decided(24, "train.low_memory=true")
    with pytest.raises(ConfigError, match="does not fit"):
        decided(3, *low)


def test_offloaded_activations_take_powers_of_two_of_the_host(configured: Callable[..., Config]) -> None:
    """By hand: 57 blocks keep 8192 tokens of pictures, 48 MiB, and 512 of text, 3 MiB; the modulation is small."""
    recomputed = ("train.gradient_checkpointing=true", "train.keep_activations=none")
    estimator = Estimator(get_family("FluxKontext"), configured("FluxKontext", *recomputed), None)
    assert estimator.estimate().device["kept activations"] == pytest.approx(57 * (48 + 3) * 2**20, rel=1e-3)
    offloaded = configured("FluxKontext", *recomputed, "train.offload_activations=true")
    found = estimator.estimate(offloaded)
    assert "kept activations" not in found.device
    assert found.host["activations"] == pytest.approx(57 * (64 + 4) * 2**20, rel=1e-3)


def test_too_little_host_memory_is_said(configured: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 11.9 billion weights of two bytes all that is in blocks waits; where none does, nothing is said."""
    swapping = configured("FluxKontext", "train.gradient_checkpointing=true", "train.blocks_to_swap=57")

    def said(config: Config, free: float, processes: int = 1) -> str | None:
        monkeypatch.setattr("qwen_image_finetune.fitting.plan.free_host_memory", lambda: int(free * GIB))
        family, sizes = get_family("FluxKontext"), [(512, 512)] * 2
        return settled(config, family, None, sizes, 80 * GIB, processes)[1]

    words = said(swapping, 12)
    assert words is not None and "needs 26.0 GiB of host memory, 12.0 are free" in words
    assert "Most is swapped blocks (22.0): a base of fewer bits" in words
    assert "warning" not in (said(swapping, 27) or "") and "needs 52.1 GiB" in (said(swapping, 27, 2) or "")
    assert "warning" not in (said(configured("FluxKontext"), 12) or "")
    monkeypatch.setattr("qwen_image_finetune.fitting.plan_words.card_memory", lambda: 80 * GIB)
    for text in (describe(swapping, None), "\n".join(summary(swapping))):
        assert "needs 26.0 GiB of host memory, 12.0 are free" in text
    assert "warning" not in describe(swapping, "80GB"), "another machine"


def test_without_a_card_auto_changes_nothing(configured: Callable[..., Config]) -> None:
    config = configured("FluxKontext", "train.gradient_checkpointing=true", "train.blocks_to_swap=auto")
    found, words = settled(config, get_family("FluxKontext"), None, [(64, 64)], None)
    assert found.train.blocks_to_swap == 0
    assert words is not None
    plain = configured("FluxKontext")
    assert settled(plain, get_family("FluxKontext"), None, [(64, 64)], None) == (plain, None)


def test_a_plan_in_numbers_says_what_the_words_say(configured: Callable[..., Config]) -> None:
    config = configured("FluxKontext", "train.max_train_steps=100")
    for card, references, fits in (("H100", None, True), ("24GB", 2, False)):
        found, words = numbers(config, card, references), describe(config, card, references)
        assert found["sizes"] == [[1024, 1024]] * (1 + (references or 1))
        assert found["fits"] is fits
        assert f"{found['peak']:7.2f} GiB  together" in words
        assert (found["change"] is None) is fits
        if fits:
            assert found["step_seconds"] is not None and f"about {found['step_seconds']:.2f} s" in words
            assert found["seconds"] == pytest.approx(100 * found["step_seconds"])
        else:
            assert as_overrides(config, found["change"]["keys"]) in words
            assert f"({found['change']['peak']:.1f} GiB)" in words
    assert numbers(config, "1GB")["last_resort"] is not None
    assert json.loads(json.dumps(found)) == found


def test_a_plan_for_several_references(configured: Callable[..., Config]) -> None:
    config = configured("FluxKontext", "data.init_args.image_size=[512,256]")
    assert estimator_of(config).sizes == estimator_of(config, 1).sizes == ((512, 256),) * 2
    assert estimator_of(config, 2).sizes == ((512, 256),) * 3
    with pytest.raises(ConfigError, match="--references 9: FluxKontext takes at most 8"):
        describe(config, "H100", 9)
    words = ("train.trainer=Flux", "model.pretrained_model_name_or_path=black-forest-labs/FLUX.1-dev")
    with pytest.raises(ConfigError, match="--references 1: Flux takes none"):
        numbers(configured("FluxKontext", *words), "H100", 1)


def test_small_sizes_and_numbers_have_words_too() -> None:
    assert [count_words(number) for number in (11_900_000_000, 473_000, 512)] == [
        "11.90 billion",
        "0.47 million",
        "512",
    ]
    assert [size_words(size) for size in (24 * GIB, 3 * 2**20, 100, 0)] == [
        "24.00 GiB",
        "3.00 MiB",
        "0.10 KiB",
        "nothing",
    ]
