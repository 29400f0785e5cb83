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

    - Rewards and terminations are learned, so that an environment is all that is needed (theirs are given). No
      termination must be overlooked, so they weigh more in training; the price: where episodes end by chance, an end
      is expected far too often, and near a boundary too early, which attracts where rewards are negative.
    - A search imagines 960 sequences for each action, counting particles, and not 40,000; it never stops early.
    - Targets are standardised like inputs. Trainings have a hold-out set and stop early (MBPO, Janner et al. 2019).
    - Where a plan is too short to see what matters (CartPole-v1, InvertedPendulum-v5, Acrobot-v1), a learned value is
      added at its end: `--terminal-value`.

Run:     python cem_mpc.py
         python cem_mpc.py --env-id Reacher-v5       (needs gymnasium[mujoco])
Expect:  returns of each seed over 5 episodes (Reacher-v5: 20), and minutes a seed on one of 2 busy CPU cores, with its
         evaluations (on Pendulum-v1, where a random policy scores about -1,200, every 250 steps).

    environment          steps  returns                                               minutes
    Pendulum-v1          1,000  -99, -147, -153, -154, -185 (mean: -147)              10 to 13; one seed: 34
    Reacher-v5           1,000  -6.6, -7.2, -8.9 (mean: -7.6)                         9 to 12
    InvertedPendulum-v5  2,000  864, 1000, 1000 (1000 is the maximum)                 10 to 11
    CartPole-v1          2,000  500, the maximum (3 of 3 seeds; 494 to 500 at 1,000)  11 to 14
    Acrobot-v1           2,000  -70, -75, -81 (mean: -75; -65 to -92 at 1,000)        16 to 18
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
from typing import Any, Literal, NamedTuple

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
    num_elites: int = 5  # networks that are used, those with the lowest hold-out error (PETS: all, MBPO: 5 of 7)
    hidden: tuple[int, ...] = (200, 200, 200)  # units of each hidden layer of the dynamics (PETS: 3 or 4 layers of 200)
    weight_decay: tuple[float, ...] = (2.5e-5, 5e-5, 7.5e-5, 1e-4)  # of each layer, on half the squared weights (MBPO)
    model_lr: float = 1e-3  # step size of Adam for the ensemble (PETS, MBPO)
    model_batch_size: int = 256  # most rows of a batch, a sixteenth of the data, but at least 32 (MBPO: 256, PETS: 32)
    train_every: int = 50  # environment steps between two trainings of the ensemble (PETS: a trial)
    patience: int = 5  # a training ends after more epochs without a member better by 1 % on the hold-out set (MBPO)
    max_updates: int = 1_000  # gradient steps after whose epoch a training ends in any case (PETS: 5 epochs a trial)
    holdout_ratio: float = 0.1  # probability that a transition is held out, and no network trained on it (MBPO: 0.2)
    max_holdout: int = 5_000  # largest size of the hold-out set (MBPO)

    planner: Literal["random_shooting", "cem", "icem", "mppi", "gradient"] = "cem"  # the search; Discrete: first two
    horizon: int = 25  # steps imagined (PETS: 25 to 30)
    population: int = 64  # sequences scored in an iteration (PETS: 400 to 500)
    iterations: int = 3  # of the search for each action (PETS: 5; random_shooting: so many populations at once)
    num_best: int = 10  # sequences to which the distribution moves (PETS: a tenth of the population); gradient: all
    momentum: float = 0.1  # weight of the old distribution when it moves (PETS: 0.1)
    particles: int = 5  # imagined futures of each sequence, a multiple of num_elites (PETS: 20)
    sampling: Literal["ts1", "tsinf"] = "tsinf"  # a particle keeps its member (tsinf), or gets one anew at every step
    noise_beta: float = 2.0  # icem: exponent of the noise's spectrum; 0 is white, larger smoother (Pinneri et al. 2020)
    keep: float = 0.3  # icem: share of the best sequences that the next search starts with (Pinneri et al. 2020)
    temperature: float = 0.1  # mppi: of the weights exp(return / temperature), with returns at unit deviation
    plan_lr: float = 0.1  # gradient: step size of Adam on the sequences, in units of half the action range
    terminal_value: bool = False  # add the value of the last imagined state to the return; learned from the real steps

    def __post_init__(self):
        ranges = {"total_timesteps": (0, math.inf), "seed": (0, math.inf), "noise_beta": (0, 10)}
        ranges |= {"gamma": (0, 1), "keep": (0, 1), "momentum": (0, 0.999), "holdout_ratio": (0, 0.9)}
        ranges |= dict.fromkeys(("model_lr", "temperature", "plan_lr"), (1e-9, 1e9))
        for name, value in vars(self).items():
            low, high = ranges.get(name, (1, math.inf))
            if type(value) in (int, float) and not low <= value <= high:  # so that a NaN is refused, too
                raise Failure(f"--{name.replace('_', '-')} must be from {low} to {high}, not {value}")


