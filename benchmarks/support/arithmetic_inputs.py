"""The arithmetic example's base model and problems, made as the example makes them, in a folder.

python arithmetic_inputs.py FOLDER: `base/` (a Hugging Face checkpoint), `train.jsonl`, `test.jsonl`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "arithmetic"
SEED = 1


def main(folder: Path) -> None:
    sys.path.insert(0, str(EXAMPLE))
    from base_model import build_model, build_tokenizer, save, warm_up
    from problems import split, write_rows

    torch.manual_seed(0)
    problems = split(SEED)
    for name, chosen in (("train", problems.train), ("test", problems.test)):
        write_rows(folder / f"{name}.jsonl", chosen)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, SEED)
    warm_up(model, tokenizer, problems, SEED, lambda step, loss: None)
    save(model, tokenizer, folder / "base")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
