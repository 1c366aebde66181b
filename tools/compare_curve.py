"""A run against a reference curve: `python tools/compare_curve.py RUN --reference NAME`. See docs/regression.md."""

import sys

from megatron_dapo.regression.command import main

if __name__ == "__main__":
    sys.exit(main())
