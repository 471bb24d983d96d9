"""Prompt and references to pictures, for prediction and for training's samples. May know encoding and below."""
