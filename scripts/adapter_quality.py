"""How well each kind of adapter learns, on the toy bases: held-out quality after the same steps.

The demo's LoRA is trained anew as each kind: same pairs, same order, same noise, same rank. Rates that suit one kind do
not suit another, so each kind is trained at several, and shown at the one where its held-out loss is lowest.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from precision_quality import REFERENCE, Measured, measure

from qwen_image_finetune.command.demo import FAMILIES
from qwen_image_finetune.config import load_config
from qwen_image_finetune.judging.intervals import t_interval

ROOT = Path(__file__).resolve().parent.parent
PLAIN = "LoRA"
# Name of a row -> settings of model.lora, beside the demo's rank and targets.
ADAPTERS: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    "DoRA": ("use_dora=true",),
    "rsLoRA": ("use_rslora=true",),
    "LoRA+": ("lr_ratio=4",),
    "LoKr": ("type=lokr",),
    "LoHa": ("type=loha",),
    "OFT": ("type=oft", "oft_block_size=16"),
    "rank_dropout": ("rank_dropout=0.1",),
    "module_dropout": ("module_dropout=0.1",),
    "max_norm": ("max_norm=1.0",),
}


@dataclass(frozen=True)
class Row:
    """An adapter at the rate that suits it best, of those that were tried."""

    adapter: str
    factor: float  # of the demo's learning rate
    measured: Measured


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each run (make demo: 800)")
    parser.add_argument("--bases", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="default: both")
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=list(ADAPTERS), help="default: all")
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0, 3.0], help="factors of the demo's rate")
    parser.add_argument("--no-drawing", action="store_true", help="measure losses alone")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    results: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for base in options.bases:
            config = ROOT / f"configs/demo_{base}.yaml"
            names = dict.fromkeys((PLAIN, *options.adapters))
            results[base] = [
                best(config, name, options.steps, options.rates, Path(folder), not options.no_drawing) for name in names
            ]
            print(f"\n{base}: adapters of configs/demo_{base}.yaml, {options.steps} steps, "
                  f"{len(results[base][0].measured.after)} held-out pairs")  # fmt: skip
            print("\n".join(table(results[base])), flush=True)
    if options.output is not None:
        written = {base: [asdict(row) for row in rows] for base, rows in results.items()}
        options.output.write_text(json.dumps({"steps": options.steps, "rows": written}, indent=1) + "\n")
    return 0


def best(config: Path, name: str, steps: int, rates: Sequence[float], folder: Path, draws: bool) -> Row:
    """Train an adapter at each rate; the run with the lowest held-out loss."""
    rate = float(load_config(config).optimizer.init_args["lr"])
    rows = []
    for factor in rates:
        print(f"# {name} at {factor:g} times the rate", flush=True)
        overrides = [
            *(f"model.lora.{setting}" for setting in ADAPTERS[name]),
            f"optimizer.init_args.lr={rate * factor}",
        ]
        if any(setting.startswith("type=") for setting in ADAPTERS[name]):
            overrides.append("model.lora.init_lora_weights=true")
        rows.append(Row(name, factor, measure(config, REFERENCE, steps, folder, overrides, draws)))
    return min(rows, key=lambda row: float(np.mean(row.measured.after)))


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The rows in words; the first is what the others are compared with."""
    reference = rows[0].measured
    yield f"{'adapter':16}  rate  before  after   {'difference from ' + PLAIN + ' (95 %)':30}  IoU drawn"
    for row in rows:
        found = row.measured
        drawn = "-" if found.iou is None else f"{found.iou:.3f}"
        mean, low, high = t_interval((np.asarray(found.after) - np.asarray(reference.after)).tolist())
        difference = "" if found is reference else f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"
        yield (f"{row.adapter:16}  {row.factor:4g}  {np.mean(found.before):.4f}  {np.mean(found.after):.4f}  "
               f"{difference:30}  {drawn}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
