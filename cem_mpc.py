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

An ensemble of neural networks learns from every real step what comes next; each network predicts a distribution, which
holds the noise of the world, and where the networks disagree they have not seen enough. At every step the cross-entropy
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

Beyond the paper: rewards and terminations are learned, so that an environment is all that has to be given; the ensemble
is trained with a hold-out set and early stopping, as in MBPO (Janner et al. 2019; code jannerm/mbpo). Settings of PETS
come from the authors' code, kchua/handful-of-trials.

Run:     python cem_mpc.py
         python cem_mpc.py --env-id InvertedPendulum-v5 --terminal-value --horizon 10 --total-timesteps 2000
         python cem_mpc.py --help
Expect:  Pendulum-v1 swung up after 1,000 steps: return -153 over 5 episodes (mean of 5 seeds: -99, -150, -151, -180,
         -185; a random policy scores about -1,200), 3 minutes a seed on one of 2 CPU cores.
"""

import ast
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
from typing import Any, Literal

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
    """Options of the environment, as name=value: `--env-kwargs is_slippery=False map_name=8x8`."""
    total_timesteps: int = 1_000
    """Environment steps (calls of `env.step`) to learn for."""
    seed: int = 1
    """Seed of every random draw: the agent's, the episodes', the evaluation's."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the networks are; `auto` takes a GPU where there is one."""
    threads: int = 1
    """CPU threads; two runs side by side get more done than one with two threads."""
    compile: bool = False
    """Compile loss and planner with torch.compile, which changes nothing but speed: less on a CPU, more on a GPU."""
    eval_every: int = 1_000
    """Environment steps between two evaluations (greedy policy, environment of its own)."""
    eval_episodes: int = 5
    """Episodes of an evaluation. Where the environment has no time limit, one ends after 1,000 steps at the latest."""
    checkpoint_every: int = 500
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
    """Run folder whose model and data to start from. With `--total-timesteps 0` this plans from a fixed data set; with
    `--reward-fn` the same model is put to another task; with neither it is fine-tuned to a changed environment."""
    reward_fn: str | None = None
    """`module:function` for the reward: obs, action, next_obs of shapes (..., size) -> (...). None: it is learned."""
    termination_fn: str | None = None
    """`module:function` for the termination, True or False, called in the same way. None: it is learned."""
    learning_starts: int = 200
    """Steps with uniformly random actions before the first training and planning (PETS: one trial)."""
    gamma: float = 0.99
    """Discount factor of imagined rewards (PETS: 1)."""

    ensemble_size: int = 5
    """Networks in the ensemble (PETS: 5, MBPO: 7)."""
    num_elites: int = 5
    """Networks that are used, those with the lowest hold-out error (PETS: all, MBPO: 5 of 7)."""
    hidden: tuple[int, ...] = (200, 200, 200)
    """Units of each hidden layer (PETS: 3 or 4 layers of 200)."""
    weight_decay: tuple[float, ...] = (2.5e-5, 5e-5, 7.5e-5, 1e-4)
    """Factor of half the squared weights of each layer, the last one included (MBPO; not of the biases)."""
    model_lr: float = 1e-3
    """Step size of Adam for the ensemble (PETS, MBPO)."""
    model_batch_size: int = 32
    """Rows per network and gradient step (PETS: 32; MBPO: 256, which with little data are too few steps an epoch)."""
    train_every: int = 50
    """Environment steps between two trainings of the ensemble (PETS: a trial, mbrl-lib: 50)."""
    patience: int = 5
    """Epochs without a member better by 1 % on the hold-out set, after which a training ends (MBPO)."""
    max_epochs: int = 50
    """Epochs after which a training ends in any case."""
    holdout_ratio: float = 0.1
    """Probability that a transition goes to the hold-out set, which no network is trained on (MBPO: 0.2)."""
    max_holdout: int = 5_000
    """Largest size of the hold-out set (MBPO)."""

    planner: Literal["random_shooting", "cem", "icem", "mppi", "gradient"] = "cem"
    """How sequences are searched; Discrete actions: random_shooting and cem."""
    horizon: int = 25
    """Steps imagined (PETS: 25 to 30)."""
    population: int = 64
    """Sequences scored in an iteration (PETS: 400 to 500)."""
    iterations: int = 3
    """Iterations of the search for each action (PETS: 5)."""
    num_best: int = 10
    """Best sequences, to which the distribution moves (PETS: a tenth of the population)."""
    momentum: float = 0.1
    """Weight of the old mean and variance when the distribution moves (PETS: 0.1)."""
    particles: int = 5
    """Imagined futures of each sequence, a multiple of num_elites (PETS: 20)."""
    sampling: Literal["ts1", "tsinf"] = "tsinf"
    """Trajectory sampling: `tsinf` keeps a particle with one member, `ts1` redraws the member at every step."""
    noise_beta: float = 2.0
    """icem: exponent of the noise's spectrum; 0 is white, larger is smoother in time (Pinneri et al. 2020)."""
    keep: float = 0.3
    """icem: share of the best sequences that the next iteration and the next step start with (Pinneri et al. 2020)."""
    temperature: float = 0.1
    """mppi: temperature of the weights exp(return / temperature), returns scaled to unit deviation (Williams 2017)."""
    plan_lr: float = 0.1
    """gradient: step size of Adam on the sequences, in units of half the action range."""
    terminal_value: bool = False
    """Add the value of the last imagined state, learned from the latest real steps, to the return."""
    value_updates: int = 4
    """Gradient steps on the terminal value for each environment step."""
    value_window: int = 2_000
    """Latest steps that the value is learned from: it is the value of how the agent acts now, not of how it began."""
    value_lambda: float = 0.95
    """Lambda of the returns that the value learns (Sutton & Barto, section 12.1): 0 one step, 1 to the end."""

    def __post_init__(self):
        check_ranges(self, total_timesteps=(0, math.inf), seed=(0, 2**32 - 1), eval_every=(1, math.inf))
        check_ranges(self, eval_episodes=(1, math.inf), checkpoint_every=(1, math.inf))
        check_ranges(self, threads=(1, 1024), learning_starts=(1, math.inf), gamma=(0, 1), ensemble_size=(1, 1000))
        check_ranges(self, num_elites=(1, self.ensemble_size), model_lr=(1e-9, 1), model_batch_size=(1, 10**6))
        check_ranges(self, train_every=(1, math.inf), patience=(1, 10**6), max_epochs=(1, 10**6))
        check_ranges(self, holdout_ratio=(0, 0.9), max_holdout=(1, math.inf), horizon=(1, 1000), population=(2, 10**6))
        check_ranges(
            self, iterations=(1, 1000), num_best=(1, self.population), momentum=(0, 0.999), particles=(1, 10**4)
        )
        check_ranges(
            self,
            noise_beta=(0, 10),
            keep=(0, 1),
            temperature=(1e-9, 1e9),
            plan_lr=(1e-9, 10),
            value_updates=(0, 100),
            value_window=(1, math.inf),
            value_lambda=(0, 1),
        )
        if self.particles % self.num_elites:
            raise Failure(f"--particles must be a multiple of --num-elites, which is {self.num_elites}")
        if len(self.weight_decay) != len(self.hidden) + 1 or not all(size >= 1 for size in self.hidden):
            raise Failure("--weight-decay needs one value more than --hidden, whose values are at least 1")