# Settings by environment that differ from the defaults; what the command line says wins.
SMALL = {"train_every": 100, "hidden": (128, 128), "weight_decay": (2.5e-5, 5e-5, 1e-4)}
ICEM = {"planner": "icem", "noise_beta": 0.5, "horizon": 10, "population": 100, "iterations": 4, "train_every": 100}
PRESETS: dict[str, dict[str, Any]] = {
    "CartPole-v1": {"total_timesteps": 2_000, "terminal_value": True, "horizon": 15} | SMALL,
    "Acrobot-v1": {"total_timesteps": 2_000, "terminal_value": True},
    "InvertedPendulum-v5": {"total_timesteps": 2_000, "terminal_value": True, "eval_every": 2_000} | ICEM,
    "Reacher-v5": {"total_timesteps": 1_000, "eval_episodes": 20, "train_every": 250},
}


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
    which the agent acted badly would look bad. (For a Box this picks the errors of the model.)

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
        self.reset(generator)

    def reset(self, generator: torch.Generator) -> None:
        """New weights."""
        self.layers = nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise((len(self.obs_mean), self.hidden, self.hidden, 1)):
            weight = torch.empty(self.networks, fan_in, fan_out, device=generator.device)
            self.layers.append(nn.init.normal_(weight, std=1 / math.sqrt(fan_in), generator=generator))
            self.layers.append(torch.zeros(self.networks, 1, fan_out, device=generator.device))

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
        12.1). A termination ends it; where an episode was truncated or still goes on, the last term is V as well."""
        order = data.episode[: data.size].argsort(stable=True)  # several environments may have stepped in turn
        next_value = self(data.column("obs") + data.column("delta"))[order].tolist()
        columns = (data.column(name)[order, 0].tolist() for name in ("reward", "terminated", "episode"))
        reward, terminated, episode = columns
        returns = [0.0] * data.size
        for step in reversed(range(data.size)):
            after = next_value[step]
            if step + 1 < data.size and episode[step] == episode[step + 1]:
                after = (1 - self.trace) * after + self.trace * returns[step + 1]
            returns[step] = reward[step] + gamma * after * (not terminated[step])
        return torch.tensor(returns, device=data.obs.device)[order.argsort()]

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


def outcome(model, networks: Networks, state, action, delta, reward_fn, termination_fn) -> tuple[Tensor, Tensor]:
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
    model, networks, obs, plans, noise, permutations, gamma: float, reward_fn=None, termination_fn=None, value_fn=None
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

    Theirs ends a shifted mean with its last action and shifted sequences with a drawn one, does not score again what is
    kept, and its noise has up to a fifth more deviation.
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
    each weighted by exp(return / temperature), with returns scaled to unit deviation. Samples are cut off at the bounds
    before the mean is taken, which so stays a little away from these (theirs: in the model)."""
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


