"""What is installed only on request: a package that is missing is named with the command that installs it."""

import importlib.util

# the extra that brings a package
_EXTRAS = {"transformers": "transformers", "safetensors": "transformers"}


def need(*packages: str) -> None:
    """Refuse to go on without packages.

    Args:
        packages: their names.

    Raises:
        ModuleNotFoundError: naming the first that is missing, and what to install.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(
                f"this part of hyperattention needs {package}: pip install 'hyperattention[{_EXTRAS[package]}]'",
                name=package,
            )
