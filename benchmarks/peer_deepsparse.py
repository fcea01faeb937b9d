"""DeepSparse's side of `sparse.py`: runs in an environment of its own, without torch, and takes turns on request.

Requests are JSON lines on stdin, answers JSON lines on stdout: ``{"model", "input", "cores"}`` compiles an ONNX file
for the input of a .npy file; ``{"run"}`` runs it once and answers with its own seconds, so that no time of the pipe is
counted; ``{"waits"}`` answers with the processor time that the process uses in the 200 ms after a run;
``{"outputs"}`` writes what it computes into an .npz file. It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ["NM_DISABLE_ANALYTICS"] = "1"  # nothing is sent anywhere


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the engine prints goes to stderr
    engine: Any = None
    given: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer: dict[str, Any] = {}
            if "model" in request:
                import numpy
                from deepsparse import Engine, __version__
                from deepsparse.cpu import cpu_architecture

                engine = None  # the last one goes before the next is there
                given = [numpy.load(request["input"])]
                cores = min(request["cores"], cpu_architecture().num_available_physical_cores)
                engine = Engine(request["model"], batch_size=given[0].shape[0], num_cores=cores)
                answer = {"version": __version__, "cores": cores, "supported": engine.fraction_of_supported_ops}
            elif "run" in request:
                begun = time.perf_counter()
                engine.run(given, False)
                answer = {"seconds": time.perf_counter() - begun}
            elif "waits" in request:
                engine.run(given, False)
                begun = time.process_time()
                time.sleep(0.2)
                answer = {"seconds": time.process_time() - begun}
            elif "outputs" in request:
                numpy.savez(request["outputs"], *engine.run(given))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
