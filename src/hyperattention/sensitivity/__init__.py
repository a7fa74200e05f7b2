"""Sensitivities of keys: the largest weight that a key can have in the row of any query, for weights |q . k|^p."""

from hyperattention.sensitivity.bounds import sensitivity_bounds, sum_of_bounds
from hyperattention.sensitivity.even_power import even_power_leverage
from hyperattention.sensitivity.gram import gram, reduce_gram, squared_norms, sum_grams, whitening
from hyperattention.sensitivity.key_rows import KeyRows, key_rows
from hyperattention.sensitivity.leverage import leverage, sketched_leverage
from hyperattention.sensitivity.lewis import lewis_bounds, lewis_weights
from hyperattention.sensitivity.online import online_leverage

__all__ = [
    "KeyRows",
    "even_power_leverage",
    "gram",
    "key_rows",
    "leverage",
    "lewis_bounds",
    "lewis_weights",
    "online_leverage",
    "reduce_gram",
    "sensitivity_bounds",
    "sketched_leverage",
    "squared_norms",
    "sum_grams",
    "sum_of_bounds",
    "whitening",
]
