"""Small random models for the tests of the real engine."""

from collections.abc import Callable

import pytest
import torch

SHAPE = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None, "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Make folders of tiny random models, by family and changes of their shape."""
    import transformers

    def make(family: str = "Llama", **changes) -> str:
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**(SHAPE | changes))
        getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def llama(tiny: Callable[..., str]) -> str:
    return tiny()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # every test here starts an engine, or shares one
    for item in items:
        if item.path.parent.name == "vllm":
            item.add_marker(pytest.mark.slow)
