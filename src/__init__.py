"""Import paths of older configurations and scripts: thin doors to `qwen_image_finetune`."""
