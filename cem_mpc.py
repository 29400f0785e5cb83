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
"""PETS: plan with a model of the environment that knows how far it can be trusted.

An ensemble of neural networks learns from every real step what comes next. Each network predicts a distribution, for
the noise of the world; where the networks disagree, they have not seen enough. At every step the cross-entropy
method searches for the sequence of actions whose imagined return is the best, and only its first action is taken.

The algorithm (Chua et al. 2018, "Deep Reinforcement Learning in a Handful of Trials", algorithm 1):

    Fill the data set D with random actions
    for each trial:
        Train the ensemble of probabilistic networks on D                                        (section 4)
        for each step of the trial:
            for sequences of actions a_t, ..., a_{t+H-1} drawn by the cross-entropy method:
                Propagate P particles with trajectory sampling: each by a member of the ensemble (section 5.1)
                Score the sequences by the mean over particles of the summed rewards
                Move the distribution of sequences to the best of them
            Take the first action of the mean of the distribution; add the step to D             (section 5.2)

Settings are those of the authors' code, kchua/handful-of-trials; where one differs, its field says what theirs is. What
else differs:

    - Rewards and terminations are learned, each by networks of their own, so that an environment is all that is needed
      (the authors give functions, and inputs made for each task). Terminations are few and none must be overlooked, so
      they weigh more in training; the price: where episodes end by chance, an end is expected far too often, and near
      a boundary too early, which attracts where rewards are negative.
    - A search imagines 960 sequences for each action, counting particles, and not 40,000; it never stops early.
    - Targets are standardised like inputs. Trainings have a hold-out set and stop early, as in MBPO (Janner et al.
      2019; code jannerm/mbpo).
    - CartPole-v1 and InvertedPendulum-v5 must be balanced for longer than a plan, and on Acrobot-v1 most plans do not
      get as far as the goal: there `--terminal-value` adds a learned value at their end.

Run:     python cem_mpc.py
         python cem_mpc.py --env-id Reacher-v5       (needs gymnasium[mujoco])
         python cem_mpc.py --help
Expect:  returns of each seed over 5 episodes (Reacher-v5: 20), and minutes a seed on one of 2 busy CPU cores, with its
         evaluations (on Pendulum-v1 every 250 steps; one seed stood still for a while, and took 34). A random policy
         scores about -1,200 on Pendulum-v1.

    environment          steps  returns                                               minutes
    Pendulum-v1          1,000  -99, -147, -153, -154, -185 (mean: -147)              10 to 13
    Reacher-v5           1,000  -6.6, -7.2, -8.9 (mean: -7.6)                         9 to 12
    InvertedPendulum-v5  2,000  864, 1000, 1000 (1000 is the maximum)                 10 to 11
    CartPole-v1          2,000  500, the maximum (3 of 3 seeds; 494 to 500 at 1,000)  11 to 14
    Acrobot-v1           2,000  -70, -75, -81 (mean: -75; -65 to -92 at 1,000)        16 to 18
"""

import argparse
import ast
import copy
import dataclasses
import importlib
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
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_origin, get_type_hints

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
@dataclasses.dataclass
class Args:
    """PETS: model-predictive control with a probabilistic ensemble (Chua et al. 2018)."""

    env_id: str = "Pendulum-v1"
    """Gymnasium id, `module:Name-v0` for another package's."""
    env_kwargs: tuple[str, ...] = ()
    """Options for `gym.make`, as name=value: `--env-kwargs max_episode_steps=50`."""
    total_timesteps: Annotated[int, 0, math.inf] = 1_000
    """Environment steps (calls of `env.step`) to learn for."""
    seed: Annotated[int, 0, 2**32 - 1] = 1
    """Seed of every random draw: the agent's, the episodes', the evaluation's."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the networks are; `auto` takes a GPU where there is one."""
    threads: Annotated[int, 1, 1024] = 1
    """CPU threads; two runs side by side get more done than one with two threads."""
    compile: bool = False
    """Compile what the planner imagines with torch.compile, which changes nothing but speed and rounding; for GPUs."""
    eval_every: Annotated[int, 1, math.inf] = 1_000
    """Environment steps between two evaluations (greedy policy, environment of its own)."""
    eval_episodes: Annotated[int, 1, math.inf] = 5
    """Episodes of an evaluation. Where the environment has no time limit, one ends after 1,000 steps at the latest."""
    checkpoint_every: Annotated[int, 1, math.inf] = 500
    """Environment steps between two checkpoints."""
    run_dir: str = "runs"
    """Folder in which the run's own folder is made."""
    resume: str | None = None
    """Run folder to continue exactly where its last checkpoint was written."""
    evaluate: str | None = None
    """Run folder whose agent to evaluate, without learning; nothing but videos is added to the folder."""
    capture_video: bool = False
    """Record the first episode of each evaluation as a GIF in the run folder."""

    init_from: str | None = None
    """Run folder whose model and data to start from: to plan with fixed data (`--total-timesteps 0`), for another task
    (`--reward-fn`), or to learn on from old and new data together (where the environment has changed, the model is a
    mean of both worlds until the new data prevail). With another `--seed` the episodes begin in other states."""
    reward_fn: str | None = None
    """`module:function` for the reward: tensors obs (flattened), action (in the environment's units; Discrete: one-hot)
    and next_obs, of shapes (..., size), to (...). None: it is learned."""
    termination_fn: str | None = None
    """`module:function` for the termination, called in the same way: a tensor of bool. None: it is learned."""
    learning_starts: Annotated[int, 1, math.inf] = 200
    """Steps with uniformly random actions before anything is learned (PETS: one trial)."""
    gamma: Annotated[float, 0, 1] = 0.99
    """Discount factor of imagined rewards (PETS: 1)."""

    ensemble_size: Annotated[int, 1, 1000] = 5
    """Networks in the ensemble (PETS: 5, MBPO: 7)."""
    num_elites: int = 5
    """Networks that are used, those with the lowest hold-out error (PETS: all, MBPO: 5 of 7; what PETS' code calls
    num_elites is `num_best`)."""
    hidden: tuple[int, ...] = (200, 200, 200)
    """Units of each hidden layer of the dynamics networks (PETS: 3 or 4 layers of 200; CartPole 3 of 500)."""
    weight_decay: tuple[float, ...] = (2.5e-5, 5e-5, 7.5e-5, 1e-4)
    """Factor of half the squared weights of each layer of the dynamics networks, the last one included (MBPO,
    and PETS for HalfCheetah, with one more; PETS for other tasks: 3 to 10 times as much)."""
    model_lr: Annotated[float, 1e-9, 1] = 1e-3
    """Step size of Adam for the ensemble (MBPO; PETS, too, but for Reacher 7.5e-4)."""
    model_batch_size: Annotated[int, 1, 10**6] = 256
    """Largest batch of a network: a batch is a sixteenth of the training rows, but at least 32 and at most this (MBPO:
    256, PETS: 32)."""
    train_every: Annotated[int, 1, math.inf] = 50
    """Environment steps between two trainings of the ensemble (PETS: a trial; mbrl-lib: 50 to 1,000)."""
    patience: Annotated[int, 1, 10**6] = 5
    """A training ends after more than so many epochs without a member better by 1 % on the hold-out set (MBPO)."""
    max_updates: Annotated[int, 1, math.inf] = 1_000
    """Gradient steps after which a training ends in any case, at the end of an epoch, which has no more of them
    (PETS: 5 epochs a trial)."""
    holdout_ratio: Annotated[float, 0, 0.9] = 0.1
    """Probability that a transition goes to the hold-out set, which no network is trained on (MBPO: 0.2)."""
    max_holdout: Annotated[int, 1, math.inf] = 5_000
    """Largest size of the hold-out set (MBPO)."""

    planner: Literal["random_shooting", "cem", "icem", "mppi", "gradient"] = "cem"
    """How sequences are searched; Discrete actions: random_shooting and cem. (On the pendulum icem learned fastest
    with three of five seeds: benchmark/README.md.)"""
    horizon: Annotated[int, 1, 1000] = 25
    """Steps imagined (PETS: 25 to 30)."""
    population: Annotated[int, 2, 10**6] = 64
    """Sequences scored in an iteration (PETS: 400 to 500)."""
    iterations: Annotated[int, 1, 1000] = 3
    """Iterations of the search for each action (PETS: 5; random_shooting: so many times the population at once)."""
    num_best: int = 10
    """Best sequences, to which the distribution moves (PETS: a tenth of the population); gradient: sequences in all."""
    momentum: Annotated[float, 0, 0.999] = 0.1
    """Weight of the old mean and variance when the distribution moves (PETS: 0.1); of the old mean in mppi, too."""
    particles: Annotated[int, 1, 10**4] = 5
    """Imagined futures of each sequence, a multiple of num_elites (PETS: 20)."""
    sampling: Literal["ts1", "tsinf"] = "tsinf"
    """Trajectory sampling: `tsinf` keeps a particle with one member, `ts1` redraws the member at every step."""
    noise_beta: Annotated[float, 0, 10] = 2.0
    """icem: exponent of the noise's spectrum; 0 is white, larger is smoother in time (Pinneri et al. 2020)."""
    keep: Annotated[float, 0, 1] = 0.3
    """icem: share of the best sequences that the next iteration and the next step start with (Pinneri et al. 2020)."""
    temperature: Annotated[float, 1e-9, 1e9] = 0.1
    """mppi: temperature of the weights exp(return / temperature) (Williams et al. 2017), returns at unit deviation."""
    plan_lr: Annotated[float, 1e-9, 10] = 0.1
    """gradient: step size of Adam on the sequences, in units of half the action range."""
    terminal_value: bool = False
    """Add the value of the last imagined state to the return; it is learned from the real steps, and with Discrete
    actions also from what the model foresees."""

    def __post_init__(self):
        check_ranges(self)
        if not 1 <= self.num_elites <= self.ensemble_size:
            raise Failure(f"--num-elites must be from 1 to {self.ensemble_size}, not {self.num_elites}")
        if not 1 <= self.num_best <= self.population:
            raise Failure(f"--num-best must be from 1 to {self.population}, not {self.num_best}")
        if self.particles % self.num_elites:
            raise Failure(f"--particles must be a multiple of --num-elites, which is {self.num_elites}")
        if len(self.weight_decay) != len(self.hidden) + 1 or not all(size >= 1 for size in self.hidden):
            raise Failure("--weight-decay needs one value more than --hidden, whose values are at least 1")
        if not all(0 <= factor < math.inf for factor in self.weight_decay):
            raise Failure(f"--weight-decay needs values from 0 on, not {self.weight_decay}")


