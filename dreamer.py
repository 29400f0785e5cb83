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
"""DreamerV3: learn a latent model of the world, and learn to act in nothing but its imagination.

A recurrent network keeps a state of the world: a deterministic part that remembers, and categorical samples for what
cannot be foreseen. It learns to predict the next samples before it has seen the observation, and from a state the
observation, the reward and whether the episode continues. From states it has seen it imagines a few steps ahead. From
these the actor and the critic learn; the critic also learns from the rewards that were really received.

The algorithm (Hafner et al. 2025, "Mastering diverse control tasks through world models"):

    for each environment step:
        Update the state by the observation, act by the actor; store the step and the state in the replay
        every few steps (`train_ratio`):
            Draw B sequences of T steps; infer their states
            Imagine H steps of the actor from these states
            lambda-returns of the imagined rewards and values, and of the real ones
            Update the world model, and by the returns the critic and, scaled by their range, the actor
            Store the states that were inferred

Details are those of the authors' code, danijar/dreamerv3 at commit e3f0224. This script departs from it as follows:

    - The continuous inputs of an observation are standardised (`standardise`). The settings suit small networks and
      short runs: step size, warm-up, sequences.
    - Imagination starts from only some of the states (`imagination_starts`). The critic learns from all real steps;
      where nothing was imagined it bootstraps from its own value.
    - The actor of discrete actions is mixed with 1 % of the uniform distribution, as in the paper.
    - One layer, not several, gives all numbers of an observation, and both mean and deviation of the actor, so that
      their gradients are clipped together; one-hot choices in an observation are fitted by squared error, too, and
      integers in a Box are numbers, not choices.
    - Pictures are halved down to about 4 x 4 whatever their size. Their loss is a sum over pixels, so that it counts
      less for small ones. Those of Atari games hold the last 4 frames, grey; the environment's own rules stay, so that
      scores are those of neither of the authors' Atari settings.
    - A time limit ends no value (their wrapper of Gym environments takes it for an end).
    - Acting is in single precision, also with `bf16`; evaluation takes the most likely action, in states that are
      drawn as in training.

Run:     python dreamer.py
         python dreamer.py --size 12m --batch-length 64 --imagination-starts 64 --train-ratio 512 --learning-rate 4e-5
             --warmup 1000 --compile                (on a GPU; batches and step size of the authors)
         python dreamer.py --help
Expect:  CartPole-v1 (--total-timesteps 50000): a return of 475 or more (of 500) for the first time at 3,000 to 7,000
         steps (5 of 5 seeds), with relapses: 16 of the 224 evaluations after it are lower, of those from 32,000 to
         50,000 steps none.
         Pendulum-v1 (--total-timesteps 30000): above -250 for the first time at 3,000 or 4,000 steps (3 of 3 seeds);
         14 of the 80 evaluations after it are lower, mostly because one of 5 episodes fails; -101, -153, -321 after
         30,000 steps.
         Acrobot-v1 (--total-timesteps 20000): -77, -81, -104 (3 seeds), 17 minutes on one CPU core.
         The first two were run on a GPU, where 10,000 steps take 3 minutes beside nine other runs. dm_control, pictures
         and memory: benchmark/README.md.
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
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_origin, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw
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
    """DreamerV3 (Hafner et al. 2025)."""

    env_id: str = "CartPole-v1"
    """Gymnasium id, `module:Name-v0` for another package's."""
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
    """Compile the steps of the model with torch.compile, which changes nothing but speed and rounding; for GPUs."""
    eval_every: Annotated[int, 1, math.inf] = 1_000
    """Environment steps between two evaluations (greedy policy, environment of its own)."""
    eval_episodes: Annotated[int, 1, math.inf] = 5
    """Episodes of an evaluation. Where the environment has no time limit, one ends after 1,000 steps at the latest."""
    checkpoint_every: Annotated[int, 1, math.inf] = 5_000
    """Environment steps between two checkpoints."""
    run_dir: str = "runs"
    """Folder in which the run's own folder is made."""
    resume: str | None = None
    """Run folder to continue exactly where its last checkpoint was written."""
    evaluate: str | None = None
    """Run folder whose agent to evaluate, without learning; nothing but videos is added to the folder."""
    capture_video: bool = False
    """Record the first episode of each evaluation as a GIF in the run folder."""

    atari: bool = False
    """The usual wrappers of Atari games: random no-ops, 4 frames a step, grey, the last 4 pictures."""
    image_size: Annotated[int, 0, 4096] = 64
    """Side to which pictures (a Box of uint8 up to 255, 2 or 3 dimensions) are resized; 0: they stay as they are."""

    num_envs: Annotated[int, 1, 10**5] = 4
    """Environments that are played side by side (DreamerV3: 16, or 1). `total_timesteps` is rounded up to a multiple of
    it."""
    size: Literal["1m", "12m", "25m", "50m", "100m", "200m", "400m"] = "1m"
    """Widths of the networks, by their number of parameters (DreamerV3: 200m; 1m for dm_control without pictures)."""
    bf16: bool = False
    """Train in bfloat16, which GPUs and some CPUs are faster at (DreamerV3: yes)."""
    standardise: bool = True
    """Scale the numbers of observations, after symlog, to mean 0 and deviation 1 in the replay, and cut them off at 10.
    DreamerV3 does not, where small ones add next to nothing to the loss (on the cart pole it learns as well without:
    benchmark/claims)."""
    learning_starts: Annotated[int, 1, math.inf] = 1_024
    """Steps before the first update (at least as many as are in a sequence of each environment)."""
    train_ratio: Annotated[float, 0, 10**6] = 128.0
    """Steps that are replayed for each environment step (DreamerV3: 32 to 1024)."""
    batch_size: Annotated[int, 1, 10**5] = 16
    """Sequences of an update (DreamerV3: 16)."""
    batch_length: Annotated[int, 2, 10**5] = 16
    """Steps of each (DreamerV3: 64)."""
    replay_size: Annotated[int, 1, 10**10] = 100_000
    """Steps in the replay (DreamerV3: 5,000,000)."""
    replay_on_disk: bool = False
    """Keep what is observed and done in files of the run folder, and neither in memory (but the numbers now and then,
    for `standardise`) nor in checkpoints; the latent states stay in both."""
    learning_rate: Annotated[float, 1e-12, 1] = 5e-4
    """Step size of the optimizer (DreamerV3: 4e-5, for networks of up to 400 million parameters and long runs)."""
    warmup: Annotated[int, 0, math.inf] = 200
    """Updates during which the step size rises from 0 (DreamerV3: 1000, which is the choice for pictures: with 200 the
    actor had settled, in the game Catch, before the decoder showed what there was to see)."""
    horizon: Annotated[int, 1, 1000] = 15
    """Steps imagined (DreamerV3: 15)."""
    imagination_starts: Annotated[int, 1, 10**5] = 4
    """States of each sequence, the last ones, that are imagined from (DreamerV3: all of them, which also any number
    from `batch_length` on means). From all of them, imagination is more than half of the work of an update."""
    entropy_scale: Annotated[float, 0, 1000] = 3e-4
    """Weight of the policy's entropy (DreamerV3: 3e-4). With our step size the policy can settle before the model knows
    what matters; ten times more, with a `warmup` of 1,000, is what Catch and Recall of benchmark/ were learned with."""
    gamma: Annotated[float, 0, 1] = 1 - 1 / 333
    """Discount factor (DreamerV3: 1 - 1 / 333)."""

    def __post_init__(self):
        check_ranges(self)
        if self.replay_size // self.num_envs <= self.batch_length:
            raise Failure("--replay-size must hold more than one sequence of each environment")


