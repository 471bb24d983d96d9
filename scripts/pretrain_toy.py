"""Make the toy bases toy/flux-kontext and toy/qwen-image-edit from nothing: small real models that follow instructions.

    python scripts/pretrain_toy.py [STAGE [FAMILY]] [--minutes M] [--pairs N] [--vae-steps N] [--steps N]
                                   [--set KEY=VALUE] [--seed N] [--start FOLDER] [--build FOLDER] [--out FOLDER]

FAMILY is flux_kontext or qwen_image_edit; STAGE is `all` (the default: every stage, both families side by side) or

    draw          the pairs to learn from
    base          the untrained base                           (of one family, like all that follow)
    texts         embeddings of the prompts, while the autoencoder learns
    vae           the autoencoder
    pictures      latents of the pictures
    transformer   `qif train` in its full fine-tuning mode
    export        the finished base, into --out
    measure       held-out quality of each instruction

A stage whose result is there is left out, and a transformer that was interrupted continues at its newest checkpoint:
delete --build to start afresh. With --start toy it goes on from bases made before: their autoencoders stay as they
are, and the transformers learn from new pictures if --seed is another. With --minutes everything but `measure` ends in
time: the autoencoder's learning rate falls with the clock, and the transformer is stopped at a checkpoint. Measured
lines are appended to pretraining.log.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from draw_face_seg import PROMPTS
from draw_many import draw as draw_many
from draw_many import open_base, through_vae
from numpy.typing import NDArray
from PIL import Image

from qwen_image_finetune import loading
from qwen_image_finetune.config import Config, load_config
from qwen_image_finetune.disk import history, versions
from qwen_image_finetune.encoding import cache
from qwen_image_finetune.encoding.cache import EncodedDataset, Missing
from qwen_image_finetune.encoding.pairs import open_dataset
from qwen_image_finetune.families import get_family
from qwen_image_finetune.machine.accelerator import resolve_device
from qwen_image_finetune.toy import bases, edits, vae
from qwen_image_finetune.toy.faces import draw_face
from qwen_image_finetune.toy.measure import mean_psnr

ROOT = Path(__file__).resolve().parent.parent
SIZE = 64  # pixels
VAE_SHARE = 0.25  # of --minutes
SAVING = 40  # seconds of --minutes that are kept for the last checkpoint and the export
HELD_OUT = 16  # pairs of each instruction
SAMPLING_STEPS = 8
CORES = min(16, len(os.sched_getaffinity(0)))


@dataclass
class Sizes:
    """How much is drawn and learnt; what is not named here stands in configs/pretrain_toy_*.yaml."""

    pairs: int
    vae_steps: int
    vae_batch: int
    vae_rate: float
    training: list[str] = field(default_factory=list)  # overrides of the configuration


def sizes(options: argparse.Namespace) -> Sizes:
    """For the accelerator of this machine, where batches cost nothing, or for its CPU; then as asked for."""
    if torch.accelerator.is_available():
        chosen = Sizes(pairs=12000, vae_steps=6000, vae_batch=64, vae_rate=3e-3)
    else:
        training = ["data.batch_size=8", "data.num_workers=1", "train.max_train_steps=3000"]
        chosen = Sizes(pairs=2000, vae_steps=3000, vae_batch=4, vae_rate=4e-3, training=training)
    chosen.pairs = options.pairs or chosen.pairs
    chosen.vae_steps = options.vae_steps or chosen.vae_steps
    if options.steps:
        chosen.training.append(f"train.max_train_steps={options.steps}")
    chosen.training += options.set
    return chosen


class Pretraining:
    """The stages of one run of this script."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.sizes = sizes(options)
        self.build, self.out = options.build.resolve(), options.out.resolve()
        self.seed: int = options.seed
        self.before: Path | None = options.start and options.start.resolve()  # the folder of the bases to go on from
        self.end = time.monotonic() + (60 * options.minutes if options.minutes else math.inf)
        self.seconds = 60 * options.minutes if options.minutes else math.inf

    def say(self, message: str) -> None:
        """Print, and keep in the log that is committed with the weights."""
        print(message, flush=True)
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "pretraining.log").open("a", encoding="utf-8") as stream:
            stream.write(message + "\n")

    def overrides(self, family: str) -> list[str]:
        """What makes the family's configuration that of this run."""
        folder = self.build / family
        return [
            f"model.pretrained_model_name_or_path={folder / 'base'}",
            f"data.init_args.dataset_path={self.build / 'pairs'}",
            f"cache.cache_dir={folder / 'cache'}",
            f"logging.output_dir={folder}",
            *self.sizes.training,
        ]

    def config(self, family: str) -> Config:
        return load_config(config_file(family), self.overrides(family))

    # Stages

    def draw(self) -> None:
        """The pairs, as a dataset of our own layout, and posters for the autoencoders."""
        for folder in ("pairs/control_images", "pairs/training_images", "posters"):
            (self.build / folder).mkdir(parents=True, exist_ok=True)
        names = edits.shuffled_names(self.seed, self.sizes.pairs)
        with multiprocessing.get_context("fork").Pool(CORES) as pool:
            pool.starmap(
                draw_one, ((self.build, self.seed, index, name) for index, name in enumerate(names)), chunksize=32
            )

    def base(self, family: str) -> None:
        folder = self.build / family / "base"
        if (folder / "model_index.json").exists():
            return
        if self.before:
            shutil.copytree(self.before / family.replace("_", "-"), folder)
            shutil.copytree(folder / "vae", self.build / family / "vae")
            return
        with tempfile.TemporaryDirectory() as untrained:
            vae.new_vae(family).save_pretrained(untrained)
            bases.write_base(family, Path(untrained), folder, words=PROMPTS)

    def texts(self, family: str) -> None:
        self.encode(family, "texts")

    def train_vae(self, family: str) -> None:
        folder = self.build / family / "vae"
        if (folder / "config.json").exists():
            return
        model, device = vae.new_vae(family), resolve_device(None, "device").type
        self.say(f"{family}: autoencoder of {sum(p.numel() for p in model.parameters()):,} weights on {device}")
        vae.train_vae(
            model, self.drawn_pictures(), self.sizes.vae_steps, self.sizes.vae_batch, self.sizes.vae_rate, self.seed,
            device, VAE_SHARE * self.seconds, lambda line: self.say(f"  {family}: {line}"),
        )  # fmt: skip
        self.say(f"{family}: autoencoder, {reconstruction_words(model)}")
        model.save_pretrained(folder)

    def drawn_pictures(self) -> NDArray[np.uint8]:
        """What an autoencoder learns from, (n, SIZE, SIZE, 3): both sides of the pairs, and posters."""
        folders = ("pairs/control_images", "pairs/training_images", "posters")
        files = [file for folder in folders for file in sorted((self.build / folder).glob("*.png"))]
        return np.stack([np.asarray(Image.open(file)) for file in files])

    def pictures(self, family: str) -> None:
        """The trained autoencoder becomes the base's; its latents fill the cache."""
        shutil.copytree(self.build / family / "vae", self.build / family / "base/vae", dirs_exist_ok=True)
        self.encode(family, "pictures")

    def encode(self, family: str, kind: Literal["texts", "pictures"]) -> None:
        """Fill one part of the cache with processes, since models this small leave cores idle."""
        began, processes = time.monotonic(), max(1, CORES // len(bases.FAMILIES))
        tasks = [(self.config(family), kind, rank, processes) for rank in range(processes)]
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            done = sum(pool.starmap(encode_share, tasks, chunksize=1))
        self.say(f"{family}: {done} {kind} encoded in {time.monotonic() - began:.0f} s")

    def transformer(self, family: str) -> None:
        """Full fine-tuning through the same command that a user types."""
        began, limit = time.monotonic(), self.end - time.monotonic() - SAVING
        command = [sys.executable, "-m", "qwen_image_finetune.cli", "train", str(config_file(family))]
        process = subprocess.Popen([*command, *self.overrides(family)], cwd=ROOT)
        try:
            process.wait(None if limit == math.inf else max(1.0, limit))
        except subprocess.TimeoutExpired:
            process.terminate()  # it saves a checkpoint
            process.wait()
        config, seconds = self.config(family), time.monotonic() - began
        if process.returncode not in (0, 128 + signal.SIGTERM, -signal.SIGTERM):
            raise SystemExit(f"{family}: `qif train` ended with {process.returncode}")
        newest = versions.find_checkpoint(config.logging.project_dir, "latest", print)
        if newest is None:
            raise SystemExit(f"{family}: `qif train` was stopped before it had done a step; give it more --minutes")
        values = history.read_metrics(newest.parent)
        self.say(f"{family}: `qif train configs/{config_file(family).name}`, {len(values)} of "
                 f"{config.train.max_train_steps} steps, {config.data.batch_size} pairs each, {seconds:.0f} s, "
                 f"median step {np.median([line['step_seconds'] for line in values]) * 1000:.0f} ms")  # fmt: skip
        for part in np.array_split(np.array([[line["step"], line["loss"]] for line in values]), 10):
            if len(part):
                self.say(f"  {family}: up to step {part[-1, 0]:.0f} mean loss {part[:, 1].mean():.4f}")

    def export(self, family: str) -> None:
        """Base and trained transformer as one folder."""
        config = self.config(family)
        newest = versions.find_checkpoint(config.logging.project_dir, "latest", print)
        if newest is None:
            raise SystemExit(f"no checkpoint in {config.logging.project_dir}: run the stage transformer first")
        target = self.exported(family)
        if target.exists():
            shutil.rmtree(target)
        shutil.copytree(self.build / family / "base", target)
        model = get_family(config.train.trainer).transformer.from_pretrained(newest / "transformer")
        if family == "flux_kontext":
            bases.settle_guidance(model)
        model.save_pretrained(target / "transformer")
        forget_places(target)
        size = sum(file.stat().st_size for file in target.rglob("*.safetensors"))
        self.say(f"{family}: exported step {newest.name.rsplit('-', 1)[1]}, {size / 1e6:.1f} MB of weights")

    def measure(self, family: str) -> None:
        """PSNR on pairs that nobody trained on: what the base draws, the input itself, and the autoencoder's limit."""
        folder = self.exported(family)  # it may be all there is: work in progress is not committed
        trainer = load_config(config_file(family), [f"model.pretrained_model_name_or_path={folder}"]).train.trainer
        predictor = open_base(trainer, folder, SIZE)
        lines = [
            f"{family}: held-out PSNR in dB, {HELD_OUT} pairs of each instruction, {SAMPLING_STEPS} sampling steps",
            f"  {'instruction':<16}{'base':>8}{'copy':>8}{'autoencoder':>13}",
        ]
        for name in edits.EDITS:
            pairs = [edits.draw_pair(name, edits.HELD_OUT_SEED, index, SIZE) for index in range(HELD_OUT)]
            drawn = draw_many(predictor, [(pair.before, pair.prompt) for pair in pairs], SAMPLING_STEPS)
            limit = through_vae(predictor, [pair.after for pair in pairs])
            columns = [drawn, [pair.before for pair in pairs], limit]
            values = [mean_psnr(column, [pair.after for pair in pairs]) for column in columns]
            lines.append(f"  {name:<16}{values[0]:>8.2f}{values[1]:>8.2f}{values[2]:>13.2f}")
        self.say("\n".join(lines))  # at once: the other family is measured meanwhile

    def exported(self, family: str) -> Path:
        return self.out / family.replace("_", "-")


def draw_one(build: Path, seed: int, index: int, name: str) -> None:
    """A pair, unless its last file is there already, and a poster for every fifth."""
    stem, pairs = f"{index:05d}", build / "pairs"
    words = pairs / f"training_images/{stem}.txt"
    if words.exists():
        return
    pair = edits.draw_pair(name, seed, index, SIZE)
    pair.before.save(pairs / f"control_images/{stem}.png")
    pair.after.save(pairs / f"training_images/{stem}.png")
    if index % 5 == 0:
        edits.draw_poster(np.random.default_rng([5, index]), SIZE).save(build / f"posters/{stem}.png")
    words.write_text(pair.prompt + "\n", encoding="utf-8")


def encode_share(config: Config, kind: Literal["texts", "pictures"], rank: int, processes: int) -> int:
    """Encode on the CPU what the cache lacks of this process's part; returns how many entries."""
    torch.set_num_threads(1)
    family, folder = get_family(config.train.trainer), Path(config.model.pretrained_model_name_or_path)
    dtype = loading.encoder_dtype(config.train.mixed_precision)
    rows = EncodedDataset(config, family, open_dataset(config, family), folder, dtype)
    share = rows.missing().share(rank, processes)
    wanted = Missing(
        images=share.images if kind == "pictures" else {},
        texts=share.texts if kind == "texts" else {},
        entries=share.entries,
    )
    with vae.one_frame():  # the same latents, sooner
        cache.fill(rows, wanted, {"default": torch.device("cpu")}, shown=rank == 0)
    return len(wanted)


def reconstruction_words(model: torch.nn.Module) -> str:
    held_out = [picture for name in edits.EDITS for index in range(2)
                for picture in edits.draw_pair(name, edits.HELD_OUT_SEED, index, SIZE)[:2]]  # fmt: skip
    masks = [draw_face(np.random.default_rng([9, index]), SIZE)[1] for index in range(32)]
    values = [vae.reconstruction(model, np.stack([np.asarray(picture) for picture in group]))
              for group in (held_out, masks)]  # fmt: skip
    return f"held-out reconstruction {values[0]:.2f} dB, of masks it has never seen {values[1]:.2f} dB"


def forget_places(folder: Path) -> None:
    """Remove from the configurations where their weights were loaded from on this machine."""
    for file in folder.rglob("config.json"):
        settings = json.loads(file.read_text())
        if settings.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(settings, indent=2) + "\n")


