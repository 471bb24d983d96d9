"""Prediction: what the person asked for reaches the model, and what cannot be drawn is said before it loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_image_finetune.command.cli import main
from qwen_image_finetune.config import Config, ConfigError
from qwen_image_finetune.data.images import DataError
from qwen_image_finetune.drawing.draw import DrawingError, Request, chosen, draw, plan
from qwen_image_finetune.drawing.predict import PredictionError, check_request
from qwen_image_finetune.families import get_family
from qwen_image_finetune.lora.header import LoraFileError
from qwen_image_finetune.trainer import Trainer
from qwen_image_finetune.training.train import train
from tests.kin import TWO, UNLIKE

Configure = Callable[..., Config]


def photograph(seed: int = 0, size: tuple[int, int] = (64, 64)) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def same(first: Image.Image, second: Image.Image) -> bool:
    return np.array_equal(np.asarray(first), np.asarray(second))


def difference(first: Image.Image, second: Image.Image) -> int:
    """The largest, of 255."""
    return int(np.abs(np.asarray(first).astype(int) - np.asarray(second)).max())


@pytest.fixture(params=TWO)
def trainer(request: pytest.FixtureRequest, configure: Configure) -> Trainer:
    return Trainer(configure(request.param))


@pytest.fixture
def lora(trainer: Trainer) -> Path:
    """A LoRA of two steps, strong enough to change every picture."""
    config = trainer.config.model_copy(update={"train": trainer.config.train.model_copy(update={"max_train_steps": 2})})
    run = train(config)
    assert run is not None
    return next(run.glob("checkpoint-*-2")) / "pytorch_lora_weights.safetensors"


def test_guidance_scale_is_obeyed(trainer: Trainer) -> None:
    weak, strong = (trainer.predict(photograph(), "add a hat", 2, guidance_scale=scale)[0] for scale in (1.0, 6.0))
    assert not same(weak, strong)


def test_image_guidance_is_obeyed(trainer: Trainer) -> None:
    plain, guided = (
        trainer.predict(photograph(), "add a hat", 2, 1.0, image_guidance_scale=scale)[0] for scale in (1.0, 3.0)
    )
    assert not same(plain, guided)


def test_predict_sets_itself_up(trainer: Trainer) -> None:
    unasked = trainer.predict(photograph(), "add a hat", num_inference_steps=2, guidance_scale=2.0)
    again = Trainer(trainer.config)
    again.setup_predict()
    asked = again.predict(prompt_image=photograph(), prompt="add a hat", num_inference_steps=2, guidance_scale=2.0)
    assert isinstance(unasked, list) and isinstance(unasked[0], Image.Image)
    assert same(unasked[0], asked[0])


def test_a_lora_before_or_after_the_setup(trainer: Trainer, lora: Path) -> None:
    """It changes the picture alike in both orders, not at all at strength 0, and a second one takes its place."""

    def draw(with_lora: Trainer) -> Image.Image:
        return with_lora.predict(photograph(), "add a hat", 2)[0]

    base = draw(trainer)
    before = Trainer(trainer.config)
    before.load_lora(lora)
    before.setup_predict()
    trainer.load_lora(lora.parent)  # a checkpoint folder is as good as its file
    changed = draw(before)
    assert same(changed, draw(trainer)) and not same(changed, base)
    trainer.load_lora(lora, strength=0.0)
    assert same(draw(trainer), base)
    trainer.load_lora(lora.parent.parent, strength=1.0)  # a version stands for its newest checkpoint
    assert same(draw(trainer), changed)
    halves = Trainer(trainer.config)
    halves.load_loras([(lora, 0.25), (lora, 0.75)])  # together they are the whole, up to how products round
    assert difference(draw(halves), changed) <= 1 < difference(changed, base)
    trainer.load_loras([(lora, 0.0), (lora, 1.0)])
    assert same(draw(trainer), changed)


def test_strengths_belong_to_loras_one_by_one() -> None:
    loras = ("a.safetensors", "b.safetensors")
    assert chosen(Request("x", loras=loras)) == (None, [(loras[0], 1.0), (loras[1], 1.0)])
    assert chosen(Request("x", loras=loras, strengths=(0.5, -1.0))) == (None, [(loras[0], 0.5), (loras[1], -1.0)])
    for given in (Request("x", strengths=(0.5,)), Request("x", loras=loras, strengths=(0.5,))):
        with pytest.raises(DrawingError, match="give one strength for each LoRA"):
            chosen(given)


def test_a_strength_out_of_range_is_refused(trainer: Trainer, lora: Path) -> None:
    for strength in (float("nan"), float("inf"), 1e30, -101.0):
        with pytest.raises(ConfigError, match="it must be a number from -100 to 100"):
            trainer.load_lora(lora, strength)


def test_a_lora_that_is_not_there_is_refused_at_once(trainer: Trainer, tmp_path: Path) -> None:
    with pytest.raises(LoraFileError, match="does not exist"):
        trainer.load_lora(tmp_path / "nothing" / "here.safetensors")


def test_a_lora_of_another_family_is_refused_before_the_model_loads(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(configure("FluxKontext", "train.max_train_steps=1"))
    assert run is not None
    trainer = Trainer(configure("QwenImageEdit"))
    trainer.load_lora(run)
    monkeypatch.setattr("qwen_image_finetune.drawing.build.build_predictor", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(LoraFileError, match="pytorch_lora_weights"):
        trainer.setup_predict()


def test_fp16_draws_nearly_what_float32_draws(configure: Configure) -> None:
    """Its encoders and its noise are those of float32."""
    exact, rounded = (
        Trainer(configure("FluxKontext", f"train.mixed_precision={name}")).predict(photograph(), "add a hat", 2)[0]
        for name in ("no", "fp16")
    )
    assert np.abs(np.asarray(exact).astype(int) - np.asarray(rounded).astype(int)).mean() < 2


def test_encoders_and_transformer_take_turns(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card too small for both: each waits in host memory while the other works, and the picture is the same."""
    trainer = Trainer(configure("FluxKontext"))
    alone = trainer.predict(photograph(), "add a hat", 2)[0]
    predictor, moves = trainer.predictor, list[str]()
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        part = predictor.transformer if name == "transformer" else predictor.pipe.components[name]
        monkeypatch.setattr(part, "to", lambda device, name=name: moves.append(f"{name} {device}"))
    encode = predictor.encode
    monkeypatch.setattr(predictor, "encode", lambda *words: (moves.append("encode"), encode(*words))[1])
    sample = predictor.sample
    monkeypatch.setattr(predictor, "sample", lambda *words: (moves.append("sample"), sample(*words))[1])
    predictor.turns = ("text_encoder", "text_encoder_2")
    assert same(trainer.predict(photograph(), "add a hat", 2)[0], alone)
    assert moves == ["transformer cpu", "text_encoder cpu", "text_encoder_2 cpu", "encode", "text_encoder cpu",
                     "text_encoder_2 cpu", "transformer cpu", "sample"]  # fmt: skip


