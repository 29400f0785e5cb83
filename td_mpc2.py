# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.4", "numpy>=2.0", "gymnasium>=1.2", "tyro>=0.9", "tensorboard>=2.18", "pillow>=10.1",
#                 "tqdm>=4.66"]
# ///
"""TD-MPC2: plan a few steps ahead in a latent space, and let a learned value say what comes after.

An encoder turns an observation into a latent state; the model predicts the next latent state and the reward of an
action, and never the observation itself. At every step the planner (MPPI) searches for a good sequence of H actions: it
draws sequences around a mean, takes some more from the policy, scores each by the rewards that the model predicts and
the value of the state where it ends, moves the mean to the best ones, and repeats.

The algorithm (Hansen et al. 2024, "TD-MPC2: Scalable, Robust World Models for Continuous Control"):

    for each step of the environment:
        Act by the planner, whose mean starts from the last plan, one step on; add the step to the buffer
        for each update:
            Draw B slices of H + 1 successive observations o, with the actions a and rewards r between them
            Targets: y_t = r_t + gamma * min of 2 target Qs at the encoded o_{t+1} and the policy's action there
            Latent states: z_0 = encoder(o_0), z_{t+1} = dynamics(z_t, a_t)
            Model loss, at each t weighted by rho^t: 20 times the squared error of z_{t+1} to the encoded o_{t+1},
                and 0.1 times the cross-entropies of reward and Qs at (z_t, a_t) to r_t and y_t, in bins
            Policy loss, weighted likewise: minus the mean of 2 Qs at (z_t, the policy's action) in units of their
                range, and minus 1e-4 times the entropy; this trains the policy alone
            Target Qs: a step towards the Qs

It is as the authors' code has it, nicklashansen/tdmpc2 (commit e9f5932), for a single task with vectors. What differs:

    - The default is a model of 81,000 parameters that learns on a laptop. `--model-size 5` has the authors' widths,
      batch and planner; they make more random steps (5 episodes, at least 1,000) before they learn.
    - Terminations are learned and planned with (theirs: if asked for, called experimental).
    - On Gymnasium's MuJoCo tasks theirs has rho 0.7 and a discount of at most 0.99; here all tasks have 0.5 and 0.995.
    - Slices are drawn uniformly over all steps, and from the running episode too (theirs: an episode, then a start; of
      the last million steps). Episodes shorter than H steps are not learned from, as in theirs.
    - A plan whose value is not a number counts as the worst (theirs: as 0).
    - Actions are scaled to [-1, 1] from any bounds (theirs: in dm_control only).

Expect on Pendulum-v1, after 3,000 steps, -99, -126, -143, -151, -155 (mean: -135) over 5 episodes of five seeds, and
-132 to -166 over 50; a run takes 3 minutes on one of two cores.
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

    model_size: Literal["nano", "1", "5", "19", "48"] = "nano"  # millions of parameters; SIZES has what goes along
    learning_starts: int = 400  # random steps, then as many updates at once (TD-MPC2: 5 episodes, at least 1,000)
    updates_per_step: float | None = None  # of all networks per environment step; None: nano 2, others 1 (TD-MPC2: 1)
    gamma: float | None = None  # discount factor; None: by the length of an episode, from 0.95 to 0.995 (TD-MPC2)
    episodic: bool = True  # learn terminations, and plan with them (TD-MPC2: off, called experimental)
    rho: float = 0.5  # weight of each further step of a rollout in the losses (TD-MPC2: 0.5)
    tau: float = 0.01  # step of the target Qs towards the Qs at every update (TD-MPC2: 0.01)
    entropy_coef: float = 1e-4  # weight of the policy's entropy (TD-MPC2: 1e-4)

    plan: bool = True  # act by the planner; --no-plan: by the policy alone
    horizon: int = 3  # steps planned ahead, and steps of the model's rollouts in training (TD-MPC2: 3)
    min_std: float = 0.05  # least standard deviation of the planner's samples (TD-MPC2: 0.05)
    max_std: float = 2.0  # largest standard deviation, and the first of a plan (TD-MPC2: 2)
    temperature: float = 0.5  # elites weigh exp(temperature * value) (TD-MPC2: 0.5)

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
    """What goes with a size of the model. All but the first are the authors'; they count the encoder's last layer."""

    encoder: int  # units of the encoder's hidden layers
    hidden: int  # units of the hidden layers of all other networks
    latent: int  # size of a latent state
    encoder_layers: int  # hidden layers of the encoder
    num_q: int  # Q-functions, two of which are drawn where a value is needed
    batch: int = 256  # slices of an update
    lr: float = 3e-4  # step size; the encoder's is 0.3 times as large; the policy's is 3e-4 for all sizes
    updates: float = 1.0  # of all networks per environment step
    samples: int = 512  # sequences of an iteration of the planner
    elites: int = 64  # best sequences, to which mean and deviation move
    proposals: int = 24  # sequences that the policy proposes
    iterations: int = 6  # of the planner


SIZES = {
    "nano": Size(64, 64, 64, 1, 2, batch=64, lr=1e-3, updates=2, samples=64, elites=8, proposals=12, iterations=2),
    "1": Size(256, 384, 128, 1, 2),
    "5": Size(256, 512, 512, 1, 5),
    "19": Size(1024, 1024, 768, 2, 5),
    "48": Size(1792, 1792, 768, 3, 5),
}
# Settings by environment that differ from the defaults; what the command line says wins.
PRESETS: dict[str, dict[str, Any]] = {
    "InvertedPendulum-v5": {"total_timesteps": 5_000},
}


# Dimensions of the tensors: H horizon, B slices of a batch, L latent, A action_size; of the planner: N sequences, P of
# them proposed by the policy, K elites.


def simnorm(x: Tensor) -> Tensor:
    """Softmax over groups of 8: each group of a latent state is a probability distribution."""
    return x.unflatten(-1, (-1, 8)).softmax(-1).flatten(-2)


class NormedLinear(nn.Linear):
    """Linear, dropout, LayerNorm, activation."""

    def __init__(self, fan_in: int, fan_out: int, activation: Callable, generator: torch.Generator, dropout: float = 0):
        super().__init__(fan_in, fan_out, device=generator.device)
        self.norm = nn.LayerNorm(fan_out, device=generator.device)
        self.activation, self.dropout, self.generator = activation, dropout, generator

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if self.dropout and self.training:
            kept = torch.rand(x.shape, generator=self.generator, device=x.device) >= self.dropout
            x = x * kept / (1 - self.dropout)
        return self.activation(self.norm(x))


def mlp(
    sizes: Sequence[int],
    generator: torch.Generator,
    last: Callable | None = None,
    dropout: float = 0,
    zero: bool = False,
) -> nn.Sequential:
    """Normed layers with Mish, dropout in the first, and a last one that is linear, or normed with the activation
    `last`. `zero`: its weights, so that what it says is 0 at first."""
    *pairs, final = itertools.pairwise(sizes)
    layers = [NormedLinear(*pair, mish, generator, dropout if i == 0 else 0) for i, pair in enumerate(pairs)]
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


BINS, LARGEST = 101, 10.0  # of rewards and values, evenly spaced over symlog values from -10 to 10


def two_hot(x: Tensor) -> Tensor:
    """(..., 1) -> (..., BINS): the weights of the two bins beside symlog(x)."""
    width = 2 * LARGEST / (BINS - 1)
    place = (symlog(x).clamp(-LARGEST, LARGEST) + LARGEST) / width
    lower = place.floor()
    index, weight = lower.long(), place - lower
    found = torch.zeros(*x.shape[:-1], BINS, device=x.device).scatter_(-1, index, 1 - weight)
    return found.scatter_add_(-1, (index + 1).clamp_(max=BINS - 1), weight)


def from_bins(logits: Tensor) -> Tensor:
    """(..., BINS) -> (..., 1): symexp of the expected bin."""
    return symexp(logits.softmax(-1) @ torch.linspace(-LARGEST, LARGEST, BINS, device=logits.device)[:, None])


class WorldModel(nn.Module):
    """Encoder, latent dynamics, reward, Qs, policy, and whether a latent state is terminal."""

    def __init__(self, obs_size: int, action_size: int, size: Size, episodic: bool, generator: torch.Generator):
        super().__init__()
        latent, hidden, both = size.latent, [size.hidden] * 2, size.latent + action_size
        self.encoder = mlp([obs_size, *[size.encoder] * size.encoder_layers, latent], generator, last=simnorm)
        self.dynamics = mlp([both, *hidden, latent], generator, last=simnorm)
        self.reward = mlp([both, *hidden, BINS], generator, zero=True)
        self.policy = mlp([latent, *hidden, 2 * action_size], generator)
        self.termination = mlp([latent, *hidden, 1], generator) if episodic else None
        qs = [mlp([both, *hidden, BINS], generator, dropout=0.01, zero=True) for _ in range(size.num_q)]
        self.qs = nn.ModuleList(qs).eval()  # dropout is on in the losses alone, not in targets and plans
        self.target_qs = copy.deepcopy(self.qs).requires_grad_(False)

    def pi(self, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The policy. Latent states (..., L), standard normal noise (..., A) -> an action drawn, the mean action, and
        the log standard deviation before the tanh, (..., A)."""
        mean, log_std = self.policy(z).chunk(2, dim=-1)
        log_std = -10 + 6 * (log_std.tanh() + 1)  # from -10 to 2
        return (mean + noise * log_std.exp()).tanh(), mean.tanh(), log_std


