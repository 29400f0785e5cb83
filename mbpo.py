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
"""MBPO: learn from short rollouts of a learned model as if they were real.

An ensemble of neural networks learns from every real step what comes next. From states that were really visited it
imagines what the current policy would do there, only a few steps ahead, so that its errors do not add up. A soft
actor-critic learns from these imagined transitions, which are far more numerous than the real ones.

The algorithm (Janner et al. 2019, "When to Trust Your Model: Model-Based Policy Optimization", algorithm 2):

    for each environment step:
        Take an action by the policy; add the step to D_env
        every `train_every` steps:
            Train the ensemble p_theta on D_env by maximum likelihood
            for M rollouts (`rollouts`; k: `rollout_schedule`):
                Sample s_t uniformly from D_env
                Perform a k-step rollout from s_t with the policy and p_theta; add it to D_model
        for G gradient updates (`updates_per_step`):
            Update the policy on D_model (and a few transitions of D_env)

The policy is trained as in soft actor-critic (Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications",
algorithm 1). The order is that of the authors' code, jannerm/mbpo: every 250 steps the ensemble is trained and the
rollouts are made. The fields name its settings. What else differs:

    - Reward and termination have networks of their own, without noise, which see the next observation. The termination
      is learned and not given, so that an environment is all that is needed, as long as the next observation shows
      that it is the last; rows that terminate weigh as much as all others (up to 1,000 times as much), so that an
      imagined step terminates where that is likelier than in the data on average. The price: where episodes end by
      chance, or by an action that leaves no trace, far too many imagined steps do; there, give `termination_fn`.
    - What the ensemble predicts is standardised. A transition is held out from all trainings or from none (until there
      are more than `max_holdout`), and only the error of the dynamics decides when to stop.
    - Every step is in the data at once (theirs: every episode, when it has ended or has 1,000 steps), and no more
      random actions are taken than `learning_starts` says (theirs: up to the end of the episode).
    - The actor and the critics begin with PyTorch's initial weights (theirs with Keras'). The MuJoCo tasks are
      Gymnasium's v5, theirs Gym's v2.

Run:     python mbpo.py
         python mbpo.py --real-ratio 1          (the same agent without a model)
         python mbpo.py --help
Expect:  the last evaluation of each seed (mean of 5 episodes, Reacher-v5: 20); the range of the same without a model
         and with one update a step; the minutes of a seed on a CPU core. (A random policy scores about -1,200 on
         Pendulum-v1.)

    environment                 steps  MBPO                                      without a model            minutes
    Pendulum-v1                 3,000  -97, -141, -145, -146, -149 (mean: -136)  -200 after 2.3 x the steps 5
    InvertedPendulum-v5         3,000  1000, the maximum (5 of 5 seeds)          82 to 177 at 6,000         6 to 7
    InvertedDoublePendulum-v5   5,000  9360, 7543, 5858                          475 to 993                 36 to 38
    Reacher-v5                  5,000  -4.9, -5.7, -5.9                          -7.9 to -9.6               11 to 14
    HalfCheetah-v5             10,000  3233, 3291, 4144                          -102 to -163               45 to 62

         Pendulum-v1 is above -200 from step 1,000 (the best seed) or 2,000 on (the worst). With as many updates a step,
         but no model, it takes 1,000 to 1,500 steps (5 seeds), and InvertedPendulum-v5 has 1000 at 2,000 steps, as it
         has with a model (5 seeds): on these two the gain comes from the number of updates, not from the model. On
         HalfCheetah-v5, where the column without a model is with as many updates, 40, it comes from the model; SAC of
         Stable-Baselines3 first returns 2,000 after 35,000 to 45,000 steps, MBPO after 7,000 to 9,000.
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
from typing import Annotated, Any, Literal, get_origin, get_type_hints

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
    """MBPO: soft actor-critic on short rollouts of a learned model (Janner et al. 2019)."""

    env_id: str = "Pendulum-v1"
    """Gymnasium id, `module:Name-v0` for another package's."""
    env_kwargs: tuple[str, ...] = ()
    """Options for `gym.make`, as name=value: `--env-kwargs max_episode_steps=50`."""
    total_timesteps: Annotated[int, 0, math.inf] = 3_000
    """Environment steps (calls of `env.step`) to learn for."""
    seed: Annotated[int, 0, 2**32 - 1] = 1
    """Seed of every random draw: the agent's, the episodes', the evaluation's."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the networks are; `auto` takes a GPU where there is one."""
    threads: Annotated[int, 1, 1024] = 1
    """CPU threads; two runs side by side get more done than one with two threads."""
    compile: bool = False
    """Compile the losses of the policy with torch.compile, which changes nothing but speed and rounding; for GPUs."""
    eval_every: Annotated[int, 1, math.inf] = 1_000
    """Environment steps between two evaluations (greedy policy, environment of its own)."""
    eval_episodes: Annotated[int, 1, math.inf] = 5
    """Episodes of an evaluation. Where the environment has no time limit, one ends after 1,000 steps at the latest."""
    checkpoint_every: Annotated[int, 1, math.inf] = 1_000
    """Environment steps between two checkpoints."""
    run_dir: str = "runs"
    """Folder in which the run's own folder is made."""
    resume: str | None = None
    """Run folder to continue exactly where its last checkpoint was written."""
    evaluate: str | None = None
    """Run folder whose agent to evaluate, without learning; nothing but videos is added to the folder."""
    capture_video: bool = False
    """Record the first episode of each evaluation as a GIF in the run folder."""

    learning_starts: Annotated[int, 1, math.inf] = 500
    """Steps with uniformly random actions before anything is learned (MBPO: 5,000; the inverted pendulums 500, and no
    update of the policy before 1,000)."""
    gamma: Annotated[float, 0, 1] = 0.99
    """Discount factor of the rewards (MBPO: 0.99)."""
    updates_per_step: Annotated[int, 0, 1000] = 10
    """Updates of the soft actor-critic for each environment step (MBPO: 20; HalfCheetah 40, InvertedPendulum 10)."""
    batch_size: Annotated[int, 1, 10**6] = 256
    """Transitions of an update."""
    real_ratio: Annotated[float, 0, 1] = 0.05
    """Share of real transitions in a batch, rounded down; 1: plain soft actor-critic, and no model is trained."""
    real_ratio_steps: Annotated[int, 0, math.inf] = 0
    """Not in the paper: steps after `learning_starts` over which the share falls from 1 to `real_ratio`; 0: at once."""
    policy_lr: Annotated[float, 1e-9, 1] = 3e-4
    """Step size of Adam for actor, critics and temperature."""
    policy_hidden: tuple[int, ...] = (256, 256)
    """Units of each hidden layer of actor and critics."""
    tau: Annotated[float, 1e-9, 1] = 0.02
    """Step of the target critics towards the critics at every update (Polyak averaging; MBPO: 0.005). Values need about
    1 / tau / (1 - gamma) updates until they are right: 5,000 here."""
    target_entropy: float | None = None
    """Entropy that the temperature aims at, of actions in [-1, 1]. None: minus half the number of their dimensions, as
    mostly in MBPO (SAC: minus their number)."""
    critic_layer_norm: bool = False
    """Layer-normalise the critics, as DroQ does to make many updates a step without a model (Hiraoka et al. 2022; it
    updates the actor once a step, here as often as the critics)."""
    critic_dropout: Annotated[float, 0, 0.99] = 0.0
    """Dropout in the critics, along with it (Hiraoka et al. 2022: 0.01)."""

    rollout_schedule: tuple[int, int, int, int] = (0, 1, 1, 1)
    """(a, b, x, y): rollouts are x steps long until step a, then linearly longer, up to y at step b; steps count
    from `learning_starts` on (MBPO: the same, but it changes only every 1,000 steps)."""
    rollouts: Annotated[int, 1, 10**8] = 100_000
    """Rollouts after each training of the model, each from a state drawn from the real ones."""
    keep_trainings: Annotated[int, 1, 10**6] = 1
    """Imagined transitions are kept for at least so many trainings (MBPO: 4; the inverted pendulums 1,
    Humanoid 5). What an early model imagined, which had seen little, misleads for as long."""
    max_disagreement: float | None = None
    """Not in the paper: a rollout ends before a step on which the elites disagree more than this: the standard
    deviation of their means, divided by that of a step's change in the data, averaged over dimensions. (On the pendulum
    after 3,000 steps its median is about 0.01, and it is nowhere above 0.15.)"""
    weigh_disagreement: bool = False
    """Not in the paper: imagined transitions weigh 1 / (1 + disagreement) in the critics' loss."""
    reward_fn: str | None = None
    """`module:function` for the reward: tensors obs (flattened), action (in the environment's units) and next_obs, of
    shapes (..., size), to (...). None: it is learned."""
    termination_fn: str | None = None
    """`module:function` for the termination, called in the same way: a tensor of bool. None: it is learned."""

    ensemble_size: Annotated[int, 1, 1000] = 7
    """Networks in the ensemble (PETS: 5, MBPO: 7)."""
    num_elites: int = 5
    """Networks that are used, those with the lowest hold-out error (PETS: all, MBPO: 5 of 7)."""
    hidden: tuple[int, ...] = (200, 200, 200, 200)
    """Units of each hidden layer of the dynamics networks (MBPO: 4 layers of 200; Humanoid 400)."""
    weight_decay: tuple[float, ...] = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)
    """Factor of half the squared weights of each layer of the dynamics networks, the last one included (MBPO)."""
    model_lr: Annotated[float, 1e-9, 1] = 1e-3
    """Step size of Adam for the ensemble (PETS, MBPO)."""
    model_batch_size: Annotated[int, 1, 10**6] = 256
    """Largest batch of a network: a batch is a sixteenth of the training rows, but at least 32 and at most this (MBPO:
    256, PETS: 32)."""
    train_every: Annotated[int, 1, math.inf] = 250
    """Environment steps between two trainings of the ensemble (MBPO: 250; Humanoid 1,000)."""
    patience: Annotated[int, 1, 10**6] = 5
    """A training ends after more than so many epochs without a member better by 1 % on the hold-out set (MBPO)."""
    max_updates: Annotated[int, 1, math.inf] = 2_000
    """Gradient steps after which a training ends in any case, at the end of an epoch, which has no more of them
    (MBPO: none)."""
    holdout_ratio: Annotated[float, 0, 0.9] = 0.2
    """Probability that a transition goes to the hold-out set, which no network is trained on (MBPO: 0.2)."""
    max_holdout: Annotated[int, 1, math.inf] = 5_000
    """Largest size of the hold-out set (MBPO)."""

    def __post_init__(self):
        check_ranges(self)
        if not 1 <= self.num_elites <= self.ensemble_size:
            raise Failure(f"--num-elites must be from 1 to {self.ensemble_size}, not {self.num_elites}")
        if len(self.weight_decay) != len(self.hidden) + 1 or not all(size >= 1 for size in self.hidden):
            raise Failure("--weight-decay needs one value more than --hidden, whose values are at least 1")
        if not all(0 <= factor < math.inf for factor in self.weight_decay):
            raise Failure(f"--weight-decay needs values from 0 on, not {self.weight_decay}")
        if not self.policy_hidden or not all(size >= 1 for size in self.policy_hidden):
            raise Failure("--policy-hidden needs values of at least 1")
        first, last, shortest, longest = self.rollout_schedule
        if not (0 <= first < last and 1 <= shortest <= longest <= 1000):
            raise Failure("--rollout-schedule needs two steps, the second one later, and two lengths from 1 to 1000")
        if not (self.target_entropy is None or math.isfinite(self.target_entropy)):
            raise Failure(f"--target-entropy must be a number, not {self.target_entropy}")
        if not (self.max_disagreement is None or self.max_disagreement > 0):
            raise Failure(f"--max-disagreement must be above 0, not {self.max_disagreement}")


