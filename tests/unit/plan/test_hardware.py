from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dapo.config.tree import ConfigError
from megatron_dapo.plan.hardware import DEFAULT, load_cluster


def test_the_file_that_comes_with_the_package_has_every_card_with_its_source() -> None:
    for gpu in ("a100", "a800", "h100", "h800", "h20", "h200", "b200"):
        card = load_cluster(DEFAULT, gpu, 1, 8).card
        assert card.source
        assert 80e9 < card.memory < 200e9


def test_an_assumption_is_set_by_name() -> None:
    cluster = load_cluster(DEFAULT, "h800", 16, 8, ["matmul_efficiency=0.5", "pass_rate=0.1"])
    assert (cluster.assumptions.matmul_efficiency, cluster.assumptions.pass_rate) == (0.5, 0.1)
    assert cluster.world_size == 128


@pytest.mark.parametrize(
    ("setting", "said"),
    [("speed=1", "no assumption 'speed'"), ("pass_rate=often", "'often': wanted a number"), ("pcie=-1", "at least 0")],
)
def test_a_wrong_assumption_is_refused(setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_cluster(DEFAULT, "h800", 1, 8, [setting])


def test_a_card_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"--gpu v100: .*a100, a800, b200"):
        load_cluster(DEFAULT, "v100", 1, 8)


def test_an_edited_file_takes_the_place_of_the_packages(tmp_path: Path) -> None:
    edited = tmp_path / "mine.yaml"
    edited.write_text(DEFAULT.read_text().replace("  h20:", "  mine:"))
    assert load_cluster(edited, "mine", 1, 8).card.bf16_flops == 148e12
    edited.write_text(DEFAULT.read_text().replace("  pcie:", "  pcle:"))
    with pytest.raises(ConfigError, match=r"lacks \['pcie'\] and has \['pcle'\] too many"):
        load_cluster(edited, "h20", 1, 8)


def test_neighbours_of_a_node_talk_over_nvlink_and_others_over_the_network() -> None:
    cluster = load_cluster(DEFAULT, "h800", 2, 8)
    assert cluster.link(8) == pytest.approx(200e9 * 0.7)
    assert cluster.link(16) == pytest.approx(50e9 * 0.7)
