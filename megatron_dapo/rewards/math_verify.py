"""The verifier `math_verify`: the library of that name, which compares answers as mathematics (1/2 is 0.5).

Its own time limits are off: they work by SIGALRM, which a user's code may want too and which C code outlasts; the
pool kills a worker whole. Importing this module takes a second, so only a worker that needs it does.
"""

from __future__ import annotations

import logging

import math_verify as library

from megatron_dapo.rewards.math_dapo import NO_ANSWER, Score

# It warns in every process that its time limits are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def score(response: str, ground_truth: str) -> Score:
    r"""1 or -1, as `math_dapo` has it; `pred` is the answer's text, NO_ANSWER where the library found none.

    Raises:
        ValueError: the library cannot read the ground truth.
    """
    truth = library.parse(rf"\boxed{{{ground_truth}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    if not truth:
        raise ValueError(
            f"math_verify cannot read the ground truth {ground_truth!r}; mend the row, or give its data source another "
            "verifier in reward_model.verifiers"
        )
    answer = library.parse(response, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    acc = bool(answer) and library.verify(truth, answer, timeout_seconds=None)
    # The library returns the parsed expression and, last, its text; printing the expression itself can take forever.
    texts = [part for part in answer if isinstance(part, str)]
    return Score(1.0 if acc else -1.0, acc, texts[-1] if texts else "" if answer else NO_ANSWER)
