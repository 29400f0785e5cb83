"""How long cem_mpc.py plans one action, against mbrl-lib with its own budget, on networks of random weights.

Everything runs in this process on one thread. The contestants take turns for several rounds, in an order drawn anew
for each, so that a machine that is busy for a while slows all of them, and medians are compared. Time is the
processor's, in two parts: the program's own, and the kernel's, which is nearly all for memory that was given back and
is fetched again. The latter depends on what else the process has allocated, so there is a ratio without it too.
"""

import importlib
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

import cem_mpc

# HalfCheetah's sizes; the ensemble of MBPO; one action with the budget of mbrl-lib's cart pole, 525,000 imagined steps.
OBS_SIZE, ACTION_SIZE = 17, 6
MEMBERS, ELITES, LAYERS, UNITS = 7, 5, 4, 200
POPULATION, PARTICLES, HORIZON, ITERATIONS, BEST = 350, 20, 15, 5, 35
TRANSITIONS = POPULATION * PARTICLES * HORIZON * ITERATIONS

OBSERVATION_SPACE = gym.spaces.Box(-np.inf, np.inf, (OBS_SIZE,), np.float32)
ACTION_SPACE = gym.spaces.Box(-1.0, 1.0, (ACTION_SIZE,), np.float32)


def reward(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    """A cheap reward: (..., size) -> (...)."""
    return next_obs[..., 0] - 0.1 * (action**2).sum(-1)


def termination(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    """A cheap condition, which these networks never fulfil: (..., size) -> (...)."""
    return next_obs[..., 1].abs() > 1e6


class Contestant:
    """Plans one action with `plan`; `rows` counts the imagined steps of its first, untimed, plan."""

    def __init__(self, name: str, plan: Callable[[], np.ndarray]):
        self.name, self.plan, self.rows = name, plan, 0
        self.times: list[tuple[float, float, float]] = []  # seconds: processor, its kernel's part, clock

    def measure(self) -> None:
        wall, before = time.perf_counter(), os.times()
        action = self.plan()
        after, wall = os.times(), time.perf_counter() - wall
        kernel = after.system - before.system
        self.times.append((after.user - before.user + kernel, kernel, wall))
        if action.shape != (ACTION_SIZE,) or not np.isfinite(action).all():
            raise ValueError(f"{self.name} gave the action {action}")

    def count(self, module: Any, method: str, rows_of: Callable[..., int]) -> "Contestant":
        """Plans once, and counts with `rows_of` the rows that each call of that method was given."""
        original = getattr(module, method)

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.rows += rows_of(*args)
            return original(*args, **kwargs)

        setattr(module, method, counting)
        self.plan()
        delattr(module, method)
        if self.rows != TRANSITIONS:
            raise ValueError(f"{self.name} imagined {self.rows} steps, not {TRANSITIONS}")
        return self


def our_contestant(given: bool = False) -> Contestant:
    """cem_mpc.py; reward and termination are learned, or `given` as functions."""
    args = cem_mpc.Args(
        ensemble_size=MEMBERS,
        num_elites=ELITES,
        hidden=(UNITS,) * LAYERS,
        weight_decay=(0.0,) * (LAYERS + 1),
        planner="cem",
        horizon=HORIZON,
        population=POPULATION,
        iterations=ITERATIONS,
        num_best=BEST,
        particles=PARTICLES,
        sampling="tsinf",
        device="cpu",
    )
    agent = cem_mpc.Agent(OBSERVATION_SPACE, ACTION_SPACE, args)
    if given:
        agent.model.reward_fn, agent.model.termination_fn = reward, termination
    name = f"cem_mpc.py, reward and termination {'given' if given else 'learned'}"
    generator, obs = torch.Generator().manual_seed(0), np.zeros(OBS_SIZE, np.float32)
    contestant = Contestant(name, lambda: agent.plan(obs, None, generator)[0])
    return contestant.count(agent.model, "predict", lambda obs, action, layers: obs.shape[0] * obs.shape[1])


def peer_contestant(path: Path, learned: bool) -> Contestant:
    """mbrl-lib's CEM planner on its Gaussian ensemble, imported from the checkout at `path`; `learned`: the reward is
    one more output of the ensemble."""
    if not (path / "mbrl" / "planning").is_dir():
        raise FileNotFoundError(f"there is no mbrl/planning in {path}")
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    models, planning = importlib.import_module("mbrl.models"), importlib.import_module("mbrl.planning")
    omegaconf = importlib.import_module("omegaconf")
    device = torch.device("cpu")
    network = models.GaussianMLP(
        OBS_SIZE + ACTION_SIZE,
        OBS_SIZE + learned,
        device,
        num_layers=LAYERS,
        ensemble_size=MEMBERS,
        hid_size=UNITS,
        propagation_method="fixed_model",
        activation_fn_cfg={"_target_": "torch.nn.SiLU"},
    )
    model = models.OneDTransitionRewardModel(network, normalize=True, learned_rewards=learned, num_elites=ELITES)
    model.set_elite(range(ELITES))

    class Spaces:
        observation_space, action_space = OBSERVATION_SPACE, ACTION_SPACE

    env = models.ModelEnv(
        Spaces,
        model,
        lambda action, next_obs: termination(next_obs, action, next_obs)[:, None],
        None if learned else lambda action, next_obs: reward(next_obs, action, next_obs)[:, None],
        generator=torch.Generator(device).manual_seed(0),
    )
    optimizer = {
        "_target_": "mbrl.planning.CEMOptimizer",
        "num_iterations": ITERATIONS,
        "elite_ratio": BEST / POPULATION,
        "population_size": POPULATION,
        "lower_bound": None,
        "upper_bound": None,
        "alpha": 0.1,
        "device": "cpu",
        "return_mean_elites": True,
    }
    agent = planning.TrajectoryOptimizerAgent(
        omegaconf.OmegaConf.create(optimizer), ACTION_SPACE.low.tolist(), ACTION_SPACE.high.tolist(), HORIZON
    )
    if agent.optimizer.optimizer.elite_num != BEST:
        raise ValueError(f"mbrl-lib takes the best {agent.optimizer.optimizer.elite_num}, not {BEST}")
    agent.set_trajectory_eval_fn(lambda obs, plans: env.evaluate_action_sequences(plans, obs, PARTICLES))
    obs = np.zeros(OBS_SIZE, np.float32)

    def plan() -> np.ndarray:
        agent.reset()
        return agent.act(obs)

    name = f"mbrl-lib, reward {'learned' if learned else 'given'}, termination given"
    contestant = Contestant(name, plan)
    return contestant.count(network, "forward", lambda inputs: len(inputs))


def measure(peer: Path | None, rounds: int) -> str:
    """Markdown table of the medians; the ratios say how many times as long as the first contestant a plan takes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    contestants = [our_contestant(), our_contestant(given=True)]
    if peer:
        contestants += [peer_contestant(peer, learned) for learned in (True, False)]
    for index in range(rounds):
        for contestant in random.Random(index).sample(contestants, len(contestants)):
            contestant.measure()
    lines = [
        f"| one action of {TRANSITIONS:,} imagined steps, medians of {rounds} rounds | CPU s (range) | of it kernel "
        "| wall s | steps per CPU s | ratio of CPU | without kernel |",
        "|---|---|---|---|---|---|---|",
    ]
    times = {contestant.name: np.array(contestant.times) for contestant in contestants}
    ours = times[contestants[0].name]
    for name, theirs in times.items():
        cpu, kernel, wall = np.median(theirs, axis=0)
        ratio = np.median(theirs[:, 0] / ours[:, 0])  # of the same round
        own = np.median((theirs[:, 0] - theirs[:, 1]) / (ours[:, 0] - ours[:, 1]))
        span = f"{theirs[:, 0].min():.2f} to {theirs[:, 0].max():.2f}"
        cells = f"{cpu:.2f} ({span}) | {kernel:.2f} | {wall:.2f} | {TRANSITIONS / cpu:,.0f} | {ratio:.2f}x | {own:.2f}x"
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)
