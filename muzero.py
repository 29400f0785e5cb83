# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.4", "numpy>=2.0", "gymnasium>=1.2", "tyro>=0.9", "tensorboard>=2.18", "pillow>=10.1", "tqdm>=4.66",
# ]
# ///
"""MuZero: search a tree of what could be done, in a model learned for that alone.

A network turns the observation into a latent state; a second one goes from latent state and action to the next latent
state; a third gives each latent state the reward that led there, a policy and a value. With them a tree search finds a
better policy and value than those it started from, which are trained towards what it found.

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
at the root some actions are drawn without replacement, and again and again the worse half of them is dropped. With
`--min-range 0` and without noise both searches take the same steps as DeepMind's mctx. What differs from the papers:

    - A search stores the value of the policy that it found, not the mean of what came back through the root.
    - Value targets use rewards only up to the first action that today's policy would not take any more (`follow`); old
      positions are searched again, often (`reanalyze_ratio`), and targets end in what that found (theirs: in a target
      network's value). Nearly equal Q stay close (`min_range`); self-play can repeat actions (`repeat`).
    - Vectors are standardised, their network predicts how the latent state changes, and a loss like EfficientZero's
      (`consistency_weight`) holds imagined latent states to the observations that came. Adam; a state is a single
      observation; in convolutional networks an action adds learned numbers at every place.
    - With two players the reward that ends a game becomes the value of the state after it, and rewards are 0.
    - As in mctx, Q is normalised by the range at its node, not by that of the whole tree.

Run:     python muzero.py; for games of two players: python muzero.py --env-id TicTacToe-v0
Expect:  on one of 2 busy CPU cores:
    CartPole-v1      10,000 steps   3 to 6 minutes  500, the maximum, from 6,000 steps on (10 of 10 seeds)
    Acrobot-v1       20,000 steps   6 to 9 minutes  -80 to -99 (5 seeds)
    LunarLander-v3  100,000 steps      18 minutes   213, 227 and 147 over 100 episodes (3 seeds)
    TicTacToe-v0     50,000 steps    half an hour   of all games that an opponent can choose 4 of 5 seeds lose none, one
                                                    loses a single one; moving first, 99 % won against random moves
"""

import copy
import dataclasses
import functools
import importlib
import io
import itertools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

# The search makes many small matrix products, for which more threads would only wait for each other. (A program that
# imports NumPy before this file has to set it itself.)
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import gymnasium as gym
import numpy as np
import torch
import tyro
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm


@dataclasses.dataclass
class Args:
    """MuZero (Schrittwieser et al. 2020) and Gumbel MuZero (Danihelka et al. 2022)."""

    env_id: str = "CartPole-v1"  # Gymnasium id, or module:Name-v0; here: TicTacToe-v0, KInARow-v0
    env_kwargs: dict[str, bool | int | float | str] = dataclasses.field(default_factory=dict)  # gym.make's: name value
    total_timesteps: int = 10_000  # environment steps to learn for, rounded up to a multiple of num_envs
    seed: int = 1  # of every random draw
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where the networks are; auto: a GPU where there is one
    threads: int = 1  # CPU threads; two runs side by side get more done than one with two threads
    compile: bool = False  # compile the loss with torch.compile, for GPUs; changes nothing but speed and rounding
    eval_every: int = 1_000  # environment steps between two evaluations of the greedy policy
    eval_episodes: int = 5  # episodes of an evaluation
    checkpoint_every: int = 2_000  # environment steps between two checkpoints
    run_dir: str = "runs"  # folder in which the run's own folder is made
    resume: str | None = None  # run folder to continue exactly where its last checkpoint was written
    evaluate: str | None = None  # run folder whose agent to evaluate, without learning
    capture_video: bool = False  # record the first episode of each evaluation as a GIF in the run folder

    eval_env_kwargs: dict[str, bool | int | float | str] = dataclasses.field(default_factory=dict)  # more in evaluation
    atari: bool = False  # the usual wrappers of Atari games: random no-ops, 4 frames a step, grey, the last 4 pictures
    num_envs: int = 8  # environments side by side: each call of the network serves as many searches
    gamma: float = 0.99  # discount factor (MuZero, Atari: 0.997); -1 where two players take turns, rewards the mover's

    search: Literal["puct", "gumbel"] = "gumbel"  # MuZero's tree search; Gumbel MuZero's: fewer simulations
    num_simulations: int = 16  # of a search (MuZero: 50 for Atari, 800 for board games; Gumbel MuZero: from 2)
    max_considered: int = 16  # gumbel: how many actions of the root are tried (Gumbel MuZero: 16)
    dirichlet_alpha: float = 0.25  # puct: concentration of the noise on the root's priors (0.25 for Atari, 0.3 chess)
    dirichlet_fraction: float = 0.25  # puct: share of that noise in self-play (MuZero: 0.25)
    temperature: float = 1.0  # puct: self-play draws by visits ^ (1 / temperature) (MuZero begins with 1 and lowers it)
    repeat: float = 0.0  # probability that self-play repeats its last action, whatever the search says (MuZero: 0)
    min_range: float = 0.05  # least range to divide the Q of a node by, as a share of that of all values; 0: as in mctx

    learning_starts: int = 500  # steps before the first update
    updates_per_step: float = 0.5  # gradient steps for each environment step
    batch_size: int = 256  # positions of an update
    unroll_steps: int = 5  # steps K that the model is unrolled (MuZero: 5)
    td_steps: int = 50  # steps n of rewards in a value target (MuZero, Atari: 10); of games: their length
    replay_size: int = 100_000  # rows of the replay: positions, and the state after each part of an episode
    follow: float = 0.5  # targets end before an action less likely than this share of the likeliest's; 0: never
    reanalyze_ratio: float = 40.0  # rows of the replay searched again for each environment step (MuZero Reanalyze)
    priority_exponent: float = 0.0  # of the priorities |value - target|; 0: positions are drawn uniformly (MuZero: 1)
    learning_rate: float = 1e-3  # step size of Adam at the beginning
    decay_steps: int = 10_000  # steps after which the step size is a tenth; it stays at a hundredth (appendix G)
    weight_decay: float = 1e-4  # factor of half the squared weights in the loss (MuZero: 1e-4)
    max_grad_norm: float = 5.0  # longest gradient; a longer one is shortened to it
    value_weight: float = 1.0  # of the value loss (MuZero: 1, MuZero Reanalyze: 0.25)
    consistency_weight: float = 2.0  # of EfficientZero's self-supervised loss (Ye et al. 2021: 2)

    network: Literal["auto", "mlp", "conv"] = "auto"  # auto: convolutional for observations (height, width, channels)
    hidden_size: int = 128  # units of the hidden layer of each network
    latent_size: int = 64  # numbers in a latent state of a vector
    channels: int = 32  # planes of a latent state of an image or a board, and of the convolutions (MuZero: 256)
    support: int = 25  # rewards and values are -support ... support; 25: up to 640, as they are scaled; of games: 1

    def __post_init__(self):
        ranges = {int: (1, math.inf), float: (0, 1_000), "seed": (0, math.inf), "td_steps": (1, LONGEST_PART)}
        ranges |= {"replay_size": (2, math.inf), "latent_size": (2, math.inf), "gamma": (-1, 1), "follow": (0, 1)}
        ranges |= {"repeat": (0, 1), "min_range": (0, 1), "dirichlet_fraction": (0, 1), "temperature": (1e-3, 1_000)}
        for name, kind in self.__annotations__.items():
            low, high = ranges.get(name, ranges.get(kind, (None, None)))
            if low is not None and not low <= getattr(self, name) <= high:
                raise Failure(f"--{name.replace('_', '-')} must be from {low} to {high}, not {getattr(self, name)}")
        if -1 < self.gamma < 0:
            raise Failure(f"--gamma must be -1 in self-play, and from 0 on without, not {self.gamma}")