class Buffer:
    """All steps, in a table that doubles when it is full. A row holds an observation, and of the step that led to it
    the action, the reward, and whether it terminated the episode; of an episode's first row these mean nothing."""

    def __init__(self, obs_size: int, action_size: int, horizon: int, device: torch.device):
        self.widths, self.horizon = (obs_size, action_size, 1, 1), horizon
        self.table = torch.zeros(1024, sum(self.widths), device=device)
        self.ends = torch.zeros(1024, dtype=torch.int64, device=device)  # rows that a slice can end with, as many fit
        self.size = self.num_ends = 0  # rows; those that a slice can end with
        self.length = 0  # steps of the episode so far

    def add(self, obs: Tensor, action: Tensor, reward: float, terminated: bool, first: bool) -> None:
        """Appends an observation (obs_size,) and the step that led to it; `first`: an episode begins with it."""
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
        device = self.table.device
        ends = self.ends[torch.randint(self.num_ends, (count,), generator=generator, device=device)]
        rows = ends + torch.arange(-self.horizon, 1, device=device)[:, None]  # (H + 1, B)
        obs, action, reward, terminated = self.table[rows].split(self.widths, dim=-1)
        return {"obs": obs, "action": action[1:], "reward": reward[1:], "terminated": terminated[1:]}

    def state_dict(self) -> dict:
        parts = {"table": self.table[: self.size].clone(), "ends": self.ends[: self.size].clone()}  # of equal length
        return parts | {"plain": (self.size, self.num_ends, self.length)}

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
        heuristic = min(max(1 - 5 / episode_length, 0.95), 0.995)  # the authors'
        self.gamma = heuristic if args.gamma is None else args.gamma
        self.model = model = WorldModel(obs_size, self.action_size, self.size, args.episodic, self.generator)
        others = [model.dynamics, model.reward, model.qs, *([model.termination] if args.episodic else [])]
        groups = [{"params": model.encoder.parameters(), "lr": 0.3 * self.size.lr}]
        groups += [{"params": nn.ModuleList(others).parameters()}]
        options = {"fused": True, "capturable": self.device.type == "cuda"}
        self.model_optimizer = torch.optim.Adam(groups, lr=self.size.lr, **options)
        # Larger steps drive its mean actions so far out that their tanh has no slope left.
        self.policy_optimizer = torch.optim.Adam(model.policy.parameters(), lr=3e-4, eps=1e-5, **options)
        self.q_range, self.percentiles = torch.ones((), device=self.device), torch.tensor([0.05, 0.95]).to(self.device)
        self.data = Buffer(obs_size, self.action_size, args.horizon, self.device)
        self.plan_mean = torch.zeros(args.horizon, self.action_size, device=self.device)  # of the episode's last plan
        self.steps, self.updates, self.losses = 0, 0, {}
        self.begins = True  # an episode, with the next step
        self.recorded = Recorded(self.generator, args.compile)  # calls a function; with --compile, as one CUDA graph

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def pair(self) -> Tensor:
        """Two of the Qs."""
        return torch.randperm(self.size.num_q, generator=self.generator, device=self.device)[:2]

    def two_values(self, qs: nn.ModuleList, z: Tensor, action: Tensor) -> Tensor:
        """Latent states (..., L), actions (..., A) -> (2, ..., 1): their values by two Qs, drawn once for all."""
        x, pair = torch.cat([z, action], dim=-1), self.pair()
        if self.device.type == "cpu":  # a GPU evaluates all: it would have to wait until the pair is known here
            return torch.stack([from_bins(qs[index](x)) for index in pair.tolist()])
        return from_bins(torch.stack([q(x) for q in qs])[pair])

    def update_networks(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One update of all networks, on slices as `Buffer.sample` gives them; returns the losses."""
        args, model, horizon = self.args, self.model, self.args.horizon
        obs, action, reward, terminated = (batch[name] for name in ("obs", "action", "reward", "terminated"))
        rho = args.rho ** torch.arange(horizon + 1, device=self.device)  # (H + 1,)
        with torch.no_grad():
            next_z = model.encoder(obs[1:])  # (H, B, L)
            next_action, _, _ = model.pi(next_z, self.normal(*action.shape))
            next_value = self.two_values(model.target_qs, next_z, next_action).amin(0)
            target = reward + self.gamma * (1 - terminated) * next_value  # (H, B, 1)

        z = [model.encoder(obs[0])]
        for step in range(horizon):
            z.append(model.dynamics(torch.cat([z[-1], action[step]], dim=-1)))
        z = torch.stack(z)  # (H + 1, B, L)
        x = torch.cat([z[:-1], action], dim=-1)
        model.qs.train()
        labels = {"reward": two_hot(reward), "value": two_hot(target)}  # (H, B, BINS)

        def over_time(errors: Tensor) -> Tensor:  # (H, B, 1) or (H, B, L)
            return (rho[:-1] * errors.mean((1, 2))).mean()  # as the authors: the weights do not add up to 1

        def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
            return over_time(-(label * logits.log_softmax(-1)).sum(-1, keepdim=True))

        losses = {
            "consistency": over_time((z[1:] - next_z) ** 2),
            "reward": cross_entropy(model.reward(x), labels["reward"]),
            "value": sum(cross_entropy(q(x), labels["value"]) for q in model.qs) / len(model.qs),
        }
        loss = 20 * losses["consistency"] + 0.1 * losses["reward"] + 0.1 * losses["value"]
        if args.episodic:
            losses["termination"] = F.binary_cross_entropy_with_logits(model.termination(z[1:]), terminated)
            loss = loss + losses["termination"]
        gradient_step(self.model_optimizer, loss)

        # The policy sees the states from before the step, and the Qs from after it, with dropout. Its gradient passes
        # through the Qs, but is not theirs.
        z, noise = z.detach(), self.normal(horizon + 1, *action.shape[1:])
        drawn, _, log_std = model.pi(z, noise)
        model.qs.requires_grad_(False)
        value = self.two_values(model.qs, z, drawn).mean(0)  # (H + 1, B, 1)
        model.qs.requires_grad_(True).eval()
        low, high = torch.quantile(value[0].detach(), self.percentiles)
        self.q_range.lerp_((high - low).clamp_min(1), args.tau)
        # Entropy: minus the log probability before the tanh, as the code has it, and times the number of dimensions.
        entropy = (0.5 * noise**2 + log_std + 0.5 * math.log(2 * math.pi)).sum(-1, keepdim=True) * self.action_size
        objective = value / self.q_range + args.entropy_coef * entropy
        policy_loss = -(rho * objective.mean((1, 2))).mean()
        gradient_step(self.policy_optimizer, policy_loss)

        with torch.no_grad():
            for old, new in zip(model.target_qs.parameters(), model.qs.parameters(), strict=True):
                old.lerp_(new, args.tau)
        losses |= {"policy": policy_loss, "q_range": self.q_range.clone(), "scaled_entropy": entropy.mean()}
        return {name: part.detach() for name, part in losses.items()}

    def value_of(self, z: Tensor, actions: Tensor) -> Tensor:
        """What the model expects of actions (H, N, A) from latent states (N, L): the discounted rewards plus the value
        of the last state, (N,). What comes after a termination does not count."""
        total, discount, alive = 0.0, 1.0, 1.0
        for action in actions:
            x = torch.cat([z, action], dim=-1)
            total = total + discount * alive * from_bins(self.model.reward(x))
            z = self.model.dynamics(x)
            discount = discount * self.gamma
            if self.args.episodic:
                alive = alive * (self.model.termination(z) <= 0)  # a logit: more probable than not
        action, _, _ = self.model.pi(z, self.normal(len(z), self.action_size))
        total = total + discount * alive * self.two_values(self.model.qs, z, action).mean(0)
        return total.squeeze(-1).nan_to_num(nan=-1e30)

    @torch.no_grad()
    def plan(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """MPPI: draws sequences of actions, moves mean and deviation to the best of them, and repeats.

        Args:
            inputs: "obs" (obs_size,); "mean" (H, A), of the plan before, zero where an episode begins.

        Returns:
            "action" (A,), the deviation "std" (A,) to explore with, and "mean" (H, A) for the next step.
        """
        args, size, horizon = self.args, self.size, self.args.horizon
        z = self.model.encoder(inputs["obs"][None])  # (1, L)
        state, proposals = z.expand(size.proposals, -1), []
        for _ in range(horizon):  # the policy's actions, at the states to which the model says that they lead
            proposals.append(self.model.pi(state, self.normal(size.proposals, self.action_size))[0])
            state = self.model.dynamics(torch.cat([state, proposals[-1]], dim=-1))  # of the last one not used
        proposed = torch.stack(proposals)  # (H, P, A), the same in all iterations
        mean = torch.cat([inputs["mean"][1:], torch.zeros_like(inputs["mean"][:1])])  # the plan before, one step on
        std = torch.full_like(mean, args.max_std)
        for _ in range(size.iterations + (2 if self.action_size >= 20 else 0)):  # as the authors
            noise = self.normal(horizon, size.samples - size.proposals, self.action_size)
            sampled = (mean[:, None] + std[:, None] * noise).clamp(-1, 1)
            actions = torch.cat([proposed, sampled], dim=1)  # (H, N, A)
            value, best = self.value_of(z.expand(size.samples, -1), actions).topk(size.elites)
            elites, score = actions[:, best], (args.temperature * value).softmax(0)  # (H, K, A), (K,)
            mean = (score[:, None] * elites).sum(1)
            std = (score[:, None] * (elites - mean[:, None]) ** 2).sum(1).sqrt().clamp(args.min_std, args.max_std)
        # Not the mean: the first action of one of the elites, in evaluations as well.
        return {"action": elites[0].index_select(0, self.draw(score))[0], "std": std[0], "mean": mean}

    def draw(self, probabilities: Tensor) -> Tensor:
        """An index (1,) with probabilities (K,): of exponential waiting times with these rates the shortest."""
        times = -torch.rand(probabilities.shape, generator=self.generator, device=self.device).log() / probabilities
        return times.argmin(0, keepdim=True)

    def flat(self, obs: Any) -> Tensor:
        """An observation of the environment as (obs_size,)."""
        flat = gym.spaces.flatten(self.observation_space, obs)
        return torch.as_tensor(flat, dtype=torch.float32, device=self.device)

    def to_env(self, action: Tensor) -> np.ndarray:
        """An action (A,) in [-1, 1] as the environment wants it."""
        space = self.action_space
        share = (action.cpu().numpy().reshape(space.shape) + 1) / 2
        return ((1 - share) * space.low + share * space.high).astype(space.dtype)

    def from_env(self, action: np.ndarray) -> Tensor:
        """An action of the environment as (A,), in [-1, 1]."""
        space = self.action_space
        share = (np.reshape(action, space.shape) - space.low) / (space.high - space.low)
        return torch.as_tensor(2 * share.flatten() - 1, dtype=torch.float32, device=self.device)

    def choose(self, obs: Any, mean: Tensor, explore: bool) -> tuple[np.ndarray, Tensor]:
        """An action of the planner, or of the policy alone, and the mean of the plan."""
        if self.args.plan:
            found = self.recorded(self.plan, {"obs": self.flat(obs), "mean": mean})
            action, mean = found["action"], found["mean"]
            if explore:
                action = action + found["std"] * self.normal(self.action_size)
            return self.to_env(action.clamp(-1, 1)), mean
        with torch.no_grad():
            drawn, mean_action, _ = self.model.pi(self.model.encoder(self.flat(obs)), self.normal(self.action_size))
        return self.to_env(drawn if explore else mean_action), mean

    def act(self, obs: Any) -> np.ndarray:
        """An action that explores; before `learning_starts` steps, a uniformly random one."""
        if self.steps < self.args.learning_starts:
            return self.to_env(torch.rand(self.action_size, generator=self.generator, device=self.device) * 2 - 1)
        action, self.plan_mean = self.choose(obs, self.plan_mean, explore=True)
        return action

    def observe(self, obs, action, reward: float, next_obs, terminated: bool, truncated: bool = False) -> None:
        """Stores one step."""
        if self.begins:
            self.data.add(self.flat(obs), torch.zeros(self.action_size, device=self.device), 0.0, False, first=True)
        self.data.add(self.flat(next_obs), self.from_env(action), reward, terminated, first=False)
        self.steps, self.begins = self.steps + 1, terminated or truncated
        if self.begins:
            self.plan_mean = torch.zeros_like(self.plan_mean)

    def update(self, say: Callable[[str], Any] = str) -> None:
        """The updates after a step: none before `learning_starts`, then at once as many as there would have been.
        `say` is told what goes on."""
        if self.steps < self.args.learning_starts or not self.data.num_ends:
            return
        wanted = self.args.updates_per_step
        due = int((self.size.updates if wanted is None else wanted) * self.steps)
        if not self.updates:
            say("learning from the random steps")
        for _ in range(self.updates, due):
            self.losses = self.recorded(self.update_networks, self.data.sample(self.size.batch, self.generator))
        if not self.updates:
            say("")
        self.updates = due

    def greedy_policy(self, seed: int) -> Callable[..., np.ndarray]:
        """A policy (observation, info -> action) for one episode, without the noise that explores. Its random numbers
        and its plan are its own: acting does not change how the agent learns."""
        agent, mean = copy.copy(self), torch.zeros_like(self.plan_mean)
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
            "tensors": (self.q_range.clone(), self.plan_mean),
            "plain": (self.gamma, self.steps, self.updates, self.begins),  # gamma: of an episode's length
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` gave into a newly made agent."""
        for name in ("model", "model_optimizer", "policy_optimizer", "data"):
            getattr(self, name).load_state_dict(state[name])
        self.q_range, self.plan_mean = (part.to(self.device, copy=True) for part in state["tensors"])
        self.gamma, self.steps, self.updates, self.begins = state["plain"]
        if self.device.type in state["generator"]:  # on another kind of device, random numbers start afresh
            self.generator.set_state(state["generator"][self.device.type])


def gradient_step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """A step of the optimizer, with the gradient clipped to a norm of 20."""
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
# The script's own: a fast activation, devices, CUDA graphs, spaces.
# ---------------------------------------------------------------------------------------------------------------------
class Mish(torch.autograd.Function):
    """x * tanh(softplus(x)) with a single exponential: tanh(log(1 + e)) = n / (n + 2), where n = e * (e + 2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        e = x.clamp(max=20).exp_()  # where x is larger, tanh is 1 in single precision
        n = torch.addcmul(e, e, e).add_(e)
        tanh = n / (n + 2)
        ctx.save_for_backward(x, e, n, tanh)
        return x * tanh

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x, e, n, tanh = ctx.saved_tensors
        slope = torch.addcmul(e, e, e).mul_(4).div_((n + 2).square_())  # of tanh: 4 e (e + 1) / (n + 2)^2
        return slope.mul_(x).add_(tanh).mul_(gradient)


def mish(x: Tensor) -> Tensor:
    """PyTorch's F.mish, but on a CPU three times as fast where there is much to do."""
    return Mish.apply(x) if x.device.type == "cpu" and x.numel() > 10_000 else F.mish(x)


def find_device(args: Args) -> torch.device:
    """The device that `args` name; `auto`: a GPU where there is one."""
    torch.set_num_threads(args.threads)
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(name for name in usable if usable[name]) if args.device == "auto" else args.device
    if not usable[name]:
        raise Failure(f"--device {name}: there is none that PyTorch can use")
    return torch.device(name)


class Recorded:
    """Calls a function of named tensors; where that is `wanted`, and on a GPU, as one CUDA graph: launched one by one,
    its many small operations would keep the GPU waiting. All else that it reads or changes must be tensors that stay
    where they are, and its random numbers the generator's."""

    def __init__(self, generator: torch.Generator, wanted: bool):
        self.generator, self.wanted, self.calls, self.graphs = generator, wanted, {}, {}

    def __reduce__(self) -> tuple:  # a copy or a pickle records anew
        return Recorded, (self.generator, self.wanted)

    def __call__(self, function: Callable[[dict], dict], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.generator.device.type != "cuda" or not self.wanted:
            return function(inputs)
        key = function.__name__, *(part.shape for part in inputs.values())
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= 3:  # three plain calls first make what is made once, as the state of the optimizers
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