class Agent:
    """`act` plans, `observe` stores, `update` trains when it is time: in this order, after every step of the
    environment. Several environments can be driven in turn, each with a number `env` of its own."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        check(observation_space, action_space, args)
        self.args, self.device, self.action_space = args, find_device(args), action_space
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.planner = (DISCRETE_PLANNERS if self.discrete else BOX_PLANNERS)[args.planner]
        self.obs_size, self.action_size = gym.spaces.flatdim(observation_space), gym.spaces.flatdim(action_space)
        nothing = 1 / self.action_size if self.discrete else 0.0
        self.neutral = torch.full((1, 1, self.action_size), nothing, device=self.device)  # a plan that says nothing
        low, high = map(self.tensor, (-1, 1) if self.discrete else (action_space.low, action_space.high))
        self.middle, self.half_range = (high + low) / 2, (high - low) / 2
        self.generator = torch.Generator(self.device).manual_seed(seed_of(args.seed, 0))
        self.model = Ensemble(self.obs_size, self.action_size, args, self.generator)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.model_lr)
        self.value = Value(self.obs_size, self.generator) if args.terminal_value else None
        self.parts = ["model", "optimizer", "data"] + ["value"] * args.terminal_value  # of a checkpoint
        self.data = Buffer(self.obs_size, self.action_size, self.device)
        self.reward_fn, self.termination_fn = load_function(args.reward_fn), load_function(args.termination_fn)
        self.starts: dict[int, Tensor] = {}  # of each environment, what its planner starts from at the next step
        self.episodes: dict[int, int] = {}  # of each environment, the row of `data` where its episode began
        self.trained_at, self.logs = 0, {}

    def act(self, obs: Any, env: int = 0) -> Any:
        """The first action of the plan; before `learning_starts` steps, a random one."""
        if self.data.size < self.args.learning_starts:
            return self.to_env(self.random_action())
        action, self.starts[env] = self.plan(obs, self.starts.get(env), self.generator)
        return action

    def random_action(self) -> Tensor:
        """Uniform action (A,), in [-1, 1] or one-hot."""
        if self.discrete:
            return F.one_hot(self.random_indices(), self.action_size).float()
        return uniform(1, self.neutral, self.generator)[0, 0]

    def random_indices(self, *shape: int) -> Tensor:
        """Discrete actions, counted from 0."""
        return torch.randint(self.action_size, shape, generator=self.generator, device=self.device)

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
        sample, drawn = compiled(imagine) if args.compile else imagine, {"generator": generator, "device": self.device}
        rows = 4096 if self.device.type == "cpu" else 2**20  # at once; on a CPU what they need stays in a core's cache
        for part in (self.middle + self.half_range * plans).split(max(1, rows // args.particles)):
            shape = (args.horizon, groups, len(part) * args.particles // groups)
            noise = torch.randn(*shape, self.obs_size, **drawn)
            permutations = torch.rand(shape, **drawn).argsort(1) if args.sampling == "ts1" else None
            returns.append(sample(self.model, networks, obs, part, noise, permutations, args.gamma, **functions))
        return torch.cat(returns)

    def to_env(self, action: Tensor) -> Any:
        """One action (A,) as the environment wants it; of probabilities the most probable."""
        space = self.action_space
        if self.discrete:
            return space.start + int(action.argmax())
        values = (self.middle + self.half_range * action).cpu().numpy()
        return values.reshape(space.shape).astype(space.dtype).clip(space.low, space.high)

    def observe(self, obs, action, reward: float, next_obs, terminated: bool, truncated: bool = False, env: int = 0):
        """Stores one real step; whether it goes to the hold-out set is drawn here, once and for all."""
        if self.discrete:
            action = np.eye(self.action_size, dtype=np.float32)[action - self.action_space.start]
        # The difference of close numbers is taken before they are rounded to single precision.
        before, after = (np.asarray(values, np.float64).reshape(-1) for values in (obs, next_obs))
        row = {"obs": before, "action": np.reshape(action, -1), "reward": reward, "delta": after - before}
        holdout = self.data.draw_holdout(self.args.holdout_ratio, self.args.max_holdout, self.generator)
        episode = self.episodes.setdefault(env, self.data.size)
        self.data.add(**row, terminated=terminated, episode=episode, holdout=holdout)
        self.relabel(self.data.size - 1)
        if terminated or truncated:
            del self.episodes[env]
            self.starts.pop(env, None)

    def relabel(self, start: int) -> None:
        """Puts what `reward_fn` and `termination_fn` say into the rows from `start` on."""
        obs, action, delta = (self.data.column(name)[start:] for name in ("obs", "action", "delta"))
        for name, function in (("reward", self.reward_fn), ("terminated", self.termination_fn)):
            if function is not None:
                found = function(obs, action, obs + delta)
                if getattr(found, "shape", None) != obs.shape[:1]:
                    raise Failure(f"the function for {name} gave {found}, not a tensor with one number for each row")
                self.data.column(name)[start:, 0] = found

    def update(self, say: Callable[[str], Any] = str) -> None:
        """Trains the ensemble every `train_every` steps, after a look at how it predicted what it had not seen; `say`
        is told what goes on."""
        args, size, last = self.args, self.data.size, self.trained_at
        if size < args.learning_starts or (last and size - last < args.train_every):
            return
        say("training the model")
        if last:
            self.logs |= diagnose(self.model, self.data, last)
        self.logs |= fit(self.model, self.optimizer, self.data, args, self.generator)
        if self.value is not None:
            self.logs |= self.value.fit(self.data, self.lookahead(), args.gamma, self.generator)
        self.trained_at = size
        say("")

    def foresee(self, state: Tensor, action: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """States (B, obs_size) and Discrete actions (B,) -> what one of the elites expects: next states (B, obs_size),
        rewards and probabilities of going on (B,)."""
        networks = self.model.select(self.model.elites[index % len(self.model.elites)][None])
        step = state[None], F.one_hot(action, self.action_size).float()[None]
        delta, _ = self.model.predict(*step, networks[0])
        reward, survival = outcome(self.model, networks, *step, delta, self.reward_fn, self.termination_fn)
        return state + delta[0], reward[0], survival[0].float()

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
        """What is new since the last call, by TensorBoard tag."""
        logs, self.logs = self.logs, {}
        return logs

    def state_dict(self) -> dict:
        """All that the next step depends on, as tensors and plain values."""
        return {name: getattr(self, name).state_dict() for name in self.parts} | {
            "generator": {self.device.type: self.generator.get_state()},
            "plain": (dict(self.starts), dict(self.episodes), self.trained_at),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` gave into a newly made agent."""
        for name in self.parts:
            getattr(self, name).load_state_dict(state[name])
        starts, episodes, self.trained_at = state["plain"]
        self.starts, self.episodes = {env: start.to(self.device) for env, start in starts.items()}, dict(episodes)
        if self.device.type in state["generator"]:  # on another kind of device, random numbers start afresh
            self.generator.set_state(state["generator"][self.device.type])


