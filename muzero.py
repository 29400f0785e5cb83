# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.4",
#   "numpy>=2.0",
#   "gymnasium>=1.2",
#   "tyro>=0.9",
#   "tensorboard>=2.18",
#   "pillow>=10.1",
#   "tqdm>=4.66",
# ]
# ///
"""MuZero: search a tree of what could be done, in a model learned for that alone.

A network turns the observation into a latent state; a second one goes from latent state and action to the next latent
state; a third gives each latent state the reward that led there, a policy and a value. With them a tree search looks
ahead, and finds a better policy and value than those it started from, which are trained towards what it found.

The algorithm (Schrittwieser et al. 2020, "Mastering Atari, Go, chess and shogi by planning with a learned model"):

    Self-play, at every step:
        Run N simulations from the latent state of the observation:
            Walk down by pUCT to a leaf; expand it with the model; take its value back to the root   (appendix B)
        Act by the visits of the root's actions; store observation, action, reward, the policy that was found (shares
        of the visits) and the root's value
    Training, on positions of the replay buffer, drawn uniformly or by priority:
        Unroll the model for K steps along the actions that were taken
        Train predicted rewards, values and policies towards rewards, n-step returns and policies    (equation 1)

`--search gumbel`, the default, is Gumbel MuZero (Danihelka et al. 2022, "Policy improvement by planning with Gumbel"):
at the root some actions are drawn without replacement, and again and again the worse half of them is dropped, which
improves the policy with any number of simulations. With `--min-range 0` and without noise both searches take the same
steps as DeepMind's mctx. What differs from the papers:

    - The value that a search stores is that of the policy which it found. The mean of what came back through the root,
      the papers' choice, also counts what the search tried without liking it.
    - Value targets use the rewards of an old episode only up to the first action that today's policy would not take any
      more (`follow`); policies and values of old positions are searched again, often (`reanalyze_ratio`).
    - Nearly equal Q stay close when they are rescaled (`min_range`).
    - Vectors are standardised; their network predicts how the latent state changes; and a loss like EfficientZero's
      (`consistency_weight`; without its batch normalisation and its shifted pictures) holds latent states to the
      observations that come (on the cart pole it learns as well without that loss: benchmark/claims).
    - Self-play can repeat actions (`repeat`), which it does on Acrobot. By default no priorities are used.
    - With two players the value alone encodes the result, before the end of a game and after it: the reward with which
      a game terminates becomes that value. Values are categories, and not scaled. The settings of the board games
      explore more.
    - Q is normalised by the range at its node, as in mctx, not by that of the whole tree; random actions after an end
      are trained with reward 0; and a part's last state is valued by the network until it is searched (where some
      actions are not allowed it never is, as it is not known which; its value is brought up to date all the same).
    - A state is a single observation (no history); the reward is predicted from the state that it leads to; in
      convolutional networks an action adds learned numbers at every place (theirs: planes).
    - The optimizer is Adam, with clipped gradients; importance weights are divided by the largest of the batch. What a
      new search of an old position finds stays in the replay, and is what value targets end in (MuZero: the value of a
      target network).

Run:     python muzero.py
         python muzero.py --env-id TicTacToe-v0      (then, to play against it: --play runs/FOLDER)
         python muzero.py --help
Expect:  On one of 2 busy CPU cores:
         CartPole-v1: return 500, the maximum, in all 20 episodes of every evaluation from 6,000 steps on, and so until
         30,000 steps (10 of 10 seeds, on 2 of which the settings were chosen); 10,000 steps take 3 to
         6 minutes.
         LunarLander-v3: 213, 227 and 147 over 100 episodes after 100,000 steps (3 seeds, of which the first served to
         choose the settings), 18 minutes.
         Acrobot-v1: -99, -80, -87, -85, -96 after 20,000 steps (5 seeds, of which the first served to choose the
         settings), 6 to 9 minutes.
         TicTacToe-v0: after 50,000 steps of self-play, of the 610 to 680 games that an opponent can choose, whoever
         begins, 4 of 5 seeds lose none and one loses a single one; moving first, each wins 99 % of its games
         against random moves; half an hour. The settings were chosen on one of the seeds.
"""

import argparse
import ast
import copy
import dataclasses
import io
import itertools
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
import zipfile
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cache, lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_origin, get_type_hints

# The search makes many small matrix products; more threads would only wait for each other, and for other runs. NumPy
# looks at this when it is first imported: a program that imports it before this file has to set it itself.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import gymnasium as gym
import numpy as np
import torch
import tyro
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm


class Failure(Exception):
    """Something the user can fix. `main` prints it as one line and exits with status 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Args
# ---------------------------------------------------------------------------------------------------------------------
LONGEST_PART = 200  # steps; longer episodes are stored in several parts
LONGEST_WAIT = 1_600  # steps, of all environments together, in which each stores a part


@dataclasses.dataclass
class Args:
    """MuZero (Schrittwieser et al. 2020) and Gumbel MuZero (Danihelka et al. 2022)."""

    env_id: str = "CartPole-v1"
    """Gymnasium id, `module:Name-v0` for another package's. Built in: TicTacToe-v0, KInARow-v0."""
    env_kwargs: tuple[str, ...] = ()
    """Options for `gym.make`, as name=value: `--env-kwargs max_episode_steps=50`."""
    total_timesteps: Annotated[int, 0, math.inf] = 10_000
    """Environment steps (calls of `env.step`) to learn for."""
    seed: Annotated[int, 0, 2**32 - 1] = 1
    """Seed of every random draw: the agent's, the episodes', the evaluation's."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the networks are; `auto` takes a GPU where there is one."""
    threads: Annotated[int, 1, 1024] = 1
    """CPU threads; two runs side by side get more done than one with two threads."""
    compile: bool = False
    """Compile the loss with torch.compile, which changes nothing but speed and rounding; for GPUs."""
    eval_every: Annotated[int, 1, math.inf] = 1_000
    """Environment steps between two evaluations (greedy policy, environment of its own)."""
    eval_episodes: Annotated[int, 1, math.inf] = 5
    """Episodes of an evaluation. Where the environment has no time limit, one ends after 1,000 steps at the latest."""
    checkpoint_every: Annotated[int, 1, math.inf] = 2_000
    """Environment steps between two checkpoints."""
    run_dir: str = "runs"
    """Folder in which the run's own folder is made."""
    resume: str | None = None
    """Run folder to continue exactly where its last checkpoint was written."""
    evaluate: str | None = None
    """Run folder whose agent to evaluate, without learning; nothing but videos is added to the folder."""
    capture_video: bool = False
    """Record the first episode of each evaluation as a GIF in the run folder."""

    play: str | None = None
    """Run folder of a board game, to play against its agent in the terminal; only `device` and `threads` count, too."""
    eval_env_kwargs: tuple[str, ...] = ()
    """More options for the environment of evaluations: `--eval-env-kwargs opponent=9`. (Without an opponent a board
    game is evaluated by self-play, whose return says nothing.)"""
    atari: bool = False
    """The usual wrappers of Atari games: random no-ops, 4 frames a step, grey, the last 4 pictures."""

    num_envs: Annotated[int, 1, 10**5] = 8
    """Environments that are played side by side, so that each call of the network serves as many searches; all of them
    make a step, then all searches of old positions and all updates that are due are made. (`total_timesteps` is rounded
    up to a multiple of it.) With more than 8, long episodes are stored in shorter parts."""
    gamma: Annotated[float, -1, 1] = 0.99
    """Discount factor (MuZero, Atari: 0.997). -1 where two players take turns: observations are as the one to move sees
    them, rewards are the mover's; `support` is to be the largest result, `td_steps` the length of a game."""
    search: Literal["puct", "gumbel"] = "gumbel"
    """Tree search: MuZero's, which `dirichlet_alpha`, `dirichlet_fraction` and `temperature` belong to, or Gumbel
    MuZero's, with `max_considered`, which needs fewer simulations."""
    num_simulations: Annotated[int, 1, 10**5] = 16
    """Simulations of a search (MuZero: 50 for Atari, 800 for board games; Gumbel MuZero: from 2)."""
    max_considered: Annotated[int, 1, 10**5] = 16
    """gumbel: how many actions of the root are tried (Gumbel MuZero: 16). With 16 simulations and 16 or more actions
    each of them is tried once, and nothing is halved."""
    dirichlet_alpha: Annotated[float, 0.03, 10**6] = 0.25
    """puct: concentration of the noise on the root's priors in self-play (MuZero: 0.25 for Atari, 0.3 for chess, 0.03
    for Go)."""
    dirichlet_fraction: Annotated[float, 0, 1] = 0.25
    """puct: share of that noise (MuZero: 0.25)."""
    temperature: Annotated[float, 1e-3, 10**3] = 1.0
    """puct: actions of self-play are drawn from visits ^ (1 / temperature): above 1 they are more random (MuZero begins
    with 1 and lowers it)."""
    repeat: Annotated[float, 0, 1] = 0.0
    """Probability that self-play does once more what it did last, whatever the search says: where single actions change
    little, independent random ones cancel out (Dabney et al. 2021, "Temporally-extended epsilon-greedy exploration";
    MuZero: 0)."""
    min_range: Annotated[float, 0, 1] = 0.05
    """Lower bound on the range by which the Q of a node are divided, as a share of the range of the values in the
    replay (0 included). Without it two nearly equal Q become 0 and 1, and the search follows the model's errors; a
    larger one gives the prior more weight; 0: as in mctx."""

    learning_starts: Annotated[int, 1, math.inf] = 500
    """Steps before the first update."""
    updates_per_step: Annotated[float, 0, 1000] = 0.5
    """Gradient steps for each environment step."""
    batch_size: Annotated[int, 1, 10**6] = 256
    """Positions of an update."""
    unroll_steps: Annotated[int, 1, 1000] = 5
    """Steps K that the model is unrolled (MuZero: 5)."""
    td_steps: Annotated[int, 1, LONGEST_PART] = 50
    """Steps n of rewards in a value target, before the search's value of the state that follows (MuZero, Atari: 10; at
    most 200, as no part of an episode in the replay is longer)."""
    replay_size: Annotated[int, 2, 10**9] = 100_000
    """Rows of the replay buffer: positions, and of each part of an episode the state after it."""
    follow: Annotated[float, 0, 1] = 0.5
    """Cut a value target's n steps before the first action whose probability is below this share of the most probable
    one's, in the policy that `reanalyze_ratio` keeps up to date: what came of it says little about today's policy; 0:
    never (MuZero). With `reanalyze_ratio` 0, use 0."""
    reanalyze_ratio: Annotated[float, 0, 1000] = 40.0
    """Rows of the replay drawn for each environment step (which itself needs a search) and searched again: the policy
    and the value that are found with the latest network take the place of the old ones (MuZero Reanalyze). States after
    the end of an episode are drawn, too, and left alone."""
    priority_exponent: Annotated[float, 0, 10] = 0.0
    """Exponent of the priorities |value - value target|, where value is the search's when a position is stored, and the
    network's when it is trained on it; 0: positions are drawn uniformly (MuZero: 1)."""
    learning_rate: Annotated[float, 1e-9, 1] = 1e-3
    """Step size of Adam at the beginning."""
    decay_steps: Annotated[int, 1, math.inf] = 10_000
    """Environment steps after which the step size is a tenth; it falls exponentially (MuZero, appendix G), and stays at
    a hundredth. Set it to about as many steps as learning takes."""
    weight_decay: Annotated[float, 0, 1] = 1e-4
    """Factor of half the squared weights in the loss (MuZero: 1e-4)."""
    max_grad_norm: Annotated[float, 1e-9, math.inf] = 5.0
    """Longest gradient; a longer one is shortened to it."""
    value_weight: Annotated[float, 0, 1000] = 1.0
    """Weight of the value loss (MuZero: 1, MuZero Reanalyze: 0.25)."""
    consistency_weight: Annotated[float, 0, 1000] = 2.0
    """Weight of EfficientZero's self-supervised loss: an imagined latent state is to be like that of the observation
    that came (Ye et al. 2021: 2; they divide all losses by K, here only those of the K unrolled steps are)."""
    network: Literal["auto", "mlp", "conv"] = "auto"
    """Fully connected or convolutional; `auto`: convolutional for observations (height, width, channels)."""
    hidden_size: Annotated[int, 1, 10**5] = 128
    """Units of the hidden layer of each network."""
    latent_size: Annotated[int, 2, 10**5] = 64
    """Numbers in a latent state of a vector."""
    channels: Annotated[int, 1, 10**4] = 32
    """Planes of a latent state of an image or a board, and of the convolutions (MuZero: 256)."""
    support: Annotated[int, 1, 10**4] = 25
    """Rewards and values, scaled by h, are categorical over -support ... support: up to 640 unscaled for 25; what is
    larger is clipped. With a negative `gamma` they are not scaled: 1 has the categories lost, drawn, won."""

    def __post_init__(self):
        check_ranges(self)
        if -1 < self.gamma < 0:
            raise Failure(f"--gamma must be -1 in self-play, and from 0 on without, not {self.gamma}")


