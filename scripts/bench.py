"""The measurements of the documentation, on tiny checkpoints and a CPU. `make bench` prints them.

    loop     one training step against a bare loop of the same forward, backward and optimizer calls
    reading  a cached batch against reading its bytes
    cache    training from the cache against encoding on the way: steps a second and peak memory
    startup  --help, a refused configuration and a dry run, as whole processes
    scaling  one, two and four processes: steps a second, and what a step takes in each of them

Ratios of CPU seconds on one thread, variants interleaved, medians: other work on the machine moves wall time tenfold.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parents[1]
MOST_OF_A_START = 1.0  # seconds of CPU until a command that loads no model has said what it has to say
FAMILY_NAMES = ("FluxKontext", "QwenImageEdit")


def configuration(folder: Path, family: str, *overrides: str) -> Any:
    """A LoRA run of a tiny checkpoint on the example data at 128 x 128, batch 4."""
    from qwen_image_finetune.config import load_config
    from qwen_image_finetune.families import get_family

    checkpoint = folder / family
    get_family(family).tiny(checkpoint)
    file = folder / "config.yaml"
    settings = {
        "model": {"pretrained_model_name_or_path": str(checkpoint)},
        "data": {"init_args": {"dataset_path": "data/face_seg", "image_size": [128, 128]}, "batch_size": 4},
        "train": {"mixed_precision": "no", "checkpointing_steps": 100000},
        "cache": {"use_cache": True, "cache_dir": str(folder / "cache")},
        "logging": {"output_dir": str(folder / "output")},
    }
    file.write_text(json.dumps(settings))
    return load_config(file, overrides)


def quietly(run: Callable[[], Any]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return run()


def cpu_seconds(run: Callable[[], Any]) -> float:
    began = time.process_time()
    quietly(run)
    return time.process_time() - began


def bare_loop(config: Any, family_name: str, steps: int) -> Callable[[], None]:
    """The same calls with everything around them taken away: batches, noise and levels lie ready in memory."""
    import torch

    from qwen_image_finetune import flow, levers, loading
    from qwen_image_finetune.encoding.cache import EncodedDataset
    from qwen_image_finetune.encoding.pairs import open_dataset
    from qwen_image_finetune.families import get_family
    from qwen_image_finetune.records import collate
    from qwen_image_finetune.training.optim import build_optimizer

    family, folder = get_family(family_name), Path(config.model.pretrained_model_name_or_path)
    rows = EncodedDataset(config, family, open_dataset(config, family), folder, torch.float32)
    rows.missing()
    batch = collate([rows.read(index) for index in range(config.data.batch_size)])
    transformer = levers.prepare(loading.load_transformer(family, folder, torch.float32), config).train()
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(config.optimizer, parameters)
    guidance = 1.0 if family.distilled_guidance(transformer.config) else None
    sigma, noise = flow.draw(batch.keys, [0] * len(batch.keys), 0, batch.target.shape[1:], "uniform", 1.0)
    noisy = flow.noisy_latents(batch.target, sigma, noise)

    def run() -> None:
        for _ in range(steps):
            predicted = family.velocity(transformer, noisy, sigma, batch, guidance)
            (predicted - (noise - batch.target)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def bench_loop(folder: Path, rounds: int) -> dict[str, Any]:
    results = {}
    for family in FAMILY_NAMES:
        steps, ratios = time_loop(folder, family, rounds)
        results[family] = {"bare_step_ms": statistics.median(steps), "loop_over_bare": statistics.median(ratios)}
        print(
            f"loop     {family:14} bare step {statistics.median(steps):.1f} ms of CPU; the loop costs "
            f"{statistics.median(ratios):.3f} times that ({min(ratios):.3f} to {max(ratios):.3f})"
        )
    return results


def time_loop(folder: Path, family: str, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of a bare step and the ratio of ours to it, for each round."""
    from qwen_image_finetune.training.train import train

    few, many = 10, 60

    def ours(steps: int) -> float:
        config = configuration(folder, family, f"train.max_train_steps={steps}")
        return cpu_seconds(lambda: train(config))

    ours(1)  # fills the cache
    bare = bare_loop(configuration(folder, family), family, many - few)
    bare()
    steps, ratios = [], []
    for _ in range(rounds):
        short, long, floor = ours(few), ours(many), cpu_seconds(bare)
        ratios.append((long - short) / floor)
        steps.append(1000 * floor / (many - few))
    return steps, ratios


