"""The adapter on a transformer, and LoRA files in every program's dialect. May know neither levers nor families."""
