"""Queries, keys and values with the statistics of real models."""

from hyperattention.synthetic.inputs import Inputs, gaussian, structured

__all__ = ["Inputs", "gaussian", "structured"]
