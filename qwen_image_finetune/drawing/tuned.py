"""A predictor with what was trained: LoRAs, each at its strength, or a transformer tuned as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_image_finetune.machine import console

if TYPE_CHECKING:
    from PIL.Image import Image

    from qwen_image_finetune.config import Config
    from qwen_image_finetune.drawing.predict import Predictor


class TunedPredictor:
    """Draws with the base of a configuration, or what was trained on it; the model loads when it is first needed."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._predictor: Predictor | None = None
        self._tuned: Path | None = None
        self._loras: list[tuple[Path, float]] = []

    def load_lora(self, path: str | Path, strength: float = 1.0) -> None:
        """Predict with a LoRA (file, folder or hub id); before or after `setup_predict`, and instead of another.

        Raises:
            LoraFileError: it is not there, or does not fit the model.
            ConfigError: the strength is out of range.
        """
        self.load_loras([(path, strength)])

    def load_loras(self, loras: Sequence[tuple[str | Path, float]]) -> None:
        """The same with several together, each with its strength; their changes of the weights add up.

        Raises:
            LoraFileError, ConfigError: as there.
        """
        from qwen_image_finetune.config.ranges import checked
        from qwen_image_finetune.config.values import Strength
        from qwen_image_finetune.lora.sources import find_lora

        self._loras = [(find_lora(path), checked(Strength, strength, "strength ")) for path, strength in loras]
        if self._predictor is not None:
            self._apply_loras()

    def setup_predict(self) -> None:
        """Load what prediction needs.

        Raises:
            LoraFileError: the LoRA does not fit the model; it is not loaded then.
            OutOfMemory: with what would help.
        """
        from qwen_image_finetune.drawing.build import build_predictor, check_loras
        from qwen_image_finetune.fitting.out_of_memory import explained

        check_loras(self.config, [path for path, _ in self._loras])
        with explained(self.config, "loading the model for prediction"):
            self._predictor = build_predictor(self.config, self._tuned)
            self._apply_loras()

    @property
    def predictor(self) -> Predictor:
        """The loaded parts, set up on first use."""
        if self._predictor is None:
            self.setup_predict()
        assert self._predictor is not None
        return self._predictor

    def unload_lora(self) -> None:
        """Predict with the base again."""
        from qwen_image_finetune.lora import adapters

        self._loras = []
        if self._predictor is not None and adapters.adapter_names(self._predictor.transformer):
            adapters.remove(self._predictor.transformer)

    def load_transformer(self, checkpoint: Path | None) -> None:
        """Predict with a transformer that was tuned as a whole in place of the base; before or after `setup_predict`.

        Args:
            checkpoint: a folder that holds `transformer/`; None is the base again.
        """
        self.unload_lora()
        if checkpoint == self._tuned:
            return
        self._tuned, predictor, self._predictor = checkpoint, self._predictor, None
        if predictor is None:
            return
        from qwen_image_finetune.drawing.build import load_for_prediction
        from qwen_image_finetune.fitting.out_of_memory import explained
        from qwen_image_finetune.loading import checkpoint_folder

        family, home = predictor.family, predictor.transformer.device
        del predictor.transformer  # the device need not hold two
        with explained(self.config, "loading the model for prediction"):
            folder = checkpoint or checkpoint_folder(self.config, family)
            tuned = checkpoint is not None
            predictor.transformer = load_for_prediction(self.config, family, folder, home, tuned)
        self._predictor = predictor

    def predict(
        self,
        prompt_image: Image | Sequence[Image] | None,
        prompt: str,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        **options: Any,
    ) -> list[Image]:
        """Draw pictures; loads the model first if that has not happened. Options: see `Predictor.predict`."""
        from qwen_image_finetune.fitting.out_of_memory import explained

        steps = self.predictor.defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        with explained(self.config, "predicting"), console.progress("drawing", steps) as update:
            return self.predictor.predict(prompt_image, prompt, steps, guidance_scale, progress=update, **options)

    def _apply_loras(self) -> None:
        from qwen_image_finetune.loading import weight_dtype
        from qwen_image_finetune.lora import adapters
        from qwen_image_finetune.lora import files as lora_files
        from qwen_image_finetune.lora.targets import lora_layers

        assert self._predictor is not None
        transformer, naming = self._predictor.transformer, self._predictor.family.naming
        if adapters.adapter_names(transformer):
            adapters.remove(transformer)
        if not self._loras:
            return
        names = [f"lora_{number}" for number in range(len(self._loras))]
        for name, (path, _) in zip(names, self._loras, strict=True):
            lora_files.load_lora(transformer, path, naming, adapter_name=name)
        # As diffusers and ComfyUI run it: in the precision of the base, not of training.
        dtype = weight_dtype(self.config.train.mixed_precision)
        for _, layer in lora_layers(transformer):
            layer.lora_A.to(dtype)
            layer.lora_B.to(dtype)
        adapters.activate(transformer, names)  # all of them at once
        for name, (_, strength) in zip(names, self._loras, strict=True):
            adapters.set_strength(transformer, strength, name)
