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
from benchmarks.small_training import arguments, contestants, plan_of, prepare, shares, train

# Which initial weights, and the precision.
CONTESTANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "float32": (0, {"dtype": torch.float32}),
    "bfloat16": (0, {}),
    "bfloat16, moments too": (0, {"moments": "bfloat16"}),
    "float32, other weights": (1, {"dtype": torch.float32}),
    "bfloat16, other weights": (1, {}),
}


def main(args: list[str] | None = None) -> int:
    began = time.perf_counter()
    asked = arguments(__doc__, steps=250, seconds=300).parse_args(args)
    if asked.draw:
        raise SystemExit("There is no picture of precisions; leave out --draw.")
    names = contestants(asked, tuple(CONTESTANTS))
    if names[0] != "float32":
        raise SystemExit("All are held to float32; name it, too.")
    plan = plan_of(asked, learning_rate=1e-3, evaluations=5)
    data = prepare(asked, plan)
    shape = {**(TINY if asked.tiny else SHAPE), "vocab_size": data.vocabulary}
    report: dict[str, Any] = {"machine": machine(data.device), "plan": plan._asdict(), "shape": shape, "runs": []}
    build = partial(model_of, "auxiliary", shape, data.device)
    for name, seconds in shares(names, began + asked.seconds):
        weights, precision = CONTESTANTS[name]
        data.plan = plan._replace(seed=plan.seed + weights)
        run, _ = train(name, build, data, seconds, **precision)
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
