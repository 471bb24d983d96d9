"""Fifty payloads in configurations, data, checkpoints and weights: none executes, none reads what is elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lab import Lab, checkpoints, record, versions, write_pairs

from qwen_image_finetune.disk.files import staged_folder

SECRET = "the-secret-that-lies-outside"
Attack = tuple[str, Callable[[Path], list[str]]]  # name, and what changes a copy of a sound run: returns overrides


class Bomb:
    """Unpickled, it touches the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def bomb(place: Path) -> bytes:
    return pickle.dumps({"state_dict": Bomb(place / "canary"), "x": 1})


def append(place: Path, text: str) -> list[str]:
    """Add lines to the configuration; a section that is there already is replaced in them."""
    path = place / "config.yaml"
    path.write_text(path.read_text() + text.replace("CANARY", str(place / "canary")) + "\n")
    return []


def in_yaml(payload: str) -> Callable[[Path], list[str]]:
    return lambda place: append(place, f"validation: {payload}")


def override(*words: str) -> Callable[[Path], list[str]]:
    return lambda place: [word.replace("PLACE", str(place)) for word in words]


def table(kind: str, value: str) -> Callable[[Path], list[str]]:
    """A metadata table whose target lies elsewhere."""

    def write(place: Path) -> list[str]:
        name = value.replace("PLACE", str(place))
        rows = [{"file_name": "training_images/0.png", "prompt": "a"}, {"file_name": name, "prompt": "b"}]
        lines = [json.dumps(row) for row in rows] if kind == "jsonl" else ["file_name,prompt"] + [
            f'{row["file_name"]},{row["prompt"]}' for row in rows]  # fmt: skip
        (place / "pairs" / f"metadata.{kind}").write_text("\n".join(lines) + "\n")
        return []

    return write


def link(name: str, target: str) -> Callable[[Path], list[str]]:
    """A file or folder of the data set becomes a link to what lies elsewhere."""

    def make(place: Path) -> list[str]:
        path = place / "pairs" / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(place / "elsewhere" / target)
        return []

    return make


def base_file(remove: str, name: str, content: Callable[[Path], bytes]) -> Callable[[Path], list[str]]:
    """Another file in the base model."""

    def replace(place: Path) -> list[str]:
        for path in (place / "model").glob(remove) if remove else ():
            path.unlink()
        (place / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "model" / name).write_bytes(content(place))
        return []

    return replace


def base_json(name: str, **changes: Any) -> Callable[[Path], list[str]]:
    """Another value in a JSON file of the base model, and code that it might name."""

    def change(place: Path) -> list[str]:
        code = f"import os\nos.system('touch {place / 'canary'}')\nclass Evil:\n    pass\n"
        for folder in ("", "text_encoder", "transformer", "vae", "tokenizer", "scheduler"):
            (place / "model" / folder / "evil.py").write_text(code)
        (place / "model" / "pipeline.py").write_text(code)
        path = place / "model" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return []

    return change


def lora_file(name: str, content: Callable[[Path], bytes]) -> Callable[[Path], list[str]]:
    """A file of weights to begin with."""

    def write(place: Path) -> list[str]:
        (place / "weights").mkdir()
        (place / "weights" / name).write_bytes(content(place))
        return [f"model.lora.pretrained_weight={place / 'weights' / name}"]

    return write


def in_checkpoint(name: str, content: Callable[[Path], bytes], seal: bool = True) -> Callable[[Path], list[str]]:
    """A checkpoint with another file, and a manifest that fits it."""

    def forge(place: Path) -> list[str]:
        (version,) = versions(place / "config.yaml")
        found = list(checkpoints(version).values())[-1]
        forged = place / "forged" / found.name
        forged.parent.mkdir()
        if not seal:
            shutil.copytree(found, forged)
            (forged / "manifest.json").unlink()
            (forged / name).write_bytes(content(place))
        else:
            with staged_folder(forged) as stage:
                for path in found.iterdir():
                    if path.name != "manifest.json":
                        shutil.copy(path, stage)
                (stage / name).write_bytes(content(place))
        return [f"train.resume_from_checkpoint={forged}", "train.max_train_steps=9"]

    return forge


