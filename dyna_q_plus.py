# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=2.0", "gymnasium>=1.2", "tyro>=0.9", "tensorboard>=2.18", "pillow>=10.1", "tqdm>=4.66"]
# ///
"""Dyna-Q+: Dyna-Q that keeps asking whether the world is still as its model says.

Dyna-Q plans with what its model predicts, and hardly ever finds out that a wall has moved where it no longer goes.
Dyna-Q+ adds a bonus to the reward that planning sees, the larger the longer a state-action pair has not been tried in
reality; planning carries it back to the states from which the pair can be reached, and so plans whole journeys of
exploration.

The algorithm (Sutton & Barto, Reinforcement Learning, 2nd edition, section 8.3), dyna_q.py's but for (e) and (f):

    Initialize Q(s, a) and Model(s, a) for all s, a
    Loop forever:
      (a) S <- current (nonterminal) state
      (b) A <- epsilon-greedy(S, Q), ties broken at random
      (c) Take action A; observe resultant reward R and state S'
      (d) Q(S, A) <- Q(S, A) + alpha [R + gamma max_a Q(S', a) - Q(S, A)]
      (e) Model(S, A) <- R, S';  tau(S, A) <- 0;  tau <- tau + 1 for all other pairs
      (f) Loop n times:
            S <- random previously observed state, A <- random action, tried in S or not
            R, S' <- Model(S, A), where an untried A leads back to S with reward 0
            Q(S, A) <- Q(S, A) + alpha [R + kappa sqrt(tau(S, A)) + gamma max_a Q(S', a) - Q(S, A)]

That untried actions take part in planning is a footnote of the book on which everything depends: without it the bonus
draws the agent only to what it already knows. The clock of tau runs through all episodes. `--bonus-on action` is
Exercise 8.4: the bonus is used to choose actions, epsilon-greedy in Q(S, a) + kappa sqrt(tau(S, a)), not in planning,
in which untried actions still take part.

Run:     python dyna_q_plus.py
         python dyna_q_plus.py --env-id ShortcutMaze-v0
         python dyna_q_plus.py --help
Expect:  in about a second, a model that knows the maze as it is after its walls have moved: the policy that is
         evaluated walks the shortest path, 16 steps in the blocking maze, and with the second command 10 steps in the
         shortcut maze (10 of 10 seeds). That policy is the solution of the learned model, by value iteration: Q itself
         holds the bonus, and a policy that follows it without learning would go to the same wall, long untried, over
         and over. So an evaluation tells what has been explored, and the return of the training episodes how well the
         agent acts: in Figure 8.4 of benchmark/ (alpha 1, kappa 1e-4, 10 planning updates) it collects 135 in the 3,000
         steps of the blocking maze, dyna_q.py 70 (30 seeds).
"""

import argparse
import ast
import copy
import dataclasses
import gzip
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_origin, get_type_hints

import gymnasium as gym
import numpy as np
import tyro
from gymnasium.envs.toy_text import CliffWalkingEnv, FrozenLakeEnv
from PIL import Image, ImageDraw
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm


class Failure(Exception):
    """Something the user can fix. `main` prints it as one line and exits with status 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Args
# ---------------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Args:
    """Tabular Dyna-Q+ (Sutton & Barto, section 8.3)."""

    env_id: str = "BlockingMaze-v0"
    """Gymnasium id, `module:Name-v0` for another package's. Built in: DynaMaze-v0, BlockingMaze-v0, ShortcutMaze-v0."""
    env_kwargs: tuple[str, ...] = ()
    """Options for `gym.make`, as name=value: `--env-kwargs max_episode_steps=50`."""
    total_timesteps: Annotated[int, 0, math.inf] = 6_000
    """Environment steps (calls of `env.step`) to learn for."""
    seed: Annotated[int, 0, 2**32 - 1] = 1
    """Seed of every random draw: the agent's, the episodes', the evaluation's."""
    eval_every: Annotated[int, 1, math.inf] = 1_000
    """Environment steps between two evaluations (greedy policy, environment of its own)."""
    eval_episodes: Annotated[int, 1, math.inf] = 5
    """Episodes of an evaluation. Where the environment has no time limit, one ends after 1,000 steps at the latest."""
    checkpoint_every: Annotated[int, 1, math.inf] = 10_000
    """Environment steps between two checkpoints."""
    run_dir: str = "runs"
    """Folder in which the run's own folder is made."""
    resume: str | None = None
    """Run folder to continue exactly where its last checkpoint was written."""
    evaluate: str | None = None
    """Run folder whose agent to evaluate, without learning; nothing but videos is added to the folder."""
    capture_video: bool = False
    """Record the first episode of each evaluation as a GIF in the run folder."""

    alpha: Annotated[float, 1e-9, 1] = 0.5
    """Step size of the Q-learning update, for real and planned steps alike (the book does not name its own)."""
    gamma: Annotated[float, 0, 1] = 0.95
    """Discount factor (the book's value for Figure 8.2)."""
    epsilon: Annotated[float, 0, 1] = 0.1
    """Probability of a uniformly random action (the book's value for Figure 8.2)."""
    n_planning: Annotated[int, 0, 10**6] = 50
    """Planning updates per real step (the book compares 0, 5 and 50); 0 is Q-learning, unless `bonus_on` is action."""
    initial_q: Annotated[float, -1e9, 1e9] = 0.0
    """Value that every state-action pair starts with."""
    model: Literal["counts", "last"] = "last"
    """`counts`: all outcomes by their frequency, expected updates. `last`: the book's table of the latest outcome."""
    kappa: Annotated[float, 0, 1e9] = 1e-3
    """Weight of the bonus kappa * sqrt(tau), tau in real steps; 0 is Dyna-Q whose planning includes untried actions.
    (The book does not name its own; ShangtongZhang's code: 1e-4 in Figure 8.4, 1e-3 in Figure 8.5.)"""
    bonus_on: Literal["planning", "action"] = "planning"
    """Where the bonus counts: in the reward of planning updates, or in the choice of actions only (Exercise 8.4)."""

    def __post_init__(self):
        check_ranges(self)


