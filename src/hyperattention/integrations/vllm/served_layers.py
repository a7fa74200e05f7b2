"""The checks of the served layers, before any request: what no method may approximate is refused, or left to vLLM."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerTraits:
    """What a model asks of the attention of a layer.

    Args:
        attention_type: vLLM's name of the kind of attention.
        sliding_window: keys that a query sees; None for all.
        soft_cap: whether scores are capped.
        alibi: whether scores have a position bias.
        sinks: whether there are learned sinks.
        cache_dtype: vLLM's name of the dtype of the cache.
        quantised: whether the cache is quantised.
        borrowed: name of the layer whose keys it reads; None if it has its own.
    """

    attention_type: str
    sliding_window: int | None
    soft_cap: bool
    alibi: bool
    sinks: bool
    cache_dtype: str
    quantised: bool
    borrowed: str | None = None


def check_listed(layers: frozenset[int] | None, num_layers: int) -> None:
    """Check that the listed layers are in the model.

    Args:
        layers: their indices; None for all.
        num_layers: number of layers of the model.

    Raises:
        ValueError: if one is not, or none is listed.
    """
    if layers is None:
        return
    unknown = sorted(each for each in layers if each >= num_layers)
    if unknown or not layers:
        found = f"layers {unknown} are not in the model" if unknown else "no layer is listed"
        raise ValueError(
            f"{found}: list some of 0 to {num_layers - 1} in `layers` of --additional-config, or leave `layers` out for all"
        )


def check_layer(name: str, traits: LayerTraits, *, selects: bool = False) -> None:
    """Check that a layer can be approximated.

    Args:
        name: name of the layer.
        traits: what the model asks of it.
        selects: whether it decodes by its best pages.

    Raises:
        ValueError: if it cannot; the message gives the layer, the reason and the remedy.
    """
    if traits.attention_type != "decoder":
        raise ValueError(
            f"{name} computes {traits.attention_type} attention: hyperattention serves decoders only; start vLLM with its "
            "own attention backend"
        )
    if traits.quantised:
        raise ValueError(
            f"{name} has a cache of {traits.cache_dtype}: hyperattention reads keys and values as they were computed; start "
            "vLLM without --kv-cache-dtype"
        )
    asked = {"capped scores": traits.soft_cap, "position bias (ALiBi)": traits.alibi, "learned sinks": traits.sinks}
    if found := [reason for reason, is_so in asked.items() if is_so]:
        raise ValueError(
            f"{name} has {' and '.join(found)}, which no method approximates: name the layers without in `layers` of "
            "--additional-config, or start vLLM with its own attention backend"
        )
    if selects and traits.borrowed is not None:
        raise ValueError(
            f"{name} reads the keys of {traits.borrowed}, and has no summaries of their pages: name the layers with keys of "
            'their own in `layers` of --additional-config, or set its `decode` to "exact"'
        )
