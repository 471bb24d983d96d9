"""A run on Modal: modal run configs/cluster/modal_app.py --config my_run.yaml [--overrides "section.key=value ..."]

Assumes: `pip install modal` and `modal setup` on this machine; the wheel in dist/ (`make release-check` leaves it
there); a volume named qif that holds the pairs (`modal volume put qif my_pairs /my_pairs`); a secret named huggingface
with HF_TOKEN for gated models; and in the configuration, paths below /qif: dataset_path, cache.cache_dir,
logging.output_dir. A container that is taken away starts again on another machine: the run goes on from its newest
checkpoint.
"""

import subprocess
import sys
from pathlib import Path

import modal

HOURS = 12
CARD = "H100"

wheels = sorted(Path("dist").glob("qwen_image_finetune-*.whl"))
image = modal.Image.debian_slim(python_version="3.12").apt_install("gcc", "libc6-dev")
if wheels:  # not inside the container, where this file is read again
    image = image.add_local_file(wheels[-1], f"/wheels/{wheels[-1].name}", copy=True)
    image = image.run_commands(f"pip install '/wheels/{wheels[-1].name}[bitsandbytes]'")

app = modal.App("qif", image=image.env({"HF_HOME": "/qif/huggingface"}))
volume = modal.Volume.from_name("qif", create_if_missing=True)


@app.function(
    gpu=CARD,
    volumes={"/qif": volume},
    secrets=[modal.Secret.from_name("huggingface")],
    timeout=HOURS * 3600,
    retries=3,
)
def train(config: str, overrides: list[str]) -> None:
    """One run, from the text of its configuration; what it writes is in the volume when this returns."""
    file = Path("/tmp/my_run.yaml")
    file.write_text(config, encoding="utf-8")
    qif = [sys.executable, "-m", "qwen_image_finetune.cli"]
    try:
        subprocess.run([*qif, "train", str(file), *overrides, "train.resume_from_checkpoint=latest"], check=True)
    finally:
        volume.commit()


@app.local_entrypoint()
def main(config: str, overrides: str = "") -> None:
    train.remote(Path(config).read_text(encoding="utf-8"), overrides.split())
