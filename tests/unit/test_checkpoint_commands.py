"""The commands as a user gives them: exit codes, what is printed, what is left on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dapo.cli import main
from megatron_dapo.conversion import Conversion, hf_to_megatron
from megatron_dapo.manifest import CHECKSUMS, META, MODEL, write_manifest
from tests.unit.tiny_checkpoint import make_checkpoint, same_bits, weights_of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of one checkpoint, whose state is a converted model's."""
    source = make_checkpoint(tmp_path / "hf")
    step = tmp_path / "run" / "checkpoints" / "step_00000040"
    step.parent.mkdir(parents=True)
    hf_to_megatron(source, step, Conversion(shard_bytes=40_000))
    (step / CHECKSUMS).unlink()
    layout = {"world_size": 8, "tp_size": 2, "pp_size": 2, "cp_size": 1, "dp_size": 2}
    write_manifest(step, json.loads((step / META).read_text()) | {"step": 40, "layout": layout})
    (step.parent / "latest").write_text(step.name)
    return tmp_path / "run"


def test_export_writes_the_latest_checkpoint_of_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", str(run), str(tmp_path / "out"), "--max-shard-size", "50KB"]) == 0
    assert "step_00000040" in capsys.readouterr().out
    assert same_bits(weights_of(tmp_path / "out"), weights_of(tmp_path / "hf"))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_export_ends_with_1_and_the_file_where_one_is_damaged(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    damage(run)
    assert main(["export", str(run), str(tmp_path / "out")]) == 1
    assert "__0_1.distcp is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_failed_verification_ends_with_1_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = make_checkpoint(tmp_path / "hf", "llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.inf
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    hf_to_megatron(source, tmp_path / "megatron", Conversion())
    assert main(["export", str(tmp_path / "megatron"), str(tmp_path / "out"), "--verify"]) == 1
    assert "verification failed" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


def test_ls_has_a_row_a_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["checkpoint", "ls", str(run)]) == 0
    told = capsys.readouterr().out
    assert [word for word in ("step_00000040", "40", "TP2", "PP2", "qwen2", "latest") if word not in told] == []


def test_show_has_step_layout_model_versions_and_tensors(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["checkpoint", "show", str(run)]) == 0
    told = capsys.readouterr().out
    wanted = (
        "layout.tp_size",
        "model.vocab_size",
        "61",
        "versions.torch",
        torch.__version__,
        "float32",
        "size on disk",
    )
    assert [word for word in wanted if word not in told] == []


def test_verify_ends_with_0_where_all_is_well(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert "all files are as they were written" in capsys.readouterr().out


def test_verify_ends_with_1_and_names_every_file_that_is_not_right(run: Path, capsys: pytest.CaptureFixture[str]):
    step = damage(run)
    (step / MODEL / "common.pt").unlink()
    assert main(["checkpoint", "verify", str(run)]) == 1
    told = capsys.readouterr().err
    assert f"{step / MODEL / '__0_1.distcp'} is damaged" in told
    assert f"{step / MODEL / 'common.pt'} is missing" in told


def test_verify_without_checksums_does_not_pass(run: Path, capsys: pytest.CaptureFixture[str]):
    (run / "checkpoints" / "step_00000040" / CHECKSUMS).unlink()
    assert main(["checkpoint", "verify", str(run)]) == 1
    assert f"{CHECKSUMS} is missing" in capsys.readouterr().err


def test_verify_sees_a_file_that_the_metadata_wants_and_no_checksum_names(
    run: Path, capsys: pytest.CaptureFixture[str]
):
    step = run / "checkpoints" / "step_00000040"
    entries = json.loads((step / CHECKSUMS).read_text())
    (step / CHECKSUMS).write_text(json.dumps({k: v for k, v in entries.items() if "__0_1" not in k}))
    (step / MODEL / "__0_1.distcp").unlink()
    assert main(["checkpoint", "verify", str(run)]) == 1
    assert "__0_1.distcp is missing (.metadata)" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["ls"], ["show"], ["verify"]])
def test_a_path_without_a_checkpoint_ends_with_1(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["checkpoint", *words, str(tmp_path)]) == 1
    assert "is no checkpoint" in capsys.readouterr().err


def test_a_size_that_is_none_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["export", str(run), str(tmp_path / "out"), "--max-shard-size", "many"])
    assert ended.value.code == 2
    assert "'many' is no size" in capsys.readouterr().err


def damage(run: Path) -> Path:
    """Flip one bit in the second file; returns the checkpoint's folder."""
    step = run / "checkpoints" / "step_00000040"
    file = step / MODEL / "__0_1.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return step