def check_ranges(args: Any, **ranges: tuple[float, float]) -> None:
    """Raises Failure for the first field that is outside its closed range (a NaN is outside of every range)."""
    for name, (low, high) in ranges.items():
        if not low <= (value := getattr(args, name)) <= high:
            raise Failure(f"--{name.replace('_', '-')} must be from {low} to {high}, not {value}")


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
        env = gym.make(args.env_id, render_mode=render_mode, **kwargs)
        if render_mode:  # where a package for drawing is missing, this says so now and not after the training
            env.reset(seed=0)
            env.render()
        return env
    except Exception as error:
        unknown = isinstance(error, gym.error.UnregisteredEnv)
        hint = "; an environment of another package is named module:Name-v0" if unknown else ""
        raise Failure(f"cannot make the environment {args.env_id}: {error}{hint}") from error


def check_observation(obs: Any, space: gym.Space) -> None:
    """Raises ValueError for an observation of another shape than the space's, or with a NaN or inf in it."""
    if np.shape(obs) != space.shape or not np.isfinite(obs).all():
        raise ValueError(f"observation {obs!r} is not a finite array of shape {space.shape}")


def check_spaces(observation_space: gym.Space, action_space: gym.Space) -> None:
    """Raises Failure for spaces that this script does not handle."""
    if not isinstance(observation_space, gym.spaces.Box) or math.prod(observation_space.shape) > 1_000:
        raise Failure(f"observations must be a vector, not {observation_space}; for others see dyna_q.py, dreamer.py")
    bounded = isinstance(action_space, gym.spaces.Box) and action_space.is_bounded()
    if not bounded and not isinstance(action_space, gym.spaces.Discrete):
        raise Failure(f"actions must be a bounded Box or Discrete, not {action_space}")


def load_function(name: str | None) -> Callable | None:
    """The function named as `module:function`, of a module on the path or in the working folder."""
    if name is None:
        return None
    try:
        sys.path.append(os.getcwd())
        module, function = name.split(":")
        return getattr(importlib.import_module(module), function)
    except (ValueError, ImportError, AttributeError) as error:
        raise Failure(f"cannot load {name}, which should read module:function: {error}") from error
    finally:
        sys.path.pop()


def memory_of(env: gym.Env) -> dict:
    """What an environment remembers across its episodes (a wall that moves at step 1000); most remember nothing."""
    return env.unwrapped.state_dict() if hasattr(env.unwrapped, "load_state_dict") else {}


def seed_of(*key: int) -> int:
    """A seed of one purpose, from the run's seed and the purpose's number; different purposes are independent.

    The purposes: 0 acting, 1 training episodes, 2 evaluation episodes, 3 acting in evaluation, 4 planning.
    """
    return int(np.random.SeedSequence(key).generate_state(1)[0] >> 1)


