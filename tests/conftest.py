"""What the tests of several scripts need."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray

ROOT = Path(__file__).parent.parent
SCRIPTS = ["dyna_q", "dyna_q_plus"]

os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(params=SCRIPTS)
def script(request: pytest.FixtureRequest) -> ModuleType:
    """Each script in turn, as a module."""
    return importlib.import_module(request.param)


def command(script: ModuleType | str, *args: object) -> list[str]:
    """The command that a user types."""
    name = script if isinstance(script, str) else script.__name__
    return [sys.executable, str(ROOT / f"{name}.py"), *map(str, args)]


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
    return {name: value for name, value in state.items() if name not in ("seconds", "events")}


def result(run: Path) -> dict:
    """result.json without the wall clock."""
    values = json.loads((run / "result.json").read_text())
    assert values.pop("wall_seconds") > 0
    return values


class Corridor(gym.Env):
    """States 0 to 4, actions left and right, 1 for reaching state 4. `fault` breaks its 7th step or its 2nd reset."""

    def __init__(self, fault: str = "", render_mode: str | None = None):
        self.observation_space, self.action_space = gym.spaces.Discrete(5), gym.spaces.Discrete(2)
        self.fault, self.render_mode, self.steps, self.resets = fault, render_mode, 0, 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.position, self.resets = 0, self.resets + 1
        if self.fault == "reset raises" and self.resets == 2:
            raise RuntimeError("the door is locked")
        return self.position, {}

    def step(self, action: int) -> tuple:
        self.position = max(0, self.position + 2 * int(action) - 1)
        self.steps += 1
        obs, reward = self.position, float(self.position == 4)
        if self.steps == 7:
            if self.fault == "step raises":
                raise RuntimeError("the floor is wet")
            obs = {"obs nan": float("nan"), "obs shape": np.zeros(3), "obs dtype": "here", "obs outside": 5}.get(
                self.fault, obs
            )
            reward = {"reward nan": float("nan"), "reward inf": float("inf")}.get(self.fault, reward)
        return obs, reward, self.position == 4, False, {}


gym.register("Corridor-v0", entry_point=Corridor)
gym.register("ShortCorridor-v0", entry_point=Corridor, max_episode_steps=3)
