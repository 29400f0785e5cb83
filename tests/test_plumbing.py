"""The plumbing block, which is the same in every script, tested once in dyna_q.py: episodes, runs, the command line."""

import dataclasses
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import plumbing
import pytest
from conftest import (
    ROOT,
    SCRIPTS,
    Corridor,
    checkpoint,
    command,
    complaint,
    corridor,
    full_disk,
    interrupted_at,
    learned,
    only_run,
    outcome,
    result,
    run_script,
    scalars,
)
from PIL import Image, ImageSequence

import dyna_q
from dyna_q import Args, Episode, Failure, Run, seed_of, train

LINES = 200  # of the block, at most


class World(gym.Env):
    """Counts its steps: the reward is their number, and the picture shows it. The last step says `end`. Observations
    are written into the same array; notes how it was made, reset and stepped."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 8}
    observation_space, action_space = gym.spaces.Box(0, 63, (1,), np.int64), gym.spaces.Discrete(2)

    def __init__(self, length: float = 5, end: str = "terminated", render_mode: str | None = None):
        self.length, self.end, self.render_mode, self.array = length, end, render_mode, np.zeros(1, np.int64)
        self.seeds, self.begun_with = [], []

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        self.seeds.append(seed)
        self.known = getattr(self, "steps_made", None)
        self.array[:] = self.count = 0
        return self.array, {"count": 0}

    def step(self, action: int) -> tuple:
        self.count += 1
        self.begun_with += [self.known] if self.count == 1 else []
        self.array[:] = self.count % 64
        done = self.count >= self.length
        return self.array, self.count, done and self.end == "terminated", done and self.end == "truncated", {}

    def render(self) -> np.ndarray:
        return np.full((4, 8, 3), 8 * self.count % 256, np.uint8)


class Idle:
    """An agent that learns nothing; it knows the seeds and observations of its policies, and counts its states."""

    def __init__(self, metrics: dict | None = None):
        self.measured, self.seeds, self.seen, self.saved = metrics or {}, [], [], 0

    def metrics(self) -> dict:
        return self.measured

    def greedy_policy(self, seed: int) -> Any:
        self.seeds.append(seed)
        return lambda obs, info: self.seen.append((int(obs[0]), info)) or 0

    def state_dict(self) -> dict:
        self.saved += 1
        return {"saved": self.saved}

    def load_state_dict(self, state: dict) -> None:
        self.saved = state["saved"]


def episode_of(env: gym.Env, *key: int) -> Episode:
    """An episode, the first one, that has begun."""
    episode = Episode(env, *key)
    episode.reset(0)
    return episode


class Worlds:
    """Makes worlds, and has them all."""

    def __init__(self, **kwargs: Any):
        self.kwargs, self.made, self.drawings = kwargs, [], []

    def __call__(self, **drawing: str) -> World:
        self.drawings.append(drawing)
        self.made.append(World(**self.kwargs, **drawing))
        return self.made[-1]


def idle_run(folder: Path, make: Any = None, agent: Any = None, episodes: int = 1, **fields: Any) -> Run:
    """A run of an idle agent, whose steps are up to the test."""
    make = make or Worlds()
    little = {"total_timesteps": 10, "eval_every": 10**9, "checkpoint_every": 10**9, "eval_episodes": 1}
    args = Args(env_id="World", run_dir=str(folder), **little | fields)
    return Run(args, agent or Idle(), [Episode(make(), args.seed, 1, index) for index in range(episodes)], make)


def changes(values: list) -> list:
    """Without those that are equal to the one before: that an episode was reset once more does not count."""
    return [value for value, _ in itertools.groupby(values)]


def points(run: Run, tag: str) -> list[tuple[int, float]]:
    return [(step, value) for name, step, value in scalars(run.path) if name == tag]


# --- one text ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_block_is_the_same_in_every_script(name):
    above, block, below = plumbing.split((ROOT / f"{name}.py").read_text())
    assert block == plumbing.block(name)
    assert "«" not in block
    assert len(block.splitlines()) <= LINES
    assert "# ---" not in above  # the first banner is that of the block
    assert below.endswith(
        'if __name__ == "__main__" and "__file__" in globals():  # which a notebook has not\n    main()\n'
    )


def test_the_command_that_copies_the_block_mends_it_and_nothing_else(tmp_path):
    (tmp_path / "tests").mkdir()
    for name in [*(f"{name}.py" for name in SCRIPTS), "tests/plumbing.py", "tests/plumbing.txt"]:
        shutil.copy(ROOT / name, tmp_path / name)
    texts = {name: (tmp_path / f"{name}.py").read_text() for name in SCRIPTS}
    broken = texts["dyna_q"].replace("self.step += stride", "self.step += 1")
    assert broken != texts["dyna_q"]
    (tmp_path / "dyna_q.py").write_text(broken)
    for _ in range(2):
        assert subprocess.run([sys.executable, "plumbing.py"], cwd=tmp_path / "tests").returncode == 0
        assert {name: (tmp_path / f"{name}.py").read_text() for name in SCRIPTS} == texts


# --- seeds ------------------------------------------------------------------------------------------------------------
def test_seeds_of_different_keys_differ_and_fit_a_c_int():
    seeds = {seed_of(seed, purpose, index) for seed in range(5) for purpose in range(5) for index in range(50)}
    assert len(seeds) == 5 * 5 * 50
    assert 2**30 < max(seeds) < 2**31


def test_every_episode_has_the_seed_that_its_key_says(tmp_path):
    worlds, agent = Worlds(), Idle()
    run = idle_run(tmp_path, worlds, agent, seed=3, episodes=2, eval_every=5, eval_episodes=2)
    for _ in run.steps():
        run.episodes[1].reset()
    first, second, evaluated = (changes(world.seeds) for world in worlds.made)
    assert first == [seed_of(3, 1, 0, 0)]
    assert second == [seed_of(3, 1, 1, number) for number in range(11)]
    assert evaluated == 2 * [seed_of(3, 2, number, 0) for number in range(2)]
    assert agent.seeds == 2 * [seed_of(3, 3, number) for number in range(2)]


def test_a_run_trains_and_acts_with_the_seeds_of_its_own(tmp_path):
    worlds = Worlds()
    train(Args(env_id="W", run_dir=str(tmp_path), seed=9, total_timesteps=11, n_planning=0), make=worlds)
    assert changes(worlds.made[0].seeds) == [seed_of(9, 1, number) for number in range(3)]
    assert seed_of(1, 0) == 917752063  # what the committed results were made with
    assert seed_of(9, 2, 4, 0) == 1086630530


# --- episodes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "Blackjack-v1", "CliffWalking-v1", "CartPole-v1", "Pendulum-v1"])
def test_a_restored_episode_continues_as_the_original(env_id):
    original, restored = (episode_of(gym.make(env_id), 5, 1) for _ in range(2))
    space = original.env.action_space
    space.seed(0)
    for _ in range(250):
        if any(original.step(space.sample())[2:]):
            original.reset()
    number, actions = json.loads(json.dumps([original.number, original.actions]))
    restored.reset(number, actions)
    assert restored.actions == original.actions
    np.testing.assert_equal(restored.obs, original.obs)
    for _ in range(250):
        action = space.sample()
        one, two = original.step(action), restored.step(action)
        np.testing.assert_equal(one, two)
        assert (original.episodic_return, original.number) == (restored.episodic_return, restored.number)
        if one[2] or one[3]:
            original.reset()
            restored.reset()
            np.testing.assert_equal(original.obs, restored.obs)


@pytest.mark.parametrize(
    ("space", "action"),
    [
        (gym.spaces.Discrete(3), np.int64(2)),
        (gym.spaces.Box(-1, 1, (2,), np.float32), np.array([0.1, -0.7], np.float32)),
        (gym.spaces.MultiDiscrete([3, 3]), np.array([1, 2])),
    ],
)
def test_repeated_actions_have_the_type_that_they_had(space, action):
    class Picky(World):
        action_space, given = space, []

        def step(self, action: Any) -> tuple:
            self.given.append(action)
            return super().step(action)

    episode = episode_of(Picky(), 1)
    episode.step(action)
    episode.reset(7, json.loads(json.dumps(episode.actions)))
    first, again = episode.env.given
    assert type(first) is type(again)
    assert (first.dtype, first.shape, first.tolist()) == (again.dtype, again.shape, again.tolist())
    assert episode.number == 7


def test_episodes_are_numbered_and_begin_with_nothing():
    episode = episode_of(World(), 1)
    episode.step(0)
    assert (episode.number, episode.actions, episode.episodic_return) == (0, [0], 1.0)
    episode.reset()
    assert (episode.number, episode.actions, episode.episodic_return, episode.info) == (1, [], 0.0, {"count": 0})
    episode.step(1)
    episode.reset(0)
    assert (episode.number, episode.actions, episode.episodic_return) == (0, [], 0.0)


def test_a_step_gives_plain_values_and_the_newest_information():
    episode = episode_of(World(length=2), 1)
    obs, *rest = episode.step(0)
    assert [type(value) for value in rest] == [float, bool, bool]
    assert (rest, episode.info) == ([1.0, False, False], {})
    assert obs is episode.obs
    assert episode.step(0)[1:] == (2.0, True, False)
    assert episode.episodic_return == 3.0
    assert episode_of(World(length=1, end="truncated"), 1).step(0)[1:] == (1.0, False, True)


def test_observations_stay_as_they_were_when_an_environment_reuses_its_array():
    episode = episode_of(World(), 1)
    seen = [episode.obs, episode.step(0)[0], episode.step(0)[0]]
    assert [int(obs[0]) for obs in seen] == [0, 1, 2]
    episode.reset()
    assert int(seen[2][0]) == 2


def test_parts_of_an_observation_are_copies_too():
    class Nested(World):
        def reset(self, **kwargs: Any) -> tuple:
            return {"part": (super().reset(**kwargs)[0],)}, {}

        def step(self, action: int) -> tuple:
            return {"part": (self.array,)}, *super().step(action)[1:]

    episode = episode_of(Nested(), 1)
    seen = [episode.obs, episode.step(0)[0], episode.step(0)[0]]
    assert [int(obs["part"][0][0]) for obs in seen] == [0, 1, 2]


def test_an_environment_may_change_the_action_that_it_is_given():
    class Halves(World):
        action_space = gym.spaces.Box(-1, 1, (1,))

        def step(self, action: np.ndarray) -> tuple:
            action *= 0.5
            return super().step(action)

    episode, action = episode_of(Halves(), 1), np.ones(1, np.float32)
    episode.step(action)
    assert (action, episode.actions) == (1, [[1.0]])


def rewarded(reward: Any) -> Episode:
    class Pays(World):
        def step(self, action: int) -> tuple:
            obs, _, *rest = super().step(action)
            return obs, reward, *rest

    return episode_of(Pays(), 1)


@pytest.mark.parametrize("reward", [2, 2.0, np.float32(2), np.array(2), np.array([2.0]), np.array([[2]], np.uint8)])
def test_a_reward_that_is_one_number_is_that_number(reward):
    episode = rewarded(reward)
    got = episode.step(0)[1]
    assert (got, type(got), episode.episodic_return) == (2.0, float, 2.0)
    assert rewarded(True).step(0)[1] == 1.0


NO_REWARDS = [math.nan, math.inf, -math.inf, None, "1", 1j, np.zeros(2), np.zeros(0), np.array([math.nan]), [1.0, 2.0]]


@pytest.mark.parametrize("reward", NO_REWARDS, ids=repr)
def test_a_reward_that_is_no_number_is_told_with_step_and_episode(reward):
    episode = rewarded(reward)
    episode.reset()
    episode.reset()
    with pytest.raises(Failure, match=r"^step 1 of episode 2: the reward is .*, not a number"):
        episode.step(0)


@pytest.mark.parametrize("fault", ["reward nan", "reward inf"])
def test_a_bad_reward_ends_a_run_with_one_line(fault, monkeypatch, capsys, tmp_path):
    args = ["--env-id", "Corridor-v0", "--env-kwargs", "fault", fault, "--run-dir", tmp_path, "--epsilon", 1]
    line = complaint(dyna_q, monkeypatch, capsys, *args)
    assert f"the reward is {fault[-3:]}, not a number" in line


@pytest.mark.parametrize(("fault", "message"), [("reset raises", "the door"), ("step raises", "the floor")])
def test_what_an_environment_raises_is_the_traceback_of_its_author(fault, message, monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match=message):
        run_script(
            dyna_q, monkeypatch, "--env-id", "Corridor-v0", "--env-kwargs", "fault", fault, "--run-dir", tmp_path
        )


# --- what is due and when ---------------------------------------------------------------------------------------------
def noted(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Names and steps of what a run does, in order; training is a step that its caller makes."""
    notes = []
    for name in ("log", "evaluate", "save"):
        monkeypatch.setattr(run, name, lambda *_, name=name: notes.append((name, run.step)))
    return notes


