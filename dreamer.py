# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.4", "numpy>=2.0", "gymnasium>=1.2", "tyro>=0.9", "tensorboard>=2.18", "pillow>=10.1",
#   "tqdm>=4.66"]
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

Details are those of the authors' code, danijar/dreamerv3 at commit e3f0224. What differs:

    - Step size, warm-up and sequences suit small networks and short runs; numbers are standardised (`standardise`).
    - Imagination starts from only some of the states (`imagination_starts`). The critic learns from all real steps;
      where nothing was imagined it bootstraps from its own value.
    - The actor of discrete actions is mixed with 1 % of the uniform distribution, as in the paper.
    - One layer gives all numbers of an observation, and one both mean and deviation of the actor: their gradients are
      clipped together. One-hot choices are fitted by squared error, too; integers in a Box are numbers.
    - Pictures are halved down to about 4 x 4 whatever their size; their loss is a sum over pixels, less for small ones.
      Those of Atari games hold the last 4 frames, grey, and the environment's own rules stay.
    - A time limit ends no value (their wrapper of Gym environments takes it for an end).
    - Acting is in single precision, also with `bf16`; evaluation takes the most likely action, in drawn states.

Run:     python dreamer.py
         python dreamer.py --size 12m --batch-length 64 --imagination-starts 64 --train-ratio 512 --learning-rate 4e-5
             --warmup 1000 --compile                (on a GPU; batches and step size of the authors)
Expect:  CartPole-v1: a return of 475 or more (of 500) for the first time at 3,000 to 7,000 steps (5 of 5 seeds), with
         relapses until 31,000. Pendulum-v1, 30,000 steps: -101, -153, -321, above -250 for the first time at 3,000 or
         4,000. Acrobot-v1, 20,000 steps: -77, -81, -104 (3 seeds). 10,000 steps take 9 minutes on one CPU core, 3 on a
         GPU beside nine other runs. dm_control, pictures, memory: benchmark/README.md.
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
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm


@dataclass
class Args:
    """DreamerV3 (Hafner et al. 2025)."""

    env_id: str = "CartPole-v1"  # Gymnasium id, or module:Name-v0
    env_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)  # gym.make's: name value
    total_timesteps: int = 10_000  # environment steps to learn for
    seed: int = 1  # of every random draw
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where the networks are; auto: a GPU where there is one
    threads: int = 1  # CPU threads; two runs side by side get more done than one with two threads
    compile: bool = False  # torch.compile the steps of the model, for GPUs; changes nothing but speed and rounding
    eval_every: int = 1_000  # environment steps between two evaluations of the greedy policy
    eval_episodes: int = 5  # episodes of an evaluation
    checkpoint_every: int = 1_000  # environment steps between two checkpoints
    run_dir: str = "runs"  # folder in which the run's own folder is made
    resume: str | None = None  # run folder to continue exactly where its last checkpoint was written
    evaluate: str | None = None  # run folder whose agent to evaluate, without learning
    capture_video: bool = False  # record the first episode of each evaluation as a GIF in the run folder

    atari: bool = False  # the usual wrappers of Atari: random no-ops, 4 frames a step, grey, the last 4 pictures
    image_size: int = 64  # side to which pictures (uint8 up to 255, 2 or 3 dimensions) are resized; 0: they stay
    num_envs: int = 4  # played side by side (DreamerV3: 16, or 1); total_timesteps is rounded up to a multiple of it
    size: Literal["1m", "12m", "25m", "50m", "100m", "200m", "400m"] = "1m"  # parameters (DreamerV3: 200m)
    bf16: bool = False  # train in bfloat16, which GPUs and some CPUs are faster at (DreamerV3: yes)
    standardise: bool = True  # numbers of observations, after symlog, to mean 0, deviation 1, cut at 10 (DreamerV3: no)
    learning_starts: int = 1_024  # steps before the first update (at least a sequence of each environment)
    train_ratio: float = 128.0  # steps that are replayed for each environment step (DreamerV3: 32 to 1024)
    batch_size: int = 16  # sequences of an update (DreamerV3: 16)
    batch_length: int = 16  # steps of each (DreamerV3: 64)
    replay_size: int = 100_000  # steps in the replay (DreamerV3: 5,000,000)
    learning_rate: float = 5e-4  # step size (DreamerV3: 4e-5, for networks of up to 400 million and long runs)
    warmup: int = 200  # updates during which the step size rises from 0 (DreamerV3: 1000; take it for pictures)
    horizon: int = 15  # steps imagined (DreamerV3: 15)
    imagination_starts: int = 4  # states of each sequence, the last ones, that are imagined from (DreamerV3: all)
    entropy_scale: float = 3e-4  # weight of the policy's entropy (DreamerV3: 3e-4; Catch, Recall of benchmark/: 3e-3)
    gamma: float = 1 - 1 / 333  # discount factor (DreamerV3: the same)

    def __post_init__(self):
        positive = (
            "total_timesteps threads eval_every eval_episodes checkpoint_every num_envs learning_starts batch_size"
        )
        least = dict.fromkeys([*positive.split(), "horizon", "imagination_starts"], 1) | {"batch_length": 2}
        least |= dict.fromkeys(["seed", "image_size", "train_ratio", "warmup", "entropy_scale"], 0)
        for name, low in least.items():
            if not low <= getattr(self, name) < math.inf:  # a NaN is not, either
                raise Failure(f"--{name.replace('_', '-')} must be at least {low}")
        if not (0 < self.learning_rate <= 1 and 0 <= self.gamma <= 1):
            raise Failure("--learning-rate must be above 0 and at most 1, --gamma from 0 to 1")
        if self.replay_size // self.num_envs <= self.batch_length:
            raise Failure("--replay-size must hold more than one sequence of each environment")


