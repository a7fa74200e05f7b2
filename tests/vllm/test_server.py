"""The OpenAI-compatible server with the plugin: a client's request, the log, and Prometheus' page."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

# half a minute on a machine of one's own
STARTS_IN = 480.0


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """The address of a server that approximates prompts from position 64 on, and its log."""
    folder, place = tiny(), tmp_path_factory.mktemp("server")
    save_byte_tokenizer(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (place / "metrics").mkdir()
    environment = os.environ | {
        "HYPERATTENTION_VLLM_CPU": "1", "PROMETHEUS_MULTIPROC_DIR": str(place / "metrics"), "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2",
    }  # fmt: skip
    environment.pop("TRITON_INTERPRET", None)
    stages = [{"type": "Sinks", "num": 4}, {"type": "Window", "size": 32}, {"type": "Draw", "num": 32}]
    method = {"type": "Method", "stages": stages, "tile": 16}
    pages = {"budget": 64, "sinks": 4, "window": 16, "min_length": 326}
    options = json.dumps({"hyperattention": {"method": method, "min_length": 64, "audit_every": 1, "decode": pages}})
    log = place / "log"
    with log.open("w") as file:
        # `vllm serve` of this build fails: it looks for a distribution of the name vllm
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        command += ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--additional-config", options]
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            wait(f"http://127.0.0.1:{port}/health", server, log)
            yield f"http://127.0.0.1:{port}", log
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def save_byte_tokenizer(folder: str) -> None:
    """Write a tokenizer whose tokens are the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # byte-level tokenizers name a byte by its own character if it is printable, by the next free one if not
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    free = iter(range(256, 512))
    characters = [chr(byte if byte in printable else next(free)) for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(vocab={character: byte for byte, character in enumerate(characters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def wait(address: str, server: subprocess.Popen, log: Path) -> None:
    began = time.monotonic()
    while time.monotonic() - began < STARTS_IN:
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"no answer within {STARTS_IN:.0f} s: {log.read_text()[-4000:]}")


def test_a_client_is_answered_and_the_approximation_is_shown(served):
    from openai import OpenAI

    address, log = served
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    model = client.models.list().data[0].id
    answer = client.completions.create(model=model, prompt="def attention(query, key):\n" * 12, max_tokens=5, temperature=0)
    assert answer.usage.prompt_tokens == 324
    assert answer.usage.completion_tokens == 5
    said = log.read_text()
    assert "2 of 2 attention calls approximated" in said
    assert "requests that generate read 64 keys from 326 keys on, in layers [0, 1] by TopPages(" in said
    assert "MiB beside the memory of vLLM" in said
    page = urllib.request.urlopen(f"{address}/metrics", timeout=30).read().decode()
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if line.startswith("hyperattention_"))
    assert float(values['hyperattention_attention_calls_total{kind="approximated"}']) == 2
    # four tokens of the answer are generated; the first of them sees one key fewer than `min_length` of `decode`
    assert float(values['hyperattention_attention_calls_total{kind="decoding"}']) == 2
    assert float(values['hyperattention_attention_calls_total{kind="approximated decoding"}']) == 2 * 3
    listed, exact = (float(values[f'hyperattention_attention_pairs_total{{kind="{kind}"}}']) for kind in ("listed", "exact"))
    assert 0.1 < listed / exact < 0.6
    listed, exact = (
        float(values[f'hyperattention_attention_pairs_total{{kind="{kind} decoding"}}']) for kind in ("listed", "exact")
    )
    assert 0.15 < listed / exact < 0.2
    assert float(values["hyperattention_relative_error_count"]) == 2
    assert float(values["hyperattention_decoding_relative_error_count"]) == 2 * 3
    # a page of vLLM itself
    assert "vllm:prompt_tokens_total" in page
