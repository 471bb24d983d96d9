"""What a training step costs: full-size architectures with random weights, variants side by side.

Random weights cost the same time and memory as trained ones, and are made on the device. Rounds go over all variants in
one process, each alone on the card while it is stepped, so that a card that warms up slows all of them alike; medians
are told. The first row is what other trainers do, by the libraries' own means and none of ours: diffusers' transformer,
peft, everything bf16, eager, full recomputation, flash.

With cards named (`--card 24GB`), each gets a row of its own: `plan` chooses the settings, and the allocator may take no
more memory than such a card has.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import peft
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwen_image_finetune import levers
from qwen_image_finetune.config import Config, ConfigError
from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.disk.outputs import check_output
from qwen_image_finetune.families import get_family, with_targets
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.fitting.estimate import ENCODER_PARTS, GIB, OUTSIDE, Estimator, transformer_config
from qwen_image_finetune.fitting.footprint import Footprint, footprint, stand_in, usual_sizes
from qwen_image_finetune.fitting.plan import cheapest_change, parse_memory
from qwen_image_finetune.levers.attention import attention_of
from qwen_image_finetune.levers.compile import compilation_of
from qwen_image_finetune.levers.quantize import candidates, replace
from qwen_image_finetune.levers.quantized_linear import quantised
from qwen_image_finetune.lora import adapters
from qwen_image_finetune.records import Batch

BASELINE = "baseline"
RECOMPUTED = {"gradient_checkpointing": True, "keep_activations": "none"}
KEPT = {"gradient_checkpointing": True, "keep_activations": 0.0, "compile": True}
FREE = {"gradient_checkpointing": False, "compile": True}


@dataclass(frozen=True)
class Variant:
    """One setting."""

    train: dict[str, Any] = field(default_factory=dict)  # keys of that section
    quantize: str | bool = False
    card: int | None = None  # bytes that the allocator may take; None is all there is
    config: Config | None = None  # a whole run's, in place of one made of the options


VARIANTS: dict[str, Variant] = {
    "attention": Variant(RECOMPUTED),
    "compiled": Variant({**RECOMPUTED, "compile": True}),
    "kept": Variant(KEPT),
    "half": Variant({**KEPT, "keep_activations": 0.5}),
    "free": Variant(FREE),
    "fp8": Variant({**RECOMPUTED, "compile": True}, "fp8"),
    "fp8-kept": Variant(KEPT, "fp8"),
    "fp8-half": Variant({**KEPT, "keep_activations": 0.5}, "fp8"),
    "fp8-all": Variant({**KEPT, "keep_activations": 1.0}, "fp8"),
    "fp8-free": Variant(FREE, "fp8"),
    "nf4": Variant({**RECOMPUTED, "compile": True}, "nf4"),
    "nf4-kept": Variant(KEPT, "nf4"),
    "nf4-offloaded": Variant({**KEPT, "offload_activations": True}, "nf4"),
    "fp8-offloaded": Variant({**KEPT, "offload_activations": True}, "fp8"),
    "fp8-swapped": Variant({**RECOMPUTED, "blocks_to_swap": 20}, "fp8"),
    "int8-kept": Variant(KEPT, "int8"),
    "int8-free": Variant(FREE, "int8"),
}
WARM_UP = 2  # steps that are not timed, after the first one


@dataclass(frozen=True)
class Options:
    """What is measured."""

    family: str
    variants: tuple[str, ...] = ()
    size: tuple[int, int] = (1024, 1024)
    batch: int = 1
    rank: int = 16
    steps: int = 5
    rounds: int = 2  # over all variants
    cards: tuple[str, ...] = ()  # amounts of memory, such as 24GB
    peak_tflops: float | None = None
    output: Path | None = None
    overwrite: bool = False  # a file that is there
    text_tokens: int | None = None  # None is what the family has of them
    tiny: bool = False


@dataclass(frozen=True)
class Subject:
    """What all variants step: an architecture and one batch of it."""

    family: Family
    about: dict[str, Any]  # config.json of the transformer
    sizes: tuple[tuple[int, int], ...]  # (width, height) in pixels of target and reference
    batch: Batch
    found: Footprint


class Timed:
    """One variant: built, then stepped when it is its turn."""

    def __init__(
        self,
        name: str,
        variant: Variant | None,
        options: Options,
        family: Family,
        about: dict[str, Any],
        batch: Batch,
    ) -> None:
        """
        Args:
            variant: None is what other trainers do.
        """
        self.name, self.family, self.variant = name, family, variant
        self.device = _device()
        self.dtype = torch.bfloat16
        format = str(variant.quantize) if variant is not None and variant.quantize else None
        self.model: Any = random_transformer(family, about, self.device, self.dtype, format)
        if variant is None:
            _as_others_do(self.model, options)
        else:
            config = variant.config or config_of(options, variant)
            levers.prepare(self.model, config, self.device)
        self.model.train()
        self.batch = batch.to(self.device, self.dtype)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=self.device.type == "cuda")
        _forget_peaks(self.device)
        _limit(self.device, None if variant is None else variant.card)
        self.noise = torch.randn_like(self.batch.target)
        began = time.perf_counter()
        self.loss = self.step()
        self.first = time.perf_counter() - began
        self.milliseconds: list[float] = []

    def step(self) -> float:
        """One optimizer step; returns the loss, after everything is done."""
        others = self.variant is None
        # Models that leave the choice of an attention to torch get its flash attention and no other.
        flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if others else nullcontext()
        with flash:
            with torch.autocast(self.device.type, self.dtype, enabled=not others):
                loss = functional.mse_loss(self._velocity(), (self.noise - self.batch.target).float())
            loss.backward()
            if self.variant is not None and self.variant.config is not None and self.variant.config.loss.preserves:
                self._preserve(self.variant.config.loss.preservation.weight)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _velocity(self) -> Tensor:
        guidance = 1.0 if self.family.distilled_guidance(self.model.config) else None
        sigma = torch.full((len(self.noise),), 0.5, device=self.device)
        noisy = 0.5 * self.batch.target + 0.5 * self.noise
        return self.family.velocity(self.model, noisy, sigma.to(noisy.dtype), self.batch, guidance).float()

    def _preserve(self, weight: float) -> None:
        """The passes of the second loss term, as `training.objective` has them; the prompt has another text alone."""
        with adapters.at_rest(self.model, 0.0), torch.autocast(self.device.type, self.dtype):
            own = self._velocity()
        with torch.autocast(self.device.type, self.dtype):
            difference = functional.mse_loss(self._velocity(), own)
        (weight * difference).backward()

    def timed_step(self) -> None:
        """A step whose time, in milliseconds, counts."""
        began = time.perf_counter()
        self.step()  # it ends with a number on the host, so nothing is left to do on the card
        self.milliseconds.append(1e3 * (time.perf_counter() - began))

    def result(self) -> dict[str, Any]:
        """What is written down."""
        compilation = compilation_of(self.model)
        allocated, reserved = _peaks(self.device)
        return {
            "variant": self.name,
            "steps": self.milliseconds,
            "peak_bytes": allocated,
            "reserved_bytes": reserved,
            "first_step_seconds": self.first,  # with everything that is compiled
            "compilations": None if compilation is None else compilation.num_graphs,
            "attention": attention_of(self.model) or "flash",
            "settings": {} if self.variant is None else {**self.variant.train, "quantize": self.variant.quantize},
            "loss": self.loss,
            "device": _device_name(self.device),
            "torch": torch.__version__,
        }


def run(options: Options, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Measure and print all rows; one that fails says why, and the others go on.

    Raises:
        ConfigError: an unknown variant, a size that the model does not take, or a full-size model without a card.
    """
    unknown = sorted(set(options.variants) - {BASELINE, *VARIANTS})
    if unknown:
        raise ConfigError(f"variants {unknown} are not among {sorted(VARIANTS)}")
    if _device().type != "cuda" and not options.tiny:
        raise ConfigError("no card here: a full-size step takes hours on a CPU; --tiny shows that everything runs")
    if options.output is not None:
        check_output(options.output, options.overwrite)
    what = subject(options)
    variants = _chosen(options, what.family)
    visits: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for number in range(options.rounds):
        for name, variant in variants.items():
            visits[name].append(visit(name, variant, options, what.family, what.about, what.batch))
            say(f"round {number + 1} of {options.rounds}: {name}: {in_short(visits[name][-1])}")
    rows = [merged(visits[name], what.found, options) for name in variants]
    for row in rows:
        if "error" not in row and "error" not in rows[0]:
            row["ratio"] = rows[0]["milliseconds"] / row["milliseconds"]
    if options.output is not None:
        write_atomic(options.output, json.dumps(rows, indent=1) + "\n")
    for line in table(rows):
        say(line)
    return rows


