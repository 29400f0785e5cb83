"""Two small environments: one to be seen, in pictures, and one to be remembered.

python dreamer.py --env-id benchmark.tasks:Catch-v0 --image-size 0 --warmup 1000 --entropy-scale 3e-3
python dreamer.py --env-id benchmark.tasks:Recall-v0 --env-kwargs delay 3 --warmup 1000 --entropy-scale 3e-3

The games of MinAtar (`pip install minatar`) can be had by this module, too, as they are registered by a call only, and
the tasks of dm_control (`pip install shimmy "mujoco<4" dm_control`), with actions that are repeated, and observations
in one vector where a script wants that:

python muzero.py --env-id benchmark.tasks:MinAtar/Breakout-v1
python dreamer.py --env-id benchmark.tasks:DMControl-v0 --env-kwargs task reacher-easy repeat 2
python cem_mpc.py --env-id benchmark.tasks:DMControl-v0 --env-kwargs task reacher-easy repeat 2 flat True
"""

import contextlib
import importlib
from typing import ClassVar

import gymnasium as gym
import numpy as np


class Catch(gym.Env):
    """A ball falls from a random column of a board of 8 x 8; the paddle in the lowest row moves left, stays or moves
    right. Reward when the ball arrives, after 7 steps: 1 if it is caught, else -1. (Mnih et al. 2014 have such a game.)

    Observation: picture (16, 16, 1) of bytes, ball and paddle white, two pixels a field.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 8}

    def __init__(self, side: int = 8, render_mode: str | None = None):
        self.side, self.render_mode = side, render_mode
        self.observation_space = gym.spaces.Box(0, 255, (2 * side, 2 * side, 1), np.uint8)
        self.action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.row, self.column, self.paddle = 0, int(self.np_random.integers(self.side)), self.side // 2
        return self.picture(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.paddle = min(max(self.paddle + int(action) - 1, 0), self.side - 1)
        self.row += 1
        arrived = self.row == self.side - 1
        reward = 0.0 if not arrived else 1.0 if self.paddle == self.column else -1.0
        return self.picture(), reward, arrived, False, {}

    def picture(self) -> np.ndarray:
        fields = np.zeros((self.side, self.side, 1), np.uint8)
        fields[self.row, self.column] = fields[-1, self.paddle] = 255
        return fields.repeat(2, axis=0).repeat(2, axis=1)

    def render(self) -> np.ndarray:
        return self.picture().repeat(8, axis=0).repeat(8, axis=1).repeat(3, axis=2)


class Recall(gym.Env):
    """One of two signs is shown in the first observation, then nothing for `delay` steps, then the question which it
    was: reward 1 for the action of that number. An agent that sees no more than one observation is right half of the
    time.

    Observation (3,): first sign, second sign, question.
    """

    def __init__(self, delay: int = 10):
        self.delay = delay
        self.observation_space = gym.spaces.Box(0.0, 1.0, (3,), np.float32)
        self.action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps, self.sign = 0, int(self.np_random.integers(2))
        return self.observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        asked = self.steps == self.delay + 1
        self.steps += 1
        return self.observation(), float(asked and int(action) == self.sign), asked, False, {}

    def observation(self) -> np.ndarray:
        obs = np.zeros(3, np.float32)
        if self.steps == 0:
            obs[self.sign] = 1
        obs[2] = self.steps == self.delay + 1
        return obs


class Repeat(gym.Wrapper):
    """Makes every action `repeat` times, or until the episode ends; the rewards are added up."""

    def __init__(self, env: gym.Env, repeat: int):
        super().__init__(env)
        self.repeat = repeat

    def step(self, action: np.ndarray) -> tuple:
        total = 0.0
        for _ in range(self.repeat):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


def make_dm_control(
    task: str = "reacher-easy", repeat: int = 2, flat: bool = False, render_mode: str | None = None
) -> gym.Env:
    """A task of dm_control, by its name in Shimmy; an episode is 1,000 steps of its own. `flat`: observations are one
    vector in single precision, and not a Dict."""
    importlib.import_module("shimmy")  # it registers them
    drawing = {"render_mode": render_mode} if render_mode else {}
    env = Repeat(gym.make(f"dm_control/{task}-v0", **drawing), repeat)
    return gym.wrappers.DtypeObservation(gym.wrappers.FlattenObservation(env), np.float32) if flat else env


for _name, _class in (("Catch-v0", Catch), ("Recall-v0", Recall), ("DMControl-v0", make_dm_control)):
    if _name not in gym.registry:
        gym.register(_name, entry_point=_class)

with contextlib.suppress(ImportError):
    from minatar.gym import register_envs

    register_envs()
