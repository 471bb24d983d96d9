"""What every test runs under, and the tiny checkpoints that many of them share."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from filelock import FileLock

if TYPE_CHECKING:
    from qwen_image_finetune.config import Config
    from qwen_image_finetune.fitting.footprint import Footprint

# Set before torch and the hub are imported, and inherited by the processes that tests start. One thread: tiny models
# gain nothing from more, and tests that run side by side would only take the cores from each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# torch's compiler would start a pool of processes, each of which imports torch, for the few kernels that tests need.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
# Nor does it try which vectors this processor and its C++ compiler have: ten seconds, and slower compilations after.
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "0"
# Where Python was told to keep no compiled modules, as in containers, each of a hundred processes would compile ours.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_ERROR_REPORTING"] = "false"
os.environ["SWANLAB_MODE"] = "offline"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


def pytest_collection_finish() -> None:
    """What the imports of all tests have made stays: no run's collection of its own garbage goes through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the whole session, whatever number of workers pytest-xdist runs it on."""
    base = tmp_path_factory.getbasetemp()
    # A worker's own folder lies inside the session's.
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def _temporary_files_of_the_session(shared_folder: Path) -> None:
    """What libraries leave in the temporary folder, such as torch's launchers, goes when the session's folder goes."""
    folder = shared_folder / "temporary"
    folder.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = str(folder)  # of processes that tests start
    tempfile.tempdir = str(folder)