def subject(options: Options) -> Subject:
    """The architecture, and a batch of zeros of the size that is asked for, with one reference where it takes any.

    Raises:
        ConfigError: a size that the model does not take.
    """
    family = get_family(options.family)
    if any(side % family.side_multiple for side in options.size):
        raise ConfigError(f"--size {options.size[0]} {options.size[1]}: {family.name} takes multiples of "
                          f"{family.side_multiple}")  # fmt: skip
    about = _tiny(family) if options.tiny else transformer_config(family, None)
    size = (64, 64) if options.tiny else options.size
    sizes = usual_sizes(family, size)
    text_tokens = options.text_tokens or (16 if options.tiny else family.text_tokens(sizes[1:]))
    batch = stand_in(family, about, sizes, options.batch, text_tokens)
    found = footprint(family, about, batch, config_of(options, Variant()).model.lora)
    return Subject(family, about, sizes, batch, found)


def in_short(visit: dict[str, Any]) -> str:
    """What is known before all rows are done."""
    if "error" in visit:
        return str(visit["error"])
    words = [f"{statistics.median(visit['steps']):.1f} ms", f"first {visit['first_step_seconds']:.1f} s"]
    if visit["peak_bytes"] is not None:
        words.append(f"peak {visit['peak_bytes'] / GIB:.2f} GiB")
    if visit["compilations"] is not None:
        words.append(f"{visit['compilations']} graphs")
    return ", ".join([*words, visit["attention"]])


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows in words."""
    lines = ["variant          ms/step   ratio  images/s  peak GiB  reserved  TFLOP/s    MFU  first s  attention"]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['variant']:14s}  {row['error']}")
            continue
        ratio = f"{row['ratio']:6.2f}" if "ratio" in row else "     -"
        memory = [f"{row[key] / 2**30:8.2f}" if row[key] is not None else "       -"
                  for key in ("peak_bytes", "reserved_bytes")]  # fmt: skip
        used = "    -" if row["utilisation"] is None else f"{row['utilisation']:5.1%}"
        lines.append(
            f"{row['variant']:14s} {row['milliseconds']:9.1f}  {ratio}  {row['images_per_second']:8.3f}  {memory[0]}  "
            f"{memory[1]}  {row['tflops']:7.1f}  {used}  {row['first_step_seconds']:7.1f}  {row['attention']}"
        )
    return lines


def _chosen(options: Options, family: Family) -> dict[str, Variant | None]:
    """The rows: what other trainers do, then those asked for, or all; then the cards."""
    names = options.variants or (() if options.cards else tuple(VARIANTS))
    chosen: dict[str, Variant | None] = {BASELINE: None}
    chosen.update((name, VARIANTS[name]) for name in names if name != BASELINE)
    for card in options.cards:
        size = parse_memory(card)
        sizes = usual_sizes(family, options.size)
        found = cheapest_change(Estimator(family, config_of(options, Variant(FREE)), None, sizes), size)
        if found is None:
            raise ConfigError(f"--card {card}: nothing that `qif plan` knows makes a {family.name} fit")
        keys = found[0].keys
        train = {key.removeprefix("train."): value for key, value in keys.items() if key.startswith("train.")}
        chosen[f"{size / GIB:g} GiB"] = Variant({**FREE, **train}, keys.get("model.quantize", False), size)
    return chosen


def visit(
    name: str, variant: Variant | None, options: Options, family: Family, about: dict[str, Any], batch: Batch
) -> dict[str, Any]:
    """Build a variant, step it, and leave nothing behind; what goes wrong is the result."""
    try:
        row = Timed(name, variant, options, family, about, batch)
        for _ in range(WARM_UP):
            row.step()
        for _ in range(options.steps):
            row.timed_step()
        return row.result()
    except (ConfigError, RuntimeError) as error:  # also memory that runs out
        return {"variant": name, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
    finally:
        _limit(_device(), None)
        torch._dynamo.reset()  # what was compiled would be looked through by the next variant, and hold its memory
        _forget_peaks(_device())


def merged(visits: Sequence[dict[str, Any]], found: Footprint, options: Options) -> dict[str, Any]:
    """One row of all visits to a variant: the median of all steps and what follows from it, the first visit's compile
    time; or what went wrong."""
    failed = [visit for visit in visits if "error" in visit]
    if failed:
        return failed[0]
    steps = [each for visit in visits for each in visit["steps"]]
    milliseconds = statistics.median(steps)
    tflops = found.operations(None) / milliseconds / 1e9  # what is computed twice does not count
    return {
        **visits[0],
        "steps": steps,
        "milliseconds": milliseconds,
        "images_per_second": 1e3 * options.batch / milliseconds,
        "tflops": tflops,
        "utilisation": None if options.peak_tflops is None else tflops / options.peak_tflops,
    }


def config_of(options: Options, variant: Variant) -> Config:
    """A run's configuration with the settings of a variant."""
    config = Config.model_validate(
        {
            "model": {
                "pretrained_model_name_or_path": "random",
                "quantize": variant.quantize,
                "lora": {"r": options.rank, "lora_alpha": options.rank, "init_lora_weights": "gaussian"},
            },
            "train": {"trainer": options.family, **variant.train},
            "cache": {"use_cache": True, **{f"{name}_device": "cpu" for name in ENCODER_PARTS}},  # none is here
        }
    )
    return with_targets(config, get_family(options.family))


