"""Read a text into a cache, then generate its continuation, and measure the time of both."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from hyperattention.bench.timing import ignore
from hyperattention.check import positive
from hyperattention.evaluation.reading import read, reading
from hyperattention.generation.codec import codec_of
from hyperattention.integrations.transformers import CallCounts
from hyperattention.integrations.transformers.cache import HyperCache
from hyperattention.integrations.transformers.cache_argument import cache_argument
from hyperattention.reference.model import LoadedModel


@dataclass(frozen=True)
class Sampling:
    """The choice of the next token.

    Args:
        new_tokens: largest number of tokens to generate.
        temperature: 0 for the most likely token; otherwise logits are divided by it before a token is drawn. `top_k`,
            `top_p` and penalties are read from the model's folder, if it has any.
        seed: seed of the draws.

    Raises:
        ValueError: if `new_tokens` is not positive, or the temperature is negative or not finite.
    """

    new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        positive("Sampling", new_tokens=self.new_tokens)
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature}: give 0 for the most likely token, or a positive number")


@dataclass(frozen=True)
class Throughput:
    """The number of tokens read or generated, their time, and the counts of attention calls.

    Args:
        num_tokens: number of tokens read or generated.
        seconds: total time in seconds.
        counts: counts of attention calls.
    """

    num_tokens: int
    seconds: float
    counts: CallCounts

    @property
    def per_second(self) -> float:
        """Tokens a second."""
        return self.num_tokens / self.seconds if self.seconds else 0.0


def pieces_of(num_tokens: int, chunk: int | None) -> int:
    """Count the steps in which `read_text` reads.

    Args:
        num_tokens: number of tokens of the text.
        chunk: tokens of each chunk; None for one chunk.

    Returns:
        the number of steps.
    """
    return 1 if chunk is None else -(-num_tokens // chunk)


def read_text(
    loaded: LoadedModel,
    cache: HyperCache,
    tokens: Int[Tensor, "1 tokens"],
    *,
    chunk: int | None = None,
    on_step: Callable[[str], None] = ignore,
) -> Throughput:
    """Read a text into a cache.

    In one chunk, the text is attended to exactly and compressed afterwards. In several chunks, memory stays bounded, and
    later chunks attend to the compressed earlier chunks.

    Args:
        loaded: the model.
        cache: an empty cache, or the cache of the earlier text.
        tokens: the text.
        chunk: tokens of each chunk; None for one chunk.
        on_step: called before each chunk with the progress.

    Returns:
        the number of tokens, the time and the counts of calls.

    Raises:
        ValueError: if the text is empty or the chunk is not positive.
    """
    if not tokens.shape[1]:
        raise ValueError("the text has no tokens: give at least one token to read")
    if chunk is not None:
        positive("read_text", chunk=chunk)
    began = time.perf_counter()
    with reading(loaded.model) as counter:
        done = 0
        for piece in tokens.split(chunk or tokens.shape[1], 1):
            on_step(f"{done:,} of {tokens.shape[1]:,} tokens read")
            read(loaded.model, piece, cache)
            done += piece.shape[1]
    return Throughput(tokens.shape[1], time.perf_counter() - began, counter.counts)


def write_on(
    loaded: LoadedModel, cache: HyperCache, tokens: Int[Tensor, "1 tokens"], sampling: Sampling
) -> tuple[Tensor, Throughput]:
    """Continue a text, and print each token when it is generated.

    Args:
        loaded: the model.
        cache: the cache of all tokens except the last few.
        tokens: all tokens of the text so far; those that the cache has not seen, at least one, are read first.
        sampling: the choice of the next token.

    Returns:
        the new tokens, ``[new]``, with their number, the time and the counts of calls.

    Raises:
        ValueError: if the cache has seen all tokens, so that no token is left to read, or the model's folder requests a
            kind of decoding that does not read each token exactly once.
    """
    seen = cache.get_seq_length()
    if tokens.shape[1] <= seen:
        raise ValueError(f"the cache has read all {seen} of {tokens.shape[1]} tokens: leave at least the last token unread")
    codec, model = codec_of(loaded), loaded.model
    # only `decode` is called
    streamer = TextStreamer(codec, skip_prompt=True, skip_special_tokens=True)  # pyright: ignore[reportArgumentType]
    began = time.perf_counter()
    with torch.random.fork_rng(), reading(model) as counter:
        torch.manual_seed(sampling.seed)
        given = tokens.to(model.device)
        written = model.generate(  # pyright: ignore[reportCallIssue]: mixed into every causal language model
            given,
            attention_mask=torch.ones_like(given),
            streamer=streamer,
            **{cache_argument(model): cache},
            **_settings(model.generation_config, sampling),
        )
    # the last token was generated but not read
    if cache.get_seq_length() != written.shape[1] - 1:
        raise ValueError(
            f"the cache has seen {cache.get_seq_length()} tokens of {written.shape[1]}: the generation_config.json of "
            f"{loaded.name} requests a kind of decoding that this command does not support; remove it there"
        )
    new = written[0, tokens.shape[1] :].cpu()
    return new, Throughput(len(new), time.perf_counter() - began, counter.counts)


def _settings(usual: GenerationConfig | None, sampling: Sampling) -> dict[str, Any]:
    """Make the arguments of `generate`: one text with the given cache, against other settings in the model's folder."""
    usual, drawn = usual or GenerationConfig(), sampling.temperature > 0
    ends = usual.eos_token_id
    first_end = ends[0] if isinstance(ends, list) else ends
    return {
        "max_new_tokens": sampling.new_tokens, "max_length": None, "num_beams": 1, "num_return_sequences": 1,
        # a None in a GenerationConfig would not override the model's folder; a None argument does
        "use_cache": True, "cache_implementation": None, "prompt_lookup_num_tokens": None, "return_dict_in_generate": False,
        "stop_strings": None, "guidance_scale": None, "dola_layers": None, "prefill_chunk_size": None,
        "do_sample": drawn, "temperature": sampling.temperature if drawn else None,
        "top_p": usual.top_p if drawn else None, "top_k": usual.top_k or 0 if drawn else None,
        "pad_token_id": next(token for token in (usual.pad_token_id, first_end, 0) if token is not None),
    }  # fmt: skip
