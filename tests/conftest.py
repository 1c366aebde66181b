"""For all tests: Ctrl-C reaches Python and what it starts.

A shell that starts a run in the background has it ignore SIGINT, and children inherit that.
"""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
