"""Feature maps: vectors whose products estimate, or are, the weight of a pair."""

from hyperattention.features.learned_sketch import LearnedSketch
from hyperattention.features.polynomial_sketch import PolynomialSketch, RandomSketch

__all__ = ["LearnedSketch", "PolynomialSketch", "RandomSketch"]
