"""The rows of scripts/quality.py: what is set otherwise than `qif init` sets it for the toy bases."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

BASES = {"flux_kontext": "flux-kontext", "qwen_image_edit": "qwen-image-edit"}  # configs/demo_NAME.yaml, folder in toy/
RATE = 4e-3  # that `qif init` gives models of this size, where full-size ones get 1e-4
OF_FULL_SIZE = RATE / 1e-4  # other trainers' rates are multiplied by this
RATE_KEY = "optimizer.init_args.lr"
# The linear layers that musubi-tuner adapts (networks/lora_flux.py, lora_qwen_image.py): not norms, not modulation.
MUSUBI_TARGETS = (
    r"'(single_)?transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|"
    r"(ff|ff_context|img_mlp|txt_mlp)\.net\.(0\.proj|2)|proj_mlp|proj_out)'"
)
KONTEXT_TARGETS = (
    "[attn.to_k, attn.to_q, attn.to_v, attn.to_out.0, attn.add_k_proj, attn.add_q_proj, attn.add_v_proj, "
    "attn.to_add_out, ff.net.0.proj, ff.net.2, ff_context.net.0.proj, ff_context.net.2, proj_mlp]"
)


@dataclass(frozen=True)
class Row:
    """A setting to measure.

    Attributes:
        settings: overrides of the configuration.
        kind: "default" (is it a better one?), "peer" (another trainer's), "adapter" (docs/adapters.md), or a chapter
            of docs/defaults.md.
        by_base: in place of `settings`, for a base.
        words: where another trainer's settings come from.
    """

    name: str
    settings: Sequence[str] = ()
    kind: str = "default"
    by_base: Mapping[str, Sequence[str]] = field(default_factory=dict, hash=False)
    words: str = ""

    def of(self, base: str) -> Sequence[str]:
        """The overrides for a base."""
        return self.by_base.get(base, self.settings)

    @property
    def decides(self) -> bool:
        """Whether it is about a default: these are measured first."""
        return self.kind in ("default", "peer")

    @property
    def folder(self) -> str:
        """Its name, fit for a folder."""
        return re.sub(r"\W+", "_", self.name)


def rate(factor: float) -> str:
    """The override for so many times the rate."""
    return f"{RATE_KEY}={RATE * factor:g}"


def lora(rank: int, alpha: float) -> tuple[str, str]:
    """The overrides for a rank and an alpha."""
    return f"model.lora.r={rank}", f"model.lora.lora_alpha={alpha:g}"


def optimizer(class_path: str, factor: float, more: str = "") -> tuple[str, str]:
    """The overrides for an optimizer at so many times the rate, all else as the optimizer has it, but for `more`."""
    return f"optimizer.class_path={class_path}", f"optimizer.init_args={{lr: {RATE * factor:g}{more}}}"


FULL = ("model.lora=null", "train.mixed_precision=bf16")
DEFAULTS = Row("our defaults")
ATTENTION = Row("attention alone", ("model.lora.target_modules=null",))  # the default for models of full size
ROWS = (
    DEFAULTS,
    Row("sigma_shift 8", ("train.sigma_shift=8",)),
    Row("diffusers' script", kind="peer", by_base={
        "flux_kontext": (*lora(4, 4), "model.lora.init_lora_weights=gaussian", "train.sigma_distribution=uniform",
                         "train.sigma_shift=1", f"model.lora.target_modules={KONTEXT_TARGETS}"),
        "qwen_image_edit": (*lora(4, 4), "model.lora.init_lora_weights=gaussian", "train.sigma_distribution=uniform",
                            "train.sigma_shift=1", "model.lora.target_modules=[to_k, to_q, to_v, to_out.0]"),
    }, words="train_dreambooth_lora_flux_kontext.py and train_dreambooth_lora_qwen_image.py (there is none for edits) "
             "without options: rank and alpha 4, levels uniform and not shifted, their layers, rate 1e-4"),
    Row("ai-toolkit", ("train.sigma_distribution=uniform", "train.sigma_shift=1",
                       "data.init_args.caption_dropout_rate=0.05"), "peer",
        words="its examples for FLUX.1 Kontext and Qwen-Image-Edit: rank and alpha 16 on all linear layers, uniform "
              "levels, 5 % of the captions dropped, rate 1e-4; the weights that it gives the levels are left out"),
    Row("musubi-tuner", kind="peer", by_base={
        "flux_kontext": (*lora(32, 1), f"model.lora.target_modules={MUSUBI_TARGETS}"),
        "qwen_image_edit": (*lora(16, 1), rate(0.5), "train.sigma_distribution=uniform", "train.sigma_shift=2.2",
                            f"model.lora.target_modules={MUSUBI_TARGETS}"),
    }, words="the commands of its docs: Kontext with rank 32, the model's shift and rate 1e-4, Qwen-Image with rank "
             "16, a shift of 2.2 and rate 5e-5; alpha is 1, as it is there where no other is given"),
    Row("uniform levels", ("train.sigma_distribution=uniform",)),
    ATTENTION,
    Row("twice the rate", (rate(2),)),
    Row("half the rate", (rate(0.5),)),
    Row("EMA 0.99", ("train.ema={enabled: true, decay: 0.99}",)),
    Row("DoRA", ("model.lora.use_dora=true",)),
    Row("rank 4", lora(4, 4)),
    Row("rank 64", lora(64, 64)),
    Row("caption dropout 0.1", ("data.init_args.caption_dropout_rate=0.1",)),
    Row("reference dropout 0.1", ("data.init_args.prompt_image_dropout_rate=0.1",)),
    Row("windows and flips", ("data.init_args.random_crop=true", "data.init_args.random_flip=true",
                              "data.init_args.crop_scale=[0.85, 1.0]", "cache.num_variations=16")),
    Row("rsLoRA, rank 64", (*lora(64, 64), "model.lora.use_rslora=true"), "adapter"),
    Row("rsLoRA, rank 64, alpha 16", (*lora(64, 16), "model.lora.use_rslora=true"), "adapter"),
    Row("LoRA+, lr_ratio 4", ("model.lora.lr_ratio=4",), "adapter"),
    Row("LoKr", ("model.lora.type=lokr",), "adapter"),
    Row("LoKr, 3 times the rate", ("model.lora.type=lokr", rate(3)), "adapter"),
    Row("LoHa", ("model.lora.type=loha",), "adapter"),
    Row("LoHa, 3 times the rate", ("model.lora.type=loha", rate(3)), "adapter"),
    Row("OFT, blocks of 16", ("model.lora.type=oft", "model.lora.oft_block_size=16"), "adapter"),
    Row("OFT, a third of the rate", ("model.lora.type=oft", "model.lora.oft_block_size=16", rate(1 / 3)), "adapter"),
    Row("rank_dropout 0.1", ("model.lora.rank_dropout=0.1",), "adapter"),
    Row("module_dropout 0.1", ("model.lora.module_dropout=0.1",), "adapter"),
    Row("max_norm 1", ("model.lora.max_norm=1.0",), "adapter"),
    Row("EMA 0.999", ("train.ema={enabled: true}",), "average"),
    Row("loss huber", ("loss.type=huber",), "loss"),
    Row("loss pseudo_huber", ("loss.type=pseudo_huber",), "loss"),
    Row("loss l1", ("loss.type=l1",), "loss"),
    Row("weighting cosmap", ("loss.weighting=cosmap",), "loss"),
    Row("weighting min_snr", ("loss.weighting=min_snr",), "loss"),
    Row("weighting sigma_sqrt", ("loss.weighting=sigma_sqrt",), "loss"),
    Row("mask_loss difference", ("loss.mask_loss=difference",), "loss"),
    Row("sigma_range 0.3 to 1", ("loss.sigma_range=[0.3, 1.0]",), "loss"),
    Row("sigma_stratified", ("train.sigma_stratified=true",), "loss"),
    Row("preservation 0.5", ("loss.preservation.weight=0.5",), "loss"),
    Row("torch Adafactor", optimizer("torch.optim.Adafactor", 1), "optimizer"),
    Row("torch Adafactor, lr 1", optimizer("torch.optim.Adafactor", 1 / RATE), "optimizer"),
    Row("transformers' Adafactor", optimizer("transformers.optimization.Adafactor", 1,
                                             ", scale_parameter: false, relative_step: false"), "optimizer"),
    Row("Lion, a tenth of the rate", optimizer("pytorch_optimizer.Lion", 0.1), "optimizer"),
    Row("CAME", optimizer("pytorch_optimizer.CAME", 1), "optimizer"),
    Row("CAME, a tenth of the rate", optimizer("pytorch_optimizer.CAME", 0.1), "optimizer"),
    Row("Muon", optimizer("pytorch_optimizer.Muon", 1), "optimizer"),
    Row("schedule-free AdamW", optimizer("schedulefree.AdamWScheduleFree", 1), "optimizer"),
    Row("Prodigy, lr 1", optimizer("prodigyopt.Prodigy", 1 / RATE), "optimizer"),
    Row("8-bit Adam", optimizer("bitsandbytes.optim.Adam8bit", 1), "optimizer"),
    Row("8-bit AdEMAMix", optimizer("bitsandbytes.optim.AdEMAMix8bit", 1), "optimizer"),
    Row("full fine-tuning", (*FULL, rate(0.1)), "full"),
    Row("full fine-tuning, bf16 weights", (*FULL, rate(0.1), "train.weight_precision=bf16"), "full"),
    Row("full fine-tuning, a fortieth of the rate", (*FULL, rate(1 / 40)), "full"),
)  # fmt: skip
