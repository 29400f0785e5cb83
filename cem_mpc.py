# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.4", "numpy>=2.0", "gymnasium>=1.2", "tyro>=0.9", "tensorboard>=2.18", "pillow>=10.1",
#                 "tqdm>=4.66"]
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

What differs from the authors' code, kchua/handful-of-trials, but for settings, of which the fields name theirs:

    - Rewards and terminations are learned, so that an environment is all that is needed; an end counts by its
      probability. (Theirs are given, and observations are prepared for the task.) Actions may be Discrete.
    - By default a search imagines 960 sequences for an action, counting particles, and not 40,000.
    - Targets are standardised like inputs. Trainings stop early, by a hold-out set for the dynamics (MBPO).
    - Where a plan is too short to see what matters (CartPole-v1, InvertedPendulum-v5, Acrobot-v1), a learned value,
      pessimistic where it is not sure, is added at its end: `--terminal-value`.

Expect, of each seed over 5 episodes (Reacher-v5: 20), with minutes on a core (where they are a range, under load):
    environment          steps  returns                                               minutes
    Pendulum-v1          1,000  -99, -150, -152, -182, -184 (mean: -153)              2
    Reacher-v5           1,000  -5.6, -6.9, -8.2 (mean: -6.9)                         6 to 10
    InvertedPendulum-v5  3,000  1000, 1000, 1000, 1000, 1000, the maximum             18 to 23
    CartPole-v1          2,000  500, the maximum (5 of 5 seeds, from 1,000 on)        16 to 26
    Acrobot-v1           2,000  -76, -79, -80, -80, -89 (mean: -81)                   7 to 14
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
    """PETS: model-predictive control with a probabilistic ensemble (Chua et al. 2018)."""

    env_id: str = "Pendulum-v1"  # Gymnasium id, or module:Name-v0
    env_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)  # gym.make's: name value
    total_timesteps: int = 1_000  # environment steps to learn for
    seed: int = 1  # of every random draw
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where the networks are; auto: a GPU where there is one
    threads: int = 1  # CPU threads; two runs side by side get more done than one with two threads
    compile: bool = False  # compile what the planner imagines, which changes nothing but speed and rounding; for GPUs
    eval_every: int = 1_000  # environment steps between two evaluations of the greedy policy
    eval_episodes: int = 5  # episodes of an evaluation
    checkpoint_every: int = 100  # environment steps between two checkpoints
    run_dir: str = "runs"  # folder in which the run's own folder is made
    resume: str | None = None  # run folder to continue exactly where its last checkpoint was written
    evaluate: str | None = None  # run folder whose agent to evaluate, without learning
    capture_video: bool = False  # record the first episode of each evaluation as a GIF in the run folder

    init_from: str | None = None  # run folder whose model and data to start from, also with --total-timesteps 0
    reward_fn: str | None = None  # module:function of tensors obs, action, next_obs (..., size) to (...); None: learned
    termination_fn: str | None = None  # module:function, called in the same way: a tensor of bool; None: learned
    learning_starts: int = 200  # steps with uniformly random actions before anything is learned (PETS: one trial)
    gamma: float = 0.99  # discount factor of imagined rewards (PETS: 1)

    ensemble_size: int = 5  # networks in the ensemble (PETS: 5, MBPO: 7)
    num_elites: int = 5  # networks in use, those with the lowest hold-out error (PETS: all, MBPO: 5 of 7)
    hidden: tuple[int, ...] = (128, 128)  # units of each hidden layer of the dynamics (PETS: 3 of 500, 3 or 4 of 200)
    weight_decay: tuple[float, ...] = (2.5e-5, 5e-5, 1e-4)  # of each layer of the dynamics, on half the squares (MBPO)
    model_lr: float = 1e-3  # step size of Adam for the ensemble (MBPO; PETS: from 7.5e-4 on)
    model_batch_size: int = 256  # a network's batch is a sixteenth of its rows, from 32 to this (MBPO: 256, PETS: 32)
    train_every: int = 100  # environment steps between two trainings of the ensemble (PETS: a trial)
    patience: int = 10  # a training ends when more epochs in a row bring nothing better (MBPO: 5)
    max_updates: int = 1_000  # gradient steps after whose epoch a training ends in any case (PETS: 5 epochs a trial)
    holdout_ratio: float = 0.1  # probability that a step is held out, and no network trained on it (MBPO: 0.2)

    planner: Literal["random_shooting", "cem", "icem", "gradient"] = "cem"  # the search; if Discrete: cem
    horizon: int = 25  # steps imagined (PETS: 25 to 30)
    population: int = 64  # sequences scored in an iteration (PETS: 400 to 500)
    iterations: int = 3  # of the search for each action (PETS: 5; random_shooting: so many populations at once)
    num_best: int = 10  # sequences to which the distribution moves (PETS: a tenth of the population); gradient: ascents
    momentum: float = 0.1  # weight of the old distribution when it moves (PETS: 0.1)
    particles: int = 5  # imagined futures of each sequence, a multiple of num_elites (PETS: 20)
    sampling: Literal["ts1", "tsinf"] = "tsinf"  # a particle keeps its member (tsinf), or gets one anew at every step
    noise_beta: float = 2.0  # icem: exponent of the noise's spectrum; 0 is white, larger smoother (Pinneri et al. 2020)
    terminal_value: bool = False  # add the value of the last imagined state to the return; learned from the real steps

    def __post_init__(self):
        ranges = {"total_timesteps": (0, math.inf), "seed": (0, math.inf), "noise_beta": (0, 10), "model_lr": (1e-9, 1)}
        ranges |= {"gamma": (0, 1), "momentum": (0, 0.999), "holdout_ratio": (0, 0.9)}
        ranges |= {"num_elites": (1, self.ensemble_size), "num_best": (1, self.population)}
        for name, value in vars(self).items():
            low, high = ranges.get(name, (1, math.inf))
            if type(value) in (int, float) and not low <= value <= high:  # so that a NaN is refused, too
                raise Failure(f"--{name.replace('_', '-')} must be from {low} to {high}, not {value}")