# Settings by environment that differ from the defaults. `parse_args` uses them; what the command line says wins.
PRESETS: dict[str, dict[str, Any]] = {}


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
    if isinstance(space, gym.spaces.Dict):
        for name, part in space.items():
            check_observation(obs[name], part)
    elif isinstance(space, gym.spaces.Box):
        array = np.asarray(obs)
        fits = array.shape == space.shape and np.can_cast(array.dtype, space.dtype, "same_kind")
        if not fits or not (np.abs(array.astype(float)) < 1e15).all():  # NaN is not, either
            wanted = f"an array of shape {space.shape} and type {space.dtype}, of numbers below 1e15"
            raise ValueError(f"observation {obs!r} is not {wanted}")
    elif not space.contains(obs):
        raise ValueError(f"observation {obs!r} is not in {space}")


def check_spaces(observation_space: gym.Space, action_space: gym.Space) -> None:
    """Raises Failure for spaces that this script does not handle."""
    parts = observation_space.values() if isinstance(observation_space, gym.spaces.Dict) else [observation_space]
    known = (gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary)
    if unknown := [part for part in parts if not isinstance(part, known)]:
        raise Failure(
            f"observations must be Box, Discrete, MultiDiscrete, MultiBinary or a Dict of them, not {unknown[0]}; "
            "Tuple: dyna_q.py"
        )
    box = isinstance(action_space, gym.spaces.Box) and np.issubdtype(action_space.dtype, np.floating)
    if not (box and action_space.is_bounded()) and not isinstance(action_space, gym.spaces.Discrete):
        raise Failure(f"actions must be Discrete or a bounded Box of floating-point numbers, not {action_space}")


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


Array = np.ndarray


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------
def symlog(x: Tensor) -> Tensor:
    """sign(x) log(|x| + 1): large numbers small, small ones as they are."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """The inverse of symlog."""
    return x.sign() * x.abs().expm1()


def make_bins(count: int = 255) -> Tensor:
    """Values of the two-hot distribution: symexp of equal steps from -20 to 20, exactly symmetric around 0."""
    half = symexp(torch.linspace(-20, 0, count // 2 + 1))
    return torch.cat([half, -half[:-1].flip(0)])


def two_hot_loss(log_prob: Tensor, target: Tensor, bins: Tensor) -> Tensor:
    """Cross-entropy (...) of log-probabilities (..., bins) to targets (...), each on the two bins beside it."""
    above = torch.searchsorted(bins, target.contiguous()).clamp(max=len(bins) - 1)  # the first bin that is not below it
    below = (above - (bins[above] > target).long()).clamp(min=0)
    beside = torch.stack([below, above], -1)  # (..., 2), of which each counts by the distance to the other
    distance = (bins[beside] - target[..., None]).abs().flip(-1)
    weight = torch.where((below == above)[..., None], 0.5, distance / distance.sum(-1, keepdim=True))
    return -(weight * log_prob.gather(-1, beside)).sum(-1)


def two_hot_mean(logits: Tensor, bins: Tensor) -> Tensor:
    """Expectation (...). The bins are symmetric around 0: each size counts by how much more probable it is above 0 than
    below, so that equal logits give exactly 0."""
    prob, middle = logits.float().softmax(-1), len(bins) // 2
    with torch.autocast(logits.device.type, enabled=False):  # `--bf16` would round returns of 100 to whole numbers
        return (prob[..., middle + 1 :] - prob[..., :middle].flip(-1)) @ bins[middle + 1 :]


def unimix(logits: Tensor, share: float = 0.01) -> Tensor:
    """Log-probabilities of a mixture with 1 % of the uniform distribution, so that none is ever 0."""
    logits = logits.float()
    exp = (logits - logits.detach().amax(-1, keepdim=True)).exp()  # PyTorch's softmax is slow for 4 classes on a CPU
    return ((1 - share) * exp / exp.sum(-1, keepdim=True) + share / logits.shape[-1]).log()


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise. It is drawn for many steps at once, so that a step is a function of tensors alone."""
    return -(-torch.rand(shape, generator=generator, device=generator.device).clamp(min=1e-20).log()).log()


def sample_onehot(log_prob: Tensor, noise: Tensor) -> Tensor:
    """One-hot samples by the Gumbel-max trick."""
    return F.one_hot((log_prob + noise).argmax(-1), log_prob.shape[-1]).to(log_prob.dtype)


def straight_through(sample: Tensor, log_prob: Tensor) -> Tensor:
    """The sample, with the gradient of the probabilities."""
    prob = log_prob.exp()
    return sample + (prob - prob.detach())


