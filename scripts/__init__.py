"""Occasional tools: `python -m scripts.NAME --help`."""

import signal
import sys

if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during a script's imports: no traceback. See run_script

import ddpo  # noqa: E402, F401  first of all, since it keeps transformers quiet
