"""The backend that refuses multi-head latent attention on a CPU, where vLLM would select another without a word."""

from typing import Never

from vllm.v1.attention.backend import AttentionBackend  # pyright: ignore[reportMissingImports]


def _refuse(*_: object, **__: object) -> Never:
    raise ValueError(
        "hyperattention does not read the latent keys of multi-head latent attention (MLA): unset HYPERATTENTION_VLLM_CPU "
        "to serve this model with vLLM's own backend"
    )


class RefusedLatentBackend(AttentionBackend):
    """Refuse every model with latent attention while it is loaded, not during a request."""

    get_name = staticmethod(_refuse)
    get_impl_cls = staticmethod(_refuse)
    get_builder_cls = staticmethod(_refuse)
    is_mla = staticmethod(_refuse)
