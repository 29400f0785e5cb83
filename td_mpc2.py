# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.4", "numpy>=2.0", "gymnasium>=1.2", "tyro>=0.9", "tensorboard>=2.18", "pillow>=10.1",
#                 "tqdm>=4.66"]
# ///
"""TD-MPC2: plan a few steps ahead in a latent space, and let a learned value say what comes after.

An encoder turns an observation into a latent state; the model predicts the next latent state and the reward of an
action, and never the observation itself. At every step the planner (MPPI) improves sequences of actions, a part of
which the policy proposes, by what the model says of their rewards and an ensemble of Q-functions of the rest.

The algorithm (Hansen et al. 2024, "TD-MPC2: Scalable, Robust World Models for Continuous Control"):

    for each step of the environment:
        Encode the observation; act by the planner; add the step to the buffer
        for each update:
            Draw B slices of H + 1 successive observations
            TD targets: r + gamma * min over 2 of the target Qs, at the next latent state and the policy's action
            Roll the model out from the first latent state along the actions; at each of its states: the error to the
                next encoded observation, the errors of reward and Qs in bins; weighted by rho^t
            Policy: the mean of 2 Qs at its actions, in units of their spread, plus entropy
            Target Qs: a step towards the Qs

It is as the authors' code has it, nicklashansen/tdmpc2 (commit e9f5932), for a single task with vectors. What differs:

    - The default is a model of 72,000 parameters that learns on a laptop; `--model-size 5` is theirs.
    - Slices are drawn uniformly over all steps, and from the running episode too (theirs: an episode, then a start).
    - A plan whose value is not a number counts as the worst (theirs: as 0).
    - Actions are scaled to [-1, 1] from any bounds (theirs: in dm_control only).
"""

import copy
import dataclasses
import functools
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
    """TD-MPC2: model-predictive control in latent space with a terminal value (Hansen et al. 2024)."""

    env_id: str = "Pendulum-v1"  # Gymnasium id, or module:Name-v0
    env_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)  # gym.make's: name value
    total_timesteps: int = 3_000  # environment steps to learn for
    seed: int = 1  # of every random draw
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where the networks are; auto: a GPU where there is one
    threads: int = 1  # CPU threads; two runs side by side get more done than one with two threads
    compile: bool = False  # on a GPU, an update and a plan each as one CUDA graph, which changes nothing but speed
    eval_every: int = 1_000  # environment steps between two evaluations of the greedy policy
    eval_episodes: int = 5  # episodes of an evaluation
    checkpoint_every: int = 500  # environment steps between two checkpoints
    run_dir: str = "runs"  # folder in which the run's own folder is made
    resume: str | None = None  # run folder to continue exactly where its last checkpoint was written
    evaluate: str | None = None  # run folder whose agent to evaluate, without learning
    capture_video: bool = False  # record the first episode of each evaluation as a GIF in the run folder

    model_size: Literal["nano", "1", "5", "19", "48"] = "nano"  # millions of parameters, and the settings that go along
    learning_starts: int = 400  # random steps, then as many updates at once (TD-MPC2: 5 episodes, at least 1,000)
    updates_per_step: float = 1.0  # updates of all networks per environment step (TD-MPC2: 1)
    gamma: float | None = None  # discount factor; None: by the length of an episode, from 0.95 to 0.995 (TD-MPC2)
    episodic: bool = True  # learn terminations, and plan with them (TD-MPC2: off, called experimental)
    rho: float = 0.5  # weight of each further step of a rollout in the losses (TD-MPC2: 0.5)
    tau: float = 0.01  # step of the target Qs towards the Qs at every update (TD-MPC2: 0.01)
    entropy_coef: float = 1e-4  # weight of the policy's entropy (TD-MPC2: 1e-4)

    plan: bool = True  # act by the planner; --no-plan: by the policy alone
    horizon: int = 3  # steps planned ahead, and steps of the model's rollouts in training (TD-MPC2: 3)
    min_std: float = 0.05  # least standard deviation of the planner's samples (TD-MPC2: 0.05)
    max_std: float = 2.0  # the largest, which a plan begins with (TD-MPC2: 2)
    temperature: float = 0.5  # of the elites' weights exp(temperature * value) (TD-MPC2: 0.5)

    def __post_init__(self):
        share, positive = (0, 1), (1e-9, math.inf)
        ranges = {"seed": (0, math.inf), "updates_per_step": (0, math.inf), "gamma": share, "rho": share, "tau": share}
        ranges |= {"entropy_coef": (0, math.inf)} | dict.fromkeys(("min_std", "max_std", "temperature"), positive)
        for name, value in vars(self).items():
            low, high = ranges.get(name, (1, math.inf))
            if type(value) in (int, float) and not low <= value <= high:  # so that a NaN is refused, too
                raise Failure(f"--{name.replace('_', '-')} must be from {low} to {high}, not {value}")


