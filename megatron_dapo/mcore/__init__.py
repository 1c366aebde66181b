"""All that touches Megatron. Importing this package makes Megatron-Core importable on machines without CUDA."""

import logging
import warnings

from megatron_dapo.mcore.cpu_device import enable_cpu

enable_cpu()

# Without Transformer Engine and Apex, Megatron-Core says so at import and falls back to torch: what is meant here.
warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")
# What Megatron-Core 0.16 does to torch and to its own settings, none of which a user can change.
warnings.filterwarnings("ignore", message="full scope is deprecated", category=UserWarning)
warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf", category=UserWarning)
warnings.filterwarnings("ignore", message="When using async grad allreduce", category=UserWarning)
for _module in ("torch.distributed", "megatron.core"):
    warnings.filterwarnings("ignore", category=FutureWarning, module=_module)
logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
