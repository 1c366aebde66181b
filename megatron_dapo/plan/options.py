"""The options of `megatron-dapo plan`; apart from the command, which loads torch."""

from __future__ import annotations

import argparse

from megatron_dapo.plan.hardware import DEFAULT


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", default="h800", help="a card of the hardware file (default: h800)")
    parser.add_argument("--nodes", type=int, default=1, help="nodes in all (default: 1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="(default: 8)")
    parser.add_argument("--hardware", default=str(DEFAULT), metavar="FILE", help="cards and assumptions (YAML)")
    parser.add_argument(
        "--assume", action="append", default=[], metavar="NAME=VALUE", help="one assumption; repeatable"
    )
    parser.add_argument("--samples", metavar="FILE", help="a run's samples.jsonl, to take lengths and pass rate from")
    parser.add_argument("--search", action="store_true", help="also print the ten fastest layouts that fit")
    parser.add_argument("--json", metavar="FILE", help="also write everything there")