def stacked(steps: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """What each step has, (B, ...), over all of them: (B, T, ...)."""
    return [torch.stack(parts, 1) for parts in zip(*steps, strict=True)]


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL divergence (...) of latents (..., stoch, classes), summed over them."""
    return (log_p.exp() * (log_p - log_q)).sum((-2, -1))


def lambda_return(
    last: Tensor, terminal: Tensor, reward: Tensor, bootstrap: Tensor, gamma: float, lam: float = 0.95
) -> Tensor:
    """(B, T) each -> (B, T - 1): R[t] = r[t+1] + gamma * c[t+1] * ((1 - lam) * v[t+1] + lam * R[t+1]), where c is 1 -
    terminal, v is `bootstrap`, and R[T-1] = v[T-1]. Where an episode is broken off (`last`), lam is 0: what comes after
    is not its future. The index of a reward is that of the observation it comes with, not of the action."""
    live, mix = gamma * (1 - terminal[:, 1:]), lam * (1 - last[:, 1:])
    interim, returns = reward[:, 1:] + (1 - mix) * live * bootstrap[:, 1:], [bootstrap[:, -1]]
    for t in reversed(range(interim.shape[1])):
        returns.append(interim[:, t] + live[:, t] * mix[:, t] * returns[-1])
    return torch.stack(returns[:0:-1], dim=1)


class LaProp(torch.optim.Optimizer):
    """LaProp (Ziyin et al. 2020) behind adaptive gradient clipping (Brock et al. 2021): the gradient of each tensor is
    not longer than `agc` times the tensor (a length of 1e-3 at least); it is divided by its root mean square,
    then averaged. The step size rises linearly from 0 during `warmup` updates."""

    beta1, beta2, eps = 0.9, 0.999, 1e-20

    def __init__(self, parameters: list[nn.Parameter], lr: float, warmup: int, agc: float = 0.3):
        super().__init__(parameters, {"lr": lr})
        self.agc, self.warmup = agc, warmup
        for parameter in parameters:
            self.state[parameter] = {"nu": torch.zeros_like(parameter), "mu": torch.zeros_like(parameter)}
        self.done = torch.zeros((), device=parameters[0].device)  # steps; what a GPU records has no plain numbers

    @torch.no_grad()
    def step(self) -> None:
        """Updates all parameters; each needs a gradient."""
        (group,) = self.param_groups
        parameters = group["params"]
        gradients = [parameter.grad for parameter in parameters]
        nu, mu = ([self.state[parameter][name] for parameter in parameters] for name in ("nu", "mu"))
        norm = torch.stack(torch._foreach_norm(gradients))
        limit = self.agc * torch.stack(torch._foreach_norm(parameters)).clamp(min=1e-3)
        gradients = torch._foreach_mul(gradients, list((1 / (norm / limit).clamp(min=1)).unbind()))

        rate = group["lr"] * ((self.done / self.warmup).clamp(max=1) if self.warmup else 1.0)
        self.done += 1
        correction1, correction2 = (-torch.expm1(self.done * math.log(beta)) for beta in (self.beta1, self.beta2))
        torch._foreach_mul_(nu, self.beta2)
        torch._foreach_addcmul_(nu, gradients, gradients, 1 - self.beta2)
        scale = torch._foreach_div(nu, correction2)  # 1 - beta2 ** done: nu is 0 at first
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, self.eps)
        torch._foreach_div_(gradients, scale)
        torch._foreach_lerp_(mu, gradients, 1 - self.beta1)
        torch._foreach_add_(parameters, torch._foreach_mul(mu, -rate / correction1))


class Size(NamedTuple):
    """Widths of the networks. In the sizes of the authors all follow from the first one."""

    deter: int  # deterministic state
    hidden: int  # layers of the state's dynamics
    classes: int  # of each of the `stoch` categorical latents
    depth: int  # the convolutions have 2, 3, 4 and 4 times as many channels
    units: int  # layers of encoder, decoder and heads
    stoch: int = 32
    blocks: int = 8  # of the recurrent weights


DETER = {"1m": 512, "12m": 2048, "25m": 3072, "50m": 4096, "100m": 6144, "200m": 8192, "400m": 12288}
SIZES = {name: Size(deter, deter // 8, deter // 128, deter // 128, deter // 8) for name, deter in DETER.items()}


def initialise(weight: Tensor, fan_in: int, scale: float, generator: torch.Generator) -> Tensor:
    """Normal, cut at two standard deviations, of variance scale^2 / fan_in after the cut."""
    if scale:
        std = 1.1368 * scale / math.sqrt(fan_in)
        return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
    return nn.init.zeros_(weight)


def linear(fan_in: int, fan_out: int, generator: torch.Generator, scale: float = 1.0) -> nn.Linear:
    """A layer with our initial values."""
    layer = nn.Linear(fan_in, fan_out, device=generator.device)
    initialise(layer.weight.data, fan_in, scale, generator)
    nn.init.zeros_(layer.bias)
    return layer


class NormSiLU(nn.Module):
    """Root-mean-square normalisation of the last dimension, in single precision, and then SiLU."""

    def __init__(self, size: int, device: torch.device):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(F.rms_norm(x.float(), self.scale.shape, self.scale, 1e-4)).to(x.dtype)


def blocked(x: Tensor, blocks: int) -> Tensor:
    """(B, n) -> (blocks, B, n / blocks)."""
    return x.view(len(x), blocks, -1).transpose(0, 1)


class BlockLinear(nn.Module):
    """A linear layer of `blocks` blocks that do not see each other."""

    def __init__(self, fan_in: int, fan_out: int, blocks: int, generator: torch.Generator):
        super().__init__()
        weight = torch.empty(blocks, fan_in // blocks, fan_out // blocks, device=generator.device)
        self.weight = nn.Parameter(initialise(weight, fan_in, 1.0, generator))  # the fan-in is that of all blocks
        self.bias = nn.Parameter(torch.zeros(blocks, 1, fan_out // blocks, device=generator.device))

    def forward(self, x: Tensor) -> Tensor:
        """x (blocks, B, in / blocks) -> (blocks, B, out / blocks)."""
        return torch.baddbmm(self.bias, x, self.weight)


def mlp(fan_in: int, units: int, layers: int, generator: torch.Generator) -> nn.Sequential:
    """`layers` layers, each with NormSiLU: (..., fan_in) -> (..., units)."""
    sizes = [fan_in] + layers * [units]
    parts = [(linear(*pair, generator), NormSiLU(units, generator.device)) for pair in itertools.pairwise(sizes)]
    return nn.Sequential(*itertools.chain(*parts))


def head(fan_in: int, out: int, units: int, layers: int, scale: float, generator: torch.Generator) -> nn.Sequential:
    """An MLP with a last layer whose initial weights are scaled."""
    return nn.Sequential(*mlp(fan_in, units, layers, generator), linear(units, out, generator, scale))


class Latent(NamedTuple):
    """A state of the model: deterministic part (..., deter), samples (..., stoch, classes)."""

    deter: Tensor
    stoch: Tensor

    def feature(self) -> Tensor:
        """What the heads see, (..., stoch * classes + deter)."""
        return torch.cat([self.stoch.flatten(-2), self.deter], -1)


class RSSM(nn.Module):
    """Recurrent state-space model: what the state becomes after an action, before (prior) and after (posterior) it is
    known what was observed."""

    def __init__(self, tokens: int, actions: int, size: Size, generator: torch.Generator):
        super().__init__()
        self.size, hidden, latents = size, size.hidden, size.stoch * size.classes
        self.inputs = nn.ModuleList(mlp(width, hidden, 1, generator) for width in (size.deter, latents, actions))
        self.dynamics = BlockLinear(size.deter + 3 * hidden * size.blocks, size.deter, size.blocks, generator)
        self.norm = NormSiLU(size.deter, generator.device)
        self.gates = BlockLinear(size.deter, 3 * size.deter, size.blocks, generator)
        self.posterior = head(size.deter + tokens, latents, hidden, 1, 1.0, generator)
        self.prior = head(size.deter, latents, hidden, 2, 1.0, generator)

    def initial(self, count: int) -> Latent:
        """The state before an episode: zeros."""
        size, like = self.size, self.norm.scale
        return Latent(like.new_zeros(count, size.deter), like.new_zeros(count, size.stoch, size.classes))

    def core(self, latent: Latent, action: Tensor) -> Tensor:
        """The deterministic part after an action (B, A)."""
        blocks, action = self.size.blocks, action / action.abs().clamp(min=1).detach()
        inputs = (latent.deter, latent.stoch.flatten(1), action)
        x = torch.cat([layer(x) for layer, x in zip(self.inputs, inputs, strict=True)], -1)  # (B, 3 * hidden)
        x = torch.cat([blocked(latent.deter, blocks), x.expand(blocks, -1, -1)], -1)
        x = self.norm(self.dynamics(x).transpose(0, 1).flatten(1))
        # (3, B, deter): the functions of gates that are contiguous are faster on a CPU.
        reset, cand, update = self.gates(blocked(x, blocks)).unflatten(-1, (3, -1)).permute(2, 1, 0, 3).flatten(2)
        cand, update = (reset.sigmoid() * cand).tanh(), (update - 1).sigmoid()
        return update * cand + (1 - update) * latent.deter

    def noise(self, *lead: int, generator: torch.Generator) -> Tensor:
        """What draws latents, (..., stoch, classes)."""
        return gumbel((*lead, self.size.stoch, self.size.classes), generator)

    def log_probs(self, found: Tensor) -> Tensor:
        """Logits (..., stoch * classes) -> log-probabilities (..., stoch, classes)."""
        return unimix(found.unflatten(-1, (self.size.stoch, self.size.classes)))

    def observe_step(
        self, latent: Latent, action: Tensor, first: Tensor, tokens: Tensor, noise: Tensor
    ) -> tuple[Latent, Tensor]:
        """The state after the previous action (B, A) and the new observation's tokens (B, E), and its posterior (B,
        stoch, classes), from which `noise`, of that shape, draws. Where an episode begins (`first`, (B,)), state and
        action before it are zero. Gradients go straight through the sample, here; imagination has none."""
        keep = (~first).to(latent.deter.dtype)[:, None]
        latent = Latent(latent.deter * keep, latent.stoch * keep[..., None])
        deter = self.core(latent, action * keep)
        posterior = self.log_probs(self.posterior(torch.cat([deter, tokens], -1)))
        return Latent(deter, straight_through(sample_onehot(posterior.detach(), noise), posterior)), posterior

    def observe(
        self, latent: Latent, action: Tensor, first: Tensor, tokens: Tensor, generator: torch.Generator
    ) -> tuple[Latent, Tensor]:
        """The same for sequences: action (B, T, A), of which [t] is the one before observation [t]."""
        steps, noise = [], self.noise(*first.shape, generator=generator)
        for t in range(action.shape[1]):
            latent, posterior = self.observe_step(latent, action[:, t], first[:, t], tokens[:, t], noise[:, t])
            steps.append((*latent, posterior))
        deter, stoch, posterior = stacked(steps)
        return Latent(deter, stoch), posterior

    def imagine_step(self, latent: Latent, action: Tensor, noise: Tensor) -> Latent:
        """The state after an action, as the prior has it."""
        deter = self.core(latent, action)
        return Latent(deter, sample_onehot(self.log_probs(self.prior(deter)), noise))


class Convolution(nn.Module):
    """5 x 5, same size; normalised over channels unless it is the last one. Pictures are (B, C, H, W)."""

    def __init__(self, fan_in: int, fan_out: int, pool: bool, last: bool, generator: torch.Generator):
        super().__init__()
        self.conv = nn.Conv2d(fan_in, fan_out, 5, padding=2, device=generator.device)
        initialise(self.conv.weight.data, 25 * fan_in, 1.0, generator)
        nn.init.zeros_(self.conv.bias)
        self.pool, self.norm = pool, None if last else NormSiLU(fan_out, generator.device)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = F.max_pool2d(x, 2) if self.pool else x
        return x if self.norm is None else self.norm(x.movedim(1, -1)).movedim(-1, 1)


class Shapes(NamedTuple):
    """What an environment's observations and actions are made of."""

    vector: int  # numbers, 0: none
    image: tuple[int, int, int] | None  # height, width, channels
    action: int  # numbers or, if discrete, choices
    discrete: bool

    def depths(self, size: Size) -> list[int]:
        """Channels after each halving of an image: 2, 3, 4 and 4 times `depth` for one of 64 x 64."""
        stages = halvings(self.image[:2])
        return [size.depth * factor for factor in (*[2] * (stages - 4), 2, 3, 4, 4)[-stages:]]


