"""How much of a LoRA's quality each precision of the frozen base keeps, on the toy bases.

For every precision the demo's LoRA is trained anew: same pairs, same order, same noise, same initial adapter. What it
has learnt is measured on pairs nobody trained on, at noise and noise levels that are the same for all, so that the
precisions are compared pair by pair. One further run, in bf16 with another seed, shows what chance alone changes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from draw_many import add_lora, draw
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_image_finetune.command.demo import FAMILIES, PROMPT
from qwen_image_finetune.config import Config, load_config
from qwen_image_finetune.disk import history, versions
from qwen_image_finetune.drawing.build import build_predictor
from qwen_image_finetune.drawing.predict import Predictor
from qwen_image_finetune.judging.intervals import Interval, t_interval
from qwen_image_finetune.levers import quantized_linear
from qwen_image_finetune.toy.measure import foreground_iou
from qwen_image_finetune.training.train import train
from qwen_image_finetune.training.validate import BASE

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = ROOT / "data/face_seg_held_out"
SAMPLING_STEPS = 8  # as the demonstration draws
REFERENCE, OTHER_SEED = "bf16", "bf16, other seed"
COMPUTED = ", computed"  # with the arithmetic of a card, on whatever machine
# Name of a row -> train.mixed_precision, model.quantize, what is added to train.seed.
ROWS: dict[str, tuple[str, str, int]] = {
    REFERENCE: ("bf16", "false", 0),
    OTHER_SEED: ("bf16", "false", 1),
    "float32": ("no", "false", 0),
    "fp8": ("bf16", "fp8", 0),
    f"fp8{COMPUTED}": ("bf16", "fp8", 0),
    "int8": ("bf16", "int8", 0),
    f"int8{COMPUTED}": ("bf16", "int8", 0),
    "nf4": ("bf16", "nf4", 0),
    "fp4": ("bf16", "fp4", 0),
}
LEVELS = 4  # noise levels at which each held-out pair's loss is measured
DEFINITION = (
    "kept: of the held-out loss that training on the bf16 base takes away, the share that this row takes away,\n"
    "from the same start: (B - L) / (B - L'), with B the loss of the bf16 base before training, L' the loss after\n"
    "it, and L that of the row. What quantisation itself costs counts against the row. Intervals: 95 %, of the\n"
    "mean over held-out pairs; the chance in training is not in them: the row with another seed shows how large it is."
)


def held_out(predictor: Predictor) -> tuple[list[Image.Image], list[Image.Image]]:
    """Faces nobody trained on and their masks, at the size the model sees."""
    faces = [Image.open(file).convert("RGB") for file in sorted((HELD_OUT / "control_images").glob("*.jpg"))]
    masks = [Image.open(file).convert("RGB") for file in sorted((HELD_OUT / "training_images").glob("*.png"))]
    size = predictor.size(faces[0])
    return (
        [face.resize(size, Image.Resampling.LANCZOS) for face in faces],
        [mask.resize(size, Image.Resampling.NEAREST) for mask in masks],
    )


@dataclass(frozen=True)
class Measured:
    """One training run."""

    precision: str
    before: list[float]  # held-out loss of each pair with the untrained base, in this precision
    after: list[float]  # with the LoRA
    iou: float | None  # mean foreground IoU of the masks drawn for the held-out faces; None where nothing is drawn


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each run (make demo: 800)")
    parser.add_argument("--bases", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="default: both")
    parser.add_argument("--precisions", nargs="+", choices=ROWS, default=list(ROWS), help="beside bf16; default: all")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    results: dict[str, list[Measured]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for base in options.bases:
            config = ROOT / f"configs/demo_{base}.yaml"
            names = [REFERENCE, *(name for name in options.precisions if name != REFERENCE)]
            results[base] = [measure(config, name, options.steps, Path(folder)) for name in names]
    for base, measured in results.items():
        print(f"\n{base}: LoRA of configs/demo_{base}.yaml, {options.steps} steps, {len(measured[0].after)} held-out "
              f"pairs at {LEVELS} noise levels")  # fmt: skip
        print("\n".join(table(measured)))
    print(f"\n{DEFINITION}")
    if options.output is not None:
        written = {base: [asdict(one) for one in measured] for base, measured in results.items()}
        options.output.write_text(json.dumps({"steps": options.steps, "rows": written}, indent=1) + "\n")
    return 0


def measure(
    config: Path, precision: str, steps: int, folder: Path, overrides: Sequence[str] = (), draws: bool = True
) -> Measured:
    """Train and measure one row.

    Args:
        folder: of caches and runs.
        overrides: of the configuration; those of the row come after them.
        draws: also draw the masks of the demo's held-out faces.
    """
    mixed_precision, format, later = ROWS[precision]
    settings = load_config(config, overrides)
    settings = load_config(config, [
        f"validation.dataset_path={HELD_OUT}",
        *overrides,
        "validation.enabled=true", f"validation.steps={steps + 1}", "validation.num_loss_pairs=1000",
        f"validation.num_loss_sigmas={LEVELS}", "validation.num_validation_samples=1",
        "validation.num_inference_steps=1",  # one picture of the base is drawn in any case
        f"train.max_train_steps={steps}", f"train.checkpointing_steps={steps}",
        f"train.seed={settings.train.seed + later}",
        f"train.mixed_precision={mixed_precision}", f"model.quantize={format}",
        f"cache.cache_dir={folder / 'cache'}", f"logging.output_dir={folder / precision}", "logging.report_to=none",
    ])  # fmt: skip
    print(f"# {settings.logging.tracker_project_name}, {precision}", flush=True)
    with multiplied_in_8_bits(precision.endswith(COMPUTED)), Float32Products():
        version = train(settings)
        assert version is not None
        iou = drawn_iou(settings, version) if draws else None
    before = json.loads((version / "samples" / f"{BASE}.json").read_text())["losses"]
    after = json.loads((version / history.BEST).read_text())["losses"]  # of the one checkpoint that there is
    return Measured(precision, before, after, iou)


@contextmanager
def multiplied_in_8_bits(wanted: bool) -> Iterator[None]:
    """Let layers of fp8 and int8 multiply as on a card: torch's CPU has the same operators, only slower."""
    names = ("has_fp8_products", "has_int8_products")
    before = {name: getattr(quantized_linear, name) for name in names}
    for name in names:
        if wanted:
            setattr(quantized_linear, name, lambda device: True)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(quantized_linear, name, function)


