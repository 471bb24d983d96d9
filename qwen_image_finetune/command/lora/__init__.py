"""`qif lora`: tools for LoRA files. Each checks what it wrote by the change of every weight before it is kept."""
