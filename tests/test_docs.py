"""The documentation is run: every command of README and docs/, in order, on tiny models; links and messages exist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen_image_finetune.command.arguments import build_parser
from qwen_image_finetune.command.cli import VERBS, main, parse

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"(?:<!-- not run here: (?P<why>[^>]+) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)

# What a configuration of full size becomes here: the only things that a run of the documentation changes.
SMALL: dict[str, Any] = {
    "model.pretrained_model_name_or_path": None,  # the tiny checkpoint of train.trainer
    "data.init_args.image_size": [64, 64],
    "data.num_workers": 0,
    "train.mixed_precision": "no",
    "train.max_train_steps": 6,
    "train.checkpointing_steps": 3,
    "lr_scheduler.warmup_steps": 1,
}
# Words of commands and scripts that stand for something longer.
SHORTER = {"train.max_train_steps=2000": "train.max_train_steps=9", "num_inference_steps=28": "num_inference_steps=2",
           "--count 2": "--count 2 --steps 2", "--output mask.png": "--output mask.png --steps 2",
           '--prompt "draw the segmentation mask of this face"\n': '--prompt "draw" --steps 2\n',
           "--output night.png": "--output night.png --steps 2"}  # fmt: skip
# Commands that take long to start; test_guide.py and test_contract.py run them.
LAUNCHERS = ("accelerate launch ", "torchrun ")
# Documents whose commands speak of runs that the reader has: only their verbs and options are tried here.
OF_THE_READER = {"evaluation.md", "lora-files.md"}
# The edit that a document asks of its copy; the others use the copy as it is.
EDITS = {
    "your-pictures.md": {"data.init_args.dataset_path": "my_pairs", "logging.tracker_project_name": "day_to_night"}
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    kind: str
    text: str
    line: int
    why_not: str | None

    @property
    def commands(self) -> list[str]:
        return [line.split("  #")[0].strip() for line in self.text.splitlines() if line.strip() and line[0] != "#"]


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    return [
        Block(found["kind"], found["text"], text[: found.start()].count("\n") + 1, found["why"])
        for found in FENCE.finditer(text)
    ]


def runnable() -> list[Path]:
    return [document for document in DOCUMENTS if any(block.kind == "bash" for block in blocks(document))]


@pytest.fixture
def desk(
    tmp_path: Path, write_pairs: Callable[..., Path], tiny_checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder like the root of the repository, with pairs of a user's own, and the tiny models of the demo."""
    folder = tmp_path / "desk"
    folder.mkdir()
    for name in ("data", "src", "scripts", "Makefile", "accelerate_config.yaml"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    write_pairs(folder / "my_pairs", [(64, 64), (96, 64)])
    for part in ("control_images", "training_images"):  # named as in the README
        for file in sorted((folder / "my_pairs" / part).iterdir()):
            file.rename(file.with_name(f"{int(file.stem) + 1:03}{'.jpg' if part == 'control_images' else file.suffix}"))
    for project in ("flux_kontext/v0", "qwen_image_edit/v0"):
        (folder / "demo" / "output" / project).mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def shrink(config: Path, tiny: dict[str, Path], edits: dict[str, str]) -> None:
    """Make a copied configuration small, once."""
    values = yaml.safe_load(config.read_text())
    family = values["train"]["trainer"]
    for key, value in {**SMALL, **edits}.items():
        section = values
        *path, name = key.split(".")
        for part in path:
            section = section.setdefault(part, {})
        section[name] = str(tiny[family]) if value is None else value
    config.write_text(yaml.safe_dump(values))


def run(command: str) -> None:
    """`qif` in this process, which has everything loaded; anything else in a shell."""
    if command.startswith("qif "):
        assert main(shlex.split(command)[1:]) == 0, command
        return
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"$ {command}\n{done.stdout}\n{done.stderr}"


def rehearse(command: str) -> None:
    """What can be seen of a command that is not run here: that make, qif and src.main would know what to do."""
    if command.startswith("qif "):
        parse(build_parser(VERBS), shlex.split(command)[1:])
    if command.startswith("make "):
        run(command.replace("make", f"make -C {ROOT} -n", 1))
    elif command.startswith(("qif train", "qif cache")) and Path(command.split()[2]).exists():  # else init writes it
        run(f"{command.replace('qif cache', 'qif train')} --dry-run")
    elif found := re.search(r"-m src\.main --config (\S+)", command):
        run(f"qif train {found[1]} --dry-run")


@pytest.mark.parametrize("document", runnable(), ids=lambda path: path.name)
def test_every_command_works(document: Path, desk: Path, tiny_checkpoints: dict[str, Path]) -> None:
    edits = EDITS.get(document.name, {})
    for file in (desk / "configs").glob("demo_*.yaml"):
        shrink(file, tiny_checkpoints, {})
    for block in blocks(document):
        if block.kind not in ("bash", "python"):
            continue
        text = block.text
        for words, fewer in SHORTER.items():
            text = text.replace(words, fewer)
        if block.kind == "python":
            if "my_run.yaml" in text:
                exec(compile(text, f"{document.name}:{block.line}", "exec"), {"__name__": "__documentation__"})
            continue
        for command in Block(block.kind, text, block.line, block.why_not).commands:
            if document.name in OF_THE_READER and command.startswith("qif "):
                parse(build_parser(VERBS), shlex.split(command)[1:])
                continue
            if block.why_not or command.startswith(LAUNCHERS):
                rehearse(command)
                continue
            run(command)
            if copied := re.fullmatch(r"cp configs/\S+\.yaml (\S+)", command):
                shrink(desk / copied[1], tiny_checkpoints, edits)


def test_memory_of_the_configurations_is_what_the_commands_print(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "docs/your-pictures.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(face_\w+)` \|.*\|(.*)\|$", readme, flags=re.MULTILINE))
    plans = dict(re.findall(r"^qif plan configs/(face_\w+)\.yaml (.*)$", readme, flags=re.MULTILINE))
    assert rows.keys() == plans.keys() and len(rows) == 9
    for name, row in rows.items():
        assert main(["plan", str(ROOT / "configs" / f"{name}.yaml"), *plans[name].split()]) == 0
        printed = capsys.readouterr().out
        for figure in re.findall(r"[\d.]+ GiB", row):
            assert f"({figure}" in printed, f"{name}: {printed}"
        for blocks_waiting in re.findall(r"(\d+) of its 57 blocks", row):
            assert f"train.blocks_to_swap={blocks_waiting} " in printed, printed
        assert "fits a card of " in printed or ("encoder" in row and "cache.text_encoder_device=cpu" in printed)