# Settings by environment that differ from the defaults. `parse_args` uses them; what the command line says wins.
PRESETS: dict[str, dict[str, Any]] = {
    "CartPole-v1": {
        "total_timesteps": 2_000,
        "terminal_value": True,
        "horizon": 15,
        "train_every": 100,
        "hidden": (128, 128),
        "weight_decay": (2.5e-5, 5e-5, 1e-4),
    },
    "Acrobot-v1": {"total_timesteps": 2_000, "terminal_value": True},
    "InvertedPendulum-v5": {
        "total_timesteps": 2_000,
        "terminal_value": True,
        "horizon": 10,
        "eval_every": 2_000,
        "planner": "icem",
        "noise_beta": 0.5,
        "population": 100,
        "iterations": 4,
        "train_every": 100,
    },
    "Reacher-v5": {"total_timesteps": 1_000, "eval_episodes": 20, "train_every": 250},
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
    if not isinstance(observation_space, gym.spaces.Box) or math.prod(observation_space.shape) > 1_000:
        raise Failure(
            f"observations must be a Box of up to 1,000 numbers, not {observation_space}; images: muzero.py, "
            "dreamer.py; Dict: dreamer.py; finite ones: dyna_q.py"
        )
    box = isinstance(action_space, gym.spaces.Box) and np.issubdtype(action_space.dtype, np.floating)
    if not (box and bounded(action_space)) and not isinstance(action_space, gym.spaces.Discrete):
        raise Failure(f"actions must be Discrete or a bounded Box of floating-point numbers, not {action_space}")


def bounded(space: gym.spaces.Box) -> bool:
    """Whether the bounds of all actions are numbers, and apart, in single precision, too, which tells 1,000 actions
    between them apart."""
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = space.low.astype(np.float32), space.high.astype(np.float32)
        apart = high - low > 1e-4 * np.maximum(abs(low), abs(high))
        return bool(np.isfinite([high - low, high + low]).all() and apart.all())


def load_function(name: str | None) -> Callable | None:
    """The function named as `module:function`, of a module on the path or in the working folder."""
    if name is None:
        return None
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module, _, function = name.partition(":")
        found = getattr(importlib.import_module(module), function)
        if not callable(found):
            raise TypeError(f"{function} is no function")
        return found
    except Exception as error:  # that of the module itself, too
        raise Failure(f"cannot load {name}, which should read module:function: {error}") from error


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


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------
# Dimensions of the tensors: E members of the ensemble, G of them in use, B rows for each, N rows of the data or
# sequences, P particles of a sequence, H steps, A action_size.
Layers = list[Tensor]  # of G networks: weight (G, in, out), bias (G, 1, out), weight, bias, ...
Networks = tuple[Layers, Layers, Layers]  # for dynamics, reward and termination


def mlp(x: Tensor, layers: Layers) -> Tensor:
    """(G, B, in) -> (G, B, out): G networks at once, each layer one batched matrix product."""
    *hidden, (weight, bias) = zip(layers[::2], layers[1::2], strict=True)
    for hidden_weight, hidden_bias in hidden:
        x = F.silu(torch.baddbmm(hidden_bias, x, hidden_weight))  # (G, B, hidden)
    return torch.baddbmm(bias, x, weight)


class Ensemble(nn.Module):
    """E members, each of three networks: the dynamics, from (obs, action) to a Gaussian over delta obs; the reward,
    from (delta obs, action, next obs); and the logit of termination, from next obs. Reward and termination often jump
    at a boundary, which is sharp in the next obs and blurred in the one before.

    Inputs and targets are standardised. What is constant in the data is scaled to zero and predicted without error.
    """

    def __init__(self, obs_size: int, action_size: int, args: Args, generator: torch.Generator):
        super().__init__()
        device = generator.device

        def layers(*sizes: int) -> nn.ParameterList:
            parameters = nn.ParameterList()
            for fan_in, fan_out in itertools.pairwise(sizes):
                std = 1 / (2 * math.sqrt(fan_in))  # as in the authors' code of PETS and MBPO
                weight = torch.empty(args.ensemble_size, fan_in, fan_out, device=device)
                parameters.append(nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator))
                parameters.append(torch.zeros(args.ensemble_size, 1, fan_out, device=device))
            return parameters

        self.dynamics = layers(obs_size + action_size, *args.hidden, 2 * obs_size)
        self.reward = layers(obs_size + action_size + obs_size, 128, 128, 1)
        self.termination = layers(obs_size, 64, 64, 1)
        self.max_logvar = nn.Parameter(torch.full((obs_size,), 0.5, device=device))
        self.min_logvar = nn.Parameter(torch.full((obs_size,), -10.0, device=device))
        for name, size in (("obs", obs_size), ("action", action_size), ("delta", obs_size), ("reward", 1)):
            self.register_buffer(f"{name}_mean", torch.zeros(size, device=device))
            self.register_buffer(f"{name}_std", torch.ones(size, device=device))
        self.register_buffer("terminal_weight", torch.ones(1, device=device))
        self.register_buffer("elites", torch.arange(args.num_elites, device=device))

    def set_scale(self, data: dict[str, Tensor]) -> None:
        """Takes means, standard deviations and the share of terminations from columns (N, size)."""

        def scale(values: Tensor) -> tuple[Tensor, Tensor]:
            std = values.std(0, correction=0)
            return values.mean(0), torch.where(std <= 1e-6 * values.abs().amax(0) + 1e-12, 0.0, std)

        for name in ("obs", "action", "delta", "reward"):
            mean, std = scale(data[name])
            if name == "obs":  # a flag that is raised when an episode ends is in next observations only
                next_mean, next_std = scale(data["obs"] + data["delta"])
                mean, std = torch.where(std > 0, mean, next_mean), torch.where(std > 0, std, next_std)
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_std").copy_(std)
        # Terminations are rare, and to overlook one mostly costs more than to expect one too many: together they count
        # for as much as all other rows (each up to 1,000 times as much).
        share = data["terminated"].mean().clamp_min(1e-9)
        self.terminal_weight.fill_(((1 - share) / share).clamp(1, 1_000))

    def standardise(self, name: str, values: Tensor) -> Tensor:
        mean, std = getattr(self, f"{name}_mean"), getattr(self, f"{name}_std")
        return (values - mean) * torch.where(std > 0, 1 / std, 0.0)

    def select(self, members: Tensor | slice = slice(None)) -> Networks:
        """The networks for dynamics, reward and termination of some members (G,), or of all."""
        return tuple([layer[members] for layer in layers] for layers in (self.dynamics, self.reward, self.termination))

    def gaussian(self, obs: Tensor, action: Tensor, dynamics: Layers) -> tuple[Tensor, Tensor]:
        """obs (G, B, obs_size), action (G, B, A) -> mean and log variance (G, B, obs_size) of standardised delta."""
        x = torch.cat([self.standardise("obs", obs), self.standardise("action", action)], dim=-1)
        mean, logvar = mlp(x, dynamics).chunk(2, dim=-1)
        logvar = self.max_logvar - F.softplus(self.max_logvar - logvar)  # PETS, appendix A.1: soft bounds,
        logvar = self.min_logvar + F.softplus(logvar - self.min_logvar)  # the upper one first
        return mean, logvar

    def predict(self, obs: Tensor, action: Tensor, dynamics: Layers) -> tuple[Tensor, Tensor]:
        """As `gaussian`, but mean and standard deviation in the environment's units."""
        mean, logvar = self.gaussian(obs, action, dynamics)
        return mean * self.delta_std + self.delta_mean, (0.5 * logvar).exp() * self.delta_std

    def predict_reward(self, delta: Tensor, action: Tensor, next_obs: Tensor, reward: Layers) -> Tensor:
        """Of steps (G, B, size): standardised reward (G, B, 1)."""
        x = [self.standardise("delta", delta), self.standardise("action", action), self.standardise("obs", next_obs)]
        return mlp(torch.cat(x, dim=-1), reward)

    def termination_logit(self, next_obs: Tensor, termination: Layers) -> Tensor:
        """next_obs (G, B, obs_size) -> (G, B, 1)."""
        return mlp(self.standardise("obs", next_obs), termination)


