"""Precision and compilation chosen by the planner: by rates, by what was measured, and the same again on a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_image_finetune.command.cli import main
from qwen_image_finetune.config import Config, ConfigError, load_config
from qwen_image_finetune.families import get_family
from qwen_image_finetune.fitting import bench, choice, measured, plan, quick
from qwen_image_finetune.fitting.estimate import GIB, Estimator
from qwen_image_finetune.fitting.footprint import Footprint
from qwen_image_finetune.fitting.plan_words import describe
from qwen_image_finetune.fitting.speed import Step, card_called, seconds, supposed
from qwen_image_finetune.training.train import train

Configure = Callable[..., Config]
AUTO = ("model.quantize=auto", "train.compile=auto", "train.memory=auto")


@pytest.fixture
def kontext(
    tmp_path: Path, full_size: dict[str, Footprint], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Estimator]:
    """An estimator of the published FLUX.1 Kontext."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def estimator(*overrides: str) -> Estimator:
        path = tmp_path / "run.yaml"
        path.write_text(
            "model: {pretrained_model_name_or_path: black-forest-labs/FLUX.1-Kontext-dev}\n"
            f"cache: {{use_cache: true, cache_dir: {tmp_path / 'cache'}}}\ntrain: {{trainer: FluxKontext}}\n"
        )
        cpu = [f"cache.{part}_device=cpu" for part in ("vae_encoder", "text_encoder", "text_encoder_2")]
        made = Estimator(get_family("FluxKontext"), load_config(path, [*cpu, *overrides]), None)
        made._footprint = lambda sizes: full_size["FluxKontext"]  # type: ignore[method-assign]
        return made

    return estimator


@pytest.mark.parametrize(
    ("card", "memory", "steps", "chosen", "why"),
    [
        ("H100", 80, 1000, ("fp8", True), "from rates measured on an H100"),
        ("RTX 3090", 24, 1000, ("int8", True), "a guess from the data sheet of the RTX 3090"),
        ("RTX 4090", 24, 1000, ("int8", True), "a guess from the data sheet of the RTX 4090"),
        ("RTX 4060 Ti", 16, 1000, ("int8", True), "a guess from the data sheet of the RTX 4060 Ti"),
        ("RTX 3060", 12, 1000, ("nf4", True), "a guess from the data sheet of the RTX 3060"),
        ("RTX 3070", 8, 1000, ("nf4", False), "a guess from the data sheet of the RTX 3070"),
        ("H100", 80, 20, (False, False), "from rates measured on an H100"),  # compiling takes longer than it spares
        (None, 24, 1000, ("int8", True), "the first that fits"),
        (None, 80, 1000, (False, False), "the first that fits"),
    ],
)
def test_what_is_chosen_for_a_card(
    kontext: Callable[..., Estimator], card: str | None, memory: int, steps: int, chosen: Any, why: str
) -> None:
    estimator = kontext(*AUTO, f"train.max_train_steps={steps}")
    named = None if card is None else card_called(card)
    config, sentence = choice.decided(estimator, memory * GIB, named, here=False)
    assert (config.model.quantize, config.train.compile) == chosen, sentence
    assert why in sentence
    assert "\n" not in sentence
    assert config.train.memory == "auto", "keeps its meaning: it is decided afterwards, with the rest known"


def test_a_plan_makes_room_for_the_encoders_and_leaves_the_choice(
    kontext: Callable[..., Estimator], tmp_path: Path
) -> None:
    """T5 in 16 bits takes 9.3 GiB: of a card of 8 nothing is chosen until it is in 8 bits, and then what it was."""
    kontext()
    words = describe(load_config(tmp_path / "run.yaml", AUTO), "RTX 3070").splitlines()
    change = next(line for line in words if line.startswith("the cheapest change that makes it fit"))
    assert change.endswith(" GiB): model.quantize_text_encoders=true")
    assert any(line.startswith("with it, chosen: model.quantize=nf4 train.compile=false:") for line in words)
    assert any(line.startswith("with it, memory: ") and "train.blocks_to_swap=37" in line for line in words)
    enough = describe(load_config(tmp_path / "run.yaml", [*AUTO, "model.quantize_text_encoders=true"]), "RTX 3070")
    assert "fits a card of 8 GiB" in enough


