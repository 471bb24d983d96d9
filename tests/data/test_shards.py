"""Data sets in parquet, arrow and tar files, on this machine and on the hub: the same pairs as in a folder."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from huggingface_hub import constants
from pyarrow import ipc, parquet

from qwen_image_finetune.command.cli import main
from qwen_image_finetune.config import Config, ConfigError, DatasetArguments
from qwen_image_finetune.data import shards
from qwen_image_finetune.data.columns import KNOWN
from qwen_image_finetune.data.dataset import ImageDataset
from qwen_image_finetune.encoding.cache import EncodedDataset
from qwen_image_finetune.encoding.pairs import open_pairs
from qwen_image_finetune.families import get_family

SIZES = [(64, 64), (96, 64), (64, 96), (64, 64), (80, 64)]


def dataset(path: Any, home: Path, **options: Any) -> ImageDataset:
    family = get_family("QwenImageEditPlus")
    arguments = DatasetArguments(dataset_path=path, shards_dir=str(home), resolution=128, **options)
    return ImageDataset(arguments, family.size, family.side_multiple, family.max_references)


def seen(data: ImageDataset, masks: bool = False) -> list[tuple[Any, ...]]:
    """Everything that training sees of a data set, in an order of its own."""
    assert data.check(decode=True) == []
    found = []
    for index in range(len(data)):
        one = data.load(index)
        pictures = [one.target, *one.references, *([one.mask] if masks and one.mask else [])]
        found.append((one.prompt, data.geometry(index), [np.asarray(picture).tobytes() for picture in pictures]))
    return sorted(found, key=lambda each: each[0])


@pytest.fixture(scope="module")
def folder(build_once: Callable[[str, Callable[[Path], object]], Path], write_pairs: Callable[..., Path]) -> Path:
    return (
        build_once("shards-folder", lambda home: write_pairs(home / "pairs", SIZES, masks=True, references=2)) / "pairs"
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    """The pairs of a folder, as the guide's own data sets on the hub have them."""

    def cell(name: str) -> dict[str, Any]:
        return {"bytes": (folder / name).read_bytes(), "path": name}

    return [
        {
            "id": str(number),
            "control_images": [cell(f"control_images/{number}.png"), cell(f"control_images/{number}_control_1.png")],
            "control_mask": cell(f"training_images/{number}_mask.png"),
            "target_image": cell(f"training_images/{number}.png"),
            "prompt": (folder / f"training_images/{number}.txt").read_text(),
        }
        for number in range(len(SIZES))
    ]


def write_parquet(folder: Path, home: Path) -> Path:
    (home / "data").mkdir(parents=True)
    every = rows(folder)
    for place, part in enumerate((every[:3], every[3:])):
        parquet.write_table(
            pa.Table.from_pylist(part), home / f"data/train-{place:05}-of-00002.parquet", row_group_size=2
        )
    parquet.write_table(pa.Table.from_pylist(every[:1]), home / "data/test-00000-of-00001.parquet")
    return home