@pytest.fixture(scope="session")
def build_once(shared_folder: Path) -> Callable[[str, Callable[[Path], object]], Path]:
    """`build_once(name, build)`: the folder `name`, filled by `build(folder)` in the first process that asks for it."""

    def folder_of(name: str, build: Callable[[Path], object]) -> Path:
        folder, complete = shared_folder / name, shared_folder / f"{name}.complete"
        with FileLock(shared_folder / f"{name}.lock"):
            if not complete.exists():
                folder.mkdir(exist_ok=True)
                build(folder)
                complete.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def warm(shared_folder: Path) -> Path:
    """A folder with `python`, `torchrun` and `accelerate`, whose processes need not import anything (tests/warm).

    `python` takes a script or a module. One server serves all workers of the session, and ends with it.
    """
    if "WARM" in os.environ:  # of a session that a test of another one started
        return Path(os.environ["WARM"])
    place, folder = Path(__file__).parent / "warm", shared_folder / "warm"
    with FileLock(shared_folder / "warm.lock"):
        if not folder.exists():
            # The name of a socket may have a hundred characters.
            socket = Path(tempfile.mkdtemp(dir="/tmp"), "socket")
            session = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
            strange = ("ACCELERATE_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "PYTHONHASHSEED")
            environment = {name: value for name, value in os.environ.items() if not name.startswith(strange)}
            server = subprocess.Popen(
                [sys.executable, str(place / "server.py"), str(socket), str(session)],
                env=environment, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            while not socket.exists():
                assert server.poll() is None, "the server did not start"
                time.sleep(0.05)
            folder.mkdir()
            for tool in ("python", "torchrun", "accelerate"):
                file = folder / tool
                file.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {place}/client.py {socket} {tool} "$@"\n')
                file.chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoints(build_once: Callable[[str, Callable[[Path], object]], Path]) -> dict[str, Path]:
    """A tiny random checkpoint of every family, in diffusers layout. Read them; copy one before changing it."""
    from qwen_image_finetune.families import get_family

    class Built(dict[str, Path]):
        """Each when it is first asked for: few files need them all."""

        def __missing__(self, name: str) -> Path:
            self[name] = build_once(f"tiny-{name}", get_family(name).tiny)
            return self[name]

    return Built()


@pytest.fixture(scope="session")
def flux_folder(tiny_checkpoints: dict[str, Path]) -> Path:
    return tiny_checkpoints["FluxKontext"]


@pytest.fixture(scope="session")
def qwen_folder(tiny_checkpoints: dict[str, Path]) -> Path:
    return tiny_checkpoints["QwenImageEdit"]


@pytest.fixture(scope="session")
def write_pairs() -> Callable[..., Path]:
    """`write_pairs(folder, sizes)`: a captioned pair of smooth random pictures for each (width, height)."""
    import numpy as np
    from PIL import Image

    def picture(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
        cells = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)

    def write(
        folder: Path, sizes: list[tuple[int, int]], seed: int = 0, masks: bool = False, references: int = 1
    ) -> Path:
        rng = np.random.default_rng(seed)
        (folder / "training_images").mkdir(parents=True)
        if references:
            (folder / "control_images").mkdir()
        for index, size in enumerate(sizes):
            for place in range(references):
                ending = f"_control_{place}" if place else ""
                picture(rng, size).save(folder / "control_images" / f"{index}{ending}.png")
            picture(rng, size).save(folder / "training_images" / f"{index}.png")
            (folder / "training_images" / f"{index}.txt").write_text(f"edit number {index}")
            if masks:
                mask = Image.new("L", size)
                mask.paste(255, (0, 0, size[0] // 2, size[1]))
                mask.save(folder / "training_images" / f"{index}_mask.png")
        return folder

    return write


@pytest.fixture(scope="session")
def pairs(build_once: Callable[[str, Callable[[Path], object]], Path], write_pairs: Callable[..., Path]) -> Path:
    """Seven pairs in three geometries (at `resolution: 64`), one of them shared by four."""
    sizes = [(64, 64), (96, 96), (64, 64), (64, 128), (128, 64), (64, 64), (64, 128)]
    return build_once("pairs", lambda folder: write_pairs(folder, sizes))


@pytest.fixture(scope="session")
def captioned(build_once: Callable[[str, Callable[[Path], object]], Path], pairs: Path) -> Path:
    """The targets of `pairs` and their sentences, for families that take no references."""
    return build_once(
        "captioned", lambda folder: shutil.copytree(pairs / "training_images", folder / "training_images")
    )


@pytest.fixture
def cache_folder(shared_folder: Path) -> Path:
    """All runs of a session share one cache, as a user's would: nearly half of a tiny run goes into encoding.

    A file whose tests look at what is encoded has a fixture of this name that gives each its own.
    """
    return shared_folder / "cache"


@pytest.fixture
def configure(
    tmp_path: Path, pairs: Path, captioned: Path, tiny_checkpoints: dict[str, Path], cache_folder: Path
) -> Callable[..., Config]:
    """`configure(family, "section.key=value", ...)`: a small run of a tiny checkpoint, written below tmp_path."""

    def build(family: str, *overrides: str) -> Config:
        from qwen_image_finetune.config import load_config
        from qwen_image_finetune.families import get_family

        data = pairs if get_family(family).max_references else captioned
        base = {
            "model": {
                "pretrained_model_name_or_path": str(tiny_checkpoints[family]),
                "lora": {"r": 4, "lora_alpha": 4, "init_lora_weights": "gaussian"},
            },
            "data": {"init_args": {"dataset_path": str(data), "resolution": 64}},
            "train": {"max_train_steps": 6, "mixed_precision": "no", "checkpointing_steps": 100},
            "optimizer": {"init_args": {"lr": 1e-2}},
            "cache": {"use_cache": True, "cache_dir": str(cache_folder)},
            "logging": {"output_dir": str(tmp_path / "output"), "report_to": "none", "tracker_project_name": "project"},
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(base))
        return load_config(path, overrides)

    return build


@pytest.fixture(scope="session")
def full_size() -> dict[str, Footprint]:
    """The published models at 1024 x 1024 with one reference, adapter in bfloat16."""
    import torch

    from qwen_image_finetune.config import LoraConfig
    from qwen_image_finetune.families import get_family
    from qwen_image_finetune.fitting.estimate import transformer_config
    from qwen_image_finetune.fitting.footprint import footprint, stand_in

    def measure(name: str) -> Footprint:
        family = get_family(name)
        about = transformer_config(family, None)
        batch = stand_in(family, about, [(1024, 1024)] * 2, 1, 512)
        return footprint(family, about, batch, LoraConfig(), adapter_dtype=torch.bfloat16)

    return {name: measure(name) for name in ("FluxKontext", "QwenImageEdit")}
