from __future__ import annotations

import json
import math
import platform

import pytest
import torch
import transformers

from megatron_dapo.obs.summary import write_summary


def test_a_summary_holds_what_it_is_given_and_the_versions_at_work(tmp_path):
    path = tmp_path / "summary.json"
    write_summary(path, {"seed": 1, "greedy_accuracy_after": 0.75})
    summary = json.loads(path.read_text())
    versions = summary.pop("versions")
    assert summary == {"seed": 1, "greedy_accuracy_after": 0.75}
    assert versions["python"] == platform.python_version()
    # A build's tag (+cu124) may stand in one of the two alone.
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert versions["transformers"] == transformers.__version__
    assert set(versions) == {"python", "torch", "transformers", "megatron-core", "megatron-dapo"}


@pytest.mark.parametrize("bad, error", [(math.nan, ValueError), (torch.ones(1), TypeError)])
def test_a_value_that_json_cannot_hold_leaves_the_old_summary(tmp_path, bad, error):
    path = tmp_path / "summary.json"
    write_summary(path, {"seed": 1})
    before = path.read_bytes()
    with pytest.raises(error):
        write_summary(path, {"seed": 2, "accuracy": bad})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