def config_file(family: str) -> Path:
    return ROOT / f"configs/pretrain_toy_{family}.yaml"


# The stages in their order, each in a process of its own: forks and the accelerator do not go together

STAGES = {
    "base": Pretraining.base,
    "texts": Pretraining.texts,
    "vae": Pretraining.train_vae,
    "pictures": Pretraining.pictures,
    "transformer": Pretraining.transformer,
    "export": Pretraining.export,
    "measure": Pretraining.measure,
}
ON_THE_CPU = ("texts", "pictures", "export", "measure")


def start(stage: str, family: str, options: argparse.Namespace, end: float) -> subprocess.Popen[bytes]:
    """This script again, for one stage of one family, with what is left of the time."""
    words = [sys.executable, __file__, stage, family, "--build", options.build, "--out", options.out]
    for name in ("pairs", "vae_steps", "steps", "seed", "start"):
        if getattr(options, name):
            words += [f"--{name.replace('_', '-')}", getattr(options, name)]
    for override in options.set:
        words += ["--set", override]
    if options.minutes:
        # The share of an autoencoder is one of the whole time; every other stage asks when the end is.
        left = options.minutes if stage == "vae" else max(0.01, (end - time.monotonic()) / 60)
        words += ["--minutes", left]
    environment = dict(os.environ, OMP_NUM_THREADS=str(max(1, CORES // len(bases.FAMILIES))))
    environment["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = "1"
    if stage in ON_THE_CPU:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.Popen(list(map(str, words)), env=environment)


def finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(map(str, process.args[2:4]))} ended with {process.returncode}")


def run_family(family: str, options: argparse.Namespace) -> None:
    """Every stage of one family; the texts are encoded while the autoencoder learns."""
    end = time.monotonic() + 60 * (options.minutes or 0)
    finish(start("base", family, options, end))
    texts = start("texts", family, options, end)
    finish(start("vae", family, options, end))
    finish(texts)
    for stage in itertools.islice(STAGES, list(STAGES).index("pictures"), None):
        finish(start(stage, family, options, end))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the toy bases from nothing; the script's first lines say more.")
    parser.add_argument("stage", nargs="?", default="all", choices=["all", "draw", *STAGES])
    parser.add_argument("family", nargs="?", choices=bases.FAMILIES)
    parser.add_argument("--minutes", type=float, help="be done by then (all but measuring)")
    parser.add_argument("--pairs", type=int, help="pairs to draw")
    parser.add_argument("--vae-steps", type=int, help="steps of each autoencoder")
    parser.add_argument("--steps", type=int, help="steps of each transformer")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the configuration")
    parser.add_argument(
        "--seed", type=int, default=0, help=f"of the pictures; {edits.HELD_OUT_SEED} is of the held-out ones"
    )
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="go on from the bases in it")
    parser.add_argument("--build", type=Path, default=ROOT / "build/toy", help="where work in progress is kept")
    parser.add_argument("--out", type=Path, default=ROOT / "toy", help="where finished bases and the log go")
    options = parser.parse_args()
    if (options.stage in STAGES) != (options.family is not None) and options.stage != "all":
        parser.error(f"stage {options.stage}: give one of {', '.join(bases.FAMILIES)} to every stage but draw")
    return options


def main() -> None:
    options = parse()
    end = time.monotonic() + 60 * (options.minutes or 0)
    if options.stage in STAGES:
        STAGES[options.stage](Pretraining(options), options.family)
        return
    if options.family is None:
        Pretraining(options).draw()
    if options.stage == "all":
        if options.family:
            run_family(options.family, options)
        else:
            families = [start("all", family, options, end) for family in bases.FAMILIES]
            for process in families:
                finish(process)


if __name__ == "__main__":
    main()
