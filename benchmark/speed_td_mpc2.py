"""How fast td_mpc2.py is beside the authors' agent: updates and plans, with 1 and with 5 million parameters.

Their agent is given a CPU: devices are renamed while it is loaded, what copies it to a GPU is left out, and its
optimizers are a CPU's. Settings are theirs, for 24 observations and 6 actions. Everything runs in this process on
one thread; both take turns for several rounds, and medians of rates per second of processor time are compared.
"""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gymnasium as gym
import numpy as np
import torch

import td_mpc2
from benchmark.speed_mbpo import Work, compare

OBS_SIZE, ACTION_SIZE = 24, 6
FOR_A_CPU = {
    "cuda:0": "cpu",
    "capturable=True": "capturable=False",
    "WorldModel(cfg).to(self.device)": "WorldModel(cfg)",
}


def batch_of(size: td_mpc2.Size) -> dict[str, torch.Tensor]:
    shape = 3, size.batch
    steps = {"action": torch.rand(*shape, ACTION_SIZE) * 2 - 1, "reward": torch.rand(*shape, 1)}
    return {"obs": torch.randn(4, size.batch, OBS_SIZE), **steps, "terminated": torch.zeros(*shape, 1)}


def our_work(name: str) -> tuple[Work, Work]:
    """An update and a plan; `name`: of the model's size."""
    observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS_SIZE,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (ACTION_SIZE,), np.float32)
    agent = td_mpc2.Agent(observation_space, action_space, td_mpc2.Args(model_size=name, episodic=False, device="cpu"))
    batch, obs = batch_of(agent.size), torch.randn(OBS_SIZE)

    def update() -> int:
        agent.update_networks(batch)
        return 1

    def plan() -> int:
        agent.plan({"obs": obs, "mean": agent.plan_mean})
        return 1

    return update, plan


def their_agent(path: Path, size: td_mpc2.Size) -> torch.nn.Module:
    """The agent of a checkout of nicklashansen/tdmpc2, on a CPU."""
    if not (path / "tdmpc2" / "tdmpc2.py").is_file():
        raise FileNotFoundError(f"there is no tdmpc2/tdmpc2.py in {path}")
    for name in (
        "common",
        "common.math",
        "common.init",
        "common.layers",
        "common.scale",
        "common.world_model",
        "tdmpc2",
    ):
        module = sys.modules[name] = ModuleType(name)
        if name != "common":
            text = (path / "tdmpc2" / f"{name.replace('.', '/')}.py").read_text()
            for theirs, ours in FOR_A_CPU.items():
                text = text.replace(theirs, ours)
            exec(compile(text, name, "exec"), vars(module))
        parent, _, child = name.partition(".")
        setattr(sys.modules[parent], child or "__path__", module if child else [])
    widths = {"enc_dim": size.encoder, "mlp_dim": size.hidden, "latent_dim": size.latent, "num_q": size.num_q}
    widths |= {"num_enc_layers": size.encoder_layers + 1, "task_dim": 0, "simnorm_dim": 8, "num_channels": 32}
    kinds = {"obs": "state", "obs_shape": {"state": (OBS_SIZE,)}, "action_dim": ACTION_SIZE, "episode_length": 500}
    kinds |= {"multitask": False, "episodic": False, "compile": False, "mpc": True, "num_bins": 101, "bin_size": 0.2}
    bounds = {"vmin": -10, "vmax": 10, "log_std_min": -10, "log_std_max": 2, "min_std": 0.05, "max_std": 2}
    losses = {"reward_coef": 0.1, "value_coef": 0.1, "termination_coef": 1, "consistency_coef": 20, "rho": 0.5}
    losses |= {
        "lr": 3e-4,
        "enc_lr_scale": 0.3,
        "grad_clip_norm": 20,
        "tau": 0.01,
        "entropy_coef": 1e-4,
        "dropout": 0.01,
    }
    losses |= {"discount_denom": 5, "discount_min": 0.95, "discount_max": 0.995, "batch_size": size.batch}
    planner = {
        "iterations": 6,
        "num_samples": 512,
        "num_elites": 64,
        "num_pi_trajs": 24,
        "horizon": 3,
        "temperature": 0.5,
    }
    config = SimpleNamespace(**widths, **kinds, **bounds, **losses, **planner)
    config.get = lambda name, default=None: getattr(config, name, default)
    return sys.modules["tdmpc2"].TDMPC2(config)


def their_work(path: Path, name: str) -> tuple[Work, Work]:
    agent = their_agent(path, td_mpc2.SIZES[name])
    batch, obs = batch_of(td_mpc2.SIZES[name]), torch.randn(1, OBS_SIZE)

    def update() -> int:
        agent._update(**batch)
        return 1

    def plan() -> int:
        with torch.no_grad():
            agent.plan(obs)
        return 1

    return update, plan


def measure(peer: Path | None, rounds: int) -> str:
    torch.set_num_threads(1)
    rows = {}
    for name in ("nano", "1", "5"):
        rows |= {
            f"{what}, {name}": {"td_mpc2.py": work}
            for what, work in zip(("update", "plan"), our_work(name), strict=True)
        }
        if peer and name != "nano":
            for what, work in zip(("update", "plan"), their_work(peer, name), strict=True):
                rows[f"{what}, {name}"]["the authors'"] = work
    return compare(rows, rounds)
