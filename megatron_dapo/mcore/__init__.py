"""All that touches Megatron. Importing this package makes Megatron-Core importable on machines without CUDA."""

import logging
import warnings

from megatron_dapo.mcore.cpu_device import enable_cpu

enable_cpu()

# Without Transformer Engine and Apex, Megatron-Core says so at import and falls back to torch: what is meant here.
warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")
logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
