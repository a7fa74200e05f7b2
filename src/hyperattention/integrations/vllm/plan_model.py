"""The check whether a plan was made for the model that vLLM serves: by its configuration, and by its file of weights."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from hyperattention.files.fingerprint import Fingerprint, hash_weights, shape_of
from hyperattention.files.plan import Plan


def check_plan(plan: Plan, config: PreTrainedConfig, model: str) -> str | None:
    """Check a plan against the model that is served.

    Args:
        plan: the plan.
        config: the configuration of the model.
        model: the folder of the model, or its name in a hub.

    Returns:
        the reason why the weights could not be compared, only the shape; None if they were.

    Raises:
        ValueError: if the plan is for another model; the message names the differences.
    """
    name = (config.architectures or ["unknown"])[0]
    served = Fingerprint(name, *shape_of(config.get_text_config()), plan.model.weights)
    found, unread = plan.model.differences(served), None
    if not found:
        hashed, unread = _hash_folder(Path(model), config)
        if hashed is not None and hashed != plan.model.weights:
            found = ["other weights in the same shape"]
    if found:
        raise ValueError(
            f"this plan was made for another model: {'; '.join(found)}. Run `hyperattention calibrate` on the model that "
            "is served, or name the plan's own"
        )
    return unread


def _hash_folder(folder: Path, config: PreTrainedConfig) -> tuple[str | None, str | None]:
    """Compute the hash of the weights in a folder, or say why they cannot be compared."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        return None, f"{folder} is no folder with files of safetensors"
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    wanted = {name: tuple(weight.shape) for name, weight in empty.named_parameters()}
    held = {name: tuple(weight.shape) for name, weight in _weights(files)}
    if missing := sorted(set(wanted) - set(held)):
        return None, f"its files lack {missing[0]}, or name it in another way"
    if other := sorted(name for name in wanted if wanted[name] != held[name]):
        return None, f"its files hold {other[0]} in another shape"
    found = {name: weight for name, weight in _weights(files) if name in wanted}
    return hash_weights(sorted(found.items())), None


def _weights(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Give every weight of some files; only the values that are read later are fetched from the disk."""
    for file in files:
        with safe_open(file, framework="pt") as held:
            for name in held.keys():  # noqa: SIM118 - no mapping
                yield name, held.get_tensor(name)
