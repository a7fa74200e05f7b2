"""Argument checks that several modules share; their errors name the remedy."""


def positive(owner: str, **values: int) -> None:
    """Check that counts and sizes are positive integers.

    Args:
        owner: the class or function that has these arguments, for the message.
        **values: the arguments by name.

    Raises:
        ValueError: if an argument is not a positive integer; the message names the first one.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{owner}({name}={value!r}): {name} must be a positive integer; to leave the stage out, omit it"
            )


def instance(owner: str, kind: type, example: str, **values: object) -> None:
    """Check that arguments are objects of a class: a number in their place would fail much later, and say nothing.

    Args:
        owner: the class or function that has these arguments, for the message.
        kind: the class.
        example: code that makes such an object.
        **values: the arguments by name.

    Raises:
        TypeError: if an argument is no such object; the message names the first one.
    """
    for name, value in values.items():
        if not isinstance(value, kind):
            raise TypeError(f"{owner}({name}={value!r}): {name} must be a {kind.__name__}, such as {example}")