# Settings by environment that differ from the defaults. `parse_args` uses them; what the command line says wins.
PRESETS: dict[str, dict[str, Any]] = {
    "FrozenLake-v1": {"total_timesteps": 20_000, "eval_episodes": 100, "gamma": 0.99, "model": "counts"},
}


def check_ranges(args: Any) -> None:
    """Raises Failure for the first field outside its closed range, which its type says: Annotated[float, low, high]. A
    NaN is outside of every range."""
    for name, kind in get_type_hints(type(args), include_extras=True).items():
        if get_origin(kind) is Annotated:
            low, high = kind.__metadata__
            if not low <= (value := getattr(args, name)) <= high:
                wanted = f"from {low} to {high}" if high < math.inf else f"at least {low}"
                raise Failure(f"--{name.replace('_', '-')} must be {wanted}, not {value}")


# ---------------------------------------------------------------------------------------------------------------------
# Environment
# ---------------------------------------------------------------------------------------------------------------------
DYNA_MAZE = """
    .......#G
    ..#....#.
    S.#....#.
    ..#......
    .....#...
    ........."""
RIGHT_OPENING = """
    ........G
    .........
    .........
    ########.
    .........
    ...S....."""
LEFT_OPENING = RIGHT_OPENING.replace("########.", ".########")
BOTH_OPENINGS = RIGHT_OPENING.replace("########.", ".#######.")


class Maze(gym.Env):
    """Grid world of Sutton & Barto, chapter 8: from S to G around the walls #, reward 1 on reaching G, else 0.

    Observation: `Discrete`, row * width + column. Actions: 0 up, 1 right, 2 down, 3 left; into a wall or over the edge
    the agent stays where it is. The first `layout` is the world until `change_at` steps have been made, counted over
    all episodes; then it is the second. (An evaluation counts on from the training's count.) There is no time limit.
    """

    metadata: ClassVar = {"render_modes": ["ansi", "rgb_array"], "render_fps": 8}

    def __init__(self, layouts: tuple[str, ...], change_at: float = math.inf, render_mode: str | None = None):
        self.layouts = [np.array([list(line) for line in layout.split()]) for layout in layouts]
        self.shape = self.layouts[0].shape
        self.change_at, self.render_mode, self.clock = change_at, render_mode, 0
        self.observation_space = gym.spaces.Discrete(self.shape[0] * self.shape[1])
        self.action_space = gym.spaces.Discrete(4)

    @property
    def desc(self) -> np.ndarray:
        """The current layout, (rows, columns) of single characters."""
        return self.layouts[-1 if self.clock >= self.change_at else 0]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        self.row, self.column = map(int, np.argwhere(self.desc == "S")[0])
        return self.row * self.shape[1] + self.column, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        down, right = ((-1, 0), (0, 1), (1, 0), (0, -1))[action]
        row, column, desc = self.row + down, self.column + right, self.desc
        if 0 <= row < self.shape[0] and 0 <= column < self.shape[1] and desc[row, column] != "#":
            self.row, self.column = row, column
        self.clock += 1
        at_goal = bool(desc[self.row, self.column] == "G")
        return self.row * self.shape[1] + self.column, float(at_goal), at_goal, False, {}

    def render(self) -> str | np.ndarray | None:
        """The maze with the agent in it as A: text, or pixels (32 * rows, 32 * columns, 3)."""
        picture = self.desc.copy()
        picture[self.row, self.column] = "A"
        if self.render_mode == "ansi":
            return "\n".join("".join(line) for line in picture)
        if self.render_mode == "rgb_array":
            palette = np.array(
                [(240, 240, 240), (90, 90, 90), (170, 210, 240), (250, 200, 60), (200, 60, 40)], np.uint8
            )
            pixels = palette[np.vectorize(".#SGA".index)(picture)]
            return pixels.repeat(32, axis=0).repeat(32, axis=1)

    def state_dict(self) -> dict:
        return {"clock": self.clock}

    def load_state_dict(self, state: dict) -> None:
        self.clock = state["clock"]


for _name, _layouts, _change_at in (
    ("DynaMaze-v0", (DYNA_MAZE,), math.inf),
    ("BlockingMaze-v0", (RIGHT_OPENING, LEFT_OPENING), 1_000),
    ("ShortcutMaze-v0", (LEFT_OPENING, BOTH_OPENINGS), 3_000),
):
    if _name not in gym.registry:
        gym.register(_name, entry_point=Maze, kwargs={"layouts": _layouts, "change_at": _change_at})


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """`gym.make` with the options of `args.env_kwargs`; raises Failure where the environment cannot be made."""

    def literal(text: str) -> Any:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text

    if wrong := [option for option in args.env_kwargs if "=" not in option]:
        raise Failure(f"--env-kwargs takes name=value, not {wrong[0]}")
    try:
        kwargs = {name: literal(value) for name, value in (option.split("=", 1) for option in args.env_kwargs)}
        drawing = {"render_mode": render_mode} if render_mode else {}  # not every environment has this option
        env = gym.make(args.env_id, **drawing, **kwargs)
        if render_mode:  # where a package for drawing is missing, it fails now and not after the training
            env.reset(seed=0)
            env.render()
        return env
    except Exception as error:
        unknown = isinstance(error, gym.error.UnregisteredEnv)
        hint = "; an environment of another package is named module:Name-v0" if unknown else ""
        raise Failure(f"cannot make the environment {args.env_id}: {error}{hint}") from error


