"""`python -m megatron_dapo`, also under torchrun and pdb."""

from megatron_dapo.cli import run

if __name__ == "__main__":
    run()