class Float32Products(TorchDispatchMode):
    """Products of 16 bits and of int8 that a CPU without units for them has by float32, many times sooner.

    They have the same meaning: those of 16 bits are summed in float32 and rounded once, and sums of whole numbers are
    exact, in float64 where they may leave float32's 24 bits.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if func is torch.ops.aten._int_mm.default and not tensors[0].is_cuda:
            exact = torch.float32 if 127**2 * tensors[0].shape[1] < 2**24 else torch.float64
            return (tensors[0].to(exact) @ tensors[1].to(exact)).to(torch.int32)
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
        if func in products and all(tensor.dtype == torch.bfloat16 and not tensor.is_cuda for tensor in tensors):
            return func(*(value.float() if isinstance(value, torch.Tensor) else value for value in args), **kwargs).to(
                torch.bfloat16
            )
        return func(*args, **kwargs)


def drawn_iou(config: Config, version: Path) -> float:
    """Mean foreground IoU of the held-out faces' masks, drawn in the precision of training."""
    predictor = build_predictor(config)
    faces, masks = held_out(predictor)
    add_lora(predictor, versions.checkpoint_folders(version)[-1] / "pytorch_lora_weights.safetensors")
    drawn = draw(predictor, [(face, PROMPT) for face in faces], SAMPLING_STEPS)
    return float(np.mean([foreground_iou(*pair) for pair in zip(drawn, masks, strict=True)]))


def kept(row: Measured, reference: Measured) -> Interval:
    """The share of the reference's loss reduction that a row reaches (see DEFINITION); the reduction is taken as known.

    Raises:
        ValueError: the reference has learnt nothing, of which no share can be told.
    """
    reduction = float(np.mean(reference.before) - np.mean(reference.after))
    if reduction <= 0:
        raise ValueError(f"training on {reference.precision} took nothing away from the held-out loss: train longer")
    shares = 1 - (np.asarray(row.after) - np.asarray(reference.after)) / reduction
    return t_interval(shares.tolist())


def table(measured: Sequence[Measured]) -> Iterator[str]:
    """The rows in words; the first is what the others are compared with."""
    reference = measured[0]
    yield f"{'base':16}  before  after   {'difference from bf16 (95 %)':30}  {'kept (95 %)':26}  IoU drawn"
    for row in measured:
        drawn = "-" if row.iou is None else f"{row.iou:.3f}"
        line = f"{row.precision:16}  {np.mean(row.before):.4f}  {np.mean(row.after):.4f}"
        if row is reference:
            yield f"{line}  {'':30}  {'100 %':26}  {drawn}"
            continue
        mean, low, high = t_interval((np.asarray(row.after) - np.asarray(reference.after)).tolist())
        share = kept(row, reference)
        difference = f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"
        words = f"{share.mean:.1%} ({share.low:.1%} to {share.high:.1%})"
        yield f"{line}  {difference:30}  {words:26}  {drawn}"


if __name__ == "__main__":
    sys.exit(main())