def test_encoders_stay_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from qwen_image_finetune.drawing.build import ROOM_TO_DRAW, fits_beside

    encoder, card = torch.nn.Linear(10, 10, bias=False), torch.device("cuda:0")
    for free, fits in ((ROOM_TO_DRAW + 400, True), (ROOM_TO_DRAW + 399, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
        assert fits_beside([encoder], card) == fits
    assert not fits_beside([encoder], torch.device("xpu:0"))


def test_a_model_tuned_as_a_whole_is_drawn_with(configure: Configure, tmp_path: Path) -> None:
    config = configure("FluxKontext", "train.max_train_steps=2", "model.lora=null", "optimizer.init_args.lr=0.001")
    run = train(config)
    assert run is not None
    photograph().save(tmp_path / "reference.png")
    words = ["--image", str(tmp_path / "reference.png"), "--prompt", "add a hat", "--steps", "2"]
    command = ["predict", str(tmp_path / "config.yaml"), *words]
    for name, more in {
        "base": [],
        "version": ["--lora", str(run)],
        "tuned": ["--lora", str(*run.glob("check*"))],
    }.items():
        assert main([*command, "--output", str(tmp_path / f"{name}.png"), *more]) == 0
    base, version, tuned = (Image.open(tmp_path / f"{name}.png") for name in ("base", "version", "tuned"))
    assert same(version, tuned) and not same(base, tuned)
    trainer = Trainer(config)
    trainer.load_transformer(next(run.glob("check*")))
    assert same(trainer.predict(photograph(), "add a hat", 2)[0], tuned)
    trainer.load_transformer(None)
    assert same(trainer.predict(photograph(), "add a hat", 2)[0], base)
    with pytest.raises(DrawingError, match="tuned as a whole"):
        draw(config, Request("add a hat", (tmp_path / "reference.png",), loras=(str(run),), strengths=(0.5,)))


def test_no_steps_are_not_the_default(trainer: Trainer) -> None:
    with pytest.raises(PredictionError, match="0 inference steps"):
        trainer.predict(photograph(), "add a hat", 0)


def test_one_picture_for_each_seed(trainer: Trainer) -> None:
    alone = [trainer.predict(photograph(), "add a hat", 2, seed=seed)[0] for seed in (3, 4)]
    together = trainer.predict(photograph(), "add a hat", 2, seed=[3, 4])
    assert not same(*alone)
    for one, other in zip(alone, together, strict=True):
        difference = np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int))
        assert difference.max() <= 1  # products of another shape may round differently