# Settings by environment that differ from the defaults. `parse_args` uses them; what the command line says wins.
# Those of Hopper-v5 and below are the authors', but for `max_updates`, which bounds the cost of a training with much
# data, and `eval_every`; where they truncated the observation, so do the environment's options. In benchmark/ are
# the first 10,000 steps of HalfCheetah-v5; none of these has been run to its end.
MUJOCO = {"learning_starts": 5_000, "updates_per_step": 20, "tau": 0.005, "keep_trainings": 4}
MUJOCO |= {"eval_every": 5_000, "checkpoint_every": 5_000}
HUMANOID_OPTIONS = (
    "include_cinert_in_observation=False",
    "include_cvel_in_observation=False",
    "include_qfrc_actuator_in_observation=False",
    "include_cfrc_ext_in_observation=False",
)
PRESETS: dict[str, dict[str, Any]] = {
    "InvertedPendulum-v5": {"total_timesteps": 3_000, "target_entropy": -0.05},
    "InvertedDoublePendulum-v5": {"total_timesteps": 5_000, "updates_per_step": 20},
    "Reacher-v5": {"total_timesteps": 5_000, "eval_episodes": 20},
    "Hopper-v5": MUJOCO
    | {"total_timesteps": 125_000, "target_entropy": -1.0, "rollout_schedule": (20_000, 150_000, 1, 15)},
    "Walker2d-v5": MUJOCO | {"total_timesteps": 300_000, "target_entropy": -3.0},
    "HalfCheetah-v5": MUJOCO | {"total_timesteps": 400_000, "target_entropy": -3.0, "updates_per_step": 40},
    "Ant-v5": MUJOCO
    | {"total_timesteps": 300_000, "target_entropy": -4.0, "rollout_schedule": (20_000, 100_000, 1, 25)}
    | {"env_kwargs": ("include_cfrc_ext_in_observation=False",)},
    "Humanoid-v5": MUJOCO
    | {"total_timesteps": 300_000, "target_entropy": -2.0, "rollout_schedule": (20_000, 300_000, 1, 25)}
    | {"hidden": (400, 400, 400, 400), "train_every": 1_000, "keep_trainings": 5, "env_kwargs": HUMANOID_OPTIONS},
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
    if not (box and bounded(action_space)):
        others = "Discrete: cem_mpc.py, muzero.py, dreamer.py"
        raise Failure(f"actions must be a bounded Box of floating-point numbers, not {action_space}; {others}")


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
# Dimensions of the tensors: E members of the ensemble, G of them in use, B rows for each, N rows of the data, A
# action_size.
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


class Pool:
    """D_model: imagined transitions, a ring in which new ones replace the oldest."""

    def __init__(self, obs_size: int, action_size: int, device: torch.device):
        self.size = self.position = 0
        # goes_on: 0 where the step terminated, else 1; weight: in the critics' loss; step: when it was imagined.
        widths = {"obs": obs_size, "action": action_size, "reward": 1, "next_obs": obs_size, "goes_on": 1, "weight": 1}
        widths["step"] = 1
        self.columns = {name: torch.zeros(0, width, device=device) for name, width in widths.items()}

    def resize(self, capacity: int) -> None:
        """Makes room for `capacity` transitions, and keeps the latest of those that are there."""
        if capacity != len(self.columns["obs"]):
            for name, column in self.columns.items():
                kept = torch.cat([column[self.position : self.size], column[: self.position]])[-capacity:]
                self.columns[name] = torch.zeros(capacity, column.shape[1], device=column.device)
                self.columns[name][: len(kept)] = kept
            self.size = len(kept)
            self.position = self.size % capacity

    def add(self, rows: dict[str, Tensor]) -> None:
        """Writes rows (B, width), of which there are not more than the capacity."""
        count, capacity = len(rows["obs"]), len(self.columns["obs"])
        index = (self.position + torch.arange(count, device=rows["obs"].device)) % capacity
        for name, column in self.columns.items():
            column[index] = rows[name]
        self.position, self.size = (self.position + count) % capacity, min(capacity, self.size + count)

    def state_dict(self) -> dict:
        columns = {name: column[: self.size].clone() for name, column in self.columns.items()}
        return {"columns": columns, "position": self.position, "capacity": len(self.columns["obs"])}

    def load_state_dict(self, state: dict) -> None:
        self.resize(state["capacity"])
        for name, values in state["columns"].items():
            self.columns[name][: len(values)] = values
        self.size, self.position = len(values), state["position"]


# ---------------------------------------------------------------------------------------------------------------------
# Planner
# ---------------------------------------------------------------------------------------------------------------------
# MBPO plans in the background, as Dyna does: the model makes transitions, from which the actor-critic learns.
def rollout_length(step: int, schedule: tuple[int, int, int, int]) -> int:
    """Linear between two steps (MBPO, appendix C), rounded down."""
    first, last, shortest, longest = schedule
    share = min(max((step - first) / (last - first), 0), 1)
    return int(shortest + share * (longest - shortest))


def imagined_step(
    model: Ensemble,
    obs: Tensor,
    action: Tensor,
    generator: torch.Generator,
    reward_fn: Callable | None,
    termination_fn: Callable | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step from obs (B, obs_size) by action (B, A): next obs (B, obs_size), reward (B, 1), terminated (B, 1).

    Each row is predicted by an elite of its own, drawn anew, and by no other: rows of one elite go together, `chunk` of
    them at once.
    """
    draw = torch.randint(len(model.elites), (len(obs),), generator=generator, device=obs.device)
    noise = torch.randn(obs.shape, generator=generator, device=obs.device)
    next_obs, reward, logit = torch.empty_like(obs), obs.new_empty(len(obs), 1), obs.new_empty(len(obs), 1)
    for index, elite in enumerate(model.elites):
        dynamics, reward_layers, termination = model.select(elite[None])
        for rows in (draw == index).nonzero()[:, 0].split(chunk):
            before, act = obs[rows][None], action[rows][None]  # (1, R, size)
            mean, std = model.predict(before, act, dynamics)
            delta = mean + std * noise[rows]
            after = before + delta
            next_obs[rows] = after[0]
            reward[rows] = model.predict_reward(delta, act, after, reward_layers)[0]
            logit[rows] = model.termination_logit(after, termination)[0]
    reward = reward * model.reward_std + model.reward_mean
    if reward_fn is not None:
        reward = reward_fn(obs, action, next_obs).reshape(len(obs), 1).float()
    # Terminations weigh more in training, so logit 0 is where one is as probable as in the data on average: a rollout
    # ends early rather than late. (Where a termination is the goal, that is the optimistic side.)
    terminated = logit > 0
    if termination_fn is not None:
        terminated = termination_fn(obs, action, next_obs).reshape(len(obs), 1).bool()
    return next_obs, reward, terminated


def disagreement(model: Ensemble, obs: Tensor, action: Tensor, chunk: int) -> Tensor:
    """(B, 1): standard deviation of the elites' means, divided by that of a step's change in the data, averaged over
    dimensions."""
    dynamics, count = model.select(model.elites)[0], len(model.elites)
    parts = []
    for before, act in zip(obs.split(chunk), action.split(chunk), strict=True):
        mean, _ = model.gaussian(before.expand(count, -1, -1), act.expand(count, -1, -1), dynamics)
        spread = mean.std(0, correction=0) * (model.delta_std > 0)  # what never changes is predicted without error
        parts.append(spread.mean(1, keepdim=True))
    return torch.cat(parts)


@torch.inference_mode()
def imagine(
    model: Ensemble,
    actor: "Actor",
    obs: Tensor,
    length: int,
    args: Args,
    generator: torch.Generator,
    reward_fn: Callable | None = None,
    termination_fn: Callable | None = None,
    chunk: int | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Branched rollouts (MBPO, algorithm 2): yields, for each of `length` steps, the transitions of those rollouts from
    obs (B, obs_size) that have not terminated before, nor reached where the ensemble disagrees too much. `chunk`: rows
    at once; None: on a CPU so many that what they need stays in the cache of a core."""
    chunk = chunk or (4096 if obs.device.type == "cpu" else 2**20)
    for _ in range(length):
        noise = torch.randn(len(obs), actor.action_size, generator=generator, device=obs.device)
        parts = zip(obs.split(chunk), noise.split(chunk), strict=True)
        action = torch.cat([actor.sample(part, part_noise)[0] for part, part_noise in parts])
        weight = torch.ones(len(obs), 1, device=obs.device)
        if args.max_disagreement is not None or args.weigh_disagreement:
            spread = disagreement(model, obs, action, chunk)
            if args.weigh_disagreement:
                weight = 1 / (1 + spread)
            if args.max_disagreement is not None:
                trusted = (spread < args.max_disagreement)[:, 0]
                obs, action, weight = obs[trusted], action[trusted], weight[trusted]
        if len(obs) == 0:
            return
        next_obs, reward, terminated = imagined_step(model, obs, action, generator, reward_fn, termination_fn, chunk)
        rows = {"obs": obs, "action": action, "reward": reward, "next_obs": next_obs}
        yield rows | {"goes_on": 1 - terminated.float(), "weight": weight}
        obs = next_obs[~terminated[:, 0]]


# ---------------------------------------------------------------------------------------------------------------------
# Agent
# ---------------------------------------------------------------------------------------------------------------------
def linear(fan_in: int, fan_out: int, generator: torch.Generator) -> nn.Linear:
    """A layer with PyTorch's initial weights, drawn from our own generator."""
    layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out, device=generator.device)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)
    return layer


