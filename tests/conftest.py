"""What the tests of several scripts need."""

import ast
import dataclasses
import functools
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
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
NEURAL = ["cem_mpc", "mbpo", "muzero", "dreamer", "td_mpc2"]
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
    "td_mpc2": "--learning-starts 30 --horizon 2 --updates-per-step 0.1",
}
CORRIDOR = dict.fromkeys(("cem_mpc", "mbpo", "td_mpc2"), "BoxCorridor-v0")  # where it is not Corridor-v0

os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(params=SCRIPTS)
def script(request: pytest.FixtureRequest) -> ModuleType:
    """Each script in turn, as a module."""
    return importlib.import_module(request.param)


# --- running a script -------------------------------------------------------------------------------------------------
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


def run_script(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    """The command line without a process of its own."""
    if hasattr(script.Run, "resumable"):
        del script.Run.resumable  # of an earlier run of this process
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers, path = [signal.getsignal(number) for number in signals], list(sys.path)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, with_tiny(script.__name__, args))])
    try:
        script.main()
    finally:
        sys.path[:] = path
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)


def complaint(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *args: object) -> str:
    """Runs a command that has to fail as bad input has to: one line on stderr, which is returned, and status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_script(script, monkeypatch, *args)
    lines = [line for line in capsys.readouterr().err.splitlines() if "WARN" not in line and "logger." not in line]
    assert (stop.value.code, len(lines)) == (2, 1), lines
    assert re.match(rf"{script.SCRIPT}.py: error: \S", lines[0])
    return lines[0]


# --- what a run leaves behind -----------------------------------------------------------------------------------------
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


def checkpoint(script: ModuleType, run: Path) -> dict:
    """The last checkpoint, with tensors as their bytes, so that == compares all of it."""
    path = run / script.CHECKPOINT
    if path.suffix == ".txt":
        return plain(ast.literal_eval(path.read_text()))
    import torch

    return plain(torch.load(path, map_location="cpu", weights_only=True))


def plain(value: Any) -> Any:
    """Nested state with tensors and arrays as their bytes."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return (value.shape, str(value.dtype), value.tobytes()) if isinstance(value, np.ndarray) else value


def learned(script: ModuleType, run: Path) -> dict:
    """All that the last checkpoint says but the clocks."""
    state = checkpoint(script, run)
    step, _, _, logged = state.pop("run")
    state["result"].pop("wall_seconds", None)
    return state | {"step": step, "logged": logged}


def result(run: Path) -> dict:
    """result.json without the wall clock."""
    values = json.loads((run / "result.json").read_text())
    assert values.pop("wall_seconds") > 0
    return values


def outcome(script: ModuleType, run: Path) -> tuple:
    """All that must be equal where a run was stopped and one was not: what was learned, the curves, the result."""
    return learned(script, run), scalars(run, "charts/SPS"), result(run)


# --- a world ----------------------------------------------------------------------------------------------------------
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
        reward = float(self.position == 4)
        if self.steps == 7:
            if self.fault == "step raises":
                raise RuntimeError("the floor is wet")
            reward = {"reward nan": float("nan"), "reward inf": float("inf")}.get(self.fault, reward)
        return self.observation(), reward, self.position == 4, False, {}


gym.register("Corridor-v0", entry_point=Corridor)
gym.register("BoxCorridor-v0", entry_point=Corridor, kwargs={"box": True})
gym.register("ShortCorridor-v0", entry_point=Corridor, max_episode_steps=3)
gym.register("LimitedCorridor-v0", entry_point=Corridor, max_episode_steps=20)


def in_corridor(script: ModuleType) -> list:
    """For the command line: a corridor that the script can walk in, with a time limit."""
    return ["--env-id", "LimitedCorridor-v0", "--env-kwargs", "box", script.__name__ in CORRIDOR]


def corridor(script: ModuleType, limit: int = 20) -> Callable[..., gym.Env]:
    """For `train`: makes the same, which need not be registered."""

    def make(**drawing: str) -> gym.Env:
        return gym.wrappers.TimeLimit(Corridor(box=script.__name__ in CORRIDOR, **drawing), limit)

    return make


def interrupted_at(script: ModuleType, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """From now on the agent's `observe` raises KeyboardInterrupt when it is called for the time numbered `call`."""
    observe, calls = script.Agent.observe, []

    @functools.wraps(observe)
    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return observe(*args, **kwargs)

    monkeypatch.setattr(script.Agent, "observe", watched)


def full_disk(script: ModuleType, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """From the checkpoint of this number on there is no space left on the disk."""
    opened = []

    class Full(io.FileIO):
        def write(self, data: bytes) -> int:
            super().write(bytes(data)[:10])
            raise OSError(28, "No space left on device")

    def watched(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        opened.append(Path(path).name.endswith(script.CHECKPOINT) and "w" in mode)
        return Full(path, mode) if opened[-1] and sum(opened) >= number else open(path, mode, *args, **kwargs)

    monkeypatch.setattr(script, "open", watched, raising=False)
