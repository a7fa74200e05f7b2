"""Time every method on SmolLM2's own queries, keys and values, in turn with exact attention.

    python benchmarks/real/times.py --plan PLAN    # five of the 30 layers of one document of prose, three rounds; resumes

Beside the time of the clock stands the processor time of all threads, which other programs on the same cores hardly change:
on one thread it is the time that the method takes on a free core. The table of `table.py` compares it.
"""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path

from methods import METHODS, methods_of
from model import FOLDER, PACKAGE, prepare
from table import TIMES, read
from texts import judged_documents, name_of

from hyperattention.calibration.measure import run_on, warm_up
from hyperattention.files.records import environment, find_version, plain
from hyperattention.methods.base import AttentionMethod
from hyperattention.reference.call_recorder import CallInputs
from hyperattention.reference.model import load_model
from hyperattention.reference.passes import watch_exact


def time_call(call: CallInputs, methods: Mapping[str, AttentionMethod], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of the processor and of the clock, by method, one number a round; the methods run in turn."""
    found: dict[str, dict[str, list[float]]] = {name: {"processor": [], "clock": []} for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            clock, processor = time.perf_counter(), time.process_time()
            run_on(call, method)
            found[name]["processor"].append(time.process_time() - processor)
            found[name]["clock"].append(time.perf_counter() - clock)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=FOLDER, help="the folder; written first if it is not there")
    parser.add_argument("--methods", nargs="*", default=[*METHODS])
    parser.add_argument("--plan", type=Path, nargs="*", default=[], help="plans that `hyperattention calibrate` wrote")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 7, 14, 21, 28])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, help="tokens of the document; the model's own limit, 8,192, if left out")
    parser.add_argument("--out", type=Path, default=TIMES)
    options = parser.parse_args()
    loaded = load_model(prepare(options.model))
    sample = judged_documents(loaded, "prose", options.length or loaded.max_length)[0]
    methods = {name: method for name, (method, _) in methods_of(options.methods, options.plan).items()}
    shared = {"kind": "real_times", "model": f"{PACKAGE} {find_version(PACKAGE)}", "length": len(sample.tokens),
              "sample": name_of(sample), "rounds": options.rounds}  # fmt: skip
    done = {(each["length"], each["sample"], each["layer"]) for each in read(options.out)}

    def time_layer(call: CallInputs) -> None:
        if call.layer not in options.layers or (shared["length"], shared["sample"], call.layer) in done:
            return
        warm_up(call, [*methods.values()])
        record = shared | {"layer": call.layer, "seconds": time_call(call, methods, options.rounds)}
        with options.out.open("a") as file:
            file.write(json.dumps(plain(record | environment())) + "\n")
        print(f"layer {call.layer} timed", flush=True)

    watch_exact(loaded, sample, time_layer)


if __name__ == "__main__":
    main()
