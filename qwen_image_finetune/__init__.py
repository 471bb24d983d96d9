"""Fine-tuning of image-editing diffusion models on pairs of pictures and an instruction."""

__version__ = "0.1.0"