@dataclass
class Size:
    """What goes with a size of the model. All but the first are the authors'."""

    encoder: int  # units of the encoder's hidden layers
    hidden: int  # units of the hidden layers of all other networks
    latent: int  # size of a latent state
    encoder_layers: int  # hidden layers of the encoder
    num_q: int
    batch: int = 256  # slices of an update
    learning_rate: float = 3e-4  # the encoder's is 0.3 times as large
    samples: int = 512  # sequences of an iteration of the planner
    elites: int = 64  # sequences to which it moves
    proposals: int = 24  # sequences that the policy proposes
    iterations: int = 6


SIZES = {
    "nano": Size(64, 64, 64, 1, 2, batch=64, learning_rate=1e-3, samples=64, elites=8, proposals=12, iterations=2),
    "1": Size(256, 384, 128, 1, 2),
    "5": Size(256, 512, 512, 1, 5),
    "19": Size(1024, 1024, 768, 2, 5),
    "48": Size(1792, 1792, 768, 3, 5),
}
# Settings by environment that differ from the defaults; what the command line says wins.
PRESETS: dict[str, dict[str, Any]] = {
    "InvertedPendulum-v5": {"total_timesteps": 5_000},
}


# Dimensions of the tensors: H horizon, B slices of a batch, L latent, A action_size, N sequences of the planner.
class Mish(torch.autograd.Function):
    """x * tanh(softplus(x)), with a single exponential: tanh(log(1 + e)) = n / (n + 2) where n = e * (e + 2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        e = x.clamp(max=20).exp_()  # from there on it is x, in single precision
        n = torch.addcmul(e, e, e).add_(e)
        tanh = n / (n + 2)
        ctx.save_for_backward(x, e, n, tanh)
        return x * tanh

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x, e, n, tanh = ctx.saved_tensors
        slope = torch.addcmul(e, e, e).mul_(4).div_((n + 2).square_())  # of tanh: 4 e (e + 1) / (n + 2)^2
        return slope.mul_(x).add_(tanh).mul_(gradient)


class SimNorm(torch.autograd.Function):
    """Softmax over groups of 8 (simplicial normalisation). PyTorch's own is ten times as slow over so few."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        e = (x - x.amax(-1, keepdim=True)).exp_().view(-1, 8)
        y = (e / (e @ e.new_ones(8, 1))).view(x.shape)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        gradient = (gradient * y).view(-1, 8)
        return (gradient - y.view(-1, 8) * (gradient @ y.new_ones(8, 1))).view(y.shape)


class NormedLinear(nn.Linear):
    """Linear, dropout, LayerNorm, activation."""

    def __init__(self, fan_in: int, fan_out: int, activation: type, generator: torch.Generator, dropout: float = 0.0):
        super().__init__(fan_in, fan_out, device=generator.device)
        self.norm = nn.LayerNorm(fan_out, device=generator.device)
        self.activation, self.dropout, self.generator = activation, dropout, generator

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if self.dropout and self.training:  # drawn positions, which is cheaper than to draw for every number
            count, drawn = int(self.dropout * x.numel()), {"generator": self.generator, "device": x.device}
            mask = torch.full((x.numel(),), 1 / (1 - self.dropout), device=x.device)
            x = x * mask.index_fill_(0, torch.randint(x.numel(), (count,), **drawn), 0.0).view(x.shape)
        return self.activation.apply(self.norm(x))


def mlp(sizes: Sequence[int], generator: torch.Generator, last: type | None = None, dropout: float = 0.0, zero=False):
    """Normed layers with Mish, and a last one that is linear, or normed with the activation `last`."""
    *pairs, final = itertools.pairwise(sizes)
    layers = [NormedLinear(*pair, Mish, generator, dropout * (i == 0)) for i, pair in enumerate(pairs)]
    layers += [NormedLinear(*final, last, generator) if last else nn.Linear(*final, device=generator.device)]
    for layer in layers:
        nn.init.trunc_normal_(layer.weight, std=0.02, generator=generator)
        nn.init.zeros_(layer.bias)
    if zero:
        nn.init.zeros_(layers[-1].weight)
    return nn.Sequential(*layers)


