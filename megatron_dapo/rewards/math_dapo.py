"""The verifier of the public DAPO recipe: the last `Answer:` of a response, normalised, must equal the truth's string.

No arithmetic and no algebra: 1/2 and 0.5 are two answers; `math_verify.py` is for those who want them to be one.
Only the last 300 characters of a response are looked at, so that no response can make it slow.
Sources: answer normalisation, Lewkowycz et al. 2022, arXiv 2206.14858, appendix D.1, whose list of words the recipe
has without `ft` (it would eat into `\\left`); window, pattern and scores, the recipe.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

NO_ANSWER = "[INVALID]"
ANSWER_WINDOW = 300  # characters
BOX_WINDOW = 100  # characters, in the strict mode

_ANSWER = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")
_BOX = "\\boxed{"

# In this order: several rules feed a later one, as `mbox` feeds the wrappers and `\text{m}` the removal of `\text{}`.
_REPLACED = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    (r"\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (r",\text{and}", ","),
    (r"\text{and}", ","),
    (r"\text{m}", r"\text{}"),
)
_UNITS_AND_FILLERS = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", r"\ldots", "sue", "points"),
    *("feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students"),
    *("childrentickets", "multiples"),
    *(r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3", "\\text{\n}", r"\text{}", r"\mathrm{th}"),
    *(r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots"),
)
_WRAPPERS = tuple(
    # The box takes the last brace of its line, the others the first one that closes: nested braces tell them apart.
    (re.compile(pattern), r"\1")
    for pattern in (r"\\text\{(.*?)\}", r"\\textbf\{(.*?)\}", r"\\overline\{(.*?)\}", r"\\boxed\{(.*)\}")
)
_SHORTHANDS = (
    (re.compile(r"frac([^{])(.)"), r"frac{\1}{\2}"),
    (re.compile(r"sqrt([^{])"), r"sqrt{\1}"),
)


@dataclass(frozen=True)
class Score:
    """`pred` is the normalised prediction; None where the strict mode found no box."""

    score: float  # 1 or -1
    acc: bool
    pred: str | None


def score(response: str, ground_truth: str, strict_box_verify: bool = False, fallback_boxed: bool = False) -> Score:
    r"""Whether the response's answer is the ground truth's.

    Args:
        strict_box_verify: take the last `\boxed{}` of the last 100 characters instead, and compare it as it stands.
        fallback_boxed: where there is no `Answer:`, take the last `\boxed{}` of the same window; later versions of
            the recipe do so.
    """
    if strict_box_verify:
        pred = last_boxed(response[-BOX_WINDOW:])
        return _judge(pred, pred == ground_truth)
    window = response[-ANSWER_WINDOW:]
    answers = _ANSWER.findall(window)
    answer = answers[-1] if answers else last_boxed(window) if fallback_boxed else None
    pred = normalize(NO_ANSWER if answer is None else answer)
    return _judge(pred, pred == normalize(ground_truth))


def _judge(pred: str | None, acc: bool) -> Score:
    return Score(1.0 if acc else -1.0, acc, pred)


def normalize(answer: str) -> str:
    """The Minerva form of a final answer. For short strings: its cost grows faster than their length."""
    text = answer.rpartition("=")[2]
    for old, new in _REPLACED:
        text = text.replace(old, new)
    for removed in _UNITS_AND_FILLERS:
        text = text.replace(removed, "")
    text = "\n".join(_first_formula(line) for line in text.split("\n"))
    for pattern, replacement in (*_WRAPPERS, *_SHORTHANDS):
        text = pattern.sub(replacement, text)
    text = text.replace("$", "")
    without_separators = text.replace(",", "")
    return (without_separators if without_separators.isdigit() else text).strip()


def _first_formula(line: str) -> str:
    """`$...$` where the line has one, without what stands around it; else the line."""
    parts = line.split("$", 2)
    return f"${parts[1]}$" if len(parts) == 3 else line


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` of a text; None where there is none or it does not close."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    start += len(_BOX)
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None
