"""The wheel in an environment of its declared dependencies alone: a person's first day, without a single extra.

A second environment with torch would take minutes, so this one is made of links. The wheel is built and unpacked into
an empty folder; beside it is linked, from the environment that the tests run in, every distribution that the wheel's
metadata asks for, and what those ask for in turn, extras only where they are named. The interpreter runs with -S and
that folder as its path: what is not declared cannot be imported, nor found by its metadata.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from qwen_image_finetune.command import materials
from qwen_image_finetune.command.cli import VERBS

ROOT = Path(__file__).parent.parent
# What a container gets to build from; tests/test_clouds.py has the rest about it.
BUILT = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]

# One process for all verbs: most of the time goes into importing torch.
JOURNEY = """
import json, sys
from qwen_image_finetune.command.cli import main
codes = []
for words in json.loads(sys.stdin.read()):
    print("$ qif", *words, flush=True)
    try:
        codes.append(main(words))
    except SystemExit as ended:
        codes.append(ended.code)
print("CODES", json.dumps(codes))
"""


def required(wheel: Distribution) -> Iterator[Distribution]:
    """Every installed distribution that a wheel asks for, directly or through others."""
    waiting: list[tuple[Distribution, frozenset[str]]] = [(wheel, frozenset())]
    seen = set[tuple[str, frozenset[str]]]()
    while waiting:
        owner, extras = waiting.pop()
        for requirement in map(Requirement, owner.requires or []):
            applies = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in (extras or {""})
            )
            wanted = (requirement.name, frozenset(requirement.extras))
            if not applies or wanted in seen:
                continue
            seen.add(wanted)
            try:
                found = distribution(requirement.name)
            except PackageNotFoundError:  # not of this system; what needs it all the same fails below
                continue
            yield found
            waiting.append((found, wanted[1]))


def link(found: Distribution, site: Path) -> None:
    """Link what a distribution has installed; files outside of its packages, such as commands, are left out."""
    for top in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
        place, target = site / top, Path(str(found.locate_file(top)))
        if not place.exists() and target.exists():
            place.symlink_to(target)


@pytest.fixture(scope="session")
def bare(build_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The folder with the unpacked wheel and links to its dependencies."""

    def build(site: Path) -> None:
        source = site.parent / "bare-source"
        source.mkdir()
        for name in BUILT:
            path = ROOT / name
            if path.is_dir():
                shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, source)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        offline = ["--no-deps", "--no-index"]
        subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", source, source], check=True)
        (wheel,) = source.glob("*.whl")
        subprocess.run([*pip, "install", *offline, "--target", site, wheel], check=True)
        (about,) = site.glob("qwen_image_finetune-*.dist-info")
        for found in required(PathDistribution(about)):
            link(found, site)

    return build_once("bare", build)