# Settings by environment that differ from the defaults; what the command line says wins.
PRESETS: dict[str, dict[str, Any]] = {}


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


def stacked(steps: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """What each step has, (B, ...), over all of them: (B, T, ...)."""
    return [torch.stack(parts, 1) for parts in zip(*steps, strict=True)]


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL divergence (...) of latents (..., stoch, classes), summed over them."""
    return (log_p.exp() * (log_p - log_q)).sum((-2, -1))


def lambda_return(last: Tensor, term: Tensor, reward: Tensor, boot: Tensor, gamma: float, lam: float = 0.95) -> Tensor:
    """(B, T) each -> (B, T - 1): R[t] = r[t+1] + gamma * c[t+1] * ((1 - lam) * v[t+1] + lam * R[t+1]), where c is 1 -
    `term`, v is `boot`, and R[T-1] = v[T-1]. Where an episode is broken off (`last`), lam is 0: what comes after is not
    its future. The index of a reward is that of the observation it comes with, not of the action."""
    live, mix = gamma * (1 - term[:, 1:]), lam * (1 - last[:, 1:])
    interim, returns = reward[:, 1:] + (1 - mix) * live * boot[:, 1:], [boot[:, -1]]
    for t in reversed(range(interim.shape[1])):
        returns.append(interim[:, t] + live[:, t] * mix[:, t] * returns[-1])
    return torch.stack(returns[:0:-1], dim=1)


class LaProp:
    """LaProp (Ziyin et al. 2020) behind adaptive gradient clipping (Brock et al. 2021): the gradient of each tensor is
    not longer than `agc` times the tensor (a length of 1e-3 at least); it is divided by its root mean square,
    then averaged. The step size rises linearly from 0 during `warmup` updates."""

    beta1, beta2, eps = 0.9, 0.999, 1e-20

    def __init__(self, parameters: list[nn.Parameter], lr: float, warmup: int, agc: float = 0.3):
        self.parameters, self.lr, self.warmup, self.agc = parameters, lr, warmup, agc
        self.nu, self.mu = ([torch.zeros_like(parameter) for parameter in parameters] for _ in range(2))
        self.done = torch.zeros((), device=parameters[0].device)  # steps; what a GPU records has no plain numbers

    @torch.no_grad()
    def step(self) -> None:
        """Updates all parameters; each needs a gradient."""
        gradients = [parameter.grad for parameter in self.parameters]
        norm = torch.stack(torch._foreach_norm(gradients))
        limit = self.agc * torch.stack(torch._foreach_norm(self.parameters)).clamp(min=1e-3)
        gradients = torch._foreach_mul(gradients, list((1 / (norm / limit).clamp(min=1)).unbind()))
        rate = self.lr * ((self.done / self.warmup).clamp(max=1) if self.warmup else 1.0)
        self.done += 1
        correction1, correction2 = (-torch.expm1(self.done * math.log(beta)) for beta in (self.beta1, self.beta2))
        torch._foreach_mul_(self.nu, self.beta2)
        torch._foreach_addcmul_(self.nu, gradients, gradients, 1 - self.beta2)
        scale = torch._foreach_div(self.nu, correction2)  # 1 - beta2 ** done: nu is 0 at first
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, self.eps)
        torch._foreach_div_(gradients, scale)
        torch._foreach_lerp_(self.mu, gradients, 1 - self.beta1)
        torch._foreach_add_(self.parameters, torch._foreach_mul(self.mu, -rate / correction1))


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


def initialise(layer: nn.Module, fan_in: int, generator: torch.Generator, scale: float = 1.0) -> nn.Module:
    """Weights normal, cut at two standard deviations, of variance scale^2 / fan_in after the cut; biases 0."""
    std = 1.1368 * scale / math.sqrt(fan_in)
    if scale:
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
    else:
        nn.init.zeros_(layer.weight)
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
        self.weight = nn.Parameter(torch.empty(blocks, fan_in // blocks, fan_out // blocks, device=generator.device))
        self.bias = nn.Parameter(torch.empty(blocks, 1, fan_out // blocks, device=generator.device))
        initialise(self, fan_in, generator)  # the fan-in is that of all blocks

    def forward(self, x: Tensor) -> Tensor:
        """x (blocks, B, in / blocks) -> (blocks, B, out / blocks)."""
        return torch.baddbmm(self.bias, x, self.weight)


def mlp(fan_in: int, units: int, depth: int, generator: torch.Generator, out: int = 0, scale: float = 1.0) -> nn.Module:
    """`depth` layers, each with NormSiLU, (..., fan_in) -> (..., units); then, where there is `out`, one to (..., out),
    whose initial weights are scaled."""
    parts, device = [], generator.device
    for width in [fan_in, *[units] * depth][:depth]:
        parts += [initialise(nn.Linear(width, units, device=device), width, generator), NormSiLU(units, device)]
    if out:
        parts.append(initialise(nn.Linear(units, out, device=device), units, generator, scale))
    return nn.Sequential(*parts)


class Latent(NamedTuple):
    """A state of the model: deterministic part (..., deter), samples (..., stoch, classes)."""

    deter: Tensor
    stoch: Tensor

    def feature(self) -> Tensor:
        """What the heads see, (..., stoch * classes + deter)."""
        return torch.cat([self.stoch.flatten(-2), self.deter], -1)


class RSSM(nn.Module):
    """Recurrent state-space model: the state after an action, before (prior) and after (posterior) it is observed."""

    def __init__(self, tokens: int, actions: int, size: Size, generator: torch.Generator):
        super().__init__()
        self.size, hidden, latents = size, size.hidden, size.stoch * size.classes
        self.inputs = nn.ModuleList(mlp(width, hidden, 1, generator) for width in (size.deter, latents, actions))
        self.dynamics = BlockLinear(size.deter + 3 * hidden * size.blocks, size.deter, size.blocks, generator)
        self.norm = NormSiLU(size.deter, generator.device)
        self.gates = BlockLinear(size.deter, 3 * size.deter, size.blocks, generator)
        self.posterior = mlp(size.deter + tokens, hidden, 1, generator, latents)
        self.prior = mlp(size.deter, hidden, 2, generator, latents)

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
        prob = posterior.exp()
        return Latent(deter, sample_onehot(posterior.detach(), noise) + (prob - prob.detach())), posterior

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
        conv = nn.Conv2d(fan_in, fan_out, 5, padding=2, device=generator.device)
        self.conv = initialise(conv, 25 * fan_in, generator)
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
        found = [self.vector(obs["vector"])] if "vector" in obs else []
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
            self.vector = mlp(latents + size.deter, size.units, 3, generator, shapes.vector)
        if shapes.image:
            height, width, channels = shapes.image
            *depths, deepest = shapes.depths(size)
            self.smallest = (deepest, height >> (len(depths) + 1), width >> (len(depths) + 1))
            self.from_deter = BlockLinear(size.deter, math.prod(self.smallest), size.blocks, generator)
            self.from_stoch = mlp(latents, 2 * size.units, 1, generator, math.prod(self.smallest))
            self.norm = NormSiLU(deepest, generator.device)
            pairs = itertools.pairwise([deepest, *reversed(depths), channels])
            self.image = nn.ModuleList(
                Convolution(*pair, False, index == len(depths), generator) for index, pair in enumerate(pairs)
            )

    def forward(self, latent: Latent) -> dict[str, Tensor]:
        """vector (..., V) and image (..., H, W, C), 0 to 1."""
        found = {"vector": self.vector(latent.feature())} if hasattr(self, "vector") else {}
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
        self.reward = mlp(feature, units, 1, generator, len(bins), 0.0)
        self.con = mlp(feature, units, 1, generator, 1)
        self.actor = mlp(feature, units, 3, generator, shapes.action * (1 if self.discrete else 2), 0.01)
        self.critic = mlp(feature, units, 3, generator, len(bins), 0.0)


class Replay:
    """The latest steps of each environment as one stream over its episodes: observation, the reward that came with it,
    is_first, is_last, is_terminal, the action that was taken there (0 at the end), and the latent state. Sequences
    begin anywhere, uniformly; each new chunk of `length` steps is also served once, soon after it was added."""

    def __init__(self, shapes: Shapes, size: Size, streams: int, capacity: int, length: int):
        self.capacity, self.length = capacity, length
        kinds = {"action": ((shapes.action,), np.float32), "reward": ((), np.float32)}
        kinds |= {name: ((), np.bool_) for name in ("is_first", "is_last", "is_terminal")}
        kinds |= {"deter": ((size.deter,), np.float32), "stoch": ((size.stoch,), np.int16)}  # which class
        kinds |= {"vector": ((shapes.vector,), np.float32)} if shapes.vector else {}
        kinds |= {"image": (shapes.image, np.uint8)} if shapes.image else {}
        self.columns = {name: np.zeros((streams, capacity, *shape), dtype) for name, (shape, dtype) in kinds.items()}
        self.added = np.zeros(streams, np.int64)
        self.fresh: list[tuple[int, int]] = []  # stream and first row of sequences to be served once

    def add(self, stream: int, **row: Any) -> None:
        """Appends a step to a stream."""
        for name, column in self.columns.items():
            column[stream, self.added[stream] % self.capacity] = row[name]
        self.added[stream] += 1
        if self.added[stream] % self.length == 0:
            self.fresh.append((stream, int(self.added[stream] - self.length)))
            # With few updates: what is older than the replay.
            del self.fresh[: -(len(self.added) * self.capacity // self.length + 1)]

    def starts(self) -> np.ndarray:
        """How many sequences each stream has, (streams,)."""
        return np.maximum(np.minimum(self.added, self.capacity) - self.length + 1, 0)

    def sample(self, count: int, rng: np.random.Generator, serve: bool = True) -> tuple[tuple, dict[str, np.ndarray]]:
        """Where they are, (count, 1) and (count, length), and sequences (count, length, ...); without `serve`, new ones
        are left for later."""
        starts = self.starts()
        stream = rng.choice(len(starts), size=count, p=starts / starts.sum())
        first = (self.added - self.length)[stream] - (rng.random(count) * starts[stream]).astype(np.int64)
        served, self.fresh = (self.fresh[:count], self.fresh[count:]) if serve else ([], self.fresh)
        for index, (fresh_stream, fresh_first) in enumerate(served):
            if fresh_first >= self.added[fresh_stream] - self.capacity:
                stream[index], first[index] = fresh_stream, fresh_first
        where = stream[:, None], (first[:, None] + np.arange(self.length)) % self.capacity
        return where, {name: column[where] for name, column in self.columns.items()}

    def latest(self, name: str) -> np.ndarray:
        """A column (steps, ...) of all steps, environment after environment, the oldest first."""
        streams, size = zip(self.columns[name], self.added, strict=True), self.capacity
        return np.concatenate([column[np.arange(max(0, added - size), added) % size] for column, added in streams])

    def state_dict(self) -> dict:
        used = min(int(self.added.max()), self.capacity)
        state = {name: torch.from_numpy(column[:, :used].copy()) for name, column in self.columns.items()}
        return state | {"added": self.added.tolist(), "fresh": self.fresh}

    def load_state_dict(self, state: dict) -> None:
        self.added[:], self.fresh = state["added"], list(state["fresh"])
        for name, column in self.columns.items():
            column[:, : state[name].shape[1]] = state[name].numpy()


# There is no search: what the actor has learned in imagination takes its place. The losses are: dyn, the prior follows
# the posterior; rep, the posterior follows the prior; con, whether the episode continues; policy and value, in
# imagination; repval, the value on real steps; reward; and one for each part of the observation.
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
    """Exponential moving averages of the returns' 5th and 95th percentiles, from 0 on and not bias-corrected."""

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


class Agent:
    """World model, actor, critic and replay: `act` follows the latent state, `observe` stores, `update` trains.

    Drive it from a loop of your own: `agent = Agent(env.observation_space, env.action_space, Args(num_envs=1))`, then
    for every step `act`, `env.step`, `observe`, `update`. Environments side by side, each with its share of the replay:
    `act_many`, and `observe` with `env`. An episode that is broken off is `truncated`."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        check_spaces(observation_space, action_space)
        self.args, self.device, self.action_space = args, find_device(args), action_space
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
        self.recorded = Recorded(self.generator)
        rows, length = args.replay_size // args.num_envs, args.batch_length + 1  # one row in front: latent, action
        self.replay = Replay(self.shapes, self.size, args.num_envs, rows, length)
        # Of each environment: latent state, last action, whether an episode begins, reward of the present observation.
        self.latent = self.nets.rssm.initial(args.num_envs)
        self.action = torch.zeros(args.num_envs, actions, device=self.device)
        self.first, self.rewards = [True] * args.num_envs, [0.0] * args.num_envs
        self.steps, self.updates, self.scaled_at, self.losses = 0, 0, 0, {}

    def tensors(self, rows: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """Rows of the replay as the networks want them."""
        found = {name: torch.from_numpy(np.ascontiguousarray(rows[name])) for name in rows}
        if "vector" in found and self.args.standardise:
            found["vector"] = ((found["vector"] - self.observer.mean) / self.observer.std).clamp(-10, 10)
        return {name: part.to(self.device) for name, part in found.items()}

    @torch.inference_mode()
    def follow(self, rows: list, latent: Latent, action: Tensor, generator: torch.Generator) -> tuple[Latent, Policy]:
        """The latent states after observations, and the policy there."""
        inputs = self.tensors({name: np.stack([row[name] for row in rows]) for name in rows[0]}) | latent._asdict()
        noise = self.nets.rssm.noise(len(rows), generator=generator)
        found = self.recorded(self.infer, inputs | {"action": action, "noise": noise})
        return Latent(found["deter"], found["stoch"]), make_policy(found["policy"], self.shapes.discrete)

    def infer(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `follow` does with tensors."""
        latent, tokens = Latent(inputs["deter"], inputs["stoch"]), self.nets.encoder(inputs)
        latent, _ = self.nets.rssm.observe_step(latent, inputs["action"], inputs["is_first"], tokens, inputs["noise"])
        return latent._asdict() | {"policy": self.nets.actor(latent.feature())}

    def act_many(self, observations: list[Any]) -> list[Any]:
        """Actions for all environments, drawn."""
        count = len(observations)  # one for `act`, though there could be more
        rows = [self.observer(obs) | {"is_first": self.first[env]} for env, obs in enumerate(observations)]
        latent = Latent(self.latent.deter[:count], self.latent.stoch[:count])
        latent, policy = self.follow(rows, latent, self.action[:count], self.generator)
        self.latent.deter[:count], self.latent.stoch[:count] = latent
        self.action[:count] = policy.sample(self.generator).clamp(-1, 1)
        return [to_env(action, self.action_space) for action in self.action[:count]]

    def act(self, obs: Any, info: dict | None = None) -> Any:
        """An action for the one environment there is. (With `num_envs` above 1 it has but its share of the replay.)"""
        return self.act_many([obs])[0]

    def observe(
        self, obs: Any, action: Any, reward: float, next_obs: Any, terminated: bool, truncated: bool, env: int = 0
    ) -> None:
        """Stores one step of an environment after `act` saw `obs`, and the last observation where an episode ends."""
        if not np.array_equal(action, to_env(self.action[env], self.action_space)):  # what was drawn is not rounded
            self.action[env] = to_model(action, self.action_space)
        flags, ends = {"is_first": self.first[env], "is_last": False, "is_terminal": False}, terminated or truncated
        now = {"deter": self.latent.deter[env], "stoch": self.latent.stoch[env].argmax(-1), "action": self.action[env]}
        now = {name: part.cpu().numpy() for name, part in now.items()} | {"reward": self.rewards[env]}
        self.replay.add(env, **self.observer(obs), **flags, **now)
        if ends:
            flags = {"is_first": False, "is_last": True, "is_terminal": terminated}
            now = {"reward": float(reward), "action": 0.0, "deter": 0.0, "stoch": 0}
            self.replay.add(env, **self.observer(next_obs), **flags, **now)
        self.first[env], self.rewards[env], self.steps = bool(ends), 0.0 if ends else float(reward), self.steps + 1

    def update(self) -> None:
        """As many updates as the steps so far allow."""
        args = self.args
        ratio = args.train_ratio / (args.batch_size * args.batch_length)
        first = max(args.learning_starts, args.num_envs * (args.batch_length + 1))  # nothing to learn from before
        while self.updates < (self.steps - first) * ratio and self.replay.starts().any():
            if args.standardise and self.shapes.vector and self.steps >= 1.01 * self.scaled_at:
                self.observer.measure(self.replay.latest("vector"))  # anew when 1 % more steps were taken
                self.scaled_at = self.steps
            self.update_once()

    def update_once(self) -> None:
        """One update of everything, on sequences from the replay."""
        (stream, at), rows = self.replay.sample(self.args.batch_size, self.rng)
        batch, start = self.aligned(rows)
        self.losses = self.recorded(self.learn, batch | start._asdict())
        for name in ("deter", "stoch"):  # the states that were inferred
            self.replay.columns[name][stream, at[:, 1:]] = self.losses.pop(name).cpu().numpy()
        self.updates += 1

    def aligned(self, rows: dict[str, np.ndarray]) -> tuple[dict[str, Tensor], Latent]:
        """Of sequences (B, T + 1), the latent state at the first step, and all that `loss` wants of the others, among
        it the action before each."""
        batch = self.tensors(rows)
        start = Latent(batch.pop("deter")[:, 0], F.one_hot(batch.pop("stoch")[:, 0].long(), self.size.classes).float())
        action = batch.pop("action")[:, :-1]
        return {name: part[:, 1:] for name, part in batch.items()} | {"prev_action": action}, start

    def learn(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `update_once` does with tensors: those of `aligned` -> what to log, the states that were inferred."""
        start = Latent(batch["deter"], batch["stoch"])
        # Without its cache: that would keep what was cast without a gradient, in the imagination.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16, cache_enabled=False):
            losses, latent, logs = self.loss(batch, start)
            loss = sum(LOSS_SCALES.get(name, 1.0) * part for name, part in losses.items())
        self.nets.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for slow, parameter in zip(self.slow_critic.parameters(), self.nets.critic.parameters(), strict=True):
                slow.lerp_(parameter, 0.02)
        logs |= {f"losses/{name}_loss": part for name, part in losses.items()}
        found = logs | {"deter": latent.deter, "stoch": latent.stoch.argmax(-1)}
        return {name: part.detach() for name, part in found.items()}

    def loss(self, batch: dict[str, Tensor], start: Latent) -> tuple[dict[str, Tensor], Latent, dict[str, Tensor]]:
        """World model, actor and critic. `batch`, (B, T, ...): vector, image; prev_action: the action before each
        observation; reward: that came with it; is_first, is_last, is_terminal. The last states of each sequence are
        imagined from. Returns the losses, the posterior states and what else to log."""
        nets, starts, losses = self.nets, self.args.imagination_starts, {}
        tokens = nets.encoder(batch)
        latent, post = nets.rssm.observe(start, batch["prev_action"], batch["is_first"], tokens, self.generator)
        prior, feature = nets.rssm.log_probs(nets.rssm.prior(latent.deter)), latent.feature()
        losses["dyn"] = kl(post.detach(), prior).clamp(min=1)  # free nats
        losses["rep"] = kl(post, prior.detach()).clamp(min=1)
        losses["reward"] = two_hot_loss(nets.reward(feature).float().log_softmax(-1), batch["reward"], nets.bins)
        terminal, last = batch["is_terminal"].float(), batch["is_last"].float()
        con_logit, con_target = nets.con(feature).squeeze(-1).float(), (1 - terminal) * self.args.gamma
        losses["con"] = F.binary_cross_entropy_with_logits(con_logit, con_target, reduction="none")
        for name, found in nets.decoder(latent).items():
            target = batch[name].float() / 255 if name == "image" else batch[name]
            losses[name] = ((found - target) ** 2).flatten(2).sum(2)

        state = Latent(*(part[:, -starts:].detach().flatten(0, 1) for part in latent))
        imagined, log_density, entropy = imagine(nets, state, self.args.horizon, self.generator)
        with torch.no_grad():
            reward = two_hot_mean(nets.reward(imagined), nets.bins)
            con = nets.con(imagined).squeeze(-1).float().sigmoid()
            slow_imagined, slow_real = self.slow_critic(imagined), self.slow_critic(feature)
        losses["policy"], losses["value"], returns = self.imagination_loss(
            reward, con, log_density, entropy, nets.critic(imagined), slow_imagined
        )
        value = nets.critic(feature)  # not detached: this loss trains the world model, too
        with torch.no_grad():
            bootstrap = two_hot_mean(value, nets.bins)  # its value; of states imagined from, the imagined return
            bootstrap[:, -starts:] = returns[:, 0].view(len(last), -1)
        real_returns = lambda_return(last, terminal, batch["reward"], bootstrap, self.args.gamma)
        losses["repval"] = (1 - last[:, :-1]) * critic_loss(value, slow_real, real_returns, nets.bins)
        logs = {
            "model/posterior_entropy": -(post.exp() * post).sum((-2, -1)).mean(),
            "model/prior_entropy": -(prior.exp() * prior).sum((-2, -1)).mean(),
            "planner/imagined_return": returns.mean(),
            "planner/imagined_reward": reward[:, 1:].mean(),
            "losses/entropy": entropy.mean(),
        }
        return {name: loss.mean() for name, loss in losses.items()}, latent, logs

    def imagination_loss(
        self, reward: Tensor, con: Tensor, log_density: Tensor, entropy: Tensor, value: Tensor, slow_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Actor and critic on N imagined sequences of H + 1 states: rewards that came with them and probabilities of
        going on (N, H + 1), log densities and entropies of the actions (N, H), logits of the values (N, H + 1, bins),
        for the slow critic too. Returns the losses of policy and value (N, H), and the lambda-returns (N, H)."""
        val = two_hot_mean(value.detach(), self.nets.bins)
        weight = con.cumprod(1)[:, :-1]  # the head was trained on gamma * (1 - terminal): the discount is in con
        returns = lambda_return(torch.zeros_like(con), 1 - con, reward, val, 1.0)
        advantage = (returns - val[:, :-1]) / self.percentiles.update(returns)
        policy_loss = -weight * (log_density * advantage + self.args.entropy_scale * entropy)
        return policy_loss, weight * critic_loss(value, slow_value, returns, self.nets.bins), returns

    def greedy_policy(self, seed: int) -> Callable[..., Any]:
        """A policy (observation, info -> action) for one episode, which does not touch the agent: the most likely
        action in each latent state."""
        generator = torch.Generator(self.device).manual_seed(seed)
        latent, action, first = self.nets.rssm.initial(1), torch.zeros(1, self.shapes.action, device=self.device), True

        def policy(obs: Any, info: dict | None = None) -> Any:
            nonlocal latent, action, first
            latent, found = self.follow([self.observer(obs) | {"is_first": first}], latent, action, generator)
            action, first = found.mode(), False
            return to_env(action[0], self.action_space)

        return policy

    def metrics(self) -> dict[str, float | Image.Image]:
        """What is new since the last call, by TensorBoard tag."""
        found = {name: value.item() for name, value in self.losses.items()}
        self.losses = {}
        return found | ({"model/open_loop": open_loop(self)} if found else {})

    def moving(self) -> list[Tensor]:
        """All that changes but the networks, the replay and plain values."""
        tensors = [*self.optimizer.nu, *self.optimizer.mu, self.optimizer.done, self.percentiles.low]
        return [*tensors, self.percentiles.high, self.observer.mean, self.observer.std, *self.latent, self.action]

    def state_dict(self) -> dict:
        """All that the next step depends on, as tensors and plain values; to be asked for between two steps."""
        return {
            "nets": self.nets.state_dict(),
            "slow_critic": self.slow_critic.state_dict(),
            "replay": self.replay.state_dict(),
            "moving": self.moving(),
            "generator": {self.device.type: self.generator.get_state()},
            "rng": json.dumps(self.rng.bit_generator.state),
            "counts": [self.steps, self.updates, self.scaled_at],
            "now": [self.first, self.rewards, self.losses],
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` gave into a newly made agent."""
        for name in ("nets", "slow_critic", "replay"):
            getattr(self, name).load_state_dict(state[name])
        for moving, saved in zip(self.moving(), state["moving"], strict=True):
            moving.copy_(saved)
        if self.device.type in state["generator"]:  # on another kind of device, random numbers start afresh
            self.generator.set_state(state["generator"][self.device.type])
        self.rng.bit_generator.state = json.loads(state["rng"])
        self.steps, self.updates, self.scaled_at = state["counts"]
        self.first, self.rewards, self.losses = map(copy.copy, state["now"])

    def __getstate__(self) -> tuple:  # for copies and pickles: they are made anew, graphs and compiled code too
        return self.observer.space, self.action_space, self.args, self.state_dict()

    def __setstate__(self, state: tuple) -> None:
        self.__init__(*state[:3])
        self.load_state_dict(state[3])


def train(args: Args, make: Callable[..., gym.Env] | None = None) -> dict:
    """Dreamer: acting and training in turns; returns what is in result.json. `make(render_mode=None)` makes an
    environment that is not registered."""
    make = make or functools.partial(make_env, args)
    envs = [make() for _ in range(args.num_envs)]
    agent = Agent(envs[0].observation_space, envs[0].action_space, args)
    episodes = [Episode(env, args.seed, 1, index) for index, env in enumerate(envs)]
    run = PictureRun(args, agent, episodes, make)
    for _ in run.steps(args.num_envs):
        observations = [episode.obs for episode in episodes]
        actions = agent.act_many(observations)
        for index, (episode, obs, action) in enumerate(zip(episodes, observations, actions, strict=True)):
            next_obs, reward, terminated, truncated = episode.step(action)
            agent.observe(obs, action, reward, next_obs, terminated, truncated, env=index)
            if terminated or truncated:
                length = len(episode.actions)
                run.log({"charts/episodic_return": episode.episodic_return, "charts/episodic_length": length})
                episode.reset()
        agent.update()
    return run.result


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing: the same in every script. Nothing of Dreamer is below this line.
# ---------------------------------------------------------------------------------------------------------------------
SCRIPT, CHECKPOINT = "dreamer", "checkpoint.pt"
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
# Dreamer's own: devices and CUDA graphs, wrappers, what observations are made of, the picture of a dream.
# ---------------------------------------------------------------------------------------------------------------------
def find_device(args: Args) -> torch.device:
    """The device that `args` name; `auto`: a GPU where there is one."""
    torch.set_num_threads(args.threads)
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(kind for kind in usable if usable[kind]) if args.device == "auto" else args.device
    if not usable[name]:
        raise Failure(f"--device {name}: there is none that PyTorch can use")
    return torch.device(name)


class Recorded:
    """Calls a function of named tensors, on a GPU as one CUDA graph: launched one by one, its thousands of small
    operations would keep the GPU waiting. What else it reads or changes must be tensors that stay where they are, and
    its random numbers the generator's."""

    def __init__(self, generator: torch.Generator):
        self.generator, self.calls, self.graphs = generator, {}, {}

    def __call__(self, function: Callable[[dict], dict], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.generator.device.type != "cuda":
            return function(inputs)
        # Contiguous, so that compiled code sees one layout: a recompilation while a graph is recorded would fail.
        inputs = {name: part.contiguous() for name, part in inputs.items()}
        key = function.__name__, *(part.shape for part in inputs.values())
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= 3:  # first without: this makes all that is made once, as compiled code
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


def to_env(action: Tensor, space: gym.Space) -> Any:
    """An action of the model, (A,), as the environment wants it."""
    if isinstance(space, gym.spaces.Discrete):
        return space.start + int(action.argmax())
    share = (action.cpu().numpy().reshape(space.shape).clip(-1, 1) + 1) / 2
    return ((1 - share) * space.low + share * space.high).astype(space.dtype)


def to_model(action: Any, space: gym.Space) -> Tensor:
    """An action of the environment as the model has it, (A,): one-hot, or from -1 to 1."""
    if isinstance(space, gym.spaces.Discrete):
        return F.one_hot(torch.tensor(int(action - space.start)), int(space.n)).float()
    span = np.maximum(space.high.astype(np.float64) - space.low, np.finfo(np.float32).tiny)
    return torch.from_numpy(2 * (np.reshape(action, space.shape) - space.low) / span - 1).float().flatten()


def make_wrapped(args: Args, **drawing: str) -> gym.Env:
    """The environment with what `--atari` puts around it."""
    if not args.atari:
        return gym.make(args.env_id, **drawing, **args.env_kwargs)
    env = gym.make(args.env_id, **drawing, **{"frameskip": 1, "max_episode_steps": 108_000} | args.env_kwargs)  # frames
    env = gym.wrappers.FrameStackObservation(gym.wrappers.AtariPreprocessing(env), 4)
    space = gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)
    return gym.wrappers.TransformObservation(env, lambda obs: np.moveaxis(obs, 0, -1), space)


def check_spaces(observation_space: gym.Space, action_space: gym.Space) -> None:
    """Raises Failure for spaces that this script does not handle."""
    known = (gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary)
    for part in observation_space.values() if isinstance(observation_space, gym.spaces.Dict) else [observation_space]:
        if not isinstance(part, known):
            kinds = ", ".join(kind.__name__ for kind in known)
            raise Failure(f"observations must be {kinds} or a Dict of them, not {part}; Tuple: dyna_q.py")
    box = isinstance(action_space, gym.spaces.Box) and np.issubdtype(action_space.dtype, np.floating)
    if not (box and action_space.is_bounded()) and not isinstance(action_space, gym.spaces.Discrete):
        raise Failure(f"actions must be Discrete or a bounded Box of floating-point numbers, not {action_space}")


def is_picture(space: gym.Space) -> bool:
    """Whether a space holds pictures: a Box of uint8 up to 255, (height, width) or (height, width, channels)."""
    box = isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and len(space.shape) > 1
    if not box or space.high.min() < 255:
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
        self.mean, self.std = torch.zeros(self.vector), torch.ones(self.vector)
        self.numbers = np.array([part.dtype != bool for part in vector for _ in part], bool)  # not choices
        if len({part.shape[:2] for part in image}) > 1:
            raise Failure("pictures of an observation that are not of one size need an --image-size above 0")
        self.image = np.concatenate(image, axis=-1).shape if image else None
        if not self.vector and not self.image:
            raise Failure(f"observations of {space} hold nothing")
        sides = self.image[:2] if self.image else ()
        if sides and (min(sides) < 8 or any(side % 2 ** halvings(sides) for side in sides)):
            raise Failure(f"pictures of {sides} cannot be halved down to 4 x 4; take an --image-size of 8, 16, ...")

    def measure(self, rows: np.ndarray) -> None:
        """Mean and deviation of vectors (steps, V), of choices 0 and 1."""
        mean, std = rows.mean(0, dtype=np.float64), rows.std(0, dtype=np.float64)
        varies = self.numbers & (std > 1e-6 * np.abs(mean) + 1e-12)  # more than rounding does
        self.mean.copy_(torch.from_numpy(np.where(self.numbers, mean, 0)))
        self.std.copy_(torch.from_numpy(np.where(varies, std, 1)))

    def parts(self, space: gym.Space, obs: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
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

    def __call__(self, obs: Any) -> dict[str, np.ndarray]:
        vector, image = self.parts(self.space, obs)
        found = {"vector": np.concatenate(vector).astype(np.float32)} if vector else {}
        return found | ({"image": np.concatenate(image, axis=-1)} if image else {})


class PictureRun(Run):
    """A run that logs pictures, too."""

    def log(self, values: dict[str, float | Image.Image]) -> None:
        """Writes scalars and pictures under their TensorBoard tags, x = environment steps."""
        super().log({tag: value for tag, value in values.items() if not isinstance(value, Image.Image)})
        for tag, value in values.items():
            if isinstance(value, Image.Image):
                value.save(png := io.BytesIO(), "PNG")
                event = Event(wall_time=time.time(), step=self.step)
                event.summary.value.add(tag=tag).image.encoded_image_string = png.getvalue()
                RecordWriter(self.events).write(event.SerializeToString())


@torch.no_grad()
def open_loop(agent: Agent) -> Image.Image:
    """A sequence of the replay, of which the model sees the first half and predicts the rest, without being told where
    an episode begins."""
    _, rows = agent.replay.sample(1, np.random.default_rng(agent.updates), serve=False)
    (batch, state), generator = agent.aligned(rows), torch.Generator(agent.device).manual_seed(agent.updates)
    half, tokens, states, rssm = agent.args.batch_length // 2, agent.nets.encoder(batch), [], agent.nets.rssm
    for t in range(agent.args.batch_length):
        action, noise = batch["prev_action"][:, t], rssm.noise(1, generator=generator)
        if t < half:
            state, _ = rssm.observe_step(state, action, batch["is_first"][:, t], tokens[:, t], noise)
        else:
            state = rssm.imagine_step(state, action, noise)
        states.append(state)
    found, name = agent.nets.decoder(Latent(*stacked(states))), "image" if agent.shapes.image else "vector"
    predicted = (found[name][0] * 255).byte() if name == "image" else found[name][0]
    return draw_open_loop(batch[name][0].cpu().numpy(), predicted.cpu().numpy(), half)


def draw_open_loop(real: np.ndarray, predicted: np.ndarray, seen: int) -> Image.Image:
    """Pictures (T, height, width, channels) in two rows, or the first 16 numbers (T, V) as curves, with a legend."""
    steps = len(real)
    if real.ndim == 4:
        every, shown = max(1, steps // 16), slice(0, 3) if real.shape[-1] == 3 else slice(-1, None)  # of many the last
        strips = [np.concatenate(strip[::every, ..., shown], axis=1) for strip in (real, predicted)]
        body, names = Image.fromarray(np.concatenate(strips).squeeze()).convert("RGB"), ("Upper row", "lower row")
        zoom = math.ceil(640 / body.width)
        body = body.resize((zoom * body.width, zoom * body.height), Image.Resampling.NEAREST)
        border = body.width * math.ceil(seen / every) / math.ceil(steps / every)
    else:
        panels, border = np.stack([real, predicted]).transpose(2, 0, 1)[:16], 640 * seen / steps  # (V, 2, T)
        body, names = Image.new("RGB", (640, 48 * len(panels)), "white"), ("Black", "red")
        for panel, curves in enumerate(panels):
            ImageDraw.Draw(body).text((2, 48 * panel), f"number {panel}", "grey")
            low, scale = curves.min(), 44 / max(np.ptp(curves), 1e-6)
            for curve, colour in zip(curves, ("black", "red"), strict=True):
                heights = enumerate(48 * panel + 46 - scale * (curve - low))
                ImageDraw.Draw(body).line([(640 * (t + 0.5) / steps, float(y)) for t, y in heights], colour)
    picture = Image.new("RGB", (body.width, body.height + 32), "white")
    picture.paste(body, (0, 32))
    ImageDraw.Draw(picture).line([(border, 32), (border, picture.height)], "blue", width=2)
    legend = f"{steps} real steps from left to right. {names[0]}: what was observed; {names[1]}: what the model says.\n"
    legend += "Left of the blue line it has seen the observations; right of it, it knows only the actions."
    ImageDraw.Draw(picture).text((2, 2), legend, "black")
    return picture


if __name__ == "__main__" and "__file__" in globals():  # which a notebook has not
    main()
