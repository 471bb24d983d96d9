"""`qif bench CONFIG --quick`: the two or three best precisions of a run, measured on this card with its own sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from qwen_image_finetune.config import Config, ConfigError
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.fitting import bench, choice, measured, plan
from qwen_image_finetune.fitting.estimate import GIB, Estimator, Size, transformer_config
from qwen_image_finetune.fitting.footprint import stand_in
from qwen_image_finetune.levers.stored_precision import local_checkpoint

MOST = 3  # candidates
STEPS = 3  # timed ones of each
ENOUGH = 70.0  # seconds after which no third candidate is begun: compiling one takes about a minute on a card


def run(config: Config, family: Family, sizes: Sequence[Size] | None, say: Callable[[str], None] = print) -> None:
    """Measure the candidates that `choice` thinks most of, and keep what they took for "auto".

    The transformer has random weights, which cost what trained ones do. Weights that wait on the host are not measured.

    Args:
        sizes: (width, height) of target and references of the largest sample; None: as for a plan.

    Raises:
        ConfigError: the base is not a LoRA's, or nothing fits this card.
    """
    if config.model.lora is None:
        raise ConfigError("--quick compares precisions of a frozen base, and model.lora=null has none: give model.lora")
    began = time.perf_counter()
    card = plan.card_memory()
    compiled = False if card is None else "auto"  # without a card it only shows that everything runs
    asking = plan.with_keys(config, {"model.quantize": "auto", "train.compile": compiled})
    estimator = Estimator(family, asking, local_checkpoint(config.model), sizes)
    found = [one for one in choice.candidates(estimator, card or 1 << 50, plan.this_card(), here=card is not None)
             if not one.estimate.host.get("swapped blocks")]  # fmt: skip
    if not found:
        raise ConfigError("no precision makes this run fit the card without swapped blocks; see `qif plan`")
    seconds: dict[str, float] = {}
    for number, one in enumerate(worth(found)):
        if number == MOST - 1 and time.perf_counter() - began > ENOUGH:
            break
        name = measured.label(one.format, one.compiled)
        row = _measured(name, one, estimator)
        if "error" in row:
            say(f"{name}: {row['error']}")
            continue
        accumulated = config.train.gradient_accumulation_steps
        seconds[name] = accumulated * statistics.median(row["steps"]) / 1e3
        peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / GIB:.1f} GiB"
        say(f"{name}: {seconds[name]:.3g} s a step, the first {row['first_step_seconds']:.0f} s{peak}")
    if not seconds:
        raise ConfigError("none of the candidates could run here; the lines above say why")
    say(f"kept in {measured.write(estimator, seconds)} for model.quantize=auto and train.compile=auto")


def worth(found: Sequence[choice.Candidate]) -> list[choice.Candidate]:
    """The fastest of each precision by what is known; where nothing is, in the order of rounding."""
    best: dict[str | None, choice.Candidate] = {}
    for one in found:
        other = best.get(one.format)
        if other is None or (one.seconds or 0.0) < (other.seconds or 0.0):
            best[one.format] = one
    return sorted(best.values(), key=lambda one: one.seconds or 0.0)[:MOST]


def _measured(name: str, one: choice.Candidate, estimator: Estimator) -> dict[str, Any]:
    family, config = estimator.family, one.config
    about = transformer_config(family, estimator.folder, estimator.published)
    batch = stand_in(family, about, estimator.sizes, config.data.batch_size, estimator.text_tokens)
    variant = bench.Variant(quantize=one.format or False, config=config)
    options = bench.Options(family.name, steps=STEPS, batch=config.data.batch_size)
    return bench.visit(name, variant, options, family, about, batch)
