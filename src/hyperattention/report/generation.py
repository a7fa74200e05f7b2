"""The commands generate, cache and ask: read a text, generate tokens, save the cache, and print its cost and size."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hyperattention.cache.store import Store
from hyperattention.evaluation.families import find_family
from hyperattention.evaluation.policies import CacheCandidate
from hyperattention.files.model_folder import REFERENCE, find_folder
from hyperattention.files.user_text import read_text
from hyperattention.generation.codec import codec_of
from hyperattention.generation.session import Sampling, Throughput, pieces_of, write_on
from hyperattention.generation.session import read_text as read_tokens
from hyperattention.integrations.transformers import use
from hyperattention.integrations.transformers.cache import HyperCache
from hyperattention.integrations.transformers.cache_file import find_maker, load_cache, save_cache
from hyperattention.methods.exact import Exact
from hyperattention.reference.model import LoadedModel, load_model, load_reference
from hyperattention.report.progress import progress

_MEBIBYTE = 2**20


@dataclass(frozen=True)
class GenerationOptions:
    """The options for reading a text.

    Args:
        model: folder of a model, or the name of the reference model.
        policy: name of the policy of the cache.
        budget: largest number of slots of each head.
        sinks: number of first tokens that are always kept.
        window: number of latest tokens that are always kept; None for the default of the policy.
        chunk: tokens of each chunk in which the text is read; None for one chunk.
        seed: seed of every draw.
        audit: N, to compute exact attention for one token in each run of N as well; None for no audit.
        allow_longer: whether the text may exceed the model's trained length.
        encoding: encoding of the text; None for UTF-8, or for unchanged bytes with the reference model.
    """

    model: str = REFERENCE
    policy: str = "cluster_means"
    budget: int = 1024
    sinks: int = 16
    window: int | None = None
    chunk: int | None = None
    seed: int = 0
    audit: int | None = None
    allow_longer: bool = False
    encoding: str | None = None


@dataclass(frozen=True)
class PreparedGeneration:
    """Checked options with model and text. `prepare` raises all errors in the options before any slow work begins.

    Args:
        loaded: the model.
        tokens: the text.
        cache: the cache, empty or filled with the beginning of the text.
        options: the options for reading the text.
    """

    loaded: LoadedModel
    tokens: Tensor
    cache: HyperCache
    options: GenerationOptions


def prepare(options: GenerationOptions, path: Path, more: int | None) -> PreparedGeneration:
    """Load model and text, and make an empty cache.

    Args:
        options: the options for reading the text.
        path: the file of the text.
        more: number of tokens to generate; None if the number is not known yet.

    Returns:
        the model, the text and an empty cache.

    Raises:
        ValueError: if the text, the model, the policy or the budget cannot be used; FileNotFoundError if a file is missing.
    """
    candidate = CacheCandidate(find_family(options.policy), options.budget, options.sinks, options.window)
    text = read_text(path, options.encoding)
    if find_folder(options.model) is not None:
        text.words()  # a file that is not text is refused before a model is loaded
    loaded = _load(options.model)
    tokens = codec_of(loaded).read(text)[None]
    if tokens.shape[1] < 2:
        raise ValueError(f"{path} has {tokens.shape[1]} tokens: give a text of at least two")
    _check_length(loaded, tokens.shape[1] + (more or 0), options.allow_longer)
    # a cache that drops no keys needs slots for all tokens that follow, such as later questions
    room = max(loaded.max_length, 2 * tokens.shape[1]) if more is None else tokens.shape[1] + more
    cache = candidate.cache(loaded.model, room, options.seed, audit=options.audit, allow_longer=options.allow_longer)
    return PreparedGeneration(loaded, tokens, cache, options)


def _load(model: str) -> LoadedModel:
    folder = find_folder(model)
    loaded = load_reference() if folder is None else load_model(folder)
    with use(loaded.model, Exact()):
        pass  # a model whose attention cannot be switched is refused here
    return loaded


def _check_length(loaded: LoadedModel, num_tokens: int, allow_longer: bool) -> None:
    if num_tokens > loaded.max_length and not allow_longer:
        raise ValueError(
            f"{num_tokens:,} tokens to read and generate, but {loaded.name} was made for {loaded.max_length:,}: give a "
            "shorter text, a model with a longer context, or --allow-longer to continue beyond that length"
        )


def read(prepared: PreparedGeneration, console: Console, *, leave: int) -> Throughput | None:
    """Read the part of the text that is not in the cache, with a progress bar.

    Args:
        prepared: model, text and cache.
        console: the console for progress.
        leave: number of last tokens to leave unread.

    Returns:
        the number of tokens, the time and the counts of calls; None if no token was left to read.
    """
    tokens = prepared.tokens[:, prepared.cache.get_seq_length() : prepared.tokens.shape[1] - leave]
    if not tokens.shape[1]:
        return None
    with progress(console, "read", pieces_of(tokens.shape[1], prepared.options.chunk)) as on_step:
        return read_tokens(prepared.loaded, prepared.cache, tokens, chunk=prepared.options.chunk, on_step=on_step)


def write(prepared: PreparedGeneration, sampling: Sampling) -> Throughput:
    """Continue the text, and print tokens as soon as they are generated.

    Args:
        prepared: model, text, and the cache that has read all tokens except the last ones.
        sampling: the rule for choosing tokens.

    Returns:
        the number of tokens, the time and the counts of calls.
    """
    return write_on(prepared.loaded, prepared.cache, prepared.tokens, sampling)[1]


def keep(prepared: PreparedGeneration, out: Path, *, overwrite: bool = False) -> None:
    """Write the cache of a text to a file, completely or not at all.

    Args:
        prepared: model, text and cache.
        out: the file.
        overwrite: whether an existing file may be replaced.
    """
    folder = find_folder(prepared.options.model)
    made_by = REFERENCE if folder is None else str(folder.resolve())
    save_cache(prepared.cache, prepared.loaded.model, out, tokens=prepared.tokens, made_by=made_by, overwrite=overwrite)


def recall(
    path: Path, questions: Sequence[str], model: str | None, more: int, *, allow_longer: bool = False
) -> Iterator[PreparedGeneration]:
    """Load a cache and its model, and append each question to the text, independently of the other questions.

    Args:
        path: the file of the cache.
        questions: the questions.
        model: folder of the model; None for the model that the file names.
        more: number of tokens to generate after each question.
        allow_longer: whether a text may exceed the model's trained length.

    Returns:
        model, text and a copy of the cache for each question, in order; all questions were checked before.

    Raises:
        ValueError: if the file cannot be used, or a question is empty or too long.
    """
    named = model or _maker(path)
    loaded = _load(named)
    cache, tokens = load_cache(path, loaded.model, allow_longer=allow_longer)
    if tokens is None:
        raise ValueError(f"{path} holds no tokens of its text: write it with `hyperattention cache`, or save_cache(tokens=)")
    asked = [codec_of(loaded).encode(question, first=False)[None] for question in questions]
    if not all(each.shape[1] for each in asked):
        raise ValueError("the question is empty: give the text that the model continues")
    _check_length(loaded, tokens.shape[1] + max(each.shape[1] for each in asked) + more, allow_longer)
    options = GenerationOptions(named, seed=cache.seed, budget=cache.room.budget)
    if tokens.shape[0] != 1:
        raise ValueError(f"{path} holds {tokens.shape[0]} texts, but `ask` supports one text: write a cache of one text")
    texts = [torch.cat([tokens.cpu(), each], 1) for each in asked]
    return (PreparedGeneration(loaded, text, copy.deepcopy(cache), options) for text in texts)


def _maker(path: Path) -> str:
    named = find_maker(path) or REFERENCE
    if (folder := find_folder(named)) is not None and not folder.is_dir():
        raise ValueError(f"{path} was written with the model in {named}, which no longer exists: name it with --model")
    return named


def show(
    prepared: PreparedGeneration, console: Console, *, reading: Throughput | None = None, writing: Throughput | None = None
) -> None:
    """Print the memory and the keys of the cache, and how fast tokens were read and generated.

    Args:
        prepared: model, text and cache.
        console: the console to print to.
        reading: tokens and time of reading; None if no token was read.
        writing: tokens and time of generation; None if no token was generated.
    """
    cache, table = prepared.cache, Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    for name, stretch in (("read", reading), ("written", writing)):
        if stretch is not None:
            watched = ", audit included" if cache.report() is not None else ""
            table.add_row(name, f"{stretch.num_tokens:,} tokens, {stretch.per_second:,.1f} a second{watched}")
    table.add_row("cache", _memory(cache))
    table.add_row("keys", _keys(cache))
    for name, stretch in (("reading", reading), ("writing", writing)):
        if stretch is not None:
            table.add_row(f"attention, {name}", str(stretch.counts))
    if (report := cache.report()) is not None:
        table.add_row("audit", str(report))
    console.print(table)


def _memory(cache: HyperCache) -> str:
    held, whole = cache.memory_bytes / _MEBIBYTE, cache.whole_bytes / _MEBIBYTE
    beside = f", of {whole:.1f} for all keys and values ({held / whole:.0%})" if whole else ""
    left = len(cache.layers) - len(cache.stores)
    return f"{held:.1f} MiB{beside}" + (f"; {left} layers with sliding windows not counted" if left else "")


def _keys(cache: HyperCache) -> str:
    stores: list[Store] = list(cache.stores.values())
    seen, held = max(store.seen for store in stores), max(store.num_slots for store in stores)
    read = max(store.num_read for store in stores)
    if held == seen <= read:
        return f"all {seen:,} kept and read; exact: nothing was dropped"
    kept = f"all {seen:,} kept; " if held == seen else ""
    return f"{kept}a step reads {read:,} a head for {seen:,} tokens ({read / seen:.1%}), by {cache.policy!r}"