def test_the_picture_has_the_size_of_its_reference(trainer: Trainer) -> None:
    assert trainer.predict(photograph(size=(400, 100)), "add a hat", 1)[0].size == (128, 32)  # 64 * 64 pixels, 4 : 1
    assert trainer.predict(photograph(), "add a hat", 1, width=128, height=64)[0].size == (128, 64)


def test_the_size_of_several_references(configure: Configure) -> None:
    """FluxKontextPipeline goes by the first, QwenImageEditPlusPipeline by the last."""
    wide, tall = photograph(size=(400, 100)), photograph(size=(100, 400))
    for name, expected in (("FluxKontext", (128, 32)), ("QwenImageEditPlus", (32, 128))):
        assert Trainer(configure(name)).predict([wide, tall], "add a hat", 1)[0].size == expected


def test_a_turned_photograph_is_drawn_upright(trainer: Trainer, tmp_path: Path) -> None:
    upright = photograph(size=(64, 128))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    first, second = (trainer.predict(p, "x", 1)[0] for p in (upright, Image.open(tmp_path / "turned.png")))
    assert same(first, second)


def test_a_prompt_alone(trainer: Trainer) -> None:
    drawn = trainer.predict(None, "a cat", 2, width=64, height=96)
    assert drawn[0].size == (64, 96)


def test_several_references_reach_kontext_in_their_order(configure: Configure) -> None:
    trainer = Trainer(configure("FluxKontext"))
    references = [photograph(seed) for seed in range(3)]
    one, three, turned = (
        trainer.predict(pictures, "put them together", 2)[0]
        for pictures in (references[:1], references, references[::-1])
    )
    assert not same(one, three) and not same(three, turned)


@pytest.mark.parametrize("name", UNLIKE)
def test_what_cannot_be_drawn_is_said(name: str) -> None:
    family = get_family(name)
    with pytest.raises(PredictionError, match=f"at most {family.max_references} reference"):
        check_request(family, [photograph()] * (family.max_references + 1), None, None)
    for width, height in ((65, 64), (64, 0), (-16, 64)):
        with pytest.raises(PredictionError, match=f"must be multiples of {family.side_multiple}"):
            check_request(family, [], width, height)
    with pytest.raises(PredictionError, match="width and height together"):
        check_request(family, [photograph()], 64, None)
    with pytest.raises(PredictionError, match="a picture to take the size from"):
        check_request(family, [], None, None)
    with pytest.raises(PredictionError, match="at least 1"):
        check_request(family, [photograph()], None, None, steps=0)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2", "transformer"])
