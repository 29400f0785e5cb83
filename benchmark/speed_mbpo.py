"""How fast mbpo.py is: updates of its actor-critic against Stable-Baselines3, its ensemble against mbrl-lib.

Sizes are HalfCheetah's, networks and batches the authors'. Everything runs in this process on one thread; the
contestants of a row take turns for several rounds, and medians of rates per second of processor time are compared.
"""

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import gymnasium as gym
import numpy as np
import torch

import mbpo

OBS_SIZE, ACTION_SIZE, ROWS, STARTS = 17, 6, 3_000, 100_000
OBSERVATION_SPACE = gym.spaces.Box(-np.inf, np.inf, (OBS_SIZE,), np.float32)
ACTION_SPACE = gym.spaces.Box(-1.0, 1.0, (ACTION_SIZE,), np.float32)
Work = Callable[[], int]  # does some work and returns how much


def random_steps() -> list[tuple[np.ndarray, np.ndarray, float, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        (rng.normal(size=OBS_SIZE), rng.uniform(-1, 1, ACTION_SIZE), rng.normal(), rng.normal(size=OBS_SIZE))
        for _ in range(ROWS)
    ]


def our_work() -> tuple[Work, Work, Work]:
    """Updates of the actor-critic, of the ensemble, and imagined transitions."""
    args = mbpo.Args(device="cpu")
    agent = mbpo.Agent(OBSERVATION_SPACE, ACTION_SPACE, args)
    for obs, action, reward, next_obs in random_steps():
        agent.observe(obs, action, reward, next_obs, False)

    def update_policy(count: int = 20) -> int:
        for batch in [{name: column[i] for name, column in agent.batches(count).items()} for i in range(count)]:
            agent.update_policy(batch)
        return count

    agent.model.set_scale(agent.data.columns())
    seen, weight = torch.arange(ROWS), torch.ones(ROWS, 1)
    batches = torch.randint(ROWS, (10, 2, args.ensemble_size, args.model_batch_size))

    def update_model() -> int:  # as `fit` makes them
        for batch, other in batches:
            drawn_rows = agent.data.columns(seen[other]) | {"weight": weight[other]}
            loss, _ = mbpo.ensemble_loss(agent.model, agent.data.columns(batch), drawn_rows)
            agent.model_optimizer.zero_grad()
            loss.backward()
            agent.model_optimizer.step()
        return len(batches)

    def imagine() -> int:
        obs = agent.data.columns(torch.randint(ROWS, (STARTS,)))["obs"]
        return sum(len(rows["obs"]) for rows in agent.planner.imagine(obs, 1))

    return update_policy, update_model, imagine


def stable_baselines_work() -> Work:
    """Updates of Stable-Baselines3's SAC."""
    sb3, logger = (
        importlib.import_module("stable_baselines3"),
        importlib.import_module("stable_baselines3.common.logger"),
    )

    class Nothing(gym.Env):
        observation_space, action_space = OBSERVATION_SPACE, ACTION_SPACE

        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
            return np.zeros(OBS_SIZE, np.float32), {}

    model = sb3.SAC("MlpPolicy", Nothing(), buffer_size=ROWS, device="cpu")
    model.set_logger(logger.configure(None, []))
    for obs, action, reward, next_obs in random_steps():
        model.replay_buffer.add(obs[None], next_obs[None], action[None], np.array([reward]), np.array([0.0]), [{}])

    def update_policy(count: int = 20) -> int:
        model.train(gradient_steps=count, batch_size=256)
        return count

    return update_policy


def mbrl_work(path: Path) -> tuple[Work, Work]:
    """Updates of mbrl-lib's ensemble, and transitions that it imagines by actions that are given."""
    if not (path / "mbrl" / "models").is_dir():
        raise FileNotFoundError(f"there is no mbrl/models in {path}")
    sys.path.insert(0, str(path))
    models = importlib.import_module("mbrl.models")
    network = models.GaussianMLP(
        OBS_SIZE + ACTION_SIZE,
        OBS_SIZE + 1,
        torch.device("cpu"),
        num_layers=4,
        ensemble_size=7,
        hid_size=200,
        propagation_method="random_model",
        activation_fn_cfg={"_target_": "torch.nn.SiLU"},
    )
    model = models.OneDTransitionRewardModel(network, normalize=True, learned_rewards=True, num_elites=5)
    model.set_elite(range(5))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)
    x = torch.randn(7, 256, OBS_SIZE + ACTION_SIZE)
    y = torch.randn(7, 256, OBS_SIZE + 1)

    def update_model(count: int = 10) -> int:
        for _ in range(count):
            network.update(x, optimizer, y)
        return count

    class Spaces:
        observation_space, action_space = OBSERVATION_SPACE, ACTION_SPACE

    generator = torch.Generator().manual_seed(0)
    env = models.ModelEnv(Spaces, model, lambda action, obs: obs[:, :1] > 1e6, None, generator=generator)
    obs, action = np.zeros((STARTS, OBS_SIZE), np.float32), np.zeros((STARTS, ACTION_SIZE), np.float32)

    def imagine() -> int:
        env.step(action, env.reset(obs), sample=True)
        return STARTS

    return update_model, imagine


def rate(work: Work, seconds: float = 2.0) -> float:
    """How much of it is done in a second of processor time, from at least so many."""
    amount, start = 0, time.process_time()
    while (elapsed := time.process_time() - start) < seconds:
        amount += work()
    return amount / elapsed


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def compare(rows: dict[str, dict[str, Work]], rounds: int) -> str:
    """Markdown table of the medians of each row's contestants, the script first; in brackets how many times as much
    the script does."""
    script = next(iter(next(iter(rows.values()))))
    lines = [f"| medians of {rounds} rounds, per second | {script} | other |", "|---|---|---|"]
    for name, contestants in rows.items():
        rates = {contestant: [] for contestant in contestants}
        for _ in range(rounds):
            for contestant, work in contestants.items():
                rates[contestant].append(rate(work))
        ours, *others = rates.values()
        cells = [
            f"{other}: {number(median(values))} ({median(a / b for a, b in zip(ours, values, strict=True)):.2f}x)"
            for other, values in zip([*rates][1:], others, strict=True)
        ]
        lines.append(f"| {name} | {number(median(ours))} | {', '.join(cells)} |")
    return "\n".join(lines)


def measure(peer: Path | None, rounds: int) -> str:
    torch.set_num_threads(1)
    policy, model, imagine = our_work()
    rows = {"updates of the actor-critic": {"mbpo.py": policy}}
    rows |= {"updates of the ensemble": {"mbpo.py": model}, "imagined transitions": {"mbpo.py": imagine}}
    if importlib.util.find_spec("stable_baselines3"):
        rows["updates of the actor-critic"]["Stable-Baselines3"] = stable_baselines_work()
    if peer:
        rows["updates of the ensemble"]["mbrl-lib"], rows["imagined transitions"]["mbrl-lib"] = mbrl_work(peer)
    return compare(rows, rounds)