def ensemble_losses(model: Ensemble, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each member, (E,), means over its rows of `batch`, whose tensors are (E, B, size): negative log likelihood of
    delta obs (PETS, equation 1, a mean over dimensions) and squared error of its mean; squared error of the reward, and
    cross-entropy of termination."""
    dynamics, reward, termination = model.select()
    delta, next_obs = batch["delta"], batch["obs"] + batch["delta"]
    mean, logvar = model.gaussian(batch["obs"], batch["action"], dynamics)
    squared = (mean - model.standardise("delta", delta)) ** 2
    nll = squared * (-logvar).exp() + logvar
    predicted = model.predict_reward(delta, batch["action"], next_obs, reward)
    reward_error = (predicted - model.standardise("reward", batch["reward"])) ** 2
    logit, weight = model.termination_logit(next_obs, termination), model.terminal_weight
    cross_entropy = F.binary_cross_entropy_with_logits(logit, batch["terminated"], pos_weight=weight, reduction="none")
    return nll.mean((1, 2)), squared.mean((1, 2)), reward_error.mean((1, 2)), cross_entropy.mean((1, 2))


def ensemble_loss(model: Ensemble, batch: dict[str, Tensor], weight_decay: tuple[float, ...]) -> Tensor:
    """What an update lowers: the members' losses summed, weight decay, and a pull on the bounds of the variance.

    The decay of the termination networks is strong: from a handful of terminations they must find the boundary. The
    reward networks have none.
    """
    nll, _, reward_error, cross_entropy = ensemble_losses(model, batch)
    factors, weights = [*weight_decay, 0.01, 0.01, 0.01], [*model.dynamics[::2], *model.termination[::2]]
    decay = sum(0.5 * factor * (weight**2).sum() for factor, weight in zip(factors, weights, strict=True))
    bounds = 0.01 * (model.max_logvar.sum() - model.min_logvar.sum())
    return (nll + reward_error + cross_entropy).sum() + decay + bounds


def fit(
    model: Ensemble, optimizer: torch.optim.Optimizer, data: "Buffer", args: Args, generator: torch.Generator
) -> dict[str, float]:
    """Trains the ensemble until no dynamics network gets better on the hold-out set. Each is left with its own best
    weights, and so is each reward network; terminations in the hold-out set are too few to tell.

    The hold-out error of the dynamics is the squared error of the mean: a variance that is still off must not decide
    (MBPO's code).
    """
    columns = {name: data.column(name).float() for name in ("obs", "action", "delta", "reward", "terminated")}
    held_out = data.column("holdout")[:, 0]
    seen, unseen = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
    unseen = unseen if len(unseen) else seen  # the first few rows may all have been drawn for training
    members, device = len(model.dynamics[0]), seen.device
    model.set_scale({name: column[seen] for name, column in columns.items()})
    holdout = {name: column[unseen].expand(members, -1, -1) for name, column in columns.items()}
    batch_size = min(args.model_batch_size, max(32, len(seen) // 16))
    # The bootstrap: every member has rows of its own, drawn with replacement; of much data no more than `max_updates`
    # can use, which bounds the time of a training.
    count = min(len(seen), args.max_updates * batch_size)
    rows = seen[torch.randint(len(seen), (members, count), generator=generator, device=device)]  # (E, N)
    best, stale, updates = torch.full((2, members), math.inf, device=device), 0, 0  # errors (dynamics, reward)
    layers = [(0, layer) for layer in model.dynamics] + [(1, layer) for layer in model.reward]
    best_layers = [layer.detach().clone() for _, layer in layers]
    while stale <= args.patience and updates < args.max_updates:
        shuffled = rows.gather(1, torch.rand(rows.shape, generator=generator, device=device).argsort(1))
        for batch in shuffled.split(batch_size, dim=1):  # (E, B)
            loss = ensemble_loss(model, {name: column[batch] for name, column in columns.items()}, args.weight_decay)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1

        with torch.no_grad():
            error = torch.stack(ensemble_losses(model, holdout)[1:3])  # (2, E)
            improved = error < 0.99 * best
            best = torch.where(improved, error, best)
            for (kind, layer), best_layer in zip(layers, best_layers, strict=True):
                best_layer[improved[kind]] = layer[improved[kind]]
        stale = 0 if improved[0].any() else stale + 1

    with torch.no_grad():
        for (_, layer), best_layer in zip(layers, best_layers, strict=True):
            layer.copy_(best_layer)
        losses = [loss.mean().item() for loss in ensemble_losses(model, holdout)]
    model.elites.copy_(best[0].argsort()[: len(model.elites)])
    names = ("nll", "mse", "reward_mse", "termination_cross_entropy")
    logs = {f"model/holdout_{name}": value for name, value in zip(names, losses, strict=True)}
    return logs | {"losses/model_loss": loss.item(), "model/updates": float(updates)}


@torch.inference_mode()
def diagnose(model: Ensemble, data: "Buffer", start: int) -> dict[str, float]:
    """How well the elites predict the transitions from row `start` on, with which they have not been trained yet.

    One step, by the mean of the elites: errors by dimension, disagreement and noise are in standard deviations of a
    step's change, the reward's error in those of the reward. k steps, by each elite along the actions that were taken:
    errors are in standard deviations of the observation.
    """
    (dynamics, reward_layers, _), count = model.select(model.elites), len(model.elites)
    obs, action, delta, reward = (data.column(name)[start:] for name in ("obs", "action", "delta", "reward"))
    unit = torch.where(model.delta_std > 0, model.delta_std, 1.0)
    mean, std = model.predict(obs.expand(count, -1, -1), action.expand(count, -1, -1), dynamics)  # (G, B, obs_size)
    epistemic = mean.var(0, correction=0) / unit**2  # (B, obs_size): the variance that is disagreement,
    aleatoric = (std**2).mean(0) / unit**2  # and that which is expected noise
    error = (mean.mean(0) - delta) / unit
    inside = (error.abs() < 1.645 * (epistemic + aleatoric).sqrt())[:, model.delta_std > 0]
    predicted = model.predict_reward(mean, action.expand(count, -1, -1), obs + mean, reward_layers).mean(0)  # (B, 1)
    reward_error = predicted - model.standardise("reward", reward)
    logs = {
        "model/coverage_90": inside.float().mean().item() if inside.numel() else 1.0,
        "model/disagreement": epistemic.sqrt().mean().item(),
        "model/noise": aleatoric.sqrt().mean().item(),
        "model/error_reward": (reward_error**2).mean().sqrt().item(),
    }
    root_mean_square = (error**2).mean(0).sqrt().tolist()
    logs |= {f"model/error_dim_{index}": value for index, value in enumerate(root_mean_square[:32])}
    if len(obs) > 2 and count > 1:
        ranks = [variance.mean(1).argsort().argsort().float() for variance in (epistemic, error**2)]
        logs["model/disagreement_rank_correlation"] = torch.corrcoef(torch.stack(ranks))[0, 1].item()

    obs_unit = torch.where(model.obs_std > 0, model.obs_std, 1.0)
    for steps in (1, 5, 10, 20):
        begin = torch.arange(start, max(start, data.size - steps + 1), device=obs.device)
        begin = begin[data.episode[begin] == data.episode[begin + steps - 1]]
        if len(begin):
            state = data.obs[begin].expand(count, -1, -1)
            for step in range(steps):
                mean, _ = model.predict(state, data.action[begin + step].expand(count, -1, -1), dynamics)
                state = state + mean
            last = begin + steps - 1
            error = (state - data.obs[last] - data.delta[last]) / obs_unit
            logs[f"model/error_{steps}_steps"] = (error**2).mean().sqrt().item()
    return logs


class Lookahead(NamedTuple):
    """For S states, of which the real ones are the first, what the model foresees for K sequences of actions."""

    states: Tensor  # (S, obs_size)
    after: Tensor  # (K, S, obs_size): the states at the end of the sequences
    rewards: Tensor  # (K, S): the sum of the discounted rewards on the way
    discounts: Tensor  # (K, S): gamma^steps, times the chance that the episode still goes on, as `outcome` has it


class Value(nn.Module):
    """V(s), learned from the lambda-returns of all real steps (Sutton & Barto, section 12.1; off-policy, uncorrected):
    old ones, too, which show the failures that the agent has learned to avoid. Where actions are Discrete, the target
    is the larger of the lambda-return and what the best sequence of a `Lookahead` brings: otherwise a good state in
    which the agent acted badly would look bad. (For a Box this was tried as well: it picks the errors of the model, and
    the agent runs into what it has not seen.)

    The value is the mean of the networks minus two standard deviations: far from the data each says something else, and
    what is not known must not attract. They get new weights each time: a network that has followed changing targets for
    long judges states that it has not seen worse (Nikishin et al. 2022). The scale of the returns stays.
    """

    networks, hidden, trace, batch_size = 5, 64, 0.8, 256  # trace: lambda
    rounds, updates = 20, 100  # the targets are computed anew in each round

    def __init__(self, obs_size: int, generator: torch.Generator):
        super().__init__()
        device = generator.device
        for name, size in (("obs", obs_size), ("return", 1)):
            self.register_buffer(f"{name}_mean", torch.zeros(size, device=device))
            self.register_buffer(f"{name}_std", torch.ones(size, device=device))
        self.register_buffer("most", torch.zeros(1, device=device))  # no return is larger
        self.layers = nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise((obs_size, self.hidden, self.hidden, 1)):
            self.layers.append(torch.empty(self.networks, fan_in, fan_out, device=device))
            self.layers.append(torch.empty(self.networks, 1, fan_out, device=device))
        self.reset(generator)

    def reset(self, generator: torch.Generator) -> None:
        """Initial weights."""
        for weight, bias in zip(self.layers[::2], self.layers[1::2], strict=True):
            nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1]), generator=generator)
            nn.init.zeros_(bias)

    def standardised(self, obs: Tensor) -> Tensor:
        """(G, B, obs_size) -> standardised values (G, B): row g by network g."""
        return mlp((obs - self.obs_mean) / self.obs_std, list(self.layers)).squeeze(-1)

    def forward(self, obs: Tensor) -> Tensor:
        """(..., obs_size) -> (...), in units of return."""
        values = self.standardised(obs.reshape(1, -1, obs.shape[-1]).expand(self.networks, -1, -1))
        mean = values.mean(0) * self.return_std + self.return_mean
        spread = values.std(0, correction=0) * self.return_std
        return (mean.clamp(max=self.most) - 2 * spread).view(obs.shape[:-1])

    def lambda_returns(self, data: "Buffer", gamma: float) -> Tensor:
        """Of all steps, (size,): G = r + gamma * ((1 - lambda) * V(next obs) + lambda * G of the next step) (exercise
        12.1). A termination ends it; where an episode was truncated, and at the end of the data, the last term is V as
        well."""
        next_value = self(data.column("obs") + data.column("delta")).tolist()
        reward, terminated, episode = (data.column(name)[:, 0].tolist() for name in ("reward", "terminated", "episode"))
        returns = [0.0] * data.size
        for step in reversed(range(data.size)):
            after = next_value[step]
            if step + 1 < data.size and episode[step] == episode[step + 1]:
                after = (1 - self.trace) * after + self.trace * returns[step + 1]
            returns[step] = reward[step] + gamma * after * (not terminated[step])
        return torch.tensor(returns, device=data.obs.device)

    def fit(
        self, data: "Buffer", lookahead: Lookahead | None, gamma: float, generator: torch.Generator
    ) -> dict[str, float]:
        """Learns the value of all real states, and of those of `lookahead`."""
        self.reset(generator)
        optimizer = torch.optim.Adam(self.layers, lr=1e-3, fused=True)
        obs, largest = data.column("obs") if lookahead is None else lookahead.states, data.column("reward").max()
        # The largest reward for ever if it is positive, for one step if it is negative.
        self.most.fill_(torch.maximum(largest, largest / max(1 - gamma, 1e-6)))
        obs_std = obs.std(0, correction=0)
        self.obs_mean.copy_(obs.mean(0))
        self.obs_std.copy_(torch.where(obs_std <= 1e-6 * obs.abs().amax(0), 1.0, obs_std))
        for _ in range(self.rounds):
            with torch.no_grad():
                wanted = self.lambda_returns(data, gamma)
                if lookahead is not None:
                    best = (lookahead.rewards + lookahead.discounts * self(lookahead.after)).amax(0)
                    best[: data.size] = torch.maximum(best[: data.size], wanted)
                    wanted = best
                wanted = wanted.clamp(max=self.most)
                self.return_mean.fill_(wanted.mean())
                self.return_std.fill_(wanted.std(correction=0) + 1e-6)
                wanted = (wanted - self.return_mean) / self.return_std
            for _ in range(self.updates):
                shape = (self.networks, self.batch_size)
                rows = torch.randint(len(obs), shape, generator=generator, device=obs.device)
                loss = ((self.standardised(obs[rows]) - wanted[rows]) ** 2).mean(1).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return {"losses/value_loss": loss.item() / self.networks}


# ---------------------------------------------------------------------------------------------------------------------
# Buffer
# ---------------------------------------------------------------------------------------------------------------------
class Buffer:
    """All real transitions, in tensors that double when they are full."""

    def __init__(self, obs_size: int, action_size: int, device: torch.device):
        self.size = 0
        self.obs, self.delta = (torch.zeros(1024, obs_size, device=device) for _ in range(2))
        self.action = torch.zeros(1024, action_size, device=device)
        self.reward = torch.zeros(1024, device=device)
        self.episode = torch.zeros(1024, dtype=torch.int64, device=device)
        self.terminated, self.holdout = (torch.zeros(1024, dtype=torch.bool, device=device) for _ in range(2))

    def add(self, **row: Any) -> None:
        """Appends a transition: obs, action, reward, delta, terminated, episode, holdout."""
        for name, value in row.items():
            column = getattr(self, name)
            if self.size == len(column):
                column = torch.cat([column, torch.zeros_like(column)])
                setattr(self, name, column)
            column[self.size] = torch.as_tensor(value)
        self.size += 1

    def column(self, name: str) -> Tensor:
        """The filled part of a column, (size, width)."""
        return getattr(self, name)[: self.size].view(self.size, -1)

    def draw_holdout(self, ratio: float, most: int, generator: torch.Generator) -> bool:
        """Whether the next row is to be held out. Where `most` are held out already, it takes the place of one of them,
        which goes to training: the hold-out set is a sample of old and new rows alike."""
        draw = torch.rand((), generator=generator, device=self.obs.device).item()
        if self.size == 0 or draw >= min(ratio, most / (self.size + 1)):
            return False
        held = self.column("holdout")[:, 0].nonzero()[:, 0]
        if len(held) >= most:
            self.holdout[held[torch.randint(len(held), (1,), generator=generator, device=held.device)]] = False
        return True

    def state_dict(self) -> dict:
        return {name: value[: self.size].clone() for name, value in vars(self).items() if isinstance(value, Tensor)}

    def load_state_dict(self, state: dict) -> None:
        self.size = len(state["obs"])
        for name, value in state.items():
            column = getattr(self, name)
            setattr(self, name, torch.cat([value.to(column.device), column[self.size :]]))


# ---------------------------------------------------------------------------------------------------------------------
# Planner
# ---------------------------------------------------------------------------------------------------------------------
def outcome(
    model: Ensemble,
    networks: Networks,
    state: Tensor,
    action: Tensor,
    delta: Tensor,
    reward_fn: Callable | None,
    termination_fn: Callable | None,
) -> tuple[Tensor, Tensor]:
    """Rewards (G, B) of steps (G, B, size), and the chance that the episode still goes on after them, (G, B): too low,
    where it is learned, as terminations weigh more in training (`set_scale`)."""
    next_state = state + delta
    if reward_fn is None:
        reward = model.predict_reward(delta, action, next_state, networks[1]).squeeze(-1)
        reward = reward * model.reward_std + model.reward_mean
    else:
        reward = reward_fn(state, action, next_state)
    if termination_fn is None:
        survival = torch.sigmoid(-model.termination_logit(next_state, networks[2])).squeeze(-1)  # 1 - sigmoid(logit)
    else:
        survival = termination_fn(state, action, next_state).logical_not()
    return reward, survival


def imagine(
    model: Ensemble,
    networks: Networks,
    obs: Tensor,
    plans: Tensor,
    noise: Tensor,
    permutations: Tensor | None,
    gamma: float,
    reward_fn: Callable | None = None,
    termination_fn: Callable | None = None,
    value_fn: Callable | None = None,
) -> Tensor:
    """Trajectory sampling (PETS, section 5.1): expected returns (N,) of action sequences.

    obs (obs_size,), plans (N, H, A) in the environment's units, noise (H, G, N * P / G, obs_size) standard normal. Of
    the P particles of a sequence, each of the G members of `networks` takes P / G: for all H steps the same ones (TS
    infinity: `permutations` is None), or before every step the G particles of a row are dealt out anew (TS1), by
    `permutations` (H, G, N * P / G) of the members' numbers.
    """
    groups, rows = noise.shape[1:3]
    actions = plans.repeat_interleave(rows // len(plans), dim=0)  # (R, H, A), R = N * P / G
    state = obs.expand(groups, rows, -1)  # (G, R, obs_size)
    alive = torch.ones(groups, rows, device=obs.device)  # the chance that the episode still goes on
    returns = torch.zeros(groups, rows, device=obs.device)
    for step in range(plans.shape[1]):
        if permutations is not None:
            to = permutations[step]
            state = state.gather(0, to[..., None].expand_as(state))
            alive, returns = alive.gather(0, to), returns.gather(0, to)
        action = actions[:, step].expand(groups, -1, -1)
        mean, std = model.predict(state, action, networks[0])
        delta = mean + std * noise[step]
        reward, survival = outcome(model, networks, state, action, delta, reward_fn, termination_fn)
        returns = returns + gamma**step * alive * reward
        alive = alive * survival
        state = state + delta
    if value_fn is not None:
        returns = returns + gamma ** plans.shape[1] * alive * value_fn(state)
    return returns.mean(0).view(len(plans), -1).mean(1)


def best_sequences(plans: Tensor, returns: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best of N sequences, and which of them (count,) have a return that is a finite number."""
    returns, index = torch.where(returns.isfinite(), returns, -math.inf).topk(count)
    return plans[index], returns.isfinite()


def moments(plans: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (H, A) of sequences (N, H, A)."""
    mean = plans.mean(0)
    return mean, ((plans - mean) ** 2).mean(0)


def uniform(count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Sequences (count, H, A) of actions in [-1, 1]."""
    return torch.rand(count, *like.shape[1:], generator=generator, device=like.device) * 2 - 1


# Each planner gets `score`, from sequences (N, H, A) with actions in [-1, 1] to returns (N,), and `start` (M, H, A):
# what it returned for the step before, shifted by one, or the middle of the action range where an episode begins. It
# returns sequences (M', H, A); of the first of them the first action is taken.
def random_shooting(score: Callable, start: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """The best of population * iterations uniformly random sequences."""
    plans = uniform(args.population * args.iterations, start, generator)
    return best_sequences(plans, score(plans), 1)[0]


def cem(score: Callable, start: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """Cross-entropy method as in the authors' code: returns the mean of the last distribution, not the best sample."""
    mean, variance = start[0], torch.full_like(start[0], 0.25)  # (range / 4)^2
    for _ in range(args.iterations):
        # At most half the distance to the nearer bound: the samples, cut at two standard deviations, stay inside.
        std = torch.minimum(variance.sqrt(), (1 - mean.abs()) / 2)
        noise = torch.empty(args.population, *mean.shape, device=mean.device)
        plans = mean + std * nn.init.trunc_normal_(noise, a=-2, b=2, generator=generator)
        best, finite = best_sequences(plans, score(plans), args.num_best)
        if finite.any():
            best_mean, best_variance = moments(best[finite])
            mean, variance = best_mean.lerp(mean, args.momentum), best_variance.lerp(variance, args.momentum)
    return mean[None]


def coloured_noise(shape: tuple[int, ...], beta: float, generator: torch.Generator) -> Tensor:
    """Noise of unit variance (N, H, A) whose power at frequency f along H goes with f^-beta (Pinneri et al. 2020)."""
    count, steps, size = shape
    frequency = torch.fft.rfftfreq(steps, device=generator.device)  # (F,)
    frequency[0] = 1 / steps
    scale = frequency ** (-beta / 2)
    real, imaginary = torch.randn(2, count, size, len(scale), generator=generator, device=generator.device) * scale
    # Frequency 0 and, for even H, the highest one stand for one real number each, the others for a conjugate pair.
    ends = [0, -1] if steps % 2 == 0 else [0]
    real[..., ends] *= math.sqrt(2)
    power = 4 * scale**2  # of a conjugate pair; of a real number, with its factor sqrt(2), half of it
    power[ends] /= 2
    noise = torch.fft.irfft(torch.complex(real, imaginary), n=steps)  # (N, A, H), variance sum(power) / H^2
    return (noise * steps / power.sum().sqrt()).transpose(1, 2)


def icem(score: Callable, start: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """Improved CEM (Pinneri et al. 2020, algorithm 1): coloured noise, fewer samples in later iterations, the best
    sequences kept over iterations and steps, the mean as a candidate in the last one. Returns [best, mean, *kept].

    Departs from their code: what is shifted ends in the middle of the action range, as with all planners here (theirs:
    the mean repeats its last action, the others draw one), what is kept is scored again, and the noise has unit
    variance (theirs: up to a fifth more deviation).
    """
    mean, kept = start[1 if len(start) > 1 else 0], start[2:]  # an episode begins with one sequence
    std = torch.full_like(mean, 0.5)
    for iteration in range(args.iterations):
        count = max(2 * args.num_best, int(args.population * 1.25**-iteration))  # their factor gamma of decay
        plans = mean + std * coloured_noise((count, *mean.shape), args.noise_beta, generator)
        last = [mean[None]] if iteration == args.iterations - 1 else []
        plans = torch.cat([plans.clamp(-1, 1), kept, *last])
        best, finite = best_sequences(plans, score(plans), args.num_best)
        kept = best[: int(args.keep * args.num_best)]
        if finite.any():
            best_mean, best_variance = moments(best[finite])
            mean, std = best_mean.lerp(mean, args.momentum), best_variance.sqrt().lerp(std, args.momentum)
    return torch.cat([best[:1], mean[None], kept])


def mppi(score: Callable, start: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """Model-predictive path integral control (Williams et al. 2017) without its control cost: the mean of all samples,
    each weighted by exp(return / temperature), with returns scaled to unit deviation. The samples' deviation is 0.5,
    and they are cut off at the bounds before the mean is taken, which so stays a little away from these (theirs: in
    the model)."""
    mean = start[0]
    for _ in range(args.iterations):
        noise = torch.randn(args.population, *mean.shape, generator=generator, device=mean.device)
        plans = (mean + 0.5 * noise).clamp(-1, 1)
        returns = score(plans)
        finite = returns[returns.isfinite()]
        if len(finite):
            scaled = (returns - finite.max()) / finite.std(correction=0).clamp_min(1e-30) / args.temperature
            weight = torch.where(returns.isfinite(), scaled, -math.inf).softmax(0)
            mean = torch.einsum("n,nha->ha", weight, plans).lerp(mean, args.momentum)
    return mean[None]


def gradient(score: Callable, start: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """Gradient ascent on the return through the model, from the last plan and num_best - 1 random sequences: shooting
    with first derivatives. It needs more iterations than the others have by default."""
    plans = torch.cat([start[:1], uniform(args.num_best - 1, start, generator)]).requires_grad_()
    optimizer = torch.optim.Adam([plans], lr=args.plan_lr)
    for _ in range(args.iterations):
        with torch.enable_grad():
            returns = score(plans)
            if not returns.requires_grad:
                break  # functions that were given for reward and termination have no gradient
            (ascent,) = torch.autograd.grad(returns[returns.isfinite()].sum(), [plans])
        plans.grad = torch.nan_to_num(-ascent, 0.0, 0.0, 0.0)
        optimizer.step()
        plans.data.clamp_(-1, 1)
    plans = plans.detach()
    return best_sequences(plans, score(plans), 1)[0]


# For Discrete actions a sequence is of one-hot vectors, and `start` of probabilities.
def random_shooting_discrete(score: Callable, start: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """The best of population * iterations random sequences."""
    shape, size = (args.population * args.iterations, start.shape[1]), start.shape[2]
    plans = F.one_hot(torch.randint(size, shape, generator=generator, device=start.device), size).float()
    return best_sequences(plans, score(plans), 1)[0]


def cem_discrete(score: Callable, start: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """Cross-entropy method over one categorical distribution a step; returns their probabilities."""
    # Probabilities that came out as 0 and 1 would leave nothing to search at the next step: half way to uniform.
    probabilities = (start[0] + 1 / start.shape[2]) / 2  # (H, A)
    for _ in range(args.iterations):
        actions = probabilities.multinomial(args.population, replacement=True, generator=generator).T  # (N, H)
        plans = F.one_hot(actions, probabilities.shape[1]).float()
        best, finite = best_sequences(plans, score(plans), args.num_best)
        if finite.any():
            probabilities = moments(best[finite])[0].lerp(probabilities, args.momentum)
    return probabilities[None]


BOX_PLANNERS = {"random_shooting": random_shooting, "cem": cem, "icem": icem, "mppi": mppi, "gradient": gradient}
DISCRETE_PLANNERS = {"random_shooting": random_shooting_discrete, "cem": cem_discrete}


# ---------------------------------------------------------------------------------------------------------------------
# Agent
# ---------------------------------------------------------------------------------------------------------------------
class Agent:
    """Ensemble, data and planner: `act` plans, `observe` stores, `update` trains when it is time.

    Drive it from a loop of your own: `agent = Agent(env.observation_space, env.action_space, Args(horizon=20))`, then
    for every step `act`, `env.step`, `observe`, `update`.
    """

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        check_spaces(observation_space, action_space)
        self.args, self.discrete = args, isinstance(action_space, gym.spaces.Discrete)
        planners = DISCRETE_PLANNERS if self.discrete else BOX_PLANNERS
        if args.planner not in planners:
            raise Failure(f"--planner {args.planner} is not for {action_space}, but one of {', '.join(planners)}")
        self.planner, self.device = planners[args.planner], find_device(args.device)
        self.obs_size = math.prod(observation_space.shape)
        # `neutral` is a plan that says nothing, (1, 1, A).
        if self.discrete:
            self.action_size, self.first_action = int(action_space.n), int(action_space.start)
            self.neutral = torch.full((1, 1, self.action_size), 1 / self.action_size, device=self.device)
        else:
            self.action_size, self.action_space = math.prod(action_space.shape), action_space
            self.neutral = torch.zeros(1, 1, self.action_size, device=self.device)
            low, high = self.tensor(action_space.low), self.tensor(action_space.high)
            self.middle, self.half_range = (high + low) / 2, (high - low) / 2
        self.generator = torch.Generator(self.device).manual_seed(seed_of(args.seed, 0))
        self.model = Ensemble(self.obs_size, self.action_size, args, self.generator)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.model_lr)
        self.value = Value(self.obs_size, self.generator) if args.terminal_value else None
        self.data = Buffer(self.obs_size, self.action_size, self.device)
        self.reward_fn, self.termination_fn = load_function(args.reward_fn), load_function(args.termination_fn)
        self.imagine = torch.compile(imagine) if args.compile else imagine
        # Rows imagined at once: on a CPU so many that what they need stays in the cache of a core.
        self.chunk = 4096 if self.device.type == "cpu" else 2**20
        self.start: Tensor | None = None  # what the planner starts from at the next step
        self.trained_at, self.episode, self.logs = 0, 0, {}
        begun = args.resume and any((Path(args.resume) / f"{kind}{CHECKPOINT}").exists() for kind in ("", "previous."))
        if args.init_from and not (begun or args.evaluate):
            self.init_from(Path(args.init_from))

    def act(self, obs: Any) -> Any:
        """The first action of the plan; before `learning_starts` steps, a random one."""
        if self.data.size < self.args.learning_starts:
            return self.to_env(self.random_action())
        action, self.start = self.plan(obs, self.start, self.generator)
        return action

    def random_action(self) -> Tensor:
        """Uniform action (A,), in [-1, 1] or one-hot."""
        if self.discrete:
            return F.one_hot(self.random_indices(), self.action_size).float()
        return uniform(1, self.neutral, self.generator)[0, 0]

    def tensor(self, values: Any) -> Tensor:
        """An observation or action of the environment as one row, in single precision."""
        return torch.as_tensor(np.asarray(values, np.float32).reshape(-1), device=self.device)

    def plan(self, obs: Any, start: Tensor | None, generator: torch.Generator) -> tuple[Any, Tensor]:
        """Returns the action, and what to start from at the next step; `start` None: an episode begins."""
        args = self.args
        # Autograd refuses what was made in inference mode.
        with torch.no_grad() if args.planner == "gradient" else torch.inference_mode():
            if start is None:
                start = self.neutral.expand(1, args.horizon, -1)
            state, networks = self.tensor(obs), self.model.select(self.model.elites)
            found = self.planner(lambda plans: self.score(networks, state, plans, generator), start, args, generator)
            start = torch.cat([found[:, 1:], self.neutral.expand(len(found), 1, -1)], dim=1)
        return self.to_env(found[0, 0]), start

    def score(self, networks: Networks, obs: Tensor, plans: Tensor, generator: torch.Generator) -> Tensor:
        """Expected returns (N,) of sequences (N, H, A) in [-1, 1] or one-hot."""
        args, groups, returns = self.args, len(self.model.elites), []
        functions = {"reward_fn": self.reward_fn, "termination_fn": self.termination_fn, "value_fn": self.value}
        for part in self.to_env_units(plans).split(max(1, self.chunk // args.particles)):
            shape = (args.horizon, groups, len(part) * args.particles // groups)
            noise = torch.randn(*shape, self.obs_size, generator=generator, device=self.device)
            permutations = None
            if args.sampling == "ts1":
                permutations = torch.rand(shape, generator=generator, device=self.device).argsort(1)
            returns.append(self.imagine(self.model, networks, obs, part, noise, permutations, args.gamma, **functions))
        return torch.cat(returns)

    def to_env_units(self, actions: Tensor) -> Tensor:
        """Actions in [-1, 1] in the environment's units; one-hot ones stay as they are."""
        return actions if self.discrete else self.middle + self.half_range * actions

    def to_env(self, action: Tensor) -> Any:
        """One action (A,) as the environment wants it; of probabilities the most probable."""
        if self.discrete:
            return self.first_action + int(action.argmax())
        space, values = self.action_space, self.to_env_units(action).cpu().numpy()
        return values.reshape(space.shape).astype(space.dtype).clip(space.low, space.high)

    def observe(
        self, obs: Any, action: Any, reward: float, next_obs: Any, terminated: bool, truncated: bool = False
    ) -> None:
        """Stores one real step; whether it goes to the hold-out set is drawn here, once and for all."""
        if self.discrete:
            action = np.eye(self.action_size, dtype=np.float32)[action - self.first_action]
        # The difference of close numbers is taken before they are rounded to single precision.
        before, after = (np.asarray(values, np.float64).reshape(-1) for values in (obs, next_obs))
        row = {"obs": before, "action": np.reshape(action, -1), "reward": reward, "delta": after - before}
        holdout = self.data.draw_holdout(self.args.holdout_ratio, self.args.max_holdout, self.generator)
        self.data.add(**row, terminated=terminated, episode=self.episode, holdout=holdout)
        self.relabel(self.data.size - 1)
        if terminated or truncated:
            self.start, self.episode = None, self.episode + 1

    def relabel(self, start: int) -> None:
        """Puts what `reward_fn` and `termination_fn` say into the rows from `start` on."""
        obs, action, delta = (self.data.column(name)[start:] for name in ("obs", "action", "delta"))
        for name, function in (("reward", self.reward_fn), ("terminated", self.termination_fn)):
            if function is not None:
                try:
                    found = function(obs, action, obs + delta)
                except Exception as error:
                    raise Failure(f"the function for {name}: {type(error).__name__}: {error}") from error
                if not isinstance(found, Tensor) or found.shape != obs.shape[:1]:
                    shape = getattr(found, "shape", type(found).__name__)
                    raise Failure(f"the function for {name} gave {shape}, not a tensor with one number for each row")
                self.data.column(name)[start:, 0] = found

    def update(self) -> None:
        """Trains the ensemble every `train_every` steps, after a look at how it predicted what it had not seen."""
        args, size = self.args, self.data.size
        if size < args.learning_starts or (self.trained_at and size - self.trained_at < args.train_every):
            return
        if self.trained_at:
            self.logs |= diagnose(self.model, self.data, self.trained_at)
        self.logs |= fit(self.model, self.optimizer, self.data, args, self.generator)
        if self.value is not None:
            self.logs |= self.value.fit(self.data, self.lookahead(), args.gamma, self.generator)
        self.trained_at = size

    def foresee(self, state: Tensor, action: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """States (B, obs_size) and Discrete actions (B,) -> what one of the elites expects: next states (B, obs_size),
        rewards and probabilities of going on (B,)."""
        networks = self.model.select(self.model.elites[index % len(self.model.elites)][None])
        step = state[None], F.one_hot(action, self.action_size).float()[None]
        delta, _ = self.model.predict(*step, networks[0])
        reward, survival = outcome(self.model, networks, *step, delta, self.reward_fn, self.termination_fn)
        return state + delta[0], reward[0], survival[0].float()

    def random_indices(self, *shape: int) -> Tensor:
        """Discrete actions, counted from 0."""
        return torch.randint(self.action_size, shape, generator=self.generator, device=self.device)

    @torch.no_grad()
    def lookahead(self, steps: int = 8, count: int = 2_000) -> Lookahead | None:
        """For Discrete actions: states near real ones, to which up to `steps` random actions lead by the model, and
        what 8 * A random sequences of actions bring from there, and from all real states, each by the mean of one of
        the elites."""
        if not self.discrete:
            return None
        real = self.data.column("obs")
        rows = torch.randint(len(real), (count,), generator=self.generator, device=self.device)
        state, alive, near = real[rows], torch.ones_like(rows, dtype=torch.bool), []
        for step in range(steps):  # of these walks, one in `steps` ends here
            state, _, survival = self.foresee(state, self.random_indices(count), step)
            alive = alive & (survival > 0.5)
            near.append(state[step::steps][alive[step::steps]])
        states, found = torch.cat([real, *near]), []
        for index in range(8 * self.action_size):
            state, returns, discount = states, 0.0, 1.0
            for action in self.random_indices(steps):
                state, reward, survival = self.foresee(state, action.expand(len(states)), index)
                returns, discount = returns + discount * reward, discount * self.args.gamma * survival
            found.append((state, returns, discount))
        return Lookahead(states, *map(torch.stack, zip(*found, strict=True)))

    def greedy_policy(self, seed: int) -> Callable[..., Any]:
        """A policy (observation, info -> action) for one episode, which does not touch the agent."""
        start, generator = None, torch.Generator(self.device).manual_seed(seed)

        def policy(obs: Any, info: dict | None = None) -> Any:
            nonlocal start
            action, start = self.plan(obs, start, generator)
            return action

        return policy

    def metrics(self) -> dict[str, float]:
        """What to log, by TensorBoard tag."""
        return self.logs

    def init_from(self, folder: Path) -> None:
        """Takes model and data of another run; the value is learned from the data, for the present task."""
        source = saved_args(str(folder))
        for name in ("reward_fn", "termination_fn"):  # its data have what that function said
            if getattr(source, name) is not None and getattr(self.args, name) is None:
                raise Failure(f"{folder} was made with --{name.replace('_', '-')}, so this needs one, too")
        try:
            state = read_checkpoint(folder / CHECKPOINT)["agent"]
            if state["counts"][0] == 0:
                raise ValueError("it has not trained its model yet")
            self.model.load_state_dict(state["model"])
            self.data.load_state_dict(state["data"])
        except Exception as error:
            raise Failure(f"cannot start from {folder}: {type(error).__name__}: {error}") from error
        self.trained_at, self.episode = state["counts"][0], int(self.data.episode[self.data.size - 1]) + 1
        self.relabel(0)
        if self.value is not None:  # each fit takes away some 60 % of what a new value is off
            lookahead = self.lookahead()
            for _ in range(5):
                self.logs |= self.value.fit(self.data, lookahead, self.args.gamma, self.generator)

    def state_dict(self) -> dict:
        """All that the next step depends on, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "value": None if self.value is None else self.value.state_dict(),
            "data": self.data.state_dict(),
            "generator": {self.device.type: self.generator.get_state()},
            "start": self.start,
            "counts": [self.trained_at, self.episode],
            "logs": self.logs,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` gave into a newly made agent."""
        for name in ("model", "optimizer", "data"):
            getattr(self, name).load_state_dict(state[name])
        if self.value is not None:
            self.value.load_state_dict(state["value"])
        if self.device.type in state["generator"]:  # on another kind of device, random numbers start afresh
            self.generator.set_state(state["generator"][self.device.type])
        self.start = None if state["start"] is None else state["start"].to(self.device)
        (self.trained_at, self.episode), self.logs = state["counts"], state["logs"]


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
    """PETS, algorithm 1, with the ensemble trained every `train_every` steps; returns what is in result.json."""
    torch.set_num_threads(args.threads)
    env = make_env(args)
    agent = Agent(env.observation_space, env.action_space, args)
    episode = Episode(env, args.seed, 1)
    run = Run(args, agent, [episode])
    for step in run.steps():
        obs = episode.obs
        action = agent.act(obs)
        next_obs, reward, terminated, truncated = episode.step(action)
        agent.observe(obs, action, reward, next_obs, terminated, truncated)
        agent.update()
        if terminated or truncated:
            run.log_episode(step, episode)
            episode.reset()
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
