"""A process that makes runs: a description a line on standard input, on what was standard output an empty
line of JSON when it begins, and its outcome when it has ended."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve until standard input closes; then stop at once, also in the middle of a run: nobody waits for it."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a model prints goes to standard error
    work, threads = Path(sys.argv[1]), int(sys.argv[2])
    asked: queue.Queue[Any] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            asked.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    warnings.simplefilter("ignore")
    import torch

    from ..methods import load
    from .execute import execute

    torch.set_num_threads(threads)
    load()
    while True:
        job = asked.get()
        answers.write("{}\n")  # it begins: the time before this is not the run's
        answers.flush()
        outcome = execute(job["digest"], job["spec"], work)
        answers.write(json.dumps(asdict(outcome)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