# Settings by environment that differ from the defaults; what the command line says wins. The agent of a game must
# answer any opponent: its self-play explores widely, by noise, temperature and a large `min_range`, which lets noise
# count, while `follow` and reanalysis keep the values those of good play. In LunarLander an action changes little
# beside the range of all values; on Acrobot independent random actions cancel out.
BOARD_GAME = {"gamma": -1.0, "support": 1, "num_envs": 32, "consistency_weight": 0.0, "eval_episodes": 20}
BOARD_GAME |= {"search": "puct", "min_range": 1.0, "num_simulations": 50, "reanalyze_ratio": 16.0}
BOARD_GAME |= {"dirichlet_alpha": 1.0, "dirichlet_fraction": 0.5, "temperature": 4.0}
PRESETS: dict[str, dict[str, Any]] = {
    "Acrobot-v1": {"total_timesteps": 20_000, "decay_steps": 20_000, "repeat": 0.5},
    "LunarLander-v3": {"total_timesteps": 100_000, "decay_steps": 100_000, "eval_every": 10_000}
    | {"updates_per_step": 0.25, "reanalyze_ratio": 10.0, "min_range": 0.01},
    "TicTacToe-v0": BOARD_GAME
    | {"total_timesteps": 50_000, "decay_steps": 50_000, "eval_every": 5_000, "td_steps": 9, "network": "mlp"}
    | {"hidden_size": 256, "batch_size": 64, "updates_per_step": 2.0, "learning_rate": 3e-3},
    "KInARow-v0": BOARD_GAME
    | {"total_timesteps": 500_000, "decay_steps": 500_000, "eval_every": 20_000, "td_steps": 42},
}


# The network is written in what PyTorch and NumPy have in common: it is trained as tensors and searched, on a CPU, as
# arrays that share their memory, because for a few rows at a time calls of NumPy cost half of those of PyTorch.
Array, TensorOrArray = np.ndarray, Tensor | np.ndarray
Parameters = Mapping[str, TensorOrArray]
HEADS = ("reward", "value", "policy")  # in the order of `predict`


def library(x: TensorOrArray) -> Any:
    return torch if isinstance(x, Tensor) else np


def scale(x: TensorOrArray) -> TensorOrArray:
    """h(x) = sign(x) (sqrt(|x| + 1) - 1) + 0.001 x, which keeps targets small (MuZero, appendix F)."""
    return library(x).sign(x) * (library(x).sqrt(abs(x) + 1) - 1) + 0.001 * x


def unscale(y: TensorOrArray) -> TensorOrArray:
    """The inverse of h."""
    return library(y).sign(y) * (((library(y).sqrt(1 + 0.004 * (abs(y) + 1 + 0.001)) - 1) / 0.002) ** 2 - 1)


