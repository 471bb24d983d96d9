"""Make the toy bases toy/flux-kontext and toy/qwen-image-edit from nothing: small real models that follow instructions.

    python scripts/pretrain_toy.py draw                  # the pairs, into build/toy/pairs
    python scripts/pretrain_toy.py vae FAMILY            # the autoencoder
    python scripts/pretrain_toy.py transformer FAMILY    # everything around it, the cache, then `qif train`
    python scripts/pretrain_toy.py polish FAMILY         # the decoder once more, the encoder held
    python scripts/pretrain_toy.py export FAMILY         # the finished base, into toy/
    python scripts/pretrain_toy.py measure FAMILY        # held-out quality of each instruction
    python scripts/pretrain_toy.py all                   # all of it, both families

FAMILY is flux_kontext or qwen_image_edit. A stage whose result is there is left out (but export and measure), and a
transformer that was interrupted continues at its newest checkpoint: delete build/toy to start afresh. Measured lines
are appended to toy/pretraining.log.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from draw_face_seg import PROMPTS
from draw_many import draw as draw_many
from draw_many import open_base, through_vae
from numpy.typing import NDArray
from PIL import Image

from qwen_image_finetune import runs
from qwen_image_finetune.config import Config, load_config
from qwen_image_finetune.families import get_family
from qwen_image_finetune.preparation import encode_dataset
from qwen_image_finetune.toy import bases, edits, vae
from qwen_image_finetune.toy.faces import draw_face
from qwen_image_finetune.toy.measure import mean_psnr

ROOT = Path(__file__).resolve().parent.parent
BUILD, LOG = ROOT / "build/toy", ROOT / "toy/pretraining.log"
SIZE = 64  # pixels
SEED = 0
PAIRS = 2000
# Steps, pairs and posters of each round of an autoencoder; the learning rate starts anew in each.
VAE_ROUNDS = {
    "flux_kontext": ((1400, 850, 250), (1000, 2000, 700)),
    "qwen_image_edit": ((1400, 850, 250),),
}
POLISH = (1200, 2000, 700)
HELD_OUT = 8  # pairs of each instruction
SAMPLING_STEPS = 8


def say(message: str) -> None:
    """Print, and keep in the log that is committed with the weights."""
    print(message, flush=True)
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("a", encoding="utf-8") as stream:
        stream.write(message + "\n")


def draw() -> None:
    """The pairs to learn from, as a dataset of our own layout."""
    controls, targets = BUILD / "pairs/control_images", BUILD / "pairs/training_images"
    for folder in (controls, targets):
        folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(edits.shuffled_names(SEED, PAIRS)):
        stem = f"{index:05d}"
        if (targets / f"{stem}.txt").exists():
            continue
        pair = edits.draw_pair(name, SEED, index, SIZE)
        pair.before.save(controls / f"{stem}.png")
        pair.after.save(targets / f"{stem}.png")
        (targets / f"{stem}.txt").write_text(pair.prompt + "\n", encoding="utf-8")


def pictures(pairs: int, posters: int) -> NDArray[np.uint8]:
    """What an autoencoder learns from, (n, SIZE, SIZE, 3): both sides of pairs, and posters."""
    folders = [BUILD / "pairs" / name for name in ("control_images", "training_images")]
    files = [file for folder in folders for file in sorted(folder.glob("*.png"))[:pairs]]
    drawn = [edits.draw_poster(np.random.default_rng([5, index]), SIZE) for index in range(posters)]
    return np.stack([np.asarray(Image.open(file)) for file in files] + [np.asarray(poster) for poster in drawn])


def train_vae(family: str) -> None:
    folder = BUILD / family / "vae"
    if folder.exists():
        return
    model = vae.new_vae(family)
    say(f"{family}: autoencoder of {sum(p.numel() for p in model.parameters()):,} weights")
    for seed, (steps, pairs, posters) in enumerate(VAE_ROUNDS[family]):
        vae.train_vae(model, pictures(pairs, posters), steps, seed=seed, report=say)
        say(f"{family}: autoencoder, {reconstruction_words(model)}")
    model.save_pretrained(folder)


def reconstruction_words(model: torch.nn.Module) -> str:
    held_out = [picture for name in edits.EDITS for index in range(2)
                for picture in edits.draw_pair(name, edits.HELD_OUT_SEED, index, SIZE)[:2]]  # fmt: skip
    masks = [draw_face(np.random.default_rng([9, index]), SIZE)[1] for index in range(32)]
    values = [vae.reconstruction(model, np.stack([np.asarray(picture) for picture in group]))
              for group in (held_out, masks)]  # fmt: skip
    return f"held-out reconstruction {values[0]:.2f} dB, of masks it has never seen {values[1]:.2f} dB"


def train_transformer(family: str) -> None:
    """Full fine-tuning through the same command that a user types."""
    base = BUILD / family / "base"
    if not (base / "model_index.json").exists() or not same_vae(base / "vae", BUILD / family / "vae"):
        bases.write_base(family, BUILD / family / "vae", base, words=PROMPTS)
    config_file = ROOT / f"configs/pretrain_toy_{family}.yaml"
    with vae.one_frame():  # the same latents, sooner
        encode_dataset(load_config(config_file))
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "qwen_image_finetune.cli", "train", str(config_file)], cwd=ROOT, check=True)
    steps = load_config(config_file).train.max_train_steps
    say(f"{family}: `qif train configs/{config_file.name}` reached step {steps} after {time.monotonic() - began:.0f} s")


def same_vae(one: Path, other: Path) -> bool:
    name = "diffusion_pytorch_model.safetensors"
    return (one / name).read_bytes() == (other / name).read_bytes()


def polish(family: str) -> None:
    """Train the decoder further on the latents as they are: nothing that the transformer has learnt changes."""
    folder = BUILD / family / "polished"
    if folder.exists():
        return
    model = load_vae(family, BUILD / family / "vae")
    steps, pairs, posters = POLISH
    vae.train_vae(model, pictures(pairs, posters), steps, learning_rate=2e-3, seed=9, only_decoder=True, report=say)
    say(f"{family}: decoder polished, {reconstruction_words(model)}")
    model.save_pretrained(folder)


def load_vae(family: str, folder: Path) -> torch.nn.Module:
    return type(vae.new_vae(family)).from_pretrained(folder)


def export(family: str) -> None:
    """Base, trained transformer and autoencoder as one folder of toy/."""
    newest = runs.find_checkpoint(pretraining(family).logging.project_dir, "latest", print)
    if newest is None:
        raise SystemExit(f"no checkpoint in {pretraining(family).logging.project_dir}: run the stage transformer first")
    target = base_folder(family)
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(BUILD / family / "base", target)
    polished = BUILD / family / "polished"
    if polished.exists():
        shutil.rmtree(target / "vae")
        shutil.copytree(polished, target / "vae")
    model = get_family(pretraining(family).train.trainer).transformer.from_pretrained(newest / "transformer")
    if family == "flux_kontext":
        bases.settle_guidance(model)
    model.save_pretrained(target / "transformer")
    forget_places(target)
    size = sum(file.stat().st_size for file in target.rglob("*.safetensors"))
    print(f"{target.relative_to(ROOT)}: step {runs.steps_of(newest.parent)}, {size / 1e6:.1f} MB of weights")


def forget_places(folder: Path) -> None:
    """Remove from the configurations where their weights were loaded from on this machine."""
    for file in folder.rglob("config.json"):
        settings = json.loads(file.read_text())
        if settings.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(settings, indent=2) + "\n")


def report_quality(family: str) -> None:
    """PSNR on pairs that nobody trained on: what the base draws, the input itself, and what the autoencoder allows."""
    predictor = open_base(pretraining(family).train.trainer, base_folder(family), SIZE)
    say(f"{family}: held-out PSNR in dB, {HELD_OUT} pairs of each instruction, {SAMPLING_STEPS} sampling steps")
    say(f"  {'instruction':<16}{'base':>8}{'copy':>8}{'autoencoder':>13}")
    for name in edits.EDITS:
        pairs = [edits.draw_pair(name, edits.HELD_OUT_SEED, index, SIZE) for index in range(HELD_OUT)]
        drawn = draw_many(predictor, [(pair.before, pair.prompt) for pair in pairs], SAMPLING_STEPS)
        limit = through_vae(predictor, [pair.after for pair in pairs])
        columns = [drawn, [pair.before for pair in pairs], limit]
        values = [mean_psnr(column, [pair.after for pair in pairs]) for column in columns]
        say(f"  {name:<16}{values[0]:>8.2f}{values[1]:>8.2f}{values[2]:>13.2f}")


def pretraining(family: str) -> Config:
    return load_config(ROOT / f"configs/pretrain_toy_{family}.yaml")


def base_folder(family: str) -> Path:
    return ROOT / "toy" / family.replace("_", "-")


STAGES = {
    "vae": train_vae,
    "transformer": train_transformer,
    "polish": polish,
    "export": export,
    "measure": report_quality,
}


def main() -> None:
    stage, *families = sys.argv[1:] or ["all"]
    known = ("all", "draw", *STAGES)
    if stage not in known or not set(families) <= set(bases.FAMILIES):
        raise SystemExit(f"usage: pretrain_toy.py {{{','.join(known)}}} [{' | '.join(bases.FAMILIES)}]")
    if stage in ("all", "draw"):
        draw()
    for family in families or bases.FAMILIES:
        for name, run in STAGES.items():
            if stage in ("all", name):
                run(family)


if __name__ == "__main__":
    main()