def table_key(space: gym.Space) -> Callable[[Any], Hashable]:
    """Returns the function from an observation of this space to the key of its row in a table: int, bytes or tuple.

    A small Box is let in for those whose values come back exactly: nobody can tell that from the space.
    """
    if isinstance(space, gym.spaces.Discrete):
        return int
    if isinstance(space, gym.spaces.Tuple):
        keys = [table_key(part) for part in space]
        return lambda obs: tuple(key(part) for key, part in zip(keys, obs, strict=True))
    small_box = isinstance(space, gym.spaces.Box) and space.is_bounded() and math.prod(space.shape) <= 64
    if small_box or isinstance(space, gym.spaces.MultiDiscrete | gym.spaces.MultiBinary):
        return lambda obs: (np.asarray(obs, space.dtype) + space.dtype.type(0)).tobytes()  # + 0 turns -0.0 into 0.0
    raise Failure(
        "observations must be Discrete, MultiDiscrete, MultiBinary, a Tuple of them or a small bounded Box, not "
        f"{space}; vectors: cem_mpc.py, mbpo.py, muzero.py, dreamer.py; images: the last two; Dict: dreamer.py"
    )


def check_observation(obs: Any, space: gym.Space) -> None:
    """Raises ValueError for an observation that the space does not contain."""
    if type(obs) is int and isinstance(space, gym.spaces.Discrete):
        inside = 0 <= obs - space.start < space.n  # `in` is slower than all else of a step
    else:
        inside = obs in space
    if not inside:
        raise ValueError(f"observation {obs!r} is not in {space}")


def memory_of(env: gym.Env) -> dict:
    """What an environment remembers across its episodes (a wall that moves at step 1000); most remember nothing."""
    memory = copy.deepcopy(env.unwrapped.state_dict()) if hasattr(env.unwrapped, "load_state_dict") else {}
    try:
        json.dumps(memory)
    except TypeError as error:  # a checkpoint could not hold it
        raise Failure(f"state_dict() of the environment: {error}; plain numbers, strings, lists and dicts") from error
    return memory


def seed_of(*key: int) -> int:
    """A seed of one purpose, from the run's seed, the purpose's number, and what tells its draws apart (the episode's
    number); different purposes are independent. (Zeros at the end of a key do not count.)

    The purposes: 0 acting, 1 training episodes, 2 evaluation episodes, 3 acting in evaluation, 4 planning.
    """
    return int(np.random.SeedSequence(key).generate_state(1)[0] >> 1)  # below 2**31: it fits a C int