class Episode:
    """Runs an environment episode after episode, and can come back to the middle of one.

    Every episode is reset with a seed of its own, so that a restored one is brought back by repeating its actions: this
    holds for any environment that is deterministic given its seed, and nothing of it needs to be stored. One that
    remembers something across episodes offers it as `state_dict()` and `load_state_dict()`.
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
            self.obs, self.info = self.env.reset(seed=seed_of(*self.key, self.index))
            check_observation(self.obs, self.env.observation_space)
        except Exception as error:
            raise Failure(f"reset of episode {self.index}: {type(error).__name__}: {error}") from error

    def step(self, action: Any) -> tuple[Any, float, bool, bool]:
        """Returns next observation, reward, terminated, truncated; after either of the two, call `reset`."""
        try:
            self.obs, reward, terminated, truncated, self.info = self.env.step(action)
            check_observation(self.obs, self.env.observation_space)
            if not math.isfinite(reward):
                raise ValueError(f"reward is {reward}")
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
Layers = list[tuple[Tensor, Tensor]]  # weights (G, in, out) and biases (G, 1, out) of G networks


def mlp(x: Tensor, layers: Layers) -> Tensor:
    """(G, B, in) -> (G, B, out): G networks at once, each layer one batched matrix product."""
    for weight, bias in layers[:-1]:
        x = F.silu(torch.baddbmm(bias, x, weight))  # (G, B, hidden)
    return torch.baddbmm(layers[-1][1], x, layers[-1][0])


class Ensemble(nn.Module):
    """E pairs of networks: one from (obs, action) to a Gaussian over delta obs; and one that says, of the step to a
    given next obs, the reward and the logit of termination. These two often jump at a boundary, and where that runs is
    plain in the next obs and blurred in the one before. Inputs and targets are standardised with the data's statistics.
    """

    def __init__(self, obs_size: int, action_size: int, args: Args, generator: torch.Generator):
        super().__init__()
        self.obs_size, device = obs_size, generator.device

        def layers(*sizes: int) -> tuple[nn.ParameterList, nn.ParameterList]:
            weights, biases = nn.ParameterList(), nn.ParameterList()
            for fan_in, fan_out in itertools.pairwise(sizes):
                std = 1 / (2 * math.sqrt(fan_in))  # as in the authors' code of PETS and MBPO
                weight = torch.empty(args.ensemble_size, fan_in, fan_out, device=device)
                weights.append(nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator))
                biases.append(torch.zeros(args.ensemble_size, 1, fan_out, device=device))
            return weights, biases

        self.weights, self.biases = layers(obs_size + action_size, *args.hidden, 2 * obs_size)
        self.outcome_weights, self.outcome_biases = layers(2 * obs_size + action_size, 128, 128, 2)
        self.max_logvar = nn.Parameter(torch.full((obs_size,), 0.5, device=device))
        self.min_logvar = nn.Parameter(torch.full((obs_size,), -10.0, device=device))
        for name, size in (("obs", obs_size), ("action", action_size), ("delta", obs_size), ("reward", 1)):
            self.register_buffer(f"{name}_mean", torch.zeros(size, device=device))
            self.register_buffer(f"{name}_std", torch.ones(size, device=device))
        self.register_buffer("elites", torch.arange(args.num_elites, device=device))

    def set_scale(self, **data: Tensor) -> None:
        """Takes mean and standard deviation of obs, action, delta and reward, each (N, size)."""
        for name, values in data.items():
            std = values.std(0, correction=0)
            getattr(self, f"{name}_mean").copy_(values.mean(0))
            getattr(self, f"{name}_std").copy_(torch.where(std < 1e-6, 1.0, std))  # a constant is left as it is

    def scale(self, name: str, values: Tensor) -> Tensor:
        """Standardises."""
        return (values - getattr(self, f"{name}_mean")) / getattr(self, f"{name}_std")

    def select(self, members: Tensor | None = None) -> tuple[Layers, Layers]:
        """Layers of the two networks of some members (G,), or of all: what is not asked for is not computed."""
        lists = (self.weights, self.biases), (self.outcome_weights, self.outcome_biases)
        if members is None:
            return tuple(list(zip(*both, strict=True)) for both in lists)
        return tuple([(weight[members], bias[members]) for weight, bias in zip(*both, strict=True)] for both in lists)

    def gaussian(self, obs: Tensor, action: Tensor, layers: tuple[Layers, Layers]) -> tuple[Tensor, Tensor]:
        """obs (G, B, obs_size), action (G, B, action_size) -> mean and log variance (G, B, obs_size) of standardised
        delta obs; row g by member g of `layers`."""
        x = torch.cat([self.scale("obs", obs), self.scale("action", action)], dim=-1)
        mean, logvar = mlp(x, layers[0]).chunk(2, dim=-1)
        logvar = self.max_logvar - F.softplus(self.max_logvar - logvar)  # PETS, appendix A.1: soft bounds,
        logvar = self.min_logvar + F.softplus(logvar - self.min_logvar)  # the upper one first
        return mean, logvar

    def predict(self, obs: Tensor, action: Tensor, layers: tuple[Layers, Layers]) -> tuple[Tensor, Tensor]:
        """As `gaussian`, but mean and standard deviation in the environment's units."""
        mean, logvar = self.gaussian(obs, action, layers)
        return mean * self.delta_std + self.delta_mean, (0.5 * logvar).exp() * self.delta_std

    def outcome(self, action: Tensor, delta: Tensor, next_obs: Tensor, layers: tuple[Layers, Layers]) -> Tensor:
        """Of steps (G, B, size): standardised reward and logit of termination, (G, B, 2)."""
        x = [self.scale("obs", next_obs), self.scale("delta", delta), self.scale("action", action)]
        return mlp(torch.cat(x, dim=-1), layers[1])


def ensemble_loss(model: Ensemble, batch: dict[str, Tensor], weight_decay: tuple[float, ...]) -> Tensor:
    """Sum over members of the negative log likelihood of delta obs (PETS, equation 1, without its constants), of the
    squared error of the reward and of the cross-entropy of termination, each a mean over the rows of `batch`, whose
    tensors are (E, B, size); plus the pull on the bounds of the variance and the weight decay."""
    layers, obs, action, delta = model.select(), batch["obs"], batch["action"], batch["delta"]
    mean, logvar = model.gaussian(obs, action, layers)
    gaussian = ((mean - model.scale("delta", delta)) ** 2 * (-logvar).exp() + logvar).mean((1, 2)).sum()
    reward, logit = model.outcome(action, delta, obs + delta, layers).unbind(-1)  # (E, B)
    squared = ((reward - model.scale("reward", batch["reward"]).squeeze(-1)) ** 2).mean(1).sum()
    terminated = batch["terminated"].squeeze(-1)
    bernoulli = F.binary_cross_entropy_with_logits(logit, terminated, reduction="none").mean(1).sum()
    bounds = 0.01 * (model.max_logvar.sum() - model.min_logvar.sum())
    decay = sum(0.5 * factor * (weight**2).sum() for factor, weight in zip(weight_decay, model.weights, strict=True))
    return gaussian + squared + bernoulli + bounds + decay


