"""Training in bfloat16 beside float32, on one GPU: the same loss curve within noise?

    python benchmarks/precision.py --out OUT             # one GPU, some minutes; needs benchmarks/tokens.py's file
    python benchmarks/precision.py --device cpu --tiny   # tries the script out (float32 twice)

One small model (benchmarks/balance.py's shape with the auxiliary loss), one order of the same tokens. The reference is
float32 throughout. Ours are the trainer's precisions on one GPU: bfloat16 products, with the bits that are missing to
float32 kept beside the weights (kernels/adamw.py), moments in float32 or bfloat16. Noise is what float32 itself differs
by with other initial weights. Reported are the held-out loss at the end and the mean distance of the training curves.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.balance import SHAPE, TINY, model_of
from benchmarks.gpu import machine, write
from benchmarks.small_training import Plan, arguments, prepare, train

CONTESTANTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {},
    "bfloat16, moments too": {"moments": "bfloat16"},
    "float32, other weights": {"dtype": torch.float32, "seed": 1},
    "bfloat16, other weights": {"seed": 1},
}


def main(args: list[str] | None = None) -> int:
    began = time.perf_counter()
    asked = arguments(__doc__, steps=250, seconds=300).parse_args(args)
    plan = Plan(
        steps=min(asked.steps, 10) if asked.tiny else asked.steps,
        sequences=4 if asked.tiny else 32,
        length=64 if asked.tiny else 1024,
        learning_rate=1e-3,
        evaluations=2 if asked.tiny else 5,
        held_out_sequences=8 if asked.tiny else 256,
        seed=0,
        compiled=asked.device == "cuda" and not asked.no_compile,
    )
    data = prepare(asked, plan)
    shape = {**(TINY if asked.tiny else SHAPE), "vocab_size": data.vocabulary}
    report: dict[str, Any] = {"machine": machine(data.device), "plan": plan._asdict(), "shape": shape, "runs": []}
    for number, (name, how) in enumerate(CONTESTANTS.items()):
        data.plan = plan._replace(seed=how.get("seed", 0))
        left = (asked.seconds - (time.perf_counter() - began)) / (len(CONTESTANTS) - number)
        build = partial(model_of, "auxiliary", shape, data.device)
        precision = {key: value for key, value in how.items() if key != "seed"}
        run, _ = train(name, build, data, left, **precision)
        report["runs"].append(run)
    curves = {run["name"]: run["curve"] for run in report["runs"]}
    print(f"\n{'':<25}{'held out':>10}{'loss':>9}{'distance from float32':>24}{'tokens/s':>12}")
    for run in report["runs"]:
        # float32 may have been cut short.
        pairs = list(zip(run["curve"], curves["float32"], strict=False))
        run["distance"] = sum(abs(a - b) for a, b in pairs) / len(pairs)
        print(
            f"{run['name']:<25}{run['held_out_loss']:>10.4f}{run['loss']:>9.4f}{run['distance']:>24.4f}"
            f"{run['tokens_per_second']:>12,.0f}{'  cut short' if run['cut'] else ''}"
        )
    print(f"\n{write(asked.out, 'precision', report)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
