"""Feature maps: functions of a query and of a key whose inner product is, or estimates, the weight of the pair."""

from hyperattention.features.learned_sketch import LearnedSketch
from hyperattention.features.polynomial_sketch import PolynomialSketch, RandomSketch
from hyperattention.features.positive_random import PositiveRandom

__all__ = ["LearnedSketch", "PolynomialSketch", "PositiveRandom", "RandomSketch"]