@pytest.mark.parametrize(
    ("stride", "total", "every", "wanted"),
    [
        (1, 10, 4, [4, 8, 10]),
        (1, 8, 4, [4, 8]),
        (1, 3, 4, [3]),
        (4, 10, 5, [8, 12]),
        (4, 16, 8, [8, 16]),
        (8, 16, 4, [8, 16]),
        (3, 20, 10, [12, 21]),
        (3, 12, 9, [9, 12]),
    ],
)
@pytest.mark.parametrize("name", ["evaluate", "save"])
def test_what_is_due_comes_as_often_as_asked_and_at_the_end(name, stride, total, every, wanted, monkeypatch, tmp_path):
    run = idle_run(
        tmp_path, total_timesteps=total, **{{"evaluate": "eval_every", "save": "checkpoint_every"}[name]: every}
    )
    notes = noted(run, monkeypatch)
    steps = list(run.steps(stride))
    assert steps == list(range(stride, total + stride, stride))[: len(steps)]
    assert total <= steps[-1] == run.step < total + stride
    assert [step for what, step in notes if what == name] == wanted


def test_a_run_logs_then_evaluates_then_saves(monkeypatch, tmp_path):
    run = idle_run(tmp_path, eval_every=5, checkpoint_every=5)
    notes = noted(run, monkeypatch)
    for step in run.steps():
        notes.append(("train", step))
    assert [what for what, step in notes if step == 5] == ["train", "log", "evaluate", "save"]
    assert [what for what, step in notes if step == 10] == ["train", "log", "evaluate", "save"]


