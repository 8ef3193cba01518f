"""The model, and what only it needs."""

import os

# transformers reads configs, tokenizers and images here; that PyTorch is not there is meant.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
