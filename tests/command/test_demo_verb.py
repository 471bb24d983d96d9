"""`qif demo` from its first command to its page, with steps for a moment; tests/toy/test_demo.py is about learning."""

from pathlib import Path

import pytest
import yaml

from qwen_image_finetune.command import demo, materials
from qwen_image_finetune.command.cli import main


def test_the_demonstration_ends_with_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    materials.lay_out(tmp_path)
    for name in materials.FILES:
        written = yaml.safe_load((tmp_path / name).read_text())
        written["train"] |= {"max_train_steps": 2, "checkpointing_steps": 2}
        written["cache"]["num_variations"] = 1
        written["validation"] |= {
            "steps": 1,
            "num_validation_samples": 2,
            "num_inference_steps": 1,
            "num_loss_pairs": 2,
        }
        (tmp_path / name).write_text(yaml.safe_dump(written))
    monkeypatch.setattr(demo, "SAMPLING", ("--steps", "1", "--guidance", "1"))
    before = Path.cwd()
    assert main(["demo", str(tmp_path)]) == 0
    assert Path.cwd() == before
    said, output = capsys.readouterr().out, tmp_path / "demo/output"
    page = (output / "demo.html").read_text()
    for family in demo.FAMILIES:
        assert f"$ qif train configs/demo_{family}.yaml" in said and f"$ qif evaluate demo/output/{family}/v0" in said
        assert (output / f"{family}/v0/prediction.png").is_file()
        assert f'href="{family}/v0/report.html"' in page and (output / f"{family}/v0/report.html").is_file()
    assert page.count("foreground IoU, with the LoRA") == 2 and "step 2" in page


def test_a_command_that_fails_ends_it(tmp_path: Path) -> None:
    with pytest.raises(materials.DemoError, match=r"`qif cache configs/demo_flux_kontext.yaml` ended with 2"):
        demo.demo(tmp_path, lambda words: 2)
