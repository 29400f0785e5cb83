"""Stable-Baselines3's SAC, DQN and PPO, with the hyperparameters of its zoo, as if they were scripts of this
repository: the same arguments, run folder and TensorBoard tags, evaluated on the same episodes by the same code.

    python benchmark/baselines.py --algorithm sac --env-id Pendulum-v1

The hyperparameters are those of DLR-RM/rl-baselines3-zoo, commit 22e3ff2; an environment that the zoo does not know
gets the library's defaults. A run that is stopped begins anew when it is resumed.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mbpo

PRESETS: dict[str, dict[str, Any]] = {}  # as in the scripts; here the zoo's settings take their place
WIDE = {"policy_kwargs": {"net_arch": [256, 256]}}
# n_timesteps: what schedules and exploration are stretched over, however many steps are made.
ZOO: dict[tuple[str, str], dict[str, Any]] = {
    ("sac", "Pendulum-v1"): {"n_timesteps": 20_000, "learning_rate": 1e-3},
    ("sac", "Hopper-v5"): {"learning_starts": 10_000},
    ("sac", "HalfCheetah-v5"): {"learning_starts": 10_000},
    ("dqn", "CartPole-v1"): {"n_timesteps": 50_000, "learning_rate": 2.3e-3, "batch_size": 64, "buffer_size": 100_000}
    | {"learning_starts": 1_000, "gamma": 0.99, "target_update_interval": 10, "train_freq": 256, "gradient_steps": 128}
    | {"exploration_fraction": 0.16, "exploration_final_eps": 0.04, **WIDE},
    ("dqn", "Acrobot-v1"): {"n_timesteps": 100_000, "learning_rate": 6.3e-4, "batch_size": 128, "buffer_size": 50_000}
    | {"learning_starts": 0, "gamma": 0.99, "target_update_interval": 250, "train_freq": 4, "gradient_steps": -1}
    | {"exploration_fraction": 0.12, "exploration_final_eps": 0.1, **WIDE},
    ("ppo", "LunarLander-v3"): {"n_timesteps": 1_000_000, "n_envs": 16, "n_steps": 1_024, "batch_size": 64}
    | {"gae_lambda": 0.98, "gamma": 0.999, "n_epochs": 4, "ent_coef": 0.01},
    ("ppo", "CartPole-v1"): {"n_timesteps": 100_000, "n_envs": 8, "n_steps": 32, "batch_size": 256, "gae_lambda": 0.8}
    | {"gamma": 0.98, "n_epochs": 20, "ent_coef": 0.0}
    | {"learning_rate": lambda left: 0.001 * left, "clip_range": lambda left: 0.2 * left},
    ("ppo", "Acrobot-v1"): {"n_timesteps": 1_000_000, "n_envs": 16, "n_steps": 256, "gae_lambda": 0.94, "gamma": 0.99}
    | {"n_epochs": 4, "ent_coef": 0.0, "normalize": True},
}

ZOO["dqn", "LunarLander-v3"] = ZOO["dqn", "Acrobot-v1"]


@dataclass
class Args:
    """A model-free baseline of Stable-Baselines3."""

    algorithm: Literal["sac", "dqn", "ppo"] = "sac"
    env_id: str = "Pendulum-v1"
    env_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    total_timesteps: int = 20_000
    seed: int = 1
    threads: int = 1
    eval_every: int = 1_000
    eval_episodes: int = 5
    run_dir: str = "runs"
    resume: str | None = None

    # What the scripts' run folder asks for.
    checkpoint_every: tyro.conf.Suppress[int] = 10**9
    evaluate: tyro.conf.Suppress[str | None] = None
    capture_video: tyro.conf.Suppress[bool] = False


class Agent:
    """A model of Stable-Baselines3, as the run folder sees it."""

    def __init__(self, args: Args):
        import stable_baselines3 as sb3
        from stable_baselines3.common.env_util import make_vec_env
        from stable_baselines3.common.vec_env import VecNormalize

        settings = dict(ZOO.get((args.algorithm, args.env_id), {}))
        self.n_timesteps, count = settings.pop("n_timesteps", args.total_timesteps), settings.pop("n_envs", 1)
        self.env = make_vec_env(lambda: mbpo.make_env(args), count, seed=mbpo.seed_of(args.seed, 1))  # with Monitors
        self.normalized = settings.pop("normalize", False)
        if self.normalized:
            self.env = VecNormalize(self.env, gamma=settings.get("gamma", 0.99))
        algorithm, seed = getattr(sb3, args.algorithm.upper()), mbpo.seed_of(args.seed, 0)
        self.model = algorithm("MlpPolicy", self.env, seed=seed, device="cpu", **settings)

    def greedy_policy(self, seed: int) -> Callable[..., Any]:
        def policy(obs: Any, info: dict | None = None) -> Any:
            if self.normalized:
                obs = self.env.normalize_obs(obs)
            action = self.model.predict(obs, deterministic=True)[0]
            return int(action) if np.ndim(action) == 0 else action

        return policy

    def metrics(self) -> dict[str, float]:
        return {}


class Run(mbpo.Run):
    """The run folder, without a checkpoint."""

    def save(self) -> None:
        self.write("result.json", self.result)


def train(args: Args) -> dict:
    """Trains a baseline; returns what is in result.json."""
    from stable_baselines3.common.callbacks import BaseCallback

    torch.set_num_threads(args.threads)
    agent, make = Agent(args), functools.partial(mbpo.make_env, args)
    episode = mbpo.Episode(make(), args.seed, 1)  # only counts
    run = Run(args, agent, [episode], make)
    steps = run.steps(agent.env.num_envs)
    next(steps)

    class Log(BaseCallback):
        def _on_step(self) -> bool:
            for info in self.locals["infos"]:
                if found := info.get("episode"):
                    values = {"charts/episodic_return": float(found["r"]), "charts/episodic_length": float(found["l"])}
                    run.log(values)
                    episode.number += 1
            return next(steps, None) is not None

    agent.model.learn(max(agent.n_timesteps, args.total_timesteps), callback=Log())
    return run.result


if __name__ == "__main__":
    mbpo.SCRIPT, mbpo.Args, mbpo.PRESETS, mbpo.train = Path(__file__).stem, Args, PRESETS, train
    mbpo.main()
