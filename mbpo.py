# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.4", "numpy>=2.0", "gymnasium>=1.2", "tyro>=0.9", "tensorboard>=2.18", "pillow>=10.1", "tqdm>=4.66",
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
algorithm 1). The order is that of the authors' code, jannerm/mbpo. What else differs:

    - Reward and termination have a network of their own, which sees the next observation; an imagined step ends with
      the probability that it gives. So an environment is all that is needed (theirs: termination is given).
    - What the ensemble predicts is standardised. A transition is held out from all trainings or from none.
    - Every step is in the data at once, and random actions end after `learning_starts` (theirs: with the episode).
    - Initial weights of actor and critics are PyTorch's (theirs: Keras'); MuJoCo tasks are Gymnasium's v5 (Gym's v2).

Without a model: `python mbpo.py --real-ratio 1`. Expect, at the last evaluation of each seed, and on a CPU core:

    environment                 steps  MBPO                                      without a model, 1 update  minutes
    Pendulum-v1                 3,000  -97, -141, -145, -146, -149               -200 after 2.3 x the steps 5
    InvertedPendulum-v5         3,000  1000, the maximum (5 of 5 seeds)          82 to 177 at 6,000         6 to 7
    InvertedDoublePendulum-v5   5,000  9360, 7543, 5858                          475 to 993                 36 to 38
    Reacher-v5                  5,000  -4.9, -5.7, -5.9                          -7.9 to -9.6               11 to 14
    HalfCheetah-v5             10,000  3233, 3291, 4144                          -102 to -163 (40 updates)  45 to 62

