"""Fine-tuning of image-editing diffusion models on pairs of pictures and an instruction."""

import logging

__version__ = "0.1.0"

# bitsandbytes warns on some CPUs, wherever diffusers is imported, that a faster kernel of the hub is not installed: for
# inference in 4 bits on a CPU. Nobody can act on it here. Whatever else it says is heard.
_UNASKED = "Failed to load CPU gemm_4bit_forward from kernels-community"
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: not str(record.msg).startswith(_UNASKED))
