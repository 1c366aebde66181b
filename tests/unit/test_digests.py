"""A checksum is the same whether a file is written or read, and changes with any byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import xxhash

from megatron_dapo.digests import DigestingFile, FileDigest, digest_file, digest_files


@pytest.mark.parametrize("size", [0, 1, (1 << 22) - 1, (1 << 22) + 5, 9_000_001])
def test_written_read_and_reference_agree(tmp_path: Path, size: int):
    content = bytes(range(256)) * (size // 256 + 1)
    content = content[:size]
    with DigestingFile(tmp_path / "file") as file:
        file.write(content[: size // 3])
        file.write(memoryview(content)[size // 3 :])
        assert file.tell() == size
    wanted = FileDigest(size, xxhash.xxh3_128_hexdigest(content))
    assert file.digest == digest_file(tmp_path / "file") == wanted
    assert (tmp_path / "file").read_bytes() == content


def test_torch_saves_into_it(tmp_path: Path):
    values = {"a": torch.arange(1000), "b": "text"}
    with DigestingFile(tmp_path / "file") as file:
        torch.save(values, file)
    assert file.digest == digest_file(tmp_path / "file")
    assert torch.equal(torch.load(tmp_path / "file", weights_only=True)["a"], values["a"])


def test_one_changed_bit_changes_it(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    before = digest_file(path)
    path.write_bytes(bytes(999) + b"\x01")
    assert digest_file(path) != before
    assert digest_file(path).bytes == before.bytes


def test_a_missing_file_has_none(tmp_path: Path):
    (tmp_path / "here").write_bytes(b"x")
    found = digest_files(tmp_path, ["here", "gone"])
    assert found["gone"] is None
    assert found["here"] == digest_file(tmp_path / "here")
