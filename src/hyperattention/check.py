"""Checks of arguments that several places share, with errors that say what to do."""


def positive(owner: str, **values: int) -> None:
    """Insist that counts and sizes are positive integers.

    Args:
        owner: whose arguments they are, for the message.
        **values: the arguments by name.

    Raises:
        ValueError: naming the first that is not a positive integer.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{owner}({name}={value!r}): {name} must be a positive integer; to leave the stage out, omit it"
            )