def test_metrics_are_logged_every_hundredth_of_a_run_and_before_each_checkpoint(tmp_path):
    run = idle_run(tmp_path, agent=Idle({"losses/x": 0.5}), total_timesteps=1_000, checkpoint_every=25)
    for _ in run.steps():
        pass
    wanted = sorted({*range(10, 1_001, 10), *range(25, 1_001, 25)})
    assert points(run, "losses/x") == [(step, 0.5) for step in wanted]
    assert [step for step, _ in points(run, "charts/SPS")] == wanted


def test_no_checkpoint_holds_a_nan_though_logs_are_further_apart(tmp_path):
    run = idle_run(tmp_path, agent=Idle({"losses/x": math.nan}), total_timesteps=1_000, checkpoint_every=5)
    with pytest.raises(Failure, match=r"^step 5: losses/x is nan$"):
        list(run.steps())
    assert not (run.path / dyna_q.CHECKPOINT).exists()


def test_a_number_that_is_not_finite_ends_a_run_with_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(dyna_q.Agent, "metrics", lambda self: {"losses/td_error": math.inf})
    line = complaint(dyna_q, monkeypatch, capsys, "--run-dir", tmp_path, "--total-timesteps", 600)
    assert "step 6: losses/td_error is inf" in line


class Clock:
    """A clock that stands still unless it is told to go on."""

    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(dyna_q, "time", SimpleNamespace(time=(clock := Clock()), perf_counter=clock))
    return clock


