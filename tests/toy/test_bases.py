"""Autoencoders and untrained toy bases: the shortcuts are exact, the words can be told apart."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, FluxTransformer2DModel

from qwen_image_finetune.families import get_family
from qwen_image_finetune.families.base import Reference
from qwen_image_finetune.loading import load_encoders
from qwen_image_finetune.toy import bases, edits, vae
from qwen_image_finetune.toy.measure import foreground_iou, mean_psnr

NAMES = {"flux_kontext": "FluxKontext", "qwen_image_edit": "QwenImageEdit"}
PROMPTS = [path.read_text().strip() for path in sorted((Path(__file__).parents[2] / "data/face_seg").rglob("*.txt"))]


def pictures(count: int, size: int = 32) -> np.ndarray:
    return np.stack([np.asarray(edits.draw_scene(np.random.default_rng(seed), size)) for seed in range(count)])


@pytest.fixture(scope="module", params=bases.FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An untrained base and the name of its family."""
    folder = tmp_path_factory.mktemp(request.param)
    vae.new_vae(request.param).save_pretrained(folder / "vae")
    bases.write_base(request.param, folder / "vae", folder / "base", words=PROMPTS)
    return NAMES[request.param], folder / "base"


@torch.no_grad()
@pytest.mark.parametrize("family", bases.FAMILIES)
def test_one_frame_is_what_the_library_computes(family: str) -> None:
    model, pixels = vae.new_vae(family).eval(), vae.as_pixels(torch.from_numpy(pictures(2)))
    with vae.one_frame():
        mean, _ = vae.encode(model, pixels)
        drawn = vae.decode(model, mean)
    if isinstance(model, AutoencoderKLQwenImage):
        expected = model.encode(pixels.unsqueeze(2)).latent_dist.mode()
        pixels_expected = model.decode(expected).sample[:, :, 0]
        expected = expected[:, :, 0]
        drawn = drawn.clamp(-1, 1)
    else:
        assert isinstance(model, AutoencoderKL)
        expected = model.encode(pixels).latent_dist.mode()
        pixels_expected = model.decode(expected).sample
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(drawn, pixels_expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", bases.FAMILIES)
def test_the_autoencoder_learns_and_its_latents_are_normal(family: str) -> None:
    scenes, model = pictures(12), vae.new_vae(family)
    before = vae.reconstruction(model, scenes)
    vae.train_vae(model, scenes, 25, report=lambda line: None)
    assert vae.reconstruction(model, scenes) > before + 1


def test_the_autoencoder_ends_when_its_time_is_over() -> None:
    lines: list[str] = []
    vae.train_vae(vae.new_vae("flux_kontext"), pictures(2), 10**6, seconds=0.2, report=lines.append)
    assert len(lines) == 1


def test_the_pipeline_sees_latents_of_unit_variance_and_tells_every_prompt_apart(base: tuple[str, Path]) -> None:
    family = get_family(base[0])
    pipe = load_encoders(family, base[1], torch.float32, {"default": "cpu"})
    picture = edits.draw_scene(np.random.default_rng(0), 64)
    assert family.encode_image(pipe, picture).shape == (vae.LATENT_CHANNELS, 16, 16)
    prompts = [*edits.all_prompts(), *dict.fromkeys(PROMPTS)]
    texts = [family.encode_text(pipe, prompt, [Reference(picture, (64, 64))])["prompt_embeds"] for prompt in prompts]
    flat = torch.stack([text.mean(dim=0) for text in texts])
    # However a text ends, its mean already differs from every other one by a fifth of their usual distance.
    distances = torch.pdist(flat)
    assert distances.min() > 0.02 * distances.mean()


def test_prompts_fit_into_the_t5_of_the_base() -> None:
    from qwen_image_finetune.families.tiny_tokenizers import SENTENCES, t5_tokenizer

    tokenizer = t5_tokenizer([*SENTENCES, *edits.all_prompts(), *PROMPTS], bases.T5_TOKENS)
    assert max(len(tokenizer(prompt).input_ids) for prompt in [*edits.all_prompts(), *PROMPTS]) <= bases.T5_TOKENS


@torch.no_grad()
def test_a_settled_guidance_is_the_one_of_training_whatever_is_asked_for() -> None:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1,
        joint_attention_dim=8, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip

    def run(guidance: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        tokens, text = torch.randn(1, 4, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)
        return model(
            tokens, text, torch.zeros(1, 8), torch.tensor([0.5]), torch.zeros(4, 3), torch.zeros(3, 3),
            torch.tensor([guidance]), return_dict=False,
        )[0]  # fmt: skip

    trained, other = run(1.0), run(3.5)
    assert not torch.allclose(trained, other, atol=1e-4)
    bases.settle_guidance(model)
    torch.testing.assert_close(run(1.0), trained)
    torch.testing.assert_close(run(3.5), trained)


def test_measures_against_a_case_by_hand() -> None:
    from PIL import Image

    truth = Image.new("RGB", (4, 4))
    truth.paste((255, 200, 0), (0, 0, 2, 4))  # 8 of 16 pixels are face
    drawn = Image.new("RGB", (4, 4), (4, 3, 2))
    drawn.paste((0, 60, 255), (1, 0, 3, 4))  # hair over 8, 4 of them on the face
    assert foreground_iou(drawn, truth) == pytest.approx(4 / 12)
    flat = [Image.new("L", (2, 2), value) for value in (10, 20)]
    assert mean_psnr(flat[:1], flat[1:]) == pytest.approx(20 * np.log10(25.5))


def test_the_script_refuses_an_unknown_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).parents[2] / "scripts/pretrain_toy.py"
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [str(script), "bake"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(script), run_name="__main__")
    assert "invalid choice: 'bake'" in capsys.readouterr().err