def test_the_commands_are_found() -> None:
    """The reader of fences sees what is there; a change of its format would make the tests above empty."""
    counts = {
        document.name: sum(len(block.commands) for block in blocks(document) if block.kind == "bash")
        for document in DOCUMENTS
    }
    assert (
        counts["README.md"] >= 10
        and counts["your-pictures.md"] >= 12
        and counts["training.md"] >= 8
        and counts["prediction.md"] >= 6
    )
    text = "".join(document.read_text() for document in DOCUMENTS)
    assert text.count("```bash") == sum(block.kind == "bash" for document in DOCUMENTS for block in blocks(document))


def test_copied_configurations_are_named() -> None:
    named = set(re.findall(r"configs/[\w/]+\.yaml", "".join(document.read_text() for document in DOCUMENTS)))
    assert named
    assert [name for name in sorted(named) if name != "configs/FILE.yaml" and not (ROOT / name).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists(), f"{document.name} links to {target}"
        if anchor:
            headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                        for line in linked.read_text().splitlines() if line.startswith("#")}  # fmt: skip
            assert anchor in headings, f"{document.name} links to {target}"


def texts_of_messages() -> Iterator[str]:
    """Source of the package with texts that are broken over lines put together, and placeholders taken out."""
    for file in (ROOT / "qwen_image_finetune").rglob("*.py"):
        source = re.sub(r'"\s*\n\s*f?"', "", file.read_text(encoding="utf-8"))
        yield re.sub(r"\{[^{}]*\}", "", source)


def test_quoted_messages_are_ours() -> None:
    quoted = re.findall(r"^## (.+)$", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.MULTILINE)
    general = {"Out of memory", "It learns nothing, or too much", "Training waits for data", "Versions"}
    sources = list(texts_of_messages())
    messages = [heading for heading in quoted if heading not in general]
    assert len(messages) >= 12
    assert [heading for heading in messages if not any(heading in source for source in sources)] == []


def test_no_figure_of_others_is_given_as_ours() -> None:
    """Speed and memory figures that circulate for these models; what we say was measured or counted by us."""
    speed, memory = r"2-3x|1\.5x|2\.5x", r"30-50 ?%|20-50 ?%|~ ?24 ?GB|~ ?18 ?GB|25 ?% of Adam"
    circulating = rf"{speed}|{memory}|(95|85) ?% (quality|of)|90 ?% reduction"
    for document in DOCUMENTS:
        assert re.findall(circulating, document.read_text(), flags=re.IGNORECASE) == [], document.name
