"""Training over processes, with sharded weights (FSDP2) or copies (DDP): gradients are those of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

import hyperattention as ha

pytest.importorskip("transformers")

RANKS, LENGTH = 2, 320
METHOD = ha.Method(ha.Sinks(4), ha.Window(32), ha.Draw(32), tile=32)


def make_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, max_position_embeddings=LENGTH
    )
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 8
    return LlamaForCausalLM(config).double()


def tokens_of(rank: int) -> Tensor:
    return torch.randint(64, (1, LENGTH), generator=torch.Generator().manual_seed(rank))


def loss_of(model: nn.Module, inner: nn.Module, rank: int) -> Tensor:
    """Run one sequence through approximate attention; the draws are those of the seed, in whichever process."""
    from hyperattention.integrations.transformers import use

    tokens = tokens_of(rank)
    with use(inner, METHOD) as calls:
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
    assert calls.counts.approximated == calls.counts.total == 2
    assert METHOD.cost(LENGTH).share_of_exact < 1
    return loss.detach()


def shard(model: Any, name: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if name == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(rank: int, name: str, folder: str) -> None:
    """Be one process: take the gradients of its own sequence, and write those that all processes agree on."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    model = make_model()
    loss = loss_of(shard(model, name), model, rank)
    gradients = {}
    for key, parameter in model.named_parameters():
        gradient = parameter.grad
        gradients[key] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    torch.save((loss, gradients), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["fsdp2", "ddp"])
def test_gradients_of_shards_are_those_of_one_process(name: str, tmp_path: Path) -> None:
    spawn(train, (name, str(tmp_path)), nprocs=RANKS)
    model = make_model()
    losses = [loss_of(model, model, rank) for rank in range(RANKS)]
    for rank in range(RANKS):
        loss, gradients = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(loss, losses[rank], rtol=1e-12, atol=1e-12)
        for key, parameter in model.named_parameters():
            # a process keeps the mean over processes
            torch.testing.assert_close(
                gradients[key], parameter.grad / RANKS, rtol=1e-9, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}"
            )