def forged_manifest(place: Path) -> list[str]:
    """A manifest, with a right checksum of its own, that names a file elsewhere."""
    folder = place / "forged" / "checkpoint-0-2"
    folder.mkdir(parents=True)
    files = {"../../elsewhere/secret.txt": {"size": 10, "sha256": "0" * 64}}
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"files": files, "sha256": own}, indent=1, sort_keys=True) + "\n")
    return [f"train.resume_from_checkpoint={folder}"]


def header(text: str | bytes, length: int | None = None, body: bytes = bytes(64)) -> Callable[[Path], bytes]:
    """A safetensors file with any header."""
    raw = text if isinstance(text, bytes) else text.encode()
    return lambda place: struct.pack("<Q", len(raw) if length is None else length) + raw + body


def tensor(**entry: Any) -> str:
    return json.dumps(
        {"transformer.x.lora_A.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64], **entry}}
    )


BROKEN: dict[str, Callable[[Path], bytes]] = {
    "huge header": header("{}", 2**62),
    "negative header": header("{}", 2**64 - 1),
    "header beyond the file": header("{}", 10_000),
    "no JSON": header(b"\xff" * 64),
    "deep JSON": header("[" * 50_000),
    "offsets beyond the file": header(tensor(data_offsets=[0, 2**40], shape=[2**38])),
    "offsets backwards": header(tensor(data_offsets=[64, 0])),
    "shape overflow": header(tensor(shape=[2**33, 2**33])),
    "unknown dtype": header(tensor(dtype="PICKLE")),
    "a pickle": bomb,
    "empty": lambda place: b"",
}
CONTENTS: list[Attack] = [
    # Configuration
    ("yaml apply os.system", in_yaml("!!python/object/apply:os.system ['touch CANARY']")),
    ("yaml apply subprocess", in_yaml("!!python/object/apply:subprocess.check_call [[touch, CANARY]]")),
    ("yaml new", in_yaml("!!python/object/new:os.system ['touch CANARY']")),
    ("yaml name", in_yaml("!!python/name:os.system")),
    ("yaml module", in_yaml("!!python/module:antigravity")),
    ("yaml tag in a key", lambda place: append(place, "? !!python/object/apply:os.system ['touch CANARY']\n: 1")),
    ("yaml in an override", override("train.seed=!!python/object/apply:os.system ['touch PLACE/canary']")),
    ("environment in a value", override("logging.output_dir=${oc.env:HF_TOKEN}")),
    ("billion laughs", lambda place: append(place, "\n".join(
        ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
        + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]))),
    # Class paths
    ("optimizer os.system", override("optimizer.class_path=os.system", "optimizer.init_args={x: touch PLACE/canary}")),
    ("optimizer Popen", override(
        "optimizer.class_path=subprocess.Popen", "optimizer.init_args={args: [touch, PLACE/canary]}")),
    ("optimizer eval", override("optimizer.class_path=builtins.eval")),
    ("optimizer torch.load", override("optimizer.class_path=torch.load")),
    ("optimizer a module", override("optimizer.class_path=torch.nn.Linear")),
    ("data set os.system", override("data.class_path=os.system")),
    ("data set torch", override("data.class_path=torch.utils.data.TensorDataset")),
    ("project outside", override("logging.tracker_project_name=../../outside")),
    # Data
    ("csv with ..", table("csv", "../elsewhere/secret.png")),
    ("jsonl with ..", table("jsonl", "training_images/../../elsewhere/secret.png")),
    ("csv with an absolute path", table("csv", "PLACE/elsewhere/secret.png")),
    ("jsonl with an absolute path", table("jsonl", "PLACE/elsewhere/secret.png")),
    ("jsonl with a file address", table("jsonl", "file://PLACE/elsewhere/secret.png")),
    ("jsonl with a zero byte", table("jsonl", "training_images/0.png\u0000")),
    ("target is a link", link("training_images/1.png", "secret.png")),
    ("reference is a link", link("control_images/1.png", "secret.png")),
    ("caption is a link", link("training_images/1.txt", "secret.txt")),
    ("folder is a link", link("control_images", "control_images")),
    # The base model
    ("transformer is a pickle", base_file(
        "transformer/*.safetensors", "transformer/diffusion_pytorch_model.bin", bomb)),
    ("vae is a pickle", base_file("vae/*.safetensors", "vae/diffusion_pytorch_model.bin", bomb)),
    ("text encoder is a pickle", base_file("text_encoder/*.safetensors", "text_encoder/pytorch_model.bin", bomb)),
    ("transformer is broken", base_file("", "transformer/diffusion_pytorch_model.safetensors", BROKEN["huge header"])),
    ("component os.system", base_json("model_index.json", text_encoder=["os", "system"])),
    ("component of its own", base_json("model_index.json", text_encoder=["evil", "Evil"])),
    ("pipeline of its own", base_json("model_index.json", _class_name=["pipeline", "Evil"])),
    ("text encoder of its own", base_json(
        "text_encoder/config.json", auto_map={"AutoModel": "evil.Evil"}, model_type="evil")),
    # Checkpoints
    ("pickles beside the state", in_checkpoint("optimizer.pt", bomb)),
    ("pickle as adapter", in_checkpoint("adapter.safetensors", bomb)),
    ("pickle as optimizer", in_checkpoint("optimizer.safetensors", bomb)),
    ("pickle as progress", in_checkpoint("progress.json", bomb)),
    ("huge header as adapter", in_checkpoint("adapter.safetensors", BROKEN["huge header"])),
    ("tag in the optimizer", in_checkpoint("optimizer.json", lambda _: b'{"call": ["os.system", ["true"]]}')),
    ("pickles without manifest", in_checkpoint("optimizer.pt", bomb, seal=False)),
    ("manifest of files elsewhere", forged_manifest),
    # Weights to begin with
    ("weights .bin", lora_file("pytorch_lora_weights.bin", bomb)),
    ("weights .ckpt", lora_file("lora.ckpt", bomb)),
    *((f"weights: {name}", lora_file("lora.safetensors", content)) for name, content in BROKEN.items()),
]  # fmt: skip
HARMLESS = {
    "pickles beside the state",
    "text encoder of its own",
}  # nobody looks at these: the run goes on without them


