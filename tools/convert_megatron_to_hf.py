"""A Megatron checkpoint to Hugging Face: `python tools/convert_megatron_to_hf.py CHECKPOINT OUT [--model FOLDER]`.

The same as `megatron-dapo export`. See docs/conversion.md.
"""

import sys

from megatron_dapo.checkpoint_commands import export_arguments, run_tool

if __name__ == "__main__":
    sys.exit(run_tool("convert a checkpoint in Megatron's distributed format to Hugging Face", export_arguments))
