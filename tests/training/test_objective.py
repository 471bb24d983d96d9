"""The loss of a micro-batch, against the formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from qwen_image_finetune import flow
from qwen_image_finetune.config import Config
from qwen_image_finetune.data.batches import MicroBatch
from qwen_image_finetune.families.flux_kontext import FluxKontext
from qwen_image_finetune.records import Batch
from qwen_image_finetune.training.objective import Objective

Configure = Callable[..., Config]
SCHEDULER = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
MODULE = torch.nn.Identity()
MICRO = MicroBatch(rows=(0, 1), visits=(3, 3), drop_caption=(False, False), drop_references=False)


class Tenth(FluxKontext):
    """Its velocity is a tenth of what it is shown; notes what else it is given."""

    def velocity(self, transformer: Any, noisy: Tensor, timestep: Tensor, batch: Batch, guidance: Any = None) -> Tensor:
        self.seen = transformer, guidance, torch.rand(())
        return noisy / 10


def objective(config: Config, guidance_embeds: bool = True) -> Objective:
    transformer: Any = SimpleNamespace(config={"guidance_embeds": guidance_embeds})
    return Objective(config, Tenth(), transformer, SCHEDULER, Accelerator(cpu=True))


def batch(seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    target = torch.randn((2, 16, 4, 6), generator=draw)
    return Batch(("one", "two"), target, (), {}, mask=torch.rand((2, 4, 6), generator=draw))


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_the_weighted_error_of_the_velocity(configure: Configure, masked: bool) -> None:
    options = (
        f"loss.mask_loss={masked}",
        f"data.init_args.use_edit_mask={masked}",
        "loss.foreground_weight=3",
        "loss.background_weight=0.5",
    )
    rows = batch()
    found, sigma = objective(configure("FluxKontext", *options, "train.seed=5"))(MODULE, rows, MICRO)

    shift = math.exp(0.5 + (6 - 256) * 0.65 / (4096 - 256))  # 6 tokens on the line through (256, .5) and (4096, 1.15)
    levels, noise = flow.draw(rows.keys, [3, 3], 5, (16, 4, 6), "logit_normal", shift)
    assert torch.allclose(sigma, levels, rtol=1e-6)
    target, noise, level = rows.target.double(), noise.double(), levels.double().view(2, 1, 1, 1)
    error = (((1 - level) * target + level * noise) / 10 - (noise - target)).square().mean(dim=1)
    assert rows.mask is not None
    weight = 0.5 + 2.5 * rows.mask.double() if masked else torch.ones_like(error)
    expected = (error * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2))
    assert torch.allclose(found.double(), expected, rtol=1e-5)


def test_a_constant_shift_is_the_one_written(configure: Configure) -> None:
    assert objective(configure("FluxKontext", "train.sigma_shift=3.0")).shift((16, 64, 64)) == 3.0


@pytest.mark.parametrize(("embeds", "expected"), [(True, 2.5), (False, None)])
def test_guidance_goes_to_models_that_have_an_embedding_for_it(
    configure: Configure, embeds: bool, expected: float | None
) -> None:
    given = objective(configure("FluxKontext", "train.guidance_scale=2.5"), embeds)
    given(MODULE, batch(), MICRO)
    assert given.family.seen[1] == expected  # type: ignore[attr-defined]


def test_dropout_follows_the_samples_and_nothing_else(configure: Configure) -> None:
    """What the global random state gives inside the model, whatever it was before."""
    given, drawn = objective(configure("FluxKontext", "model.lora.lora_dropout=0.5")), []
    for state, rows, visit in ((1, batch(), 3), (2, batch(), 3), (1, batch(), 4)):
        torch.manual_seed(state)
        given(MODULE, rows, MicroBatch((0, 1), (visit, visit), (False, False), False))
        drawn.append(float(given.family.seen[2]))  # type: ignore[attr-defined]
    assert drawn[0] == drawn[1] != drawn[2]


def test_it_is_the_loss_of_the_module_that_is_given(configure: Configure) -> None:
    """In several processes that is the wrapper, which averages its gradients; validation takes the bare one."""
    given = objective(configure("FluxKontext", "train.guidance_scale=2.5"))
    given(MODULE, batch(), MICRO)
    assert given.family.seen[:2] == (MODULE, 2.5)  # type: ignore[attr-defined]
    noise = torch.zeros_like(batch().target)
    given.loss(given.transformer, batch(), torch.full((2,), 0.5), noise)
    assert given.family.seen[:2] == (given.transformer, 2.5)  # type: ignore[attr-defined]