def bench_reading(folder: Path, rounds: int) -> dict[str, Any]:
    """Entries of full size: a 1024 x 1024 pair of FLUX Kontext in bfloat16 is 0.5 + 0.5 + 4 MiB."""
    import numpy as np
    import torch

    from qwen_image_finetune.encoding.cache import read_stacked
    from qwen_image_finetune.encoding.store import Store, entry_key
    from qwen_image_finetune.records import Encoded

    store, batch = Store(folder / "reading"), 4
    samples = [[entry_key(sample=sample, place=place) for place in range(4)] for sample in range(2 * batch)]
    for number, keys in enumerate(samples):
        shapes = ((16, 128, 128), (16, 128, 128), (512, 4096), (512 - number % batch, 4096))
        for key, shape in zip(keys, shapes, strict=True):
            store.write(key, {"tensor": torch.randn(shape).bfloat16()})
    alike, unlike = [keys[:3] for keys in samples], [[*keys[:2], keys[3]] for keys in samples]

    def sample_of(keys: list[str], read: Callable[[str], dict[str, Any]]) -> Encoded:
        target, reference, text = (read(key)["tensor"] for key in keys)
        return Encoded("sample", target, (reference,), {"text": text})

    def batches(load: Callable[[list[list[str]]], Any], samples: list[list[str]], size: int = batch) -> None:
        for first in range(0, len(samples), size):
            load(samples[first : first + size])

    def stacked(several: list[list[str]]) -> Any:
        return read_stacked(store, lambda read: [sample_of(keys, read) for keys in several])

    def bytes_alone(several: list[list[str]]) -> Any:
        """The same files into memory of the same shapes, by the fewest calls that do it."""
        own = [np.empty((len(several), store.path(key).stat().st_size), np.uint8) for key in several[0]]
        for number, keys in enumerate(several):
            for key, memory in zip(keys, own, strict=True):
                with store.path(key).open("rb", buffering=0) as file:
                    file.readinto(memory[number])
        return own

    def plain(several: list[list[str]]) -> Any:
        return [store.read(key) for keys in several for key in keys]

    variants: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        name: (partial(batches, load, keys, size), partial(batches, bytes_alone, keys, size))
        for name, load, keys, size in (
            ("entries", plain, alike, 1),
            ("batches of one", stacked, alike, 1),
            ("batches", stacked, alike, batch),
            ("unlike", stacked, unlike, batch),
        )
    }
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(max(rounds, 3) * 20):
        for name, runs in variants.items():
            seconds = []
            for run in runs:
                run()  # and what is timed finds the memory that this one gave back: new pages cost more than reading
                began = time.process_time()
                run()
                seconds.append(time.process_time() - began)
            ratios[name].append(seconds[0] / seconds[1])
    results = {}
    measured = {"entries": "verified entries", "batches of one": "batches of one sample",
                "batches": f"batches of {batch}, stacked",
                "unlike": f"batches of {batch}, prompts of unlike length"}  # fmt: skip
    for name, words in measured.items():
        low, median, high = statistics.quantiles(ratios[name], n=4)
        results[name] = {"read_over_bytes": median}
        print(
            f"reading  {words}: {median:.2f} times reading their bytes (quartiles {low:.2f} to {high:.2f}, page cache)"
        )
    return results