# Settings by environment that differ from the defaults; what the command line says wins.
PRESETS: dict[str, dict[str, Any]] = {
    "CartPole-v1": {"total_timesteps": 2_000, "terminal_value": True, "horizon": 15},
    "Acrobot-v1": {"total_timesteps": 2_000, "terminal_value": True},
    "InvertedPendulum-v5": {"total_timesteps": 3_000, "terminal_value": True, "eval_every": 3_000, "planner": "icem"}
    | {"noise_beta": 0.5, "horizon": 15, "population": 100, "iterations": 4},
    "Reacher-v5": {"total_timesteps": 1_000, "eval_episodes": 20, "train_every": 250},
}


# Dimensions of the tensors: E members of the ensemble, G of them in use, B rows for each, N rows of the data or
# sequences, P particles of a sequence, H steps, A action_size.
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


def pessimistic_value(layers: Layers, obs: Tensor) -> Tensor:
    """Standardised observations (..., obs_size) -> (...): the mean of the networks minus two standard deviations. Far
    from the data each says something else, and what is not known must not attract."""
    values = mlp(obs.reshape(1, -1, obs.shape[-1]).expand(len(layers[0]), -1, -1), layers)
    return (values.mean(0) - 2 * values.std(0, correction=0)).view(obs.shape[:-1])


