"""Denoising Diffusion Policy Optimization (arXiv 2305.13301). `train.py` is the algorithm; these are its parts."""

import os

# transformers warns at import that torchvision is missing, which nothing here needs. policy.py turns warnings on again.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
