"""How far the ensemble of a run of `cem_mpc.py` can be trusted, on episodes that it has not been trained on: some by
its own plans, and as many by random actions, which lead to where it has seen less.
"""

import copy
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

import cem_mpc

STEPS_AHEAD = (1, 2, 5, 10, 20, 50)
PLANNED_STEPS = (1, 2, 5, 10, 15, 20, 25)
Episode = tuple[Tensor, Tensor]  # obs (T + 1, obs_size), action (T, action_size)


def agent_of(run: Path) -> tuple[cem_mpc.Agent, cem_mpc.Episode]:
    """The agent of a run, and its environment with a new episode."""
    agent = cem_mpc.load(run)
    episode = cem_mpc.Episode(cem_mpc.make_env(agent.args), agent.args.seed, 4)
    episode.reset(0)
    return agent, episode


def fresh_episodes(run: Path, count: int) -> tuple[cem_mpc.Agent, list[Episode]]:
    """The agent of a run, and episodes of it: `count` by its plans and as many by random actions."""
    (agent, episode), found = agent_of(run), []
    space = episode.env.action_space
    space.seed(cem_mpc.seed_of(agent.args.seed, 4))
    for index in range(2 * count):
        policy = agent.greedy_policy(cem_mpc.seed_of(agent.args.seed, 4, index))
        observations, actions, done = [episode.obs], [], False
        while not done:
            action = policy(episode.obs, episode.info) if index < count else space.sample()
            _, _, terminated, truncated = episode.step(action)
            observations.append(episode.obs)
            actions.append(np.reshape(action, -1))
            done = terminated or truncated
        episode.reset()
        found.append(tuple(torch.tensor(np.stack(rows), dtype=torch.float32) for rows in (observations, actions)))
    return agent, found


def predictions(agent: cem_mpc.Agent, obs: Tensor, actions: Tensor) -> Tensor:
    """What each elite expects along `actions` (B, k, action_size) from `obs` (B, obs_size): (G, B, obs_size)."""
    layers = agent.model.select(agent.model.elites)[0]
    state = obs.expand(len(agent.model.elites), *obs.shape)
    for action in actions.unbind(1):
        state = state + agent.model.predict(state, action.expand(len(state), *action.shape), layers)[0]
    return state


@torch.inference_mode()
def error_by_steps(run: Path, episodes: int = 3) -> list[tuple[float, float]]:
    """(k, error after k steps): root mean square over dimensions, members and starts, in standard deviations of the
    observation."""
    agent, found = fresh_episodes(run, episodes)
    unit, points = torch.where(agent.model.obs_std > 0, agent.model.obs_std, 1.0), []
    for steps in STEPS_AHEAD:
        squares = []
        for obs, action in found:
            if len(action) >= steps:
                expected = predictions(agent, obs[:-steps], action.unfold(0, steps, 1).transpose(1, 2))
                squares.append((((expected - obs[steps:]) / unit) ** 2).mean((0, 2)))
        points.append((steps, torch.cat(squares).mean().sqrt().item()))
    return points


@torch.inference_mode()
def error_by_disagreement(run: Path, episodes: int = 3, groups: int = 10) -> list[tuple[float, float]]:
    """(n, error of one step in the n-th of `groups` equal groups of steps, ordered by the disagreement of the elites):
    root mean square, in standard deviations of a step's change."""
    agent, found = fresh_episodes(run, episodes)
    unit = torch.where(agent.model.delta_std > 0, agent.model.delta_std, 1.0)
    obs, action, next_obs = (
        torch.cat(parts) for parts in zip(*((obs[:-1], action, obs[1:]) for obs, action in found), strict=True)
    )
    expected = predictions(agent, obs, action[:, None]) / unit
    disagreement = expected.var(0, correction=0).mean(1)
    squares = ((expected.mean(0) - next_obs / unit) ** 2).mean(1)
    ordered = squares[disagreement.argsort()].tensor_split(groups)
    return [(number, part.mean().sqrt().item()) for number, part in enumerate(ordered, 1)]


@torch.inference_mode()
def optimism_by_steps(run: Path, episodes: int = 2, every: int = 10) -> list[tuple[float, float]]:
    """(k, by how much the model overestimates the discounted return of the first k steps of its plans): at every
    `every`-th step of its own episodes a copy of the environment carries out the plan as it is. A model is exploited
    where this is far above 0: the search has then picked the model's errors."""
    agent, episode = agent_of(run)
    args = agent.args
    generator = torch.Generator(agent.device).manual_seed(cem_mpc.seed_of(args.seed, 4))
    networks, groups = agent.model.select(agent.model.elites), len(agent.model.elites)
    found: dict[int, list[float]] = {steps: [] for steps in PLANNED_STEPS if steps <= args.horizon}
    for _ in range(episodes):
        start, done = None, False
        while not done:
            action, start = agent.plan(episode.obs, start, generator)
            if len(episode.actions) % every == 0:
                plan = [action, *map(agent.to_env, start[0, :-1])]
                real = returns_of(copy.deepcopy(episode.env), plan, args.gamma)
                obs, actions = agent.tensor(episode.obs), torch.stack([*map(agent.tensor, plan)])
                for steps in found:
                    noise = torch.randn(steps, groups, 20, agent.obs_size, generator=generator)
                    plans = actions[None, :steps]
                    expected = cem_mpc.imagine(agent.model, networks, obs, plans, noise, None, args.gamma, [])
                    found[steps].append(expected.item() - real[min(steps, len(real)) - 1])
            _, _, terminated, truncated = episode.step(action)
            done = terminated or truncated
        episode.reset()
    return [(steps, float(np.mean(differences))) for steps, differences in found.items()]


def returns_of(env: gym.Env, actions: list, gamma: float) -> list[float]:
    """Discounted returns of the first 1, 2, ... actions, until the episode terminates; a time limit does not count."""
    found, total = [], 0.0
    for step, action in enumerate(actions):
        _, reward, terminated, _, _ = env.step(action)
        total += gamma**step * float(reward)
        found.append(total)
        if terminated:
            break
    return found