class Actor(nn.Module):
    """A normal distribution squashed by tanh: actions in [-1, 1]."""

    def __init__(self, obs_size: int, action_size: int, args: Args, generator: torch.Generator):
        super().__init__()
        sizes, self.action_size = (obs_size, *args.policy_hidden), action_size
        self.layers = nn.ModuleList(linear(*pair, generator) for pair in itertools.pairwise(sizes))
        self.last = linear(sizes[-1], 2 * action_size, generator)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """obs (B, obs_size) -> mean and log standard deviation (B, A) before the squashing."""
        for layer in self.layers:
            obs = F.relu_(layer(obs))  # in place, which saves memory traffic
        mean, log_std = self.last(obs).chunk(2, dim=-1)
        return mean, log_std.clamp(-20, 2)  # the bounds of the code of soft actor-critic's authors

    def sample(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """obs (B, obs_size), standard normal noise (B, A) -> actions (B, A) and their log densities (B, 1)."""
        mean, log_std = self(obs)
        u = mean + log_std.exp() * noise
        log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob - 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2), exact for every u
        return u.tanh(), log_prob.sum(-1, keepdim=True)


class Critic(nn.Module):
    """Q(s, a). With layer normalisation and dropout it is DroQ's (whose actor follows the mean of the two critics; here
    it is the smaller of them, as without). Nothing is dropped where no `generator` is given."""

    def __init__(self, obs_size: int, action_size: int, args: Args, generator: torch.Generator):
        super().__init__()
        sizes, self.dropout = (obs_size + action_size, *args.policy_hidden), args.critic_dropout
        self.layers = nn.ModuleList(linear(*pair, generator) for pair in itertools.pairwise(sizes))
        norm = nn.LayerNorm if args.critic_layer_norm else nn.Identity
        self.norms = nn.ModuleList(norm(size, device=generator.device) for size in args.policy_hidden)
        self.last = linear(sizes[-1], 1, generator)

    def forward(self, obs: Tensor, action: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, 1); the generator draws what is dropped."""
        x = torch.cat([obs, action], dim=-1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = layer(x)
            if self.dropout and generator is not None:
                kept = torch.rand(x.shape, generator=generator, device=x.device) >= self.dropout
                x = x * kept / (1 - self.dropout)
            x = F.relu_(norm(x))
        return self.last(x)


def critic_loss(
    actor: Actor,
    critics: nn.ModuleList,
    targets: nn.ModuleList,
    batch: dict[str, Tensor],
    noise: Tensor,
    alpha: Tensor,
    gamma: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Soft Bellman error, summed over both critics (Haarnoja et al. 2018, equation 5). The columns of `batch` are
    (B, width), `goes_on` is 0 where a step terminated; `noise` is standard normal, (B, A)."""
    with torch.no_grad():
        next_action, log_prob = actor.sample(batch["next_obs"], noise)
        next_value = torch.min(*(target(batch["next_obs"], next_action, generator) for target in targets))
        wanted = batch["reward"] + gamma * batch["goes_on"] * (next_value - alpha * log_prob)
    errors = [critic(batch["obs"], batch["action"], generator) - wanted for critic in critics]
    return sum(0.5 * (batch["weight"] * error**2).mean() for error in errors)


