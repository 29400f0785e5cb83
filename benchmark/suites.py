"""The declared suites: for each figure what is run, what of it is collected, and how it is drawn.

A further algorithm or environment is one more `Entry`: after it, `run` makes only the runs that are missing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "benchmark" / "runs"
RESULTS = ROOT / "benchmark" / "results"


class Incomplete(Exception):
    """Something that a suite declares is not there yet. The message says what to do about it."""


@dataclass(frozen=True)
class Entry:
    """One line of a figure: a script with its arguments, run with the seeds 1, 2, ..., `seeds`."""

    label: str
    script: str
    env_id: str
    total_timesteps: int
    seeds: int
    arguments: str = ""
    """Further arguments, as typed on the command line; those of the suite stand before them."""
    baseline: bool = False
    """What the others are compared with: drawn in grey."""
    gpus: float = 0.0
    """GPUs that a run is given on a cluster; half of one: two runs share it."""


@dataclass(frozen=True)
class Suite:
    """A comparison: its runs, what is collected of them, and one figure, with a panel for each environment."""

    name: str
    title: str
    entries: tuple[Entry, ...]
    arguments: str
    """Arguments of every entry."""
    collect: Literal["episodes", "evaluations"]
    """A row of the table is a training episode, or an evaluation."""
    curve: Literal["length", "cumulative return", "return"]
    """Against the number of the episode, against the environment steps, against the environment steps."""
    statistic: Literal["mean", "iqm"]
    """Mean +- 1 standard error, or interquartile mean with its 95 % bootstrap interval; both over the seeds."""
    xlabel: str
    ylabel: str
    xlim: tuple[float, float]
    ylim: tuple[float, float]
    table_at: tuple[int, ...]
    """The x of the columns of the table that `plot` prints."""
    first_episodes: int | None = None
    """Collect so many episodes of each run; None: all."""
    vertical: tuple[float, str] | None = None
    """Where to draw a thin dashed line, and what to write on it."""
    horizontal: tuple[float, str] | None = None
    threshold: float | None = None
    """The return that counts as solved: the report says after how many steps and minutes an evaluation reached it."""
    quoted: tuple[tuple[str, ...], ...] = ()
    """Rows that the table ends with: what others have measured, at `table_at`."""


MODEL_OFF = "--real-ratio 1 --updates-per-step 1"
EVALUATIONS: dict[str, Any] = {
    "collect": "evaluations",
    "curve": "return",
    "statistic": "iqm",
    "xlabel": "environment steps",
    "ylabel": "mean return of an evaluation",
}

DECLARED = (
    # The book's parameters. `--model last` is the book's table; the default gives the same numbers in this maze.
    Suite(
        name="figure_8_2",
        title="Dyna maze: steps per episode (Sutton & Barto, Figure 8.2)",
        entries=(
            Entry("Q-learning (n=0)", "dyna_q.py", "DynaMaze-v0", 15_000, 30, "--n-planning 0", baseline=True),
            Entry("Dyna-Q (n=5)", "dyna_q.py", "DynaMaze-v0", 6_000, 30, "--n-planning 5"),
            Entry("Dyna-Q (n=50)", "dyna_q.py", "DynaMaze-v0", 6_000, 30, "--n-planning 50"),
        ),
        arguments="--alpha 0.1 --gamma 0.95 --epsilon 0.1 --model last",
        collect="episodes",
        first_episodes=50,
        curve="length",
        statistic="mean",
        xlabel="episode",
        ylabel="steps per episode",
        xlim=(2, 50),
        ylim=(0, 800),
        table_at=(1, 2, 3, 5, 10, 20, 30, 50),
        quoted=(
            ("*ShangtongZhang's chapter08 code, 30 runs*",),
            ("Q-learning (n=0)", "843.7", "693.5", "609.1", "340.0", "113.2", "37.7", "20.7", "18.2"),
            ("Dyna-Q (n=5)", "598.2", "143.0", "76.2", "25.1", "17.1", "16.4", "16.1", "16.7"),
            ("Dyna-Q (n=50)", "960.0", "39.1", "17.2", "17.0", "16.7", "16.6", "16.7", "16.1"),
        ),
    ),
    # The book names neither alpha nor n nor kappa of the next two: these are the values of ShangtongZhang's code.
    Suite(
        name="figure_8_4",
        title="Blocking maze: cumulative reward (Sutton & Barto, Figure 8.4)",
        entries=(
            Entry("Dyna-Q", "dyna_q.py", "BlockingMaze-v0", 3_000, 30, baseline=True),
            Entry("Dyna-Q+", "dyna_q_plus.py", "BlockingMaze-v0", 3_000, 30, "--kappa 1e-4"),
        ),
        arguments="--alpha 1.0 --gamma 0.95 --epsilon 0.1 --n-planning 10 --model last",
        collect="episodes",
        curve="cumulative return",
        statistic="mean",
        xlabel="environment steps",
        ylabel="cumulative reward",
        xlim=(0, 3_000),
        ylim=(0, 150),
        table_at=(1_000, 2_000, 3_000),
        vertical=(1_000, "the way is blocked,\na longer one opens"),
        quoted=(
            ("*ShangtongZhang's chapter08 code, 30 runs*",),
            ("Dyna-Q", "47.5", "61.6", "88.2"),
            ("Dyna-Q+", "60.9", "82.5", "136.4"),
        ),
    ),
    Suite(
        name="figure_8_5",
        title="Shortcut maze: cumulative reward (Sutton & Barto, Figure 8.5)",
        entries=(
            Entry("Dyna-Q", "dyna_q.py", "ShortcutMaze-v0", 6_000, 30, baseline=True),
            Entry("Dyna-Q+", "dyna_q_plus.py", "ShortcutMaze-v0", 6_000, 30, "--kappa 1e-3"),
        ),
        arguments="--alpha 1.0 --gamma 0.95 --epsilon 0.1 --n-planning 50 --model last",
        collect="episodes",
        curve="cumulative return",
        statistic="mean",
        xlabel="environment steps",
        ylabel="cumulative reward",
        xlim=(0, 6_000),
        ylim=(0, 400),
        table_at=(1_000, 2_000, 3_000, 4_000, 5_000, 6_000),
        vertical=(3_000, "a shortcut opens"),
        quoted=(
            ("*ShangtongZhang's chapter08 code, 27 runs*",),
            ("Dyna-Q", "30.0", "82.1", "137.0", "191.7", "246.3", "302.3"),
            ("Dyna-Q+", "37.6", "86.8", "136.9", "202.7", "282.5", "364.2"),
        ),
    ),
    # 0.740: the best of all 4^11 stationary policies within the 100 steps of an episode, computed from `env.P`.
    # A stochastic world, in which the book's model of the last outcome is wrong.
    Suite(
        name="frozen_lake",
        title="FrozenLake-v1, slippery: return of the greedy policy",
        entries=(
            Entry("Q-learning (n=0)", "dyna_q.py", "FrozenLake-v1", 20_000, 20, "--n-planning 0", baseline=True),
            Entry("Dyna-Q (n=5)", "dyna_q.py", "FrozenLake-v1", 20_000, 20, "--n-planning 5"),
            Entry("Dyna-Q (n=50)", "dyna_q.py", "FrozenLake-v1", 20_000, 20, "--n-planning 50"),
            Entry("last outcome (n=50)", "dyna_q.py", "FrozenLake-v1", 20_000, 20, "--n-planning 50 --model last"),
        ),
        arguments="--alpha 0.1 --gamma 0.99 --epsilon 0.1 --eval-every 1000 --eval-episodes 100",
        collect="evaluations",
        curve="return",
        statistic="iqm",
        xlabel="environment steps",
        ylabel="mean return of 100 episodes",
        xlim=(0, 20_000),
        ylim=(0, 0.8),
        table_at=(1_000, 2_000, 5_000, 10_000, 20_000),
        horizontal=(0.740, "best policy"),
    ),
    # Continuous control. Where mbpo.py has `--real-ratio 1` it has no model: it is plain soft actor-critic.
    Suite(
        name="pendulum",
        title="Pendulum-v1",
        entries=(
            Entry("MBPO", "mbpo.py", "Pendulum-v1", 3_000, 5),
            Entry("SAC, 1 update a step", "mbpo.py", "Pendulum-v1", 8_000, 5, MODEL_OFF, baseline=True),
        ),
        arguments="--eval-every 250",
        xlim=(0, 8_000),
        ylim=(-1_700, 0),
        table_at=(500, 1_000, 2_000, 3_000, 4_000, 6_000, 8_000),
        threshold=-200,
        **EVALUATIONS,
    ),
    Suite(
        name="inverted_pendulum",
        title="InvertedPendulum-v5",
        entries=(
            Entry("SAC, 1 update a step", "mbpo.py", "InvertedPendulum-v5", 6_000, 5, MODEL_OFF, baseline=True),
            Entry("MBPO", "mbpo.py", "InvertedPendulum-v5", 3_000, 5),
        ),
        arguments="--eval-every 500",
        xlim=(0, 6_000),
        ylim=(0, 1_050),
        table_at=(1_000, 2_000, 3_000, 4_000, 6_000),
        threshold=950,
        **EVALUATIONS,
    ),
    Suite(
        name="double_pendulum",
        title="InvertedDoublePendulum-v5",
        entries=(
            Entry("SAC, 1 update a step", "mbpo.py", "InvertedDoublePendulum-v5", 5_000, 3, MODEL_OFF, baseline=True),
            Entry("MBPO", "mbpo.py", "InvertedDoublePendulum-v5", 5_000, 3),
        ),
        arguments="--eval-every 1000",
        xlim=(0, 5_000),
        ylim=(0, 9_500),
        table_at=(1_000, 2_000, 3_000, 4_000, 5_000),
        threshold=9_000,
        **EVALUATIONS,
    ),
    Suite(
        name="reacher",
        title="Reacher-v5",
        entries=(
            Entry("SAC, 1 update a step", "mbpo.py", "Reacher-v5", 5_000, 3, MODEL_OFF, baseline=True),
            Entry("MBPO", "mbpo.py", "Reacher-v5", 5_000, 3),
        ),
        arguments="--eval-every 1000",
        xlim=(0, 5_000),
        ylim=(-40, 0),
        table_at=(1_000, 2_000, 3_000, 4_000, 5_000),
        threshold=-9.4,
        **EVALUATIONS,
    ),
)
SUITES = {suite.name: suite for suite in DECLARED}
