"""Runs with every kind of adapter: resumed bit for bit, the same with and without the cache, and gone on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen_image_finetune.config import Config, ConfigError
from qwen_image_finetune.training.train import train
from qwen_image_finetune.training.trained import exact

Configure = Callable[..., Config]

# name: (family, format of the base, settings)
RUNS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "dora": ("FluxKontext", "nf4", (
        "use_dora=true", "use_rslora=true", "rank_pattern={to_q: 2}", "alpha_pattern={to_k: 1}", "lr_ratio=4",
        "rank_dropout=0.2", "module_dropout=0.2", "lora_dropout=0.1", "max_norm=0.5", "exclude_modules=[to_v]",
    )),
    "lokr": ("QwenImageEdit", "fp8", (
        "type=lokr", "r=2", "rank_pattern={to_q: 3}", "rank_dropout=0.2", "max_norm=0.5",
    )),
    "loha": ("FluxKontext", "nf4", ("type=loha", "r=2", "alpha_pattern={to_q: 3}", "module_dropout=0.2")),
    "oft": ("QwenImageEdit", "int8", ("type=oft", "oft_block_size=8", "module_dropout=0.2")),
}  # fmt: skip


def newest(run: Path | None) -> Path:
    assert run is not None
    return max(run.glob("checkpoint-*-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))


def losses(run: Path | None) -> list[float]:
    assert run is not None
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_exact_however_it_is_interrupted_cached_or_gone_on_from(name: str, configure: Configure) -> None:
    family, format, settings = RUNS[name]
    same = (f"model.quantize={format}", "train.checkpointing_steps=2", "train.max_train_steps=4",
            *(f"model.lora.{setting}" for setting in ("init_lora_weights=true", *settings)))  # fmt: skip
    whole = train(configure(family, *same))
    assert whole is not None
    for number, other in enumerate(
        ("cache.use_cache=false", f"train.resume_from_checkpoint={next(whole.glob('checkpoint-*-2'))}")
    ):
        again = train(configure(family, *same, other, f"logging.tracker_project_name=other{number}"))
        assert losses(again) == losses(whole)[-len(losses(again)) :]
        for file in ("adapter.safetensors", "optimizer.safetensors"):
            found, expected = load_file(newest(again) / file), load_file(newest(whole) / file)
            assert found.keys() == expected.keys()
            assert not [key for key in found if not torch.equal(found[key], expected[key])]
    still = (
        "train.max_train_steps=1",
        "optimizer.init_args.lr=0.0",
        f"model.lora.pretrained_weight={whole}",
        "model.lora.max_norm=null",
    )
    second = exact(newest(train(configure(family, *same, *still, "logging.tracker_project_name=still"))))
    assert not [key for key, weight in exact(newest(whole)).items() if not torch.equal(second[key], weight)]


def test_the_second_factor_learns_faster(configure: Configure) -> None:
    """Adam's first step is the rate, for every weight with a gradient."""
    start, moved = {}, {}
    for ratio in (1, 8):
        options = ("train.max_train_steps=1", f"model.lora.lr_ratio={ratio}", "optimizer.init_args.lr=0.001")
        run = train(configure("QwenImageEdit", *options, f"logging.tracker_project_name=ratio{ratio}"))
        moved[ratio] = exact(newest(run))
    for key, weight in moved[1].items():
        if ".lora_B." in key:  # begins at zero
            torch.testing.assert_close(moved[8][key], 8 * weight, atol=1e-6, rtol=1e-4)
            start[key] = weight.abs().max()
        else:
            torch.testing.assert_close(moved[8][key], weight, atol=1e-6, rtol=1e-5)
    assert max(start.values()) > 0.0009


@pytest.mark.parametrize(("overrides", "message"), [
    (("model.lora.use_dora=true", "model.lora.init_lora_weights=pissa"), "use_dora=true and model.lora.init_lora_wei"),
    (("model.lora.lr_ratio=4", "optimizer.class_path=prodigyopt.Prodigy"), "lr_ratio=4 and optimizer.class_path=prod"),
    (("model.lora.rank_pattern={'(': 3}",), r"model.lora.rank_pattern='\(' is not a regular expression"),
    (("model.lora.rank_pattern={to_q: 0}",), "model.lora.rank_pattern.* is refused; allowed: names of modules, each"),
    (("model.lora.module_dropout=1.0",), "module_dropout=1.0 is refused; allowed: number from 0 to below 1"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused_at_once(
    overrides: tuple[str, ...], message: str, configure: Configure
) -> None:
    with pytest.raises(ConfigError, match=message):
        configure("FluxKontext", *overrides)
