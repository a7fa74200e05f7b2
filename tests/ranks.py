"""Several processes of one machine as ranks: each runs a function of a module, and gives back what it returned or raised."""

import os
import pickle
import queue
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

# seconds that a test waits for a rank that says nothing
LONGEST = 240.0


@dataclass(frozen=True)
class Raised:
    """An error of a rank."""

    kind: str
    text: str


def _enter(rank: int, ranks: int, store: str, work: Callable, arguments: tuple, answers) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=LONGEST)
    )
    try:
        answer = work(rank, *arguments)
    except Exception as error:
        answer = Raised(type(error).__name__, str(error))
    if not isinstance(answer, Raised):
        dist.barrier()
        dist.destroy_process_group()
    # plain bytes: a tensor would be shared, and vanish with the rank
    answers.put((rank, pickle.dumps(answer)))


def run_ranks(ranks: int, work: Callable, *arguments, silent: int = 0) -> list:
    """Run `work(rank, *arguments)` in so many processes.

    Args:
        ranks: processes.
        work: a function of a module, which a new process can import.
        *arguments: what else it gets.
        silent: ranks that end without an answer.

    Returns:
        the answers by rank, None for a silent rank; an error is an answer `Raised`.
    """
    context = multiprocessing.get_context("spawn")
    answers, found = context.Queue(), [None] * ranks
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    with tempfile.TemporaryDirectory() as folder:
        entered = (ranks, str(Path(folder) / "store"), work, arguments, answers)
        processes = [context.Process(target=_enter, args=(rank, *entered), daemon=True) for rank in range(ranks)]
        for process in processes:
            process.start()
        try:
            for _ in range(ranks - silent):
                rank, answer = answers.get(timeout=LONGEST)
                found[rank] = pickle.loads(answer)
        except queue.Empty:
            missing = [rank for rank, answer in enumerate(found) if answer is None]
            raise AssertionError(f"ranks {missing} gave no answer within {LONGEST} s: they hang") from None
        finally:
            for process in processes:
                process.join(5)
                process.kill()
    return found


def _loopback() -> str:
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