@pytest.fixture
def run(bare: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run(program, text)`: a program in that environment, far from the checkout, with a text on its standard input."""

    def run(program: str, text: str = "") -> subprocess.CompletedProcess[str]:
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            [sys.executable, "-S", "-c", program], input=text, cwd=tmp_path, capture_output=True, text=True,
            env=variables | {"PYTHONPATH": str(bare)}, check=False,
        )  # fmt: skip

    return run


def test_nothing_but_what_is_declared(bare: Path, run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """The wheel brings one package; extras and what only tests need are not there, though the tests have them."""
    own = {path.name for path in bare.iterdir() if not path.is_symlink()}
    (about,) = (path.name for path in bare.glob("qwen_image_finetune-*.dist-info"))
    assert own == {"qwen_image_finetune", about, "bin"}
    names = (
        "src",
        "bitsandbytes",
        "prodigyopt",
        "lpips",
        "starlette",
        "uvicorn",
        "pytest",
        "hypothesis",
        "torch",
        "skimage",
    )
    done = run(f"from importlib.util import find_spec; print(*[name for name in {names} if find_spec(name)])")
    assert (done.stdout, done.returncode) == ("torch skimage\n", 0), done.stderr


def test_every_verb_says_what_it_takes(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    names = [verb.__name__ for verb in VERBS]
    done = run(JOURNEY, json.dumps([["--help"], *([name, "--help"] for name in names)]))
    assert json.loads(done.stdout.rpartition("CODES ")[2]) == [0] * (1 + len(names)), done.stderr
    assert all(f"usage: qif {name}" in done.stdout for name in names)


def test_the_wheel_brings_what_the_demonstration_needs(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Byte for byte what lies in the repository, at the places its configurations name; and they are right there."""
    program = "from pathlib import Path; from qwen_image_finetune.command.materials import lay_out; "
    done = run(f"{program}print(len(lay_out(Path())), len(lay_out(Path())))")
    assert done.stdout == "6 0\n", done.stderr
    for name in (*materials.FOLDERS, *materials.FILES):
        for file in [ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*.*"):
            assert (tmp_path / file.relative_to(ROOT)).read_bytes() == file.read_bytes(), file
    done = run(JOURNEY, json.dumps([["check", name] for name in materials.FILES]))
    assert done.stdout.count("20 pairs to train on, 20 to validate on, all readable") == 2, done.stdout + done.stderr


def test_the_first_day(
    run: Callable[..., subprocess.CompletedProcess[str]], configure: Callable[..., object], pairs: Path, tmp_path: Path
) -> None:
    configure("FluxKontext")
    file, version = str(tmp_path / "config.yaml"), tmp_path / "output" / "project" / "v0"
    rounds = {"enabled": True, "steps": 3, "share": 0.3, "num_validation_samples": 1, "num_inference_steps": 1}
    training = ["train", file, "train.checkpointing_steps=3", "logging.report_to=tensorboard",
                f"validation={json.dumps(rounds)}"]  # fmt: skip
    picture, lora = str(pairs / "control_images" / "0.png"), str(version)
    page, table = str(tmp_path / "compare.html"), str(tmp_path / "bench.json")
    done_well = [
        ["check", file],
        ["plan", file, "--card", "24GB"],
        ["cache", file],
        [*training, "--dry-run"],
        [*training, "train.max_train_steps=3"],
        [*training, "train.resume_from_checkpoint=latest"],
        [*training, "train.max_train_steps=5"],
        ["predict", file, "--image", picture, "--prompt", "edit", "--lora", lora, "--steps", "1", "--output", "o.png"],
        ["evaluate", lora, str(pairs), "--steps", "1", "--count", "1"],
        ["export", lora, "comfy.safetensors", "--family", "FluxKontext"],
        ["report", lora],
        ["compare", lora, str(version.with_name("v1")), "--output", page],
        ["bench", "FluxKontext", "attention", "--tiny", "--steps", "1", "--rounds", "1", "--output", table],
        ["tiny", "QwenImageEdit", "tiny"],
    ]
    lacking = {
        "pip install 'qwen-image-finetune[bitsandbytes]'": ["model.quantize=nf4"],
        "pip install 'qwen-image-finetune[flash4]'": ["train.attention=flash4"],
        "pip install wandb": ["logging.report_to=wandb"],
        "pip install 'qwen-image-finetune[prodigy]'": ["optimizer.class_path=prodigyopt.Prodigy"],
    }
    verbs = [["check", file], ["train", file, "--dry-run"], ["train", file], ["cache", file]]
    drawing = [
        ["predict", file, "--image", picture, "--prompt", "edit", "model.quantize=fp4"],
        ["evaluate", file, str(pairs), "model.quantize=fp4"],
        ["studio", "."],
    ]
    refused = [[*verb, *keys] for keys in lacking.values() for verb in verbs] + drawing
    done = run(JOURNEY, json.dumps(done_well + refused))
    everything = done.stdout + done.stderr
    assert done.returncode == 0, everything
    codes = json.loads(done.stdout.rpartition("CODES ")[2])
    assert codes == [0] * len(done_well) + [2] * len(refused), everything
    said = done.stderr
    for words in lacking:
        assert said.count(words) >= len(verbs), (words, everything)
    assert said.count("[bitsandbytes]") == len(verbs) + 2 and "[studio]" in said, everything
    written = ["o.png", "comfy.safetensors", "compare.html", "bench.json", "tiny/model_index.json"]
    assert [name for name in written if not (tmp_path / name).is_file()] == []
    steps = {line["step"] for line in map(json.loads, (version / "metrics.jsonl").read_text().splitlines())}
    assert steps == {1, 2, 3, 4, 5, 6}
