"""The six algorithms on the demo task: table and plot with seeds and spread.

    python bench/algorithms.py --jobs 2

Runs the default `python examples/gsm8k.py --algo.name NAME --seed SEED` for every algorithm and
seed, and writes `docs/benchmarks/algorithms.md` and `docs/images/algorithms.png`. Runs that are
already in the work folder are not run again.
"""

import argparse
import concurrent.futures
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import jax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eqrl.tracking import read_jsonl


ROOT = pathlib.Path(__file__).resolve().parent.parent
NAMES = ("reinforce", "ppo", "grpo", "rloo", "dapo", "reinforce++")


def run(folder: pathlib.Path, name: str, seed: int, jobs: int) -> float:
    """One run in a process of its own; seconds it took, 0 if it was there already."""
    if (folder / "model").is_dir():
        return 0.0
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    if jobs > 1:  # side by side, each run gets one core
        environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    words = ["--algo.name", name, "--seed", str(seed), "--run-dir", str(folder)]
    start = time.perf_counter()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.log", "w") as log:
        subprocess.run(
            [sys.executable, "examples/gsm8k.py", *words, "--resume", "auto"],
            cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True,
        )  # fmt: skip
    print(f"{name} seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    return time.perf_counter() - start


def accuracies(folder: pathlib.Path, kind: str) -> tuple[float, float]:
    """Held-out accuracy of the full sweep before and after."""
    values = [r[f"eval_full/{kind}"] for r in read_jsonl(folder / "metrics.jsonl")
              if f"eval_full/{kind}" in r]  # fmt: skip
    return values[0], values[-1]


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1%}{deviation}"


def table(work: pathlib.Path, seeds: list[int]) -> list[str]:
    lines = [
        "| algorithm | before (strict) | after (strict) | gain, points | per seed "
        "| after (lenient) | explained variance: last ten steps, best step of the worst seed "
        "| s a step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in NAMES:
        folders = [work / f"{name}-{seed}" for seed in seeds]
        strict = [accuracies(folder, "acc_strict") for folder in folders]
        gains = [100 * (after - before) for before, after in strict]
        lenient = [accuracies(folder, "acc_lenient")[1] for folder in folders]
        records = [read_jsonl(folder / "metrics.jsonl") for folder in folders]
        key = "value/explained_variance"
        explained = [[r[key] for r in run if key in r][-10:] for run in records]
        explained = [statistics.mean(run) for run in explained if run]
        best = [max((r[key] for r in run if key in r), default=0.0) for run in records]
        seconds = [r["time/train/step_s"] for run in records for r in run if "loss/total" in r]
        lines.append(
            f"| `{name}` | {statistics.mean(b for b, _ in strict):.1%} "
            f"| {spread([a for _, a in strict])} | {statistics.mean(gains):+.1f} "
            f"| {', '.join(f'{gain:+.1f}' for gain in gains)} | {spread(lenient)} "
            f"| {f'{statistics.mean(explained):.2f}, {min(best):.2f}' if explained else ''} "
            f"| {statistics.median(seconds):.2f} |"
        )
    return lines


def draw(work: pathlib.Path, seeds: list[int], picture: pathlib.Path) -> None:
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for axis, metric, label in (
        (axes[0], "reward/mean", "training reward (mean of 5 steps)"),
        (axes[1], "eval", "held-out accuracy, strict"),
    ):
        for color, name in enumerate(NAMES):
            curves = [points(work / f"{name}-{seed}", metric) for seed in seeds]
            steps = [step for step, _ in curves[0]]
            columns = list(zip(*[[y for _, y in curve] for curve in curves], strict=True))
            middle = [statistics.mean(column) for column in columns]
            axis.plot(steps, middle, color=f"C{color}", label=name)
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            axis.fill_between(steps, low, high, color=f"C{color}", alpha=0.12)
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


def points(folder: pathlib.Path, metric: str) -> list[tuple[int, float]]:
    """Step and value; for "eval" the light evaluations between the two full sweeps."""
    records = read_jsonl(folder / "metrics.jsonl")
    if metric != "eval":
        found = [(r["step"], r[metric]) for r in records if metric in r]
        return [
            (step, statistics.mean(y for _, y in found[max(0, i - 4) : i + 1]))
            for i, (step, _) in enumerate(found)
        ]
    names = ("eval_full/acc_strict", "eval/acc_strict")
    return sorted({r["step"]: r[name] for r in records for name in names if name in r}.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "runs" / "benchmark")
    options = parser.parse_args()
    pairs = [(name, seed) for name in NAMES for seed in options.seeds]
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        jobs = [
            pool.submit(run, options.work / f"{name}-{seed}", name, seed, options.jobs)
            for name, seed in pairs
        ]
        for job in concurrent.futures.as_completed(jobs):
            job.result()
    draw(options.work, options.seeds, ROOT / "docs/images/algorithms.png")
    folders = [options.work / f"{name}-{seed}" for name, seed in pairs]
    commits = {json.loads((f / "version.json").read_text())["git_commit"][:7] for f in folders}
    flags = "; two runs side by side, one core each" if options.jobs == 2 else ""
    problems = next(
        int(r["eval_full/problems"])
        for r in read_jsonl(options.work / f"{NAMES[0]}-{options.seeds[0]}" / "metrics.jsonl")
        if "eval_full/problems" in r
    )
    text = [
        "# The six algorithms on the demo task",
        "",
        f"Made by `python bench/algorithms.py --jobs {options.jobs}` on "
        f"{datetime.date.today()}, {os.cpu_count()} cores ({platform.machine()}), jax "
        f"{jax.__version__}, runs of commits {', '.join(sorted(commits))}{flags}. Every run is "
        "`python examples/gsm8k.py --algo.name NAME --seed SEED` with default arguments.",
        "",
        f"Held-out accuracy is greedy, on {problems} problems that no training problem equals; "
        "mean and standard deviation (n - 1) over seeds. One accuracy of p on n problems has a "
        "standard error of sqrt(p (1 - p) / n), about 3 points here.",
        "",
        *table(options.work, options.seeds),
        "",
        "![curves](../images/algorithms.png)",
        "",
        "The band spans the seeds; points between the first and the last are light evaluations.",
        "",
        "This is a demonstration that each algorithm learns, on one small task with one learning "
        "rate; it does not rank algorithms.",
    ]
    (ROOT / "docs/benchmarks/algorithms.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