# Settings by environment that differ from the defaults. `parse_args` uses them; what the command line says wins.
# The agent of a game must answer any opponent: its self-play explores widely, by noise, temperature and a large
# `min_range`, which lets noise count, while `follow` and reanalysis keep the values those of good play. In LunarLander
# an action changes little beside the range of all values; on Acrobot independent random actions cancel out.
BOARD_GAME = {"gamma": -1.0, "support": 1, "num_envs": 32, "consistency_weight": 0.0, "eval_episodes": 20}
BOARD_GAME |= {"search": "puct", "min_range": 1.0, "num_simulations": 50, "reanalyze_ratio": 16.0}
BOARD_GAME |= {"dirichlet_alpha": 1.0, "dirichlet_fraction": 0.5, "temperature": 4.0}
PRESETS: dict[str, dict[str, Any]] = {
    "Acrobot-v1": {"total_timesteps": 20_000, "decay_steps": 20_000, "repeat": 0.5},
    "LunarLander-v3": {"total_timesteps": 100_000, "decay_steps": 100_000, "eval_every": 10_000}
    | {"updates_per_step": 0.25, "reanalyze_ratio": 10.0, "min_range": 0.01},
    "TicTacToe-v0": BOARD_GAME
    | {"total_timesteps": 50_000, "decay_steps": 50_000, "eval_every": 5_000, "eval_env_kwargs": ("opponent=9",)}
    | {"td_steps": 9, "network": "mlp", "hidden_size": 256}
    | {"batch_size": 64, "updates_per_step": 2.0, "learning_rate": 3e-3},
    "KInARow-v0": BOARD_GAME
    | {"total_timesteps": 500_000, "decay_steps": 500_000, "eval_every": 20_000, "eval_env_kwargs": ("opponent=4",)}
    | {"td_steps": 42},
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
def wrap(env: gym.Env, args: Args) -> gym.Env:
    """The environment with what `--atari` puts around it."""
    if not args.atari:
        return env
    env = gym.wrappers.FrameStackObservation(gym.wrappers.AtariPreprocessing(env), 4)
    space = gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)
    return gym.wrappers.TransformObservation(env, lambda obs: np.moveaxis(obs, 0, -1), space)


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
        kwargs: dict[str, Any] = {"frameskip": 1, "max_episode_steps": 108_000} if args.atari else {}  # frames
        kwargs |= {name: literal(value) for name, value in (option.split("=", 1) for option in args.env_kwargs)}
        drawing = {"render_mode": render_mode} if render_mode else {}  # not every environment has this option
        env = wrap(gym.make(args.env_id, **drawing, **kwargs), args)
        if render_mode:  # where a package for drawing is missing, it fails now and not after the training
            env.reset(seed=0)
            env.render()
        return env
    except Exception as error:
        unknown = isinstance(error, gym.error.UnregisteredEnv)
        hint = "; an environment of another package is named module:Name-v0" if unknown else ""
        raise Failure(f"cannot make the environment {args.env_id}: {error}{hint}") from error


def check_observation(obs: Any, space: gym.Space) -> None:
    """Raises ValueError for an observation that is not of the space; values beyond a Box's bounds pass, up to
    where single precision cannot hold their squares."""
    if isinstance(space, gym.spaces.Discrete) and not space.contains(obs):
        raise ValueError(f"observation {obs!r} is not in {space}")
    array = np.asarray(obs)
    fits = array.shape == space.shape and np.can_cast(array.dtype, space.dtype, "same_kind")
    if not fits or not (np.abs(array.astype(float)) < 1e15).all():  # NaN is not, either
        wanted = f"an array of shape {space.shape} and type {space.dtype}, of numbers below 1e15"
        raise ValueError(f"observation {obs!r} is not {wanted}")


def check_spaces(observation_space: gym.Space, action_space: gym.Space) -> None:
    """Raises Failure for spaces that this script does not handle."""
    box = isinstance(observation_space, gym.spaces.Box) and (
        len(observation_space.shape) == 3 or math.prod(observation_space.shape) <= 1_000
    )
    if not box and not isinstance(observation_space, gym.spaces.Discrete):
        raise Failure(
            "observations must be Discrete, an image (height, width, channels) or a Box of up to 1,000 numbers, not "
            f"{observation_space}; Dict: dreamer.py; Tuple: dyna_q.py"
        )
    if not isinstance(action_space, gym.spaces.Discrete):
        raise Failure(f"actions must be Discrete, not {action_space}; a bounded Box: cem_mpc.py, mbpo.py, dreamer.py")
    if too_many := [space for space in (observation_space, action_space) if getattr(space, "n", 0) > 10_000]:
        raise Failure(f"{too_many[0]} has more than 10,000 elements")


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

    The purposes: 0 the agent, 1 training episodes, 2 evaluation episodes, 3 acting in evaluation.
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


