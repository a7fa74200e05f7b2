"""Queries, keys and values with the statistics of real models."""

from hyperattention.synthetic.inputs import Inputs, gaussian, structured
from hyperattention.synthetic.kinds import LOW_RANK, SCATTERED, HeadKind

__all__ = ["LOW_RANK", "SCATTERED", "HeadKind", "Inputs", "gaussian", "structured"]
