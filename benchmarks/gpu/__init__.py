"""Attention on a GPU beside torch's exact kernels: `run.py` measures, `counts.py` counts what needs no GPU."""
