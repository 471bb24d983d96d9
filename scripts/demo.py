"""A whole fine-tune in miniature, for both families: checkpoint, cache, training, prediction. `make demo` runs it.

Everything goes through the commands a user types; this script only types them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = {"flux_kontext": "FluxKontext", "qwen_image_edit": "QwenImageEdit"}
UNSEEN = sorted((ROOT / "data/face_seg_held_out/control_images").glob("*.jpg"))[0].relative_to(ROOT)
PROMPT = "draw the segmentation mask of this face"


def qif(*words: str | Path) -> None:
    """Run a command of the package, shown as the user would type it."""
    print(f"\n$ qif {' '.join(map(str, words))}", flush=True)
    subprocess.run([sys.executable, "-m", "qwen_image_finetune.cli", *map(str, words)], cwd=ROOT, check=True)


def newest_version(project: Path) -> Path:
    versions = [path for path in project.iterdir() if path.name[1:].isdigit()]
    return max(versions, key=lambda path: int(path.name[1:]))


def newest_checkpoint(version: Path) -> Path:
    return max(version.glob("checkpoint-*-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))


def main() -> None:
    began = time.monotonic()
    results = []
    for name, family in FAMILIES.items():
        config = Path(f"configs/demo_{name}.yaml")
        qif("tiny", family, Path("demo/checkpoints") / name)
        qif("cache", config)
        qif("train", config)
        version = newest_version(ROOT / "demo/output" / name)
        lora = newest_checkpoint(version) / "pytorch_lora_weights.safetensors"
        picture = version / "prediction.png"
        qif("predict", config, "--lora", lora, "--image", UNSEEN, "--prompt", PROMPT, "--steps", "8", "--output", picture)
        results.append((family, version, lora, picture))

    print(f"\nDone in {time.monotonic() - began:.0f} s.")
    for family, version, lora, picture in results:
        print(f"\n{family}")
        print(f"  version folder      {version.relative_to(ROOT)}")
        print(f"  TensorBoard events  {next(version.glob('events.out.tfevents.*')).relative_to(ROOT)}")
        print(f"  LoRA file           {lora.relative_to(ROOT)}")
        print(f"  picture             {picture.relative_to(ROOT)}, drawn from {UNSEEN}")
    print("\nCurves of every version side by side:  .venv/bin/tensorboard --logdir demo/output")


if __name__ == "__main__":
    main()
