"""Optional packages: an error about a missing package names the command that installs it."""

import importlib.util

# the extra that installs each package
_EXTRAS = {"transformers": "transformers", "safetensors": "transformers"}


def need(*packages: str) -> None:
    """Check that optional packages are installed.

    Args:
        packages: their names.

    Raises:
        ModuleNotFoundError: if a package is missing; the message names the first one and the command to install it.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(
                f"this part of hyperattention needs {package}: pip install 'hyperattention[{_EXTRAS[package]}]'",
                name=package,
            )