def symlog(x: Tensor) -> Tensor:
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    return x.sign() * x.abs().expm1()


BINS, LARGEST = 101, 10.0  # bins of rewards and values: 101 over symlog values from -10 to 10


def two_hot(x: Tensor) -> Tensor:
    """(..., 1) -> (..., BINS): the weights of the two bins beside symlog(x)."""
    place = (symlog(x).clamp(-LARGEST, LARGEST) + LARGEST) / (2 * LARGEST / (BINS - 1))
    lower = place.floor()
    index, weight = lower.long(), place - lower
    found = torch.zeros(*x.shape[:-1], BINS, device=x.device).scatter_(-1, index, 1 - weight)
    return found.scatter_add_(-1, (index + 1).clamp_(max=BINS - 1), weight)


def from_bins(logits: Tensor) -> Tensor:
    """(..., BINS) -> (..., 1): symexp of the expected bin."""
    return symexp(logits.softmax(-1) @ torch.linspace(-LARGEST, LARGEST, BINS, device=logits.device)[:, None])


class WorldModel(nn.Module):
    """Encoder, latent dynamics, reward, Qs, policy, and termination of the state that is reached."""

    def __init__(self, obs_size: int, action_size: int, size: Size, episodic: bool, generator: torch.Generator):
        super().__init__()
        latent, hidden, both = size.latent, [size.hidden] * 2, size.latent + action_size
        self.encoder = mlp([obs_size, *[size.encoder] * size.encoder_layers, latent], generator, last=SimNorm)
        self.dynamics = mlp([both, *hidden, latent], generator, last=SimNorm)
        self.reward = mlp([both, *hidden, BINS], generator, zero=True)
        self.policy = mlp([latent, *hidden, 2 * action_size], generator)
        self.termination = mlp([latent, *hidden, 1], generator) if episodic else None
        qs = [mlp([both, *hidden, BINS], generator, dropout=0.01, zero=True) for _ in range(size.num_q)]
        self.qs = nn.ModuleList(qs).eval()  # they drop in the losses alone
        self.target_qs = copy.deepcopy(self.qs).requires_grad_(False)

    def act(self, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latent states (..., L), standard normal noise (..., A) -> drawn action, its mean, log standard deviation."""
        mean, log_std = self.policy(z).chunk(2, dim=-1)
        log_std = -10 + 6 * (log_std.tanh() + 1)  # from -10 to 2
        return (mean + noise * log_std.exp()).tanh(), mean.tanh(), log_std


class Buffer:
    """All real steps, in a table that doubles when it is full: each observation with the action that led there, the
    reward, and whether it is terminal. An episode begins with an observation that no action led to."""

    def __init__(self, obs_size: int, action_size: int, horizon: int, device: torch.device):
        self.widths, self.horizon = (obs_size, action_size, 1, 1), horizon
        self.table, self.ends = torch.zeros(1024, sum(self.widths), device=device), torch.zeros(1024, dtype=torch.int64)
        self.size = self.num_ends = self.length = 0  # rows; those that a slice can end with; steps of the episode

    def add(self, obs: Tensor, action: Tensor, reward: float, terminated: bool, first: bool) -> None:
        """Appends an observation (obs_size,); `first`: of an episode."""
        if self.size == len(self.table):
            self.table, self.ends = (torch.cat([part, torch.zeros_like(part)]) for part in (self.table, self.ends))
        self.table[self.size] = torch.cat([obs, action, obs.new_tensor([reward, terminated])])
        self.length = 0 if first else self.length + 1
        if self.length >= self.horizon:
            self.ends[self.num_ends] = self.size
            self.num_ends += 1
        self.size += 1

    def sample(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Slices: obs (H + 1, B, obs_size); action (H, B, A), reward and terminated (H, B, 1) of the steps between."""
        drawn = torch.randint(self.num_ends, (count,), generator=generator, device=self.table.device)
        rows = self.ends.to(drawn.device)[drawn] - torch.arange(self.horizon, -1, -1, device=drawn.device)[:, None]
        obs, *step = self.table[rows].split(self.widths, dim=-1)
        return {"obs": obs} | dict(zip(("action", "reward", "terminated"), (part[1:] for part in step), strict=True))

    def state_dict(self) -> dict:
        plain = self.size, self.num_ends, self.length
        return {"plain": plain, "table": self.table[: self.size].clone(), "ends": self.ends[: self.num_ends].clone()}

    def load_state_dict(self, state: dict) -> None:
        self.size, self.num_ends, self.length = state["plain"]
        for name in ("table", "ends"):
            kept = getattr(self, name)
            setattr(self, name, torch.cat([state[name].to(kept.device), torch.zeros_like(kept)]))


class Agent:
    """`act` plans, `observe` stores, `update` learns: in this order, at every step."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args, episode_length: int = 1_000):
        check_spaces(observation_space, action_space)
        self.args, self.size, self.device = args, SIZES[args.model_size], find_device(args)
        self.observation_space, self.action_space = observation_space, action_space
        obs_size, self.action_size = gym.spaces.flatdim(observation_space), gym.spaces.flatdim(action_space)
        self.generator = torch.Generator(self.device).manual_seed(seed_of(args.seed, 0))
        heuristic = min(max(1 - 5 / episode_length, 0.95), 0.995)
        self.gamma = heuristic if args.gamma is None else args.gamma
        self.model = model = WorldModel(obs_size, self.action_size, self.size, args.episodic, self.generator)
        parts = [model.dynamics, model.reward, model.qs, *filter(None, [model.termination])]
        groups = [{"params": list(model.encoder.parameters()), "lr": 0.3 * self.size.learning_rate}]
        groups += [{"params": [parameter for part in parts for parameter in part.parameters()]}]
        steps = {"lr": self.size.learning_rate, "fused": True, "capturable": self.device.type == "cuda"}
        self.model_optimizer = torch.optim.Adam(groups, **steps)
        self.policy_optimizer = torch.optim.Adam(model.policy.parameters(), eps=1e-5, **steps)
        self.q_scale = torch.ones((), device=self.device)
        self.data = Buffer(obs_size, self.action_size, args.horizon, self.device)
        self.mean = torch.zeros(args.horizon, self.action_size, device=self.device)  # of the last plan of the episode
        self.steps, self.updates, self.begins, self.losses = 0, 0, True, {}  # begins: an episode, with the next step
        self.recorded = Recorded(self.generator, args.compile)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def pair(self) -> Tensor:
        """Two of the Qs."""
        return torch.randperm(self.size.num_q, generator=self.generator, device=self.device)[:2]

    def two_values(self, qs: nn.ModuleList, z: Tensor, action: Tensor) -> Tensor:
        """Values (2, ..., 1) by two of the Qs."""
        x, pair = torch.cat([z, action], dim=-1), self.pair()
        if self.device.type == "cpu":  # where the others need not be evaluated
            return torch.stack([from_bins(qs[index](x)) for index in pair.tolist()])
        return from_bins(torch.stack([q(x) for q in qs])[pair])

    def update_networks(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One update of all networks on slices."""
        args, model, horizon = self.args, self.model, self.args.horizon
        obs, action, reward, terminated = (batch[name] for name in ("obs", "action", "reward", "terminated"))
        rho = args.rho ** torch.arange(horizon + 1.0, device=self.device)
        with torch.no_grad():
            next_z = model.encoder(obs[1:])  # (H, B, L)
            next_action, _, _ = model.act(next_z, self.normal(*action.shape))
            next_value = self.two_values(model.target_qs, next_z, next_action).amin(0)
            target = reward + self.gamma * (1 - terminated) * next_value  # (H, B, 1)

        model.qs.train()
        states = [model.encoder(obs[0])]
        for step in range(horizon):
            states.append(model.dynamics(torch.cat([states[-1], action[step]], dim=-1)))
        z = torch.stack(states)  # (H + 1, B, L)
        x = torch.cat([z[:-1], action], dim=-1)

        def cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
            return -(wanted * logits.log_softmax(-1)).sum(-1).mean(1) @ rho[:-1] / horizon

        wanted_reward, wanted_value = two_hot(reward), two_hot(target)
        losses = {
            "consistency": ((z[1:] - next_z) ** 2).mean((1, 2)) @ rho[:-1] / horizon,
            "reward": cross_entropy(model.reward(x), wanted_reward),
            "value": sum(cross_entropy(q(x), wanted_value) for q in model.qs) / len(model.qs),
        }
        loss = 20 * losses["consistency"] + 0.1 * losses["reward"] + 0.1 * losses["value"]
        if model.termination:
            losses["termination"] = F.binary_cross_entropy_with_logits(model.termination(z[1:]), terminated)
            loss = loss + losses["termination"]
        step_down(self.model_optimizer, loss)

        # The policy sees the states from before the step, and the Qs from after it.
        z, noise = z.detach(), self.normal(horizon + 1, *action.shape[1:])
        drawn, _, log_std = model.act(z, noise)
        model.qs.requires_grad_(False)
        value = self.two_values(model.qs, z, drawn).mean(0)  # (H + 1, B, 1)
        model.qs.requires_grad_(True).eval()
        spread = torch.quantile(value[0].detach(), torch.tensor([0.05, 0.95], device=self.device)).diff().clamp_min(1)
        self.q_scale.lerp_(spread[0], 0.01)
        # Of the normal distribution before the tanh, times the number of dimensions, as the code has it.
        entropy = (0.5 * noise**2 + log_std + 0.5 * math.log(2 * math.pi)).sum(-1, keepdim=True) * self.action_size
        policy_loss = -(args.entropy_coef * entropy + value / self.q_scale).mean((1, 2)) @ rho / (horizon + 1)
        step_down(self.policy_optimizer, policy_loss)

        with torch.no_grad():
            pairs = zip(model.target_qs.parameters(), model.qs.parameters(), strict=True)
            for old, new in pairs:
                old.lerp_(new, args.tau)
        losses |= {"policy": policy_loss, "q_scale": self.q_scale.clone(), "entropy": entropy.mean()}
        return {name: value.detach() for name, value in losses.items()}

    def value_of(self, z: Tensor, actions: Tensor) -> Tensor:
        """Of sequences (H, N, A) from latent states (N, L): discounted rewards, and the value of the last state, (N,).
        What comes after a termination does not count."""
        total, discount, alive = 0.0, 1.0, 1.0
        for action in actions:
            x = torch.cat([z, action], dim=-1)
            total = total + discount * alive * from_bins(self.model.reward(x))
            z, discount = self.model.dynamics(x), discount * self.gamma
            if self.model.termination:
                alive = alive * (self.model.termination(z) <= 0)
        action, _, _ = self.model.act(z, self.normal(len(z), self.action_size))
        total = total + discount * alive * self.two_values(self.model.qs, z, action).mean(0)
        return total.squeeze(-1).nan_to_num(nan=-1e30)

    @torch.no_grad()
    def plan(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """MPPI. From an observation, "obs" (obs_size,), and the mean of the plan before, "mean" (H, A), zero where an
        episode begins, to "action" and the deviation "std" to explore with, (A,), and the new "mean"."""
        args, size, horizon = self.args, self.size, self.args.horizon
        z = self.model.encoder(inputs["obs"][None])
        proposals, state = [], z.expand(size.proposals, -1)
        for _ in range(horizon):
            proposals.append(self.model.act(state, self.normal(size.proposals, self.action_size))[0])
            if len(proposals) < horizon:
                state = self.model.dynamics(torch.cat([state, proposals[-1]], dim=-1))
        proposals = torch.stack(proposals)  # (H, proposals, A), the same in all iterations
        mean = torch.cat([inputs["mean"][1:], torch.zeros_like(inputs["mean"][:1])])
        std = torch.full_like(mean, args.max_std)
        for _ in range(size.iterations + 2 * (self.action_size >= 20)):
            noise = self.normal(horizon, size.samples - size.proposals, self.action_size)
            actions = torch.cat([proposals, (mean[:, None] + std[:, None] * noise).clamp_(-1, 1)], dim=1)
            value, best = self.value_of(z.expand(size.samples, -1), actions).topk(size.elites)
            score, elites = (args.temperature * (value - value[0])).softmax(0), actions[:, best]  # (N,), (H, N, A)
            mean = (score[:, None] * elites).sum(1)
            variance = (score[:, None] * (elites - mean[:, None]) ** 2).sum(1)
            std = variance.sqrt().clamp(args.min_std, args.max_std)
        # Not the mean: one of the elites, drawn by score, in evaluations as well.
        return {"action": elites[0, self.draw(score)], "std": std[0], "mean": mean}

    def draw(self, weights: Tensor) -> Tensor:
        """An index, with probabilities (N,)."""
        return (weights / torch.empty_like(weights).exponential_(generator=self.generator)).argmax()

    def tensor(self, obs: Any) -> Tensor:
        """An observation of the environment as (obs_size,)."""
        flat = gym.spaces.flatten(self.observation_space, obs)
        return torch.as_tensor(flat, dtype=torch.float32, device=self.device)

    def to_env(self, action: Tensor) -> np.ndarray:
        """An action (A,) in [-1, 1] as the environment wants it."""
        space, share = self.action_space, (action.cpu().numpy().reshape(self.action_space.shape) + 1) / 2
        return ((1 - share) * space.low + share * space.high).astype(space.dtype)

    def choose(self, obs: Any, mean: Tensor, explore: bool) -> tuple[np.ndarray, Tensor]:
        """An action of the planner, or of the policy alone, and the mean of the plan."""
        if self.args.plan:
            found = self.recorded(self.plan, {"obs": self.tensor(obs), "mean": mean})
            action, mean = found["action"], found["mean"]
            if explore:
                action = action + found["std"] * self.normal(self.action_size)
            return self.to_env(action.clamp(-1, 1)), mean
        with torch.no_grad():
            drawn, greedy, _ = self.model.act(self.model.encoder(self.tensor(obs)), self.normal(self.action_size))
        return self.to_env(drawn if explore else greedy), mean

    def act(self, obs: Any) -> np.ndarray:
        """An action that explores; before `learning_starts` steps, a uniformly random one."""
        if self.steps < self.args.learning_starts:
            return self.to_env(torch.rand(self.action_size, generator=self.generator, device=self.device) * 2 - 1)
        action, self.mean = self.choose(obs, self.mean, explore=True)
        return action

    def observe(self, obs, action, reward: float, next_obs, terminated: bool, truncated: bool = False) -> None:
        """Stores one real step."""
        space = self.action_space
        if self.begins:
            self.data.add(self.tensor(obs), torch.zeros(self.action_size, device=self.device), 0.0, False, first=True)
        action = torch.as_tensor(2 * (action - space.low) / (space.high - space.low) - 1, dtype=torch.float32)
        self.data.add(self.tensor(next_obs), action.reshape(-1).to(self.device), reward, terminated, first=False)
        self.steps, self.begins = self.steps + 1, terminated or truncated
        if self.begins:
            self.mean = torch.zeros_like(self.mean)

    def update(self, say: Callable[[str], Any] = str) -> None:
        """The updates after a step; `say` is told what goes on."""
        if self.steps < self.args.learning_starts or not self.data.num_ends:
            return
        say("" if self.updates else "learning from the random steps")
        wanted = int(self.args.updates_per_step * self.steps)
        for _ in range(self.updates, wanted):
            self.losses = self.recorded(self.update_networks, self.data.sample(self.size.batch, self.generator))
        self.updates = wanted
        say("")

    def greedy_policy(self, seed: int) -> Callable[..., np.ndarray]:
        """A policy (observation, info -> action) for one episode, which does not touch the agent: without the noise
        that explores."""
        agent, mean = copy.copy(self), torch.zeros_like(self.mean)
        agent.generator = torch.Generator(self.device).manual_seed(seed)
        agent.recorded = Recorded(agent.generator, self.args.compile)

        def policy(obs: Any, info: dict | None = None) -> np.ndarray:
            nonlocal mean
            action, mean = agent.choose(obs, mean, explore=False)
            return action

        return policy

    def metrics(self) -> dict[str, float]:
        """What is new since the last call, by TensorBoard tag."""
        losses, self.losses = self.losses, {}
        return {f"losses/{name}": value.item() for name, value in losses.items()}

    def state_dict(self) -> dict:
        """All that the next step depends on, as tensors and plain values."""
        parts = ("model", "model_optimizer", "policy_optimizer", "data")
        return {name: getattr(self, name).state_dict() for name in parts} | {
            "generator": {self.device.type: self.generator.get_state()},
            "plain": (self.q_scale.clone(), self.mean, self.gamma, self.steps, self.updates, self.begins),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` gave into a newly made agent."""
        for name in ("model", "model_optimizer", "policy_optimizer", "data"):
            getattr(self, name).load_state_dict(state[name])
        q_scale, mean, self.gamma, self.steps, self.updates, self.begins = state["plain"]
        self.q_scale.copy_(q_scale)
        self.mean = mean.to(self.device)
        if self.device.type in state["generator"]:  # on another kind of device, random numbers start afresh
            self.generator.set_state(state["generator"][self.device.type])


def step_down(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """A step against the gradient, whose norm is cut off at 20."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([parameter for group in optimizer.param_groups for parameter in group["params"]], 20)
    optimizer.step()


def train(args: Args, make: Callable[..., gym.Env] | None = None) -> dict:
    """TD-MPC2; returns what is in result.json. `make(render_mode=None)` makes an environment that is not registered."""
    make = make or functools.partial(make_env, args)
    env = make()
    length = (env.spec and env.spec.max_episode_steps) or 1_000
    agent = Agent(env.observation_space, env.action_space, args, length)
    episode = Episode(env, args.seed, 1)
    run = Run(args, agent, [episode], make)
    run.bar.set_description_str("random steps" if run.step < args.learning_starts else "")
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
# Plumbing: the same in every script. Nothing of TD-MPC2 is below this line.
# ---------------------------------------------------------------------------------------------------------------------
SCRIPT, CHECKPOINT = "td_mpc2", "checkpoint.pt"
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
# The script's own: devices and spaces.
# ---------------------------------------------------------------------------------------------------------------------
def find_device(args: Args) -> torch.device:
    """The device that `args` name; `auto`: a GPU where there is one."""
    torch.set_num_threads(args.threads)
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(name for name in usable if usable[name]) if args.device == "auto" else args.device
    if not usable[name]:
        raise Failure(f"--device {name}: there is none that PyTorch can use")
    return torch.device(name)


class Recorded:
    """Calls a function of named tensors, on a GPU and where it is `wanted` as one CUDA graph: launched one by one, its
    many small operations would keep the GPU waiting. What else it reads or changes must be tensors that stay where they
    are, and its random numbers the generator's."""

    def __init__(self, generator: torch.Generator, wanted: bool):
        self.generator, self.wanted, self.calls, self.graphs = generator, wanted, {}, {}

    def __reduce__(self) -> tuple:  # a copy or a pickle records anew
        return Recorded, (self.generator, self.wanted)

    def __call__(self, function: Callable[[dict], dict], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.generator.device.type != "cuda" or not self.wanted:
            return function(inputs)
        key = function.__name__, *(part.shape for part in inputs.values())
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= 3:  # first without: this makes all that is made once, as the state of the optimizers
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                found = function(inputs)
            torch.cuda.current_stream().wait_stream(side)
            return found
        if key not in self.graphs:
            graph, kept = torch.cuda.CUDAGraph(), {name: part.clone() for name, part in inputs.items()}
            graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph):
                found = function(kept)
            self.graphs[key] = graph, kept, found
        graph, kept, found = self.graphs[key]
        for name, part in kept.items():
            part.copy_(inputs[name])
        graph.replay()
        return {name: part.clone() for name, part in found.items()}


def check_spaces(observation_space: gym.Space, action_space: gym.Space) -> None:
    """Raises Failure for spaces that this script does not handle."""
    parts = observation_space.values() if isinstance(observation_space, gym.spaces.Dict) else [observation_space]
    if not all(isinstance(part, gym.spaces.Box) and math.prod(part.shape) <= 1_000 for part in parts):
        others = "pictures: muzero.py, dreamer.py; finite ones: dyna_q.py"
        raise Failure(f"observations must be a Box of up to 1,000 numbers or a Dict, not {observation_space}; {others}")
    box = isinstance(action_space, gym.spaces.Box) and action_space.dtype.kind == "f"
    widths = np.subtract(action_space.high, action_space.low, dtype=np.float32) if box else np.array(0)
    if not ((widths > 0) & np.isfinite(widths)).all():
        others = "Discrete: cem_mpc.py, muzero.py, dreamer.py"
        raise Failure(f"actions must be a bounded Box of floating-point numbers, not {action_space}; {others}")


if __name__ == "__main__" and "__file__" in globals():  # which a notebook has not
    main()
