"""The content of the file of a cache: tensors and metadata in the safetensors format, under one checksum."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

FORMAT, VERSION = "hyperattention cache", 1
REMEDY = "write it again with save_cache, or `hyperattention cache`"
_DIGEST = "sha256"


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Make the bytes of a file, with the checksum.

    Args:
        tensors: the tensors, contiguous on the CPU.
        metadata: texts by name.

    Returns:
        the bytes.
    """
    return save(dict(tensors), {**metadata, _DIGEST: _digest(tensors, metadata)})


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    names = sorted(tensors)
    kinds = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    digest = hashlib.sha256(json.dumps([sorted(metadata.items()), kinds]).encode())
    for name in names:
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_content(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read metadata and tensors, and check them against the checksum.

    Args:
        path: the file.

    Returns:
        the metadata without the checksum, and the tensors.

    Raises:
        ValueError: if the file cannot be read, is no cache of this version, or is damaged.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}; name a file that save_cache wrote") from error
    try:
        # `load` refuses headers that are not JSON and wrong sizes, so the header can be read below
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error}): truncated, or no cache; {REMEDY}") from error
    metadata: dict[str, str] = header.get("__metadata__") or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: the format is {metadata.get('format')!r}, not {FORMAT!r}: this is not a cache; {REMEDY}")
    if metadata.get("version") != str(VERSION):
        raise ValueError(
            f"{path}: the version is {metadata.get('version')!r}, but this release reads {str(VERSION)!r}; {REMEDY}"
        )
    written = metadata.pop(_DIGEST, None)
    if written != _digest(tensors, metadata) or not {"model", "cache"} <= metadata.keys():
        raise ValueError(f"{path}: the content does not match its checksum: the file is damaged; {REMEDY}")
    return metadata, tensors


def parsed(path: str | Path, text: str) -> object:
    """Parse one entry of the metadata.

    Args:
        path: the file, for messages.
        text: the entry.

    Returns:
        its value.

    Raises:
        ValueError: if the entry is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the metadata is not JSON ({error}); {REMEDY}") from error
