from __future__ import annotations

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest

from megatron_dapo.regression.references import AIME, CURVES, REFERENCES, Signature

SIGNATURES = {s.curve: s for reference in REFERENCES.values() for s in reference.signatures}


@pytest.mark.parametrize("signature", SIGNATURES.values(), ids=SIGNATURES)
def test_a_curve_is_in_the_units_of_metrics_jsonl(signature: Signature) -> None:
    series = signature.load()
    assert len(series.values) > 25
    assert 2000 < series.updates[-1] < 10_000
    if signature.name == AIME:
        assert series.values.min() >= 0
        assert 0.2 < series.values.max() < 0.6, "a share, not percent"


def test_the_papers_values_are_read_as_published() -> None:
    aime = SIGNATURES["aime24_avg32"].load()
    assert round(aime.values[-1] * 960) == 476  # of 30 problems x 32 samples: its 50 %
    assert aime.values[0] * 960 == pytest.approx(10, abs=0.01)
    assert SIGNATURES["response_length"].load().values[:2] == pytest.approx([743, 567], abs=0.5)
    assert SIGNATURES["cliphigher_off_entropy"].load().values[-1] == pytest.approx(0.006, abs=5e-4)


def test_the_recipes_three_runs_have_their_figures() -> None:
    figures = {name: REFERENCES[name].figure for name in REFERENCES if name.endswith("_32b")}
    assert figures == {
        "dapo_qwen2.5_32b": 0.52,
        "dapo_wo_ds_qwen2.5_32b": 0.50,
        "dapo_early_qwen2.5_32b": 0.44,
    }


def test_every_file_of_curves_is_used_described_and_packaged() -> None:
    files = {path.stem for path in CURVES.glob("*.csv")}
    assert files == set(SIGNATURES)
    readme = (CURVES / "README.md").read_text()
    assert "arXiv 2503.14476" in readme
    for name in files:
        family = name.replace("_on_", "_{on,off}_").replace("_off_", "_{on,off}_")
        assert f"`{family}`" in readme, name
    patterns = _package_data()
    for path in CURVES.iterdir():
        assert any(fnmatch(f"regression/references/{path.name}", pattern) for pattern in patterns), path


def _package_data() -> list[str]:
    tree = ast.parse((Path(__file__).parents[3] / "setup.py").read_text())
    (value,) = [
        keyword.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "package_data"
    ]
    return ast.literal_eval(value)["megatron_dapo"]