class Episode:
    """Runs an environment episode after episode, and can come back to the middle of one.

    Every episode is reset with a seed of its own, so that a restored one is brought back by repeating its actions: this
    holds for any environment that is deterministic given its seed, and nothing of it needs to be stored. One that
    remembers something across episodes offers it, in plain values, as `state_dict()` and `load_state_dict()`.
    """

    def __init__(self, env: gym.Env, *key: int):
        self.env, self.key, self.index = env, key, -1
        self.reset()

    def reset(self) -> None:
        """Starts the next episode: `obs` and `info` are its first."""
        self.index += 1
        self.memory = memory_of(self.env)
        self.actions: list[Any] = []
        self.episodic_return = 0.0
        try:
            obs, self.info = self.env.reset(seed=seed_of(*self.key, self.index))
            self.take(obs)
        except Exception as error:
            raise Failure(f"reset of episode {self.index}: {type(error).__name__}: {error}") from error

    def take(self, obs: Any) -> None:
        """Checks an observation and keeps a copy, as some environments write the next one into the same array."""
        check_observation(obs, self.env.observation_space)
        self.obs = copy.deepcopy(obs)

    def step(self, action: Any) -> tuple[Any, float, bool, bool]:
        """Returns next observation, reward, terminated, truncated; after one of the last two, call `reset`."""
        try:
            obs, reward, terminated, truncated, self.info = self.env.step(copy.deepcopy(action))
            self.take(obs)
            if not abs(reward) < 1e15:
                raise ValueError(f"reward is {reward}, not a number below 1e15")
        except Exception as error:
            where = f"step {len(self.actions) + 1} of episode {self.index}"
            raise Failure(f"{where}: {type(error).__name__}: {error}") from error
        self.actions.append(action)
        self.episodic_return += float(reward)
        return self.obs, float(reward), bool(terminated), bool(truncated)

    def state_dict(self) -> dict:
        actions = [action if isinstance(action, int) else np.asarray(action).tolist() for action in self.actions]
        return {"index": self.index, "memory": self.memory, "actions": actions}

    def load_state_dict(self, state: dict) -> None:
        if state["memory"]:
            self.env.unwrapped.load_state_dict(state["memory"])
        self.index = state["index"] - 1
        self.reset()
        for action in state["actions"]:
            self.step(action if isinstance(action, int) else np.array(action, self.env.action_space.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------
class Model:
    """Tabular model of the world: how often each outcome followed each state-action pair, and with what reward.

    `outcomes` is the model. `cells` says the same in the form that planning reads: `num_actions` cells for
    every state left so far, each of them
    (Q row of the state, action, mean reward, [(gamma * probability, Q row of the successor), ...]). A terminal
    successor is left out of the list, which gives it the value 0; a truncated step keeps the value of its successor.
    Until its action is tried, a cell predicts reward 0 and the state itself. `last_tried` says for every cell when its
    action was last tried in reality, on a `clock` of real steps that runs through all episodes.
    """

    def __init__(self, q: dict[Hashable, list[float]], num_actions: int, args: Args):
        self.q, self.num_actions, self.gamma, self.kind = q, num_actions, args.gamma, args.model
        # (s, a) -> (s', terminated) -> count, sum of rewards
        self.outcomes: dict[tuple, dict[tuple, tuple[int, float]]] = {}
        self.first_cell: dict[Hashable, int] = {}
        self.cells: list[tuple] = []
        self.last_tried: list[int] = []
        self.clock = 0

    def update(self, state: Hashable, action: int, reward: float, next_state: Hashable, terminated: bool) -> None:
        """Counts one real transition."""
        self.clock += 1
        outcomes = self.outcomes.setdefault((state, action), {})
        if self.kind == "last":
            outcomes.clear()
        count, reward_sum = outcomes.get((next_state, terminated), (0, 0.0))
        outcomes[next_state, terminated] = count + 1, reward_sum + reward
        self.write_cell(state, action)
        self.last_tried[self.first_cell[state] + action] = self.clock

    def write_cell(self, state: Hashable, action: int) -> None:
        """Writes the planner's cell of a pair from the counts of its outcomes."""
        if state not in self.first_cell:
            self.first_cell[state] = len(self.cells)
            row = self.q[state]
            self.cells += [(row, untried, 0.0, [(self.gamma, row)]) for untried in range(self.num_actions)]
            self.last_tried += [0] * self.num_actions
        outcomes = self.outcomes[state, action]
        visits = sum(count for count, _ in outcomes.values())
        reward = sum(reward_sum for _, reward_sum in outcomes.values()) / visits
        successors = [
            (self.gamma * (count / visits), self.q[next_state])  # gamma exactly, where there is one outcome
            for (next_state, terminated), (count, _) in outcomes.items()
            if not terminated
        ]
        self.cells[self.first_cell[state] + action] = self.q[state], action, reward, successors

    def state_dict(self) -> dict:
        """The counts and the clock; `cells` follows from them."""
        return {
            "clock": self.clock,
            "last_tried": self.last_tried,
            "outcomes": [
                (repr(state), action, repr(next_state), terminated, *sums)
                for (state, action), outcomes in self.outcomes.items()
                for (next_state, terminated), sums in outcomes.items()
            ],
        }

    def load_state_dict(self, state: dict) -> None:
        for table in (self.outcomes, self.first_cell, self.cells):
            table.clear()
        for pair_state, action, next_state, terminated, count, rewards in state["outcomes"]:
            pair = ast.literal_eval(pair_state), action
            self.outcomes.setdefault(pair, {})[ast.literal_eval(next_state), terminated] = count, rewards
        for pair in self.outcomes:
            self.write_cell(*pair)
        self.clock, self.last_tried = state["clock"], state["last_tried"]

    def bonus(self, state: Hashable, kappa: float) -> list[float]:
        """kappa * sqrt(tau) of every action in a state; 0 in a state never observed."""
        if (first := self.first_cell.get(state)) is None:
            return [0.0] * self.num_actions
        return [kappa * math.sqrt(self.clock - last) for last in self.last_tried[first : first + self.num_actions]]


# ---------------------------------------------------------------------------------------------------------------------
# Planner
# ---------------------------------------------------------------------------------------------------------------------
class Planner:
    """Loop (f): Q-learning updates on state-action pairs drawn from the model.

    The innermost line of the script runs millions of times a second: rows of Q are plain lists, which Python reads
    several times faster than single elements of an array, and the random cells of many steps are drawn in one call.
    """

    def __init__(self, model: Model, alpha: float, kappa: float, rng: np.random.Generator):
        self.model, self.alpha, self.kappa, self.rng = model, alpha, kappa, rng
        self.draws: list[int] = []
        self.drawn_from = 0

    def plan(self, n: int) -> None:
        """`n` planning updates: random observed state, random action, expected update with the bonus (section 8.3)."""
        cells, alpha = self.model.cells, self.alpha
        clock, last_tried, kappa = self.model.clock, self.model.last_tried, self.kappa
        if len(self.draws) < n or self.drawn_from != len(cells):
            self.drawn_from = len(cells)
            self.draws = self.rng.integers(self.drawn_from, size=max(n, min(64 * n, 100_000))).tolist()
        for cell in self.draws[:n]:
            row, action, reward, successors = cells[cell]
            target = reward + kappa * math.sqrt(clock - last_tried[cell])
            for weight, next_row in successors:  # weight = gamma * p(s' | s, a)
                target += weight * max(next_row)
            row[action] += alpha * (target - row[action])
        del self.draws[:n]

    def state_dict(self) -> dict:
        return {"draws": self.draws, "drawn_from": self.drawn_from, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict) -> None:
        self.draws, self.drawn_from = state["draws"], state["drawn_from"]
        self.rng.bit_generator.state = state["rng"]


# ---------------------------------------------------------------------------------------------------------------------
# Agent
# ---------------------------------------------------------------------------------------------------------------------
class Agent:
    """Dyna-Q+: `act` is (b), `observe` is (d) and (e), `update` is (f).

    Drive it from a loop of your own: `agent = Agent(env.observation_space, env.action_space, Args(gamma=0.99))`, then
    for every step `act`, `env.step`, `observe`, `update`.
    """

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        if not isinstance(action_space, gym.spaces.Discrete):
            raise Failure(
                f"actions must be Discrete, not {action_space}; a bounded Box: cem_mpc.py, mbpo.py, dreamer.py"
            )
        self.args, self.key = args, table_key(observation_space)
        self.first_action, self.num_actions = int(action_space.start), int(action_space.n)
        self.rng = np.random.default_rng(seed_of(args.seed, 0))
        self.q: dict[Hashable, list[float]] = defaultdict(lambda: [args.initial_q] * self.num_actions)
        self.model = Model(self.q, self.num_actions, args)
        kappa = args.kappa if args.bonus_on == "planning" else 0.0
        self.planner = Planner(self.model, args.alpha, kappa, np.random.default_rng(seed_of(args.seed, 4)))
        self.sum_abs_error, self.num_errors = 0.0, 0
        self.valued_at, self.known = 0, {}  # what `values` returned last, and the model's clock at that time

    def act(self, obs: Any) -> int:
        """Epsilon-greedy action by Q, or by Q and the bonus (`bonus_on`); ties are broken at random."""
        if self.rng.random() < self.args.epsilon:
            return self.first_action + int(self.rng.integers(self.num_actions))
        row = self.q[self.key(obs)]
        if self.args.bonus_on == "action":
            bonus = self.model.bonus(self.key(obs), self.args.kappa)
            row = [value + extra for value, extra in zip(row, bonus, strict=True)]
        return self.first_action + random_argmax(row, self.rng)

    def observe(
        self, obs: Any, action: int, reward: float, next_obs: Any, terminated: bool, truncated: bool = False
    ) -> None:
        """Direct Q-learning and model learning from a real step; a truncated one keeps the value of its next state."""
        state, next_state, action = self.key(obs), self.key(next_obs), int(action) - self.first_action
        reward, terminated = float(reward), bool(terminated)  # NumPy's numbers are slow, and not for JSON
        target = reward + (0.0 if terminated else self.args.gamma * max(self.q[next_state]))
        error = target - self.q[state][action]
        self.q[state][action] += self.args.alpha * error
        self.sum_abs_error, self.num_errors = self.sum_abs_error + abs(error), self.num_errors + 1
        self.model.update(state, action, reward, next_state, terminated)

    def update(self) -> None:
        """The planning updates that follow a real step."""
        if self.args.n_planning and self.model.cells:
            self.planner.plan(self.args.n_planning)

    def greedy_policy(self, seed: int) -> Callable[..., int]:
        """A policy (observation, info -> action) for one episode, which does not touch the agent; ties are broken with
        `seed`."""
        rng, values, unknown = np.random.default_rng(seed), self.values(), [0.0] * self.num_actions
        return lambda obs, info=None: self.first_action + random_argmax(values.get(self.key(obs), unknown), rng)

    def values(self) -> dict[Hashable, list[float]]:
        """State -> value of every action (untried: -inf) by the model without the bonus, found by value iteration.

        `q` holds the bonus: greedy in it, a policy that no longer learns would for ever go and see one wall again.
        """
        if self.valued_at != self.model.clock:
            # A cell knows a state by its row of Q alone; by that row's id its solution is found.
            solved = {id(row): [-math.inf] * self.num_actions for row in self.q.values()}

            def value_of(row: list[float]) -> float:
                best = max(solved[id(row)])
                return best if best > -math.inf else self.args.initial_q  # the state was never left

            tried = [cell for cell, last in zip(self.model.cells, self.model.last_tried, strict=True) if last]
            for row, action, _, _ in tried:
                solved[id(row)][action] = 0.0
            for _ in range(1_000):
                change = 0.0
                for row, action, reward, successors in tried:
                    value = reward + sum(weight * value_of(next_row) for weight, next_row in successors)
                    change = max(change, abs(value - solved[id(row)][action]) / max(abs(value), 1e-300))
                    solved[id(row)][action] = value
                if change < 1e-6:  # relative, as values far away from any reward are tiny
                    break
            self.valued_at, self.known = self.model.clock, {state: solved[id(row)] for state, row in self.q.items()}
        return self.known

    def metrics(self) -> dict[str, float]:
        """What to log of the steps since the last call; the mean of absolute errors begins anew."""
        error = self.sum_abs_error / max(1, self.num_errors)
        self.sum_abs_error, self.num_errors = 0.0, 0
        pairs = len(self.model.outcomes)
        return {"losses/td_error": error, "model/states": len(self.model.first_cell), "model/state_action_pairs": pairs}

    def state_dict(self) -> dict:
        return {
            "q": [(repr(state), row) for state, row in self.q.items()],
            "model": self.model.state_dict(),
            "rng": self.rng.bit_generator.state,
            "planner": self.planner.state_dict(),
            "errors": [self.sum_abs_error, self.num_errors],
        }

    def load_state_dict(self, state: dict) -> None:
        self.q.clear()
        self.valued_at = 0
        self.q.update((ast.literal_eval(key), row) for key, row in state["q"])
        self.model.load_state_dict(state["model"])
        self.rng.bit_generator.state = state["rng"]
        self.planner.load_state_dict(state["planner"])
        self.sum_abs_error, self.num_errors = state["errors"]


def random_argmax(row: list[float], rng: np.random.Generator) -> int:
    """Index of the largest value; among equal ones a random one (always the first would walk into walls for ever)."""
    best = max(row)
    ties = [action for action, value in enumerate(row) if value == best]
    return ties[0] if len(ties) == 1 else ties[int(rng.integers(len(ties)))]


def draw_grid(env: gym.Env, agent: Agent) -> tuple[str, Image.Image] | None:
    """Greedy policy and values max_a Q(s, a) of a grid world, as text and as picture; None for other environments."""
    world = env.unwrapped
    if isinstance(world, FrozenLakeEnv):
        shape, arrows = (world.nrow, world.ncol), "←↓→↑"
    elif isinstance(world, Maze | CliffWalkingEnv):
        shape, arrows = world.shape, "↑→↓←"
    else:
        return None
    marks = getattr(world, "desc", np.full(shape, "-")).astype(str)
    rows = {state: row for state, row in agent.values().items() if min(row) < max(row)}
    values = {state: max(row) for state, row in rows.items()}
    low, high = min(values.values(), default=0.0), max(values.values(), default=1.0)
    lines, image = [""] * shape[0], Image.new("RGB", (72 * shape[1], 72 * shape[0]), (90, 90, 90))
    draw = ImageDraw.Draw(image)
    for state, (row, column) in enumerate(np.ndindex(shape)):
        x, y = 72 * column + 36, 72 * row + 30  # where the arrow of the cell stands
        if state not in values:  # a wall, a terminal state, or one of which nothing is known
            lines[row] += f"{marks[row, column]:^8}"
            draw.text((x - 6, y - 6), marks[row, column], (255, 255, 255), font_size=18)
            continue
        arrow = arrows[int(np.argmax(rows[state]))]
        lines[row] += f"{arrow}{values[state]:6.2f} "
        light = (values[state] - low) / max(high - low, 1e-12)
        draw.rectangle((x - 35, y - 29, x + 34, y + 40), (235 - int(150 * light), 240 - int(90 * light), 250))
        dx, dy = {"↑": (0, -9), "→": (9, 0), "↓": (0, 9), "←": (-9, 0)}[arrow]
        draw.polygon(((x + 2 * dx, y + 2 * dy), (x - dx + dy, y - dy + dx), (x - dx - dy, y - dy - dx)), (20, 20, 60))
        draw.text((x - 16, y + 22), f"{values[state]:.2f}", (20, 20, 60), font_size=14)
    return "\n".join(lines), image


# ---------------------------------------------------------------------------------------------------------------------
# Run
# ---------------------------------------------------------------------------------------------------------------------
SCRIPT = Path(__file__).stem
CHECKPOINT = "checkpoint.json.gz"
CHANGEABLE = {"total_timesteps", "eval_every", "eval_episodes", "checkpoint_every"}  # learning does not depend on them
CHANGEABLE |= {"device", "threads", "compile", "capture_video", "run_dir", "resume", "evaluate"}


def write_checkpoint(path: Path, state: dict) -> None:
    """Writes nested plain values; gzip keeps a checksum with them."""
    with open(path, "wb") as file:
        with gzip.open(file, "wt", compresslevel=1) as text:
            json.dump(state, text)
        file.flush()
        os.fsync(file.fileno())


def read_checkpoint(path: Path) -> dict:
    """Reads what `write_checkpoint` wrote, executing no code; raises an exception of some kind where it is damaged."""
    with gzip.open(path, "rt") as text:
        return json.load(text)


def parse_args() -> Args:
    """The command line. `--resume` and `--evaluate` start from the run's own arguments, of which few may be changed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--env-id", "--env_id", default=Args.env_id)
    env_id = parser.parse_known_args()[0].env_id
    args = tyro.cli(Args, default=Args(**{"env_id": env_id} | PRESETS.get(env_id, {})))
    if (folder := args.resume if args.resume is not None else args.evaluate) is None:
        if preset := [f"{name}={getattr(args, name)}" for name in PRESETS.get(env_id, {})]:
            print(f"settings for {env_id}: {', '.join(preset)}")
        return args
    args = tyro.cli(Args, default=saved_args(folder))
    if args.resume and args.evaluate:
        raise Failure("--resume and --evaluate exclude each other")
    check_unchanged(args, folder)
    return args


def check_unchanged(args: Args, folder: str) -> None:
    """Raises Failure for arguments, other than those in CHANGEABLE, with which the run was not started."""
    before, fixed = saved_args(folder), [name for name in vars(args) if name not in CHANGEABLE]
    if changed := [name for name in fixed if getattr(args, name) != getattr(before, name)]:
        raise Failure(f"{folder} was started with another {', '.join(changed)}; a run keeps what it was started with")


def saved_args(folder: str) -> Args:
    """The arguments that a run was started with."""
    try:
        saved = json.loads((Path(folder) / "args.json").read_text())
        if saved["script"] != SCRIPT:
            raise Failure(f"{folder} was written by {saved['script']}.py, not by {SCRIPT}.py")
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in saved["args"].items()}
        return Args(**fields)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Failure(f"{folder} is not a run folder of {SCRIPT}.py: no usable args.json ({error})") from error


def run_folder(args: Args) -> Path:
    """The folder of the run to go on with or to evaluate, or the name of a new one."""
    name = f"{args.env_id}__{SCRIPT}__{args.seed}__{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"
    return Path(args.resume or args.evaluate or Path(args.run_dir) / re.sub(r"[/:]", "-", name))


def make_eval_envs(args: Args) -> list[gym.Env]:
    """The environment of evaluations."""
    return [make_env(args, "rgb_array" if args.capture_video else None)]


def greedy_episodes(
    agent: Any, envs: list[gym.Env], args: Args, memory: dict
) -> tuple[list[Episode], list[Image.Image]]:
    """`args.eval_episodes` episodes, one after the other; with `args.capture_video` pictures of the first."""
    episodes, frames, env = [], [], envs[0]
    limit = env.spec.max_episode_steps or 1_000  # without one, a greedy policy may walk in circles for ever
    for index in range(args.eval_episodes):
        if memory:
            env.unwrapped.load_state_dict(memory)
        episode = Episode(env, args.seed, 2, index)
        policy, done = agent.greedy_policy(seed_of(args.seed, 3, index)), False
        film = args.capture_video and index == 0
        while not done and len(episode.actions) < limit:
            if film:
                frames.append(Image.fromarray(env.render()).quantize())
            _, _, terminated, truncated = episode.step(policy(episode.obs, episode.info))
            done = terminated or truncated
        if film:
            frames.append(Image.fromarray(env.render()).quantize())
        episodes.append(episode)
    return episodes, frames


class Run:
    """The run folder and what goes on in it: TensorBoard events, evaluation, checkpoints, exact resume, the result.

    With `args.resume` it continues the run of that folder; with `args.evaluate` nothing is learned or written but
    videos. Of the agent it uses what `greedy_episodes` calls, `metrics()`, `state_dict()`, `load_state_dict(state)`.
    """

    def __init__(self, args: Args, agent: Any, episodes: list[Episode], path: Path | None = None):
        self.args, self.agent, self.episodes, self.path = args, agent, episodes, path or run_folder(args)
        self.step, self.start_time, self.returns, self.events = 0, time.time(), [], None
        self.log_every = max(1, args.total_timesteps // 100)
        self.eval_envs = make_eval_envs(args)
        offset = self.restore() if args.resume or args.evaluate else 0
        # (Steps that are made side by side can lead beyond what was asked for.)
        if args.resume and args.total_timesteps < min(self.step, saved_args(args.resume).total_timesteps):
            raise Failure(f"{self.path} has {self.step} steps already, more than --total-timesteps")
        if args.resume:
            print(f"resumed at step {self.step} of {args.total_timesteps}")
        if not args.evaluate:
            self.path.mkdir(parents=True, exist_ok=True)
            saved, now = self.path / "args.json", provenance()
            before = json.loads(saved.read_text()).get("made_with", []) if saved.exists() else []
            made_with = [*(made for made in before if made != now), now]  # resumed elsewhere or later: all of them
            write_json(saved, {"script": SCRIPT, "args": vars(args) | {"resume": None}, "made_with": made_with})
            # Cut at the checkpoint: what a resumed run leaves is what an uninterrupted one would have left.
            self.events = open(self.path / "events.out.tfevents.0", "ab")
            self.events.seek(self.events.truncate(offset))
            if offset == 0:
                rows = "".join(f"\n|{name}|{value}|" for name, value in vars(args).items())
                summary = text_pb("hyperparameters", f"|name|value|\n|-|-|{rows}")
                self.write(Event(wall_time=time.time(), file_version="brain.Event:2"))
                self.write(Event(wall_time=time.time(), summary=summary))
        self.bar = tqdm(
            total=args.total_timesteps, initial=self.step, unit="step", disable=True if args.evaluate else None
        )

    def steps(self, stride: int = 1) -> Iterator[int]:
        """Yields the number of the environment step that the caller makes next (of the last of `stride` parallel ones);
        once it is made, logs, evaluates and checkpoints what is due, and stops on Ctrl-C or SIGTERM."""
        args, caught, handlers = self.args, [], {}

        def stop(number: int, _: Any) -> None:
            caught.append(number)
            os.write(2, b"\nstopping after this step, and the evaluation if one is due; once more: at once\n")
            signal.signal(number, handlers[number])  # a second one does not wait for the end of the step

        if threading.current_thread() is threading.main_thread():
            handlers.update({number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)})
        timed_from = self.step, time.time()
        try:
            while self.step < args.total_timesteps and not args.evaluate:
                yield self.step + stride
                before, self.step = self.step, self.step + stride
                self.bar.update(stride)
                if self.due(self.log_every, before) or self.due(args.checkpoint_every, before):
                    # (A NaN is a Failure, so that no checkpoint which is due holds one.)
                    sps = (self.step - timed_from[0]) / max(time.time() - timed_from[1], 1e-9)
                    timed_from = self.step, time.time()
                    self.log(self.step, {"charts/SPS": sps, **self.agent.metrics()})
                if self.due(args.eval_every, before):
                    self.evaluate()
                if self.due(args.checkpoint_every, before) or caught:
                    self.save()
                if caught and self.step < args.total_timesteps:
                    self.bar.close()
                    print(f"stopped at step {self.step}; to continue: python {SCRIPT}.py --resume {self.path}")
                    sys.exit(128 + caught[0])
        finally:
            self.bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def due(self, every: int, before: int) -> bool:
        """Whether a multiple of `every` was reached since step `before`; at the end everything is due."""
        return self.step >= self.args.total_timesteps or self.step // every > before // every

    def log(self, step: int, values: dict[str, float | Image.Image]) -> None:
        """Writes scalars and pictures under their TensorBoard tags, x = environment steps. A NaN is a Failure."""
        summary = Summary()
        for tag, value in values.items():
            if isinstance(value, Image.Image):
                value.save(png := io.BytesIO(), "PNG")
                summary.value.add(tag=tag).image.MergeFrom(Summary.Image(encoded_image_string=png.getvalue()))
            elif math.isfinite(value):
                summary.value.add(tag=tag, simple_value=value)
            else:
                raise Failure(f"step {step}: {tag} is {value}; the last checkpoint, if there is one, is from before")
        self.write(Event(wall_time=time.time(), step=step, summary=summary))

    def log_episode(self, step: int, episode: Episode) -> None:
        """Logs a finished episode."""
        values = {"charts/episodic_return": episode.episodic_return, "charts/episodic_length": len(episode.actions)}
        self.log(step, values)
        self.bar.set_postfix_str(f"return {episode.episodic_return:.4g}", refresh=False)

    def write(self, event: Event) -> None:
        if self.events:
            RecordWriter(self.events).write(event.SerializeToString())

    def evaluate(self) -> None:
        """Greedy episodes on environments of their own, always with the same seeds; keeps and logs their returns."""
        episodes, frames = greedy_episodes(self.agent, self.eval_envs, self.args, memory_of(self.episodes[0].env))
        self.returns, lengths = [e.episodic_return for e in episodes], [len(e.actions) for e in episodes]
        mean, std = float(np.mean(self.returns)), float(np.std(self.returns))
        self.log(self.step, {"eval/episodic_return": mean, "eval/episodic_length": float(np.mean(lengths))})
        steps = f"{np.mean(lengths):.1f} steps long, {len(lengths)} episodes"
        tqdm.write(f"step {self.step}: evaluation return {mean:.4g} +- {std:.4g} ({steps})")
        if frames:
            video = self.path / "videos" / f"step_{self.step}.gif"
            video.parent.mkdir(exist_ok=True)
            duration = 1000 / self.eval_envs[0].metadata.get("render_fps", 30)  # milliseconds a frame
            frames[0].save(video, save_all=True, append_images=frames[1:], duration=duration, loop=0)

    def save(self) -> None:
        """Writes a checkpoint; at every instant a whole one is in the folder, and the one before it is kept."""
        self.events.flush()
        state = {"step": self.step, "seconds": time.time() - self.start_time, "returns": self.returns}
        state |= {"events": self.events.tell(), "agent": self.agent.state_dict()}
        state["episodes"] = [episode.state_dict() for episode in self.episodes]
        path, new = self.path / CHECKPOINT, self.path / f"new.{CHECKPOINT}"
        try:
            write_checkpoint(new, state)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise Failure(f"step {self.step}: no checkpoint ({error}); the one before: --resume {self.path}") from error
        if path.exists():
            os.replace(path, self.path / f"previous.{CHECKPOINT}")
        os.replace(new, path)

    def restore(self) -> int:
        """Brings everything back to the last checkpoint; returns the size of the event file at that moment."""
        check_unchanged(self.args, str(self.path))  # not only `parse_args` makes them
        path, previous = self.path / CHECKPOINT, self.path / f"previous.{CHECKPOINT}"
        path = path if path.exists() or not previous.exists() else previous
        if not path.exists() and self.args.resume:
            return 0  # killed before its first checkpoint: from the beginning
        try:
            state = read_checkpoint(path)
            self.agent.load_state_dict(state["agent"])
            for episode, episode_state in zip(self.episodes, state["episodes"], strict=True):
                episode.load_state_dict(episode_state)
            self.step, self.returns = state["step"], state["returns"]
            self.start_time -= state["seconds"]
            return state["events"]
        except Exception as error:
            other = f"; the checkpoint before it is {previous}: rename it to use it" if previous.exists() else ""
            raise Failure(f"cannot restore {path}: {type(error).__name__}: {error}{other}") from error

    def finish(self) -> dict:
        """Writes and returns the result, and says where to look."""
        if self.args.evaluate or not self.returns:
            self.evaluate()
            if not self.args.evaluate:  # not a single step was asked for
                self.save()
        result = {"env_steps": self.step, "episodes": sum(episode.index for episode in self.episodes)}
        result |= {"wall_seconds": time.time() - self.start_time, "eval_return_mean": float(np.mean(self.returns))}
        result |= {"eval_return_std": float(np.std(self.returns)), "eval_episodes": len(self.returns)}
        if not self.args.evaluate:
            self.events.close()
            write_json(self.path / "result.json", result)
            print(f"run folder: {self.path}\ncurves:     tensorboard --logdir {self.path}")
        return result


def write_json(path: Path, values: dict) -> None:
    """Writes a JSON file atomically."""
    new = path.with_name(f"new.{path.name}")
    new.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(new, path)


def provenance() -> dict:
    """What a run was made with: versions of Python and of the packages, git commit of the script where there is one."""
    packages = {name: sys.modules[name].__version__ for name in ("numpy", "torch", "gymnasium") if name in sys.modules}
    git = shutil.which("git") and ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if git else ""
    return {"versions": {"python": sys.version.split()[0], **packages}, "git_commit": commit or None}


# ---------------------------------------------------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------------------------------------------------
def train(args: Args) -> dict:
    """Tabular Dyna-Q+, line by line as in the box on top; returns what is in result.json."""
    env = make_env(args)
    agent = Agent(env.observation_space, env.action_space, args)
    episode = Episode(env, args.seed, 1)
    run = Run(args, agent, [episode])
    for step in run.steps():
        obs = episode.obs  # (a)
        action = agent.act(obs)  # (b)
        next_obs, reward, terminated, truncated = episode.step(action)  # (c)
        agent.observe(obs, action, reward, next_obs, terminated, truncated)  # (d) and (e)
        agent.update()  # (f)
        if step == 1_000 and len(agent.q) > 500:
            tqdm.write(
                f"{len(agent.q)} different observations in 1,000 steps: a table learns from what comes back only"
            )
        if terminated or truncated:
            run.log_episode(step, episode)
            episode.reset()
    if drawing := draw_grid(env, agent):
        print(drawing[0])
        run.log(run.step, {"planner/policy": drawing[1]})
    return run.finish()


def main() -> None:
    """The command line; what the user can fix is one line on stderr and status 2."""
    try:
        train(parse_args())
    except (Failure, OSError) as error:
        print(f"{SCRIPT}.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{SCRIPT}.py: stopped at once; --resume goes back to the run's last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
