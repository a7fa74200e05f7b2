"""The error of an exchange in which a rank did not take part."""


class ExchangeError(RuntimeError):
    """Another rank ended, or did not take part within the time limit: no result exists, and the group cannot be used on."""
