"""The declared suites: for each figure what is run, what of it is collected, and how it is drawn.

A further algorithm or environment is one more `Entry`: after it, `run` makes only the runs that are missing.
"""

from dataclasses import dataclass, replace
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
    collect: Literal[
        "episodes", "evaluations", "error by steps ahead", "error by disagreement", "optimism by steps ahead"
    ]
    """A row of the table is a training episode, an evaluation, or what `model_error.py` measures."""
    curve: Literal["length", "cumulative return", "return"]
    """Against the number of the episode, against the environment steps, against the environment steps (or whatever the
    x of `collect` is)."""
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
    published: tuple[tuple[str, tuple[tuple[float, float], ...]], ...] = ()
    """Curves of others, to draw dashed beside the runs: a label, and (environment steps, return) of each point."""


ONE_NETWORK = "--ensemble-size 1 --num-elites 1"
MODEL_OFF = "--real-ratio 1 --updates-per-step 1"
DM_CONTROL = "benchmark.tasks:DMControl-v0"
PETS_PENDULUM = Entry("PETS", "cem_mpc.py", "Pendulum-v1", 1_000, 5)
MBPO_PENDULUM = Entry("MBPO", "mbpo.py", "Pendulum-v1", 3_000, 5)
MUZERO_CART_POLE = Entry("MuZero", "muzero.py", "CartPole-v1", 30_000, 10, "--eval-episodes 20")
DREAMER_CART_POLE = Entry("Dreamer (GPU)", "dreamer.py", "CartPole-v1", 50_000, 5, gpus=0.1)
SB3 = "benchmark/baselines.py"
CUMULATIVE: dict[str, Any] = {
    "collect": "episodes",
    "curve": "cumulative return",
    "statistic": "mean",
    "xlabel": "environment steps",
    "ylabel": "cumulative reward",
}
SHORTCUT: dict[str, Any] = CUMULATIVE | {
    "arguments": "--alpha 1.0 --gamma 0.95 --epsilon 0.1 --n-planning 50 --model last",
    "xlim": (0, 6_000),
    "ylim": (0, 400),
    "table_at": (1_000, 2_000, 3_000, 4_000, 5_000, 6_000),
    "vertical": (3_000, "a shortcut opens"),
}
EVALUATIONS: dict[str, Any] = {
    "collect": "evaluations",
    "curve": "return",
    "statistic": "iqm",
    "xlabel": "environment steps",
    "ylabel": "mean return of an evaluation",
}
CART_POLE: dict[str, Any] = EVALUATIONS | {"arguments": "--eval-every 1000", "ylim": (0, 520), "threshold": 475}
MBPO_CLAIM: dict[str, Any] = EVALUATIONS | {
    "arguments": "--eval-every 250",
    "xlim": (0, 3_000),
    "ylim": (-1_700, 0),
    "table_at": (750, 1_000, 1_500, 2_000, 2_500, 3_000),
    "threshold": -200,
}


def planning(env_id: str, total_timesteps: int) -> tuple[Entry, ...]:
    """Q-learning, and Dyna-Q with 5 and with 50 planning updates a step."""
    return (
        Entry("Q-learning (n=0)", "dyna_q.py", env_id, total_timesteps, 20, "--n-planning 0", baseline=True),
        Entry("Dyna-Q (n=5)", "dyna_q.py", env_id, total_timesteps, 20, "--n-planning 5"),
        Entry("Dyna-Q (n=50)", "dyna_q.py", env_id, total_timesteps, 20, "--n-planning 50"),
    )


def control(env_id: str) -> tuple[Entry, ...]:
    """MBPO with and without its model, for 5,000 steps."""
    return (
        Entry("MBPO", "mbpo.py", env_id, 5_000, 3),
        Entry("without model, 1 update a step", "mbpo.py", env_id, 5_000, 5, MODEL_OFF, baseline=True),
        Entry("SB3 SAC", SB3, env_id, 5_000, 5, "--algorithm sac", baseline=True),
    )


