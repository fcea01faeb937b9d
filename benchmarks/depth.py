"""Depth at run time: what it brings on real inputs, and what it costs.

Two parts, each with the dense model in turns: early exits of a VGG-like network on Fashion-MNIST (single inputs; beside
it the accuracy of the dense network trained for as many more epochs without exits, unless ``--no-peer``), and
generation by SmolLM2 with blocks left out (tokens a second, perplexity behind the prompt), static `shortgpt` at as many
blocks beside it. Trained models and chosen settings are kept in ``--work``, so that the timing can be repeated alone.
Settings are chosen on validation data and on the calibration text; all figures are of test data and the held-out text.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from common import RESULTS, environment, table, write_json


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("part", choices=["exits", "generation"])
    parser.add_argument("stage", choices=["prepare", "measure"], help="prepare takes minutes; measure is to run alone")
    parser.add_argument("--work", type=Path, default=Path("depth-work"))
    parser.add_argument("--images", type=int, default=8000, help="of the training set")
    parser.add_argument("--epochs", type=float, default=4, help="of the dense run; half as long again with exits")
    parser.add_argument(
        "--peer", action=argparse.BooleanOptionalAction, default=True, help="train the dense network on as well"
    )
    parser.add_argument("--drop", type=float, default=0.01, help="of the accuracy, on validation data")
    parser.add_argument("--skip", type=int, nargs="+", default=[2, 4], help="blocks")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.016], help="of exit-decoding by state")
    parser.add_argument("--windows", type=int, default=4, help="of the held-out text")
    parser.add_argument("--length", type=int, default=256, help="tokens in each; half is the prompt")
    parser.add_argument("--steps", type=int, default=32, help="tokens of each of two windows that are timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "depth.json")
    return parser.parse_args()


def keep(args: argparse.Namespace, part: str, found: dict[str, Any]) -> None:
    """Beside what the other part has written."""
    import json

    whole = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("work", "out", "stage", "part")}
    write_json(args.out, whole | {part: {"environment": environment(args.threads), "settings": settings, **found}})


#: Of the run with exits, and of the same epochs without them: in lengths, and rates, of the dense run.
LONGER = {"length": 0.5, "rate": 0.5}


def prepare_exits(args: argparse.Namespace) -> None:
    """Both sides begin with the same dense run."""
    import secateur

    run: dict[str, Any] = {
        "epochs": args.epochs, "options": {"images": args.images, "width": 16}, "dense": args.work / "dense",
    }  # fmt: skip
    print(
        secateur.train("fashion-vgg", "early-exit", **LONGER, knobs={"drop": args.drop}, out=args.work / "exits", **run)
    )
    if args.peer:
        longer = secateur.Compound.of([{"recover": {"method": "finetune", **LONGER}}])
        print(secateur.train("fashion-vgg", longer, out=args.work / "peer", **run))


def measure_exits(args: argparse.Namespace) -> None:
    """What the run has measured at its end: test images one at a time, in turns with the dense model."""
    import json

    run = json.loads((args.work / "exits" / "run.json").read_text(encoding="utf-8"))
    names = ("places", "chosen", "left", "accuracy", "flops", "before", "after", "measured", "task", "epochs", "seed")
    found = {name: run[name] for name in names if name in run}
    peer = args.work / "peer" / "run.json"
    if peer.is_file():
        found["peer"] = json.loads(peer.read_text(encoding="utf-8"))["metric"]  # dense, trained as long as with exits
    print(json.dumps(found["measured"], indent=1), found["before"], found["after"], found.get("peer"))
    keep(args, "exits", found)


def texts(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The model, calibration windows and held-out windows."""
    from secateur.data import CALIBRATION, EVALUATION, windows
    from secateur.models import load_model, load_tokenizer, resolve

    path = resolve("demo")
    tokenizer = load_tokenizer(path)
    import torch

    cut = partial(windows, tokenizer=tokenizer, length=args.length)
    return (
        load_model(path, torch.float32), cut(CALIBRATION, count=4).ids.split(1),
        cut(EVALUATION, count=args.windows).ids.split(1),
    )  # fmt: skip


