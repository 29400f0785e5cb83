"""Turns the TensorBoard events of a suite's runs into CSV files in `benchmark/results`.

`SUITE.csv` holds a row for each training episode or evaluation; the same seeds give the same bytes. What differs from
machine to machine is apart: `SUITE_runs.csv` holds a row for each run, with the time that it took, and, where a row is
an evaluation, `SUITE_times.csv` the time that had passed at each.
"""

import csv
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from .run import find_runs, is_finished
from .suites import RESULTS, Entry, Incomplete, Suite

COLUMNS = ["algorithm", "env", "seed", "env_steps", "return", "length"]
RUN_COLUMNS = ["algorithm", "env", "seed", "env_steps", "episodes", "wall_seconds", "eval_return_mean"]
TIME_COLUMNS = ["algorithm", "env", "seed", "env_steps", "wall_seconds"]
GROUP = {"episodes": "charts", "evaluations": "eval"}
MODEL_ERROR = {  # functions of model_error.py, which needs PyTorch
    "error by steps ahead": "error_by_steps",
    "error by disagreement": "error_by_disagreement",
    "optimism by steps ahead": "optimism_by_steps",
}


def read_scalars(run: Path, *tags: str) -> list[list[tuple[int, float, float]]]:
    """The points (environment step, value, wall-clock time) of each tag in the event files of a run folder, in the
    order of logging."""
    points: dict[str, list[tuple[int, float, float]]] = {tag: [] for tag in tags}
    for path in sorted(run.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag in points:
                    points[value.tag].append((event.step, value.simple_value, event.wall_time))
    return [points[tag] for tag in tags]


def number(value: float) -> str:
    """Shortest decimal that is the same 32-bit number as was logged: 0.43, not 0.4300000071525574; 844, not 844.0."""
    return np.format_float_positional(np.float32(value), trim="-")


def runs_of(suite: Suite) -> list[tuple[Entry, int, Path]]:
    """All runs of a suite in the order of its declaration; raises Incomplete if one is not there or not finished."""
    runs, missing = [], 0
    for entry in suite.entries:
        found = find_runs(suite, entry)
        finished = {seed: run for seed, run in found.items() if is_finished(run)}
        missing += sum(seed not in finished for seed in range(1, entry.seeds + 1))
        runs += [(entry, seed, finished[seed]) for seed in range(1, entry.seeds + 1) if seed in finished]
    if missing:
        raise Incomplete(f"{missing} runs of {suite.name} are not finished: python -m benchmark run {suite.name}")
    return runs


def rows_of(suite: Suite, run: Path) -> list[list[str]]:
    """Environment steps, return and length of each episode or evaluation of one run; or x and y of an error of its
    model, under the same names."""
    if suite.collect in MODEL_ERROR:
        from . import model_error

        points = getattr(model_error, MODEL_ERROR[suite.collect])(run)
        return [[str(x), number(error), "0"] for x, error in points]
    group = GROUP[suite.collect]
    returns, lengths = read_scalars(run, f"{group}/episodic_return", f"{group}/episodic_length")
    needed = suite.first_episodes or 1  # a run without a row would drop out of the mean, and the worst runs first
    if len(returns) < needed:
        raise Incomplete(f"{run} has {len(returns)} {suite.collect}, not {needed}: its total_timesteps are too few")
    returns, lengths = returns[: suite.first_episodes], lengths[: suite.first_episodes]
    return [
        [str(step), number(episodic_return), number(length)]
        for (step, episodic_return, _), (_, length, _) in zip(returns, lengths, strict=True)
    ]


def times_of(run: Path, wall_seconds: float) -> list[list[str]]:
    """Environment steps and seconds since the start of each evaluation of a run. One that was interrupted took
    `wall_seconds` without its pauses: what is too much is taken from the longest waits between two events."""
    files = sorted(run.glob("events.*"))
    clock = np.array([event.wall_time for path in files for event in LegacyEventFileLoader(str(path)).Load()])
    waits = np.diff(clock, prepend=clock[0]).clip(min=0)
    usual = np.median(waits)
    for index in waits.argsort()[::-1]:
        pause = min(waits[index] - usual, waits.sum() - wall_seconds)
        if pause <= 0:
            break
        waits[index] -= pause
    (points,) = read_scalars(run, "eval/episodic_return")
    passed = waits.cumsum()[clock.searchsorted([time for _, _, time in points])]
    return [[str(step), f"{seconds:.1f}"] for (step, _, _), seconds in zip(points, passed, strict=True)]


def write_csv(path: Path, columns: list[str], rows: Iterable[list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def collect_suite(suite: Suite) -> None:
    """Writes the CSV files of a suite."""
    rows, run_rows, time_rows = [], [], []
    for entry, seed, run in runs_of(suite):
        run_of = [entry.label, entry.env_id, seed]
        rows += [run_of + row for row in rows_of(suite, run)]
        result = json.loads((run / "result.json").read_text())
        if suite.collect == "evaluations":
            time_rows += [run_of + row for row in times_of(run, result["wall_seconds"])]
        result["wall_seconds"] = round(result["wall_seconds"], 2)
        run_rows.append(run_of + [result[column] for column in RUN_COLUMNS[3:]])
    write_csv(RESULTS / f"{suite.name}.csv", COLUMNS, rows)
    write_csv(RESULTS / f"{suite.name}_runs.csv", RUN_COLUMNS, run_rows)
    if time_rows:
        write_csv(RESULTS / f"{suite.name}_times.csv", TIME_COLUMNS, time_rows)
