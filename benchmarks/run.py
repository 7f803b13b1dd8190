"""Run every benchmark, each in a process of its own, and print one table of their figures at the end."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import OUT, out, rows

BENCHMARKS = ("loader", "tokenization")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--megabytes", type=float, help="text that each runs on (10^6 bytes of UTF-8); default: its own"
    )
    parser.add_argument("--repetitions", type=int, help="times that each side runs (count); default: each one's own")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON files with the figures")
    asked = parser.parse_args()
    flags = [f"--out={asked.out}"]
    flags += [f"--{name}={getattr(asked, name)}" for name in ("megabytes", "repetitions") if getattr(asked, name)]
    results, failed = [], []
    for number, name in enumerate(BENCHMARKS, 1):
        out.print(f"[{number}/{len(BENCHMARKS)}] {name}", markup=False)
        script = Path(__file__).with_name(f"{name}.py")
        if subprocess.run([sys.executable, str(script), *flags], check=False).returncode:
            failed.append(name)
        else:
            results.append(json.loads((asked.out / f"{name}.json").read_text(encoding="utf-8")))
    out.print()
    out.print(rows(results))
    out.print(f"The figures with their spread, the machine and the versions are in {asked.out}.", markup=False)
    if failed:
        print(f"Failed: {', '.join(failed)}; what went wrong stands above.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