def actor_loss(
    actor: Actor, critics: nn.ModuleList, obs: Tensor, noise: Tensor, alpha: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """The loss (Haarnoja et al. 2018, equation 7), and an estimate of the policy's entropy, from obs (B, obs_size) and
    standard normal `noise` (B, A)."""
    action, log_prob = actor.sample(obs, noise)
    value = torch.min(*(critic(obs, action, generator) for critic in critics))
    return (alpha * log_prob - value).mean(), -log_prob.mean().detach()


class Agent:
    """Soft actor-critic that learns mostly from its model: `act` draws an action, `observe` stores a step, `update`
    trains the model when it is time and makes the updates of one step.

    Drive it from a loop of your own: `agent = Agent(env.observation_space, env.action_space, Args())`, then for every
    step `act`, `env.step`, `observe`, `update`. Inside, actions are in [-1, 1], as in the authors' code: the entropy of
    actions in the environment's units differs by a constant, by which the target would have to be shifted.
    """

    parts = ("model", "actor", "critics", "targets", "data", "pool")  # of a checkpoint

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        check_spaces(observation_space, action_space)
        self.args, self.device, self.action_space = args, find_device(args.device), action_space
        obs_size, action_size = math.prod(observation_space.shape), math.prod(action_space.shape)
        low, high = self.tensor(action_space.low)[0], self.tensor(action_space.high)[0]
        self.middle, self.half_range = (high + low) / 2, (high - low) / 2
        self.generator = torch.Generator(self.device).manual_seed(seed_of(args.seed, 0))

        sizes = obs_size, action_size, args, self.generator
        self.actor, self.critics = Actor(*sizes), nn.ModuleList([Critic(*sizes), Critic(*sizes)])
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = torch.zeros((), device=self.device, requires_grad=True)
        self.target_entropy = -action_size / 2 if args.target_entropy is None else args.target_entropy
        groups = (self.actor.parameters(), self.critics.parameters(), [self.log_alpha])
        self.optimizers = [torch.optim.Adam(group, lr=args.policy_lr, fused=True) for group in groups]
        self.data = Buffer(obs_size, action_size, self.device)

        self.model = Ensemble(*sizes)
        self.model_optimizer = torch.optim.Adam(self.model.parameters(), lr=args.model_lr, fused=True)
        self.pool = Pool(obs_size, action_size, self.device)
        self.reward_fn, self.termination_fn = map(self.load_for_unit_actions, (args.reward_fn, args.termination_fn))
        losses = critic_loss, actor_loss
        self.critic_loss, self.actor_loss = map(torch.compile, losses) if args.compile else losses
        self.trained_at, self.episode, self.logs, self.losses = 0, 0, {}, {}

    def load_for_unit_actions(self, name: str | None) -> Callable | None:
        """The function of that name, if one is named, for actions in [-1, 1]."""
        function = load_function(name)
        if function is None:
            return None
        return lambda obs, action, next_obs: function(obs, self.to_env_units(action), next_obs)

    def to_env_units(self, action: Tensor) -> Tensor:
        return self.middle + self.half_range * action

    def act(self, obs: Any) -> Any:
        """An action of the policy, drawn; before `learning_starts` steps, a uniformly random one."""
        size = self.actor.action_size
        if self.data.size < self.args.learning_starts:
            return self.to_env(torch.rand(size, generator=self.generator, device=self.device) * 2 - 1)
        noise = torch.randn(1, size, generator=self.generator, device=self.device)
        with torch.inference_mode():
            return self.to_env(self.actor.sample(self.tensor(obs), noise)[0][0])

    def tensor(self, values: Any) -> Tensor:
        """One observation or action of the environment as (1, size), in single precision."""
        return torch.as_tensor(np.asarray(values, np.float32).reshape(1, -1), device=self.device)

    def to_env(self, action: Tensor) -> np.ndarray:
        """One action (A,) in [-1, 1] as the environment wants it."""
        space = self.action_space
        values = self.to_env_units(action).cpu().numpy().reshape(space.shape).astype(space.dtype)
        return values.clip(space.low, space.high)

    def observe(
        self, obs: Any, action: Any, reward: float, next_obs: Any, terminated: bool, truncated: bool = False
    ) -> None:
        """Stores one real step; whether it goes to the model's hold-out set is drawn here."""
        action = (self.tensor(action)[0] - self.middle) / self.half_range
        # The difference of close numbers is taken before they are rounded to single precision.
        before, after = (np.asarray(values, np.float64).reshape(-1) for values in (obs, next_obs))
        holdout = self.data.draw_holdout(self.args.holdout_ratio, self.args.max_holdout, self.generator)
        row = {"obs": before, "action": action, "reward": reward, "delta": after - before, "terminated": terminated}
        self.data.add(**row, episode=self.episode, holdout=holdout)
        self.relabel(self.data.size - 1)
        self.episode += bool(terminated or truncated)

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
        """After each environment step: the model when it is time, then the updates of the actor-critic."""
        args, size = self.args, self.data.size
        if size < args.learning_starts:
            return
        if args.real_ratio < 1 and (not self.trained_at or size - self.trained_at >= args.train_every):
            self.train_model()
        batches = self.batches(args.updates_per_step)
        for index in range(args.updates_per_step):
            self.update_policy({name: column[index] for name, column in batches.items()})

    def train_model(self) -> None:
        """Trains the ensemble, after a look at how it predicted what it had not seen, and fills the pool."""
        args, size, generator = self.args, self.data.size, self.generator
        if self.trained_at:
            self.logs |= diagnose(self.model, self.data, self.trained_at)
        self.logs |= fit(self.model, self.model_optimizer, self.data, args, generator)
        self.trained_at = size
        length = rollout_length(size - args.learning_starts, args.rollout_schedule)
        self.pool.resize(length * args.rollouts * args.keep_trainings)
        obs = self.data.obs[torch.randint(size, (args.rollouts,), generator=generator, device=self.device)]
        made, ended = 0, 0.0
        for rows in imagine(self.model, self.actor, obs, length, args, generator, self.reward_fn, self.termination_fn):
            self.pool.add(rows | {"step": torch.full_like(rows["reward"], size)})
            made, ended = made + len(rows["obs"]), ended + (1 - rows["goes_on"]).sum().item()
        self.logs |= {
            "planner/rollout_length": made / args.rollouts,
            "planner/imagined_terminations": ended / max(made, 1),
            "planner/pool_size": self.pool.size,
        }
        if self.pool.size:
            imagined = {name: column[: self.pool.size] for name, column in self.pool.columns.items()}
            real = {name: self.data.column(name) for name in ("obs", "action")}
            self.logs |= {
                "planner/pool_age": size - imagined["step"].mean().item(),  # environment steps since it was imagined
                # The actions of real steps are those of older policies; the imagined ones are of the last few. Where
                # the imagined values are higher by far more than that explains, the policy exploits the model.
                "planner/value_real": self.mean_value(real),
                "planner/value_imagined": self.mean_value(imagined),
            }

    @torch.no_grad()
    def mean_value(self, transitions: dict[str, Tensor]) -> float:
        """The mean value, by the critics, of some 1,000 to 2,000 of the transitions, evenly spaced."""
        every = max(1, len(transitions["obs"]) // 1_000)
        obs, action = transitions["obs"][::every], transitions["action"][::every]
        return torch.min(*(critic(obs, action) for critic in self.critics)).mean().item()

    def real_share(self) -> float:
        """The share of real transitions, at this step."""
        args, after = self.args, self.data.size - self.args.learning_starts
        if after >= args.real_ratio_steps:
            return args.real_ratio
        return 1 - (1 - args.real_ratio) * after / args.real_ratio_steps

    def batches(self, count: int) -> dict[str, Tensor]:
        """Transitions for so many updates, (count, batch_size, width), drawn at once."""
        args, data, pool = self.args, self.data, self.pool
        num_real = int(args.batch_size * self.real_share()) if pool.size else args.batch_size
        rows = torch.randint(data.size, (count, num_real), generator=self.generator, device=self.device)
        real = {name: data.column(name)[rows] for name in ("obs", "action", "reward", "delta", "terminated")}
        real["next_obs"], real["goes_on"] = real["obs"] + real.pop("delta"), 1 - real.pop("terminated").float()
        real["weight"] = torch.ones_like(real["reward"])
        if num_real == args.batch_size:
            return real
        shape = (count, args.batch_size - num_real)
        rows = torch.randint(pool.size, shape, generator=self.generator, device=self.device)
        return {name: torch.cat([column, pool.columns[name][rows]], dim=1) for name, column in real.items()}

    def update_policy(self, batch: dict[str, Tensor]) -> None:
        """One update of critics, actor, temperature and targets (Haarnoja et al. 2018, algorithm 1)."""
        args, alpha = self.args, self.log_alpha.exp().detach()
        actor_optimizer, critic_optimizer, alpha_optimizer = self.optimizers
        shape = (2, args.batch_size, self.actor.action_size)
        next_noise, noise = torch.randn(shape, generator=self.generator, device=self.device)
        generator = self.generator if args.critic_dropout else None

        loss = self.critic_loss(self.actor, self.critics, self.targets, batch, next_noise, alpha, args.gamma, generator)
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()

        policy_loss, entropy = self.actor_loss(self.actor, self.critics, batch["obs"], noise, alpha, generator)
        actor_optimizer.zero_grad()
        policy_loss.backward(inputs=list(self.actor.parameters()))  # and not the critics'
        actor_optimizer.step()

        self.log_alpha.grad = entropy - self.target_entropy  # of the loss log_alpha * (entropy - target)
        alpha_optimizer.step()

        with torch.no_grad():
            for target, parameter in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
                target.lerp_(parameter, args.tau)
        self.losses = {"critic_loss": loss, "actor_loss": policy_loss, "entropy": entropy, "alpha": alpha}

    def greedy_policy(self, seed: int) -> Callable[..., Any]:
        """A policy (observation, info -> action) for one episode, which does not touch the agent: tanh of the mean."""

        @torch.inference_mode()
        def policy(obs: Any, info: dict | None = None) -> Any:
            return self.to_env(self.actor(self.tensor(obs))[0][0].tanh())

        return policy

    def metrics(self) -> dict[str, float]:
        """What to log, by TensorBoard tag."""
        if self.losses:
            self.logs |= {f"losses/{name}": value.item() for name, value in self.losses.items()}
        return self.logs

    def state_dict(self) -> dict:
        """All that the next step depends on, as tensors and plain values."""
        self.metrics()  # so that a resumed run logs the same
        return {name: getattr(self, name).state_dict() for name in self.parts} | {
            "log_alpha": self.log_alpha.detach().clone(),
            "optimizers": [optimizer.state_dict() for optimizer in (*self.optimizers, self.model_optimizer)],
            "generator": {self.device.type: self.generator.get_state()},
            "counts": [self.trained_at, self.episode],
            "logs": self.logs,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` gave into a newly made agent."""
        for name in self.parts:
            getattr(self, name).load_state_dict(state[name])
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
        for optimizer, saved in zip((*self.optimizers, self.model_optimizer), state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.device.type in state["generator"]:  # on another kind of device, random numbers start afresh
            self.generator.set_state(state["generator"][self.device.type])
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
    """MBPO, algorithm 2; returns what is in result.json."""
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