def _as_others_do(model: Any, options: Options) -> None:
    lora = config_of(options, Variant()).model.lora
    assert lora is not None
    model.add_adapter(
        peft.LoraConfig(
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            target_modules=lora.target_modules,
            init_lora_weights=cast(Any, lora.init_lora_weights),
        )
    )
    model.enable_gradient_checkpointing()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def random_transformer(
    family: Family, about: dict[str, Any], device: torch.device, dtype: torch.dtype, format: str | None = None
) -> Any:
    """A frozen model made where it runs, layer by layer: neither disk nor host memory sees its weights, and the card
    never more than one layer that is not quantised yet."""
    with init_empty_weights():
        model: Any = cast(Any, family.transformer).from_config(about)
    model.requires_grad_(False)
    for name, layer in list(candidates(model)) if format is not None else ():
        weight = torch.empty(layer.weight.shape, dtype=dtype, device=device).normal_(std=0.02)
        replace(model, name, quantised(weight, str(format)))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                number = torch.empty(parameter.shape, dtype=dtype, device=device)
                filled = number.normal_(std=0.02) if number.dim() > 1 else number.fill_(name == "weight")
                module._parameters[name] = nn.Parameter(filled, requires_grad=False)
    return model.to(device)


def _tiny(family: Family) -> dict[str, Any]:
    """The architecture of the family's tiny checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        family.tiny(Path(folder) / "tiny")
        return transformer_config(family, Path(folder) / "tiny")


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _forget_peaks(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _limit(device: torch.device, card: int | None) -> None:
    """Let torch allocate no more than a card of so many bytes has, less what lies outside of torch's allocator."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if card is None else min(1.0, (card - OUTSIDE) / total), device)


def _peaks(device: torch.device) -> tuple[int | None, int | None]:
    """Bytes allocated and reserved at their peak; unknown on a CPU."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