def lambda_returns(data: dict[str, Tensor], next_value: Tensor, gamma: float, trace: float = 0.8) -> Tensor:
    """Of all steps, (N,): G = r + gamma * ((1 - lambda) * V(next obs) + lambda * next G) (Sutton & Barto, exercise
    12.1). A termination ends it; where an episode was truncated or still goes on, V stands for the next G."""
    columns = (data[name].view(-1).tolist() for name in ("reward", "terminated", "last"))
    returns, following = [], 0.0
    for reward, terminated, last, next_v in reversed([*zip(*columns, next_value.tolist(), strict=True)]):
        weight = trace if returns and not last else 0.0
        following = reward + gamma * (1 - terminated) * ((1 - weight) * next_v + weight * following)
        returns.append(following)
    return torch.tensor(returns[::-1], device=next_value.device)


def fit_value(model: Ensemble, buffer: Buffer, gamma: float, generator: torch.Generator) -> tuple[Layers, float]:
    """Networks for V(s), and their loss, from the lambda-returns of all real steps. An expectile of 0.9 follows the
    best that was done in a state, not the average (Kostrikov et al. 2022). Networks are new: those that have followed
    changing targets for long judge unseen states worse (Igl et al. 2021)."""
    data, layers = buffer.columns(), list(new_layers(5, (len(model.obs_mean), 64, 64, 1), generator))
    optimizer = torch.optim.Adam(layers, lr=1e-3, fused=True)
    step = data["obs"], data["action"], data["obs"] + data["delta"]
    for name, function in (("reward", model.reward_fn), ("terminated", model.termination_fn)):
        data[name] = data[name] if function is None else function(*step).float()
    obs, next_obs = model.standardise("obs", step[0]), model.standardise("obs", step[2])
    mean, std = torch.zeros(2, device=obs.device)  # V is 0 in the first round
    for _ in range(20):  # the targets are computed anew in each round
        with torch.no_grad():
            wanted = lambda_returns(data, pessimistic_value(layers, next_obs) * std + mean, gamma)
            mean, std = wanted.mean(), wanted.std(correction=0) + 1e-6
            wanted = ((wanted - mean) / std)[:, None]
        for _ in range(100):
            rows = torch.randint(len(obs), (5, 256), generator=generator, device=obs.device)
            error = wanted[rows] - mlp(obs[rows], layers)
            loss = (torch.where(error > 0, 0.9, 0.1) * error**2).mean((1, 2)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    *layers, weight, bias = (layer.detach() for layer in layers)
    return [*layers, weight * std, bias * std + mean], loss.item() / 5  # in units of return


def imagine(model, networks, obs, plans, noise, permutations, gamma: float, value_layers: Layers) -> Tensor:
    """Trajectory sampling (PETS, section 5.1): expected returns (N,) of action sequences.

    obs (obs_size,), plans (N, H, A) in the environment's units, noise (H, G, N * P / G, obs_size) standard normal. Each
    of the G members of `networks` takes P / G particles of a sequence: for all H steps the same ones (TS infinity), or
    before every step they are dealt out anew (TS1), by `permutations` (H, G, N * P / G) of the members' numbers.
    """
    (dynamics, outcome), (groups, rows) = networks, noise.shape[1:3]
    actions = plans.repeat_interleave(rows // len(plans), dim=0)  # (R, H, A), R = N * P / G
    state = obs.expand(groups, rows, -1)  # (G, R, obs_size)
    alive = torch.ones(groups, rows, device=obs.device)  # the probability that the episode still goes on
    returns = torch.zeros(groups, rows, device=obs.device)
    for step in range(plans.shape[1]):
        if permutations is not None:
            to = permutations[step]
            state = state.gather(0, to[..., None].expand_as(state))
            alive, returns = alive.gather(0, to), returns.gather(0, to)
        action = actions[:, step].expand(groups, -1, -1)
        mean, std = model.predict(state, action, dynamics)
        delta = mean + std * noise[step]
        reward, end = model.reward_and_end(state, action, delta, outcome)
        returns = returns + gamma**step * alive * reward
        alive = alive * (1 - end)
        state = state + delta
    if value_layers:
        returns = returns + gamma ** plans.shape[1] * alive * pessimistic_value(
            value_layers, model.standardise("obs", state)
        )
    return returns.mean(0).view(len(plans), -1).mean(1)


# Planners get `score`, from sequences (N, H, A) of actions in [-1, 1] (Discrete ones: one-hot) to returns (N,), and
# `start` (M, H, A): what they returned for the step before, shifted by one; where an episode begins, the middle of the
# range (equal probabilities). They return sequences, too; of the first of them the first action is taken.
def uniform(count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Random sequences (count, H, A) of actions in [-1, 1]."""
    return torch.rand(count, *like.shape[1:], generator=generator, device=like.device) * 2 - 1


def random_shooting(score: Callable, start: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """The best of population * iterations random sequences."""
    plans = uniform(args.population * args.iterations, start, generator)
    return plans[score(plans).topk(1).indices]


def cem(score: Callable, start: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """Cross-entropy method as in the authors' code: returns the mean of the last distribution, not the best sample."""
    mean, variance = start[0], torch.full_like(start[0], 0.25)  # (range / 4)^2
    for _ in range(args.iterations):
        # At most half the distance to the nearer bound: the samples, cut at two standard deviations, stay inside.
        std = torch.minimum(variance.sqrt(), (1 - mean.abs()) / 2)
        noise = torch.empty(args.population, *mean.shape, device=mean.device)
        plans = mean + std * nn.init.trunc_normal_(noise, a=-2, b=2, generator=generator)
        best = plans[score(plans).topk(args.num_best).indices]
        mean = best.mean(0).lerp(mean, args.momentum)
        variance = best.var(0, correction=0).lerp(variance, args.momentum)
    return mean[None]


def cem_discrete(score: Callable, start: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """Cross-entropy method over one categorical distribution a step; returns their probabilities."""
    probabilities = (start[0] + 1 / start.shape[2]) / 2  # (H, A); half way to uniform: 0 and 1 would end the search
    for _ in range(args.iterations):
        actions = probabilities.multinomial(args.population, replacement=True, generator=generator).T  # (N, H)
        plans = F.one_hot(actions, start.shape[2]).float()
        best = plans[score(plans).topk(args.num_best).indices]
        probabilities = best.mean(0).lerp(probabilities, args.momentum)
    return probabilities[None]


def coloured_noise(shape: tuple[int, ...], beta: float, generator: torch.Generator) -> Tensor:
    """Noise of unit variance (N, H, A) whose power at frequency f along H goes with f^-beta (Pinneri et al. 2020)."""
    frequency = torch.fft.fftfreq(shape[1], device=generator.device).abs().clamp_min(1 / shape[1])[:, None]  # (H, 1)
    scale, white = frequency ** (-beta / 2), torch.randn(shape, generator=generator, device=generator.device)
    return torch.fft.ifft(torch.fft.fft(white, dim=1) * scale, dim=1).real / scale.square().mean().sqrt()


def icem(score: Callable, start: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """Improved CEM (Pinneri et al. 2020, algorithm 1): coloured noise, fewer samples in later iterations, the best
    sequences kept over iterations and steps, the mean as a candidate in the last one. Returns [best, mean, *kept].

    Theirs ends a shifted mean with its last action and shifted sequences with a drawn one, does not score again what an
    iteration keeps for the next, and its noise has up to a fifth more deviation.
    """
    mean, kept = start[1 if len(start) > 1 else 0], start[2:]  # an episode begins with one sequence
    std = torch.full_like(mean, 0.5)
    for iteration in range(args.iterations):
        count = max(2 * args.num_best, int(args.population * 1.25**-iteration))  # their factor of decay
        plans = mean + std * coloured_noise((count, *mean.shape), args.noise_beta, generator)
        last = [mean[None]] if iteration == args.iterations - 1 else []
        plans = torch.cat([plans.clamp(-1, 1), kept, *last])
        best = plans[score(plans).topk(args.num_best).indices]
        kept = best[: int(0.3 * args.num_best)]  # their fraction xi
        mean = best.mean(0).lerp(mean, args.momentum)
        std = best.std(0, correction=0).lerp(std, args.momentum)
    return torch.cat([best[:1], mean[None], kept])


def gradient(score: Callable, start: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """Gradient ascent on the return, through the model, from the last plan and num_best - 1 random sequences."""
    plans = torch.cat([start[:1], uniform(args.num_best - 1, start, generator)]).requires_grad_()
    optimizer = torch.optim.Adam([plans], lr=0.1, maximize=True)  # in units of half the action range
    for _ in range(args.iterations):
        with torch.enable_grad():
            (plans.grad,) = torch.autograd.grad(score(plans).sum(), [plans])
        optimizer.step()
        plans.data.nan_to_num_().clamp_(-1, 1)
    return plans.detach()[score(plans).topk(1).indices]


PLANNERS = {"random_shooting": random_shooting, "cem": cem, "icem": icem, "gradient": gradient}


class Agent:
    """`act` plans, `observe` stores, `update` trains when it is time: in this order, at every step."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        check(observation_space, action_space, args)
        self.args, self.device, self.action_space = args, find_device(args), action_space
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.planner = cem_discrete if self.discrete else PLANNERS[args.planner]
        self.obs_size, self.action_size = gym.spaces.flatdim(observation_space), gym.spaces.flatdim(action_space)
        middle = 1 / self.action_size if self.discrete else 0.0
        self.neutral = torch.full((1, args.horizon, self.action_size), middle, device=self.device)
        low, high = map(self.tensor, (-1, 1) if self.discrete else (action_space.low, action_space.high))
        self.middle, self.half_range = (high + low) / 2, (high - low) / 2
        self.generator = torch.Generator(self.device).manual_seed(seed_of(args.seed, 0))
        self.model = Ensemble(self.obs_size, self.action_size, args, self.generator)
        self.optimizer = ensemble_optimizer(self.model, args)
        self.data = Buffer(self.device, **self.model.sizes, last=1, holdout=1)
        self.start: Tensor | None = None  # what the planner starts from; None: an episode begins
        self.value_layers, self.trained_at, self.logs = [], 0, {}  # the first: once it was learned, if it is wanted

    def act(self, obs: Any) -> Any:
        """The first action of the plan; before `learning_starts` steps, a random one."""
        if self.data.size < self.args.learning_starts:
            return self.to_env(uniform(1, self.neutral, self.generator)[0, 0])  # if Discrete, the largest is the one
        action, self.start = self.plan(obs, self.start, self.generator)
        return action

    def tensor(self, values: Any) -> Tensor:
        """An observation or action of the environment as one row, in single precision."""
        return torch.as_tensor(np.asarray(values, np.float32).reshape(-1), device=self.device)

    def plan(self, obs: Any, start: Tensor | None, generator: torch.Generator) -> tuple[Any, Tensor]:
        """Returns the action, and what to start from at the next step; `start` None: an episode begins."""
        with torch.no_grad() if self.args.planner == "gradient" else torch.inference_mode():  # which autograd refuses
            score = functools.partial(self.score, self.model.select(self.model.elites), self.tensor(obs), generator)
            found = self.planner(score, self.neutral if start is None else start, self.args, generator)
            start = torch.cat([found[:, 1:], self.neutral[:, -1:].expand(len(found), 1, -1)], dim=1)
        return self.to_env(found[0, 0]), start

    def score(self, networks: tuple[Layers, Layers], obs: Tensor, generator: torch.Generator, plans: Tensor) -> Tensor:
        """Expected returns (N,) of sequences (N, H, A) in [-1, 1] or one-hot; what is no number is the worst."""
        args, groups, drawn = self.args, len(self.model.elites), {"generator": generator, "device": self.device}
        shape = (args.horizon, groups, len(plans) * args.particles // groups)
        noise = torch.randn(*shape, self.obs_size, **drawn)
        permutations = torch.rand(shape, **drawn).argsort(1) if args.sampling == "ts1" else None
        sample = compiled(imagine) if args.compile else imagine
        plans = self.middle + self.half_range * plans
        returns = sample(self.model, networks, obs, plans, noise, permutations, args.gamma, self.value_layers)
        return returns.nan_to_num(nan=-1e30, posinf=-1e30, neginf=-1e30)

    def to_env(self, action: Tensor) -> Any:
        """One action (A,) as the environment wants it; of probabilities the most probable."""
        space = self.action_space
        if self.discrete:
            return space.start + int(action.argmax())
        values = (self.middle + self.half_range * action).cpu().numpy()
        return values.reshape(space.shape).astype(space.dtype).clip(space.low, space.high)

    def observe(self, obs, action, reward: float, next_obs, terminated: bool, truncated: bool = False) -> None:
        """Stores one real step; whether it is held out from training is drawn here, once and for all."""
        if self.discrete:
            action = np.eye(self.action_size)[action - self.action_space.start]
        # The difference of close numbers is taken before they are rounded to single precision.
        before, after = (np.asarray(values, np.float64).reshape(-1) for values in (obs, next_obs))
        row = {"obs": before, "action": np.reshape(action, -1), "delta": after - before, "reward": reward}
        row |= {"terminated": terminated, "last": terminated or truncated}
        # Of much data ever fewer rows are held out (MBPO: at most 5,000), and never the first.
        ratio = min(self.args.holdout_ratio, 5_000 / (self.data.size + 1)) * (self.data.size > 0)
        self.data.add(**row, holdout=torch.rand((), generator=self.generator, device=self.device) < ratio)
        if terminated or truncated:
            self.start = None

    def update(self, say: Callable[[str], Any] = str) -> None:
        """Trains the ensemble every `train_every` steps; `say` is told what goes on."""
        if self.data.size < (self.trained_at + self.args.train_every if self.trained_at else self.args.learning_starts):
            return
        say("training the model")
        self.logs |= fit(self.model, self.optimizer, self.data, self.args, self.generator)
        if self.args.terminal_value:
            found = fit_value(self.model, self.data, self.args.gamma, self.generator)
            self.value_layers, self.logs["losses/value_loss"] = found
        self.trained_at = self.data.size
        say("")

    def greedy_policy(self, seed: int) -> Callable[..., Any]:
        """A policy (observation, info -> action) for one episode, which does not touch the agent."""
        start, generator = [None], torch.Generator(self.device).manual_seed(seed)

        def policy(obs: Any, info: dict | None = None) -> Any:
            action, start[0] = self.plan(obs, start[0], generator)
            return action

        return policy

    def metrics(self) -> dict[str, float]:
        """What is new since the last call, by TensorBoard tag."""
        logs, self.logs = self.logs, {}
        return logs

    def state_dict(self) -> dict:
        """All that the next step depends on, as tensors and plain values."""
        return {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "data")} | {
            "generator": {self.device.type: self.generator.get_state()},
            "plain": (self.value_layers, self.start, self.trained_at),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` gave into a newly made agent."""
        for name in ("model", "optimizer", "data"):
            getattr(self, name).load_state_dict(state[name])
        value_layers, start, self.trained_at = state["plain"]
        self.value_layers = [layer.to(self.device) for layer in value_layers]
        self.start = None if start is None else start.to(self.device)
        if self.device.type in state["generator"]:  # on another kind of device, random numbers start afresh
            self.generator.set_state(state["generator"][self.device.type])


def train(args: Args, make: Callable[..., gym.Env] | None = None) -> dict:
    """PETS, algorithm 1; returns what is in result.json. `make(render_mode=None)` makes what is not registered."""
    make = make or functools.partial(make_env, args)
    env = make()
    agent = Agent(env.observation_space, env.action_space, args)
    if args.init_from and not (args.resume and Path(args.resume, CHECKPOINT).exists()):
        init_from(agent, args.init_from, env.observation_space, env.action_space)
    episode = Episode(env, args.seed, 1, *(args.init_from or "").encode())  # not the source's again
    run = Run(args, agent, [episode], make)
    run.bar.set_description_str("random steps" if agent.data.size < args.learning_starts else "")
    if run.step >= args.total_timesteps and not run.result:  # not a single step is asked for
        run.evaluate()
        run.save()
    for _ in run.steps():
        obs = episode.obs
        action = agent.act(obs)
        next_obs, reward, terminated, truncated = episode.step(action)
        agent.observe(obs, action, reward, next_obs, terminated, truncated)
        agent.update(run.bar.set_description_str)
        if terminated or truncated:
            run.log({"charts/episodic_return": episode.episodic_return, "charts/episodic_length": len(episode.actions)})
            episode.reset()
    return run.result


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing: the same in every script. Nothing of PETS is below this line.
# ---------------------------------------------------------------------------------------------------------------------
SCRIPT, CHECKPOINT = "cem_mpc", "checkpoint.pt"
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
# The script's own: what it can be used with, functions of the user, a start from another run.
# ---------------------------------------------------------------------------------------------------------------------
compiled = functools.cache(torch.compile)  # at its first use; an agent that held it could not be copied


def find_device(args: Args) -> torch.device:
    """The device that `args` name; `auto`: a GPU where there is one."""
    torch.set_num_threads(args.threads)
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(name for name in usable if usable[name]) if args.device == "auto" else args.device
    if not usable[name]:
        raise Failure(f"--device {name}: there is none that PyTorch can use")
    return torch.device(name)


def check(observation_space: gym.Space, action_space: gym.Space, args: Args) -> None:
    """Raises Failure for spaces that this script does not handle, and for arguments that do not fit each other."""
    if not isinstance(observation_space, gym.spaces.Box) or math.prod(observation_space.shape) > 1_000:
        others = f"{observation_space}; pictures: muzero.py, dreamer.py; Dict: dreamer.py; finite ones: dyna_q.py"
        raise Failure(f"observations must be a Box of up to 1,000 numbers, not {others}")
    if not isinstance(action_space, gym.spaces.Discrete):
        box = isinstance(action_space, gym.spaces.Box) and action_space.dtype.kind == "f"
        if not box or not np.isfinite(np.subtract(action_space.high, action_space.low, dtype=np.float32)).all():
            raise Failure(f"actions must be Discrete or a bounded Box of floating-point numbers, not {action_space}")
    elif args.planner != "cem":
        raise Failure(f"--planner must be cem for {action_space}")
    if args.particles % args.num_elites:
        raise Failure(f"--particles must be a multiple of --num-elites, which is {args.num_elites}")
    if len(args.weight_decay) != len(args.hidden) + 1 or min(args.hidden, default=1) < 1:
        raise Failure("--weight-decay needs one value more than --hidden, whose values must be at least 1")


def load_function(name: str | None) -> Callable | None:
    """The function named as `module:function`."""
    module, _, function = (name or "").partition(":")
    return getattr(importlib.import_module(module), function) if name else None


def init_from(agent: Agent, folder: str, *spaces: gym.Space) -> None:
    """Takes model and data of another run; the value is learned from the data, for the present task."""
    source = load(folder, *spaces)
    if not source.trained_at:
        raise Failure(f"cannot start from {folder}: it has not trained its model yet")
    agent.trained_at = source.trained_at
    agent.model.load_state_dict(source.model.state_dict())
    agent.data.load_state_dict(source.data.state_dict())
    agent.data.columns()["last"][-1] = 1  # its episode does not go on here
    if agent.args.terminal_value:
        agent.value_layers, _ = fit_value(agent.model, agent.data, agent.args.gamma, agent.generator)


if __name__ == "__main__" and "__file__" in globals():  # which a notebook has not
    main()