DECLARED = (
    # The book's parameters. `--model last` is the book's table; the default gives the same numbers in this maze.
    Suite(
        name="figure_8_2",
        title="Dyna maze: steps per episode (Sutton & Barto, Figure 8.2)",
        entries=(
            Entry("Q-learning (n=0)", "dyna_q.py", "DynaMaze-v0", 15_000, 30, "--n-planning 0", baseline=True),
            Entry("Dyna-Q (n=5)", "dyna_q.py", "DynaMaze-v0", 10_000, 30, "--n-planning 5"),
            Entry("Dyna-Q (n=50)", "dyna_q.py", "DynaMaze-v0", 10_000, 30, "--n-planning 50"),
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
        xlim=(0, 3_000),
        ylim=(0, 150),
        table_at=(1_000, 2_000, 3_000),
        vertical=(1_000, "the way is blocked,\na longer one opens"),
        **CUMULATIVE,
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
        **SHORTCUT,
        quoted=(
            ("*ShangtongZhang's chapter08 code, 27 runs*",),
            ("Dyna-Q", "30.0", "82.1", "137.0", "191.7", "246.3", "302.3"),
            ("Dyna-Q+", "37.6", "86.8", "136.9", "202.7", "282.5", "364.2"),
        ),
    ),
    Suite(
        name="exercise_8_4",
        title="Shortcut maze: three ways to explore (Sutton & Barto, Exercise 8.4)",
        entries=(
            Entry("Dyna-Q", "dyna_q.py", "ShortcutMaze-v0", 6_000, 30, baseline=True),
            Entry("bonus in planning", "dyna_q_plus.py", "ShortcutMaze-v0", 6_000, 30, "--kappa 1e-3"),
            Entry("bonus in acting", "benchmark/bonus_in_acting.py", "ShortcutMaze-v0", 6_000, 30, "--kappa 1e-3"),
            Entry("optimistic start", "dyna_q.py", "ShortcutMaze-v0", 6_000, 30, "--initial-q 1"),
        ),
        **SHORTCUT,
    ),
    # 0.740: the best of all 4^11 stationary policies within the 100 steps of an episode, computed from `env.P`.
    # A stochastic world, in which the book's model of the last outcome is wrong.
    Suite(
        name="frozen_lake",
        title="FrozenLake-v1, slippery: return of the greedy policy",
        entries=(
            *planning("FrozenLake-v1", 20_000),
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
    # The best returns, by value iteration from the transition probabilities: 7.93 in Taxi (mean over its starts, of
    # which an evaluation sees 50), -13.
    Suite(
        name="taxi",
        title="Taxi-v4: return of the greedy policy",
        entries=planning("Taxi-v4", 60_000),
        arguments="--alpha 0.5 --gamma 0.99 --epsilon 0.1 --eval-every 2000 --eval-episodes 50",
        xlim=(0, 60_000),
        ylim=(-200, 20),
        table_at=(2_000, 6_000, 10_000, 20_000, 40_000, 60_000),
        horizontal=(7.93, "best policy"),
        threshold=6,
        **EVALUATIONS,
    ),
    Suite(
        name="cliff_walking",
        title="CliffWalking-v1: return of the greedy policy",
        entries=planning("CliffWalking-v1", 10_000),
        arguments="--alpha 0.5 --gamma 1 --epsilon 0.1 --eval-every 200 --eval-episodes 1",
        xlim=(0, 4_000),
        ylim=(-1_000, 0),
        table_at=(200, 400, 600, 1_000, 2_000, 3_000, 10_000),
        horizontal=(-13, "best policy"),
        threshold=-13,
        **EVALUATIONS,
    ),
    # Continuous control. Where mbpo.py has `--real-ratio 1` it has no model: it is plain soft actor-critic.
    Suite(
        name="pendulum",
        title="Pendulum-v1",
        entries=(
            PETS_PENDULUM,
            Entry("TD-MPC2", "td_mpc2.py", "Pendulum-v1", 3_000, 5, "--eval-every 1000"),
            MBPO_PENDULUM,
            Entry("without model", "mbpo.py", "Pendulum-v1", 8_000, 5, MODEL_OFF, baseline=True),
            Entry("SB3 SAC", SB3, "Pendulum-v1", 8_000, 5, "--algorithm sac", baseline=True),
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
            Entry("PETS", "cem_mpc.py", "InvertedPendulum-v5", 3_000, 5, "--eval-every 2000"),
            Entry("MBPO", "mbpo.py", "InvertedPendulum-v5", 3_000, 5),
            Entry(
                "without model, 10 updates a step",
                "mbpo.py",
                "InvertedPendulum-v5",
                3_000,
                5,
                "--real-ratio 1",
                baseline=True,
            ),
            Entry(
                "without model, 1 update a step", "mbpo.py", "InvertedPendulum-v5", 6_000, 5, MODEL_OFF, baseline=True
            ),
            Entry("SB3 SAC", SB3, "InvertedPendulum-v5", 6_000, 5, "--algorithm sac", baseline=True),
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
        entries=control("InvertedDoublePendulum-v5"),
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
        entries=(Entry("PETS", "cem_mpc.py", "Reacher-v5", 1_000, 3, "--eval-every 250"), *control("Reacher-v5")),
        arguments="--eval-every 1000 --eval-episodes 20",
        xlim=(0, 5_000),
        ylim=(-30, 0),
        table_at=(1_000, 2_000, 3_000, 4_000, 5_000),
        threshold=-9.4,
        **EVALUATIONS,
    ),
    # The authors' settings, who go on to 400,000 steps. A run of MBPO makes 200,000 updates of its policy.
    Suite(
        name="half_cheetah",
        title="HalfCheetah-v5",
        entries=(
            Entry("PETS", "cem_mpc.py", "HalfCheetah-v5", 10_000, 1, "--train-every 250 --eval-every 5000"),
            Entry("MBPO", "mbpo.py", "HalfCheetah-v5", 10_000, 3),
            Entry(
                "without model, 40 updates a step",
                "mbpo.py",
                "HalfCheetah-v5",
                10_000,
                3,
                "--real-ratio 1",
                baseline=True,
            ),
            Entry("SB3 SAC", SB3, "HalfCheetah-v5", 100_000, 3, "--algorithm sac --eval-every 5000", baseline=True),
        ),
        arguments="--eval-every 1000",
        xlim=(0, 100_000),
        ylim=(-500, 6_000),
        table_at=(5_000, 6_000, 7_000, 8_000, 9_000, 10_000, 20_000, 50_000, 100_000),
        threshold=2_000,
        **EVALUATIONS,
    ),
    # A step is one decision of the agent, two of the simulator's steps. MR.Q (Fujimoto et al. 2025) has published its
    # returns from 5,000 of them on; TD-MPC2 and DreamerV3 from 50,000 on (nicklashansen/tdmpc2, `results`). All means.
    *(
        Suite(
            name=name,
            title=f"{task} of dm_control, actions repeated twice",
            entries=(
                Entry("PETS", "cem_mpc.py", DM_CONTROL, 5_000, 3, f"--env-kwargs task {task} repeat 2 flat True"),
            ),
            arguments="--train-every 250 --terminal-value --eval-every 5000 --eval-episodes 1",
            xlim=(0, 50_000),
            ylim=(0, 1_000),
            table_at=(1_000, 2_000, 3_000, 4_000, 5_000, 10_000, 25_000, 50_000),
            published=(("MR.Q, published", mr_q),),
            quoted=(
                ("*MR.Q, published*", *[""] * 4, *(str(dict(mr_q)[x]) for x in (5_000, 10_000, 25_000, 50_000))),
                ("*TD-MPC2, published*", *[""] * 7, td_mpc2),
                ("*DreamerV3, published*", *[""] * 7, dreamer),
            ),
            **EVALUATIONS | {"collect": "episodes", "ylabel": "return of an episode"},
        )
        for name, task, mr_q, td_mpc2, dreamer in (
            (
                "dm_cart_pole",
                "cartpole-swingup",
                ((5_000, 73), (10_000, 73), (15_000, 414), (20_000, 638), (25_000, 795), (50_000, 853)),
                "839",
                "677",
            ),
            (
                "dm_reacher",
                "reacher-easy",
                ((5_000, 130), (10_000, 69), (15_000, 198), (20_000, 583), (25_000, 734), (50_000, 940)),
                "937",
                "872",
            ),
        )
    ),
    # Discrete actions.
    Suite(
        name="cart_pole",
        title="CartPole-v1",
        entries=(
            Entry("PETS", "cem_mpc.py", "CartPole-v1", 2_000, 5, "--eval-every 500"),
            MUZERO_CART_POLE,
            DREAMER_CART_POLE,
            Entry("SB3 DQN", SB3, "CartPole-v1", 30_000, 5, "--algorithm dqn", baseline=True),
            Entry("SB3 PPO", SB3, "CartPole-v1", 30_000, 5, "--algorithm ppo", baseline=True),
        ),
        xlim=(0, 50_000),
        table_at=(500, 1_000, 2_000, 3_000, 4_000, 5_000, 6_000, 10_000, 20_000, 30_000, 50_000),
        **CART_POLE,
    ),
    Suite(
        name="acrobot",
        title="Acrobot-v1",
        entries=(
            Entry("PETS", "cem_mpc.py", "Acrobot-v1", 2_000, 5, "--eval-every 500 --eval-episodes 5"),
            Entry("MuZero", "muzero.py", "Acrobot-v1", 20_000, 5),
            Entry("Dreamer", "dreamer.py", "Acrobot-v1", 20_000, 3, "--eval-every 2000 --eval-episodes 5"),
            Entry("SB3 DQN", SB3, "Acrobot-v1", 20_000, 5, "--algorithm dqn", baseline=True),
            Entry("SB3 PPO", SB3, "Acrobot-v1", 20_000, 5, "--algorithm ppo", baseline=True),
        ),
        arguments="--eval-every 1000 --eval-episodes 20",
        xlim=(0, 20_000),
        ylim=(-500, 0),
        table_at=(500, 1_000, 2_000, 4_000, 6_000, 8_000, 10_000, 14_000, 20_000),
        threshold=-100,
        **EVALUATIONS,
    ),
    Suite(
        name="lunar_lander",
        title="LunarLander-v3",
        entries=(Entry("MuZero", "muzero.py", "LunarLander-v3", 100_000, 3),),
        arguments="--eval-every 10000 --eval-episodes 20",
        xlim=(0, 100_000),
        ylim=(-600, 300),
        table_at=(10_000, 20_000, 30_000, 50_000, 70_000, 100_000),
        threshold=200,
        **EVALUATIONS,
    ),
    Suite(
        name="tic_tac_toe",
        title="Tic-tac-toe by self-play: evaluation against perfect play, of which no more than 0 can be had",
        entries=(Entry("MuZero", "muzero.py", "TicTacToe-v0", 50_000, 5),),
        arguments="--eval-env-kwargs opponent benchmark.tic_tac_toe:perfect",
        xlim=(0, 50_000),
        ylim=(-1, 0.05),
        table_at=(5_000, 10_000, 20_000, 30_000, 40_000, 50_000),
        **EVALUATIONS,
    ),
    Suite(
        name="dreamer_pendulum",
        title="Pendulum-v1",
        entries=(Entry("Dreamer (GPU)", "dreamer.py", "Pendulum-v1", 30_000, 3, gpus=0.1),),
        arguments="",
        xlim=(0, 30_000),
        ylim=(-1_700, 0),
        table_at=(2_000, 5_000, 10_000, 15_000, 20_000, 30_000),
        threshold=-250,
        **EVALUATIONS,
    ),
    # Batches and step size are the authors'; so were size and ratio (now theirs are 1m and 1,024). They count the
    # simulator's steps, two for each of ours: the points are those at 10, 20, 30 and 50 thousand of theirs
    # (danijar/dreamerv3, `scores`, mean of 5 seeds).
    Suite(
        name="dreamer_reacher",
        title="reacher-easy of dm_control, actions repeated twice",
        entries=(Entry("Dreamer (GPU)", "dreamer.py", DM_CONTROL, 22_500, 2, gpus=0.5),),
        arguments="--size 12m --batch-length 64 --imagination-starts 64 --train-ratio 512 --learning-rate 4e-5 "
        "--warmup 1000 --eval-every 2500",
        xlim=(0, 25_000),
        ylim=(0, 1_000),
        table_at=(2_500, 5_000, 7_500, 10_000, 12_500, 15_000, 17_500, 20_000, 22_500, 25_000),
        published=(("DreamerV3, in training", ((5_000, 71.8), (10_000, 36.2), (15_000, 359.0), (25_000, 630.8))),),
        quoted=(("*DreamerV3, in training, published*", "", "71.8", "", "36.2", "", "359.0", "", "", "", "630.8"),),
        **EVALUATIONS,
    ),
    Suite(
        name="pictures_and_memory",
        title="Dreamer: a game of pictures, and a task of memory",
        entries=(
            Entry("Dreamer", "dreamer.py", "benchmark.tasks:Catch-v0", 8_000, 3, "--image-size 0"),
            Entry("Dreamer", "dreamer.py", "benchmark.tasks:Recall-v0", 8_000, 3, "--env-kwargs delay 3"),
        ),
        arguments="--eval-every 1000 --eval-episodes 50 --warmup 1000 --entropy-scale 3e-3",
        xlim=(0, 8_000),
        ylim=(-1, 1),
        table_at=(1_000, 2_000, 4_000, 6_000, 8_000),
        **EVALUATIONS,
    ),
    # The other planners, each with its defaults. An episode is planned as an evaluation is: nothing is explored.
    Suite(
        name="planners",
        title="Planners with a learned ensemble (Pendulum-v1)",
        entries=(
            replace(PETS_PENDULUM, label="CEM", arguments="--eval-every 250"),
            *(
                Entry(label, "cem_mpc.py", "Pendulum-v1", 800, 5, f"--eval-episodes 1 {arguments}")
                for label, arguments in (
                    ("CEM, TS1", "--sampling ts1"),
                    ("iCEM", "--planner icem"),
                    ("gradient", "--planner gradient"),
                    ("random shooting", "--planner random_shooting"),
                )
            ),
        ),
        arguments="",
        xlim=(200, 800),
        ylim=(-1_300, 0),
        table_at=(200, 400, 600, 800),
        **EVALUATIONS | {"collect": "episodes", "ylabel": "return of an episode"},
    ),
    # MuZero without one of its parts.
    Suite(
        name="claims/muzero_parts",
        title="MuZero without one of its parts (CartPole-v1)",
        entries=(
            replace(MUZERO_CART_POLE, baseline=True),
            *(
                Entry(label, "muzero.py", "CartPole-v1", 8_000, 5, f"--eval-episodes 20 {arguments}")
                for label, arguments in (
                    ("pUCT", "--search puct"),
                    ("no consistency loss", "--consistency-weight 0"),
                    ("no reanalysis", "--reanalyze-ratio 0 --follow 0"),
                    ("priorities", "--priority-exponent 1"),
                    ("all n rewards", "--follow 0"),
                    ("min_range 0", "--min-range 0"),
                )
            ),
        ),
        xlim=(0, 8_000),
        table_at=(1_000, 2_000, 3_000, 4_000, 5_000, 6_000, 7_000, 8_000),
        **CART_POLE,
    ),
    # Dreamer with the observations that the authors' has: after symlog, and not standardised.
    Suite(
        name="claims/dreamer_parts",
        title="Dreamer with and without standardised observations (CartPole-v1)",
        entries=(
            DREAMER_CART_POLE,
            Entry("not standardised", "dreamer.py", "CartPole-v1", 10_000, 5, "--no-standardise"),
        ),
        xlim=(0, 10_000),
        table_at=(1_000, 2_000, 3_000, 4_000, 5_000, 6_000, 8_000, 10_000),
        **CART_POLE,
    ),
    # What the textbooks say, measured: benchmark/claims.
    Suite(
        name="claims/model_error",
        title="Error of the model, by the steps that it looks ahead (Pendulum-v1)",
        entries=(PETS_PENDULUM,),
        arguments="--eval-every 250",
        xlim=(0, 50),
        ylim=(0, 1.5),
        table_at=(1, 2, 5, 10, 20, 50),
        **EVALUATIONS
        | {
            "collect": "error by steps ahead",
            "xlabel": "steps ahead",
            "ylabel": "error (deviations of the observation)",
        },
    ),
    Suite(
        name="claims/disagreement",
        title="Error of the model, by the disagreement of its networks (Pendulum-v1)",
        entries=(PETS_PENDULUM,),
        arguments="--eval-every 250",
        xlim=(1, 10),
        ylim=(0, 0.2),
        table_at=(1, 2, 3, 4, 5, 6, 7, 8, 9, 10),
        **EVALUATIONS
        | {
            "collect": "error by disagreement",
            "xlabel": "tenth of the steps, by disagreement",
            "ylabel": "error (deviations of a step's change)",
        },
    ),
    Suite(
        name="claims/exploitation",
        title="By how much a plan returns less than the model says (Pendulum-v1)",
        entries=(
            replace(PETS_PENDULUM, arguments="--eval-every 250"),
            Entry("one network", "cem_mpc.py", "Pendulum-v1", 1_000, 5, f"--eval-episodes 1 {ONE_NETWORK}"),
            Entry("PETS, 300 steps", "cem_mpc.py", "Pendulum-v1", 300, 5, "--eval-episodes 1"),
            Entry("one network, 300 steps", "cem_mpc.py", "Pendulum-v1", 300, 5, f"--eval-episodes 1 {ONE_NETWORK}"),
        ),
        arguments="",
        xlim=(0, 25),
        ylim=(-30, 105),
        table_at=(1, 2, 5, 10, 15, 20, 25),
        **EVALUATIONS
        | {
            "collect": "optimism by steps ahead",
            "xlabel": "steps of the plan",
            "ylabel": "expected return - real return",
        },
    ),
    Suite(
        name="claims/terminal_value",
        title="A value at the end of the plan against a long plan (Pendulum-v1)",
        entries=(
            Entry("H = 5", "cem_mpc.py", "Pendulum-v1", 1_000, 5, "--horizon 5"),
            Entry("H = 5 and a value", "cem_mpc.py", "Pendulum-v1", 1_000, 5, "--horizon 5 --terminal-value"),
            Entry("H = 25", "cem_mpc.py", "Pendulum-v1", 1_000, 5, baseline=True),
        ),
        arguments="--eval-every 250",
        xlim=(0, 1_000),
        ylim=(-1_700, 0),
        table_at=(250, 500, 750, 1_000),
        threshold=-200,
        **EVALUATIONS,
    ),
    Suite(
        name="claims/ensemble",
        title="MBPO with one network and with an ensemble (Pendulum-v1)",
        entries=(
            MBPO_PENDULUM,
            Entry("one network", "mbpo.py", "Pendulum-v1", 3_000, 5, ONE_NETWORK),
        ),
        **MBPO_CLAIM,
    ),
    Suite(
        name="claims/updates",
        title="MBPO, and as many updates without a model (Pendulum-v1)",
        entries=(
            MBPO_PENDULUM,
            Entry(
                "without model, 10 updates a step", "mbpo.py", "Pendulum-v1", 3_000, 5, "--real-ratio 1", baseline=True
            ),
            Entry(
                "the same, DroQ's critics",
                "mbpo.py",
                "Pendulum-v1",
                3_000,
                5,
                "--real-ratio 1 --critic-layer-norm --critic-dropout 0.01",
            ),
        ),
        **MBPO_CLAIM,
    ),
    Suite(
        name="claims/rollout_length",
        title="MBPO with rollouts of k steps (Pendulum-v1)",
        entries=(
            MBPO_PENDULUM,
            *(
                Entry(f"k = {k}", "mbpo.py", "Pendulum-v1", 3_000, 5, f"--rollout-schedule 0 1 {k} {k}")
                for k in (5, 20, 50)
            ),
        ),
        **MBPO_CLAIM,
    ),
    Suite(
        name="claims/imagined_data",
        title="How much imagined data in a batch, and how soon (Pendulum-v1)",
        entries=(
            MBPO_PENDULUM,
            Entry("from 100 steps on", "mbpo.py", "Pendulum-v1", 3_000, 5, "--learning-starts 100"),
            Entry("half", "mbpo.py", "Pendulum-v1", 3_000, 5, "--real-ratio 0.5"),
            Entry("little by little", "mbpo.py", "Pendulum-v1", 3_000, 5, "--real-ratio-steps 1000"),
        ),
        **MBPO_CLAIM,
    ),
    Suite(
        name="claims/trust",
        title="MBPO that trusts its model less where the ensemble disagrees (Pendulum-v1)",
        entries=(
            MBPO_PENDULUM,
            Entry("rollouts end there", "mbpo.py", "Pendulum-v1", 3_000, 5, "--max-disagreement 0.05"),
            Entry("transitions weigh less", "mbpo.py", "Pendulum-v1", 3_000, 5, "--weigh-disagreement"),
        ),
        **MBPO_CLAIM,
    ),
    Suite(
        name="claims/stale_model",
        title="MBPO with a model that is trained more rarely (Pendulum-v1)",
        entries=(
            MBPO_PENDULUM,
            Entry("every 1,000 steps", "mbpo.py", "Pendulum-v1", 3_000, 5, "--train-every 1000"),
            Entry("once", "mbpo.py", "Pendulum-v1", 3_000, 5, "--train-every 100000"),
        ),
        **MBPO_CLAIM,
    ),
)
SUITES = {suite.name: suite for suite in DECLARED}