class KInARow(gym.Env):
    """Two players take turns to put a stone on a board; who first has `k` in a row, in any direction, has won.

    Observation, float32 (rows, columns, 2): the stones of the player whose turn it is, and the other's. Action: a
    field, row * columns + column, or with `gravity` a column, down which the stone falls. Reward: 1, to who makes it,
    for the move that wins, else 0. `info["action_mask"]` (A,) is 1 for what is allowed; anything else: ValueError.

    With `opponent` None, the actions of both players are asked for in turn. A number: the other player is a part of
    the environment, looks so many moves ahead (0: random moves; as many as there are fields: perfect play, for which a
    board has to be as small as 3 x 3), begins every second episode on average, and a loss has reward -1.
    """

    metadata: ClassVar = {"render_modes": ["ansi", "rgb_array"], "render_fps": 1}
    foreseen: ClassVar[dict[tuple, Callable]] = {}  # what opponents found out, for all boards of the same kind

    def __init__(
        self,
        rows: int = 3,
        columns: int = 3,
        k: int = 3,
        gravity: bool = False,
        opponent: int | None = None,
        render_mode: str | None = None,
    ):
        if opponent is not None and (opponent != int(opponent) or opponent < 0):
            raise ValueError(f"opponent must be a number of moves, not {opponent}")
        self.rows, self.columns, self.gravity = rows, columns, gravity
        self.opponent, self.render_mode = opponent, render_mode
        self.observation_space = gym.spaces.Box(0.0, 1.0, (rows, columns, 2), np.float32)
        self.action_space = gym.spaces.Discrete(columns if gravity else rows * columns)
        # The stones of a player are the bits of a number, and a row of k is such a number too.
        self.lines: list[list[int]] = [[] for _ in range(rows * columns)]
        for row, column, (down, right) in itertools.product(
            range(rows), range(columns), ((0, 1), (1, 0), (1, 1), (1, -1))
        ):
            if row + (k - 1) * down < rows and 0 <= column + (k - 1) * right < columns:
                fields = [(row + index * down) * columns + column + index * right for index in range(k)]
                for field in fields:
                    self.lines[field].append(sum(1 << other for other in fields))
        memory = lru_cache(maxsize=2**18)(self.look)
        self.remembered = self.foreseen.setdefault((rows, columns, k, gravity), memory)

    def field(self, taken: int, action: int) -> int | None:
        """Where the stone of an action comes to lie; None: it is not allowed."""
        fields = range((self.rows - 1) * self.columns + action, -1, -self.columns) if self.gravity else [action]
        return next((field for field in fields if not taken >> field & 1), None)

    def moves(self, own: int, other: int) -> Iterator[tuple[int, int, bool]]:
        """The actions that are allowed, the stones that the player then has, and whether that wins."""
        for action in range(int(self.action_space.n)):
            if (field := self.field(own | other, action)) is not None:
                after = own | 1 << field
                yield action, after, any(after & line == line for line in self.lines[field])

    def foresee(self, own: int, other: int, plies: int) -> float:
        """What the player to move gets at best within so many moves; 0 where that is open. Soon is better than late."""
        return self.remembered(own, other, plies) if plies else 0.0

    def look(self, own: int, other: int, plies: int) -> float:
        """`foresee`, for the first time."""
        moves = self.moves(own, other)
        values = (1.0 if won else -0.99 * self.foresee(other, after, plies - 1) for _, after, won in moves)
        return max(values, default=0.0)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.own, self.other, self.turns = 0, 0, 0
        if self.opponent is not None and self.np_random.random() < 0.5:
            self.reply()
        return self.observation()

    def observation(self) -> tuple[np.ndarray, dict]:
        """The board as the player to move sees it, and what is allowed."""
        stones = [(self.own >> field & 1, self.other >> field & 1) for field in range(self.rows * self.columns)]
        mask = np.zeros(self.action_space.n, np.int8)
        mask[[action for action, _, _ in self.moves(self.own, self.other)]] = 1
        return np.array(stones, np.float32).reshape(self.observation_space.shape), {"action_mask": mask}

    def put(self, action: int) -> tuple[float, bool]:
        """The move of the player whose turn it is, then it is the other's: reward and end."""
        moves = {move: (after, won) for move, after, won in self.moves(self.own, self.other)}
        if action not in moves:
            raise ValueError(f"move {action} is not allowed")
        after, won = moves[action]
        self.own, self.other, self.turns = self.other, after, self.turns + 1
        return float(won), won or self.turns == self.rows * self.columns

    def reply(self) -> tuple[float, bool]:
        """The opponent's move: one of the best that it foresees."""
        values = {
            action: 0.0 if not self.opponent else 1.0 if won else -self.foresee(self.other, after, self.opponent - 1)
            for action, after, won in self.moves(self.own, self.other)
        }
        best = [action for action, value in values.items() if value == max(values.values())]
        return self.put(best[self.np_random.integers(len(best))])

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward, terminated = self.put(int(action))
        if self.opponent is not None and not terminated:
            lost, terminated = self.reply()
            reward -= lost
        obs, info = self.observation()
        return obs, reward, terminated, False, info

    def render(self) -> str | np.ndarray | None:
        """The board, X for who began: text, or pixels (48 * rows, 48 * columns, 3)."""
        kind = self.observation()[0].astype(int) @ ([1, 2] if self.turns % 2 == 0 else [2, 1])
        if self.render_mode == "ansi":
            return "\n".join(" ".join(".XO"[i] for i in row) for row in kind)
        if self.render_mode == "rgb_array":
            palette = np.array([(240, 240, 240), (200, 60, 40), (60, 90, 200)], np.uint8)
            pixels = palette[kind].repeat(48, axis=0).repeat(48, axis=1)
            pixels[::48], pixels[:, ::48] = 90, 90
            return pixels


for _name, _kwargs in (("TicTacToe-v0", {}), ("KInARow-v0", {"rows": 6, "columns": 7, "k": 4, "gravity": True})):
    if _name not in gym.registry:
        gym.register(_name, entry_point=KInARow, kwargs=_kwargs)


Array = np.ndarray
# What a search asks of the model: (latent (B, ...), action (B,)) -> latent, reward (B,), logits (B, A), value (B,).
Recurrent = Callable[[Array, Array], tuple[Array, Array, Array, Array]]


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------
# The network is written in what PyTorch and NumPy have in common: it is trained as tensors and searched, on a CPU, as
# arrays that share their memory, because for a few rows at a time calls of NumPy cost half of those of PyTorch.
Numbers = Tensor | Array
Parameters = Mapping[str, Numbers]


def library(x: Numbers) -> ModuleType:
    return torch if isinstance(x, Tensor) else np


def scale(x: Numbers) -> Numbers:
    """h(x) = sign(x) (sqrt(|x| + 1) - 1) + 0.001 x, which keeps targets small (MuZero, appendix F)."""
    return library(x).sign(x) * (library(x).sqrt(abs(x) + 1) - 1) + 0.001 * x


def unscale(y: Numbers) -> Numbers:
    """The inverse of h."""
    return library(y).sign(y) * (((library(y).sqrt(1 + 0.004 * (abs(y) + 1 + 0.001)) - 1) / 0.002) ** 2 - 1)