On the pendulums most of the gain comes from the number of updates, not from the model (benchmark/README.md). These
figures were made when reward and termination had two networks, and terminations were expected too often.
"""

import copy
import dataclasses
import functools
import importlib
import io
import itertools
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

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


@dataclass
class Args:
    """MBPO: soft actor-critic on short rollouts of a learned model (Janner et al. 2019)."""

    env_id: str = "Pendulum-v1"  # Gymnasium id, or module:Name-v0
    env_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)  # gym.make's: name value
    total_timesteps: int = 3_000  # environment steps to learn for
    seed: int = 1  # of every random draw
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where the networks are; auto: a GPU where there is one
    threads: int = 1  # CPU threads; two runs side by side get more done than one with two threads
    compile: bool = False  # torch.compile for the losses of the policy, which changes speed and rounding; for GPUs
    eval_every: int = 1_000  # environment steps between two evaluations of the greedy policy
    eval_episodes: int = 5  # episodes of an evaluation
    checkpoint_every: int = 500  # environment steps between two checkpoints
    run_dir: str = "runs"  # folder in which the run's own folder is made
    resume: str | None = None  # run folder to continue exactly where its last checkpoint was written
    evaluate: str | None = None  # run folder whose agent to evaluate, without learning
    capture_video: bool = False  # record the first episode of each evaluation as a GIF in the run folder

    learning_starts: int = 500  # steps with random actions before anything is learned (MBPO: 5,000; pendulums 500)
    gamma: float = 0.99  # discount factor (MBPO: 0.99)
    updates_per_step: int = 10  # of actor and critics, per environment step (MBPO: 20, HalfCheetah 40, pendulum 10)
    batch_size: int = 256  # transitions of an update (MBPO: 256)
    real_ratio: float = 0.05  # share of real transitions in a batch, rounded down (MBPO: 0.05); 1: without a model
    real_ratio_steps: int = 0  # not in the paper: steps after learning_starts over which the share falls from 1
    policy_lr: float = 3e-4  # step size of Adam for actor, critics and temperature (MBPO: 3e-4)
    policy_hidden: tuple[int, ...] = (256, 256)  # units of each hidden layer of actor and critics (MBPO)
    tau: float = 0.02  # step of the target critics towards the critics at every update (MBPO: 0.005)
    target_entropy: float | None = None  # of actions in [-1, 1]; None: - dimensions / 2, as in MBPO (SAC: - dimensions)
    critic_layer_norm: bool = False  # layer-normalise the critics, for many updates without a model (DroQ)
    critic_dropout: float = 0.0  # dropout in the critics, along with it (DroQ, Hiraoka et al. 2022: 0.01)

    rollout_schedule: tuple[int, int, int, int] = (0, 1, 1, 1)  # a b x y: x steps until a after learning_starts, y at b
    rollouts: int = 100_000  # rollouts after each training of the model, each from a real state (MBPO: 100,000)
    keep_trainings: int = 1  # for how many trainings imagined transitions are kept (MBPO: 4, pendulum 1, Humanoid 5)
    max_disagreement: float | None = None  # not in the paper: where elites differ more, a rollout ends
    weigh_disagreement: bool = False  # not in the paper: imagined steps weigh 1 / (1 + disagreement) for the critics
    reward_fn: str | None = None  # module:function of tensors obs, action, next_obs (..., size) to (...); None: learned
    termination_fn: str | None = None  # the same for termination, to a tensor of bool; None: learned

    ensemble_size: int = 7  # networks in the ensemble (PETS: 5, MBPO: 7)
    num_elites: int = 5  # networks in use, those with the lowest hold-out error (PETS: all, MBPO: 5)
    hidden: tuple[int, ...] = (200, 200, 200, 200)  # units of each hidden layer of the dynamics (MBPO; Humanoid: 400)
    weight_decay: tuple[float, ...] = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)  # of each layer of the dynamics (MBPO)
    model_lr: float = 1e-3  # step size of Adam for the ensemble (PETS, MBPO)
    model_batch_size: int = 256  # a network's batch is a sixteenth of its rows, from 32 to this (MBPO: 256, PETS: 32)
    train_every: int = 250  # environment steps between two trainings of the ensemble (MBPO: 250; Humanoid 1,000)
    patience: int = 10  # a training ends when more epochs in a row bring nothing better (MBPO: 5)
    max_updates: int = 2_000  # gradient steps after which a training ends with its epoch (MBPO: no limit)
    holdout_ratio: float = 0.2  # probability that a transition is held out from training (MBPO: 0.2)

    def __post_init__(self):
        any_count, share, step_size = (0, math.inf), (0, 1), (1e-9, 1)
        ranges = {"seed": any_count, "updates_per_step": any_count, "real_ratio_steps": any_count}
        ranges |= {"gamma": share, "real_ratio": share, "tau": step_size, "policy_lr": step_size, "model_lr": step_size}
        ranges |= {"critic_dropout": (0, 0.9), "holdout_ratio": (0, 0.9), "num_elites": (1, self.ensemble_size)}
        ranges |= {"target_entropy": (-1e9, 1e9), "max_disagreement": (1e-9, math.inf)}
        for name, value in vars(self).items():
            low, high = ranges.get(name, (1, math.inf))
            if type(value) in (int, float) and not low <= value <= high:  # so that a NaN is refused, too
                raise Failure(f"--{name.replace('_', '-')} must be from {low} to {high}")
        first, last, shortest, longest = self.rollout_schedule
        if not (0 <= first < last and 1 <= shortest <= longest):
            raise Failure("--rollout-schedule needs two steps, the second one later, and two lengths from 1 on")
        if len(self.weight_decay) != len(self.hidden) + 1 or not all(0 <= factor < 1 for factor in self.weight_decay):
            raise Failure("--weight-decay needs one value more than --hidden, each from 0 to 1")
        if not self.policy_hidden or min(self.policy_hidden + self.hidden) < 1:
            raise Failure("--hidden and --policy-hidden need values of at least 1")


# Settings by environment that differ from the defaults; what the command line says wins. Those of Hopper-v5 and below
# are the authors', but for max_updates and eval_every; of these only the first 10,000 steps of HalfCheetah-v5 were run.
MUJOCO = {"learning_starts": 5_000, "updates_per_step": 20, "tau": 0.005, "keep_trainings": 4, "eval_every": 5_000}
MUJOCO |= {"total_timesteps": 300_000, "checkpoint_every": 800}
FORCES = {"include_cfrc_ext_in_observation": False}  # which the authors leave out, as what follows
FORCES_AND_MASSES = FORCES | {f"include_{name}_in_observation": False for name in ("cinert", "cvel", "qfrc_actuator")}
PRESETS: dict[str, dict[str, Any]] = {
    "InvertedPendulum-v5": {"target_entropy": -0.05},
    "InvertedDoublePendulum-v5": {"total_timesteps": 5_000, "updates_per_step": 20, "checkpoint_every": 400},
    "Reacher-v5": {"total_timesteps": 5_000, "eval_episodes": 20},
    "Hopper-v5": MUJOCO
    | {"total_timesteps": 125_000, "target_entropy": -1.0, "rollout_schedule": (20_000, 150_000, 1, 15)},
    "Walker2d-v5": MUJOCO | {"target_entropy": -3.0},
    "HalfCheetah-v5": MUJOCO
    | {"total_timesteps": 400_000, "target_entropy": -3.0, "updates_per_step": 40, "checkpoint_every": 400},
    "Ant-v5": MUJOCO | {"target_entropy": -4.0, "rollout_schedule": (20_000, 100_000, 1, 25), "env_kwargs": FORCES},
    "Humanoid-v5": MUJOCO
    | {"target_entropy": -2.0, "rollout_schedule": (20_000, 300_000, 1, 25), "env_kwargs": FORCES_AND_MASSES}
    | {"hidden": (400, 400, 400, 400), "train_every": 1_000, "keep_trainings": 5},
}


# Dimensions of the tensors: E members of the ensemble, G of them in use, B rows for each, N rows of the data, A
# action_size.
Layers = list[Tensor]  # of G networks: weight (G, in, out), bias (G, 1, out), weight, bias, ...


def new_layers(count: int, sizes: Sequence[int], generator: torch.Generator) -> nn.ParameterList:
    """The layers of `count` networks, with the initial weights of the authors' code of PETS and MBPO."""
    layers = nn.ParameterList()
    for fan_in, fan_out in itertools.pairwise(sizes):
        std, weight = 1 / (2 * math.sqrt(fan_in)), torch.empty(count, fan_in, fan_out, device=generator.device)
        layers.append(nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator))
        layers.append(torch.zeros(count, 1, fan_out, device=generator.device))
    return layers


