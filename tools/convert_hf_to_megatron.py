"""A Hugging Face checkpoint into Megatron's distributed format: `python tools/convert_hf_to_megatron.py SOURCE OUT`.

What is written loads on any layout. See docs/conversion.md.
"""

import sys

from megatron_dapo.checkpoint_commands import import_arguments, run_tool

if __name__ == "__main__":
    sys.exit(run_tool("convert a Hugging Face checkpoint into Megatron's distributed format", import_arguments))