def fit(
    model: Ensemble,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[..., Tensor],
    data: "Buffer",
    args: Args,
    generator: torch.Generator,
) -> dict[str, float]:
    """Trains the ensemble until no member gets better on the hold-out set; each is left with its own best weights.

    The hold-out error is the squared error of the mean: a variance that is still off must not decide (MBPO's code).
    """
    columns = data.columns()
    holdout, train = columns["holdout"].nonzero()[:, 0], (~columns["holdout"]).nonzero()[:, 0]
    holdout = holdout if len(holdout) else train
    columns = {
        name: columns[name].view(data.size, -1).float() for name in ("obs", "action", "delta", "reward", "terminated")
    }
    model.set_scale(**{name: columns[name][train] for name in ("obs", "action", "delta", "reward")})
    unseen = {name: column[holdout] for name, column in columns.items()}
    members, device = len(model.biases[0]), train.device
    # The bootstrap: every member has rows of its own, drawn with replacement.
    rows = train[torch.randint(len(train), (members, len(train)), generator=generator, device=device)]  # (E, N)
    best, stale, epochs = torch.full((members,), math.inf, device=device), 0, 0
    weights = [*model.weights, *model.biases]
    best_weights = [weight.detach().clone() for weight in weights]
    while stale <= args.patience and epochs < args.max_epochs:
        epochs += 1
        order = torch.rand(rows.shape, generator=generator, device=device).argsort(1)
        for batch in rows.gather(1, order).split(args.model_batch_size, dim=1):  # (E, B)
            loss = loss_fn(model, {name: column[batch] for name, column in columns.items()}, args.weight_decay)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.inference_mode():
            obs, action = (unseen[name].expand(members, -1, -1) for name in ("obs", "action"))
            mean, logvar = model.gaussian(obs, action, model.select())
            squared_error = (mean - model.scale("delta", unseen["delta"])) ** 2  # (E, N, obs_size)
            error = squared_error.mean((1, 2))
        improved = error < 0.99 * best
        best = torch.where(improved, error, best)
        for weight, best_weight in zip(weights, best_weights, strict=True):
            best_weight[improved] = weight.detach()[improved]
        stale = 0 if improved.any() else stale + 1
    with torch.no_grad():
        for weight, best_weight in zip(weights, best_weights, strict=True):
            weight.copy_(best_weight)
    model.elites.copy_(best.argsort()[: len(model.elites)])
    nll = 0.5 * (squared_error * (-logvar).exp() + logvar + math.log(2 * math.pi)).mean()
    return {
        "losses/model_loss": loss.item(),
        "model/holdout_mse": best.mean().item(),
        "model/holdout_nll": nll.item(),
        "model/epochs": float(epochs),
    }


@torch.inference_mode()
def diagnose(model: Ensemble, data: "Buffer", start: int) -> dict[str, float]:
    """How well the elites predict the transitions from row `start` on, with which they have not been trained yet.

    Errors are in standard deviations of the data: of a step's change for one step, of the observation for k steps.
    """
    layers, count = model.select(model.elites), len(model.elites)
    obs, action, delta = (column[start : data.size] for column in (data.obs, data.action, data.delta))
    actions = action.expand(count, -1, -1)
    mean, std = model.predict(obs.expand(count, -1, -1), actions, layers)  # (G, N, obs_size)
    epistemic, aleatoric = mean.var(0, correction=0), (std**2).mean(0)  # (N, obs_size): disagreement, expected noise
    error = mean.mean(0) - delta
    inside = error.abs() < 1.645 * (epistemic + aleatoric).sqrt()
    rmse = (error**2).mean(0).sqrt() / model.delta_std
    reward = model.outcome(actions, mean, obs + mean, layers)[..., 0].mean(0)
    reward_error = reward - model.scale("reward", data.reward[start : data.size, None])[:, 0]
    logs = {
        "model/coverage_90": inside.float().mean().item(),
        "model/disagreement": (epistemic.sqrt() / model.delta_std).mean().item(),
        "model/noise": (aleatoric.sqrt() / model.delta_std).mean().item(),
        "model/error_reward": (reward_error**2).mean().sqrt().item(),
    }
    logs |= {f"model/error_{index}": value for index, value in enumerate(rmse[:32].tolist())}
    sizes = [(value / model.delta_std**2).mean(1) for value in (epistemic, error**2)]
    if len(obs) > 2:
        ranks = torch.stack([size.argsort().argsort().float() for size in sizes])
        logs["model/disagreement_rank_correlation"] = torch.corrcoef(ranks)[0, 1].item()
    for steps in (1, 5, 10, 20):
        begin = torch.arange(start, max(start, data.size - steps + 1), device=obs.device)
        begin = begin[data.episode[begin] == data.episode[begin + steps - 1]]
        if len(begin):
            state = data.obs[begin].expand(count, -1, -1)
            for step in range(steps):
                mean, _ = model.predict(state, data.action[begin + step].expand(count, -1, -1), layers)
                state = state + mean
            last = begin + steps - 1
            error = (state - data.obs[last] - data.delta[last]) / model.obs_std
            logs[f"model/error_{steps}_steps"] = (error**2).mean().sqrt().item()
    return logs


# ---------------------------------------------------------------------------------------------------------------------
# Buffer
# ---------------------------------------------------------------------------------------------------------------------
class Buffer:
    """All transitions, in tensors that double when they are full."""

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

    def columns(self) -> dict[str, Tensor]:
        """The filled part of every column."""
        return {name: value[: self.size] for name, value in vars(self).items() if isinstance(value, Tensor)}

    def state_dict(self) -> dict:
        return {name: value.clone() for name, value in self.columns().items()}

    def load_state_dict(self, state: dict) -> None:
        self.size = len(state["obs"])
        for name, value in state.items():
            column = getattr(self, name)
            room = torch.zeros(max(0, len(column) - self.size), *column.shape[1:], dtype=column.dtype)
            setattr(self, name, torch.cat([value.cpu(), room]).to(column.device))