def least_influence(model: Any, ids: list[Any], count: int) -> list[int]:
    """The blocks that shortgpt takes out: those of the least influence on the calibration text."""
    import torch
    from torch.nn.functional import cosine_similarity

    from secateur.registry import get
    from secateur.select import select

    cosine = torch.zeros(len(model.model.layers), dtype=torch.float64)

    def look(k: int) -> Any:
        def hook(_: Any, given: Any, out: Any) -> None:
            cosine[k] += float(cosine_similarity(given[0].float(), out.float(), dim=-1).mean()) / len(ids)

        return hook

    handles = [layer.register_forward_hook(look(k)) for k, layer in enumerate(model.model.layers)]
    with torch.no_grad():
        for window in ids:
            model(input_ids=window, use_cache=False)
    for handle in handles:
        handle.remove()
    score = get("criterion", "block-influence")({"block_cosine": cosine})
    stays = select(score[None].float(), len(cosine) - count)[0]
    return (~stays).nonzero().flatten().tolist()


def prepare_generation(args: argparse.Namespace) -> None:
    import json

    from secateur.runtime import made

    model, calibration, _ = texts(args)
    file = args.work / "generation.json"
    chosen: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    known = {one["name"] for one in chosen}
    chosen += [
        {"name": name, "static": least_influence(model, calibration, n)}
        for n in args.skip
        if (name := f"shortgpt, {n} blocks") not in known
    ]
    for method, knobs in [
        *(("skip-decoding", {"skip": n}) for n in args.skip),
        *(("exit-decoding", {"threshold": t}) for t in args.thresholds),
        ("exit-decoding", {"measure": "softmax", "drop": 0.1, "at": (24,)}),
    ]:
        name = f"{method}, {', '.join(f'{k} {v}' for k, v in knobs.items())}"
        if name in known:
            continue
        gates = made(model, method, calibration[0], calibration, **knobs)
        print(gates.told(), flush=True)
        chosen.append({"name": name, "record": gates.record, "saved": gates.saved()})
        args.work.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(chosen), encoding="utf-8")


def measure_generation(args: argparse.Namespace) -> None:
    import json

    import torch

    from secateur.registry import get
    from secateur.runtime.lm_pass import continued, step
    from secateur.surgery.depth import BLOCKS

    model, _, held = texts(args)
    chosen = json.loads((args.work / "generation.json").read_text(encoding="utf-8"))
    models: dict[str, Any] = {"dense": model}
    for one in chosen:
        if "static" in one:
            models[one["name"]] = BLOCKS.without(model, {"model.layers": one["static"]}).eval()
        else:
            restore = get("transform", one["record"]["method"]).facts["restore"]
            models[one["name"]] = restore(model, one, {}).eval()
    half, took = args.length // 2, {name: [] for name in models}
    with torch.inference_mode():
        for turn, ids in enumerate(held[:2]):
            for name in models if turn % 2 == 0 else reversed(models):
                took[name].append(timed(models[name], ids[:, :half], args.steps, step))
        known = [continued(model, ids).argmax(-1) for ids in held]
        quality = {name: held_out(net, known, held) for name, net in models.items()}
    rows, results = [], {}
    for name in models:
        seconds = sorted(x for one in took[name] for x in one)
        speed = {
            "tokens_per_second": len(seconds) / sum(seconds), "p50_ms": 1e3 * seconds[len(seconds) // 2],
            "p99_ms": 1e3 * seconds[int(0.99 * (len(seconds) - 1))],
        }  # fmt: skip
        results[name] = {**speed, **quality[name]}
        rows.append([name, *(f"{x:.2f}" for x in results[name].values())])
    print(table(["model", "tokens/s", "p50 ms", "p99 ms", "perplexity", "same next token"], rows))
    keep(args, "generation", {"chosen": chosen, "results": results})


def timed(model: Any, prompt: Any, steps: int, step: Any) -> list[float]:
    """Seconds of each token that is generated behind a prompt, greedily; the first two are not counted."""
    from secateur.measure.latency import seconds

    logits, cache = step(model, prompt)
    found = []
    for number in range(steps + 2):
        took, (logits, cache) = seconds(partial(step, model, logits[:, -1:].argmax(-1), cache))
        found += [took] if number > 1 else []
    return found


def held_out(model: Any, known: Any, windows: Any) -> dict[str, float]:
    """Perplexity behind the prompt, and how often the next token is the dense model's."""
    import torch

    from secateur.runtime.lm_pass import continued, loss_of

    losses, same = [], []
    for ids, one in zip(windows, known, strict=True):
        found = continued(model, ids)
        losses.append(loss_of(found, ids))
        same.append((found.argmax(-1) == one).flatten())
    return {"perplexity": float(torch.cat(losses).mean().exp()), "agreement": float(torch.cat(same).double().mean())}


if __name__ == "__main__":
    given = arguments()
    import torch

    torch.set_num_threads(given.threads)
    globals()[f"{given.stage}_{given.part}"](given)
