"""Benchmarks: ratios measured side by side in one run."""

import os

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as the commands do