def test_a_device_that_is_not_there_is_refused_with_the_ones_that_are(part: str, configure: Configure) -> None:
    with pytest.raises(ConfigError, match=rf"predict\.devices\.{part}='cuda:7' is not a device.*\['cpu'"):
        Trainer(configure("FluxKontext", f"predict.devices.{part}=cuda:7")).setup_predict()


def test_devices_of_prediction_are_used(configure: Configure) -> None:
    devices = "{vae: cpu, text_encoder: cpu, text_encoder_2: cpu, transformer: cpu}"
    named = Trainer(configure("FluxKontext", f"predict.devices={devices}"))
    assert same(
        named.predict(photograph(), "x", 1)[0], Trainer(configure("FluxKontext")).predict(photograph(), "x", 1)[0]
    )


# Which files a request writes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.jpg"):
        photograph().save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    return tmp_path / "in"


@pytest.mark.parametrize(
    "output,count,expected",
    [
        ("cat.jpg", 1, ["cat.jpg"]),
        ("cat.jpg", 2, ["cat-5.jpg", "cat-6.jpg"]),
        ("drawn", 1, ["drawn/output.png"]),
        ("drawn", 2, ["drawn/output-5.png", "drawn/output-6.png"]),
    ],
)
def test_files_of_one_picture(output: str, count: int, expected: list[str]) -> None:
    (drawing,) = plan(Request("x", output=Path(output), count=count, seed=5))
    assert [file.as_posix() for file in drawing.files] == expected


def test_files_of_a_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "._a.png").write_bytes(b"what macOS keeps beside a file")
    drawings = plan(Request("x", folder=folder, output=tmp_path / "out"))
    assert [file.name for drawing in drawings for file in drawing.files] == ["a.png", "b.png"]
    assert [drawing.references for drawing in drawings] == [(folder / "a.png",), (folder / "b.jpg",)]


def test_requests_that_mean_nothing(folder: Path, tmp_path: Path) -> None:
    def refused(words: str, **given: object) -> None:
        with pytest.raises(DrawingError, match=words):
            plan(Request("x", **given))  # type: ignore[arg-type]

    refused("pictures end in", output=Path("cat.gif"))
    refused("at least one picture", count=0)
    refused("give a folder", folder=folder, output=Path("cat.png"))
    refused("leave --image out", folder=folder, images=(folder / "a.png",), output=tmp_path / "out")
    refused("is not a folder", folder=folder / "a.png", output=tmp_path / "out")
    (tmp_path / "empty").mkdir()
    refused("holds no picture", folder=tmp_path / "empty", output=tmp_path / "out")
    photograph().save(folder / "a.jpg")
    refused("several pictures called a", folder=folder, output=tmp_path / "out")


def test_no_picture_is_overwritten_by_its_edit(folder: Path, tmp_path: Path) -> None:
    def refused(output: Path, **given: object) -> None:
        with pytest.raises(DrawingError, match=f"{output}.* would overwrite {folder}/"):
            plan(Request("x", output=output, **given))  # type: ignore[arg-type]

    refused(folder, folder=folder)
    refused(folder / "b.jpg", images=(folder / "a.png", folder / "b.jpg"))
    (tmp_path / "link.png").symlink_to(folder / "a.png")
    refused(tmp_path / "link.png", images=(folder / "a.png",))
    photograph().save(folder / "a-5.png")
    refused(folder, folder=folder, count=2, seed=5)
    photograph().save(tmp_path / "old.png")
    assert plan(Request("x", images=(folder / "a.png",), output=tmp_path / "old.png"))  # another file may go


def test_a_broken_picture_of_a_folder_is_said_before_anything_is_drawn(folder: Path, tmp_path: Path) -> None:
    broken = folder / "b.jpg"
    broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"b\.jpg: cannot be read"):
        plan(Request("x", folder=folder, output=tmp_path / "out"))


