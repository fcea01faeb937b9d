"""Commands that compare: ``compare``, ``contrast`` and ``report``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .errors import RecipeError, StudyError
from .options import Json, Length, pairs, split_knobs
from .tasks import names_a_task
from .terminal import err_console, interruptible, out_console

Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Runs at once (default: one for two processors).")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads of each run.")]
Ray = Annotated[str | None, typer.Option("--ray", help="Address of a Ray cluster to work on: auto, local, HOST:PORT.")]
Retry = Annotated[bool, typer.Option("--retry", help="Try failed runs again.")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="How many; 0, 1, 2, ...")]
Epochs = Annotated[float | None, typer.Option("--epochs", help="Of each training run of a task.")]
Total = Annotated[
    float | None, typer.Option("--total-epochs", help="Of all training a method asks for, in place of it.")
]
Windows = Annotated[int, typer.Option("--windows", min=1, help="Calibration windows, of language models.")]
EvalWindows = Annotated[int, typer.Option("--eval-windows", min=3, help="Held-out windows: a third to validate on.")]
Seconds = Annotated[float | None, typer.Option("--seconds", help="Stop a run that takes longer; it counts as failed.")]
Processes = Annotated[
    int, typer.Option("--processes", min=1, help="Make each run together, by torchrun: shares of batches, or of text.")
]
Where = Annotated[str, typer.Option("--device", help="Where tasks train: cpu, or cuda with a GPU for each process.")]
Sizes = Annotated[list[str] | None, typer.Option("--set", help="A size of a ready task, e.g. --set task.images=6000.")]
Latency = Annotated[bool, typer.Option("--latency", help="Also measure speed, beside the dense model.")]


#: Options that do not change what a study is.
_HOW = {"what", "out", "workers", "threads", "ray", "retry", "as_json"}


def compare(
    ctx: typer.Context,
    what: Annotated[list[str], typer.Argument(help="A study file (YAML), or tasks and language models.")],
    methods: Annotated[
        str | None, typer.Option("--methods", "-m", help="magnitude,wanda,wanda[allocation=owl],gmp[driver.every=10]")
    ] = None,
    sparsity: Annotated[str | None, typer.Option("--sparsity", help="Targets: 0.3,0.5,2:4")] = None,
    target: Annotated[
        list[str] | None, typer.Option("--target", help="A target for whole units, e.g. 'flops 50%'.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory of the study; it may be there.")] = None,
    data: Annotated[str, typer.Option("--data", help="Calibration text of language models.")] = "text:calibration",
    evaluation: Annotated[str, typer.Option("--eval", help="Held-out text of language models.")] = "text:evaluation",
    seeds: Seeds = 3,
    epochs: Epochs = None,
    total_epochs: Total = None,
    windows: Windows = 32,
    length: Length = 512,
    eval_windows: EvalWindows = 36,
    seconds: Seconds = None,
    sizes: Sizes = None,
    latency: Latency = False,
    processes: Processes = 1,
    device: Where = "cpu",
    workers: Workers = None,
    threads: Threads = None,
    ray: Ray = None,
    retry: Retry = False,
    as_json: Json = False,
) -> None:
    """Compare methods fairly: one model, data, budget and set of seeds for all.

    Interrupted at any moment, the same command goes on with the runs that are missing.
    """
    from .compare import Study

    if len(what) == 1 and what[0].endswith((".yaml", ".yml")):
        for option in ctx.command.params:
            source = ctx.get_parameter_source(option.name or "")
            if option.name not in _HOW and source is not None and source.name == "COMMANDLINE":
                raise RecipeError(f"{option.opts[0]} is the study's to say: write it into {what[0]}")
        study = Study.load(_there(Path(what[0])))
        out = out or Path(what[0]).with_suffix("")
    else:
        if methods is None or not (sparsity or target):
            raise RecipeError("say what is compared: --methods magnitude,wanda and --sparsity 0.5,0.7 (or --target)")
        if out is None:
            raise RecipeError("say where the study is kept: --out DIR")
        budget = {
            "epochs": epochs, "total_epochs": total_epochs, "windows": windows, "length": length,
            "eval_windows": eval_windows, "seconds": seconds, "processes": processes, "device": device,
        }  # fmt: skip
        study = Study.of({
            "study": out.name, "options": _sizes(sizes), "tasks": [w for w in what if names_a_task(w)],
            "models": [w for w in what if not names_a_task(w)], "methods": [method_of(m) for m in split(methods)],
            "targets": [*(split(sparsity) if sparsity else []), *(target or [])], "seeds": seeds,
            "budget": {k: v for k, v in budget.items() if v is not None}, "data": data, "evaluation": evaluation,
            "latency": latency,
        })  # fmt: skip
    _run(study, out, workers, threads, ray, retry, as_json)


def contrast(
    name: Annotated[str | None, typer.Argument(help="One of the list that the command shows without a name.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="A ready task (secateur tasks) or FILE.py:NAME.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="A language model, in place of a task.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory of the study; it may be there.")] = None,
    sparsity: Annotated[str | None, typer.Option("--sparsity", help="Some of its targets: 0.9,0.95")] = None,
    source: Annotated[
        str | None, typer.Option("--from", help="Task that masks come from, for original-vs-transferred.")
    ] = None,
    data: Annotated[str, typer.Option("--data", help="Calibration text of language models.")] = "text:calibration",
    evaluation: Annotated[str, typer.Option("--eval", help="Held-out text of language models.")] = "text:evaluation",
    seeds: Seeds = 3,
    epochs: Annotated[
        float | None, typer.Option("--epochs", help="Of all training that a method asks for (scratch: of one run).")
    ] = None,
    windows: Windows = 32,
    length: Length = 512,
    eval_windows: EvalWindows = 36,
    sizes: Sizes = None,
    workers: Workers = None,
    threads: Threads = None,
    ray: Ray = None,
    retry: Retry = False,
    as_json: Json = False,
) -> None:
    """Answer one of the survey's contrasts on your own task or model; without a name, list them."""
    from .compare.contrasts import contrast as find
    from .compare.contrasts import contrasts, study_of

    if name is None:
        _list(list(contrasts().values()), as_json)
        return
    asked = find(name)
    if (task is None) == (model is None):
        raise RecipeError(f"say what contrast '{name}' is asked of: --task fashion-resnet, or --model demo")
    if out is None:
        raise RecipeError("say where the study is kept: --out DIR")
    budget = {"windows": windows, "length": length, "eval_windows": eval_windows} if model is not None else {}
    options = _sizes(sizes)
    study = study_of(
        name, "task" if task is not None else "model", task or str(model), options=options, epochs=epochs, seeds=seeds,
        other=None if source is None else {"task": source, **_sizes(sizes, "from.")},
        targets=split(sparsity) if sparsity else None, budget=budget, data=data, evaluation=evaluation,
    )  # fmt: skip
    if not as_json:
        out_console.print(f"[bold]{escape(asked.question)}[/]\n{escape(asked.note)}".rstrip())
    _run(study, out, workers, threads, ray, retry, as_json)


