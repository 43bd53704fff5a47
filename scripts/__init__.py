"""Occasional tools: `python -m scripts.NAME --help`."""

import ddpo  # noqa: F401  first of all, since it keeps transformers quiet