def mlp(x: Tensor, layers: Layers) -> Tensor:
    """(G, B, in) -> (G, B, out): G networks at once, each layer one batched matrix product."""
    *hidden, (weight, bias) = zip(layers[::2], layers[1::2], strict=True)
    for hidden_weight, hidden_bias in hidden:
        x = F.silu(torch.baddbmm(hidden_bias, x, hidden_weight))  # (G, B, hidden)
    return torch.baddbmm(bias, x, weight)


class Ensemble(nn.Module):
    """E members, each of two networks: the dynamics, from (obs, action) to a Gaussian over delta obs; and the outcome,
    from (delta obs, action, next obs) to the reward and the logit of termination. These often jump at a boundary, which
    is sharp in the next obs and blurred in the one before.

    Inputs and targets are standardised. What is constant in the data is scaled to zero and predicted without error.
    """

    def __init__(self, obs_size: int, action_size: int, args: Args, generator: torch.Generator):
        super().__init__()
        members, device = args.ensemble_size, generator.device
        self.dynamics = new_layers(members, (obs_size + action_size, *args.hidden, 2 * obs_size), generator)
        self.outcome = new_layers(members, (obs_size + action_size + obs_size, 64, 64, 2), generator)
        self.max_logvar = nn.Parameter(torch.full((obs_size,), 0.5, device=device))
        self.min_logvar = nn.Parameter(torch.full((obs_size,), -10.0, device=device))
        self.sizes = {"obs": obs_size, "action": action_size, "delta": obs_size, "reward": 1, "terminated": 1}
        for name, size in self.sizes.items():
            self.register_buffer(f"{name}_mean", torch.zeros(size, device=device))
            self.register_buffer(f"{name}_std", torch.ones(size, device=device))
            self.register_buffer(f"{name}_inverse", torch.ones(size, device=device))  # 1 / std, or 0 where that is 0
        self.register_buffer("elites", torch.arange(args.num_elites, device=device))
        self.reward_fn, self.termination_fn = load_function(args.reward_fn), load_function(args.termination_fn)

    def set_scale(self, data: dict[str, Tensor]) -> None:
        """Takes means and standard deviations from columns (N, size)."""
        for name in self.sizes:  # of obs also the last ones of episodes, which alone may show a flag
            values = torch.cat([data["obs"], data["obs"] + data["delta"]]) if name == "obs" else data[name]
            std = values.std(0, correction=0)
            std = torch.where(std <= 1e-6 * values.abs().amax(0) + 1e-12, 0.0, std)  # no more than rounding
            getattr(self, f"{name}_mean").copy_(values.mean(0))
            getattr(self, f"{name}_std").copy_(std)
            getattr(self, f"{name}_inverse").copy_(torch.where(std > 0, 1 / std, 0.0))

    def standardise(self, name: str, values: Tensor) -> Tensor:
        return (values - getattr(self, f"{name}_mean")) * getattr(self, f"{name}_inverse")

    def select(self, members: Tensor) -> tuple[Layers, Layers]:
        """The dynamics and outcome networks of some members (G,), in a layout that makes narrow last layers faster."""
        return tuple([layer[members].mT.contiguous().mT for layer in part] for part in (self.dynamics, self.outcome))

    def gaussian(self, obs: Tensor, action: Tensor, dynamics: Layers) -> tuple[Tensor, Tensor]:
        """obs (G, B, obs_size), action (G, B, A) -> mean and log variance (G, B, obs_size) of standardised delta."""
        x = torch.cat([self.standardise("obs", obs), self.standardise("action", action)], dim=-1)
        mean, logvar = mlp(x, dynamics).chunk(2, dim=-1)
        logvar = self.max_logvar - F.softplus(self.max_logvar - logvar)  # PETS, appendix A.1: soft bounds,
        logvar = self.min_logvar + F.softplus(logvar - self.min_logvar)  # the upper one first
        return mean, logvar

    def predict(self, obs: Tensor, action: Tensor, dynamics: Layers) -> tuple[Tensor, Tensor]:
        """As `gaussian`, but mean and standard deviation of delta in the environment's units."""
        mean, logvar = self.gaussian(obs, action, dynamics)
        return mean * self.delta_std + self.delta_mean, (0.5 * logvar).exp() * self.delta_std

    def judge(self, obs: Tensor, action: Tensor, delta: Tensor, outcome: Layers) -> tuple[Tensor, Tensor]:
        """Steps (G, B, size) -> standardised reward and logit of termination (G, B, 1): what the network says is added
        to the logit of the share of terminations in the data."""
        parts = {"delta": delta, "action": action, "obs": obs + delta}
        x = torch.cat([self.standardise(name, part) for name, part in parts.items()], dim=-1)
        reward, logit = mlp(x, outcome).chunk(2, dim=-1)
        return reward, logit + self.terminated_mean.logit(eps=1e-6)

    def reward_and_end(self, obs: Tensor, action: Tensor, delta: Tensor, outcome: Layers) -> tuple[Tensor, Tensor]:
        """Steps (G, B, size) -> rewards, and probabilities that the episode ends with the step, (G, B)."""
        if self.reward_fn is None or self.termination_fn is None:
            reward, logit = self.judge(obs, action, delta, outcome)
            reward, end = (reward * self.reward_std + self.reward_mean).squeeze(-1), logit.sigmoid().squeeze(-1)
        if self.reward_fn is not None:
            reward = self.reward_fn(obs, action, obs + delta).view(obs.shape[:-1])
        if self.termination_fn is not None:
            end = self.termination_fn(obs, action, obs + delta).view(obs.shape[:-1]).float()
        return reward, end


