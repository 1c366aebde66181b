"""The command as a user gives it, on this machine: lines and exit codes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_dapo.cli import main


def test_every_line_has_a_verdict_and_what_is_not_ok_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor"])
    *lines, counts = capsys.readouterr().out.splitlines()
    verdicts = [line.split()[0] for line in lines if not line.lstrip().startswith("->")]
    assert set(verdicts) <= {"ok", "warning", "broken"}
    assert counts == ", ".join(f"{verdicts.count(level)} {level}" for level in ("ok", "warning", "broken"))
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if re.match("warning|broken", line):
            assert following.lstrip().startswith("->"), line
    assert code == (1 if "broken" in verdicts else 0)
    assert any(line.split()[:2] == ["ok", "megatron-core"] for line in lines)


def test_a_configuration_that_cannot_run_here_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"actor_rollout_ref.model.path={tmp_path}", "actor_rollout_ref.rollout.name=sglang"]
    assert main(["doctor", *words]) == 1
    assert f"broken  configuration        actor_rollout_ref.model.path is {tmp_path}" in capsys.readouterr().out


def test_an_unknown_setting_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "trainer.n_gpu_per_node=8"]) == 2
    assert "trainer.n_gpus_per_node" in capsys.readouterr().err