def test_steps_per_second_are_those_of_training_alone_and_the_time_goes_on_after_a_resume(clock, monkeypatch, tmp_path):
    class Slow(Idle):
        def greedy_policy(self, seed: int) -> Any:
            clock.now += 100
            return super().greedy_policy(seed)

    def training(run: Run, until: int) -> Run:
        for step in run.steps():
            clock.now += 0.5
            if step == until:
                break
        return run

    fields = {"agent": Slow(), "total_timesteps": 40, "eval_every": 10, "checkpoint_every": 20}
    run = training(idle_run(tmp_path, **fields), 35)  # the last checkpoint is after 20 steps and 2 evaluations
    run = training(idle_run(tmp_path, **fields, resume=str(run.path)), 0)
    assert {value for _, value in points(run, "charts/SPS")} == {2.0}
    assert (run.seconds, run.result["wall_seconds"]) == (40 * 0.5, 40 * 0.5 + 4 * 100)


def test_without_a_terminal_there_is_a_line_every_tenth_of_the_run(tmp_path, capsys):
    list(idle_run(tmp_path, total_timesteps=50).steps())
    lines = [line for line in capsys.readouterr().out.splitlines() if "steps/s" in line]
    assert [line.split(",")[0] for line in lines] == [f"step {step} of 50" for step in range(5, 51, 5)]


def test_on_a_terminal_there_is_a_bar_that_says_what_is_going_on(monkeypatch, tmp_path, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    run = idle_run(tmp_path, total_timesteps=50, eval_every=25, eval_episodes=2)
    list(run.steps())
    assert "evaluating 1/2" in terminal.getvalue()
    assert "evaluating 2/2" in terminal.getvalue()
    assert "50/50" in terminal.getvalue()
    assert not run.bar.desc
    assert "steps/s" not in capsys.readouterr().out
    longer = idle_run(tmp_path, resume=str(run.path), total_timesteps=60)
    assert (longer.bar.n, longer.bar.total) == (50, 60)
    list(longer.steps(5))
    assert longer.bar.n == 60


def test_a_run_ends_with_where_its_folder_lies_and_how_to_see_it(tmp_path, capsys):
    run = idle_run(tmp_path)
    list(run.steps())
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"run folder: {run.path}",
        f"curves:     tensorboard --logdir {run.path}",
    ]


# --- evaluations ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "length"),
    [
        (Worlds(length=5), 5),
        (Worlds(length=5, end="truncated"), 5),
        (Worlds(length=math.inf), 1_000),  # who walks in circles is stopped
        (lambda: gym.make("Endless-v0"), 1_200),  # but not before a limit that the environment has
    ],
)
def test_an_episode_of_an_evaluation_ends_where_it_should(make, length, tmp_path):
    run = idle_run(tmp_path, make, eval_episodes=2)
    episodes, frames = run.play()
    assert [len(episode.actions) for episode in episodes] == [length, length]
    assert frames == []


gym.register("Endless-v0", entry_point=World, max_episode_steps=1_200, kwargs={"length": math.inf})


def test_a_policy_sees_observation_and_information_of_its_step(tmp_path):
    run = idle_run(tmp_path, agent=Idle())
    run.play()
    assert run.agent.seen == [(0, {"count": 0}), (1, {}), (2, {}), (3, {}), (4, {})]


def test_an_evaluation_says_what_it_found(tmp_path, capsys):
    class Longer(World):
        def reset(self, **kwargs: Any) -> tuple:
            self.length = len(self.seeds) % 3 + 1
            return super().reset(**kwargs)

    run = idle_run(tmp_path, Longer, total_timesteps=20, eval_every=10, eval_episodes=3)
    for _ in run.steps():
        run.episodes[0].reset()
    returns, lengths = [1, 3, 6], [1, 2, 3]
    assert points(run, "eval/episodic_return") == [(10, pytest.approx(np.mean(returns))), (20, pytest.approx(10 / 3))]
    assert points(run, "eval/episodic_length") == [(10, np.mean(lengths)), (20, np.mean(lengths))]
    assert "step 10: return 3.333 +- 2.055 in 3 episodes of 2 steps" in capsys.readouterr().out
    assert result(run.path) == {
        "env_steps": 20,
        "episodes": 20,
        "eval_return_mean": np.mean(returns),
        "eval_return_std": np.std(returns),
        "eval_episodes": 3,
    }


def test_episodes_of_a_result_are_those_of_all_environments(tmp_path):
    run = idle_run(tmp_path, episodes=2, eval_every=10)
    for step in run.steps(2):
        run.episodes[0].reset()
        if step > 6:
            run.episodes[1].reset()
    assert run.result["episodes"] == 5 + 2


def test_capture_video_draws_each_state_of_the_first_episode_that_is_acted_in(tmp_path):
    worlds = Worlds(length=6)
    run = idle_run(tmp_path, worlds, capture_video=True, eval_every=5, eval_episodes=2)
    list(run.steps())
    assert worlds.drawings == [{}, {"render_mode": "rgb_array"}]
    assert sorted(file.name for file in run.path.glob("*.gif")) == ["step_10.gif", "step_5.gif"]
    video = Image.open(run.path / "step_5.gif")
    assert video.size == (8, 4)
    assert video.info["loop"] == 0  # for ever
    frames = [(int(np.asarray(f.convert("L"))[0, 0]), f.info["duration"]) for f in ImageSequence.Iterator(video)]
    assert frames == [(8 * number, 120) for number in range(6)]  # hundredths of a second: 8 pictures a second


def test_without_it_an_environment_needs_no_render_mode(tmp_path):
    worlds = Worlds()
    list(idle_run(tmp_path, worlds, eval_every=5).steps())
    assert worlds.drawings == [{}, {}]
    assert not list(tmp_path.glob("*/*.gif"))