def dynamics_losses(model: Ensemble, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """For each member, (E,), means over rows and dimensions of `batch`, whose tensors are (E, B, size): negative log
    likelihood of delta obs (PETS, equation 1, without its constant), and squared error of the mean."""
    mean, logvar = model.gaussian(batch["obs"], batch["action"], list(model.dynamics))
    squared = (mean - model.standardise("delta", batch["delta"])) ** 2
    return (squared * (-logvar).exp() + logvar).mean((1, 2)), squared.mean((1, 2))


def outcome_losses(model: Ensemble, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The same for the squared error of the reward and the cross-entropy of termination, each row with its `weight`."""
    reward, logit = model.judge(batch["obs"], batch["action"], batch["delta"], list(model.outcome))
    squared = (reward - model.standardise("reward", batch["reward"])) ** 2
    cross_entropy = F.binary_cross_entropy_with_logits(logit, batch["terminated"], reduction="none")
    return (batch["weight"] * squared).mean((1, 2)), (batch["weight"] * cross_entropy).mean((1, 2))


def ensemble_loss(model: Ensemble, batch: dict[str, Tensor], drawn: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What an update lowers, besides the weight decay: the losses of all members, of the dynamics on `batch`, of the
    outcome on `drawn`, and the pull on the bounds of the variance (PETS, A.1). Returns the outcome's mean as well."""
    outcome_loss = sum(outcome_losses(model, drawn))
    loss = (dynamics_losses(model, batch)[0] + outcome_loss).sum()
    return loss + 0.01 * (model.max_logvar.sum() - model.min_logvar.sum()), outcome_loss.detach().mean()


def ensemble_optimizer(model: Ensemble, args: Args) -> torch.optim.Optimizer:
    """Adam, with a decay that adds half the factor times the squared weights to the loss (unlike AdamW's). The outcome
    networks, which must fit what is rare in few updates, take larger steps; their biases decay as well."""
    decays = zip(model.dynamics[::2], args.weight_decay, strict=True)
    groups = [{"params": [weight], "weight_decay": factor} for weight, factor in decays]
    groups += [{"params": [*model.dynamics[1::2], model.max_logvar, model.min_logvar]}]
    groups += [{"params": list(model.outcome), "weight_decay": 1e-4, "lr": 3 * args.model_lr}]
    return torch.optim.Adam(groups, lr=args.model_lr, fused=True)


def fit(
    model: Ensemble, optimizer: torch.optim.Optimizer, data: "Buffer", args: Args, generator: torch.Generator
) -> dict[str, float]:
    """Trains the ensemble until, for more than `patience` epochs, no dynamics network has lowered its squared error on
    the hold-out set (MBPO's code; a variance that is still off must not decide), nor the outcome its training loss.
    Each dynamics network is left with its best weights.

    Rewards and ends that matter may be so rare that none is held out. So the outcome networks keep their last weights,
    and half of their rows are drawn for how unusual reward and end are; in the loss these weigh by as much less
    (importance sampling), so that an end is not expected more often than it comes.
    """
    held_out = data.columns()["holdout"][:, 0] > 0
    seen, members, device = (~held_out).nonzero()[:, 0], args.ensemble_size, held_out.device
    train, holdout, size = data.columns(seen), data.columns(held_out if held_out.any() else seen), len(seen)
    holdout = {name: column.expand(members, -1, -1) for name, column in holdout.items()}
    model.set_scale(train)
    unusual = sum(model.standardise(name, train[name]).abs()[:, 0] for name in ("reward", "terminated"))  # (N,)
    density = 1 + unusual / unusual.mean().clamp_min(1e-9)
    weight = density.mean() / density[:, None]
    batch_size = min(args.model_batch_size, max(32, size // 16), size)
    batches = min(size // batch_size, args.max_updates)  # in an epoch
    # The bootstrap: every dynamics network has rows of its own, drawn with replacement.
    rows = seen[torch.randint(size, (members, batches * batch_size), generator=generator, device=device)]
    best_error, best_loss, best_layers, stale, updates = math.inf, math.inf, copy.deepcopy(model.dynamics), 0, 0
    while stale <= args.patience and updates < args.max_updates:
        shuffled = rows.gather(1, torch.rand(rows.shape, generator=generator, device=device).argsort(1))
        drawn = density.multinomial(rows.numel(), replacement=True, generator=generator).view_as(rows)
        outcome_loss = 0.0
        for batch, other in zip(shuffled.split(batch_size, dim=1), drawn.split(batch_size, dim=1), strict=True):
            drawn_rows = data.columns(seen[other]) | {"weight": weight[other]}  # (E, B, width)
            loss, of_outcome = ensemble_loss(model, data.columns(batch), drawn_rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            outcome_loss += of_outcome / batches
        updates += batches
        with torch.no_grad():
            error = dynamics_losses(model, holdout)[1]  # (E,)
            improved, fell = error < 0.99 * best_error, outcome_loss < 0.97 * best_loss  # the latter is noisier
            best_error, best_loss = torch.where(improved, error, best_error), torch.where(fell, outcome_loss, best_loss)
            for best_layer, layer in zip(best_layers, model.dynamics, strict=True):
                best_layer[improved] = layer[improved]
        stale = 0 if improved.any() or fell else stale + 1

    model.dynamics.load_state_dict(best_layers.state_dict())
    model.elites.copy_(best_error.argsort()[: len(model.elites)])
    logs = {"model/holdout_mse": best_error.mean().item(), "model/updates": float(updates)}
    return logs | {"losses/model_loss": loss.item() / members, "losses/outcome_loss": best_loss.item()}


class Buffer:
    """All real steps, the rows of a table that doubles when it is full. A column is (size, width)."""

    def __init__(self, device: torch.device, **widths: int):
        self.widths, self.size, self.table = widths, 0, torch.zeros(1024, sum(widths.values()), device=device)

    def columns(self, rows: Tensor | slice = slice(None)) -> dict[str, Tensor]:
        """Columns of all steps, or of some (..., width)."""
        return dict(zip(self.widths, self.table[: self.size][rows].split(list(self.widths.values()), -1), strict=True))

    def add(self, **row: Any) -> None:
        if self.size == len(self.table):
            self.table = torch.cat([self.table, torch.zeros_like(self.table)])
        self.size += 1
        for name, column in self.columns().items():
            column[-1] = torch.as_tensor(row[name])

    def state_dict(self) -> dict:
        return {"table": self.table[: self.size].clone()}

    def load_state_dict(self, state: dict) -> None:
        self.size = len(state["table"])
        self.table = torch.cat([state["table"].to(self.table.device), self.table[self.size :]])


class Pool:
    """D_model: imagined transitions, a ring in which new ones replace the oldest."""

    def __init__(self, obs_size: int, action_size: int, device: torch.device):
        self.size = self.position = 0
        # goes_on: 0 where the step terminated, else 1; weight: in the critics' loss.
        widths = {"obs": obs_size, "action": action_size, "reward": 1, "next_obs": obs_size, "goes_on": 1, "weight": 1}
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
        return copy.deepcopy(vars(self))

    def load_state_dict(self, state: dict) -> None:
        self.size, self.position = state["size"], state["position"]
        self.columns = {name: state["columns"][name].to(column, copy=True) for name, column in self.columns.items()}


def rollout_length(step: int, schedule: tuple[int, int, int, int]) -> int:
    """Linear between two steps (MBPO, appendix C), rounded down."""
    first, last, shortest, longest = schedule
    share = min(max((step - first) / (last - first), 0), 1)
    return int(shortest + share * (longest - shortest))


class Planner:
    """Branched rollouts (MBPO, algorithm 2). MBPO plans in the background, as Dyna does: the model makes transitions,
    from which the actor-critic learns."""

    def __init__(self, model: Ensemble, actor: "Actor", args: Args, generator: torch.Generator):
        self.model, self.actor, self.args, self.generator = model, actor, args, generator
        # Rows at once: on a CPU so many that what they need stays in the cache of a core.
        self.chunk = 4096 if generator.device.type == "cpu" else 2**20

    def step(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step from obs (B, obs_size) by action (B, A): next obs (B, obs_size), reward (B, 1), terminated (B, 1).

        Each row is predicted by an elite of its own, drawn anew, and by no other: rows of one elite go together.
        """
        model, count, drawn = self.model, len(obs), {"generator": self.generator, "device": obs.device}
        draw, noise = torch.randint(len(model.elites), (count,), **drawn), torch.randn(obs.shape, **drawn)
        next_obs, reward, end = torch.empty_like(obs), obs.new_empty(count, 1), obs.new_empty(count, 1)
        for index, elite in enumerate(model.elites):
            dynamics, outcome = model.select(elite[None])
            for rows in (draw == index).nonzero()[:, 0].split(self.chunk):
                before, act = obs[rows][None], action[rows][None]  # (1, R, size)
                mean, std = model.predict(before, act, dynamics)
                delta = mean + std * noise[rows]
                next_obs[rows] = (before + delta)[0]
                reward[rows, 0], end[rows, 0] = (x[0] for x in model.reward_and_end(before, act, delta, outcome))
        return next_obs, reward, torch.rand(count, 1, **drawn) < end

    def disagreement(self, obs: Tensor, action: Tensor) -> Tensor:
        """(B, 1): standard deviation of the elites' means, divided by that of a step's change in the data, averaged
        over dimensions. (On the pendulum after 3,000 steps its median is about 0.01, and it is nowhere above 0.15.)"""
        model, parts = self.model, []
        dynamics, count = model.select(model.elites)[0], len(model.elites)
        for before, act in zip(obs.split(self.chunk), action.split(self.chunk), strict=True):
            mean, _ = model.gaussian(before.expand(count, -1, -1), act.expand(count, -1, -1), dynamics)
            spread = mean.std(0, correction=0) * (model.delta_std > 0)  # what never changes is predicted without error
            parts.append(spread.mean(1, keepdim=True))
        return torch.cat(parts)

    @torch.inference_mode()
    def imagine(self, obs: Tensor, length: int) -> Iterator[dict[str, Tensor]]:
        """Yields, for each of `length` steps, the transitions of those rollouts from obs (B, obs_size) that have not
        terminated before, nor reached where the ensemble disagrees too much."""
        args, actor = self.args, self.actor
        for _ in range(length):
            noise = torch.randn(len(obs), actor.action_size, generator=self.generator, device=obs.device)
            parts = zip(obs.split(self.chunk), noise.split(self.chunk), strict=True)
            action = torch.cat([actor.sample(part, part_noise)[0] for part, part_noise in parts])
            weight = torch.ones(len(obs), 1, device=obs.device)
            if args.max_disagreement is not None or args.weigh_disagreement:
                spread = self.disagreement(obs, action)
                if args.weigh_disagreement:
                    weight = 1 / (1 + spread)
                if args.max_disagreement is not None:
                    trusted = (spread < args.max_disagreement)[:, 0]
                    obs, action, weight = obs[trusted], action[trusted], weight[trusted]
            if len(obs) == 0:
                return
            next_obs, reward, terminated = self.step(obs, action)
            rows = {"obs": obs, "action": action, "reward": reward, "next_obs": next_obs}
            yield rows | {"goes_on": 1 - terminated.float(), "weight": weight}
            obs = next_obs[~terminated[:, 0]]


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


def critic_loss(actor, critics, targets, batch: dict[str, Tensor], noise: Tensor, alpha, gamma, generator) -> Tensor:
    """Soft Bellman error, summed over both critics (Haarnoja et al. 2018, equation 5). The columns of `batch` are
    (B, width), `goes_on` is 0 where a step terminated; `noise` is standard normal, (B, A)."""
    with torch.no_grad():
        next_action, log_prob = actor.sample(batch["next_obs"], noise)
        next_value = torch.min(*(target(batch["next_obs"], next_action, generator) for target in targets))
        wanted = batch["reward"] + gamma * batch["goes_on"] * (next_value - alpha * log_prob)
    errors = [critic(batch["obs"], batch["action"], generator) - wanted for critic in critics]
    return sum(0.5 * (batch["weight"] * error**2).mean() for error in errors)


def actor_loss(actor, critics, obs: Tensor, noise: Tensor, alpha, generator) -> tuple[Tensor, Tensor]:
    """The loss (Haarnoja et al. 2018, equation 7), and an estimate of the policy's entropy, from obs (B, obs_size) and
    standard normal `noise` (B, A)."""
    action, log_prob = actor.sample(obs, noise)
    value = torch.min(*(critic(obs, action, generator) for critic in critics))
    return (alpha * log_prob - value).mean(), -log_prob.mean().detach()


class Agent:
    """Soft actor-critic that learns mostly from its model. Inside, actions are in [-1, 1], as in the authors' code: the
    entropy of actions in the environment's units differs by a constant, by which the target would have to be shifted.
    """

    parts = ("model", "actor", "critics", "targets", "data", "pool")  # of a checkpoint, besides
    parts += ("model_optimizer", "actor_optimizer", "critic_optimizer", "alpha_optimizer")

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        check_spaces(observation_space, action_space)
        self.args, self.device, self.action_space = args, find_device(args), action_space
        obs_size, action_size = math.prod(observation_space.shape), math.prod(action_space.shape)
        low, high = self.tensor(action_space.low)[0], self.tensor(action_space.high)[0]
        self.middle, self.half_range = (high + low) / 2, (high - low) / 2
        self.generator = torch.Generator(self.device).manual_seed(seed_of(args.seed, 0))

        self.actor = Actor(obs_size, action_size, args, self.generator)
        self.critics = nn.ModuleList(Critic(obs_size, action_size, args, self.generator) for _ in range(2))
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = torch.zeros((), device=self.device, requires_grad=True)
        self.target_entropy = -action_size / 2 if args.target_entropy is None else args.target_entropy
        self.model = Ensemble(obs_size, action_size, args, self.generator)
        adam = functools.partial(torch.optim.Adam, fused=True)
        self.actor_optimizer = adam(self.actor.parameters(), lr=args.policy_lr)
        self.critic_optimizer = adam(self.critics.parameters(), lr=args.policy_lr)
        self.alpha_optimizer = adam([self.log_alpha], lr=args.policy_lr)
        self.model_optimizer = ensemble_optimizer(self.model, args)
        for name in ("reward_fn", "termination_fn"):
            if function := getattr(self.model, name):
                setattr(self.model, name, functools.partial(in_units, function, self.middle, self.half_range))

        self.data = Buffer(self.device, **self.model.sizes, holdout=1)
        self.pool = Pool(obs_size, action_size, self.device)
        self.planner = Planner(self.model, self.actor, args, self.generator)
        self.trained_at, self.logs, self.losses = 0, {}, {}

    def tensor(self, values: Any) -> Tensor:
        """One observation or action of the environment as (1, size), in single precision."""
        return torch.as_tensor(np.asarray(values, np.float32).reshape(1, -1), device=self.device)

    def to_env(self, action: Tensor) -> np.ndarray:
        """One action (A,) in [-1, 1] as the environment wants it."""
        space = self.action_space
        values = (self.middle + self.half_range * action).detach().cpu().numpy()
        return values.reshape(space.shape).astype(space.dtype).clip(space.low, space.high)

    def act(self, obs: Any) -> np.ndarray:
        """An action of the policy, drawn; before `learning_starts` steps, a uniformly random one."""
        size = self.actor.action_size
        if self.data.size < self.args.learning_starts:
            return self.to_env(torch.rand(size, generator=self.generator, device=self.device) * 2 - 1)
        noise = torch.randn(1, size, generator=self.generator, device=self.device)
        return self.to_env(self.actor.sample(self.tensor(obs), noise)[0][0])

    def observe(self, obs, action, reward: float, next_obs, terminated: bool, truncated: bool = False) -> None:
        """Stores one real step; whether it is held out from the model's training is drawn here, once and for all. That
        an episode was truncated changes nothing: its last state has a value."""
        action = (self.tensor(action)[0] - self.middle) / self.half_range
        # The difference of close numbers is taken before they are rounded to single precision.
        before, after = (np.asarray(values, np.float64).reshape(-1) for values in (obs, next_obs))
        row = {"obs": before, "action": action, "reward": reward, "delta": after - before, "terminated": terminated}
        # Of much data ever fewer rows are held out (MBPO: at most 5,000), and never the first.
        ratio = min(self.args.holdout_ratio, 5_000 / (self.data.size + 1)) * (self.data.size > 0)
        self.data.add(**row, holdout=torch.rand((), generator=self.generator, device=self.device) < ratio)
        last = self.data.columns(slice(-1, None))
        for name, function in (("reward", self.model.reward_fn), ("terminated", self.model.termination_fn)):
            if function is not None:  # what it says, instead of what the environment said
                last[name][:, 0] = function(last["obs"], last["action"], last["obs"] + last["delta"])

    def update(self, say: Callable[[str], Any] = str) -> None:
        """After each environment step: the model when it is time, then the updates of the actor-critic. `say` is told
        when something begins that takes seconds, and "" when it ends."""
        args, size = self.args, self.data.size
        if size < args.learning_starts:
            return
        if args.real_ratio < 1 and (not self.trained_at or size - self.trained_at >= args.train_every):
            say("training the model")
            self.train_model()
            say("")
        batches = self.batches(args.updates_per_step)
        for index in range(args.updates_per_step):
            self.update_policy({name: column[index] for name, column in batches.items()})

    def train_model(self) -> None:
        """Trains the ensemble and fills the pool."""
        args, size, generator = self.args, self.data.size, self.generator
        self.logs |= fit(self.model, self.model_optimizer, self.data, args, generator)
        self.trained_at = size
        length = rollout_length(size - args.learning_starts, args.rollout_schedule)
        self.pool.resize(length * args.rollouts * args.keep_trainings)
        rows = torch.randint(size, (args.rollouts,), generator=generator, device=self.device)
        obs = self.data.columns(rows)["obs"]
        made, ended = 0, 0.0
        for rows in self.planner.imagine(obs, length):
            self.pool.add(rows)
            made, ended = made + len(rows["obs"]), ended + (1 - rows["goes_on"]).sum().item()
        self.logs |= {
            "planner/rollout_length": made / args.rollouts,
            "planner/imagined_terminations": ended / max(made, 1),
            "planner/pool_size": self.pool.size,
        }

    def batches(self, count: int) -> dict[str, Tensor]:
        """Transitions for so many updates, (count, batch_size, width), drawn at once."""
        args, data, pool = self.args, self.data, self.pool
        after, share = data.size - args.learning_starts, args.real_ratio
        if after < args.real_ratio_steps:
            share = 1 - (1 - args.real_ratio) * after / args.real_ratio_steps
        num_real = int(args.batch_size * share) if pool.size else args.batch_size
        rows = torch.randint(data.size, (count, num_real), generator=self.generator, device=self.device)
        step = data.columns(rows)
        real = {name: step[name] for name in ("obs", "action", "reward")}
        real |= {"next_obs": step["obs"] + step["delta"], "goes_on": 1 - step["terminated"]}
        real["weight"] = torch.ones_like(real["reward"])
        if num_real == args.batch_size:
            return real
        shape = (count, args.batch_size - num_real)
        rows = torch.randint(pool.size, shape, generator=self.generator, device=self.device)
        return {name: torch.cat([column, pool.columns[name][rows]], dim=1) for name, column in real.items()}

    def update_policy(self, batch: dict[str, Tensor]) -> None:
        """One update of critics, actor, temperature and targets (Haarnoja et al. 2018, algorithm 1)."""
        args, alpha = self.args, self.log_alpha.exp().detach()
        shape = (2, args.batch_size, self.actor.action_size)
        next_noise, noise = torch.randn(shape, generator=self.generator, device=self.device)
        generator = self.generator if args.critic_dropout else None
        of_critics, of_actor = compiled(critic_loss, args.compile), compiled(actor_loss, args.compile)

        loss = of_critics(self.actor, self.critics, self.targets, batch, next_noise, alpha, args.gamma, generator)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()

        policy_loss, entropy = of_actor(self.actor, self.critics, batch["obs"], noise, alpha, generator)
        self.actor_optimizer.zero_grad()
        policy_loss.backward(inputs=list(self.actor.parameters()))  # and not the critics'
        self.actor_optimizer.step()

        self.log_alpha.grad = entropy - self.target_entropy  # of the loss log_alpha * (entropy - target)
        self.alpha_optimizer.step()

        with torch.no_grad():
            for target, parameter in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
                target.lerp_(parameter, args.tau)
        self.losses = {"critic_loss": loss, "actor_loss": policy_loss, "entropy": entropy, "alpha": alpha}
        self.losses = {name: loss.detach() for name, loss in self.losses.items()}

    def greedy_policy(self, seed: int) -> Callable[..., np.ndarray]:
        """A policy (observation -> action) for one episode, which does not touch the agent: tanh of the mean."""
        return lambda obs, info=None: self.to_env(self.actor(self.tensor(obs))[0][0].tanh())

    def metrics(self) -> dict[str, float]:
        """What is new since the last call, by TensorBoard tag."""
        new = self.logs | {f"losses/{name}": value.item() for name, value in self.losses.items()}
        self.logs, self.losses = {}, {}
        return new

    def state_dict(self) -> dict:
        """All that the next step depends on, as tensors and plain values."""
        return {name: getattr(self, name).state_dict() for name in self.parts} | {
            "log_alpha": self.log_alpha.detach().clone(),
            "generator": {self.device.type: self.generator.get_state()},
            "trained_at": self.trained_at,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` gave into a newly made agent."""
        for name in self.parts:
            getattr(self, name).load_state_dict(state[name])
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
        if self.device.type in state["generator"]:  # on another kind of device, random numbers start afresh
            self.generator.set_state(state["generator"][self.device.type])
        self.trained_at = state["trained_at"]


def train(args: Args, make: Callable[..., gym.Env] | None = None) -> dict:
    """MBPO, algorithm 2; returns what is in result.json. `make(render_mode=None)` makes an environment that is not
    registered."""
    make = make or functools.partial(make_env, args)
    env = make()
    agent = Agent(env.observation_space, env.action_space, args)
    episode = Episode(env, args.seed, 1)
    run = Run(args, agent, [episode], make)
    say = run.bar.set_description_str  # what goes on
    say("random steps" if run.step < args.learning_starts else "")
    for step in run.steps():
        obs = episode.obs
        action = agent.act(obs)
        next_obs, reward, terminated, truncated = episode.step(action)
        agent.observe(obs, action, reward, next_obs, terminated, truncated)
        if step == args.learning_starts:
            say("")
        agent.update(say)
        if terminated or truncated:
            run.log({"charts/episodic_return": episode.episodic_return, "charts/episodic_length": len(episode.actions)})
            episode.reset()
    return run.result


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing: the same in every script. Nothing of MBPO is below this line.
# ---------------------------------------------------------------------------------------------------------------------
SCRIPT, CHECKPOINT = "mbpo", "checkpoint.pt"
MUTABLE = "total_timesteps, eval_every, eval_episodes, checkpoint_every, capture_video, device, threads, compile"


class Failure(Exception):
    """Something that the user can fix: `main` prints it as one line and exits with status 2."""


def seed_of(*key: int) -> int:
    """A seed of (the run's seed, purpose, number); purposes: 0 agent, 1 training, 2 evaluation, 3 acting in it."""
    return int(np.random.SeedSequence(key).generate_state(1)[0] >> 1)  # below 2**31: it fits a C int


def make_env(args: Args, **drawing: str) -> gym.Env:
    """The environment that `args` name; `drawing` is empty or a render_mode, which not every environment has."""
    return gym.make(args.env_id, **drawing, **args.env_kwargs)


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
# The script's own: spaces, device, functions that are given.
# ---------------------------------------------------------------------------------------------------------------------
def check_spaces(observation_space: gym.Space, action_space: gym.Space) -> None:
    """Raises Failure for spaces that this script does not handle."""
    if not isinstance(observation_space, gym.spaces.Box) or math.prod(observation_space.shape) > 1_000:
        others = "pictures: muzero.py, dreamer.py; Dict: dreamer.py; finite ones: dyna_q.py"
        raise Failure(f"observations must be a Box of up to 1,000 numbers, not {observation_space}; {others}")
    box = isinstance(action_space, gym.spaces.Box) and action_space.dtype.kind == "f"
    widths = np.subtract(action_space.high, action_space.low, dtype=np.float32) if box else np.array(0)
    if not ((widths > 0) & np.isfinite(widths)).all():
        others = "Discrete: cem_mpc.py, muzero.py, dreamer.py"
        raise Failure(f"actions must be a bounded Box of floating-point numbers, not {action_space}; {others}")


def find_device(args: Args) -> torch.device:
    """The device that `args` name; `auto`: a GPU where there is one."""
    torch.set_num_threads(args.threads)
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(name for name in usable if usable[name]) if args.device == "auto" else args.device
    if not usable[name]:
        raise Failure(f"--device {name}: there is none that PyTorch can use")
    return torch.device(name)


@functools.cache
def compiled(function: Callable, wanted: bool) -> Callable:
    """The function, compiled where that is wanted. (An agent that kept what is compiled could not be pickled.)"""
    return torch.compile(function) if wanted else function


def load_function(name: str | None) -> Callable | None:
    """The function named as `module:function`."""
    module, _, function = (name or "").partition(":")
    return getattr(importlib.import_module(module), function) if name else None


def in_units(
    function: Callable, middle: Tensor, half_range: Tensor, obs: Tensor, action: Tensor, next_obs: Tensor
) -> Tensor:
    """What a given function says of steps, which wants actions in the environment's units."""
    return function(obs, middle + half_range * action, next_obs)


if __name__ == "__main__" and "__file__" in globals():  # which a notebook has not
    main()