@pytest.fixture
def sound(lab: Lab) -> Iterator[Path]:
    """A configuration with its own data, model and one finished run, and what lies outside of them."""
    config = lab.config("hostile", own_cache=True, train={"max_train_steps": 2})
    values = yaml.safe_load(config.read_text())
    place = config.parent
    values["data"]["init_args"]["dataset_path"] = str(write_pairs(place / "pairs", 2))
    values["model"]["pretrained_model_name_or_path"] = str(
        shutil.copytree(lab.checkpoints["FluxKontext"], place / "model")
    )
    outside = place / "elsewhere"
    shutil.copytree(place / "pairs" / "control_images", outside / "control_images")
    shutil.copy(place / "pairs" / "control_images" / "0.png", outside / "secret.png")
    (outside / "secret.txt").write_text(SECRET)
    config.write_text(yaml.safe_dump(values))
    lab.run(config)
    yield place
    shutil.rmtree(place)


@pytest.mark.timeout(1800)
def test_nothing_executes_and_nothing_outside_is_read(lab: Lab, sound: Path, tmp_path: Path) -> None:
    assert len(CONTENTS) >= 50
    lost = []
    every = CONTENTS
    for number, (name, attack) in enumerate(every):
        place = tmp_path / f"attack-{number}"
        shutil.copytree(sound, place, symlinks=True)
        config = place / "config.yaml"
        config.write_text(config.read_text().replace(str(sound), str(place)))
        overrides = attack(place)
        trial = lab.start(config, *overrides, environment={"HF_TOKEN": SECRET, "PYTHONPATH": ""})
        code, said = trial.wait(), trial.said()
        if (place / "canary").exists():
            lost.append((name, "executed", said))
        elif code != (0 if name in HARMLESS else 2) or (code and ("error: " not in said or "Traceback" in said)):
            lost.append((name, f"exit code {code}", said))
        written = [path for root in ("cache", "output") for path in (place / root).rglob("*") if path.is_file()]
        if SECRET in said or any(SECRET.encode() in path.read_bytes() for path in written):
            lost.append((name, "the secret is out", said))
        if (place / "outside").exists() or (place.parent / "outside").exists():
            lost.append((name, "wrote outside", said))
        shutil.rmtree(place)
    if lost:
        print(json.dumps([(name, why, said[-1500:]) for name, why, said in lost], indent=1))
    record("hostile input", len(every), lost, "canary never touched, nothing outside read, one message")