@pytest.mark.parametrize("picture", [None, "text"])
def test_where_there_is_no_picture_it_is_told_before_the_training(picture, tmp_path, monkeypatch, capsys):
    class Blind(World):
        def render(self) -> str | None:
            return picture

    with pytest.raises(Failure, match=r"--capture-video: render\(\) of this environment gives no picture"):
        idle_run(tmp_path, Blind, capture_video=True)
    line = complaint(
        dyna_q, monkeypatch, capsys, "--env-id", "Unseen-v0", "--capture-video", "--run-dir", tmp_path / "runs"
    )
    assert "render_mode" in line
    assert not list(tmp_path.iterdir())


class Unseen(gym.Env):
    observation_space, action_space = gym.spaces.Discrete(2), gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        return 0, {}


gym.register("Unseen-v0", entry_point=Unseen)


# --- the run folder ---------------------------------------------------------------------------------------------------
def test_a_run_folder_is_named_after_the_run_and_never_shared(tmp_path):
    make, names = Worlds(), []
    for _ in range(2):
        args = Args(env_id="module:Space/World-v0", seed=4, run_dir=str(tmp_path))
        names.append(Run(args, Idle(), [Episode(make(), 1)], make).path.relative_to(tmp_path).as_posix())
    assert names[0] != names[1]
    assert all(name.startswith("module-Space-World-v0__dyna_q__4__2") for name in names)


def test_args_json_has_script_arguments_and_versions(tmp_path):
    run = idle_run(tmp_path, gamma=0.5, env_kwargs={"a": 1, "b": True, "c": 0.5, "d": "x"})
    saved = json.loads((run.path / "args.json").read_text())
    assert saved == {
        "script": "dyna_q",
        "args": vars(run.args),
        "versions": {"gymnasium": gym.__version__, "numpy": np.__version__},
    }
    assert dyna_q.saved_args(run.path) == run.args
    list(run.steps())
    again = idle_run(tmp_path, resume=str(run.path))
    assert json.loads((again.path / "args.json").read_text())["args"]["resume"] is None


def test_tensorboard_reads_scalars_at_their_step(tmp_path):
    run = idle_run(tmp_path)
    for step in run.steps():
        if step == 3:
            run.log({"a/x": 0.25, "b/y": np.float32(2), "c/z": 7, "d/n": np.int64(3)})
    wanted = [("a/x", 3, 0.25), ("b/y", 3, 2.0), ("c/z", 3, 7.0), ("d/n", 3, 3.0)]
    assert [point for point in scalars(run.path, "charts/SPS") if point[1] == 3] == wanted
    (file,) = run.path.glob("events.*")
    assert "tfevents" in file.name  # by which TensorBoard finds it


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_what_is_not_finite_is_not_logged(value, tmp_path):
    run = idle_run(tmp_path)
    next(run.steps())
    with pytest.raises(Failure, match=r"^step 1: losses/x is (nan|-?inf)$"):
        run.log({"losses/x": value})


# --- resuming ---------------------------------------------------------------------------------------------------------
LITTLE = {"total_timesteps": 300, "eval_every": 70, "checkpoint_every": 50, "eval_episodes": 2, "n_planning": 3}


def little_args(folder: Path, **fields: Any) -> Args:
    return Args(run_dir=str(folder), **LITTLE | fields)


def stopped(args: Args, monkeypatch: pytest.MonkeyPatch, *fault: Any) -> None:
    """Trains until a KeyboardInterrupt, raised by a patched function or by the agent when it observes a step."""
    with monkeypatch.context() as patch:
        if len(fault) == 1:
            interrupted_at(dyna_q, patch, *fault)
        else:
            patch.setattr(*fault)
        with pytest.raises(KeyboardInterrupt):
            train(args)


def resumed(folder: Path) -> Path:
    """Resumes the one run in a folder."""
    run = only_run(folder)
    train(dataclasses.replace(dyna_q.saved_args(run), resume=str(run)))
    return run


@pytest.mark.parametrize("env_id", ["DynaMaze-v0", "FrozenLake-v1", "Blackjack-v1"])
def test_stopped_at_any_step_and_resumed_it_ends_as_if_never_stopped(env_id, tmp_path, monkeypatch):
    train(little_args(tmp_path / "whole", env_id=env_id))
    for call in (1, 49, 50, 51, 99, 101, 171, 300):
        stopped(little_args(tmp_path / str(call), env_id=env_id), monkeypatch, call)
        assert outcome(dyna_q, resumed(tmp_path / str(call))) == outcome(dyna_q, only_run(tmp_path / "whole"))


def test_stopped_while_it_evaluates_or_saves_it_ends_as_if_never_stopped(tmp_path, monkeypatch):
    train(little_args(tmp_path / "whole"))
    whole = outcome(dyna_q, only_run(tmp_path / "whole"))
    replace, log = Path.replace, Run.log

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    def log_but_evaluations(run: Run, values: dict) -> None:
        (stop if "eval/episodic_return" in values else log)(run, values)

    def stop_before(name: str, after: int) -> Any:
        calls = []

        def watched(old: Path, new: Path) -> None:
            calls.append(Path(new).name)
            if calls.count(name) > after:
                stop()
            replace(old, new)

        return watched

    faults = {
        "evaluating": (Run, "play", stop),
        "evaluated": (Run, "log", log_but_evaluations),
        "first save": (Path, "replace", stop_before(dyna_q.CHECKPOINT, 0)),
        "third save": (Path, "replace", stop_before(dyna_q.CHECKPOINT, 2)),
        "last save": (Path, "replace", stop_before(dyna_q.CHECKPOINT, 5)),
        "result": (Path, "replace", stop_before("result.json", 0)),
    }
    for name, fault in faults.items():
        stopped(little_args(tmp_path / name), monkeypatch, *fault)
        assert outcome(dyna_q, resumed(tmp_path / name)) == whole, name


