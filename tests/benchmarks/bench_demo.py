"""The demo under several seeds, as the documentation quotes it.

    python tests/benchmarks/bench_demo.py --out docs/results/demo.json

The record holds the rows of every seed as the demo wrote them. Seconds are wall time on the
machine at hand; `cpu_seconds` is what all threads of one whole demo used, report included.
"""

import argparse
import json
import platform
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from bdclean.commands.demo import Demo
from bdclean.commands.demo_stages import DemoSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    runs = []
    for seed in args.seeds:
        wall, cpu = time.perf_counter(), time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            rows = Demo(Path(folder), seed).run()
        runs.append(
            {
                "seed": seed,
                "rows": [asdict(row) for row in rows],
                "wall_seconds": round(time.perf_counter() - wall, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
            }
        )
        for row in rows:
            print(seed, *row.cells(), sep=" | ", flush=True)
    record = {
        "what": "bdclean demo, all rows of every seed, measured on the 397 test digits",
        "settings": asdict(DemoSettings()),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("bdclean", "torch", "lightning")},
        "runs": runs,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
