"""The conditions of a calibration: the model, texts, machine and versions that its measurements depend on."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from hyperattention.calibration.settings import CalibrationSettings
from hyperattention.files.fingerprint import fingerprint
from hyperattention.files.records import find_processor, find_version
from hyperattention.reference.model import LoadedModel
from hyperattention.reference.samples import EvaluationSample

_PACKAGES = ("hyperattention", "torch", "transformers")


def describe(loaded: LoadedModel, samples: Sequence[EvaluationSample], settings: CalibrationSettings) -> dict[str, Any]:
    """Describe everything that the measurements depend on, except the candidates.

    Args:
        loaded: the model.
        samples: the texts.
        settings: the settings, of which the seed counts.

    Returns:
        the conditions, by name.
    """
    tokens = str([sample.tokens.tolist() for sample in samples]).encode()
    return {
        "model": asdict(fingerprint(loaded.model)),
        "length": len(samples[0].tokens),
        "documents": len(samples),
        "text": hashlib.sha256(tokens).hexdigest(),
        "seed": settings.seed,
        "device": where(loaded),
        "threads": torch.get_num_threads(),
        "versions": {name: find_version(name) or "unknown" for name in _PACKAGES},
    }


def where(loaded: LoadedModel) -> str:
    """Return the device of a model, in the form that plans use.

    Args:
        loaded: the model.

    Returns:
        the kind and the name of the device.
    """
    device = loaded.model.device
    return f"cuda: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else f"cpu: {find_processor()}"