def train(args: Args, make: Callable[..., gym.Env] | None = None) -> dict:
    """PETS, algorithm 1, with the ensemble trained every `train_every` steps; returns what is in result.json.
    `make(render_mode=None)` makes an environment that is not registered."""
    make = make or functools.partial(make_env, args)
    env = make()
    agent = Agent(env.observation_space, env.action_space, args)
    if args.init_from and not (args.resume and Path(args.resume, CHECKPOINT).exists()):
        init_from(agent, args.init_from)
    episode = Episode(env, args.seed, 1)
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
# The script's own: what it can be used with, functions of the user, a start from another run, the model's errors.
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
        others = "pictures: muzero.py, dreamer.py; Dict: dreamer.py; finite ones: dyna_q.py"
        raise Failure(f"observations must be a Box of up to 1,000 numbers, not {observation_space}; {others}")
    planners = DISCRETE_PLANNERS
    if not isinstance(action_space, gym.spaces.Discrete):
        planners, box = BOX_PLANNERS, isinstance(action_space, gym.spaces.Box) and action_space.dtype.kind == "f"
        if not box or not np.isfinite(np.subtract(action_space.high, action_space.low, dtype=np.float32)).all():
            raise Failure(f"actions must be Discrete or a bounded Box of floating-point numbers, not {action_space}")
    if args.planner not in planners:
        raise Failure(f"--planner {args.planner} is not for {action_space}, but one of {', '.join(planners)}")
    for name, most in (("num_elites", args.ensemble_size), ("num_best", args.population)):
        if getattr(args, name) > most:
            raise Failure(f"--{name.replace('_', '-')} must be from 1 to {most}, not {getattr(args, name)}")
    if args.particles % args.num_elites:
        raise Failure(f"--particles must be a multiple of --num-elites, which is {args.num_elites}")
    if len(args.weight_decay) != len(args.hidden) + 1 or not all(
        0 <= factor < math.inf for factor in args.weight_decay
    ):
        raise Failure("--weight-decay needs one value more than --hidden, each at least 0")
    if not all(size >= 1 for size in args.hidden):
        raise Failure("--hidden needs values of at least 1")