MEMORY_PROBE = """
import resource, sys, time
from qwen_image_finetune.config import load_config
from qwen_image_finetune.training.train import train
config = load_config(sys.argv[1], sys.argv[2:])
began = time.process_time()
train(config)
print("RESULT", time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def bench_cache(folder: Path, rounds: int) -> dict[str, Any]:
    """Each variant in a process of its own, for its peak memory; the difference of two lengths is the step."""
    from qwen_image_finetune.encoding.embeddings import encode_dataset

    results = {}
    for family in FAMILY_NAMES:
        config = configuration(folder, family)
        quietly(partial(encode_dataset, config))
        ratios, memory = [], []
        for _ in range(rounds):
            cached, uncached = (time_steps(folder, use_cache) for use_cache in (True, False))
            ratios.append(uncached[0] / cached[0])
            memory.append(cached[1] / uncached[1])
        results[family] = {"speedup": statistics.median(ratios), "memory": statistics.median(memory)}
        print(
            f"cache    {family:14} {statistics.median(ratios):.2f} times the steps a second of encoding on the way, "
            f"{statistics.median(memory):.2f} times its peak memory (of the process, libraries included)"
        )
    return results


def time_steps(folder: Path, use_cache: bool) -> tuple[float, float]:
    """CPU seconds of a step, and peak memory of the process in MiB."""
    seconds, peak = [], "0"
    for steps in (5, 25):
        options = [f"train.max_train_steps={steps}", f"cache.use_cache={str(use_cache).lower()}"]
        command = [sys.executable, "-c", MEMORY_PROBE, str(folder / "config.yaml"), *options]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        _, cpu, peak = out.strip().splitlines()[-1].split()
        seconds.append(float(cpu))
    return (seconds[1] - seconds[0]) / 20, float(peak)


def bench_startup(folder: Path, rounds: int) -> dict[str, Any]:
    """The least of several whole processes."""
    refused, accepted = folder / "refused.yaml", folder / "accepted.yaml"
    refused.write_text("model: {pretrained_model_name_or_path: owner/name}\ntrain: {num_epoch: 3}\n")
    accepted.write_text(  # as people write one: torch is not needed to see that its optimizer can be built
        "model: {pretrained_model_name_or_path: owner/name}\n"
        f"data: {{init_args: {{dataset_path: {ROOT / 'data' / 'face_seg'}}}}}\n"
        "optimizer: {init_args: {lr: 2.0e-4, weight_decay: 0.01}}\n"
        "lr_scheduler: {scheduler_type: cosine, warmup_steps: 50}\n"
    )
    commands = {
        "--help": ["--help"],
        "a refused configuration": ["train", str(refused)],
        "a dry run": ["train", str(accepted), "--dry-run"],
    }
    results = {}
    for name, words in commands.items():
        times = []
        for _ in range(max(rounds, 3)):
            before = os.times()
            subprocess.run([sys.executable, "-m", "qwen_image_finetune.cli", *words], capture_output=True, check=False)
            after = os.times()
            times.append(after.children_user + after.children_system - before.children_user - before.children_system)
        results[name] = min(times)
        print(f"startup  {name}: {min(times):.2f} s of CPU")
    if slow := [name for name, seconds in results.items() if seconds >= MOST_OF_A_START]:
        raise SystemExit(f"{', '.join(slow)}: {MOST_OF_A_START} s of CPU or more is too slow a start")
    return results


def bench_scaling(folder: Path, rounds: int) -> dict[str, Any]:
    from bench_scaling import scaling

    from qwen_image_finetune.encoding.embeddings import encode_dataset

    config = configuration(folder, "FluxKontext")
    quietly(partial(encode_dataset, config))
    return scaling(folder / "config.yaml", folder, rounds)


BENCHES = {"loop": bench_loop, "reading": bench_reading, "cache": bench_cache, "startup": bench_startup,
           "scaling": bench_scaling}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHES], help="which; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="of every measurement")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = {name: BENCHES[name](Path(folder), options.rounds) for name in options.names or BENCHES}
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
