"""For SGLang on a host without CUDA: the names of its compiled kernels that it imports when it starts.

There is no build of them for every CPU, and dense models run on torch's own operators. Each name raises when called,
so nothing is computed by anything but SGLang and torch. Other names are not there, for SGLang asks which there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

__version__ = "0"


def _absent(name: str) -> Callable[..., Any]:
    def raise_absent(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} was called: this CPU has no build of SGLang's compiled kernels; run a dense model, "
            "without speculative decoding"
        )

    return raise_absent


# They serve speculative decoding and its caches.
assign_draft_cache_locs_contiguous_cpu = _absent("assign_draft_cache_locs_contiguous_cpu")
assign_extend_cache_locs_cpu = _absent("assign_extend_cache_locs_cpu")
assign_req_to_token_pool_cpu = _absent("assign_req_to_token_pool_cpu")
build_tree_kernel_efficient_cpu = _absent("build_tree_kernel_efficient_cpu")
copy_all_layer_kv_cache_cpu = _absent("copy_all_layer_kv_cache_cpu")
fill_accept_out_cache_loc_cpu = _absent("fill_accept_out_cache_loc_cpu")
fill_bonus_tokens_cpu = _absent("fill_bonus_tokens_cpu")
rotate_input_ids_cpu = _absent("rotate_input_ids_cpu")
verify_tree_greedy_cpu = _absent("verify_tree_greedy_cpu")