def load_function(name: str | None) -> Callable | None:
    """The function named as `module:function`."""
    if name is None:
        return None
    try:
        module, _, function = name.partition(":")
        return getattr(importlib.import_module(module), function)
    except Exception as error:  # that of the module itself, too
        raise Failure(f"cannot load {name}, which should read module:function: {error!r}") from error


def init_from(agent: Agent, folder: str) -> None:
    """Takes model and data of another run; the value is learned from the data, for the present task."""
    source = saved_args(folder)
    for name in ("reward_fn", "termination_fn"):  # its data have what that function said
        if getattr(source, name) is not None and getattr(agent.args, name) is None:
            raise Failure(f"{folder} was made with --{name.replace('_', '-')}, so this needs one, too")
    state = torch.load(Path(folder, CHECKPOINT), map_location="cpu", weights_only=True)["agent"]
    *_, agent.trained_at = state["plain"]
    if not agent.trained_at:
        raise Failure(f"cannot start from {folder}: it has not trained its model yet")
    agent.model.load_state_dict(state["model"])
    agent.data.load_state_dict(state["data"])
    agent.relabel(0)
    if agent.value is not None:  # each fit takes away some 60 % of what a new value is off
        lookahead = agent.lookahead()
        for _ in range(5):
            agent.logs |= agent.value.fit(agent.data, lookahead, agent.args.gamma, agent.generator)


@torch.inference_mode()
def diagnose(model: Ensemble, data: Buffer, start: int) -> dict[str, float]:
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
    order = start + data.column("episode")[start:, 0].argsort(stable=True)  # environments may have stepped in turn
    for steps in (steps for steps in (1, 5, 10, 20) if steps <= len(order)):
        windows = order.unfold(0, steps, 1)  # (W, steps): rows, in each window one step after the other
        windows = windows[data.episode[windows[:, 0]] == data.episode[windows[:, -1]]]
        if len(windows):
            state, last = data.obs[windows[:, 0]].expand(count, -1, -1), windows[:, -1]
            for rows in windows.T:
                state = state + model.predict(state, data.action[rows].expand(count, -1, -1), dynamics)[0]
            error = (state - data.obs[last] - data.delta[last]) / obs_unit
            logs[f"model/error_{steps}_steps"] = (error**2).mean().sqrt().item()
    return logs


if __name__ == "__main__" and "__file__" in globals():  # which a notebook has not
    main()