def report(
    study: Annotated[Path, typer.Argument(help="Directory of a study (secateur compare).")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write (default: report.html in it).")] = None,
    as_json: Json = False,
) -> None:
    """Write the report of a study: one file that any browser shows without a network."""
    from .compare import load, write_report

    found = load(study)
    path = write_report(found, out or study / "report.html")
    if as_json:
        print(json.dumps({"report": str(path), "runs": len(found.rows), "missing": found.missing}))
        return
    out_console.print(f"report  {escape(str(path))}", soft_wrap=True)


def _run(
    study: Any, out: Path, workers: int | None, threads: int | None, ray: str | None, retry: bool, as_json: bool
) -> None:
    from .compare import compare as run
    from .compare import sayings, write_report
    from .compare.statistics import stats

    stats()  # said before the first run, not after the last
    again = f"stopped: what has been run is in {out}; the same command goes on"
    with interruptible(again), _progress(not as_json) as show:
        made = run(study, out, workers=workers, threads=threads, ray=ray, retry=retry, progress=show)
    path = write_report(made, out / "report.html")
    if as_json:
        print(json.dumps({"report": str(path), "missing": made.missing, "rows": [r.to_dict() for r in made.rows]}))
        return
    print(made)
    for line in sayings(made):
        out_console.print(escape(line), soft_wrap=True, highlight=False)
    for left in made.left_out:
        out_console.print(f"not tried: {escape(left.label)} at {left.target}: {escape(left.reason)}", style="dim")
    for row in made.rows:
        if not row.done:
            out_console.print(
                f"failed: {escape(row.label)} at {row.target}, seed {row.seed}: {escape(row.reason or '')}"
            )
    out_console.print(f"report  {escape(str(path))}", soft_wrap=True)


class _progress:
    """A bar of runs with the time that is left, on standard error."""

    def __init__(self, show: bool) -> None:
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )  # fmt: skip
        self._bar = Progress(*columns, console=err_console, disable=not show, transient=True)
        self._id = self._bar.add_task("study", total=None, left="")

    def __enter__(self) -> Callable[[Any], None]:
        self._bar.start()
        return self._show

    def _show(self, tick: Any) -> None:
        left = "" if tick.left is None else f"about {_time(tick.left)} left"
        failed = f", {tick.failed} failed" if tick.failed else ""
        self._bar.update(
            self._id, total=tick.total, completed=tick.done, left=left + failed, description=escape(tick.doing)
        )

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _time(seconds: float) -> str:
    """A time to wait, as people say it.

    >>> _time(42), _time(600), _time(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def split(text: str) -> list[str]:
    """Names separated by commas, those in brackets left alone.

    >>> split("magnitude,wanda[allocation=owl,seed=1], 2:4")
    ['magnitude', 'wanda[allocation=owl,seed=1]', '2:4']
    """
    return [x.strip() for x in re.split(r",(?![^\[]*\])", text) if x.strip()]


def method_of(text: str) -> Any:
    """A method as a command line names it, as a study has it.

    >>> method_of("wanda[allocation=owl,solver.damp=0.1]")["knobs"]
    {'solver': {'damp': 0.1}}
    """
    name, bracket, rest = text.partition("[")
    if not bracket:
        return name
    if not rest.endswith("]"):
        raise StudyError(f"method '{text}' is not understood: write wanda[allocation=owl,solver.damp=0.1]")
    found: dict[str, Any] = {"method": name, "label": text}
    for key, value in pairs(rest[:-1].split(",")).items():
        axis, dot, knob = key.partition(".")
        if dot:
            found.setdefault("knobs", {}).setdefault(axis, {})[knob] = value
        else:
            found[key] = value
    return found


def _sizes(given: list[str] | None, start: str = "task.") -> dict[str, Any]:
    own = [x.replace(start, "task.", 1) for x in given or [] if x.startswith(start)]
    strange = [x for x in given or [] if not x.startswith(("task.", "from."))]
    if strange:
        raise RecipeError(
            f"--set {strange[0]} is no size of a task: knobs belong to a method, as in gmp[driver.every=10]"
        )
    return split_knobs(own)[0]


def _there(path: Path) -> Path:
    if not path.is_file():
        raise StudyError(f"there is no study file {path}")
    return path


def _list(shelf: list[Any], as_json: bool) -> None:
    if as_json:
        rows = [{"name": c.name, "question": c.question, "reported": c.reported, "source": c.source} for c in shelf]
        print(json.dumps(rows))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("contrast", "question", "on"):
        table.add_column(column)
    for c in shelf:
        where = ", ".join(k for k, own in (("tasks", c.tasks), ("models", c.models)) if own) or "not yet"
        table.add_row(c.name, escape(c.question), where)
    out_console.print(table)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(compare)
    app.command()(contrast)
    app.command()(report)