def halvings(sides: tuple[int, ...]) -> int:
    """How often a picture (height, width) is halved, until its smaller side is about 4."""
    return max(1, round(math.log2(min(sides) / 4)))


class Encoder(nn.Module):
    """Observations to tokens."""

    def __init__(self, shapes: Shapes, size: Size, generator: torch.Generator):
        super().__init__()
        self.width = 0
        if shapes.vector:
            self.vector, self.width = mlp(shapes.vector, size.units, 3, generator), size.units
        if shapes.image:
            height, width, channels = shapes.image
            depths = shapes.depths(size)
            pairs = itertools.pairwise([channels, *depths])
            self.image = nn.Sequential(*(Convolution(*pair, True, False, generator) for pair in pairs))
            self.width += depths[-1] * (height >> len(depths)) * (width >> len(depths))

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        """vector (..., V), image (..., H, W, C) of bytes -> (..., width)."""
        found = []
        if "vector" in obs:
            found.append(self.vector(obs["vector"]))
        if "image" in obs:
            image = obs["image"].flatten(0, -4).movedim(-1, 1).float() / 255 - 0.5
            found.append(self.image(image).flatten(1).unflatten(0, obs["image"].shape[:-3]))
        return torch.cat(found, -1)


class Decoder(nn.Module):
    """Latent states to observations."""

    def __init__(self, shapes: Shapes, size: Size, generator: torch.Generator):
        super().__init__()
        latents = size.stoch * size.classes
        if shapes.vector:
            self.vector = head(latents + size.deter, shapes.vector, size.units, 3, 1.0, generator)
        if shapes.image:
            height, width, channels = shapes.image
            *depths, deepest = shapes.depths(size)
            self.smallest = (deepest, height >> (len(depths) + 1), width >> (len(depths) + 1))
            self.from_deter = BlockLinear(size.deter, math.prod(self.smallest), size.blocks, generator)
            self.from_stoch = head(latents, math.prod(self.smallest), 2 * size.units, 1, 1.0, generator)
            self.norm = NormSiLU(deepest, generator.device)
            pairs = itertools.pairwise([deepest, *reversed(depths), channels])
            self.image = nn.ModuleList(
                Convolution(*pair, False, index == len(depths), generator) for index, pair in enumerate(pairs)
            )

    def forward(self, latent: Latent) -> dict[str, Tensor]:
        """vector (..., V) and image (..., H, W, C), 0 to 1."""
        found = {}
        if hasattr(self, "vector"):
            found["vector"] = self.vector(latent.feature())
        if hasattr(self, "image"):
            deter, stoch = latent.deter.flatten(0, -2), latent.stoch.flatten(-2).flatten(0, -2)
            blocks, (channels, height, width) = len(self.from_deter.weight), self.smallest
            spread = self.from_deter(blocked(deter, blocks)).view(blocks, -1, height, width, channels // blocks)
            spread = spread.permute(1, 2, 3, 0, 4).flatten(3)  # each block has channels of its own
            x = self.norm(spread + self.from_stoch(stoch).view(-1, height, width, channels)).movedim(-1, 1)
            for layer in self.image:
                x = layer(F.interpolate(x, scale_factor=2))
            found["image"] = x.sigmoid().movedim(1, -1).unflatten(0, latent.deter.shape[:-1])
        return found


class Policy(NamedTuple):
    """Distribution of actions: log-probabilities of a Discrete space, else mean and standard deviation."""

    log_prob: Tensor | None
    mean: Tensor | None = None
    std: Tensor | None = None

    def sample(self, generator: torch.Generator) -> Tensor:
        """(..., A), one-hot if discrete."""
        if self.log_prob is not None:
            return sample_onehot(self.log_prob, gumbel(self.log_prob.shape, generator))
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """The most likely action."""
        if self.log_prob is not None:
            return F.one_hot(self.log_prob.argmax(-1), self.log_prob.shape[-1]).float()
        return self.mean

    def log_density(self, action: Tensor) -> Tensor:
        """Of actions (..., A), (...)."""
        if self.log_prob is not None:
            return (self.log_prob * action).sum(-1)
        z = (action - self.mean) / self.std
        return (-0.5 * z**2 - self.std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """(...)."""
        if self.log_prob is not None:
            return -(self.log_prob.exp() * self.log_prob).sum(-1)
        return (self.std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def make_policy(found: Tensor, discrete: bool) -> Policy:
    """The distribution from what the actor's network gives."""
    if discrete:
        return Policy(unimix(found))
    mean, std = found.float().chunk(2, dim=-1)
    return Policy(None, mean.tanh(), 0.9 * (std + 2).sigmoid() + 0.1)


class Networks(nn.Module):
    """All that is trained."""

    def __init__(self, shapes: Shapes, size: Size, generator: torch.Generator):
        super().__init__()
        self.discrete, feature, units = shapes.discrete, size.deter + size.stoch * size.classes, size.units
        self.register_buffer("bins", bins := make_bins().to(generator.device), persistent=False)
        self.encoder = Encoder(shapes, size, generator)
        self.rssm = RSSM(self.encoder.width, shapes.action, size, generator)
        self.decoder = Decoder(shapes, size, generator)
        self.reward = head(feature, len(bins), units, 1, 0.0, generator)
        self.con = head(feature, 1, units, 1, 1.0, generator)
        self.actor = head(feature, shapes.action * (1 if self.discrete else 2), units, 3, 0.01, generator)
        self.critic = head(feature, len(bins), units, 3, 0.0, generator)


# ---------------------------------------------------------------------------------------------------------------------
# Buffer
# ---------------------------------------------------------------------------------------------------------------------
class Replay:
    """The latest steps of each environment as one stream over its episodes: observation, the reward that came with it,
    is_first, is_last, is_terminal, the action that was chosen there (0 at the end), and the latent state.

    Sequences begin anywhere, uniformly; each new chunk of `length` steps is also served once, soon after it was added.
    With a `folder`, what does not change any more is in files there. `spare` rows more than the capacity are kept, in
    which no sequence begins, so that a run that goes back to its last checkpoint finds what was there then.
    """

    def __init__(
        self, shapes: Shapes, size: Size, streams: int, capacity: int, length: int, spare: int, folder: Path | None
    ):
        self.capacity, self.length, self.folder, rows = capacity, length, folder, capacity + spare
        fixed = {"action": ((shapes.action,), np.float32), "reward": ((), np.float32)}
        fixed |= {name: ((), np.bool_) for name in ("is_first", "is_last", "is_terminal")}
        if shapes.vector:
            fixed["vector"] = ((shapes.vector,), np.float32)
        if shapes.image:
            fixed["image"] = (shapes.image, np.uint8)
        self.fixed = {name: self.make(name, (streams, rows, *shape), dtype) for name, (shape, dtype) in fixed.items()}
        rows = self.fixed["action"].shape[1]  # of files that were there
        self.deter = np.zeros((streams, rows, size.deter), np.float32)
        self.stoch = np.zeros((streams, rows, size.stoch), np.int16)  # which class
        self.saved = {"deter": self.deter, "stoch": self.stoch} | ({} if folder else self.fixed)  # in checkpoints
        self.added = np.zeros(streams, np.int64)
        self.fresh: list[tuple[int, int]] = []  # stream and first row of sequences to be served once

    def make(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array of zeros, in memory or in a file."""
        if self.folder is None:
            return np.zeros(shape, dtype)
        path = self.folder / f"{name}.npy"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            found = np.lib.format.open_memmap(path, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):  # a full disk is to be told now: later it would kill the process
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            return found
        try:
            found = np.lib.format.open_memmap(path, "r+")
        except ValueError as error:
            raise Failure(f"{path} is damaged: {error}") from error
        if found.shape[1] < shape[1]:
            raise Failure(f"{path} has no room for checkpoints that far apart; --checkpoint-every must not grow")
        return found

    def add(self, stream: int, deter: Array, stoch: Array, **row: Any) -> None:
        """Appends a step to a stream."""
        at = self.added[stream] % self.deter.shape[1]
        for name, column in self.fixed.items():
            column[stream, at] = row[name]
        self.deter[stream, at], self.stoch[stream, at] = deter, stoch
        self.added[stream] += 1
        if self.added[stream] % self.length == 0:
            self.fresh.append((stream, int(self.added[stream] - self.length)))
            # With few updates: what is older than the replay.
            del self.fresh[: -(len(self.added) * self.capacity // self.length + 1)]

    def starts(self) -> Array:
        """How many sequences each stream has, (streams,)."""
        return np.maximum(np.minimum(self.added, self.capacity) - self.length + 1, 0)

    def sample(
        self, count: int, rng: np.random.Generator, serve: bool = True
    ) -> tuple[tuple[Array, Array], dict[str, Array]]:
        """Where they are, (count, 1) and (count, length), and sequences (count, length, ...); without `serve`, new ones
        are left for later."""
        starts = self.starts()
        stream = rng.choice(len(starts), size=count, p=starts / starts.sum())
        first = (self.added - self.length)[stream] - (rng.random(count) * starts[stream]).astype(np.int64)
        served, self.fresh = (self.fresh[:count], self.fresh[count:]) if serve else ([], self.fresh)
        for index, (fresh_stream, fresh_first) in enumerate(served):
            if fresh_first >= self.added[fresh_stream] - self.capacity:
                stream[index], first[index] = fresh_stream, fresh_first
        where = stream[:, None], (first[:, None] + np.arange(self.length)) % self.deter.shape[1]
        columns = {name: column[where] for name, column in self.fixed.items()}
        return where, columns | {"deter": self.deter[where], "stoch": self.stoch[where]}

    def latest(self, name: str) -> Array:
        """A column (steps, ...) of all steps that sequences are drawn from, environment after environment."""
        streams = zip(self.fixed[name], self.added, strict=True)
        return np.concatenate(
            [column[np.arange(max(0, added - self.capacity), added) % len(column)] for column, added in streams]
        )

    def refresh(self, where: tuple[Array, Array], deter: Array, stoch: Array) -> None:
        """Puts new latent states there."""
        self.deter[where], self.stoch[where] = deter, stoch

    def state_dict(self) -> dict:
        if self.folder:
            for column in self.fixed.values():
                column.flush()
        used = min(int(self.added.max()), self.deter.shape[1])
        state = {name: torch.from_numpy(column[:, :used].copy()) for name, column in self.saved.items()}
        return state | {"added": self.added.tolist(), "fresh": self.fresh}

    def load_state_dict(self, state: dict) -> None:
        self.added[:], self.fresh = state["added"], list(state["fresh"])
        for name in self.saved.keys() & state.keys():  # to act, an agent does without what is in files
            self.saved[name][:, : state[name].shape[1]] = state[name].numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Planner
# ---------------------------------------------------------------------------------------------------------------------
# There is no search: what an actor has learned in imagination takes its place. All losses are here.
# dyn: the prior follows the posterior; rep: the posterior follows the prior; con: whether the episode continues; policy
# and value: in imagination; repval: the value on real steps; and one for each part of the observation.
LOSS_SCALES = {"rep": 0.1, "repval": 0.3}  # of the others 1


def imagine(nets: Networks, state: Latent, horizon: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Acts H steps in the model from N states: what the heads see there (N, H + 1, ...), and the log densities and
    entropies of the actions (N, H). Nothing of it has a gradient with respect to the world model."""
    features, chosen = [state.feature()], []
    for noise in nets.rssm.noise(horizon, len(state.deter), generator=generator):
        policy = make_policy(nets.actor(features[-1]), nets.discrete)
        with torch.no_grad():
            state = nets.rssm.imagine_step(state, action := policy.sample(generator), noise)
        features.append(state.feature())
        chosen.append((policy.log_density(action), policy.entropy()))
    return torch.stack(features, 1), *stacked(chosen)


class Percentiles:
    """The range of returns: exponential moving averages of their 5th and 95th percentiles, which begin at 0 and are not
    bias-corrected."""

    def __init__(self, device: torch.device):
        self.low, self.high = torch.zeros((), device=device), torch.zeros((), device=device)

    def update(self, returns: Tensor, rate: float = 0.01) -> Tensor:
        """Takes in returns, then gives the scale, at least 1."""
        returns = returns.detach().float().flatten()
        for percentile, share in ((self.low, 0.05), (self.high, 0.95)):
            percentile.lerp_(torch.quantile(returns, share), rate)
        return (self.high - self.low).clamp(min=1)


def critic_loss(value: Tensor, slow_value: Tensor, returns: Tensor, bins: Tensor) -> Tensor:
    """Logits of values (N, T + 1, bins) against returns (N, T), and against the mean of the slow critic: (N, T)."""
    log_prob, slow = value[:, :-1].float().log_softmax(-1), two_hot_mean(slow_value, bins)[:, :-1]
    return two_hot_loss(log_prob, returns.detach(), bins) + two_hot_loss(log_prob, slow, bins)


def imagination_loss(
    reward: Tensor,
    con: Tensor,
    log_density: Tensor,
    entropy: Tensor,
    value: Tensor,
    slow_value: Tensor,
    bins: Tensor,
    percentiles: Percentiles,
    entropy_scale: float = 3e-4,
) -> tuple[Tensor, Tensor, Tensor]:
    """Actor and critic on N imagined sequences of H + 1 states: rewards that came with them and probabilities of going
    on (N, H + 1), log densities and entropies of the actions (N, H), logits of the values (N, H + 1, bins), for the
    slow critic too. Returns the losses of policy and value (N, H), and the lambda-returns (N, H)."""
    val = two_hot_mean(value.detach(), bins)
    weight = con.cumprod(1)[:, :-1]  # the head was trained on gamma * (1 - terminal): the discount is in con
    returns = lambda_return(torch.zeros_like(con), 1 - con, reward, val, 1.0)
    advantage = (returns - val[:, :-1]) / percentiles.update(returns)
    policy_loss = -weight * (log_density * advantage + entropy_scale * entropy)
    return policy_loss, weight * critic_loss(value, slow_value, returns, bins), returns


def replay_value_loss(
    last: Tensor,
    terminal: Tensor,
    reward: Tensor,
    bootstrap: Tensor,
    value: Tensor,
    slow_value: Tensor,
    bins: Tensor,
    gamma: float,
) -> Tensor:
    """The critic on real sequences, (B, T) -> (B, T - 1); `bootstrap`: each state's imagined return, or its value."""
    returns = lambda_return(last, terminal, reward, bootstrap, gamma)
    return (1 - last[:, :-1]) * critic_loss(value, slow_value, returns, bins)


def dreamer_loss(
    nets: Networks,
    slow_critic: nn.Module,
    batch: dict[str, Tensor],
    start: Latent,
    percentiles: Percentiles,
    generator: torch.Generator,
    horizon: int,
    imagination_starts: int,
    gamma: float,
    entropy_scale: float = 3e-4,
) -> tuple[dict[str, Tensor], Latent, dict[str, Tensor]]:
    """World model, actor and critic. `batch`, (B, T, ...): vector, image; prev_action: the action before each
    observation; reward: that came with it; is_first, is_last, is_terminal. The last states of each sequence are
    imagined from. Returns the losses, the posterior states and what else to log."""
    losses = {}
    latent, post = nets.rssm.observe(start, batch["prev_action"], batch["is_first"], nets.encoder(batch), generator)
    prior, feature = nets.rssm.log_probs(nets.rssm.prior(latent.deter)), latent.feature()
    losses["dyn"] = kl(post.detach(), prior).clamp(min=1)  # free nats
    losses["rep"] = kl(post, prior.detach()).clamp(min=1)
    losses["reward"] = two_hot_loss(nets.reward(feature).float().log_softmax(-1), batch["reward"], nets.bins)
    terminal, last = batch["is_terminal"].float(), batch["is_last"].float()
    con_logit = nets.con(feature).squeeze(-1).float()
    losses["con"] = F.binary_cross_entropy_with_logits(con_logit, (1 - terminal) * gamma, reduction="none")
    for name, found in nets.decoder(latent).items():
        target = batch[name].float() / 255 if name == "image" else batch[name]
        losses[name] = ((found - target) ** 2).flatten(2).sum(2)

    state = Latent(*(part[:, -imagination_starts:].detach().flatten(0, 1) for part in latent))
    imagined, log_density, entropy = imagine(nets, state, horizon, generator)
    with torch.no_grad():
        reward, con = two_hot_mean(nets.reward(imagined), nets.bins), nets.con(imagined).squeeze(-1).float().sigmoid()
        slow_imagined, slow_real = slow_critic(imagined), slow_critic(feature)
    losses["policy"], losses["value"], returns = imagination_loss(
        reward, con, log_density, entropy, nets.critic(imagined), slow_imagined, nets.bins, percentiles, entropy_scale
    )
    value = nets.critic(feature)  # not detached: this loss trains the world model, too
    with torch.no_grad():
        bootstrap = two_hot_mean(value, nets.bins)  # its value; of states imagined from, the imagined return
        bootstrap[:, -imagination_starts:] = returns[:, 0].view(len(last), -1)
    losses["repval"] = replay_value_loss(last, terminal, batch["reward"], bootstrap, value, slow_real, nets.bins, gamma)
    logs = {
        "model/posterior_entropy": -(post.exp() * post).sum((-2, -1)).mean(),
        "model/prior_entropy": -(prior.exp() * prior).sum((-2, -1)).mean(),
        "planner/imagined_return": returns.mean(),
        "planner/imagined_reward": reward[:, 1:].mean(),
        "losses/entropy": entropy.mean(),
    }
    return {name: loss.mean() for name, loss in losses.items()}, latent, logs


# ---------------------------------------------------------------------------------------------------------------------
# Agent
# ---------------------------------------------------------------------------------------------------------------------
def is_picture(space: gym.Space) -> bool:
    """Whether a space holds pictures: a Box of uint8 up to 255, (height, width) or (height, width, channels)."""
    box = isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and len(space.shape) > 1
    if not box or space.high.max() < 255:
        return False
    first, second, last = (*space.shape, 1, 1)[:3]
    if len(space.shape) > 3 or first <= 4 < last or first < second == last:  # the last two: channels come first
        raise Failure(f"pictures must be (height, width) or (height, width, channels), not {space.shape}")
    return True


class Observer:
    """Turns observations of a space into what the networks see: one vector, in which the numbers of a Box are passed
    through symlog and choices are one-hot, and one picture of bytes, resized to `image_size` where that is above 0."""

    def __init__(self, space: gym.Space, image_size: int):
        self.space, self.image_size = space, image_size
        vector, image = self.parts(space, space.sample())
        self.vector = sum(len(part) for part in vector)
        self.numbers = np.array([part.dtype != bool for part in vector for _ in part], bool)  # not choices
        if len({part.shape[:2] for part in image}) > 1:
            raise Failure("pictures of an observation that are not of one size need an --image-size above 0")
        self.image = np.concatenate(image, axis=-1).shape if image else None
        if not self.vector and not self.image:
            raise Failure(f"observations of {space} hold nothing")
        sides = self.image[:2] if self.image else ()
        if sides and (min(sides) < 8 or any(side % 2 ** halvings(sides) for side in sides)):
            raise Failure(f"pictures of {sides} cannot be halved down to 4 x 4; take an --image-size of 8, 16, ...")

    def parts(self, space: gym.Space, obs: Any) -> tuple[list[Array], list[Array]]:
        """The vectors and the pictures that an observation is made of."""
        if isinstance(space, gym.spaces.Dict):
            found = [self.parts(part, obs[name]) for name, part in space.items()]
            return [part for vector, _ in found for part in vector], [part for _, image in found for part in image]
        if is_picture(space):
            image, sides = np.asarray(obs).reshape(*space.shape[:2], -1), (self.image_size, self.image_size)
            if self.image_size and image.shape[:2] != sides:
                pictures = torch.from_numpy(image.copy()).movedim(-1, 0)[None].float()
                pictures = F.interpolate(pictures, sides, mode="area")
                image = pictures[0].movedim(0, -1).round().byte().numpy()
            return [], [image]
        if isinstance(space, gym.spaces.Box):
            values = np.asarray(obs, np.float64).reshape(-1)
            return [(np.sign(values) * np.log1p(np.abs(values))).astype(np.float32)], []
        return [np.asarray(gym.spaces.flatten(space, obs), bool).reshape(-1)], []

    def __call__(self, obs: Any) -> dict[str, Array]:
        vector, image = self.parts(self.space, obs)
        found = {"vector": np.concatenate(vector).astype(np.float32)} if vector else {}
        return found | ({"image": np.concatenate(image, axis=-1)} if image else {})


def draw_curves(truth: Array, predicted: Array, half: int, height: int = 48, width: int = 8) -> Image.Image:
    """Numbers (T, V) over time, one panel each, up to 16 of them; a grey line where the model sees no more."""
    panels = np.stack([truth, predicted]).transpose(2, 0, 1)[:16]  # (V, 2, T)
    picture = Image.new("RGB", (width * len(truth), height * len(panels)), "white")
    draw = ImageDraw.Draw(picture)
    draw.line([(width * half, 0), (width * half, height * len(panels))], "lightgrey")
    for panel, curves in enumerate(panels):
        low, scale = curves.min(), (height - 4) / max(np.ptp(curves), 1e-6)
        for curve, colour in zip(curves, ("black", "red"), strict=True):
            points = [(width * t, height * (panel + 1) - 2 - scale * float(y - low)) for t, y in enumerate(curve)]
            draw.line(points, colour)
    return picture


class Recorded:
    """A function of named tensors which a GPU does as one CUDA graph: launched one by one, its thousands of small
    operations would keep the GPU waiting. Elsewhere it is the function itself.

    What else it reads or changes must be tensors that stay where they are, and its random numbers the generator's.
    """

    def __init__(self, function: Callable[[dict[str, Tensor]], dict[str, Tensor]], generator: torch.Generator):
        self.function, self.generator, self.calls, self.graphs = function, generator, {}, {}

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.generator.device.type != "cuda":
            return self.function(inputs)
        # Contiguous, so that compiled code sees one layout: a recompilation while a graph is recorded would fail.
        inputs = {name: part.contiguous() for name, part in inputs.items()}
        shapes = tuple(part.shape for part in inputs.values())
        self.calls[shapes] = self.calls.get(shapes, 0) + 1
        if self.calls[shapes] <= 3:  # first without: this makes all that is made once, as compiled code
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                found = self.function(inputs)
            torch.cuda.current_stream().wait_stream(side)
            return found
        if shapes not in self.graphs:
            graph, kept = torch.cuda.CUDAGraph(), {name: part.clone() for name, part in inputs.items()}
            graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph):
                found = self.function(kept)
            self.graphs[shapes] = graph, kept, found
        graph, kept, found = self.graphs[shapes]
        for name, part in kept.items():
            part.copy_(inputs[name])
        graph.replay()
        return {name: part.clone() for name, part in found.items()}


class Agent:
    """World model, actor, critic and replay: `act` follows the latent state, `observe` stores, `update` trains.

    Drive it from a loop of your own: `agent = Agent(env.observation_space, env.action_space, Args(num_envs=1))`, then
    for every step `act`, `env.step`, `observe`, `update`. Environments side by side, each with its share of the replay:
    `act_many`, and `observe` with `env`. Stored are the observation and the action of the last `act`; an episode that
    is broken off is `truncated`. With a `folder`, the replay keeps its observations there.
    """

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args, folder: Path | None = None):
        check_spaces(observation_space, action_space)
        self.args, self.device, self.action_space = args, find_device(args.device), action_space
        self.observer = Observer(observation_space, args.image_size)
        discrete = isinstance(action_space, gym.spaces.Discrete)
        actions = int(action_space.n) if discrete else math.prod(action_space.shape)
        self.shapes = Shapes(self.observer.vector, self.observer.image, actions, discrete)
        self.size, self.generator = SIZES[args.size], torch.Generator(self.device).manual_seed(seed_of(args.seed, 0, 0))
        self.rng = np.random.default_rng(seed_of(args.seed, 0, 1))
        self.nets = Networks(self.shapes, self.size, self.generator)
        self.slow_critic = copy.deepcopy(self.nets.critic).requires_grad_(False)
        self.percentiles = Percentiles(self.device)
        self.optimizer = LaProp(list(self.nets.parameters()), args.learning_rate, args.warmup)
        if args.compile:
            for name in ("observe_step", "imagine_step"):
                setattr(self.nets.rssm, name, torch.compile(getattr(self.nets.rssm, name)))
        self.see, self.learn = Recorded(self.see_now, self.generator), Recorded(self.learn_now, self.generator)
        rows, length = args.replay_size // args.num_envs, args.batch_length + 1  # one row in front: latent, action
        # What is added between two checkpoints, twice: a row a step, and one more for each episode that ends.
        spare = 2 * (2 * math.ceil(args.checkpoint_every / args.num_envs) + 2) if args.replay_on_disk else 0
        self.replay = Replay(self.shapes, self.size, args.num_envs, rows, length, spare, folder)
        self.latent = self.nets.rssm.initial(args.num_envs)
        self.action = torch.zeros(args.num_envs, actions, device=self.device)
        # Of each environment: whether an episode begins, the reward that came with the present observation, and what
        # was seen at the last `act`.
        self.first, self.rewards, self.seen = [True] * args.num_envs, [0.0] * args.num_envs, []
        self.mean, self.std = torch.zeros(self.shapes.vector), torch.ones(self.shapes.vector)
        self.steps, self.updates, self.scaled_at, self.logs, self.losses = 0, 0, 0, {}, {}

    def tensors(self, rows: dict[str, Array]) -> dict[str, Tensor]:
        """Rows of the replay as the networks want them."""
        found = {name: torch.from_numpy(np.ascontiguousarray(rows[name])) for name in rows}
        if "vector" in found and self.args.standardise:
            found["vector"] = ((found["vector"] - self.mean) / self.std).clamp(-10, 10)
        return {name: part.to(self.device) for name, part in found.items()}

    def measure(self) -> None:
        """Mean and deviation of the numbers of vectors in the replay; anew when 1 % more steps were taken."""
        rows = self.replay.latest("vector")
        mean, std = rows.mean(0, dtype=np.float64), rows.std(0, dtype=np.float64)
        self.mean = torch.from_numpy(np.where(self.observer.numbers, mean, 0)).float()
        varies = self.observer.numbers & (std > 1e-6 * np.abs(mean) + 1e-12)  # more than rounding does
        self.std = torch.from_numpy(np.where(varies, std, 1)).float()
        self.scaled_at = self.steps

    @torch.inference_mode()
    def follow(
        self, rows: list[dict[str, Any]], latent: Latent, action: Tensor, generator: torch.Generator
    ) -> tuple[Latent, Policy]:
        """The latent states after observations, and the policy there."""
        inputs = self.tensors({name: np.stack([row[name] for row in rows]) for name in rows[0]}) | latent._asdict()
        noise = self.nets.rssm.noise(len(rows), generator=generator)
        found = self.see(inputs | {"action": action, "noise": noise})
        return Latent(found["deter"], found["stoch"]), make_policy(found["policy"], self.shapes.discrete)

    def see_now(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """`follow` for tensors alone."""
        latent, tokens = Latent(inputs["deter"], inputs["stoch"]), self.nets.encoder(inputs)
        latent, _ = self.nets.rssm.observe_step(latent, inputs["action"], inputs["is_first"], tokens, inputs["noise"])
        return latent._asdict() | {"policy": self.nets.actor(latent.feature())}

    def act_many(self, observations: list[Any], infos: list[dict | None] | None = None) -> list[Any]:
        """Actions for all environments, drawn."""
        now = slice(len(observations))  # one for `act`, though there could be more
        firsts, latent = self.first[now], Latent(self.latent.deter[now], self.latent.stoch[now])
        self.seen = [self.observer(obs) | {"is_first": first} for obs, first in zip(observations, firsts, strict=True)]
        self.latent, policy = self.follow(self.seen, latent, self.action[now], self.generator)
        self.action = policy.sample(self.generator)
        if not self.shapes.discrete:
            self.action = self.action.clamp(-1, 1)
        self.first = [False] * len(observations)
        return [self.to_env(action) for action in self.action]

    def act(self, obs: Any, info: dict | None = None) -> Any:
        """An action for the one environment there is. (With `num_envs` above 1 it has but its share of the replay.)"""
        return self.act_many([obs])[0]

    def to_env(self, action: Tensor) -> Any:
        """One action (A,) as the environment wants it."""
        space = self.action_space
        if self.shapes.discrete:
            return int(space.start) + int(action.argmax())
        share = (action.cpu().numpy().reshape(space.shape).clip(-1, 1) + 1) / 2
        return ((1 - share) * space.low + share * space.high).astype(space.dtype)

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
        """Stores one step of an environment, and the last observation where an episode ends."""
        deter, stoch = self.latent.deter[env].cpu().numpy(), self.latent.stoch[env].argmax(-1).cpu().numpy()
        row = self.seen[env] | {"action": self.action[env].cpu().numpy(), "reward": self.rewards[env]}
        self.replay.add(env, deter, stoch, **row, is_last=False, is_terminal=False)
        self.steps, self.rewards[env] = self.steps + 1, float(reward)
        if terminated or truncated:
            flags = {"is_first": False, "is_last": True, "is_terminal": terminated, "reward": float(reward)}
            self.replay.add(env, 0 * deter, 0 * stoch, **self.observer(next_obs), **flags, action=0.0)
            self.rewards[env], self.first[env] = 0.0, True

    def update(self) -> None:
        """As many updates as the steps so far allow."""
        args = self.args
        ratio = args.train_ratio / (args.batch_size * args.batch_length)
        first = max(args.learning_starts, args.num_envs * (args.batch_length + 1))  # nothing to learn from before
        while self.updates < (self.steps - first) * ratio and self.replay.starts().any():
            if args.standardise and self.shapes.vector and self.steps >= 1.01 * self.scaled_at:
                self.measure()
            self.update_once()

    def update_once(self) -> None:
        """One update of everything, on sequences from the replay."""
        (stream, at), rows = self.replay.sample(self.args.batch_size, self.rng)
        batch, start = self.aligned(rows)
        self.losses = self.learn(batch | start._asdict())
        deter, stoch = (self.losses.pop(name).cpu().numpy() for name in ("deter", "stoch"))
        self.replay.refresh((stream, at[:, 1:]), deter, stoch)
        self.updates += 1

    def learn_now(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`update_once` for tensors alone: what `aligned` gives -> what to log, and the states that were inferred."""
        args, start = self.args, Latent(batch["deter"], batch["stoch"])
        settings = args.horizon, args.imagination_starts, args.gamma, args.entropy_scale
        parts = self.nets, self.slow_critic, batch, start, self.percentiles, self.generator
        # Without its cache: that would keep what was cast without a gradient, in the imagination.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False):
            losses, latent, logs = dreamer_loss(*parts, *settings)
            loss = sum(LOSS_SCALES.get(name, 1.0) * part for name, part in losses.items())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for slow, parameter in zip(self.slow_critic.parameters(), self.nets.critic.parameters(), strict=True):
                slow.lerp_(parameter, 0.02)
        logs |= {f"losses/{name}_loss": part for name, part in losses.items()}
        found = logs | {"deter": latent.deter, "stoch": latent.stoch.argmax(-1)}
        return {name: part.detach() for name, part in found.items()}

    def aligned(self, rows: dict[str, Array]) -> tuple[dict[str, Tensor], Latent]:
        """Of sequences (B, T + 1), the latent state at the first step, and all that `dreamer_loss` wants of the others,
        among it the action before each."""
        batch = self.tensors(rows)
        start = Latent(batch.pop("deter")[:, 0], F.one_hot(batch.pop("stoch")[:, 0].long(), self.size.classes).float())
        action = batch.pop("action")[:, :-1]
        return {name: part[:, 1:] for name, part in batch.items()} | {"prev_action": action}, start

    @torch.no_grad()
    def predict_ahead(self) -> tuple[Array, Array, int]:
        """A sequence of the replay, of which the model sees the first half and predicts the rest, without being told
        where an episode begins: what was, what the model predicts, and how many steps it saw. Pictures (T, height,
        width, channels), or else numbers (T, V)."""
        _, rows = self.replay.sample(1, np.random.default_rng(self.updates), serve=False)
        (batch, state), generator = self.aligned(rows), torch.Generator(self.device).manual_seed(self.updates)
        half, reset, tokens = self.args.batch_length // 2, batch["is_first"], self.nets.encoder(batch)
        states = []
        for t in range(self.args.batch_length):
            action = batch["prev_action"][:, t]
            noise = self.nets.rssm.noise(1, generator=generator)
            if t < half:
                state, _ = self.nets.rssm.observe_step(state, action, reset[:, t], tokens[:, t], noise)
            else:
                state = self.nets.rssm.imagine_step(state, action, noise)
            states.append(state)
        found = self.nets.decoder(Latent(*stacked(states)))
        if "image" not in found:
            return batch["vector"][0].cpu().numpy(), found["vector"][0].cpu().numpy(), half
        pictures = batch["image"][0], (found["image"][0] * 255).byte()
        shown = slice(0, 3) if self.shapes.image[-1] == 3 else slice(-1, None)  # of several channels the last
        return *(picture[..., shown].cpu().numpy() for picture in pictures), half

    def open_loop(self) -> Image.Image:
        """`predict_ahead` as one picture: the truth above the prediction; of numbers curves, black and red."""
        truth, predicted, half = self.predict_ahead()
        if truth.ndim == 2:
            return draw_curves(truth, predicted, half)
        every = max(1, len(truth) // 16)
        strips = [np.concatenate(strip[::every], axis=1) for strip in (truth, predicted)]
        return Image.fromarray(np.concatenate(strips).squeeze())

    def film(self, path: Path) -> None:
        """Of pictures, the same as a GIF; a bar at the bottom from where on the model sees no more."""
        truth, predicted, half = self.predict_ahead()
        frames = np.concatenate([truth, np.pad(predicted, ((0, 0), (2, 4), (0, 0), (0, 0)))], axis=1)
        frames[half:, -3:] = 255
        scale = max(1, 192 // frames.shape[2])
        images = [Image.fromarray(frame.repeat(scale, 0).repeat(scale, 1).squeeze()).quantize() for frame in frames]
        path.parent.mkdir(exist_ok=True)
        images[0].save(path, save_all=True, append_images=images[1:], duration=100, loop=0)

    def greedy_policy(self, seed: int) -> Callable[..., Any]:
        """A policy (observation, info -> action) for one episode, which does not touch the agent: the most likely
        action in each latent state."""
        generator = torch.Generator(self.device).manual_seed(seed)
        latent, action, first = self.nets.rssm.initial(1), torch.zeros(1, self.shapes.action, device=self.device), True

        def policy(obs: Any, info: dict | None = None) -> Any:
            nonlocal latent, action, first
            latent, found = self.follow([self.observer(obs) | {"is_first": first}], latent, action, generator)
            action, first = found.mode(), False
            return self.to_env(action[0])

        return policy

    def metrics(self) -> dict[str, float | Image.Image]:
        """What to log, by TensorBoard tag."""
        return self.scalars() | ({"model/open_loop": self.open_loop()} if self.updates else {})

    def scalars(self) -> dict[str, float]:
        """The numbers among the `metrics`."""
        self.logs |= {name: value.item() for name, value in self.losses.items()}
        return self.logs

    def state_dict(self) -> dict:
        """All that the next step depends on, as tensors and plain values; to be asked for between two steps."""
        return {
            "nets": self.nets.state_dict(),
            "slow_critic": self.slow_critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "percentiles": [self.percentiles.low, self.percentiles.high],
            "scale": [self.mean, self.std],
            "replay": self.replay.state_dict(),
            "generator": {self.device.type: self.generator.get_state()},
            "rng": json.dumps(self.rng.bit_generator.state),
            "now": [*self.latent, self.action, torch.tensor(self.first)],
            "rewards": self.rewards,
            "counts": [self.steps, self.updates, self.scaled_at],
            "logs": self.scalars(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` gave into a newly made agent."""
        for name in ("nets", "slow_critic", "optimizer", *(() if self.args.evaluate else ("replay",))):
            getattr(self, name).load_state_dict(state[name])
        for percentile, saved in zip((self.percentiles.low, self.percentiles.high), state["percentiles"], strict=True):
            percentile.copy_(saved)
        if self.device.type in state["generator"]:  # on another kind of device, random numbers start afresh
            self.generator.set_state(state["generator"][self.device.type])
        self.rng.bit_generator.state = json.loads(state["rng"])
        deter, stoch, self.action, first = (part.to(self.device) for part in state["now"])
        self.latent, self.first, self.rewards = Latent(deter, stoch), first.tolist(), list(state["rewards"])
        (self.mean, self.std), self.logs = state["scale"], state["logs"]
        self.steps, self.updates, self.scaled_at = state["counts"]
        self.optimizer.done.fill_(self.updates)


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
    """Dreamer: acting and training in turns; returns what is in result.json."""
    torch.set_num_threads(args.threads)
    envs = [make_env(args) for _ in range(args.num_envs)]
    path = run_folder(args)
    files = path / "replay" if args.replay_on_disk and not args.evaluate else None
    agent = Agent(envs[0].observation_space, envs[0].action_space, args, files)
    episodes = [Episode(env, args.seed, 1, index) for index, env in enumerate(envs)]
    run = Run(args, agent, episodes, path)
    for step in run.steps(args.num_envs):
        observations = [episode.obs for episode in episodes]
        actions = agent.act_many(observations)
        for index, (episode, obs, action) in enumerate(zip(episodes, observations, actions, strict=True)):
            next_obs, reward, terminated, truncated = episode.step(action)
            agent.observe(obs, action, reward, next_obs, terminated, truncated, env=index)
            if terminated or truncated:
                run.log_episode(step, episode)
                episode.reset()
        agent.update()
        if agent.updates and agent.shapes.image and step // args.eval_every > run.step // args.eval_every:
            agent.film(path / "videos" / f"open_loop_{step}.gif")
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