def test_the_command_draws_each_picture_of_a_folder(folder: Path, tmp_path: Path, configure: Configure) -> None:
    configure("QwenImageEdit")
    words = ["--prompt", "add a hat", "--steps", "1", "--count", "2", "--guidance", "1"]
    assert (
        main(
            [
                "predict",
                str(tmp_path / "config.yaml"),
                "--folder",
                str(folder),
                "--output",
                str(tmp_path / "out"),
                *words,
            ]
        )
        == 0
    )
    names = ["a-0.png", "a-1.png", "b-0.png", "b-1.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert all(Image.open(tmp_path / "out" / name).size == (64, 64) for name in names)
    words = ["--prompt", "add a hat", "--steps", "1", "--seed", "1", "--guidance", "1"]
    out = tmp_path / "alone.png"
    assert (
        main(["predict", str(tmp_path / "config.yaml"), "--image", str(folder / "b.jpg"), "--output", str(out), *words])
        == 0
    )
    pixels = np.asarray(Image.open(out)).astype(int) - np.asarray(Image.open(tmp_path / "out" / "b-1.png")).astype(int)
    assert np.abs(pixels).max() <= 1


def test_one_step_draws_a_picture(trainer: Trainer) -> None:
    """Schedules that stretch to a last noise level have none for a single step, which starts at pure noise."""
    pixels = np.asarray(trainer.predict(photograph(), "add a hat", 1)[0])
    assert pixels.std() > 1


def test_a_version_stands_for_its_newest_checkpoint(tmp_path: Path) -> None:
    from qwen_image_finetune.lora.sources import find_lora

    for name in ("checkpoint-0-9", "checkpoint-1-10", "checkpoint-2-11"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-2-11":  # one without a LoRA does not count
            (tmp_path / name / "pytorch_lora_weights.safetensors").touch()
    assert find_lora(tmp_path) == tmp_path / "checkpoint-1-10" / "pytorch_lora_weights.safetensors"
    with pytest.raises(LoraFileError, match="has no pytorch_lora_weights"):
        find_lora(tmp_path / "checkpoint-2-11")


def test_a_version_is_said_to_stand_for_its_newest_checkpoint_and_which_is_best(tmp_path: Path) -> None:
    from qwen_image_finetune.lora.sources import checkpoint_notes

    checkpoints = [tmp_path / "v0" / name for name in ("checkpoint-0-9", "checkpoint-1-10")]
    for folder in checkpoints:
        folder.mkdir(parents=True)
        (folder / "pytorch_lora_weights.safetensors").touch()
    newest = f"{tmp_path / 'v0'} stands for its newest checkpoint, {checkpoints[1]}"
    assert checkpoint_notes(tmp_path / "v0") == [newest]
    for step, name, said in (
        (9, "checkpoint-0-9", f"{newest}; the best on held-out pairs is {checkpoints[0]}"),
        (10, "checkpoint-1-10", newest),
        (8, "checkpoint-0-8", newest),  # no longer there
    ):
        (tmp_path / "v0" / "best.json").write_text(f'{{"step": {step}, "checkpoint": "{name}", "loss": 0.5}}\n')
        assert checkpoint_notes(tmp_path / "v0") == [said]
    for named in (checkpoints[0], checkpoints[0] / "pytorch_lora_weights.safetensors", "owner/name"):
        assert checkpoint_notes(named) == []


def test_folders_of_runs_that_are_no_lora(tmp_path: Path) -> None:
    from qwen_image_finetune.lora.sources import find_lora

    tuned = tmp_path / "project" / "v10" / "checkpoint-0-9"
    (tuned / "transformer").mkdir(parents=True)
    (tuned / "transformer" / "config.json").touch()
    (tuned / "optimizer.safetensors").touch()
    (tmp_path / "project" / "v9").mkdir()
    for named in (tuned, tuned.parent):
        with pytest.raises(LoraFileError) as refusal:
            find_lora(named)
        assert f"{named} is of a full fine-tune, not of a LoRA: {tuned / 'transformer'} is the" in str(refusal.value)
    with pytest.raises(LoraFileError, match=r"project is the folder of a project: name one of its versions, v9, v10$"):
        find_lora(tmp_path / "project")
