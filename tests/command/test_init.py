"""`qif init`: what it writes loads, fits by the planner's word, and comes from the recipe."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_image_finetune.command import init
from qwen_image_finetune.command.cli import main
from qwen_image_finetune.config import load_config
from qwen_image_finetune.fitting import recipe

ROOT = Path(__file__).parents[2]
FACES = str(ROOT / "data/face_seg")


def test_the_file_fits_the_card_by_the_planner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for prefer, base in (("quality", None), ("memory", "nf4")):
        assert main(["init", FACES, "--model", "klein-base-4b", "--card", "16GB", "--prefer", prefer, "--output",
                     f"{prefer}.yaml"]) == 0  # fmt: skip
        config = load_config(Path(f"{prefer}.yaml"))
        assert config.model.quantize == (base or False)
        assert config.model.pretrained_model_name_or_path == "black-forest-labs/FLUX.2-klein-base-4B"
        assert config.train.max_train_steps == 1600 and config.validation.enabled and config.validation.share == 0.1
        capsys.readouterr()
        main(["plan", f"{prefer}.yaml", "--card", "16GB", "--json"])
        assert json.loads(capsys.readouterr().out)["fits"] is True
    written = Path("quality.yaml").read_text().splitlines()
    assert len(written) <= 16
    assert any(FACES in line for line in written) and any("lr: 0.0001" in line for line in written)
    assert main(["check", "quality.yaml"]) == 0
    assert "18 pairs to train on, 2 to validate on" in capsys.readouterr().out


def test_a_toy_base_trains_here(tmp_path: Path, tiny_checkpoints: dict[str, Path]) -> None:
    file = tmp_path / "mine.yaml"
    assert main(["init", FACES, "--model", str(tiny_checkpoints["FluxKontext"]), "--output", str(file)]) == 0
    config = load_config(file)
    assert config.optimizer.init_args["lr"] == recipe.SMALL_RATE and config.train.mixed_precision == "no"
    assert main(["train", str(file), "--dry-run"]) == 0


def test_a_pair_that_cannot_be_read_is_said_and_nothing_written(
    tmp_path: Path, write_pairs: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = write_pairs(tmp_path / "pairs", [(64, 64), (64, 64)]), tmp_path / "mine.yaml"
    broken = folder / "training_images" / "1.png"
    broken.write_bytes(broken.read_bytes()[:40])
    assert main(["init", str(folder), "--model", "klein-base-4B", "--card", "24GB", "--output", str(file)]) == 2
    assert str(broken) in capsys.readouterr().err
    assert not file.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Folder of pairs? Nobody can answer here"),
        ([FACES], "Which model?"),
        ([FACES, "--model", "klein"], "'klein' is several of black-forest-labs/FLUX.2-klein-base-4B"),
        ([FACES, "--model", "sdxl"], "'sdxl' is none of black-forest-labs/FLUX.1-Kontext-dev"),
        ([FACES, "--model", "klein-base-4B", "--card", "big"], "'big' is no amount of memory of a card"),
    ],
)
def test_answers_that_mean_nothing(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", *words, "--output", str(tmp_path / "mine.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_questions_are_asked_where_somebody_can_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoints: dict[str, Path]
) -> None:
    answers = iter([FACES, str(tiny_checkpoints["FluxKontext"]), "", "speed"])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert main(["init", "--output", str(tmp_path / "mine.yaml")]) == 0
    assert next(answers, None) is None
    assert load_config(tmp_path / "mine.yaml").data.init_args.dataset_path == FACES


@pytest.mark.parametrize(("pairs", "steps", "share"), [(3, 500, 0), (10, 800, 0.2), (20, 1600, 0.1), (900, 4000, 0.1)])
def test_numbers_by_the_size_of_the_data_set(pairs: int, steps: int, share: float) -> None:
    assert (recipe.steps_for(pairs), recipe.share_for(pairs)) == (steps, share)
    written = init.chosen(pairs, 12_000_000_000)
    assert written["train.max_train_steps"] == steps and written.get("validation.share", 0) == share


def test_the_page_shows_the_same_numbers() -> None:
    page = (ROOT / "docs/recipe.md").read_text()
    for what, value, reason in recipe.RULES:
        assert f"| {what} | {value} | {reason} |" in page
