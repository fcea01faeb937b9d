"""A study of 200 runs, killed with SIGKILL ten times at random moments, beside the same study left alone.

Prints whether both tables are the same, and how often each run was begun.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, environment

TASK = """
import torch
from torch import nn

class clouds:
    epochs = 1
    def model(self, seed):
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    def batches(self, split, seed, epoch):
        g = torch.Generator().manual_seed({"train": 1, "valid": 2, "test": 3}[split])
        y = torch.randint(2, (256,), generator=g)
        return list(zip((torch.randn(256, 8, generator=g) + y[:, None]).split(16), y.split(16)))
"""
RUN = "import sys; from pathlib import Path; from secateur.compare import compare; "
RUN += "compare(Path(sys.argv[1]), Path(sys.argv[2]), workers=2, threads=1)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from secateur.compare import Study, load
    from secateur.compare.plan import runs_of
    from secateur.compare.store import Store

    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "task.py").write_text(TASK, encoding="utf-8")
        study = Study.of({
            "task": f"{root / 'task.py'}:clouds", "methods": ["magnitude", "random", "snip", "synflow", "gmp", "rigl"],
            "targets": [0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.97, 0.98, 0.985, 0.99], "seeds": 3,
            "budget": {"epochs": 1},
        })  # fmt: skip
        file = root / "study.yaml"
        file.write_text(study.dump(), encoding="utf-8")
        count = len(runs_of(study))
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", RUN, str(file), str(root / "alone")], check=True)
        alone = time.perf_counter() - begun
        killed, moments = 0, []
        while True:
            engine = subprocess.Popen([sys.executable, "-c", RUN, str(file), str(root / "killed")])
            try:
                engine.wait(draw.uniform(6.0, 6.0 + alone / args.kills) if killed < args.kills else None)
            except subprocess.TimeoutExpired:
                engine.kill()
                engine.wait()
                killed += 1
                store = Store(root / "killed" / "runs.sqlite") if (root / "killed" / "runs.sqlite").exists() else None
                moments.append(0 if store is None else len(store.outcomes()))
                continue
            break
        starts = list(Store(root / "killed" / "runs.sqlite").starts().values())
        same = timeless(load(root / "killed").rows) == timeless(load(root / "alone").rows)
    found = {
        "runs": count, "kills": killed, "runs_over_at_each_kill": moments, "same_table": same,
        "begun_once": sum(n == 1 for n in starts), "begun_again": sum(n > 1 for n in starts),
        "starts": sum(starts), "seconds_alone": round(alone, 1), "environment": environment(2),
    }  # fmt: skip
    (RESULTS / "killed.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in found.items() if k != "environment"}, indent=1))


def timeless(rows: list[Any]) -> list[Any]:
    """Rows without what differs between two runs of the same thing."""
    gone = ("created", "environment", "cost")
    return sorted(
        (
            r.digest,
            r.label,
            r.target,
            r.seed,
            r.status,
            r.reason,
            json.dumps({k: v for k, v in r.result.items() if k not in gone}, sort_keys=True),
        )
        for r in rows
    )


if __name__ == "__main__":
    main()
