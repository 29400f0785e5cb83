"""What the tests of several scripts need."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import tyro
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray

ROOT = Path(__file__).parent.parent
TABULAR = ["dyna_q", "dyna_q_plus"]
NEURAL = ["cem_mpc", "mbpo", "muzero", "dreamer"]
SCRIPTS = TABULAR + NEURAL
TINY = {  # arguments with which a script takes milliseconds a step
    "cem_mpc": "--hidden 16 16 --weight-decay 0 1e-5 1e-4 --population 8 --num-best 3 --iterations 2 --horizon 3"
    " --learning-starts 30 --train-every 40 --max-updates 4 --ensemble-size 3 --num-elites 2 --particles 2",
    "mbpo": "--hidden 16 16 --weight-decay 0 1e-5 1e-4 --policy-hidden 16 16 --learning-starts 30 --train-every 40"
    " --max-updates 4 --ensemble-size 3 --num-elites 2 --rollouts 50 --updates-per-step 1 --batch-size 32",
    "muzero": "--num-envs 2 --num-simulations 3 --hidden-size 16 --latent-size 8 --batch-size 16 --learning-starts 50"
    " --updates-per-step 0.1 --support 5",
    "dreamer": "--num-envs 2 --batch-size 2 --batch-length 4 --learning-starts 30 --train-ratio 1 --replay-size 2000"
    " --horizon 3 --imagination-starts 3",
}
CORRIDOR = {"cem_mpc": "BoxCorridor-v0", "mbpo": "BoxCorridor-v0"}  # where it is not Corridor-v0

os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(params=SCRIPTS)
def script(request: pytest.FixtureRequest) -> ModuleType:
    """Each script in turn, as a module."""
    return importlib.import_module(request.param)


def command(script: ModuleType | str, *args: object) -> list[str]:
    """The command that a user types."""
    name = script if isinstance(script, str) else script.__name__
    return [sys.executable, str(ROOT / f"{name}.py"), *map(str, with_tiny(name, args))]


def with_tiny(name: str, args: tuple) -> list:
    """The arguments, behind those that make a script fast, except where a run's own arguments are used."""
    own = "--resume" in args or "--evaluate" in args
    return [*([] if own else TINY.get(name, "").split()), *args]


def tiny_args(script: ModuleType, **fields: object) -> Any:
    """`Args` with which a script takes milliseconds a step."""
    args = tyro.cli(script.Args, args=TINY.get(script.__name__, "").split())
    return dataclasses.replace(args, **fields)


def start(script: ModuleType | str, *args: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Runs a script to its end in a process of its own."""
    return subprocess.run(command(script, *args), cwd=cwd, capture_output=True, text=True, timeout=300)


def only_run(folder: Path) -> Path:
    """The one run folder in `folder`."""
    (run,) = folder.iterdir()
    return run


def scalars(run: Path, *without: str) -> list[tuple[str, int, float]]:
    """(tag, step, value) of every scalar in the event file, in the order written, without the tags named."""
    (file,) = run.glob("events.*")
    return [
        (value.tag, event.step, float(make_ndarray(value.tensor)))
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "scalars" and value.tag not in without
    ]


def learned(script: ModuleType, run: Path) -> dict:
    """All that the last checkpoint says but the wall clock, and the size of the event file, which follows from it."""
    state = script.read_checkpoint(run / script.CHECKPOINT)
    return {name: plain(value) for name, value in state.items() if name not in ("seconds", "events")}


def plain(value: Any) -> Any:
    """Nested state with tensors as their bytes, so that == compares all of it."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return (tuple(value.shape), value.numpy().tobytes()) if hasattr(value, "numpy") else value


def result(run: Path) -> dict:
    """result.json without the wall clock."""
    values = json.loads((run / "result.json").read_text())
    assert values.pop("wall_seconds") > 0
    return values


class Corridor(gym.Env):
    """States 0 to 4, actions left and right, 1 for reaching state 4. `fault` breaks its 7th step or its 2nd reset. With
    `box`, states and actions are vectors of one number."""

    metadata: ClassVar = {"render_modes": ["rgb_array"]}

    def __init__(self, fault: str = "", box: bool = False, render_mode: str | None = None):
        self.observation_space, self.action_space, self.box = gym.spaces.Discrete(5), gym.spaces.Discrete(2), box
        if box:
            self.observation_space = gym.spaces.Box(0.0, 4.0, (1,), np.float64)
            self.action_space = gym.spaces.Box(-2.0, 1.0, (1,), np.float32)
        self.fault, self.render_mode, self.steps, self.resets = fault, render_mode, 0, 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.position, self.resets = 0, self.resets + 1
        if self.fault == "reset raises" and self.resets == 2:
            raise RuntimeError("the door is locked")
        return self.observation(), {}

    def observation(self) -> Any:
        return np.array([self.position], np.float64) if self.box else self.position

    def render(self) -> np.ndarray:
        picture = np.zeros((16, 80, 3), np.uint8)
        picture[:, 16 * self.position : 16 * self.position + 16] = 255
        return picture

    def step(self, action: int) -> tuple:
        right = float(action[0]) > -0.5 if self.box else bool(action)
        self.position = max(0, self.position + (1 if right else -1))
        self.steps += 1
        obs, reward = self.observation(), float(self.position == 4)
        if self.steps == 7:
            if self.fault == "step raises":
                raise RuntimeError("the floor is wet")
            numbers = {"nan": float("nan"), "inf": float("inf"), "huge": 1e20}
            faults = {f"obs {name}": np.array([number]) if self.box else number for name, number in numbers.items()}
            faults |= {"obs shape": np.zeros(3), "obs dtype": "here", "obs outside": 5}
            obs = faults.get(self.fault, obs)
            reward = {f"reward {name}": number for name, number in numbers.items()}.get(self.fault, reward)
        return obs, reward, self.position == 4, False, {}


gym.register("Corridor-v0", entry_point=Corridor)
gym.register("BoxCorridor-v0", entry_point=Corridor, kwargs={"box": True})
gym.register("ShortCorridor-v0", entry_point=Corridor, max_episode_steps=3)