def test_what_is_written_is_not_chosen(kontext: Callable[..., Estimator]) -> None:
    named = card_called("RTX 4090")
    config, _ = choice.decided(kontext("model.quantize=nf4", "train.compile=auto", AUTO[2]), 24 * GIB, named, False)
    assert config.model.quantize == "nf4"
    config, _ = choice.decided(kontext("model.quantize=auto", AUTO[2]), 24 * GIB, named, False)
    assert config.train.compile is False
    with pytest.raises(plan.NothingFits, match=r"model\.quantize=auto: no precision makes the run fit the 2 GiB"):
        choice.decided(kontext(*AUTO[:2], "train.gradient_checkpointing=true"), 2 * GIB, named, False)


def test_blocks_are_not_swapped_to_a_host_without_room(
    kontext: Callable[..., Estimator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 8 GiB, 16 bits with nearly everything swapped are as fast as nf4 by PCIe 5.0, and rounded less."""
    for free, chosen in ((64, False), (16, "nf4"), (2, False)):
        monkeypatch.setattr(choice, "free_host_memory", lambda free=free: free * GIB)
        config, sentence = choice.decided(kontext(*AUTO), 8 * GIB, card_called("H100"), here=True)
        assert config.model.quantize == chosen, (free, sentence)


def test_fetching_hides_behind_the_computing_of_its_own_pass(kontext: Callable[..., Estimator]) -> None:
    """8 GiB: a forward pass computes for 0.45 s while 22 GB come to an H100: 0.45 s with PCIe 5.0, 0.90 s with 4.0."""
    card = card_called("H100")
    assert card is not None
    estimator = kontext("train.mixed_precision=bf16", "train.memory=auto")
    config, _ = plan.decided(estimator, 8 * GIB)
    estimator.config = config
    estimate = estimator.estimate()
    fetched = estimate.host["swapped blocks"]
    assert fetched == pytest.approx(22.4e9, rel=0.01)
    computed = supposed(estimator.footprint, Step("none", False, None, "flash"), card)
    for lanes, expected in ((32, fetched / 50e9 + 0.75 * computed), (16, fetched / 25e9 + 0.75 * computed),
                           (4, 2 * fetched / 6.25e9)):  # fmt: skip
        there = replace(card, lanes=lanes)
        assert choice.supposed(estimator, estimate, there, "flash") == pytest.approx(expected), lanes
    for lanes, chosen in ((32, False), (16, "nf4")):
        asking = kontext(*AUTO)
        found = list(choice.candidates(asking, 8 * GIB, replace(card, lanes=lanes), here=False))
        best, why = choice._best(found, asking.config, replace(card, lanes=lanes))
        assert (best.format or False) == chosen, why


def test_compiled_blocks_leave_what_they_keep_on_the_host_before_they_are_swapped(
    kontext: Callable[..., Estimator],
) -> None:
    """int8 needs 15.7 GiB of a card of 16: without what its blocks keep it fits, and stays compiled."""
    estimator = kontext("model.quantize=int8", "train.compile=true", "train.memory=auto")
    config, sentence = plan.decided(estimator, 16 * GIB)
    assert (config.train.offload_activations, config.train.blocks_to_swap, config.train.compile) == (True, 0, True)
    assert "train.offload_activations=true" in sentence
    config, _ = plan.decided(kontext("model.quantize=int8", "train.memory=auto"), 16 * GIB)
    assert (config.train.offload_activations, config.train.blocks_to_swap) == (False, 7)


def test_what_was_measured_with_other_software_or_hardware_is_forgotten(
    kontext: Callable[..., Estimator], monkeypatch: pytest.MonkeyPatch
) -> None:
    estimator = kontext(*AUTO)
    measured.write(estimator, {"fp8, compiled": 2.0})
    assert measured.read(estimator) == {"fp8, compiled": 2.0}
    others: list[tuple[Any, str, Any]] = [
        (torch, "__version__", "9.9"),
        (measured, "driver", lambda: "999.1"),
        (measured, "card", lambda: ["RTX 4090", 24 * GIB, 128]),
        (measured, "version", lambda name: "9.9"),
    ]
    for where, name, other in others:
        with monkeypatch.context() as patched:
            patched.setattr(where, name, other)
            assert measured.read(estimator) == {}, name
    assert measured.read(estimator) == {"fp8, compiled": 2.0}


def test_what_was_measured_here_wins(kontext: Callable[..., Estimator]) -> None:
    estimator, named = kontext(*AUTO), card_called("RTX 4090")
    measured.write(estimator, {"fp8, compiled": 2.0, "int8, compiled": 3.0})
    config, sentence = choice.decided(estimator, 24 * GIB, named, here=True)
    assert (config.model.quantize, config.train.compile) == ("fp8", True)
    assert "2 s a step, the next 3 s (model.quantize=int8 train.compile=true); measured here" in sentence
    other = kontext(*AUTO, "data.batch_size=2")
    assert measured.read(other) == {}, "of another batch nothing is known"
    measured.file_of(estimator.config).write_text("{broken")
    assert measured.read(estimator) == {}


def test_a_guess_is_what_was_measured_where_it_was(full_size: dict[str, Footprint]) -> None:
    found, card = full_size["FluxKontext"], card_called("H100")
    assert card is not None
    step = Step(0.0, True, "fp8", "flash4")
    assert supposed(found, step, card) == seconds(found, step, card)
    assert seconds(found, Step(0.0, True, "int8", "flash4"), card) is None, "never measured"
    # Measured once by accident: nothing could be compiled.
    assert supposed(found, Step(0.0, False, "fp8", "flash4"), card) == pytest.approx(2.205, rel=0.03)


def test_a_run_keeps_what_was_chosen_on_resume(configure: Configure) -> None:
    """On a CPU nothing is chosen; a run on a card of then is one whose written configuration says so."""
    options = (*AUTO, "train.max_train_steps=2", "train.checkpointing_steps=1")
    run = train(configure("FluxKontext", *options))
    assert run is not None
    written = load_config(run / "config.yaml")
    assert (written.model.quantize, written.train.compile) == (False, False)
    text = (run / "config.yaml").read_text().replace("quantize: false", "quantize: int8")
    (run / "config.yaml").write_text(text)
    again = train(configure("FluxKontext", *options, "train.max_train_steps=3", "train.resume_from_checkpoint=latest"))
    assert again == run
    assert load_config(run / "config.yaml").model.quantize == "int8"


@pytest.fixture
def cache_folder(tmp_path: Path) -> Path:
    """Its own: what was measured is kept there."""
    return tmp_path / "cache"


def test_quick_measures_the_candidates_and_keeps_them(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure("FluxKontext", "train.mixed_precision=bf16")
    monkeypatch.setattr(quick, "STEPS", 1)
    monkeypatch.setattr(quick, "MOST", 2)
    monkeypatch.setattr(bench, "WARM_UP", 0)
    family, passes = type(get_family("FluxKontext")), list[bool]()
    velocity = family.velocity

    def counted(*arguments: Any) -> Any:
        passes.append(torch.is_grad_enabled())
        return velocity(*arguments)

    monkeypatch.setattr(family, "velocity", counted)
    overrides = ["train.mixed_precision=bf16", "loss.preservation.weight=0.5"]
    assert main(["bench", str(tmp_path / "config.yaml"), "--quick", *overrides]) == 0
    # The planner counts one; then two steps of two candidates, each with the two passes of the second term.
    assert passes == [True] + [True, False, True] * 4
    said = capsys.readouterr().out
    rows = [line.partition(":")[0] for line in said.splitlines() if " s a step, the first " in line]
    assert rows == ["16 bits", "int8"]
    file = tmp_path / "cache" / "speed-cpu.json"
    assert str(file) in said
    (kept,) = json.loads(file.read_text()).values()
    assert set(kept["seconds"]) == {"16 bits", "int8"}
    assert kept["sizes"] == [[64, 64], [64, 64]]
    assert config.cache.cache_dir in str(file)


def test_quick_and_formats_of_one_direction_are_refused(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configure("FluxKontext")
    file = str(tmp_path / "config.yaml")
    assert main(["bench", file]) == 2
    assert "of a configuration, --quick is measured" in capsys.readouterr().err
    assert main(["bench", file, "--quick", "model.lora=null"]) == 2
    assert "model.lora=null has none" in capsys.readouterr().err
    for format in ("mxfp8", "nvfp4"):
        with pytest.raises(ConfigError, match=rf"model\.quantize='{format}' cannot be trained on: its w"):
            configure("FluxKontext", f"model.quantize={format}")
