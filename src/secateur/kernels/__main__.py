"""``python -m secateur.kernels``: compile the sparse kernels for this machine."""

import sys

from .build import build

results = build()
for target, problem in results.items():
    print(f"{target}: {problem or 'built'}")
sys.exit(all(results.values()))