def test_stopped_again_and_again_at_the_same_place_it_stays_whole(tmp_path, monkeypatch):
    train(little_args(tmp_path / "whole"))
    stopped(little_args(tmp_path / "stopped"), monkeypatch, 120)
    run = only_run(tmp_path / "stopped")
    args = dataclasses.replace(dyna_q.saved_args(run), resume=str(run))
    for call in (49, 49, 60, 60, 1):
        stopped(args, monkeypatch, call)
    train(args)
    assert outcome(dyna_q, run) == outcome(dyna_q, only_run(tmp_path / "whole"))


def test_a_checkpoint_soon_after_resuming_knows_where_the_events_end(tmp_path):
    run = idle_run(tmp_path)
    list(run.steps())
    file = run.path / "events.out.tfevents.0"
    size = file.stat().st_size
    with file.open("ab") as events:
        events.write(bytes(100))  # logged after the checkpoint, before it was killed
    resumed = idle_run(tmp_path, resume=str(run.path))
    resumed.save()
    assert file.stat().st_size == size == checkpoint(dyna_q, run.path)["run"][3]


def test_checkpoints_keep_numbers_actions_result_and_agent(tmp_path):
    run = idle_run(tmp_path, episodes=2, eval_every=4)
    for step in run.steps(2):
        for index, episode in enumerate(run.episodes):
            if any(episode.step(np.int64((step + index) % 2))[2:]):
                episode.reset()
        if step == 8:
            break
    run.step = 8
    run.save()
    resumed = idle_run(tmp_path, episodes=2, resume=str(run.path))
    assert (resumed.step, resumed.seconds, resumed.result) == (8, run.seconds, run.result)
    assert resumed.agent.saved == 1
    for old, new in zip(run.episodes, resumed.episodes, strict=True):
        assert (new.number, new.actions, new.episodic_return) == (old.number, old.actions, old.episodic_return)
        assert np.array_equal(new.obs, old.obs)
    assert [step for step in resumed.steps(2)] == [10]


@pytest.mark.parametrize(("env_id", "total"), [("BlockingMaze-v0", 1_500), ("ShortcutMaze-v0", 3_400)])
def test_a_maze_that_changes_is_as_far_on_after_a_resume_as_without_one(env_id, total, tmp_path, monkeypatch):
    fields = {"env_id": env_id, "total_timesteps": total, "eval_every": 600, "checkpoint_every": 160, "model": "last"}
    train(little_args(tmp_path / "whole", **fields))
    for call in (total - 600, total - 20):  # before and after its change
        stopped(little_args(tmp_path / str(call), **fields), monkeypatch, call)
        assert outcome(dyna_q, resumed(tmp_path / str(call))) == outcome(dyna_q, only_run(tmp_path / "whole"))


def test_a_world_that_changes_is_told_its_steps_where_episodes_are_repeated_and_evaluated(tmp_path):
    worlds = Worlds(length=100)
    run = idle_run(tmp_path, worlds, episodes=2, total_timesteps=40, eval_every=20, eval_episodes=2)
    for step in run.steps(2):
        for episode in run.episodes:
            episode.step(0)
        if step == 26:
            run.episodes[1].reset()
    assert worlds.made[2].begun_with == [20, 20, 40, 40]
    worlds = Worlds(length=100)
    idle_run(tmp_path, worlds, episodes=2, resume=str(run.path), total_timesteps=40)
    assert [world.known for world in worlds.made[:2]] == [20 - 20, 20 - 7]


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    words = [word for name, x in LITTLE.items() for word in (f"--{name.replace('_', '-')}", x)]
    run_script(dyna_q, monkeypatch, *words, "--run-dir", tmp_path / "whole")
    with monkeypatch.context() as patch:
        full_disk(dyna_q, patch, 2)
        line = complaint(dyna_q, patch, capsys, *words, "--run-dir", tmp_path / "full")
    assert "No space left on device" in line
    run = only_run(tmp_path / "full")
    assert checkpoint(dyna_q, run)["run"][0] == 50
    run_script(dyna_q, monkeypatch, "--resume", run)
    assert outcome(dyna_q, run) == outcome(dyna_q, only_run(tmp_path / "whole"))


