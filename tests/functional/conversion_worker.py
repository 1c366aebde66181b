"""Run by torchrun: the cases of CASES (JSON), one after the other, each with a layout of its own.

Each loads a converted checkpoint into Megatron's model, whose weights must then be those of the Hugging Face loader,
and saves it with Megatron's own `dist_checkpointing`. Rank 0 writes what was found, a line a case.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from transformers import AutoConfig

from megatron_dapo.config.tree import MegatronConfig
from megatron_dapo.mcore.families import shape_of
from megatron_dapo.mcore.model import build_model
from megatron_dapo.mcore.model_load import load_model
from megatron_dapo.mcore.parallel import initialize
from megatron_dapo.mcore.weights import load_hf, local_parameters
from tests.functional.megatron_groups import forget_layout

from megatron.core import dist_checkpointing  # isort: skip  (megatron_dapo.mcore makes it importable)


def main(cases_file: str, report: str) -> None:
    torch.set_num_threads(1)
    found = {case["name"]: run(case) for case in json.loads(Path(cases_file).read_text())}
    if dist.get_rank() == 0:
        Path(report).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def run(case: dict[str, Any]) -> list[str]:
    """The parameters that are not what they should be, of all ranks."""
    config = MegatronConfig(**case["megatron"])
    initialize(config, seed=1)
    shape = shape_of(AutoConfig.from_pretrained(case["hf"]))
    wanted, chunks = build_model(shape, config), build_model(shape, config)
    for model in (wanted, chunks):
        for _, param in local_parameters(model):
            param.data.fill_(torch.nan)
    load_hf(wanted, shape, case["hf"])
    load_model(chunks, shape, case["converted"])
    pairs = zip(local_parameters(wanted), local_parameters(chunks), strict=True)
    differing = [name for (name, one), (_, other) in pairs if not torch.equal(one, other)]
    if dist.get_rank() == 0:
        os.makedirs(case["saved"])
    dist.barrier()
    dist_checkpointing.save({str(i): chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}, case["saved"])
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, differing)
    forget_layout()
    return sorted({name for names in everywhere for name in names})


if __name__ == "__main__":
    main(*sys.argv[1:])