def softmax(logits: TensorOrArray) -> TensorOrArray:
    exp = library(logits).exp(logits - library(logits).amax(logits, -1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def two_hot(x: Tensor, support: int, scaled: bool = True) -> Tensor:
    """(...) -> (..., 2 * support + 1): weight on the two whole numbers around h(x), or x, of which it is the mean."""
    x = (scale(x) if scaled else x).clamp(-support, support)
    bins = torch.arange(-support, support + 1, device=x.device)
    return (1 - (x[..., None] - bins).abs()).clamp(min=0)


def expectation(logits: TensorOrArray, scaled: bool = True) -> TensorOrArray:
    """(..., 2 * support + 1) -> (...): the inverse of `two_hot`, of logits."""
    bins = np.arange(logits.shape[-1], dtype=np.float32) - logits.shape[-1] // 2
    mean = softmax(logits) @ (torch.from_numpy(bins).to(logits) if isinstance(logits, Tensor) else bins)
    return unscale(mean) if scaled else mean


def make_network(obs_shape: tuple, num_actions: int, args: Args, generator: torch.Generator) -> nn.ParameterDict:
    """The weights of a network for vectors (size,), or for images and boards (height, width, channels), with PyTorch's
    initial values drawn from our own generator."""
    hidden, bins, channels = args.hidden_size, 2 * args.support + 1, args.channels
    shapes: dict[str, tuple[int, ...]] = {}
    if len(obs_shape) == 1:
        latent = features = args.latent_size  # numbers of a latent state, and of what a head gets
        shapes |= {"represent": (obs_shape[0], hidden), "latent": (hidden, latent)}
        shapes |= {"step": (latent + num_actions, hidden), "next_latent": (hidden, latent)}
    else:
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
    return parameters


def dense(parameters: Parameters, name: str, x: TensorOrArray) -> TensorOrArray:
    return x @ parameters[f"{name}_weight"] + parameters[f"{name}_bias"]


def relu(x: TensorOrArray) -> TensorOrArray:
    return F.relu(x) if isinstance(x, Tensor) else np.maximum(x, 0)


def two_layers(parameters: Parameters, hidden: str, output: str, x: TensorOrArray) -> TensorOrArray:
    return dense(parameters, output, relu(dense(parameters, hidden, x)))


def bounded(latent: TensorOrArray) -> TensorOrArray:
    """Each latent state (B, ...) to [0, 1] by its smallest and largest number (MuZero, appendix G)."""
    axes = tuple(range(1, latent.ndim))
    low, high = library(latent).amin(latent, axes, keepdims=True), library(latent).amax(latent, axes, keepdims=True)
    return (latent - low) / library(latent).clip(high - low, 1e-5, None)


def convolve(parameters: Parameters, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """Same size, or half of it."""
    weight = parameters[f"{name}_weight"]
    return F.conv2d(x, weight, parameters[f"{name}_bias"], stride, padding=weight.shape[-1] // 2)


def residual(parameters: Parameters, name: str, x: Tensor) -> Tensor:
    """A block of two convolutions (He et al. 2016), without batch normalisation."""
    return F.relu(x + convolve(parameters, f"{name}_2", F.relu(convolve(parameters, f"{name}_1", x))))


def represent(parameters: Parameters, obs: TensorOrArray) -> TensorOrArray:
    """obs (B, size) -> latent (B, L); or (B, height, width, planes) -> (B, channels, h, w), the smaller one of h and w
    not above 12."""
    if obs.ndim == 2:
        return bounded(two_layers(parameters, "represent", "latent", obs))
    x, index = obs.permute(0, 3, 1, 2), 0
    while f"halve_{index}_weight" in parameters:
        x = F.relu(convolve(parameters, f"halve_{index}", x, stride=2))
        index += 1
    return bounded(residual(parameters, "latent", F.relu(convolve(parameters, "represent", x))))


def dynamics(parameters: Parameters, latent: TensorOrArray, action: TensorOrArray, turns: bool) -> TensorOrArray:
    """latent (B, ...), action (B,) -> the next latent (B, ...), with `turns` as the other player sees it."""
    if latent.ndim > 2:
        hidden = F.relu(convolve(parameters, "step", latent) + parameters["step_action"][action])
        return bounded(residual(parameters, "next_latent", hidden))
    # The rows of the weights behind the latent's are what a one-hot action selects.
    weight, size = parameters["step_weight"], latent.shape[-1]
    hidden = relu(latent @ weight[:size] + weight[size:][action] + parameters["step_bias"])
    change = dense(parameters, "next_latent", hidden)
    return bounded(change if turns else latent + change)  # most steps change little, but a point of view turns


def predict(parameters: Parameters, latent: TensorOrArray) -> list[TensorOrArray]:
    """latent (B, ...) -> logits of the reward that led to it and of its value (B, 2 * support + 1), and of the policy
    (B, A); of a latent image each from four planes of its own."""
    inputs = [latent] * 3
    if latent.ndim > 2:
        inputs = [F.relu(convolve(parameters, f"{name}_planes", latent)).flatten(1) for name in HEADS]
    return [two_layers(parameters, f"{name}_hidden", name, x) for name, x in zip(HEADS, inputs, strict=True)]


def inconsistency(parameters: Parameters, imagined: Tensor, real: Tensor) -> Tensor:
    """(N, ...), (N, ...) -> (N,): minus the cosine between the projection of a real latent state, which gets no
    gradient, and what is predicted of it from an imagined one (EfficientZero, section 4.1; no batch normalisation)."""
    ours, theirs = (two_layers(parameters, "project", "projection", latent.flatten(1)) for latent in (imagined, real))
    predicted = two_layers(parameters, "predictor_hidden", "predictor", ours)
    return -F.cosine_similarity(predicted, theirs.detach(), dim=1)


def unrolled_loss(parameters: Parameters, batch: dict[str, Tensor], args: Args) -> tuple[Tensor, Tensor, dict]:
    """MuZero, equation 1, without the weight decay. `batch`: obs (B, ...); action and reward (B, K); value and policy
    (B, K + 1, ...); acting (B, K + 1): 1 where an action was taken, 0 from the last state on, which masks policy and
    consistency; known (B, K + 1): the same, and also 1 after a termination, which masks value and reward; weight (B,);
    with a `consistency_weight` also the observations that came, next_obs (B, K, ...). Returns the loss, the first value
    predictions (B,), and of each part of the loss the mean of where it counts. Step 0 has weight 1, steps 1 to K have
    1 / K each; the gradient is halved where a latent state enters the dynamics (appendix G)."""
    count, steps = batch["action"].shape
    latents = [represent(parameters, batch["obs"])]
    for index in range(steps):
        latent = latents[-1]
        halved = 0.5 * latent + 0.5 * latent.detach()
        latents.append(dynamics(parameters, halved, batch["action"][:, index], args.gamma < 0))
    logits = predict(parameters, torch.stack(latents, dim=1).flatten(0, 1))
    reward_logits, value_logits, policy_logits = (part.view(count, steps + 1, -1) for part in logits)
    share = torch.full((1, steps + 1), 1 / steps, device=value_logits.device)
    share[:, 0] = 1.0

    def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        return -(target * logits.log_softmax(-1)).sum(-1)

    support, scaled = args.support, args.gamma >= 0
    known, acting = batch["known"], batch["acting"]
    value = cross_entropy(value_logits, two_hot(batch["value"], support, scaled)) * known
    policy = cross_entropy(policy_logits, batch["policy"]) * acting
    reward = cross_entropy(reward_logits[:, 1:], two_hot(batch["reward"], support, scaled)) * known[:, :-1]
    total = ((args.value_weight * value + policy) * share).sum(1) + (reward * share[:, 1:]).sum(1)
    parts = {"value_loss": (value, known), "policy_loss": (policy, acting), "reward_loss": (reward, known[:, :-1])}
    if args.consistency_weight:
        imagined = torch.stack(latents[1:], dim=1).flatten(0, 1)
        with torch.no_grad():
            real = represent(parameters, batch["next_obs"].flatten(0, 1))
        distance = inconsistency(parameters, imagined, real).view(count, steps) * acting[:, :-1]
        total = total + args.consistency_weight * (distance * share[:, 1:]).sum(1)
        parts["consistency_loss"] = distance, acting[:, :-1]
    logs = {name: loss.detach().sum() / mask.sum().clamp(min=1) for name, (loss, mask) in parts.items()}
    return (batch["weight"] * total).mean(), expectation(value_logits[:, 0], scaled).detach(), logs


LONGEST_PART = 200  # steps; longer episodes are stored in several parts
LONGEST_WAIT = 1_600  # steps, of all environments together, in which each stores a part


class Replay:
    """Positions of the latest episodes in a ring. An episode, or a part of one, is T rows for its steps and one for the
    state after them; an old one is overwritten from its first row on: what follows a row is there as long as it is."""

    def __init__(self, obs_shape: tuple, obs_dtype: Any, num_actions: int, args: Args):
        self.added, self.args, capacity = 0, args, args.replay_size
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
        return min(self.added, self.args.replay_size)

    def add(self, columns: dict[str, Array]) -> Array:
        """Appends rows, not more than the capacity; returns where they are."""
        rows = (self.added + np.arange(len(columns["obs"]))) % self.args.replay_size
        for name, values in columns.items():
            self.columns[name][rows] = values
        self.mark_followed(rows)
        self.added += len(rows)
        return rows

    def mark_followed(self, rows: Array) -> None:
        """Notes whether the policies of rows, which have changed, take the actions that were taken there."""
        policy, action = self.columns["policy"][rows], self.columns["action"][rows]
        taken = np.take_along_axis(policy, action[:, None], axis=1)[:, 0]
        self.columns["followed"][rows] = taken >= self.args.follow * policy.max(1)

    def onwards(self, rows: Array, count: int) -> Array:
        """(R,) -> (R, count): each row and what follows it; behind the last one of an episode, that one again."""
        offset = np.minimum(np.arange(count), self.columns["left"][rows][:, None])
        return (rows[:, None] + offset) % len(self.columns["left"])

    def n_step_returns(self, rows: Array, follow: bool = True) -> Array:
        """(R,): sum of gamma^i r_{t+i} over i < n, plus gamma^n v_{t+n} with the search's v; where fewer than n steps
        are left, v is that of the last state. With `follow`, n ends before the first action that today's policy would
        not take: where that is the first of all, the target is the search's own value."""
        columns, n = self.columns, self.args.td_steps
        index, discounts = self.onwards(rows, n), float(self.args.gamma) ** np.arange(n + 1)
        used = np.arange(n) < columns["left"][rows][:, None]  # (R, n): which rewards
        if follow:
            used = np.logical_and.accumulate(used & columns["followed"][index], axis=1)
        ahead = used.sum(1)  # (R,)
        rewards = np.where(used, columns["reward"][index], 0) @ discounts[:n]
        return rewards + discounts[ahead] * columns["value"][(rows + ahead) % len(columns["value"])]

    def sample(self, rng: np.random.Generator) -> tuple[Array, dict[str, Array]]:
        """Rows drawn by priority, and what `unrolled_loss` wants of them."""
        columns, priority, steps = self.columns, self.columns["priority"], self.args.unroll_steps
        cumulated = priority.cumsum()
        rows = cumulated.searchsorted(rng.random(self.args.batch_size) * cumulated[-1], side="right")
        weight = 1 / (np.count_nonzero(priority) * (priority[rows] / cumulated[-1]))  # 1 / (N P(i)): MuZero, appendix G
        index = self.onwards(rows, steps + 1)  # (B, K + 1)
        offset, left = np.arange(steps + 1), columns["left"][rows][:, None]
        acting = offset < left
        known = acting | columns["terminated"][rows][:, None]
        # Two players: after the end, too, the turn would change with each step, and with it the sign of the value.
        beyond = np.maximum(offset - left, 0)  # steps
        value = self.n_step_returns(index.reshape(-1)).reshape(index.shape) * np.sign(self.args.gamma) ** beyond
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
        if self.args.consistency_weight:
            batch["next_obs"] = columns["obs"][index[:, 1:]]
        return rows, batch

    def unfinished(self, count: int, rng: np.random.Generator) -> Array:
        """Up to `count` rows drawn uniformly: what is drawn of the states after an end is left out."""
        rows = rng.integers(self.used, size=count)
        return rows[(self.columns["left"][rows] > 0) | ~self.columns["terminated"][rows]]

    def state_dict(self) -> dict:
        return {"added": self.added} | {name: torch.from_numpy(x[: self.used]) for name, x in self.columns.items()}

    def load_state_dict(self, state: dict) -> None:
        self.added = state["added"]
        for name, column in self.columns.items():
            column[: len(state[name])] = state[name].numpy()


# What a search asks of the model: (latent (B, ...), action (B,)) -> latent, reward (B,), logits (B, A), value (B,).
Recurrent = Callable[[Array, Array], tuple[Array, Array, Array, Array]]


class Tree:
    """B search trees of up to N + 1 nodes, in flat arrays: node n of tree b is row b * (N + 1) + n, its root n = 0.

    What belongs to an action of a node, an edge, is in arrays (B * (N + 1), A), of which `edge = row * A + action` is
    the flat index. A node's value is the mean of what came back through it, its own prediction included; the value
    of an edge, Q, is its reward plus the discounted value of the node behind it. The roots: latent (B, ...), logits
    (B, A), the network's value (B,); legal (B, A) holds for them only: below, the prior has learned to avoid the rest.
    """

    def __init__(
        self, latent: Array, logits: Array, value: Array, legal: Array, discount: float, simulations: int, min_range=0.0
    ):
        (batch, self.num_actions), width = logits.shape, simulations + 1
        self.legal, self.discount, self.num_simulations = legal, discount, simulations
        self.min_range = max(min_range, 1e-8)  # by what at least differences of Q are divided
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

    def back_up(self, path: list[tuple[Array, Array, Array]], leaf_value: Array) -> Array:
        """Takes the values of new leaves (B,) up their paths; returns the rows that it changed."""
        returned, levels = leaf_value.astype(np.float32), []  # what comes back to each tree's node of a level
        for walking, _, edge in reversed(path):
            returned[walking] = back = self.reward.take(edge) + self.discount * returned.take(walking)
            levels.append(back)
        _, nodes, edges = (np.concatenate(parts) for parts in zip(*path, strict=True))
        count, back = self.visits.take(nodes), np.concatenate(levels[::-1])
        self.value[nodes] = (self.value.take(nodes) * count + back) / (count + 1)
        self.visits[nodes] = count + 1
        self.edge_visits.reshape(-1)[edges] += 1
        self.q.reshape(-1)[edges] = self.reward.take(edges) + self.discount * self.value.take(self.child.take(edges))
        return nodes


def search(recurrent: Recurrent, tree: Tree, select: Callable, select_root: Callable | None = None) -> None:
    """Grows all trees at once: each simulation walks to a leaf, expands it, and takes its value back to the root; the
    network is called once for the leaves of all trees. `select`: rows (R,) -> the actions (R,) to walk on by;
    `select_root`: () -> those of the roots, where they differ. What a node selects changes only when something comes
    back through it, so it is computed then, for all nodes of a path at once, and a step down is a look into a table."""
    selected = np.zeros(len(tree.value), np.int64)
    selected[tree.roots] = select(tree.roots)  # also where `select_root` decides, which may rely on it
    for simulation in range(tree.num_simulations):
        if select_root is not None:
            selected[tree.roots] = select_root()
        edge, path = tree.walk(selected)
        node, action = np.divmod(edge, tree.num_actions)
        latent, reward, logits, value = recurrent(tree.latent.take(node, axis=0), action)
        new = tree.roots + simulation + 1
        tree.add(new, latent, logits, value)
        tree.child[node, action], tree.reward[node, action] = new, reward
        tree.depth[new] = tree.depth.take(node) + 1
        touched = np.concatenate([new, tree.back_up(path, value)])
        selected[touched] = select(touched)


def puct(tree: Tree, node: Array, table: Array) -> Array:
    """Scores (B, A) of the actions of nodes (B,): MuZero, equation 2, with the conventions of mctx: Q is normalised to
    [0, 1] over the node's value and the Q of its visited actions; what was not visited counts as the smallest."""
    visits, value = tree.edge_visits.take(node, axis=0), tree.value.take(node)[:, None]
    seen = np.where(visits > 0, tree.q.take(node, axis=0), value)
    low, high = np.minimum(seen.min(1, keepdims=True), value), np.maximum(seen.max(1, keepdims=True), value)
    normalised = (np.where(visits > 0, seen, low) - low) / np.maximum(high - low, tree.min_range)
    return normalised + tree.prior.take(node, axis=0) * table.take(tree.visits.take(node))[:, None] / (visits + 1)


def muzero_search(recurrent: Recurrent, tree: Tree) -> tuple[Array, Array]:
    """MuZero, appendix B. Returns the policies found (B, A), the shares of the visits, and the most visited actions
    (B,)."""
    # (c_1 + log((n + c_2 + 1) / c_2)) * sqrt(n) for n = 0, 1, ... visits of a node, with its own evaluation, as in
    # mctx; without it, as in the paper, the first choice ignores the prior.
    roots, n = tree.roots, np.arange(tree.num_simulations + 2)
    table = ((1.25 + np.log((n + 19_652 + 1) / 19_652)) * np.sqrt(n)).astype(np.float32)
    tree.prior[roots] = np.where(tree.legal, tree.prior[roots], -np.inf)  # of which every score is -inf, too
    search(recurrent, tree, lambda node: puct(tree, node, table).argmax(1))
    visits = tree.edge_visits[roots]
    return visits / visits.sum(1, keepdims=True), visits.argmax(1)


@functools.cache
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
    return (c_visit + visits) * c_scale * ((completed - low) / np.maximum(high - low, tree.min_range))


def gumbel_search(recurrent: Recurrent, tree: Tree, gumbel: Array, considered: int) -> tuple[Array, Array]:
    """Gumbel MuZero, algorithm 2 at the root and equation 14 below it. `gumbel` (B, A): noise, or 0 for none;
    `considered`: how many actions of the root are tried. Returns the improved policies (B, A) and the best of the
    actions that were tried most often (B,)."""
    roots, logits = tree.roots, tree.logits[tree.roots]
    base = gumbel + logits - logits.max(1, keepdims=True)
    schedules = np.array([halving_schedule(count, tree.num_simulations) for count in range(considered + 1)])
    schedule = schedules[np.minimum(tree.legal.sum(1), considered)]  # (B, N)
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

    search(recurrent, tree, select, select_root)
    return softmax(logits + added[roots]), best_of(tree.edge_visits[roots].max(1))


class Agent:
    """Network, replay and search. Drive it from a loop of your own: `Agent(env.observation_space, env.action_space,
    Args())`, then for every step `act`, `env.step`, `observe`, `update`; side by side: `act_many`, `observe(env=...)`.
    """

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        self.obs_shape, dtype, self.standardises = check_spaces(observation_space, action_space, args)
        self.args, self.device, self.space = args, find_device(args), observation_space
        self.num_actions, self.first_action = int(action_space.n), int(action_space.start)
        self.mean, self.std = np.zeros(self.obs_shape, np.float32), np.ones(self.obs_shape, np.float32)
        generator = torch.Generator(self.device).manual_seed(seed_of(args.seed, 0, 0))
        self.rng = np.random.default_rng(seed_of(args.seed, 0, 1))
        self.parameters = make_network(self.obs_shape, self.num_actions, args, generator)
        weights = self.parameters.parameters()
        self.optimizer = torch.optim.Adam(weights, args.learning_rate, weight_decay=args.weight_decay, fused=True)
        self.replay = Replay(self.obs_shape, dtype, self.num_actions, args)
        self.found: list[tuple[Array, float, Array]] = []  # of each environment policy, value and legal actions, and
        self.parts: list[list[tuple]] = [[] for _ in range(args.num_envs)]  # the steps of its part of an episode so far
        self.steps, self.updates, self.searched_again, self.logs, self.losses = 0, 0, 0, {}, {}
        self.value_range, self.measured, self.masked = 0.0, 0, False
        self.__setstate__({})

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in ("view", "loss_fn")}

    def __setstate__(self, state: dict) -> None:
        """Also of a copy or a pickle, whose search is to see its own weights."""
        vars(self).update(state)
        # What the search sees: of a network for vectors on a CPU, arrays in the same memory.
        self.arrays = self.device.type == "cpu" and len(self.obs_shape) == 1
        self.view = {name: p.detach().numpy() if self.arrays else p.detach() for name, p in self.parameters.items()}
        self.loss_fn = torch.compile(unrolled_loss) if self.args.compile else unrolled_loss

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

    def infer(self, function: Callable, *arrays: Array, **options: bool) -> Array | list[Array]:
        """What a function of the network says of arrays, as arrays, wherever the network is."""
        if self.arrays:
            return function(self.view, *arrays, **options)
        with torch.inference_mode():
            found = function(self.view, *(torch.from_numpy(array).to(self.device) for array in arrays), **options)
            return [part.cpu().numpy() for part in found] if isinstance(found, list) else found.cpu().numpy()

    def heads(self, latent: Array) -> tuple[Array, Array, Array]:
        """latent (B, ...) -> rewards (B,), policy logits (B, A), values (B,)."""
        reward, value, policy = self.infer(predict, latent)
        reward, value = expectation(np.stack([reward, value]), self.args.gamma >= 0)
        return reward, policy, value

    def recurrent(self, latent: Array, action: Array) -> tuple[Array, Array, Array, Array]:
        """What the search asks of the model."""
        latent = self.infer(dynamics, latent, action, turns=self.args.gamma < 0)
        return latent, *self.heads(latent)

    def predict(self, rows: Array) -> tuple[Array, Array, Array]:
        """Latent states, logits of the policy and values of B rows of observations."""
        latent = self.infer(represent, self.unit(rows))
        return latent, *self.heads(latent)[1:]

    def plan(self, rows: Array, legal: Array, rng: np.random.Generator | None) -> tuple[Array, Array, Array, Tree]:
        """Searches from B rows of observations; `rng`: draws the noise of self-play, None for none. Returns the
        policies found (B, A), actions (B,), the values of these policies (B,) and the trees."""
        args = self.args
        tree = Tree(*self.predict(rows), legal, args.gamma, args.num_simulations, args.min_range * self.value_range)
        if args.search == "gumbel":
            gumbel = np.zeros(legal.shape) if rng is None else rng.gumbel(size=legal.shape)
            policy, action = gumbel_search(self.recurrent, tree, gumbel, min(args.max_considered, self.num_actions))
        else:
            if rng is not None:
                prior = tree.prior[tree.roots]
                noise = np.where(legal, rng.gamma(args.dirichlet_alpha, size=legal.shape) + 1e-30, 0)  # Dirichlet
                noise /= noise.sum(1, keepdims=True)
                tree.prior[tree.roots] = (1 - args.dirichlet_fraction) * prior + args.dirichlet_fraction * noise
            policy, action = muzero_search(self.recurrent, tree)
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

    def act(self, obs: Any, info: dict | None = None) -> np.integer:
        """An action for the one environment there is."""
        return self.act_many([obs], [info])[0]

    def act_many(self, observations: list[Any], infos: list[dict | None]) -> list[np.integer]:
        """Actions for all environments, drawn as self-play does."""
        self.masked |= any((info or {}).get("action_mask") is not None for info in infos)
        legal = np.stack([self.legal(info) for info in infos])
        policy, action, value, tree = self.plan(np.stack([self.row(obs) for obs in observations]), legal, self.rng)
        self.found = list(zip(policy, value.tolist(), legal, strict=True))
        for index, part in enumerate(self.parts):
            if self.args.repeat and part and legal[index, part[-1][1]] and self.rng.random() < self.args.repeat:
                action[index] = part[-1][1]
        for name, shares in (("before", softmax(tree.logits[tree.roots])), ("after", policy)):
            entropy = -(shares * np.log(np.maximum(shares, 1e-12))).sum(1)
            self.logs[f"planner/root_entropy_{name}"] = float(entropy.mean())
        self.logs["planner/depth"] = float(tree.depth.reshape(len(legal), -1).max(1).mean())
        return list(action + self.first_action)

    def observe(
        self, obs: Any, action: Any, reward: float, next_obs: Any, terminated: bool, truncated: bool = False, env=0
    ) -> None:
        """Stores one step of an environment; its episode goes to the replay when it ends, or in parts."""
        part = self.parts[env]
        part.append((self.row(obs), int(action) - self.first_action, float(reward), *self.found[env]))
        self.steps += 1
        # The first parts are shorter, for something to learn from after `learning_starts` steps; not where some actions
        # are not allowed, as the last state of a part is then never searched.
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
        self.prioritise(rows, self.replay.n_step_returns(rows, follow=False) - value)
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
            obs = columns["obs"][:used]
            mean, std = obs.mean(0, np.float64), obs.std(0, np.float64)
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
            rows, batch = self.replay.sample(self.rng)
            batch |= {name: self.unit(batch[name]) for name in ("obs", "next_obs") if name in batch}
            tensors = {name: torch.from_numpy(column).to(self.device) for name, column in batch.items()}
            loss, value, self.losses = self.loss_fn(self.parameters, tensors, args)
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
            policy, _, value, _ = self.plan(columns["obs"][rows], columns["legal"][rows], self.rng if some else None)
            columns["policy"][rows], columns["value"][rows] = policy, value
            self.replay.mark_followed(rows)

    def act_greedily(self, observations: list[Any], infos: list[dict | None]) -> list[np.integer]:
        """Actions of searches without noise."""
        rows, legal = np.stack([self.row(obs) for obs in observations]), np.stack([self.legal(info) for info in infos])
        return list(self.plan(rows, legal, None)[1] + self.first_action)

    def greedy_policy(self, seed: int) -> Callable[..., np.integer]:
        """A policy (observation, info -> action) for one episode, which does not touch the agent; it needs no seed."""
        return lambda obs, info=None: self.act_greedily([obs], [info])[0]

    def metrics(self) -> dict[str, float]:
        """What is new since the last call, by TensorBoard tag."""
        logs = self.logs | {f"losses/{name}": float(loss) for name, loss in self.losses.items()}
        self.logs, self.losses = {}, {}
        return logs

    def state_dict(self) -> dict:
        """All that the next step depends on, as tensors and plain values."""
        return {
            "parameters": self.parameters.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "replay": self.replay.state_dict(),
            "rng": json.dumps(self.rng.bit_generator.state),
            "parts": [[torch.tensor(np.array(column)) for column in zip(*part, strict=True)] for part in self.parts],
            "scale": [torch.from_numpy(self.mean), torch.from_numpy(self.std)],
            "counts": [self.steps, self.updates, self.searched_again, self.value_range, self.measured, self.masked],
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` gave."""
        for part in ("parameters", "optimizer", "replay"):
            getattr(self, part).load_state_dict(state[part])
        self.rng.bit_generator.state = json.loads(state["rng"])
        self.parts = [list(zip(*(column.numpy() for column in part), strict=True)) for part in state["parts"]]
        self.mean, self.std = (part.numpy() for part in state["scale"])
        self.steps, self.updates, self.searched_again, self.value_range, self.measured, self.masked = state["counts"]


def train(args: Args, make: Callable[..., gym.Env] | None = None) -> dict:
    """MuZero as in the box on top. `make(render_mode=None)` makes an environment that is not registered."""
    make = make or functools.partial(make_env, args)
    envs = [make() for _ in range(args.num_envs)]
    agent = Agent(envs[0].observation_space, envs[0].action_space, args)
    episodes = [Episode(env, args.seed, 1, index) for index, env in enumerate(envs)]
    run = Run(args, agent, episodes, make)
    for _ in run.steps(args.num_envs):
        observations = [episode.obs for episode in episodes]
        actions = agent.act_many(observations, [episode.info for episode in episodes])
        for index, (episode, obs, action) in enumerate(zip(episodes, observations, actions, strict=True)):
            next_obs, reward, terminated, truncated = episode.step(action)
            agent.observe(obs, action, reward, next_obs, terminated, truncated, env=index)
            if terminated or truncated:
                run.log({"charts/episodic_return": episode.episodic_return})
                run.log({"charts/episodic_length": len(episode.actions)})
                episode.reset()
        agent.update()
    return run.result


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing: the same in every script. Nothing of MuZero is below this line.
# ---------------------------------------------------------------------------------------------------------------------
SCRIPT, CHECKPOINT = "muzero", "checkpoint.pt"
MUTABLE = "total_timesteps, eval_every, eval_episodes, checkpoint_every, capture_video, device, threads, compile"


class Failure(Exception):
    """Something that the user can fix: `main` prints it as one line and exits with status 2."""


def seed_of(*key: int) -> int:
    """A seed of (the run's seed, purpose, number); purposes: 0 agent, 1 training, 2 evaluation, 3 acting in it."""
    return int(np.random.SeedSequence(key).generate_state(1)[0] >> 1)  # below 2**31: it fits a C int


def make_env(args: Args, **drawing: str) -> gym.Env:
    """The environment that `args` name; `drawing` is empty or a render_mode, which not every environment has."""
    return make_wrapped(args, **drawing)


class Episode:
    """An environment, episode after episode, each with a seed of its own: its number and its actions bring it back."""

    def __init__(self, env: gym.Env, *key: int):
        self.env, self.key, self.number = env, key, -1

    def reset(self, number: int | None = None, actions: Sequence = ()) -> None:
        """Starts the next episode; or the one of this number, and repeats its actions."""
        self.number = self.number + 1 if number is None else number
        self.actions, self.episodic_return = [], 0.0
        obs, self.info = self.env.reset(seed=seed_of(*self.key, self.number))
        self.obs = copy.deepcopy(obs)  # some environments write the next one into the same array
        for action in actions:
            self.step(np.array(action, self.env.action_space.dtype)[()])

    def step(self, action: Any) -> tuple[Any, float, bool, bool]:
        """Returns next observation, reward, terminated, truncated; after one of the last two, call `reset`."""
        self.actions.append(np.asarray(action).tolist())
        obs, reward, terminated, truncated, self.info = self.env.step(copy.deepcopy(action))
        self.obs, number = copy.deepcopy(obs), np.asarray(reward)
        if number.size != 1 or number.dtype.kind not in "fiub" or not np.isfinite(number):
            raise Failure(f"step {len(self.actions)} of episode {self.number}: the reward is {reward}, not a number")
        self.episodic_return += float(number.item())
        return self.obs, float(number.item()), bool(terminated), bool(truncated)


class Run:
    """The run folder: TensorBoard events, progress, evaluations, checkpoints, exact resume."""

    def __init__(self, args: Args, agent: Agent, episodes: list[Episode], make: Callable[..., gym.Env]):
        self.args, self.agent, self.episodes, self.events = args, agent, episodes, io.BytesIO()
        self.eval_env = make(**({"render_mode": "rgb_array"} if args.capture_video else {}))
        if args.capture_video and self.eval_env.reset(seed=0) and np.ndim(self.eval_env.render()) != 3:
            raise Failure("--capture-video: render() of this environment gives no picture")
        name = f"{args.env_id}__{SCRIPT}__{args.seed}__{datetime.now():%Y%m%dT%H%M%S.%f}".replace("/", "-")
        self.path = folder = Path(args.evaluate or args.resume or Path(args.run_dir, name.replace(":", "-")))
        state = {"run": (0, 0.0, 0.0, 0), "result": {}, "episodes": [(0, ())] * len(episodes)}
        if (folder / CHECKPOINT).exists():  # killed before its first checkpoint, it begins anew
            state = torch.load(Path(folder, CHECKPOINT), map_location="cpu", weights_only=True)
            agent.load_state_dict(state["agent"])
        (self.step, self.seconds, wall_seconds, logged), self.result = state["run"], state["result"]
        self.begun = time.time() - wall_seconds
        self.bar = tqdm(total=args.total_timesteps, initial=self.step, unit="step", disable=bool(args.evaluate) or None)
        if not args.evaluate:
            self.path.mkdir(parents=True, exist_ok=True)
            versions = {name: sys.modules[name].__version__ for name in ("gymnasium", "numpy", "torch")}
            self.write("args.json", {"script": SCRIPT, "args": vars(args) | {"resume": None}, "versions": versions})
            self.events = open(self.path / "events.out.tfevents.0", "ab", buffering=0)
            self.events.seek(self.events.truncate(logged))  # what was logged after the checkpoint comes again
        Run.resumable = None if args.evaluate else self.path  # for the message when a signal stops it
        for episode, (number, actions) in zip(episodes, state["episodes"], strict=False):
            episode.env.unwrapped.steps_made = self.step // len(episodes) - len(actions)  # the mazes change with it
            episode.reset(number, actions)

    def steps(self, stride: int = 1) -> Iterator[int]:
        """Yields the number of each step that the caller makes; then logs, evaluates and saves what is due."""
        args, total = self.args, self.args.total_timesteps

        def due(every: int) -> bool:
            return self.step // every > (self.step - stride) // every or self.step >= total

        while self.step < total:
            begun = time.perf_counter()
            self.step += stride
            yield self.step
            self.seconds += time.perf_counter() - begun  # of training alone
            self.bar.update(stride)
            if due(max(1, total // 100)) or due(args.checkpoint_every):  # a checkpoint holds no NaN
                self.log({"charts/SPS": self.step / self.seconds, **self.agent.metrics()})
            if self.bar.disable and due(max(1, total // 10)):
                print(f"step {self.step} of {total}, {self.step / self.seconds:.4g} steps/s", flush=True)
            if due(args.eval_every):
                self.evaluate()
            if due(args.checkpoint_every):
                self.save()
        self.bar.close()
        self.write("result.json", self.result)
        print(f"run folder: {self.path}\ncurves:     tensorboard --logdir {self.path}")

    def log(self, values: dict[str, float]) -> None:
        """Writes scalars under their TensorBoard tags, x = environment steps."""
        if wrong := [f"{tag} is {value}" for tag, value in values.items() if not np.isfinite(value)]:
            raise Failure(f"step {self.step}: {', '.join(wrong)}")
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        event = Event(wall_time=time.time(), step=self.step, summary=summary)
        RecordWriter(self.events).write(event.SerializeToString())

    def play(self) -> tuple[list[Episode], list[Image.Image]]:
        """Greedy episodes, always with the same seeds, and pictures of the first where they are wanted."""
        args, env, episodes, frames = self.args, self.eval_env, [], []
        limit = (env.spec and env.spec.max_episode_steps) or 1_000  # a greedy policy may walk in circles for ever
        for number in range(args.eval_episodes):
            self.bar.set_description_str(f"evaluating {number + 1}/{args.eval_episodes}")
            policy = self.agent.greedy_policy(seed_of(args.seed, 3, number))
            episodes.append(episode := Episode(env, args.seed, 2, number))
            env.unwrapped.steps_made, done = self.step, False
            episode.reset()
            while not done and len(episode.actions) < limit:
                if args.capture_video and number == 0:
                    frames.append(Image.fromarray(env.render()).quantize())
                done = any(episode.step(policy(episode.obs, episode.info))[2:])
        return episodes, frames

    def evaluate(self) -> None:
        """Plays, and keeps, logs and prints the returns."""
        episodes, frames = self.play()
        self.bar.set_description_str("")
        returns, length = [e.episodic_return for e in episodes], float(np.mean([len(e.actions) for e in episodes]))
        mean, std = float(np.mean(returns)), float(np.std(returns))
        self.result = {"env_steps": self.step, "episodes": sum(episode.number for episode in self.episodes)}
        self.result |= {"wall_seconds": time.time() - self.begun, "eval_episodes": len(returns)}
        self.result |= {"eval_return_mean": mean, "eval_return_std": std}
        self.log({"eval/episodic_return": mean, "eval/episodic_length": length})
        tqdm.write(f"step {self.step}: return {mean:.4g} +- {std:.4g} in {len(returns)} episodes of {length:.4g} steps")
        if frames:
            video, fps = self.path / f"step_{self.step}.gif", self.eval_env.metadata.get("render_fps", 30)
            frames[0].save(video, save_all=True, append_images=frames[1:], duration=1000 / fps, loop=0)

    def save(self) -> None:
        """Writes a checkpoint."""
        state = {"run": (self.step, self.seconds, time.time() - self.begun, self.events.tell()), "result": self.result}
        state |= {"episodes": [(e.number, e.actions) for e in self.episodes], "agent": self.agent.state_dict()}
        self.write(CHECKPOINT, state)

    def write(self, name: str, state: dict) -> None:
        """Writes a file of the run folder so that at every moment there is a whole one, the old or the new."""
        with open(self.path / f"new.{name}", "wb") as file:
            torch.save(state, file) if name == CHECKPOINT else file.write(json.dumps(state, indent=2).encode())
        Path(self.path, f"new.{name}").replace(self.path / name)


def saved_args(folder: str | Path) -> Args:
    """The arguments of a run."""
    saved = json.loads(Path(folder, "args.json").read_text())
    if saved["script"] != SCRIPT:
        raise Failure(f"this is a run of {saved['script']}.py, not of {SCRIPT}.py")
    return Args(**{name: tuple(x) if isinstance(x, list) else x for name, x in saved["args"].items()})


def load(folder: str | Path, *spaces: gym.Space, **changes: Any) -> Agent:
    """The agent of a run; `load(folder).greedy_policy(seed=0)` is a function from an observation to an action. Give the
    spaces of observations and actions where the environment is not registered. Changes are to the run's arguments."""
    args = dataclasses.replace(saved_args(folder), **changes)
    env = None if spaces else make_env(args)
    agent = Agent(*(spaces or (env.observation_space, env.action_space)), args)
    agent.load_state_dict(torch.load(Path(folder, CHECKPOINT), map_location="cpu", weights_only=True)["agent"])
    return agent


def main() -> None:
    """The command line; what the user can fix is one line on stderr and status 2."""
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # Windows has no SIGHUP
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    sys.path.append(str(Path.cwd()))  # where the module of `--env-id module:Name-v0` may be
    folder = None
    try:
        given = tyro.cli(Args)
        folder = given.resume if given.evaluate is None else given.evaluate
        default = Args(env_id=given.env_id, **PRESETS.get(given.env_id, {})) if folder is None else saved_args(folder)
        args = tyro.cli(Args, default=dataclasses.replace(default, env_kwargs={}))  # once more, for what was not given
        args.env_kwargs = default.env_kwargs | given.env_kwargs
        other = {name for name, x in vars(args).items() if x != vars(default)[name]} - {"resume", *MUTABLE.split(", ")}
        if other and args.resume is not None:
            raise Failure(f"--resume may change {MUTABLE}, not {', '.join(sorted(other))}")
        if args.evaluate is None:
            train(args)
        else:
            Run(args, load(args.evaluate, **vars(args)), [], functools.partial(make_env, args)).evaluate()
    except Exception as error:
        if hasattr(Run, "resumable") and not isinstance(error, Failure | OSError):
            raise  # the run had begun: it comes from the environment or from this script, whose author needs to see it
        text = " ".join(f"{type(error).__name__}: {error} {folder or ''}".split())
        print(f"{SCRIPT}.py: error: {text.removeprefix('Failure: ')}", file=sys.stderr)
        sys.exit(2)
    except SystemExit:
        if path := getattr(Run, "resumable", None):  # otherwise it is --help, or an argument that tyro does not know
            print(f"\nstopped; to continue: python {sys.argv[0]} --resume {path}", file=sys.stderr)
        raise


# ---------------------------------------------------------------------------------------------------------------------
# The script's own plumbing: devices, spaces, wrappers, evaluations side by side, board games.
# ---------------------------------------------------------------------------------------------------------------------
def find_device(args: Args) -> torch.device:
    """The device that `args` name; `auto`: a GPU where there is one."""
    torch.set_num_threads(args.threads)
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(name for name in usable if usable[name]) if args.device == "auto" else args.device
    if not usable[name]:
        raise Failure(f"--device {name}: there is none that PyTorch can use")
    return torch.device(name)


def check_spaces(observation_space: gym.Space, action_space: gym.Space, args: Args) -> tuple[tuple, type, bool]:
    """Shape and type of an observation in the replay: pictures, and nothing else, stay bytes; and whether it is to be
    standardised. Raises Failure for what this script does not handle."""
    box, shape = isinstance(observation_space, gym.spaces.Box), observation_space.shape
    numbers = box and (len(shape) == 3 or math.prod(shape) <= 1_000)
    bytes_only = box and observation_space.dtype == np.uint8 and (observation_space.high == 255).all()
    picture = bytes_only and len(shape) in (2, 3)
    if not picture and not numbers and not isinstance(observation_space, gym.spaces.Discrete):
        raise Failure(
            "observations must be Discrete, a picture (height, width[, channels]) or a Box of up to 1,000 numbers, not "
            f"{observation_space}; Dict: dreamer.py; Tuple: dyna_q.py"
        )
    if picture and len(shape) == 3 and (shape[0] <= 4 < shape[2] or shape[0] < shape[1] == shape[2]):
        raise Failure(f"pictures must be (height, width) or (height, width, channels), not {shape}")
    if not isinstance(action_space, gym.spaces.Discrete):
        raise Failure(f"actions must be Discrete, not {action_space}; a bounded Box: cem_mpc.py, mbpo.py, dreamer.py")
    if too_many := [space for space in (observation_space, action_space) if getattr(space, "n", 0) > 10_000]:
        raise Failure(f"{too_many[0]} has more than 10,000 elements")
    shape = (*shape, 1) if picture and len(shape) == 2 else shape if box else (int(observation_space.n),)
    if args.network == "conv" and len(shape) != 3:
        raise Failure(f"--network conv is for observations (height, width, channels), not {observation_space}")
    standardises = box and len(shape) != 3  # numbers of boards, and one-hot ones, are of the right size already
    if len(shape) != 3 or args.network == "mlp":
        shape = (math.prod(shape),)
    return shape, np.uint8 if picture else np.float32, standardises


def make_wrapped(args: Args, **drawing: str) -> gym.Env:
    """The environment, with what `--atari` puts around it."""
    if not args.atari:
        return gym.make(args.env_id, **drawing, **args.env_kwargs)
    kwargs = {"frameskip": 1, "max_episode_steps": 108_000} | args.env_kwargs  # frames
    env = gym.wrappers.AtariPreprocessing(gym.make(args.env_id, **drawing, **kwargs))
    space = gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)
    stacked = gym.wrappers.FrameStackObservation(env, 4)
    return gym.wrappers.TransformObservation(stacked, lambda obs: np.moveaxis(obs, 0, -1), space)


class Run(Run):  # takes the place of the one above
    """Evaluates side by side, as a search of many states costs little more than one of one, with `--eval-env-kwargs`;
    a board game against random moves unless these name an opponent, as the return of self-play says nothing."""

    def __init__(self, args: Args, agent: Agent, episodes: list[Episode], make: Callable[..., gym.Env]):
        game = make().unwrapped
        if episodes and isinstance(game, KInARow) and (args.gamma < 0) != (game.opponent is None):
            raise Failure("--gamma must be -1 in self-play, and from 0 on with an opponent in --env-kwargs")
        if getattr(make, "func", None) is make_env:  # no function of the caller's own
            kwargs = args.env_kwargs | ({"opponent": "random"} if args.gamma < 0 and isinstance(game, KInARow) else {})
            make = functools.partial(make_env, dataclasses.replace(args, env_kwargs=kwargs | args.eval_env_kwargs))
        super().__init__(args, agent, episodes, make)
        self.eval_envs = [self.eval_env] + [make() for _ in range(args.eval_episodes - 1)]

    def play(self) -> tuple[list[Episode], list[Image.Image]]:
        """As above, but all episodes at once."""
        self.bar.set_description_str("evaluating")
        limit = (self.eval_env.spec and self.eval_env.spec.max_episode_steps) or 1_000
        episodes, frames = [Episode(env, self.args.seed, 2, index) for index, env in enumerate(self.eval_envs)], []
        for episode in episodes:
            episode.env.unwrapped.steps_made = self.step // self.args.num_envs
            episode.reset()
        playing = episodes
        while playing:
            if self.args.capture_video and playing[0] is episodes[0]:
                frames.append(Image.fromarray(self.eval_env.render()).quantize())
            actions = self.agent.act_greedily([e.obs for e in playing], [e.info for e in playing])
            ended = [any(episode.step(action)[2:]) for episode, action in zip(playing, actions, strict=True)]
            playing = [e for e, end in zip(playing, ended, strict=True) if not end and len(e.actions) < limit]
        return episodes, frames


def random_move(game: "KInARow") -> int:
    """One of the moves that are allowed."""
    moves = [action for action, _, _ in game.moves(game.own, game.other)]
    return moves[game.np_random.integers(len(moves))]


class KInARow(gym.Env):
    """Two players take turns to put a stone on a board; who first has `k` in a row, in any direction, has won.

    Observation, float32 (rows, columns, 2): the stones of the player whose turn it is, and the other's. Action: a
    field, row * columns + column, or with `gravity` a column, down which the stone falls. Reward: 1, to who makes it,
    for the move that wins, else 0. `info["action_mask"]` (A,) is 1 for what is allowed; anything else: ValueError.

    With `opponent` None, the actions of both players are asked for in turn. "random" or "module:function", a function
    from this game to a move: the other player is a part of the environment, begins every second episode on average, and
    a loss has reward -1.
    """

    metadata: ClassVar = {"render_modes": ["ansi", "rgb_array"], "render_fps": 1}

    def __init__(
        self,
        rows: int = 3,
        columns: int = 3,
        k: int = 3,
        gravity: bool = False,
        opponent: str | None = None,
        render_mode: str | None = None,
    ):
        self.rows, self.columns, self.k, self.gravity, self.render_mode = rows, columns, k, gravity, render_mode
        self.opponent = random_move if opponent == "random" else None
        if opponent not in (None, "random"):
            module, _, name = opponent.partition(":")
            self.opponent = getattr(importlib.import_module(module), name)
        self.observation_space = gym.spaces.Box(0.0, 1.0, (rows, columns, 2), np.float32)
        self.action_space = gym.spaces.Discrete(columns if gravity else rows * columns)
        # The stones of a player are the bits of a number, and a row of k is such a number too.
        self.lines: list[list[int]] = [[] for _ in range(rows * columns)]
        directions = (0, 1), (1, 0), (1, 1), (1, -1)
        for row, column, (down, right) in itertools.product(range(rows), range(columns), directions):
            if row + (k - 1) * down < rows and 0 <= column + (k - 1) * right < columns:
                fields = [(row + index * down) * columns + column + index * right for index in range(k)]
                for field in fields:
                    self.lines[field].append(sum(1 << other for other in fields))

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

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.own, self.other, self.turns = 0, 0, 0
        if self.opponent is not None and self.np_random.random() < 0.5:
            self.put(self.opponent(self))
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

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward, terminated = self.put(int(action))
        if self.opponent is not None and not terminated:
            lost, terminated = self.put(self.opponent(self))
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


if "TicTacToe-v0" not in gym.registry:
    gym.register("TicTacToe-v0", KInARow)
    gym.register("KInARow-v0", KInARow, kwargs={"rows": 6, "columns": 7, "k": 4, "gravity": True})


if __name__ == "__main__" and "__file__" in globals():  # which a notebook has not
    main()