# ---------------------------------------------------------------------------------------------------------------------
# Planner
# ---------------------------------------------------------------------------------------------------------------------
def imagine(
    model: Ensemble,
    layers: tuple[Layers, Layers],
    obs: Tensor,
    plans: Tensor,
    noise: Tensor,
    order: Tensor | None,
    gamma: float,
    reward_fn: Callable | None,
    termination_fn: Callable | None,
    value_fn: Callable | None,
) -> Tensor:
    """Trajectory sampling (PETS, section 5.1): expected returns (N,) of action sequences.

    obs (obs_size,), plans (N, H, action_size) in the environment's units, noise (H, G, N * P / G, obs_size) standard
    normal. Of the P particles of a sequence, the G elite members of `layers` take P / G each: for all H steps (TS
    infinity, `order` None), or dealt anew at every step by `order` (H, G, N * P / G), permutations over G (TS1).
    """
    groups, rows = noise.shape[1:3]
    actions = plans.repeat_interleave(rows // len(plans), dim=0)  # (R, H, action_size), R = N * P / G
    state = obs.expand(groups, rows, -1)  # (G, R, obs_size)
    alive, returns = torch.ones(groups, rows, device=obs.device), torch.zeros(groups, rows, device=obs.device)
    for step in range(plans.shape[1]):
        if order is not None:
            state = state.gather(0, order[step][..., None].expand_as(state))
            alive, returns = alive.gather(0, order[step]), returns.gather(0, order[step])
        action = actions[:, step].expand(groups, -1, -1)
        mean, std = model.predict(state, action, layers)
        delta = mean + std * noise[step]
        next_state = state + delta
        reward, logit = model.outcome(action, delta, next_state, layers).unbind(-1)
        reward = reward_fn(state, action, next_state) if reward_fn else reward * model.reward_std + model.reward_mean
        returns = returns + gamma**step * alive * reward
        alive = alive * (~termination_fn(state, action, next_state) if termination_fn else torch.sigmoid(-logit))
        state = next_state
    if value_fn is not None:
        returns = returns + gamma ** plans.shape[1] * alive * value_fn(state)
    return returns.mean(0).view(len(plans), -1).mean(1)


# Each planner gets `score`, from sequences (N, H, A) with actions in [-1, 1] to returns (N,), and `start` (M, H, A):
# what it returned for the step before, shifted by one, or the middle of the action range where an episode begins. It
# returns sequences (M', H, A), of which the first is carried out.
def best_sequences(plans: Tensor, returns: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best of N sequences and a weight for each, which is 0 for returns that are no finite number."""
    returns, index = torch.nan_to_num(returns, nan=-math.inf, posinf=-math.inf).topk(count)
    return plans[index], returns.isfinite().float()[:, None, None]


def random_shooting(score: Callable, start: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """The best of population * iterations uniformly random sequences (PETS, section 5.2)."""
    shape = (args.population * args.iterations, *start.shape[1:])
    plans = torch.rand(shape, generator=generator, device=start.device) * 2 - 1
    return best_sequences(plans, score(plans), 1)[0]


def cem(score: Callable, start: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """Cross-entropy method as in the authors' code: returns the mean of the last distribution, not the best sample."""
    mean, variance = start[0], torch.full_like(start[0], 0.25)  # (range / 4)^2
    for _ in range(args.iterations):
        # The bounds are at least two standard deviations away, which is where the normal distribution is cut.
        std = torch.minimum(variance.sqrt(), torch.minimum(1 + mean, 1 - mean) / 2)
        noise = torch.empty(args.population, *mean.shape, device=mean.device)
        plans = mean + std * nn.init.trunc_normal_(noise, generator=generator)  # cut at -2 and 2
        best, weight = best_sequences(plans, score(plans), args.num_best)
        if weight.any():
            best_mean = (weight * best).sum(0) / weight.sum()
            best_variance = (weight * (best - best_mean) ** 2).sum(0) / weight.sum()
            mean = args.momentum * mean + (1 - args.momentum) * best_mean
            variance = args.momentum * variance + (1 - args.momentum) * best_variance
    return mean[None]


def coloured_noise(shape: tuple[int, ...], beta: float, generator: torch.Generator) -> Tensor:
    """Noise of unit variance (N, H, A) whose power at frequency f along H goes with f^-beta (Pinneri et al. 2020)."""
    count, steps, size = shape
    frequency = torch.fft.rfftfreq(steps, device=generator.device)
    frequency[0] = 1 / steps
    scale = frequency ** (-beta / 2)  # (F,)
    # The constant and, for even H, the highest frequency have no imaginary part; their real part has all of the power.
    ends = [0, -1] if steps % 2 == 0 else [0]
    real, imaginary = torch.randn(2, count, size, len(scale), generator=generator, device=generator.device) * scale
    real[..., ends] *= math.sqrt(2)
    power = 4 * scale**2
    power[ends] /= 2
    noise = torch.fft.irfft(torch.complex(real, imaginary), n=steps) * steps / power.sum().sqrt()
    return noise.transpose(1, 2)


def icem(score: Callable, start: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """Improved CEM (Pinneri et al. 2020, algorithm 1): coloured noise, fewer samples in later iterations, the best
    sequences kept over iterations and steps, the mean as a candidate in the last one; carries out the best sequence."""
    mean, kept = start[min(1, len(start) - 1)], start[2:]
    std = torch.full_like(mean, 0.5)
    for iteration in range(args.iterations):
        count = max(2 * args.num_best, int(args.population * 1.25**-iteration))
        plans = mean + std * coloured_noise((count, *mean.shape), args.noise_beta, generator)
        last = [mean[None]] if iteration == args.iterations - 1 else []
        plans = torch.cat([plans.clamp(-1, 1), kept, *last])
        best, weight = best_sequences(plans, score(plans), args.num_best)
        kept = best[: int(args.keep * args.num_best)]
        if weight.any():
            best_mean = (weight * best).sum(0) / weight.sum()
            best_std = ((weight * (best - best_mean) ** 2).sum(0) / weight.sum()).sqrt()
            mean = args.momentum * mean + (1 - args.momentum) * best_mean
            std = args.momentum * std + (1 - args.momentum) * best_std
    return torch.cat([best[:1], mean[None], kept])


def mppi(score: Callable, start: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """Model-predictive path integral control (Williams et al. 2017): the mean of all samples by weights exp(return)."""
    mean = start[0]
    for _ in range(args.iterations):
        noise = torch.randn(args.population, *mean.shape, generator=generator, device=mean.device)
        plans = (mean + 0.5 * noise).clamp(-1, 1)
        returns = score(plans)
        finite = returns[returns.isfinite()]
        if len(finite):
            scaled = (returns - finite.max()) / (finite.std(correction=0) + 1e-6) / args.temperature
            weight = torch.where(returns.isfinite(), scaled, -math.inf).softmax(0)
            mean = args.momentum * mean + (1 - args.momentum) * torch.einsum("n,nha->ha", weight, plans)
    return mean[None]


def gradient(score: Callable, start: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """Gradient ascent on the return through the model, from the last plan and num_best - 1 random sequences: shooting
    with first derivatives, where iLQR uses second ones."""
    shape = (args.num_best - 1, *start.shape[1:])
    plans = torch.cat([start[:1], torch.rand(shape, generator=generator, device=start.device) * 2 - 1])
    plans.requires_grad_()
    optimizer = torch.optim.Adam([plans], lr=args.plan_lr)
    for _ in range(args.iterations):
        with torch.enable_grad():
            returns = score(plans)
            (ascent,) = torch.autograd.grad(returns[returns.isfinite()].sum(), [plans])
        plans.grad = torch.nan_to_num(-ascent, 0.0, 0.0, 0.0)
        optimizer.step()
        plans.data.clamp_(-1, 1)
    plans = plans.detach()
    return best_sequences(plans, score(plans), 1)[0]


def random_shooting_discrete(score: Callable, start: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """The best of population * iterations random sequences of one-hot actions."""
    shape, size = (args.population * args.iterations, start.shape[1]), start.shape[2]
    plans = F.one_hot(torch.randint(size, shape, generator=generator, device=start.device), size).float()
    return best_sequences(plans, score(plans), 1)[0]


def cem_discrete(score: Callable, start: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """Cross-entropy method over one categorical distribution a step: `start` and the result are probabilities."""
    # Half of it uniform: probabilities that came out as 0 and 1 would leave nothing to search at the next step.
    probabilities = (start[0] + 1 / start.shape[2]) / 2  # (H, A)
    for _ in range(args.iterations):
        actions = probabilities.multinomial(args.population, replacement=True, generator=generator).T  # (N, H)
        plans = F.one_hot(actions, probabilities.shape[1]).float()
        best, weight = best_sequences(plans, score(plans), args.num_best)
        if weight.any():
            best_mean = (weight * best).sum(0) / weight.sum()
            probabilities = args.momentum * probabilities + (1 - args.momentum) * best_mean
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

    chunk = 4096  # rows that are imagined at once: what they need stays in the cache of a core

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        check_spaces(observation_space, action_space)
        self.args, self.discrete = args, isinstance(action_space, gym.spaces.Discrete)
        planners = DISCRETE_PLANNERS if self.discrete else BOX_PLANNERS
        if args.planner not in planners:
            raise Failure(f"--planner {args.planner} is not for {action_space}, but one of {', '.join(planners)}")
        self.planner, self.device = planners[args.planner], find_device(args.device)
        self.obs_size = math.prod(observation_space.shape)
        if self.discrete:
            self.action_size, self.first_action = int(action_space.n), int(action_space.start)
        else:
            self.action_size, self.action_shape = math.prod(action_space.shape), action_space.shape
            low, high = (
                torch.tensor(bound.reshape(-1), device=self.device) for bound in (action_space.low, action_space.high)
            )
            self.middle, self.half_range = (high + low) / 2, (high - low) / 2
        self.generator = torch.Generator(self.device).manual_seed(seed_of(args.seed, 0))
        self.model = Ensemble(self.obs_size, self.action_size, args, self.generator)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.model_lr)
        self.data = Buffer(self.obs_size, self.action_size, self.device)
        self.value = Value(self.obs_size, self.generator) if args.terminal_value else None
        self.reward_fn, self.termination_fn = load_function(args.reward_fn), load_function(args.termination_fn)
        self.loss_fn, self.imagine = ensemble_loss, imagine
        if args.compile:
            self.loss_fn, self.imagine = torch.compile(ensemble_loss), torch.compile(imagine)
        self.start: Tensor | None = None  # what the planner starts from at the next step
        self.trained, self.episode, self.logs = 0, 0, {}
        if args.init_from:
            self.init_from(Path(args.init_from))

    def act(self, obs: Any) -> Any:
        """The first action of the plan; before `learning_starts` steps, a random one."""
        if self.data.size < self.args.learning_starts:
            return self.to_env(self.random_actions(1)[0])
        action, self.start = self.plan(obs, self.start, self.generator)
        return action

    def random_actions(self, count: int) -> Tensor:
        """Uniform actions (count, action_size), in [-1, 1] or one-hot."""
        if self.discrete:
            index = torch.randint(self.action_size, (count,), generator=self.generator, device=self.device)
            return F.one_hot(index, self.action_size).float()
        return torch.rand(count, self.action_size, generator=self.generator, device=self.device) * 2 - 1

    def plan(self, obs: Any, start: Tensor | None, generator: torch.Generator) -> tuple[Any, Tensor]:
        """Returns the action, and what to start from at the next step; `start` None: an episode begins."""
        args = self.args
        with torch.no_grad() if args.planner == "gradient" else torch.inference_mode():
            fill = torch.full(
                (1, 1, self.action_size), 1 / self.action_size if self.discrete else 0.0, device=self.device
            )
            if start is None:
                start = fill.expand(1, args.horizon, -1)
            obs = torch.as_tensor(np.asarray(obs, np.float32).reshape(-1), device=self.device)
            layers = self.model.select(self.model.elites)
            plans = self.planner(lambda plans: self.score(layers, obs, plans, generator), start, args, generator)
            start = torch.cat([plans[:, 1:], fill.expand(len(plans), 1, -1)], dim=1)
        return self.to_env(plans[0, 0]), start

    def score(self, layers: tuple[Layers, Layers], obs: Tensor, plans: Tensor, generator: torch.Generator) -> Tensor:
        """Expected returns (N,) of sequences (N, H, A) in [-1, 1] or one-hot."""
        args, groups, returns = self.args, len(self.model.elites), []
        actions = self.scaled(plans)
        for part in actions.split(max(1, self.chunk // args.particles)):
            shape = (args.horizon, groups, len(part) * args.particles // groups)
            noise = torch.randn(*shape, self.obs_size, generator=generator, device=self.device)
            order = None
            if args.sampling == "ts1":
                order = torch.rand(shape, generator=generator, device=self.device).argsort(1)
            functions = self.reward_fn, self.termination_fn, self.value
            returns.append(self.imagine(self.model, layers, obs, part, noise, order, args.gamma, *functions))
        return torch.cat(returns)

    def scaled(self, actions: Tensor) -> Tensor:
        """Actions in [-1, 1] in the environment's units; one-hot ones stay as they are."""
        return actions if self.discrete else self.middle + self.half_range * actions

    def to_env(self, action: Tensor) -> Any:
        """One action (action_size,) as the environment wants it; of probabilities the most probable."""
        if self.discrete:
            return self.first_action + int(action.argmax())
        return self.scaled(action).cpu().numpy().reshape(self.action_shape)

    def observe(
        self, obs: Any, action: Any, reward: float, next_obs: Any, terminated: bool, truncated: bool = False
    ) -> None:
        """Stores one real step; whether it goes to the hold-out set is drawn here, once and for all."""
        before, after = (np.asarray(values, np.float64).reshape(-1) for values in (obs, next_obs))
        if self.discrete:
            action = np.eye(self.action_size, dtype=np.float32)[action - self.first_action]
        draw = torch.rand((), generator=self.generator, device=self.device).item()
        holdout = draw < self.args.holdout_ratio and int(self.data.holdout.sum()) < self.args.max_holdout
        # The difference of close numbers is taken before they are rounded to single precision.
        row = {"obs": before, "action": np.reshape(action, -1), "reward": reward, "delta": after - before}
        self.data.add(**row, terminated=terminated, episode=self.episode, holdout=holdout)
        if terminated or truncated:
            self.start, self.episode = None, self.episode + 1

    def update(self) -> None:
        """Trains the ensemble every `train_every` steps, after a look at how it predicted what it had not seen."""
        args, size = self.args, self.data.size
        if size >= args.learning_starts and (self.trained == 0 or size - self.trained >= args.train_every):
            if self.trained:
                self.logs |= diagnose(self.model, self.data, self.trained)
            self.logs |= fit(self.model, self.optimizer, self.loss_fn, self.data, args, self.generator)
            self.trained = size
            if self.value is not None:
                self.value.set_targets(self.data, args)
        if self.value is not None and self.trained:
            for _ in range(args.value_updates):
                self.logs["losses/value_loss"] = self.value.update(self.data, self.generator)

    def greedy_policy(self, seed: int) -> Callable[[Any], Any]:
        """A policy (observation -> action) for one episode, which neither learns nor touches the agent."""
        start, generator = None, torch.Generator(self.device).manual_seed(seed)

        def policy(obs: Any) -> Any:
            nonlocal start
            action, start = self.plan(obs, start, generator)
            return action

        return policy

    def metrics(self) -> dict[str, float]:
        """What to log."""
        return self.logs

    def init_from(self, folder: Path) -> None:
        """Takes model and data of another run; the value is learned anew, for the rewards of the present task."""
        try:
            state = read_checkpoint(folder / CHECKPOINT)["agent"]
            self.model.load_state_dict(state["model"])
            self.data.load_state_dict(state["data"])
        except Exception as error:
            raise Failure(f"cannot start from {folder}: {type(error).__name__}: {error}") from error
        self.trained, self.episode = self.data.size, int(self.data.episode[self.data.size - 1]) + 1
        columns = self.data.columns()
        if self.reward_fn is not None:
            columns["reward"][:] = self.reward_fn(columns["obs"], columns["action"], columns["obs"] + columns["delta"])
        if self.value is not None:
            for _ in range(10):
                self.value.set_targets(self.data, self.args)
                for _ in range(200):
                    self.value.update(self.data, self.generator)

    def state_dict(self) -> dict:
        """All that the next step depends on, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "data": self.data.state_dict(),
            "value": self.value and self.value.state_dict(),
            "value_optimizer": self.value and self.value.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "start": self.start,
            "counts": [self.trained, self.episode],
            "logs": self.logs,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` gave into a newly made agent."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.data.load_state_dict(state["data"])
        if self.value is not None:
            self.value.targets = torch.zeros_like(state["value"]["targets"], device=self.device)  # takes its size
            self.value.load_state_dict(state["value"])
            self.value.optimizer.load_state_dict(state["value_optimizer"])
        self.generator.set_state(state["generator"])
        self.start = None if state["start"] is None else state["start"].to(self.device)
        (self.trained, self.episode), self.logs = state["counts"], state["logs"]


class Value(nn.Module):
    """V(s), a network that learns the lambda-returns of the latest real steps."""

    def __init__(self, obs_size: int, generator: torch.Generator):
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_size, device=generator.device))
        self.register_buffer("std", torch.ones(obs_size, device=generator.device))
        self.register_buffer("target_mean", torch.zeros((), device=generator.device))
        self.register_buffer("target_std", torch.ones((), device=generator.device))
        self.layers = nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise((obs_size, 256, 256, 1)):
            weight = torch.randn(fan_out, fan_in, generator=generator, device=generator.device) / math.sqrt(fan_in)
            self.layers.extend([weight, torch.zeros(fan_out, device=generator.device)])
        self.optimizer = torch.optim.Adam(self.layers, lr=1e-3)
        self.register_buffer("targets", torch.zeros(0, device=generator.device))  # of the steps from `first` on
        self.register_buffer("first", torch.tensor(0, device=generator.device))

    @torch.no_grad()
    def set_targets(self, data: Buffer, args: Args) -> None:
        """Computes the lambda-returns of the latest steps (Sutton & Barto, section 12.1), from the last to the first: a
        termination ends the value; a truncation, and the end of the data, are worth the value of the next obs."""
        self.first.fill_(max(0, data.size - args.value_window))
        columns = {name: column[self.first :] for name, column in data.columns().items()}
        obs = columns["obs"]
        self.mean.copy_(obs.mean(0))
        self.std.copy_(obs.std(0, correction=0) + 1e-6)
        after = self(obs + columns["delta"]).tolist()
        goes_on = [*(columns["episode"][1:] == columns["episode"][:-1]).tolist(), False]
        reward, terminated = columns["reward"].tolist(), columns["terminated"].tolist()
        targets = [0.0] * len(reward)
        for step in reversed(range(len(reward))):
            value = after[step]
            if goes_on[step]:
                value += args.value_lambda * (targets[step + 1] - value)
            targets[step] = reward[step] + args.gamma * value * (not terminated[step])
        self.targets = torch.tensor(targets, device=obs.device)
        self.target_mean.copy_(self.targets.mean())
        self.target_std.copy_(self.targets.std(correction=0) + 1e-6)

    def forward(self, obs: Tensor) -> Tensor:
        """(..., obs_size) -> (...)."""
        layers, x = self.layers, (obs - self.mean) / self.std
        for index in (0, 2):
            x = F.silu(F.linear(x, layers[index], layers[index + 1]))
        return F.linear(x, layers[4], layers[5]).squeeze(-1) * self.target_std + self.target_mean

    def update(self, data: Buffer, generator: torch.Generator) -> float:
        """One gradient step on 256 of the steps that there are targets for."""
        rows = torch.randint(len(self.targets), (256,), generator=generator, device=self.targets.device)
        error = self(data.obs[self.first + rows]) - self.targets[rows]
        loss = ((error / self.target_std) ** 2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


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
CHANGEABLE = {"total_timesteps", "eval_every", "eval_episodes", "checkpoint_every"}  # what learning does not depend on
CHANGEABLE |= {"device", "threads", "compile", "capture_video", "resume", "evaluate"}


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
    args = tyro.cli(Args)
    if not (folder := args.resume or args.evaluate):
        return args
    try:
        saved = json.loads((Path(folder) / "args.json").read_text())
        if saved["script"] != SCRIPT:
            raise Failure(f"{folder} was written by {saved['script']}.py, not by {SCRIPT}.py")
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in saved["args"].items()}
        default = Args(**fields)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Failure(f"{folder} is not a run folder of {SCRIPT}.py: no usable args.json ({error})") from error
    args = tyro.cli(Args, default=default)
    if args.resume and args.evaluate:
        raise Failure("--resume and --evaluate exclude each other")
    changed = [name for name in vars(args) if getattr(args, name) != getattr(default, name) and name not in CHANGEABLE]
    if changed:
        raise Failure(f"{folder} was started with another {', '.join(changed)}; a run keeps what it was started with")
    return args


class Run:
    """The run folder and what goes on in it: TensorBoard events, evaluation, checkpoints, exact resume, the result.

    With `args.resume` it continues the run of that folder; with `args.evaluate` it takes no step and writes nothing but
    videos. Of the agent it asks `greedy_policy(seed)`, `metrics()`, `state_dict()` and `load_state_dict(state)`.
    """

    def __init__(self, args: Args, agent: Any, episodes: list[Episode]):
        self.args, self.agent, self.episodes = args, agent, episodes
        self.step, self.start_time, self.returns, self.events = 0, time.time(), [], None
        self.log_every = max(1, args.total_timesteps // 100)
        self.eval_env = make_env(args, "rgb_array" if args.capture_video else None)
        name = f"{args.env_id}__{SCRIPT}__{args.seed}__{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"
        self.path = Path(args.resume or args.evaluate or Path(args.run_dir) / re.sub(r"[/:]", "-", name))
        offset = self.restore() if args.resume or args.evaluate else 0
        if not args.evaluate:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(
                self.path / "args.json", {"script": SCRIPT, "args": vars(args) | {"resume": None}} | provenance()
            )
            # Cut at the checkpoint: what a resumed run leaves is what an uninterrupted one would have left.
            self.events = open(self.path / "events.out.tfevents.0", "ab")
            self.events.truncate(offset)
            if offset == 0:
                rows = "".join(f"\n|{name}|{value}|" for name, value in vars(args).items())
                summary = text_pb("hyperparameters", f"|name|value|\n|-|-|{rows}")
                self.write(Event(wall_time=time.time(), file_version="brain.Event:2"))
                self.write(Event(wall_time=time.time(), summary=summary))
        self.bar = tqdm(
            total=args.total_timesteps, initial=self.step, unit="step", disable=True if args.evaluate else None
        )

    def steps(self, stride: int = 1) -> Iterator[int]:
        """Yields the number of environment steps up to and with the one that the caller makes next (or the `stride`
        parallel ones); after it, logs, evaluates and checkpoints what is due, and stops on Ctrl-C or SIGTERM."""
        args, caught, handlers = self.args, [], {}

        def stop(number: int, _: Any) -> None:
            caught.append(number)
            signal.signal(number, handlers[number])  # a second one does not wait for the end of the step

        if threading.current_thread() is threading.main_thread():
            handlers.update({number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)})
        timed_from = self.step, time.time()
        try:
            while self.step < args.total_timesteps and not args.evaluate:
                yield self.step + stride
                before, self.step = self.step, self.step + stride
                self.bar.update(stride)
                if self.due(self.log_every, before):
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
        """Whether a multiple of `every` lies behind step `before`, up to this one; at the end everything is due."""
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
                raise Failure(f"step {step}: {tag} is {value}; the checkpoint in {self.path} is from before")
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
        """Greedy episodes on an environment of their own, always with the same seeds; keeps and logs their returns."""
        args, env, lengths, frames = self.args, self.eval_env, [], []
        limit = env.spec.max_episode_steps or 1_000  # without one, a greedy policy may walk in circles for ever
        self.returns = []
        for index in range(args.eval_episodes):
            if memory := memory_of(self.episodes[0].env):
                env.unwrapped.load_state_dict(memory)
            episode = Episode(env, args.seed, 2, index)
            policy, done = self.agent.greedy_policy(seed_of(args.seed, 3, index)), False
            while not done and len(episode.actions) < limit:
                if args.capture_video and index == 0:
                    frames.append(Image.fromarray(env.render()).quantize())
                _, _, terminated, truncated = episode.step(policy(episode.obs))
                done = terminated or truncated
            if args.capture_video and index == 0:
                frames.append(Image.fromarray(env.render()).quantize())
            self.returns.append(episode.episodic_return)
            lengths.append(len(episode.actions))
        mean, std = float(np.mean(self.returns)), float(np.std(self.returns))
        self.log(self.step, {"eval/episodic_return": mean, "eval/episodic_length": float(np.mean(lengths))})
        steps = f"{np.mean(lengths):.1f} steps long, {len(lengths)} episodes"
        tqdm.write(f"step {self.step}: evaluation return {mean:.4g} +- {std:.4g} ({steps})")
        if frames:
            video = self.path / "videos" / f"step_{self.step}.gif"
            video.parent.mkdir(exist_ok=True)
            duration = 1000 / env.metadata.get("render_fps", 30)  # milliseconds a frame
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
        sys.exit(130)


if __name__ == "__main__":
    main()
