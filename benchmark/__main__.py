"""Runs, collects and draws the comparisons that are declared in `benchmark/suites.py`.

    python -m benchmark all SUITE       one command per figure: run, collect, plot
    python -m benchmark run SUITE       make the runs that are missing, in benchmark/runs; --ray: on a cluster
    python -m benchmark collect SUITE   TensorBoard events -> benchmark/results/SUITE.csv
    python -m benchmark plot SUITE      benchmark/results/SUITE.csv -> benchmark/results/SUITE.svg
    python -m benchmark report          all CSV files -> the tables of the README.md files
    python -m benchmark speed SCRIPT    how fast dyna_q, cem_mpc, mbpo, muzero, dreamer or td_mpc2 is
    python -m benchmark games RUN       all games of tic-tac-toe against the agent of a run of muzero.py
    python -m benchmark play RUN        play against it yourself
    python -m benchmark foresight RUN   what an agent of td_mpc2.py foresaw along an episode, and what came: an SVG

SUITE can be `every`: `all every` makes all from nothing, which takes days; `plot every` draws what has its CSV file.
From the root of the repository. An interrupted run continues where it stopped when the command is given again.
"""

import importlib
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro

from .collect import collect_suite
from .plot import plot_suite
from .plot import report as write_report
from .run import run_suite
from .suites import RESULTS, SUITES, Incomplete, Suite

HELP = f"One of {', '.join(SUITES)}; or every, for all of them."
SuiteName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SUITE", help=HELP)]
Script = Annotated[Literal["dyna_q", "cem_mpc", "mbpo", "muzero", "dreamer", "td_mpc2"], tyro.conf.Positional]
Workers = Annotated[int, tyro.conf.arg(help="How many runs to make side by side, one thread each.")]


def fail(message: str, status: int) -> NoReturn:
    print(f"benchmark: error: {message}", file=sys.stderr)
    sys.exit(status)


def need_matplotlib() -> None:
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        fail(f"drawing needs pip install -r benchmark/requirements.txt: {error}", 2)


def find_suites(name: str) -> list[Suite]:
    """The suite of this name, or every one; one line and exit status 2 if there is none."""
    if name not in (*SUITES, "every"):
        fail(f"there is no suite {name}; the suites are {', '.join(SUITES)}", 2)
    return list(SUITES.values()) if name == "every" else [SUITES[name]]


def run(suite: SuiteName, workers: Workers = 2, ray: str | None = None) -> None:
    """Make the runs of a suite that are missing.

    Args:
        ray: Address of a Ray cluster to make them on (`auto`: where this machine belongs to one), or `local`.
    """
    declared = find_suites(suite)
    if workers < 1:
        fail(f"--workers must be at least 1, not {workers}", 2)
    if ray is None:
        failed = sum(run_suite(each, workers) for each in declared)
    else:
        try:
            from .cluster import run_on_cluster
        except ImportError as error:
            fail(f"--ray needs pip install ray: {error}", 2)
        try:
            failed = sum(run_on_cluster(each, ray) for each in declared)
        except ConnectionError as error:
            fail(f"no Ray cluster at {ray}: {error}", 2)
    if failed:
        fail(f"{failed} runs of {suite} failed", 1)


def collect(suite: SuiteName) -> None:
    """Write the CSV files of a suite from its TensorBoard events."""
    try:
        for each in find_suites(suite):
            collect_suite(each)
    except Incomplete as error:
        fail(str(error), 1)


def plot(suite: SuiteName) -> None:
    """Draw the figure of a suite from its CSV file, and print its numbers; `every`: of all that have a CSV file."""
    need_matplotlib()
    try:
        for each in find_suites(suite):
            if suite != "every" or (RESULTS / f"{each.name}.csv").exists():
                plot_suite(each)
    except Incomplete as error:
        fail(str(error), 1)


def run_collect_plot(suite: SuiteName, workers: Workers = 2) -> None:
    """Run, collect and plot a suite."""
    need_matplotlib()
    run(suite, workers)
    collect(suite)
    plot(suite)


def report() -> None:
    """Write the tables of benchmark/README.md and benchmark/claims/README.md from the CSV files."""
    try:
        write_report(list(SUITES.values()))
    except Incomplete as error:
        fail(str(error), 1)


def speed(script: Script, peer: Path | None = None, rounds: int = 7, device: Literal["cpu", "cuda"] = "cpu") -> None:
    """Measure how fast a script is.

    Args:
        peer: Checkout of what to compare with; benchmark/README.md says of which repository.
        rounds: How often each contestant is measured; the medians are printed.
        device: Where. On a GPU only dreamer is measured.
    """
    if device == "cuda" and script != "dreamer":
        fail(f"{script} is measured on a CPU only", 2)
    try:
        measure = importlib.import_module(f"benchmark.speed_{script}").measure
        print(measure(peer, rounds) if device == "cpu" else measure(peer, rounds, device))
    except FileNotFoundError as error:
        fail(str(error), 2)


def games(runs: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Count what an opponent can achieve against tic-tac-toe agents.

    Args:
        runs: Run folders of muzero.py.
    """
    from . import tic_tac_toe

    try:
        print(tic_tac_toe.measure(list(runs)))
    except (OSError, tic_tac_toe.muzero.Failure) as error:
        fail(str(error), 2)


def play(run: tyro.conf.Positional[str]) -> None:
    """Play against an agent.

    Args:
        run: Run folder of muzero.py.
    """
    from . import tic_tac_toe

    try:
        tic_tac_toe.play(run)
    except (OSError, tic_tac_toe.muzero.Failure) as error:
        fail(str(error), 2)


def foresight(run: tyro.conf.Positional[str], out: Path = RESULTS / "foresight.svg") -> None:
    """Draw rewards and values along an episode, as they were foreseen and as they came.

    Args:
        run: Run folder of td_mpc2.py.
        out: The picture.
    """
    from . import foresight as picture

    need_matplotlib()
    try:
        picture.draw(run, out)
    except (OSError, picture.td_mpc2.Failure) as error:
        fail(str(error), 2)


def stop(number: int, _: Any) -> None:
    """Leaves as after Ctrl-C, so that the running scripts are told to stop."""
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    commands = {
        "all": run_collect_plot,
        "run": run,
        "collect": collect,
        "plot": plot,
        "report": report,
        "speed": speed,
        "games": games,
        "play": play,
        "foresight": foresight,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="python -m benchmark", description=__doc__)
    except KeyboardInterrupt:
        sys.exit(130)