def write_arrow(folder: Path, home: Path) -> Path:
    home.mkdir()
    table = pa.Table.from_pylist(rows(folder))
    with ipc.new_stream(str(home / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return home


def write_tar(folder: Path, home: Path) -> Path:
    home.mkdir()
    with tarfile.open(home / "part-000.tar", "w") as archive:
        for number, row in enumerate(rows(folder)):
            members = {
                "target.png": row["target_image"]["bytes"], "source.png": row["control_images"][0]["bytes"],
                "source1.png": row["control_images"][1]["bytes"], "mask.png": row["control_mask"]["bytes"],
                "json": json.dumps({"prompt": row["prompt"]}).encode(),
            }  # fmt: skip
            for ending, data in members.items():
                about = tarfile.TarInfo(f"deep/{number:06}.{ending}")
                about.size = len(data)
                archive.addfile(about, io.BytesIO(data))
    return home


OF_TAR = {"target": "target", "references": ["source", "source1"], "prompt": "prompt", "mask": "mask"}
KINDS: dict[str, tuple[Callable[[Path, Path], Path], dict[str, Any] | None]] = {
    "parquet": (write_parquet, None), "arrow": (write_arrow, None), "tar": (write_tar, OF_TAR),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_shards_hold_the_pairs_of_a_folder(kind: str, folder: Path, tmp_path: Path) -> None:
    write, columns = KINDS[kind]
    home = write(folder, tmp_path / kind)
    path: Any = str(home) if columns is None else [{"path": str(home), "columns": columns}]
    ours = dataset(path, tmp_path / "known", use_edit_mask=True)
    assert seen(ours, masks=True) == seen(dataset(str(folder), tmp_path, use_edit_mask=True), masks=True)
    again = dataset(path, tmp_path / "known", use_edit_mask=True)  # out of the index
    assert [row.key for row in again.rows] == [row.key for row in ours.rows]
    assert seen(again, masks=True) == seen(ours, masks=True)


def test_an_index_spares_the_shard(folder: Path, tmp_path: Path) -> None:
    home = write_parquet(folder, tmp_path / "set")
    before = dataset(str(home), tmp_path / "known")
    sizes = [before.geometry(index) for index in range(len(before))]
    files = sorted((home / "data").glob("*.parquet"))
    for path in files:
        about = path.stat()
        path.write_bytes(b"x" * about.st_size)  # as large, and of the same time: taken for the same
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
        shards.let_go(path)
    after = dataset(str(home), tmp_path / "known")
    assert [after.geometry(index) for index in range(len(after))] == sizes
    assert [shards.digest(row.target) for row in after.rows] == [shards.digest(row.target) for row in before.rows]
    files[1].touch()  # another time: another version, which is damaged
    assert any("cannot be read as a table" in line for line in dataset(str(home), tmp_path / "known").check())


@pytest.mark.parametrize("name", KNOWN)
def test_layouts_are_known_by_name(name: str, folder: Path, tmp_path: Path) -> None:
    layout, pictures = KNOWN[name], rows(folder)[0]
    if layout.turns is not None:
        pytest.skip("its pictures are files: test_pictures_that_are_files_beside_their_shards")
    row: dict[str, Any] = {layout.target: pictures["target_image"], layout.prompt: "an edit", "width": 64}
    row |= dict.fromkeys(layout.references, pictures["control_images"][0])
    if layout.prompt.endswith("_list"):
        row[layout.prompt] = ["an edit", "the same in other words"]
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    data = dataset(str(tmp_path), tmp_path)
    assert data.check() == [] and data.prompt(0) == "an edit"
    assert data.rows[0].target.name == layout.target
    assert [path.name for path in data.rows[0].references] == list(layout.references)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": 1}, "of no layout that is known"),
        ({"target_image": None, "control_images": [], "prompt": "x"}, "row 0: target_image is empty"),
        ({"target_image": b"no picture", "control_images": [], "prompt": "x"}, "row 0: target_image: 0/target_image"),
        ({"target_image": {"bytes": None, "path": "/etc/passwd"}, "control_images": [], "prompt": "x"}, "no such file"),
        ({"target_image": "../x.png", "control_images": [], "prompt": "x"}, "is there; ../x.png: no such file"),
        ({"target_image": {"bytes": None, "path": None}, "control_images": [], "prompt": "x"}, "nothing where"),
        ({"data": [{"output_images": [3], "input_images": ["x"], "prompt": "x"}]}, "row 0/0: output_images of one"),
        ({"data": [{"prompt": "x"}]}, "row 0/0: output_images is empty"),
        ({"target_image": "PICTURE", "control_images": [], "prompt": 3}, "row 0: prompt is 3, not a text"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(row: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    picture = rows(folder)[0]["target_image"]
    row = {name: picture if value == "PICTURE" else value for name, value in row.items()}
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    assert any(message in line or message.replace("target_image: 0", "0") in line
               for line in dataset(str(tmp_path), tmp_path).check())  # fmt: skip


def test_pictures_that_are_files_beside_their_shards(folder: Path, tmp_path: Path) -> None:
    """As ImgEdit keeps them: paths in lists, below a folder of the data set; of several turns, each is a sample."""
    home = tmp_path / "set"
    edits = []
    for number in range(len(SIZES)):
        names = (f"control_images/{number}.png", f"control_images/{number}_control_1.png",
                 f"training_images/{number}.png")  # fmt: skip
        places = [f"results_{number % 2}/{number}/{name.replace('/', '_')}" for name in names]
        for name, place in zip(names, places, strict=True):
            copy = home / ("Multiturn" if number > 2 else "Singleturn") / place
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((folder / name).read_bytes())
        edits.append({"input_images": places[:2], "output_images": places[2:],
                      "prompt": (folder / f"training_images/{number}.txt").read_text()})  # fmt: skip
    (home / "Parquet").mkdir()
    parquet.write_table(pa.Table.from_pylist(edits[:3]), home / "Parquet/replace_part0.parquet")
    turns = [{"data": edits[3:]}]
    parquet.write_table(pa.Table.from_pylist(turns), home / "Parquet/version_backtracking_part0.parquet")
    ours = dataset(str(home), tmp_path / "known")
    assert [row.key for row in ours.rows][3:] == [f"Parquet/version_backtracking_part0.parquet/0/{turn}"
                                                  for turn in (0, 1)]  # fmt: skip
    assert seen(ours) == seen(dataset(str(folder), tmp_path))
    assert seen(dataset(str(home), tmp_path / "known")) == seen(ours)  # out of the index
    lost = next(home.glob("Singleturn/results_1/1/training*"))
    lost.unlink()
    (line,) = dataset(str(home), tmp_path / "known").check()
    assert "replace_part0.parquet, row 1: results_1/1/training_images_1.png: no such file in" in line
    shutil.rmtree(home / "Singleturn")
    problems = dataset(str(home), tmp_path / "known").check()
    (line,) = [line for line in problems if "replace_part0" in line]  # not one for each of a million
    assert "no picture that it names is there; results_0/0/training_images_0.png: no such file in" in line


def test_only_the_split_that_is_asked_for(folder: Path, tmp_path: Path) -> None:
    home = write_parquet(folder, tmp_path / "set")
    entry = {"path": str(home), "split": "test"}
    assert len(dataset([entry], tmp_path)) == 1
    assert "no file of the split 'dev'" in dataset([{**entry, "split": "dev"}], tmp_path).check()[0]


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    home = write_arrow(folder, tmp_path / "set")
    file = next(home.glob("*.arrow"))
    file.rename(tmp_path / "elsewhere.arrow")
    file.symlink_to(tmp_path / "elsewhere.arrow")
    data = dataset(str(home), tmp_path / "known")
    assert "a link that leaves the data set's folder" in data.check()[0] and len(data) == 0


@pytest.mark.parametrize("name", ["list.csv", "metadata.csv"])
def test_tables_of_the_guides_columns(
    name: str, folder: Path, tmp_path: Path, write_pairs: Callable[..., Path]
) -> None:
    home = write_pairs(tmp_path / "set", SIZES, masks=True, references=2)
    lines = ["path_target,path_control,path_control_1,prompt,path_mask"]
    for number in range(len(SIZES)):
        control = f"control_images/{number}.png,control_images/{number}_control_1.png"
        lines.append(f"training_images/{number}.png,{control},edit number {number},training_images/{number}_mask.png")
    (home / name).write_text("\n".join(lines))
    path = home / name if name == "list.csv" else home
    ours = dataset(str(path), tmp_path, use_edit_mask=True)
    assert seen(ours, masks=True) == seen(dataset(str(folder), tmp_path, use_edit_mask=True), masks=True)
    mapped = {"target": "after", "references": ["before", "second"], "prompt": "words"}
    (home / name).write_text("\n".join(["after,before,second,words,path_mask", *lines[1:]]))
    ours = dataset([{"path": str(path), "columns": mapped}], tmp_path)
    assert seen(ours) == seen(dataset(str(folder), tmp_path))


@pytest.fixture
def cache_folder(tmp_path: Path) -> Path:
    """Its own: what is encoded is looked at."""
    return tmp_path / "cache"


def test_the_cache_is_that_of_the_folder(
    tmp_path: Path, configure: Callable[..., Config], write_pairs: Callable[..., Path]
) -> None:
    """A picture is the same wherever it lies: what was encoded of the folder serves the shards."""
    folder = write_pairs(tmp_path / "pairs", SIZES)
    home = tmp_path / "set"
    home.mkdir()
    columns = {"source": "control_images", "target": "training_images"}
    table = [
        {**{name: {"bytes": (folder / place / f"{number}.png").read_bytes()} for name, place in columns.items()},
         "prompt": f"edit number {number}"}
        for number in range(len(SIZES))
    ]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(table), home / "x.parquet")
    keys = []
    for path in (folder, home):
        words = [f"data.init_args.dataset_path={path}", f"data.init_args.shards_dir={tmp_path}/known"]
        config = configure("FluxKontext", *words)
        family, checkpoint = get_family("FluxKontext"), Path(config.model.pretrained_model_name_or_path)
        training = open_pairs(config, family).training
        missing = EncodedDataset(config, family, training, checkpoint, torch.float32).missing()
        keys.append({*missing.images, *missing.texts})
    assert keys[0] == keys[1] and len(keys[0]) == 3 * len(SIZES)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as listing a data set and loading a file takes."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_GET(self) -> None:
        self.answer(None)

    def answer(self, body: bytes | None) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path}")
        if path.startswith("/api/datasets/some/edits"):
            names = [{"rfilename": name} for name in self.files]
            self.send(json.dumps({"id": "some/edits", "sha": "c" * 40, "siblings": names}).encode(), body)
        elif path.startswith(f"/datasets/some/edits/resolve/{'c' * 40}/"):
            self.send(self.files[path.partition(f"{'c' * 40}/")[2]], body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

    def send(self, data: bytes, body: bytes | None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{len(data):040x}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.end_headers()
        self.wfile.write(data if body is None else body)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    home = write_parquet(folder, tmp_path / "remote")
    Hub.files = {str(path.relative_to(home)): path.read_bytes() for path in sorted(home.rglob("*.parquet"))}
    Hub.files |= {"README.md": b"", "load.py": b"raise SystemExit"}
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_data_set_of_the_hub(hub: type[Hub], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = seen(dataset("hf://some/edits", tmp_path / "home"))
    assert ours == seen(dataset(str(folder), tmp_path))
    assert not any("load.py" in path or "test-0" in path for path in hub.asked)
    loads = [path for path in hub.asked if "/resolve/" in path]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert seen(dataset("hf://some/edits@main", tmp_path / "home")) == ours  # what was said before
    assert hub.asked == [] and loads


def test_a_stream_is_encoded_shard_by_shard(
    hub: type[Hub], folder: Path, tmp_path: Path, configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure("QwenImageEditPlus")
    file, home = str(tmp_path / "config.yaml"), tmp_path / "home"
    words = [f"data.init_args.shards_dir={home}", "data.init_args.caption_dropout_rate=0.2", "train.max_train_steps=2"]
    local = ["data.init_args.dataset_path=" + str(tmp_path / "remote"), f"cache.cache_dir={tmp_path}/local"]
    remote = ["data.init_args.dataset_path=hf://some/edits", "data.init_args.streaming=true",
              f"cache.cache_dir={tmp_path}/cache"]  # fmt: skip
    assert main(["cache", file, *words, *remote]) == 0
    assert list(home.rglob("*.parquet")) == []  # nothing stays but what is known of them
    loads = [path for path in hub.asked if path.startswith("GET /datasets")]
    assert len(loads) == len(set(loads)) == 2

    assert main(["cache", file, *words, *local]) == 0
    stored = [{path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.safetensors")}
              for name in ("cache", "local")]  # fmt: skip
    assert stored[0] == stored[1] and len(stored[0]) > 3 * len(SIZES)

    hub.asked.clear()
    assert main(["train", file, *words, *remote]) == 0
    assert main(["check", file, *words, *remote]) == 0
    assert not any("/resolve/" in path for path in hub.asked)
    entry = next((tmp_path / "cache").rglob("*.safetensors"))
    entry.unlink()  # what is lost is encoded again, out of its shard alone
    assert main(["cache", file, *words, *remote]) == 0
    assert sum(path.startswith("GET /datasets") for path in hub.asked) == 1 and entry.exists()


def test_a_stream_needs_the_cache(configure: Callable[..., Config]) -> None:
    for words in (["cache.use_cache=false"], ["validation.enabled=true", "validation.share=0.5"]):
        with pytest.raises(ConfigError, match=r"data\.init_args\.streaming=true"):
            configure("QwenImageEditPlus", "data.init_args.streaming=true", *words)


def test_a_data_set_that_is_not_on_the_hub(hub: type[Hub], tmp_path: Path) -> None:
    assert "no data set some/other on the hub" in dataset("hf://some/other", tmp_path).check()[0]
    assert "an address on the hub is hf://OWNER/NAME" in dataset("hf://some", tmp_path).check()[0]


def test_it_trains(folder: Path, tmp_path: Path, configure: Callable[..., Config]) -> None:
    home = write_parquet(folder, tmp_path / "set")
    configure("QwenImageEditPlus")
    file = str(tmp_path / "config.yaml")
    columns = {"target": "target_image", "references": "control_images", "prompt": "prompt"}
    words = [
        f"data.init_args.dataset_path={json.dumps([{'path': str(home), 'columns': columns}])}",
        f"data.init_args.shards_dir={tmp_path}/known", "train.max_train_steps=2", "validation.enabled=true",
        "validation.share=0.2", "validation.steps=2", "validation.num_inference_steps=1",
    ]  # fmt: skip
    assert main(["train", file, *words, "--dry-run"]) == 0
    assert main(["train", file, *words]) == 0
    version = str(tmp_path / "output/project/v0")
    assert main(["report", version]) == 0
    assert main(["evaluate", version, "--checkpoints", "latest", "--steps", "1", "--count", "1"]) == 0