def softmax(logits: Numbers) -> Numbers:
    exp = library(logits).exp(logits - library(logits).amax(logits, -1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def two_hot(x: Tensor, support: int, scaled: bool = True) -> Tensor:
    """(...) -> (..., 2 * support + 1): weight on the two whole numbers around h(x), or x, of which it is the mean."""
    x = (scale(x) if scaled else x).clamp(-support, support)
    bins = torch.arange(-support, support + 1, device=x.device)
    return (1 - (x[..., None] - bins).abs()).clamp(min=0)


def expectation(logits: Numbers, scaled: bool = True) -> Numbers:
    """(..., 2 * support + 1) -> (...): the inverse of `two_hot`, of logits."""
    bins = np.arange(logits.shape[-1], dtype=np.float32) - logits.shape[-1] // 2
    mean = softmax(logits) @ (torch.from_numpy(bins).to(logits) if isinstance(logits, Tensor) else bins)
    return unscale(mean) if scaled else mean


HEADS = ("reward", "value", "policy")  # in the order of `predict`; `Agent.heads`: reward, policy, value


class Net(NamedTuple):
    """The functions of a network, of which the parameters are the first argument."""

    represent: Callable[..., Numbers]  # observations (B, ...) -> latents (B, ...)
    dynamics: Callable[..., Numbers]  # latents, actions (B,) -> the next latents
    predict: Callable[..., list[Numbers]]  # latents -> logits of the reward that led there, the value and the policy
    two_players: bool  # a zero-sum game: values are categories from -support to support, not scaled by h


def make_network(
    obs_shape: tuple[int, ...], num_actions: int, args: Args, generator: torch.Generator
) -> tuple[Net, nn.ParameterDict]:
    """A network for vectors (size,) or for images and boards (height, width, channels), with PyTorch's initial values
    drawn from our own generator."""
    hidden, bins, channels, two_players = args.hidden_size, 2 * args.support + 1, args.channels, args.gamma < 0
    shapes: dict[str, tuple[int, ...]] = {}
    if len(obs_shape) == 1:
        net = Net(represent, partial(dynamics, turns=two_players), predict, two_players)
        latent = features = args.latent_size  # numbers of a latent state, and of what a head gets
        shapes |= {"represent": (obs_shape[0], hidden), "latent": (hidden, latent)}
        shapes |= {"step": (latent + num_actions, hidden), "next_latent": (hidden, latent)}
    else:
        net = Net(represent_image, dynamics_image, predict_image, two_players)
        (height, width, planes), square = obs_shape, (channels, channels, 3, 3)
        while min(height, width) > 12:
            shapes[f"halve_{len(shapes)}"] = (channels, planes, 3, 3)
            height, width, planes = (height + 1) // 2, (width + 1) // 2, channels
        shapes |= {"represent": (channels, planes, 3, 3), "step": square}
        shapes |= {f"{name}_{part}": square for name in ("latent", "next_latent") for part in (1, 2)}
        shapes |= {f"{name}_planes": (4, channels, 1, 1) for name in HEADS}
        latent, features = channels * height * width, 4 * height * width
    shapes |= {f"{name}_hidden": (features, hidden) for name in HEADS}
    shapes |= {"reward": (hidden, bins), "value": (hidden, bins), "policy": (hidden, num_actions)}
    if args.consistency_weight:
        shapes |= {"project": (latent, hidden), "projection": (hidden, hidden)}
        shapes |= {"predictor_hidden": (hidden, hidden), "predictor": (hidden, hidden)}

    def uniform(bound: float, *shape: int) -> Tensor:
        return nn.init.uniform_(torch.empty(shape, device=generator.device), -bound, bound, generator=generator)

    parameters = nn.ParameterDict()
    for name, shape in shapes.items():
        fan_in, fan_out = shape if len(shape) == 2 else (math.prod(shape[1:]), shape[0])
        parameters[f"{name}_weight"] = uniform(1 / math.sqrt(fan_in), *shape)
        parameters[f"{name}_bias"] = uniform(1 / math.sqrt(fan_in), fan_out)
    if len(obs_shape) == 3:  # what an action adds, at every place
        parameters["step_action"] = uniform(1, num_actions, channels, height, width)
    return net, parameters


def dense(parameters: Parameters, name: str, x: Numbers) -> Numbers:
    return x @ parameters[f"{name}_weight"] + parameters[f"{name}_bias"]


def relu(x: Numbers) -> Numbers:
    return F.relu(x) if isinstance(x, Tensor) else np.maximum(x, 0)


def two_layers(parameters: Parameters, hidden: str, output: str, x: Numbers) -> Numbers:
    return dense(parameters, output, relu(dense(parameters, hidden, x)))


def bounded(latent: Numbers) -> Numbers:
    """Each latent state (B, ...) to [0, 1] by its smallest and largest number (MuZero, appendix G)."""
    axes = tuple(range(1, latent.ndim))
    low, high = library(latent).amin(latent, axes, keepdims=True), library(latent).amax(latent, axes, keepdims=True)
    return (latent - low) / library(latent).clip(high - low, 1e-5, None)


def represent(parameters: Parameters, obs: Numbers) -> Numbers:
    """obs (B, obs_size) -> latent (B, L)."""
    return bounded(two_layers(parameters, "represent", "latent", obs))


def dynamics(parameters: Parameters, latent: Numbers, action: Numbers, turns: bool = False) -> Numbers:
    """latent (B, L), action (B,) -> the next latent (B, L), L = `latent_size`; `turns`: as the other player sees
    it."""
    # The rows of the weights behind the latent's are what a one-hot action selects.
    weight, size = parameters["step_weight"], latent.shape[-1]
    hidden = relu(latent @ weight[:size] + weight[size:][action] + parameters["step_bias"])
    change = dense(parameters, "next_latent", hidden)
    # Most steps change little; but with two players the point of view changes, too. (`dynamics_image` never adds.)
    return bounded(change if turns else latent + change)


def predict(parameters: Parameters, latent: Numbers) -> list[Numbers]:
    """latent (B, L) -> logits of the reward that led to it and of its value (B, 2 * support + 1), and of the policy
    (B, A)."""
    return [two_layers(parameters, f"{name}_hidden", name, latent) for name in HEADS]


def convolve(parameters: Parameters, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """Same size, or half of it."""
    weight = parameters[f"{name}_weight"]
    return F.conv2d(x, weight, parameters[f"{name}_bias"], stride, padding=weight.shape[-1] // 2)


def residual(parameters: Parameters, name: str, x: Tensor) -> Tensor:
    """A block of two convolutions (He et al. 2016), without batch normalisation."""
    return F.relu(x + convolve(parameters, f"{name}_2", F.relu(convolve(parameters, f"{name}_1", x))))


def represent_image(parameters: Parameters, obs: Tensor) -> Tensor:
    """obs (B, height, width, planes) -> latent (B, channels, h, w), the smaller one of h and w not above 12."""
    x = obs.permute(0, 3, 1, 2)
    index = 0
    while f"halve_{index}_weight" in parameters:
        x = F.relu(convolve(parameters, f"halve_{index}", x, stride=2))
        index += 1
    return bounded(residual(parameters, "latent", F.relu(convolve(parameters, "represent", x))))


def dynamics_image(parameters: Parameters, latent: Tensor, action: Tensor) -> Tensor:
    """latent (B, channels, h, w), action (B,) -> the next latent."""
    hidden = F.relu(convolve(parameters, "step", latent) + parameters["step_action"][action])
    return bounded(residual(parameters, "next_latent", hidden))


def predict_image(parameters: Parameters, latent: Tensor) -> list[Tensor]:
    """As `predict`, each head from four planes of its own."""
    planes = [F.relu(convolve(parameters, f"{name}_planes", latent)).flatten(1) for name in HEADS]
    return [two_layers(parameters, f"{name}_hidden", name, x) for name, x in zip(HEADS, planes, strict=True)]


def inconsistency(parameters: Parameters, imagined: Tensor, real: Tensor) -> Tensor:
    """(N, ...), (N, ...) -> (N,): minus the cosine between the projection of a real latent state, which gets no
    gradient, and what is predicted of it from an imagined one (EfficientZero, section 4.1; Chen & He 2021, SimSiam,
    without its batch normalisation)."""
    ours, theirs = (two_layers(parameters, "project", "projection", latent.flatten(1)) for latent in (imagined, real))
    predicted = two_layers(parameters, "predictor_hidden", "predictor", ours)
    return -F.cosine_similarity(predicted, theirs.detach(), dim=1)


def unrolled_loss(
    net: Net, parameters: Parameters, batch: dict[str, Tensor], value_weight: float, consistency_weight: float = 0.0
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """MuZero, equation 1, without the weight decay. `batch`: obs (B, ...); action and reward (B, K); value and policy
    (B, K + 1, ...); acting (B, K + 1): 1 where an action was taken, 0 from the last state on, which masks policy and
    consistency; known (B, K + 1): the same, and also 1 after a termination, which masks value and reward; weight (B,);
    with a `consistency_weight` also the observations that came, next_obs (B, K, ...). Returns the loss, the first value
    predictions (B,), and the mean losses of each step, where it counts: (K + 1,), of rewards and consistency (K,).

    Step 0 has weight 1, steps 1 to K have 1 / K each; the gradient is halved where a latent state enters the dynamics
    (MuZero, appendix G).
    """
    count, steps = batch["action"].shape
    latents = [net.represent(parameters, batch["obs"])]
    for index in range(steps):
        latent = latents[-1]
        latents.append(net.dynamics(parameters, 0.5 * latent + 0.5 * latent.detach(), batch["action"][:, index]))
    logits = net.predict(parameters, torch.stack(latents, dim=1).flatten(0, 1))
    reward_logits, value_logits, policy_logits = (part.view(count, steps + 1, -1) for part in logits)
    share = torch.full((1, steps + 1), 1 / steps, device=value_logits.device)
    share[:, 0] = 1.0

    def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        return -(target * logits.log_softmax(-1)).sum(-1)

    support, scaled = value_logits.shape[-1] // 2, not net.two_players
    known, acting = batch["known"], batch["acting"]
    value = cross_entropy(value_logits, two_hot(batch["value"], support, scaled)) * known
    policy = cross_entropy(policy_logits, batch["policy"]) * acting
    reward = cross_entropy(reward_logits[:, 1:], two_hot(batch["reward"], support, scaled)) * known[:, :-1]
    total = ((value_weight * value + policy) * share).sum(1) + (reward * share[:, 1:]).sum(1)
    logs = {"value_loss": (value, known), "policy_loss": (policy, acting), "reward_loss": (reward, known[:, :-1])}
    if consistency_weight:
        imagined = torch.stack(latents[1:], dim=1).flatten(0, 1)
        with torch.no_grad():
            real = net.represent(parameters, batch["next_obs"].flatten(0, 1))
        distance = inconsistency(parameters, imagined, real).view(count, steps) * acting[:, :-1]
        total = total + consistency_weight * (distance * share[:, 1:]).sum(1)
        logs["consistency_loss"] = distance, acting[:, :-1]
    return (
        (batch["weight"] * total).mean(),
        expectation(value_logits[:, 0], scaled).detach(),
        {name: loss.detach().sum(0) / mask.sum(0).clamp(min=1) for name, (loss, mask) in logs.items()},
    )


# ---------------------------------------------------------------------------------------------------------------------
# Buffer
# ---------------------------------------------------------------------------------------------------------------------
class Replay:
    """Positions of the latest episodes in a ring. An episode, or a part of one, is T rows for its steps and one for the
    state after them; an old one is overwritten from its first row on: what follows a row is there as long as it is."""

    def __init__(
        self, obs_shape: tuple[int, ...], obs_dtype: Any, num_actions: int, capacity: int, follow: float = 0.0
    ):
        self.added, self.follow = 0, follow
        self.columns = {
            "obs": np.zeros((capacity, *obs_shape), obs_dtype),
            "action": np.zeros(capacity, np.int64),
            "reward": np.zeros(capacity, np.float32),
            "policy": np.zeros((capacity, num_actions), np.float32),  # what the search found, and
            "value": np.zeros(capacity, np.float32),  # its value of the root; after a termination 0, or the result
            "followed": np.zeros(capacity, bool),  # whether that policy still takes the action that was taken
            "legal": np.zeros((capacity, num_actions), bool),
            "left": np.zeros(capacity, np.int64),  # rows until the last one of its episode, or part of one
            "terminated": np.zeros(capacity, bool),  # whether a termination is what ends it
            "priority": np.zeros(capacity),  # 0 for last rows, which are no positions to start from
        }

    @property
    def used(self) -> int:
        """Rows that are filled."""
        return min(self.added, len(self.columns["obs"]))

    def add(self, columns: dict[str, Array]) -> Array:
        """Appends rows, not more than the capacity; returns where they are."""
        count, capacity = len(columns["obs"]), len(self.columns["obs"])
        rows = (self.added + np.arange(count)) % capacity
        for name, values in columns.items():
            self.columns[name][rows] = values
        self.mark_followed(rows)
        self.added += count
        return rows

    def mark_followed(self, rows: Array) -> None:
        """Notes whether the policies of rows, which have changed, take the actions that were taken there."""
        policy, action = self.columns["policy"][rows], self.columns["action"][rows]
        taken = np.take_along_axis(policy, action[:, None], axis=1)[:, 0]
        self.columns["followed"][rows] = taken >= self.follow * policy.max(1)

    def onwards(self, rows: Array, count: int) -> Array:
        """(R,) -> (R, count): each row and what follows it; behind the last one of an episode, that one again."""
        offset = np.minimum(np.arange(count), self.columns["left"][rows][:, None])
        return (rows[:, None] + offset) % len(self.columns["left"])

    def n_step_returns(self, rows: Array, n: int, gamma: float, follow: bool = True) -> Array:
        """(R,): sum of gamma^i r_{t+i} over i < n, plus gamma^n v_{t+n} with the search's v; where fewer than n steps
        are left, v is that of the last state: as stored after a termination, after a truncation the network's, until
        the state is searched. With `follow`, n ends before the first action that today's policy would not take: where
        that is the first of all, the target is the search's own value."""
        columns, index, discounts = self.columns, self.onwards(rows, n), float(gamma) ** np.arange(n + 1)
        used = np.arange(n) < columns["left"][rows][:, None]  # (R, n): which rewards
        if follow:
            used = np.logical_and.accumulate(used & columns["followed"][index], axis=1)
        ahead = used.sum(1)  # (R,)
        rewards = np.where(used, columns["reward"][index], 0) @ discounts[:n]
        return rewards + discounts[ahead] * columns["value"][(rows + ahead) % len(columns["value"])]

    def sample(
        self, count: int, steps: int, n: int, gamma: float, rng: np.random.Generator, next_obs: bool = False
    ) -> tuple[Array, dict[str, Array]]:
        """Rows drawn by priority, and what `unrolled_loss` wants of them."""
        columns, priority = self.columns, self.columns["priority"]
        cumulated = priority.cumsum()
        rows = cumulated.searchsorted(rng.random(count) * cumulated[-1], side="right")
        weight = 1 / (np.count_nonzero(priority) * (priority[rows] / cumulated[-1]))  # 1 / (N P(i)): MuZero, appendix G

        index = self.onwards(rows, steps + 1)  # (B, K + 1)
        offset, left = np.arange(steps + 1), columns["left"][rows][:, None]
        acting = offset < left
        known = acting | columns["terminated"][rows][:, None]
        # Two players: after the end, too, the turn would change with each step, and with it the sign of the value.
        beyond = np.maximum(offset - left, 0)  # steps
        value = self.n_step_returns(index.reshape(-1), n, gamma).reshape(index.shape) * np.sign(gamma) ** beyond
        action = np.where(acting, columns["action"][index], rng.integers(columns["policy"].shape[1], size=index.shape))
        batch = {
            "obs": columns["obs"][rows],
            "action": action[:, :-1],
            "reward": np.where(acting, columns["reward"][index], 0)[:, :-1],
            "value": value.astype(np.float32),
            "policy": columns["policy"][index],
            "known": known.astype(np.float32),
            "acting": acting.astype(np.float32),
            "weight": (weight / weight.max()).astype(np.float32),
        }
        if next_obs:
            batch["next_obs"] = columns["obs"][index[:, 1:]]
        return rows, batch

    def unfinished(self, count: int, rng: np.random.Generator) -> Array:
        """Up to `count` rows drawn uniformly: what is drawn of the states after an end is left out."""
        rows = rng.integers(self.used, size=count)
        return rows[(self.columns["left"][rows] > 0) | ~self.columns["terminated"][rows]]

    def state_dict(self) -> dict:
        filled = {name: torch.from_numpy(column[: self.used]) for name, column in self.columns.items()}
        return {"added": self.added} | filled

    def load_state_dict(self, state: dict) -> None:
        self.added = state["added"]
        for name, column in self.columns.items():
            column[: len(state[name])] = state[name].numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Planner
# ---------------------------------------------------------------------------------------------------------------------
class Tree:
    """B search trees of up to N + 1 nodes, in flat arrays: node n of tree b is row b * (N + 1) + n, its root n = 0.

    What belongs to an action of a node, an edge, is in arrays (B * (N + 1), A), of which `edge = row * A + action` is
    the flat index. A node's value is the mean of what came back through it, its own prediction included; the value
    of an edge, Q, is its reward plus the discounted value of the node behind it. The roots: latent (B, ...), logits
    (B, A), the network's value (B,), legal (B, A) bool.
    """

    def __init__(
        self, latent: Array, logits: Array, value: Array, legal: Array, num_simulations: int, min_range: float = 0.0
    ):
        (batch, self.num_actions), width = logits.shape, num_simulations + 1
        self.min_range = max(min_range, 1e-8)  # by what at least Q is divided in `rescale`
        self.roots, rows = np.arange(batch) * width, batch * width
        edges = rows, self.num_actions
        self.latent = np.empty((rows, *latent.shape[1:]), latent.dtype)
        self.prediction, self.value = np.empty((2, rows), np.float32)
        self.visits, self.depth = np.zeros((2, rows), np.int64)  # the depth of a node below its root
        self.logits, self.prior = np.empty((2, *edges), np.float32)
        self.reward, self.q = np.zeros((2, *edges), np.float32)
        self.edge_visits = np.zeros(edges, np.int64)
        self.child = np.full(edges, -1)  # the row of the node behind, -1: none
        self.add(self.roots, latent, np.where(legal, logits, -np.inf), value)

    def add(self, rows: Array, latent: Array, logits: Array, value: Array) -> None:
        """Writes new nodes, which count their own prediction as a first visit."""
        self.latent[rows], self.logits[rows], self.prior[rows] = latent, logits, softmax(logits)
        self.prediction[rows] = self.value[rows] = value
        self.visits[rows] = 1

    def walk(self, selected: Array) -> tuple[Array, list[tuple[Array, Array, Array]]]:
        """Down all trees by the `selected` actions of their nodes, to an edge with no node behind it. Returns these
        edges (B,) and the path: for each level the trees still walking, their nodes' rows and their edges."""
        walking, node, path = np.arange(len(self.roots)), self.roots, []
        leaf_edge = np.empty(len(self.roots), np.int64)
        while len(walking):
            edge = node * self.num_actions + selected.take(node)
            path.append((walking, node, edge))
            leaf_edge[walking] = edge  # until there is a deeper one
            behind = self.child.take(edge)
            inside = behind >= 0
            walking, node = walking[inside], behind[inside]
        return leaf_edge, path

    def back_up(self, path: list[tuple[Array, Array, Array]], leaf_value: Array, discount: float) -> Array:
        """Takes the values of new leaves (B,) up their paths; returns the rows that it changed."""
        returned, levels = leaf_value.astype(np.float32), []  # what comes back to each tree's node of a level
        for walking, _, edge in reversed(path):
            returned[walking] = back = self.reward.take(edge) + discount * returned.take(walking)
            levels.append(back)
        _, nodes, edges = (np.concatenate(parts) for parts in zip(*path, strict=True))
        count, back = self.visits.take(nodes), np.concatenate(levels[::-1])
        self.value[nodes] = (self.value.take(nodes) * count + back) / (count + 1)
        self.visits[nodes] = count + 1
        self.edge_visits.reshape(-1)[edges] += 1
        self.q.reshape(-1)[edges] = self.reward.take(edges) + discount * self.value.take(self.child.take(edges))
        return nodes


def search(
    recurrent: Recurrent,
    tree: Tree,
    discount: float,
    num_simulations: int,
    select: Callable[[Array], Array],
    select_root: Callable[[], Array] | None = None,
) -> None:
    """Grows all trees at once: each simulation walks to a leaf, expands it, and takes its value back to the root; the
    network is called once for the leaves of all trees.

    `select`: rows (R,) -> the actions (R,) to walk on by; `select_root`: the same for the roots, where it differs. What
    a node selects changes only when something comes back through it, so it is computed then, for all nodes of a path at
    once, and a step down is but a look into a table.
    """
    selected = np.zeros(len(tree.value), np.int64)
    selected[tree.roots] = select(tree.roots)  # also where `select_root` decides, which may rely on it
    for simulation in range(num_simulations):
        if select_root is not None:
            selected[tree.roots] = select_root()
        edge, path = tree.walk(selected)
        node, action = np.divmod(edge, tree.num_actions)
        latent, reward, logits, value = recurrent(tree.latent.take(node, axis=0), action)
        new = tree.roots + simulation + 1
        tree.add(new, latent, logits, value)
        tree.child[node, action], tree.reward[node, action] = new, reward
        tree.depth[new] = tree.depth.take(node) + 1
        touched = np.concatenate([new, tree.back_up(path, value, discount)])
        selected[touched] = select(touched)


@cache
def exploration(num_simulations: int, base: float = 19_652, init: float = 1.25) -> Array:
    """(init + log((n + base + 1) / base)) * sqrt(n) for n = 0, 1, ... visits of a node (MuZero, equation 2). As in
    mctx they include the node's own evaluation; the paper's do not, so that its first choice ignores the prior."""
    n = np.arange(num_simulations + 2)
    return ((init + np.log((n + base + 1) / base)) * np.sqrt(n)).astype(np.float32)


def rescale(tree: Tree, q: Array, low: Array, high: Array) -> Array:
    """Q (B, A) to [0, 1], from `low` and `high` (B, 1), divided by `tree.min_range` at least."""
    return (q - low) / np.maximum(high - low, tree.min_range)


def puct(tree: Tree, node: Array, table: Array) -> Array:
    """Scores (B, A) of the actions of nodes (B,): MuZero, equation 2, with the conventions of mctx: Q is normalised to
    [0, 1] over the node's value and the Q of its visited actions (the paper: over the whole tree); an action that was
    not visited counts as the smallest."""
    visits, value = tree.edge_visits.take(node, axis=0), tree.value.take(node)[:, None]
    seen = np.where(visits > 0, tree.q.take(node, axis=0), value)
    low, high = np.minimum(seen.min(1, keepdims=True), value), np.maximum(seen.max(1, keepdims=True), value)
    normalised = rescale(tree, np.where(visits > 0, seen, low), low, high)
    return normalised + tree.prior.take(node, axis=0) * table.take(tree.visits.take(node))[:, None] / (visits + 1)


def muzero_search(
    recurrent: Recurrent, tree: Tree, legal: Array, discount: float, num_simulations: int
) -> tuple[Array, Array]:
    """MuZero, appendix B. `legal` (B, A) holds at the root only: below it, the prior has learned to avoid the rest.

    Returns the policies found (B, A), the shares of the visits, and the most visited actions (B,).
    """
    roots, table = tree.roots, exploration(num_simulations)
    tree.prior[roots] = np.where(legal, tree.prior[roots], -np.inf)  # of which every score is -inf, too
    search(recurrent, tree, discount, num_simulations, lambda node: puct(tree, node, table).argmax(1))
    visits = tree.edge_visits[roots]
    return visits / visits.sum(1, keepdims=True), visits.argmax(1)


@cache
def halving_schedule(considered: int, num_simulations: int) -> list[int]:
    """Sequential halving (Gumbel MuZero, algorithm 2): for each simulation, how many visits the action that it starts
    with has had. `considered` actions are tried equally often, then the better half of them, and so on."""
    if considered <= 1:
        return list(range(num_simulations))
    phases, visits, schedule, left = math.ceil(math.log2(considered)), [0] * considered, [], considered
    while len(schedule) < num_simulations:
        for _ in range(max(1, int(num_simulations / (phases * left)))):
            schedule += visits[:left]
            visits[:left] = [count + 1 for count in visits[:left]]
        left = max(2, left // 2)
    return schedule[:num_simulations]


def completed_q(tree: Tree, node: Array) -> Array:
    """Q (B, A) of nodes (B,), completed (Gumbel MuZero, equation 10): an action that was not visited has a value mixed
    of the node's prediction and of the visited actions' Q, weighted by their prior (appendix D)."""
    visits, q, prior = (array.take(node, axis=0) for array in (tree.edge_visits, tree.q, tree.prior))
    seen, total = visits > 0, visits.sum(1, keepdims=True)
    tiny = np.finfo(np.float32).tiny
    weight = np.where(seen, np.maximum(prior, tiny), 0)
    mean = (weight * q).sum(1, keepdims=True) / np.maximum(weight.sum(1, keepdims=True), tiny)
    mixed = (tree.prediction.take(node)[:, None] + total * mean) / (total + 1)
    return np.where(seen, q, mixed)


def sigma(tree: Tree, node: Array, c_visit: float = 50, c_scale: float = 0.1) -> Array:
    """The completed Q (B, A) of nodes (B,) as what is added to logits (equation 8), rescaled to [0, 1] before, as in
    mctx, from which the constants are (the paper's for Atari; for board games its c_scale is 1)."""
    completed = completed_q(tree, node)
    low, high = completed.min(1, keepdims=True), completed.max(1, keepdims=True)
    visits = tree.edge_visits.take(node, axis=0).max(1, keepdims=True)
    return (c_visit + visits) * c_scale * rescale(tree, completed, low, high)


def gumbel_search(
    recurrent: Recurrent,
    tree: Tree,
    legal: Array,
    discount: float,
    num_simulations: int,
    gumbel: Array,
    considered: int,
) -> tuple[Array, Array]:
    """Gumbel MuZero, algorithm 2 at the root and equation 14 below it. `gumbel` (B, A): noise, or 0 for none.

    Returns the improved policies (B, A) and the best of the actions that were tried most often (B,).
    """
    roots, logits = tree.roots, tree.logits[tree.roots]
    base = gumbel + logits - logits.max(1, keepdims=True)
    schedules = np.array([halving_schedule(count, num_simulations) for count in range(considered + 1)])
    schedule = schedules[np.minimum(legal.sum(1), considered)]  # (B, N)
    added = np.zeros(tree.logits.shape)  # the sigma of every node, as of the last time that something came back to it

    def best_of(visits: Array) -> Array:
        score = np.where(tree.edge_visits[roots] == visits[:, None], base + added[roots], -np.inf)
        return score.argmax(1)

    def select_root() -> Array:
        simulation = tree.edge_visits[roots].sum(1, keepdims=True)
        return best_of(np.take_along_axis(schedule, simulation, axis=1)[:, 0])

    def select(node: Array) -> Array:
        added[node] = new = sigma(tree, node)
        policy = softmax(tree.logits.take(node, axis=0) + new)
        visits = tree.edge_visits.take(node, axis=0)
        return (policy - visits / (1 + visits.sum(1, keepdims=True))).argmax(1)

    search(recurrent, tree, discount, num_simulations, select, select_root)
    return softmax(logits + added[roots]), best_of(tree.edge_visits[roots].max(1))


# ---------------------------------------------------------------------------------------------------------------------
# Agent
# ---------------------------------------------------------------------------------------------------------------------
class Agent:
    """Network, replay and search: `act` searches, `observe` stores, `update` trains.

    Drive it from a loop of your own: `agent = Agent(env.observation_space, env.action_space, Args())`, then for every
    step `act`, `env.step`, `observe`, `update`. Environments side by side: `act_many`, and `observe` with `env`.
    """

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        check_spaces(observation_space, action_space)
        self.args, self.device, self.space = args, find_device(args.device), observation_space
        self.num_actions, self.first_action = int(action_space.n), int(action_space.start)
        box = isinstance(observation_space, gym.spaces.Box)
        shape = observation_space.shape if box else (int(observation_space.n),)
        dtype = np.uint8 if box and observation_space.dtype == np.uint8 else np.float32
        convolutional = len(shape) == 3 if args.network == "auto" else args.network == "conv"
        if convolutional and len(shape) != 3:
            raise Failure(f"--network conv is for observations (height, width, channels), not {observation_space}")
        self.obs_shape = shape if convolutional else (math.prod(shape),)
        # Numbers of a vector can be of any size; those of boards, and one-hot ones, are what they should be.
        self.standardises = box and len(shape) != 3 and dtype == np.float32
        self.mean, self.std = np.zeros(self.obs_shape, np.float32), np.ones(self.obs_shape, np.float32)
        generator = torch.Generator(self.device).manual_seed(seed_of(args.seed, 0, 0))
        self.rng = np.random.default_rng(seed_of(args.seed, 0, 1))
        self.net, self.parameters = make_network(self.obs_shape, self.num_actions, args, generator)
        # What the search sees: of a network for vectors on a CPU, arrays in the same memory.
        self.arrays = self.device.type == "cpu" and len(self.obs_shape) == 1
        self.view = {name: p.detach().numpy() if self.arrays else p.detach() for name, p in self.parameters.items()}
        weights = self.parameters.parameters()
        self.optimizer = torch.optim.Adam(weights, args.learning_rate, weight_decay=args.weight_decay, fused=True)
        self.loss_fn = torch.compile(unrolled_loss) if args.compile else unrolled_loss
        self.replay = Replay(self.obs_shape, dtype, self.num_actions, args.replay_size, args.follow)
        # Of each environment: policy, value and legal actions of the search in the present state, and the steps of the
        # present part of an episode.
        self.found: list[tuple[Array, float, Array]] = []
        self.parts: list[list[tuple]] = [[] for _ in range(args.num_envs)]
        self.steps, self.updates, self.searched_again, self.logs, self.losses = 0, 0, 0, {}, {}
        self.value_range, self.measured, self.masked = 0.0, 0, False

    def row(self, obs: Any) -> Array:
        """An observation as the replay keeps it: one-hot for a state, a vector, or an image as it is."""
        if isinstance(self.space, gym.spaces.Discrete):
            return (np.arange(self.space.n) == int(obs) - int(self.space.start)).astype(np.float32)
        return np.array(obs, self.replay.columns["obs"].dtype).reshape(self.obs_shape)  # a copy

    def unit(self, rows: Array) -> Array:
        """Observations as the network wants them: bytes are scaled to [0, 1], vectors by what the replay holds."""
        if rows.dtype == np.uint8:
            return rows.astype(np.float32) / 255
        return ((rows - self.mean) / self.std).clip(-10, 10) if self.standardises else rows

    def infer(self, function: Callable[..., Numbers], *arrays: Array) -> Array | list[Array]:
        """What a function of the network says of arrays, as arrays, wherever the network is."""
        if self.arrays:
            return function(self.view, *arrays)
        with torch.inference_mode():
            found = function(self.view, *(torch.from_numpy(array).to(self.device) for array in arrays))
            return [part.cpu().numpy() for part in found] if isinstance(found, list) else found.cpu().numpy()

    def heads(self, latent: Array) -> tuple[Array, Array, Array]:
        """latent (B, ...) -> rewards (B,), policy logits (B, A), values (B,)."""
        reward, value, policy = self.infer(self.net.predict, latent)
        reward, value = expectation(np.stack([reward, value]), not self.net.two_players)
        return reward, policy, value

    def recurrent(self, latent: Array, action: Array) -> tuple[Array, Array, Array, Array]:
        """What the search asks of the model."""
        latent = self.infer(self.net.dynamics, latent, action)
        return latent, *self.heads(latent)

    def predict(self, rows: Array) -> tuple[Array, Array, Array]:
        """Latent states, logits of the policy and values of B rows of observations."""
        latent = self.infer(self.net.represent, self.unit(rows))
        return latent, *self.heads(latent)[1:]

    def plan(self, rows: Array, legal: Array, rng: np.random.Generator | None) -> tuple[Array, Array, Array, Tree]:
        """Searches from B rows of observations; `rng`: draws the noise of self-play, None for none. Returns the
        policies found (B, A), actions (B,), the values of these policies (B,) and the trees."""
        args = self.args
        latent, logits, value = self.predict(rows)
        tree = Tree(latent, logits, value, legal, args.num_simulations, args.min_range * self.value_range)
        settings = self.recurrent, tree, legal, args.gamma, args.num_simulations
        if args.search == "gumbel":
            gumbel = np.zeros(legal.shape) if rng is None else rng.gumbel(size=legal.shape)
            policy, action = gumbel_search(*settings, gumbel, min(args.max_considered, self.num_actions))
        else:
            if rng is not None:
                prior = tree.prior[tree.roots]
                noise = np.where(legal, rng.gamma(args.dirichlet_alpha, size=legal.shape) + 1e-30, 0)  # Dirichlet
                noise /= noise.sum(1, keepdims=True)
                tree.prior[tree.roots] = (1 - args.dirichlet_fraction) * prior + args.dirichlet_fraction * noise
            policy, action = muzero_search(*settings)
            if rng is not None:
                cumulated = ((policy / policy.max(1, keepdims=True)) ** (1 / args.temperature)).cumsum(1)
                action = (rng.random((len(policy), 1)) * cumulated[:, -1:] < cumulated).argmax(1)
        return policy, action, (policy * completed_q(tree, tree.roots)).sum(1), tree

    def legal(self, info: dict | None) -> Array:
        """(A,): what `info["action_mask"]` allows, everything where there is none."""
        mask = (info or {}).get("action_mask")
        if mask is None:
            return np.ones(self.num_actions, bool)
        mask = np.asarray(mask, bool)
        if mask.shape != (self.num_actions,) or not mask.any():
            raise Failure(f"info['action_mask'] must allow one of {self.num_actions} actions, not be {mask.tolist()}")
        return mask

    def act_many(self, observations: list[Any], infos: list[dict | None]) -> list[int]:
        """Actions for all environments, drawn as self-play does."""
        self.masked |= any((info or {}).get("action_mask") is not None for info in infos)
        legal = np.stack([self.legal(info) for info in infos])
        policy, action, value, tree = self.plan(np.stack([self.row(obs) for obs in observations]), legal, self.rng)
        self.found = list(zip(policy, value.tolist(), legal, strict=True))
        for index, part in enumerate(self.parts):
            if self.args.repeat and part and legal[index, part[-1][1]] and self.rng.random() < self.args.repeat:
                action[index] = part[-1][1]
        self.look_inside(policy, tree)
        return (action + self.first_action).tolist()

    def look_inside(self, policy: Array, tree: Tree) -> None:
        """Statistics of searches, for the logs."""
        for name, probability in (("before", softmax(tree.logits[tree.roots])), ("after", policy)):
            entropy = -(probability * np.log(np.maximum(probability, 1e-12))).sum(1)
            self.logs[f"planner/root_entropy_{name}"] = float(entropy.mean())
        self.logs["planner/depth"] = float(tree.depth.reshape(len(tree.roots), -1).max(1).mean())

    def act(self, obs: Any, info: dict | None = None) -> int:
        """An action for the one environment there is."""
        return self.act_many([obs], [info])[0]

    def observe(
        self,
        obs: Any,
        action: Any,
        reward: float,
        next_obs: Any,
        terminated: bool,
        truncated: bool = False,
        env: int = 0,
    ) -> None:
        """Stores one step of an environment; its episode goes to the replay when it ends, or in parts."""
        part = self.parts[env]
        part.append((self.row(obs), action - self.first_action, reward, *self.found[env]))
        self.steps += 1
        # The first parts are shorter, so that there is something to learn from after `learning_starts` steps; but where
        # some actions are not allowed it is better to wait, as the last state of a part is never searched.
        args, started = self.args, self.masked or self.replay.added >= self.args.learning_starts
        length = max(args.unroll_steps, (LONGEST_WAIT if started else args.learning_starts) // args.num_envs)
        if terminated or truncated or len(part) >= min(length, LONGEST_PART, args.replay_size - 1):
            self.store(part, self.row(next_obs), terminated)
            self.parts[env] = []

    def store(self, part: list[tuple], last: Array, terminated: bool) -> None:
        """Puts a part of an episode into the replay: T tuples of `observe`, and the observation after them."""
        args, length = self.args, len(part)
        obs, action, reward, policy, value, legal = map(np.array, zip(*part, strict=True))
        last_value = 0.0
        if terminated and args.gamma < 0:  # a value tells who won, as values are what all positions are trained for
            last_value, reward[-1] = -reward[-1], 0  # of the player who would be next
        elif not terminated:
            last_value = self.predict(last[None])[2][0]
        columns = {
            "obs": np.concatenate([obs, last[None]]),
            "action": np.append(action, 0),
            "reward": np.append(reward, 0),
            "policy": np.concatenate([policy, np.full_like(policy[:1], 1 / self.num_actions)]),
            "value": np.append(value, last_value),
            "legal": np.concatenate([legal, np.ones_like(legal[:1])]),  # of the last state it is not known
            "left": np.arange(length, -1, -1),
            "terminated": np.full(length + 1, terminated),
            "priority": np.zeros(length + 1),
        }
        rows = self.replay.add(columns)[:-1]
        if self.replay.added >= 1.01 * self.measured:
            self.measure()
        # The first priority is that of all n steps: where `follow` cuts off all of them, there would be no error.
        self.prioritise(rows, self.replay.n_step_returns(rows, args.td_steps, args.gamma, follow=False) - value)
        came, following = np.empty(length), last_value  # how well did the searches foresee what came?
        for t in reversed(range(length)):
            came[t] = following = reward[t] + args.gamma * following
        self.logs["planner/value_error"] = float(np.abs(came - value).mean())

    def prioritise(self, rows: Array, error: Array) -> None:
        """Positions are drawn more often the further their value was from its target."""
        self.replay.columns["priority"][rows] = (np.abs(error) + 1e-3) ** self.args.priority_exponent

    def measure(self) -> None:
        """The range of 0 and the replay's values, mean and deviation of vectors; anew when it has got 1 % more rows."""
        columns, used = self.replay.columns, self.replay.used
        values = np.append(columns["value"][:used], 0)  # where no episode ends, all values may be large and the same
        self.value_range, self.measured = float(np.ptp(values)), self.replay.added
        if self.standardises:
            mean, std = (reduce(columns["obs"][:used], axis=0, dtype=np.float64) for reduce in (np.mean, np.std))
            std = np.where(std > 1e-6 * np.abs(mean), std, 1)  # numbers that have not changed so far
            self.mean, self.std = mean.astype(np.float32), std.astype(np.float32)

    def update(self) -> None:
        """Searches old positions again and makes updates, as many as the steps so far allow."""
        args, steps = self.args, self.steps - self.args.learning_starts
        if steps < 0 or self.replay.added == 0:
            return
        while self.searched_again + args.batch_size <= steps * args.reanalyze_ratio:
            self.reanalyze(args.batch_size)
        while self.updates < steps * args.updates_per_step:
            sizes = args.batch_size, args.unroll_steps, args.td_steps
            rows, batch = self.replay.sample(*sizes, args.gamma, self.rng, next_obs=args.consistency_weight > 0)
            batch |= {name: self.unit(batch[name]) for name in ("obs", "next_obs") if name in batch}
            tensors = {name: torch.from_numpy(column).to(self.device) for name, column in batch.items()}
            weights = args.value_weight, args.consistency_weight
            loss, value, self.losses = self.loss_fn(self.net, self.parameters, tensors, *weights)
            self.optimizer.param_groups[0]["lr"] = args.learning_rate * 0.1 ** min(self.steps / args.decay_steps, 2)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters.parameters(), args.max_grad_norm)
            self.optimizer.step()
            self.prioritise(rows, value.cpu().numpy() - batch["value"][:, 0])
            self.updates += 1

    def reanalyze(self, count: int) -> None:
        """Replaces policies and values of old positions by those that a search finds now (Schrittwieser et al. 2020,
        appendix H). There is no noise, but where a search tries only some of the actions: it draws anew which."""
        columns, rows, args = self.replay.columns, self.replay.unfinished(count, self.rng), self.args
        self.searched_again += count
        last = columns["left"][rows] == 0
        if self.masked and last.any():  # of a part, where it is not known which actions are allowed
            columns["value"][rows[last]] = self.predict(columns["obs"][rows[last]])[2]
            rows = rows[~last]
        if len(rows):
            some = args.search == "gumbel" and min(args.max_considered, args.num_simulations) < self.num_actions
            noise = self.rng if some else None
            policy, _, value, _ = self.plan(columns["obs"][rows], columns["legal"][rows], noise)
            columns["policy"][rows], columns["value"][rows] = policy, value
            self.replay.mark_followed(rows)

    def act_greedily(self, observations: list[Any], infos: list[dict | None]) -> list[int]:
        """Actions of searches without noise."""
        rows, legal = np.stack([self.row(obs) for obs in observations]), np.stack([self.legal(info) for info in infos])
        return (self.plan(rows, legal, None)[1] + self.first_action).tolist()

    def greedy_policy(self, seed: int) -> Callable[..., int]:
        """A policy (observation, info -> action) for one episode, which does not touch the agent; it needs no seed."""
        return lambda obs, info=None: self.act_greedily([obs], [info])[0]

    def metrics(self) -> dict[str, float]:
        """What to log, by TensorBoard tag."""
        for name, values in self.losses.items():  # of each unroll step
            first = int(name in ("reward_loss", "consistency_loss"))
            self.logs |= {f"losses/{name}_{index}": value for index, value in enumerate(values.tolist(), first)}
        return self.logs

    def tree_text(self, obs: Any, info: dict | None, levels: int = 3) -> str:
        """What a search without noise finds: for each action visits, prior, Q and the reward foreseen, and behind it
        the same for the actions of the state that it leads to."""
        _, action, value, tree = self.plan(self.row(obs)[None], self.legal(info)[None], None)
        chosen = f"value {value[0]:.3g}, action {action[0] + self.first_action}"
        lines = [f"search of {self.args.num_simulations} simulations: {chosen}"]

        def describe(node: int, level: int) -> None:
            for edge in np.argsort(-tree.edge_visits[node], kind="stable"):
                visits, q, reward, prior = (a[node, edge] for a in (tree.edge_visits, tree.q, tree.reward, tree.prior))
                if visits:
                    found = f"{visits} visits, Q {q:.3g}, reward {reward:.3g}, prior {prior:.2f}"
                    lines.append(f"{'    ' * level}{edge + self.first_action}: {found}")
                    if level < levels:
                        describe(tree.child[node, edge], level + 1)

        describe(0, 1)
        return "\n".join(lines)

    def state_dict(self) -> dict:
        """All that the next step depends on, as tensors and plain values."""
        self.metrics()  # so that a resumed run logs the same
        return {
            "parameters": self.parameters.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "replay": self.replay.state_dict(),
            "rng": json.dumps(self.rng.bit_generator.state),
            "parts": [[torch.tensor(np.array(column)) for column in zip(*part, strict=True)] for part in self.parts],
            "scale": [torch.from_numpy(self.mean), torch.from_numpy(self.std)],
            "counts": [self.steps, self.updates, self.searched_again],
            "measured": [self.value_range, self.measured, self.masked],
            "logs": self.logs,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` gave into a newly made agent."""
        for name in ("parameters", "optimizer", "replay"):
            getattr(self, name).load_state_dict(state[name])
        self.rng.bit_generator.state = json.loads(state["rng"])
        self.parts = [list(zip(*(column.numpy() for column in part), strict=True)) for part in state["parts"]]
        self.mean, self.std = (part.numpy() for part in state["scale"])
        (self.steps, self.updates, self.searched_again), self.logs = state["counts"], state["logs"]
        self.value_range, self.measured, self.masked = state["measured"]


def find_device(name: str) -> torch.device:
    """The device of that name; `auto`: a GPU where there is one."""
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not mps):
        raise Failure(f"--device {name}: there is none that PyTorch can use")
    return torch.device(name)


# ---------------------------------------------------------------------------------------------------------------------
# Run
# ---------------------------------------------------------------------------------------------------------------------
SCRIPT = Path(__file__).stem
CHECKPOINT = "checkpoint.pt"
CHANGEABLE = {"total_timesteps", "eval_every", "eval_episodes", "checkpoint_every"}  # learning does not depend on them
CHANGEABLE |= {"device", "threads", "compile", "capture_video", "run_dir", "resume", "evaluate"}
CHANGEABLE.update({"eval_env_kwargs", "play"})


def write_checkpoint(path: Path, state: dict) -> None:
    """Writes nested tensors and plain values; the file is a zip archive, which keeps checksums."""
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def read_checkpoint(path: Path) -> dict:
    """Reads what `write_checkpoint` wrote, executing no code; raises an exception of some kind where it is damaged."""
    with zipfile.ZipFile(path) as file:
        if broken := file.testzip():
            raise ValueError(f"{broken} is damaged")
    return torch.load(path, weights_only=True, map_location="cpu")


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
    """The environments of evaluations, one for each episode."""
    args = dataclasses.replace(args, env_kwargs=args.env_kwargs + args.eval_env_kwargs)
    modes = ["rgb_array" if args.capture_video else None] + [None] * (args.eval_episodes - 1)
    return [make_env(args, mode) for mode in modes]


def greedy_episodes(
    agent: Any, envs: list[gym.Env], args: Args, memory: dict
) -> tuple[list[Episode], list[Image.Image]]:
    """`args.eval_episodes` episodes side by side, as a search of many states costs little more than one of one;
    with `args.capture_video` pictures of the first."""
    limit = envs[0].spec.max_episode_steps or 1_000  # without one, a greedy policy may walk in circles for ever
    if memory:
        for env in envs:
            env.unwrapped.load_state_dict(memory)
    episodes, frames = [Episode(env, args.seed, 2, index) for index, env in enumerate(envs)], []
    playing = episodes
    while playing:
        if args.capture_video and playing[0] is episodes[0]:
            frames.append(Image.fromarray(envs[0].render()).quantize())
        actions = agent.act_greedily([e.obs for e in playing], [e.info for e in playing])
        ended = [any(episode.step(action)[2:]) for episode, action in zip(playing, actions, strict=True)]
        playing = [e for e, end in zip(playing, ended, strict=True) if not end and len(e.actions) < limit]
    if args.capture_video:
        frames.append(Image.fromarray(envs[0].render()).quantize())
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
def ask(allowed: Array) -> int | None:
    """A move that the player types, asked for until it is one of those allowed; None: nothing was typed."""
    while True:
        print("Your move: ", end="", flush=True)
        text = sys.stdin.readline().strip()
        if not text:
            return None
        if text.isdecimal() and int(text) in allowed:
            return int(text)
        print(f"Allowed are {', '.join(map(str, allowed))}.")


def play(folder: str, device: str) -> dict:
    """Games in the terminal against the agent of a run, who searches as it does in evaluations."""
    args = dataclasses.replace(saved_args(folder), device=device)
    game = make_env(args).unwrapped
    if not isinstance(game, KInARow):
        raise Failure(f"--play is for the board games of this script, not for {args.env_id}")
    if game.opponent is not None:
        raise Failure(f"{folder} was trained against an opponent in --env-kwargs; --play is for self-play")
    env = make_env(args, "ansi")
    agent = Agent(env.observation_space, env.action_space, args)
    try:
        agent.load_state_dict(read_checkpoint(Path(folder) / CHECKPOINT)["agent"])
    except Exception as error:
        raise Failure(f"cannot read the agent of {folder}: {type(error).__name__}: {error}") from error
    policy, results = agent.greedy_policy(args.seed), {"won": 0, "lost": 0, "drawn": 0}
    for number in itertools.count():
        (obs, info), done = env.reset(), False
        print(f"You are {'XO'[number % 2]}; moves are counted from 0, from left and top. Enter alone ends the game.")
        while not done:
            print(f"{env.render()}\n")
            yours = env.unwrapped.turns % 2 == number % 2
            action = ask(info["action_mask"].nonzero()[0]) if yours else policy(obs, info)
            if action is None:
                print(f"You have won {results['won']}, lost {results['lost']}, drawn {results['drawn']}.")
                return results
            if not yours:
                print(f"My move: {action}")
            obs, reward, done, _, info = env.step(action)
        result = "drawn" if not reward else "won" if yours else "lost"
        results[result] += 1
        print(f"{env.render()}\n\nYou have {result}.\n" if reward else f"{env.render()}\n\nA draw.\n")


def train(args: Args) -> dict:
    """MuZero: self-play and training in turns; returns what is in result.json."""
    torch.set_num_threads(args.threads)
    if args.play:
        return play(args.play, args.device)
    envs = [make_env(args) for _ in range(args.num_envs)]
    game = envs[0].unwrapped
    if isinstance(game, KInARow) and (args.gamma < 0) != (game.opponent is None):
        raise Failure("--gamma must be -1 in self-play, and from 0 on with an opponent in --env-kwargs")
    agent = Agent(envs[0].observation_space, envs[0].action_space, args)
    episodes = [Episode(env, args.seed, 1, index) for index, env in enumerate(envs)]
    run = Run(args, agent, episodes)
    for step in run.steps(args.num_envs):
        observations = [episode.obs for episode in episodes]
        actions = agent.act_many(observations, [episode.info for episode in episodes])
        for index, (episode, obs, action) in enumerate(zip(episodes, observations, actions, strict=True)):
            next_obs, reward, terminated, truncated = episode.step(action)
            agent.observe(obs, action, reward, next_obs, terminated, truncated, env=index)
            if terminated or truncated:
                run.log_episode(step, episode)
                episode.reset()
        agent.update()
    if args.evaluate:
        first = Episode(run.eval_envs[0], args.seed, 2, 0)
        print(agent.tree_text(first.obs, first.info))
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