def test_damaged_and_foreign_checkpoints_are_one_line_and_stay(tmp_path, monkeypatch, capsys):
    train(little_args(tmp_path))
    run = only_run(tmp_path)
    path = run / dyna_q.CHECKPOINT
    whole = path.read_bytes()
    for damage in (b"", whole[:-1], whole[: len(whole) // 2], b"[]", b"{}", b"None", b"\xff\xfe", b"{'agent': {}}"):
        path.write_bytes(damage)
        for option in ("--resume", "--evaluate"):
            assert str(run) in complaint(dyna_q, monkeypatch, capsys, option, run)
        assert path.read_bytes() == damage


# --- the command line -------------------------------------------------------------------------------------------------
def parsed(monkeypatch: pytest.MonkeyPatch, *words: object) -> Args:
    """What `main` hands to `train`."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(dyna_q, "train", seen.append)
        run_script(dyna_q, patch, *words)
    return seen[0]


def test_settings_by_environment_are_defaults_that_the_command_line_overrides(monkeypatch):
    preset = {"total_timesteps": 7, "eval_episodes": 9, "env_kwargs": {"a": 1, "b": "x"}}
    monkeypatch.setitem(dyna_q.PRESETS, "Some-v0", preset)
    assert parsed(monkeypatch) == Args()
    assert parsed(monkeypatch, "--env-id", "Some-v0") == Args(env_id="Some-v0", **preset)
    words = ["--env_id=Some-v0", "--total-timesteps", 8, "--env-kwargs", "b", "y", "c", 0.5]
    wanted = {"total_timesteps": 8, "eval_episodes": 9, "env_kwargs": {"a": 1, "b": "y", "c": 0.5}}
    assert parsed(monkeypatch, *words) == Args(env_id="Some-v0", **wanted)
    assert preset["env_kwargs"] == {"a": 1, "b": "x"}
    default = Args().total_timesteps  # said on the command line, though it is the default
    assert parsed(monkeypatch, "--env-id", "Some-v0", "--total-timesteps", default).total_timesteps == default


def test_options_of_an_environment_have_the_types_that_they_look_like(monkeypatch):
    words = ["--env-kwargs", "a", 1, "b", "True", "c", 0.5, "d", "8x8", "e", "False", "f", "-2", "g", "1e-3"]
    kwargs = parsed(monkeypatch, *words).env_kwargs
    assert kwargs == {"a": 1, "b": True, "c": 0.5, "d": "8x8", "e": False, "f": -2, "g": 1e-3}
    assert [type(x) for x in kwargs.values()] == [int, bool, float, str, bool, int, float]


def test_a_resumed_run_keeps_its_arguments_and_may_change_some(tmp_path, monkeypatch, capsys):
    own = {"gamma": 0.5, "seed": 4, "env_kwargs": {"change_at": 3}}
    train(little_args(tmp_path, **own))
    run = only_run(tmp_path)
    assert parsed(monkeypatch, "--resume", run) == dataclasses.replace(dyna_q.saved_args(run), resume=str(run))
    for name in ("total_timesteps", "eval_every", "eval_episodes", "checkpoint_every"):
        args = parsed(monkeypatch, "--resume", run, f"--{name.replace('_', '-')}", 1_234)
        assert args == dataclasses.replace(little_args(tmp_path, **own), resume=str(run), **{name: 1_234})
    assert parsed(monkeypatch, "--resume", run, "--capture-video").capture_video
    assert parsed(monkeypatch, "--resume", run, "--gamma", 0.5, "--env-kwargs", "change_at", 3).gamma == 0.5
    for words, names in {
        "--gamma 0.6": "gamma",
        "--seed 1": "seed",
        "--gamma 0.6 --seed 1": "gamma, seed",
        "--env-id Taxi-v4": "env_id",
        "--run-dir elsewhere": "run_dir",
        "--env-kwargs change_at 4": "env_kwargs",
        "--env-kwargs nonsense 1": "env_kwargs",
        f"--evaluate {run}": "evaluate",
    }.items():
        line = complaint(dyna_q, monkeypatch, capsys, "--resume", run, *words.split())
        assert f"--resume may change {dyna_q.MUTABLE}, not {names} " in f"{line} "
    assert dyna_q.saved_args(run) == little_args(tmp_path, **own)


def test_an_environment_that_cannot_be_made_leaves_no_folder(tmp_path, monkeypatch, capsys):
    for words in (["--env-kwargs", "nonsense", 1], ["--env-id", "Nope-v0"], ["--env-id", "no_such_module:Nope-v0"]):
        line = complaint(dyna_q, monkeypatch, capsys, "--run-dir", tmp_path / "runs", *words)
        assert words[-2 if words[-1] == 1 else -1].split(":")[0].split("-")[0] in line
    assert not list(tmp_path.iterdir())


def test_a_failure_of_many_lines_is_one_line(monkeypatch, capsys):
    def fail(args: Args) -> None:
        raise Failure("one\n  two\nthree")

    monkeypatch.setattr(dyna_q, "train", fail)
    assert complaint(dyna_q, monkeypatch, capsys).strip() == "dyna_q.py: error: one two three"


def test_help_and_unknown_options_are_not_told_as_a_stopped_run(monkeypatch, capsys):
    for words, status in ((["--help"], 0), (["--nonsense"], 2)):
        with pytest.raises(SystemExit) as stop:
            run_script(dyna_q, monkeypatch, *words)
        assert stop.value.code == status
        assert "stopped" not in "".join(capsys.readouterr())


WORLDS_MODULE = """
import os, time
import gymnasium as gym

class Sleepy(gym.Env):
    observation_space, action_space = gym.spaces.Discrete(2), gym.spaces.Discrete(2)
    def __init__(self, render_mode=None):
        self.made = sum(1 for _ in open("made")) if os.path.exists("made") else 0
        open("made", "a").write("x\\n")
    def reset(self, *, seed=None, options=None):
        return 0, {}
    def step(self, action):
        if self.made:  # the one that is evaluated
            open("evaluating", "w").close()
            time.sleep(10)
        return 0, 0.0, False, False, {}

gym.register("Sleepy-v0", Sleepy)
"""


def begun(folder: Path, *words: object, hangup: Any = signal.SIG_DFL, **options: Any) -> subprocess.Popen:
    """A run in a process of its own, which does not inherit what the tests do with signals."""

    def prepare() -> None:
        signal.signal(signal.SIGHUP, hangup)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command("dyna_q", *words), cwd=folder, preexec_fn=prepare, **pipes, **options)


def wait_for(folder: Path, pattern: str, process: subprocess.Popen) -> None:
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


ENDLESS = ["--total-timesteps", 10**9, "--eval-every", 10**9, "--checkpoint-every", 2_000]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_with_the_command_that_continues_it(number, tmp_path):
    process = begun(tmp_path, *ENDLESS)
    wait_for(tmp_path, f"runs/*/{dyna_q.CHECKPOINT}", process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    run = only_run(tmp_path / "runs")
    assert process.returncode == 128 + number
    line = f"stopped; to continue: python {ROOT / 'dyna_q.py'} --resume {run.relative_to(tmp_path)}"
    assert stderr.strip() == line  # and no traceback
    steps = checkpoint(dyna_q, run)["run"][0]
    process = begun(tmp_path, *line.split()[5:], "--total-timesteps", steps + 500)
    assert process.wait(timeout=60) == 0
    assert result(run)["env_steps"] == steps + 500


def test_a_signal_ends_a_run_in_the_middle_of_an_evaluation(tmp_path):
    (tmp_path / "worlds.py").write_text(WORLDS_MODULE)  # a module in the working folder
    process = begun(tmp_path, "--env-id", "worlds:Sleepy-v0", "--eval-every", 10)
    wait_for(tmp_path, "evaluating", process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "--resume runs/worlds-Sleepy-v0__dyna_q__1__" in stderr


def test_a_fault_of_the_script_in_an_evaluation_is_a_traceback(tmp_path, monkeypatch):
    train(little_args(tmp_path))

    def play(self: Run) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Run, "play", play)
    with pytest.raises(ZeroDivisionError):
        run_script(dyna_q, monkeypatch, "--evaluate", only_run(tmp_path))


def test_the_working_folder_comes_last_on_the_path(tmp_path, monkeypatch):
    paths = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dyna_q, "train", lambda args: paths.extend(sys.path))
    run_script(dyna_q, monkeypatch)
    assert paths[-1] == str(tmp_path)


def test_only_a_run_that_learns_can_be_continued(tmp_path, monkeypatch, capsys):
    train(little_args(tmp_path))
    run = only_run(tmp_path)
    monkeypatch.setattr(Run, "play", lambda self: sys.exit(143))
    for words, told in ((["--evaluate", run], 0), (["--resume", run, "--total-timesteps", 400], 1)):
        with pytest.raises(SystemExit) as stop:
            run_script(dyna_q, monkeypatch, *words)
        assert stop.value.code == 143
        assert capsys.readouterr().err.count(f"stopped; to continue: python dyna_q.py --resume {run}") == told


def test_under_nohup_a_run_goes_on(tmp_path):
    process = begun(tmp_path, *ENDLESS, hangup=signal.SIG_IGN)
    wait_for(tmp_path, "runs/*/events*", process)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("words", [["--help"], ["--total-timesteps", 200]])
def test_a_console_that_knows_few_letters_is_enough(words, tmp_path):
    process = begun(tmp_path, *words, env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert process.wait(timeout=60) == 0, process.communicate()


def test_a_renamed_copy_runs_resumes_evaluates_and_loads_runs_of_the_original(tmp_path, monkeypatch):
    train(little_args(tmp_path / "runs"))
    run = only_run(tmp_path / "runs")
    shutil.copy(ROOT / "dyna_q.py", tmp_path / "mine.py")
    for words in (
        ["--total-timesteps", 200, "--run-dir", "new"],
        ["--resume", run, "--total-timesteps", 400],
        ["--evaluate", run],
    ):
        process = subprocess.run(
            [sys.executable, "mine.py", *map(str, words)], cwd=tmp_path, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr
    assert result(run)["env_steps"] == 400
    monkeypatch.syspath_prepend(tmp_path)
    import mine

    assert mine.load(run).q == dyna_q.load(run).q


# --- what was trained -------------------------------------------------------------------------------------------------
def test_a_run_is_loaded_with_the_spaces_given_or_those_of_its_environment(tmp_path):
    train(little_args(tmp_path / "a", gamma=0.5))
    assert dyna_q.load(str(only_run(tmp_path / "a"))).args.gamma == 0.5
    assert dyna_q.load(only_run(tmp_path / "a"), epsilon=0.9).args.epsilon == 0.9
    env = corridor(dyna_q)()
    train(little_args(tmp_path / "b", env_id="not registered"), make=corridor(dyna_q))
    run = only_run(tmp_path / "b")
    agent = dyna_q.load(run, env.observation_space, env.action_space)
    assert [agent.greedy_policy(seed=0)(state) for state in range(4)] == [1, 1, 1, 1]
    with pytest.raises(Exception, match="not registered"):
        dyna_q.load(run)


def test_train_gives_what_result_json_says_and_makes_an_environment_of_ones_own(tmp_path):
    returned = train(little_args(tmp_path, env_id="mine"), make=lambda **drawing: Corridor(**drawing))
    run = only_run(tmp_path)
    assert returned == json.loads((run / "result.json").read_text())
    longer = dataclasses.replace(dyna_q.saved_args(run), resume=str(run), total_timesteps=500)
    assert train(longer, make=lambda **drawing: Corridor(**drawing))["env_steps"] == 500
    train(little_args(tmp_path / "b", env_id="mine", total_timesteps=500), make=lambda **drawing: Corridor(**drawing))
    whole = learned(dyna_q, only_run(tmp_path / "b"))
    assert [learned(dyna_q, run)[part] for part in ("agent", "episodes")] == [whole[p] for p in ("agent", "episodes")]
