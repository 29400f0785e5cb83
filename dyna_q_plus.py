# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=2.0", "gymnasium>=1.2", "tyro>=0.9", "tensorboard>=2.18", "pillow>=10.1", "tqdm>=4.66"]
# ///
"""Dyna-Q: learn values from every real step, learn a model of the world from it too, and plan with the model.

Between two real steps the agent makes `n_planning` Q-learning updates on transitions that its model predicts. With
`n_planning=0` nothing is planned, and Dyna-Q is Q-learning.

The algorithm (Sutton & Barto, Reinforcement Learning, 2nd edition, section 8.2, "Tabular Dyna-Q"):

    Initialize Q(s, a) and Model(s, a) for all s, a
    Loop forever:
      (a) S <- current (nonterminal) state
      (b) A <- epsilon-greedy(S, Q), ties broken at random
      (c) Take action A; observe resultant reward R and state S'
      (d) Q(S, A) <- Q(S, A) + alpha [R + gamma max_a Q(S', a) - Q(S, A)]
      (e) Model(S, A) <- R, S'
      (f) Loop n times:
            S <- random previously observed state, A <- random action previously taken in S
            R, S' <- Model(S, A)
            Q(S, A) <- Q(S, A) + alpha [R + gamma max_a Q(S', a) - Q(S, A)]

The book's model holds one outcome per pair, which is right for deterministic worlds only. Here the model counts all
outcomes and (f) takes the expectation over them (equation 8.1 and exercise 8.5); in a deterministic world the two are
the same. `--model last` is the book's table: use it where the world changes, for counts never forget.
"""

import copy
import dataclasses
import functools
import io
import json
import math
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
import tyro
from gymnasium.envs.toy_text import CliffWalkingEnv, FrozenLakeEnv
from PIL import Image, ImageDraw
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm


@dataclass
class Args:
    """Tabular Dyna-Q+ (Sutton & Barto, section 8.3)."""

    env_id: str = (
        "BlockingMaze-v0"  # Gymnasium id, or module:Name-v0; here: DynaMaze-v0, BlockingMaze-v0, ShortcutMaze-v0
    )
    env_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)  # for `gym.make`: map_name 8x8
    total_timesteps: int = 6_000  # environment steps to learn for
    seed: int = 1  # of every random draw
    eval_every: int = 1_000  # environment steps between two evaluations of the greedy policy
    eval_episodes: int = 5  # episodes of an evaluation
    checkpoint_every: int = 10_000  # environment steps between two checkpoints
    run_dir: str = "runs"  # folder in which the run's own folder is made
    resume: str | None = None  # run folder to continue exactly where its last checkpoint was written
    evaluate: str | None = None  # run folder whose agent to evaluate, without learning
    capture_video: bool = False  # record the first episode of each evaluation as a GIF in the run folder

    alpha: float = 0.5  # step size of the Q-learning update (the book does not name its own)
    gamma: float = 0.95  # discount factor (the book's value)
    epsilon: float = 0.1  # probability of a uniformly random action (the book's value)
    n_planning: int = 50  # planning updates per real step; 0 is Q-learning (the book compares 0, 5 and 50)
    initial_q: float = 0.0  # value that every state-action pair starts with
    kappa: float = 1e-3  # weight of the bonus kappa * sqrt(tau), tau in real steps (the book does not name its own)
    model: Literal["counts", "last"] = "last"  # all outcomes by their frequency, or the book's table of the latest

    def __post_init__(self):
        if not all(0 <= share <= 1 for share in (self.alpha, self.gamma, self.epsilon)):
            raise Failure("--alpha, --gamma and --epsilon must be from 0 to 1")
        if min(self.total_timesteps, self.eval_every, self.eval_episodes, self.checkpoint_every) < 1:
            raise Failure("--total-timesteps, --eval-every, --eval-episodes, --checkpoint-every must be at least 1")
        if not min(self.seed, self.n_planning, self.kappa) >= 0:
            raise Failure("--seed, --n-planning and --kappa must be at least 0")


# Settings by environment that differ from the defaults; what the command line says wins.
PRESETS: dict[str, dict[str, Any]] = {
    "FrozenLake-v1": {"total_timesteps": 20_000, "eval_episodes": 100, "gamma": 0.99, "model": "counts"},
}


class Model:
    """How often each outcome followed a state-action pair, and with what reward.

    `cells` says the same as planning reads it: `num_actions` cells for every state left so far, each None until its
    action is tried, then (Q row of the state, action, mean reward, [(gamma * probability, Q row of the successor),
    ...]). A terminal successor is left out, which gives it the value 0.
    """

    def __init__(self, num_actions: int, args: Args):
        self.num_actions, self.args = num_actions, args
        self.outcomes: dict[tuple, dict[tuple, tuple]] = {}  # (s, a) -> (s', terminated) -> count, sum of rewards
        self.first_cell: dict[Hashable, int] = {}
        self.cells: list[tuple] = []
        self.clock, self.last_tried = 0, []

    def update(self, state: Hashable, action: int, reward: float, next_state: Hashable, terminated: bool, q) -> None:
        """Counts one real transition."""
        self.clock += 1
        outcomes = self.outcomes.setdefault((state, action), {})
        if self.args.model == "last":
            outcomes.clear()
        count, total = outcomes.get((next_state, terminated), (0, 0.0))
        outcomes[next_state, terminated] = count + 1, total + reward
        self.write_cell(state, action, q)
        self.last_tried[self.first_cell[state] + action] = self.clock

    def write_cell(self, state: Hashable, action: int, q) -> None:
        """Writes the cell of a pair from the counts of its outcomes."""
        if state not in self.first_cell:
            self.first_cell[state] = len(self.cells)
            row = q(state)
            self.cells += [(row, untried, 0.0, [(self.args.gamma, row)]) for untried in range(self.num_actions)]
            self.last_tried += [0] * self.num_actions
        outcomes = self.outcomes[state, action]
        visits = sum(count for count, _ in outcomes.values())
        reward = sum(total for _, total in outcomes.values()) / visits
        goes_on = [(next_state, count) for (next_state, terminated), (count, _) in outcomes.items() if not terminated]
        successors = [(self.args.gamma * (count / visits), q(next_state)) for next_state, count in goes_on]
        self.cells[self.first_cell[state] + action] = q(state), action, reward, successors


class Planner:
    """Loop (f). Its innermost line runs millions of times a second: rows of Q are plain lists, which Python reads much
    faster than single elements of an array, and the random cells of many steps are drawn in one call."""

    def __init__(self, model: Model, alpha: float, rng: np.random.Generator):
        self.model, self.alpha, self.rng = model, alpha, rng
        self.draws, self.drawn_from = [], 0

    def plan(self, n: int) -> None:
        """`n` updates: random observed state, random action taken in it, Q moved towards equation 8.1's target."""
        cells, alpha = self.model.cells, self.alpha
        clock, last_tried, kappa = self.model.clock, self.model.last_tried, self.model.args.kappa
        if len(self.draws) < n or self.drawn_from != len(cells):
            self.drawn_from = len(cells)
            self.draws = self.rng.integers(self.drawn_from, size=max(n, min(64 * n, 100_000))).tolist()
        for cell in self.draws[:n]:
            row, action, reward, successors = cells[cell]
            target = reward + kappa * math.sqrt(clock - last_tried[cell])
            for weight, next_row in successors:  # weight = gamma * p(s' | s, a)
                target += weight * max(next_row)
            row[action] += alpha * (target - row[action])
        del self.draws[:n]


class Agent:
    """Dyna-Q: `act` is (b), `observe` is (d) and (e), `update` is (f)."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        check_spaces(observation_space, action_space)
        self.args, self.observation_space = args, observation_space
        self.first_action, self.num_actions = action_space.start, int(action_space.n)
        self.rng = np.random.default_rng(seed_of(args.seed, 0))
        self.q: dict[Hashable, list[float]] = {}
        self.model = Model(self.num_actions, args)
        self.planner = Planner(self.model, args.alpha, np.random.default_rng(seed_of(args.seed, 4)))
        self.td_error = 0.0

    def row(self, state: Hashable) -> list[float]:
        return self.q.setdefault(state, [self.args.initial_q] * self.num_actions)

    def act(self, obs: Any) -> np.integer:
        """Epsilon-greedy action."""
        if self.rng.random() < self.args.epsilon:
            return self.first_action + int(self.rng.integers(self.num_actions))
        return self.first_action + random_argmax(self.row(state_of(obs, self.observation_space)), self.rng)

    def observe(self, obs: Any, action: int, reward: float, next_obs: Any, terminated: bool, truncated: bool) -> None:
        """Direct Q-learning and model learning; a truncated step keeps the value of its next state."""
        state, next_state = state_of(obs, self.observation_space), state_of(next_obs, self.observation_space)
        action, reward, terminated = int(action - self.first_action), float(reward), bool(terminated)
        target = reward + (0.0 if terminated else self.args.gamma * max(self.row(next_state)))
        row = self.row(state)
        error = target - row[action]
        row[action] += self.args.alpha * error
        self.td_error += 0.01 * (abs(error) - self.td_error)
        self.model.update(state, action, reward, next_state, terminated, self.row)

    def update(self) -> None:
        """The planning updates that follow a real step."""
        if self.args.n_planning:
            self.planner.plan(self.args.n_planning)

    def greedy_policy(self, seed: int) -> Callable[..., np.integer]:
        """A policy (observation -> action) for one episode, which does not touch the agent."""
        rng, unknown, values = np.random.default_rng(seed), [0.0] * self.num_actions, self.values()
        return lambda obs, info=None: (
            self.first_action + random_argmax(values.get(state_of(obs, self.observation_space), unknown), rng)
        )

    def values(self) -> dict[Hashable, list[float]]:
        """State -> value of every action (untried: -inf) by the model without the bonus, found by value iteration."""
        # A cell knows a state by its row of Q alone; by that row's id its solution is found.
        solved = {id(row): [-math.inf] * self.num_actions for row in self.q.values()}
        tried = [cell for cell, last in zip(self.model.cells, self.model.last_tried, strict=True) if last]
        for row, action, _, _ in tried:
            solved[id(row)][action] = 0.0
        for _ in range(1_000):
            change = 0.0
            for row, action, reward, successors in tried:
                best = [(weight, max(solved[id(next_row)])) for weight, next_row in successors]
                value = reward + sum(weight * (v if v > -math.inf else self.args.initial_q) for weight, v in best)
                change = max(change, abs(value - solved[id(row)][action]) / max(abs(value), 1e-300))
                solved[id(row)][action] = value
            if change < 1e-6:  # relative, as values far away from any reward are tiny
                break
        return {state: solved[id(row)] for state, row in self.q.items()}

    def metrics(self) -> dict[str, float]:
        return {"losses/td_error": self.td_error, "model/state_action_pairs": len(self.model.outcomes)}

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


def random_argmax(row: list[float], rng: np.random.Generator) -> int:
    """Index of the largest value; among equal ones a random one (always the first would walk into walls for ever)."""
    best = max(row)
    ties = [action for action, value in enumerate(row) if value == best]
    return ties[0] if len(ties) == 1 else ties[int(rng.integers(len(ties)))]


def train(args: Args, make: Callable[..., gym.Env] | None = None) -> dict:
    """Tabular Dyna-Q+, line by line as in the box on top; returns what is in result.json. `make(render_mode=None)` makes
    an environment that is not registered."""
    make = make or functools.partial(make_env, args)
    env = make()
    agent = Agent(env.observation_space, env.action_space, args)
    episode = Episode(env, args.seed, 1)
    run = Run(args, agent, [episode], make)
    for _ in run.steps():
        obs = episode.obs  # (a)
        action = agent.act(obs)  # (b)
        next_obs, reward, terminated, truncated = episode.step(action)  # (c)
        agent.observe(obs, action, reward, next_obs, terminated, truncated)  # (d) and (e)
        agent.update()  # (f)
        if terminated or truncated:
            run.log({"charts/episodic_return": episode.episodic_return, "charts/episodic_length": len(episode.actions)})
            episode.reset()
    if isinstance(env.unwrapped, Maze | CliffWalkingEnv | FrozenLakeEnv):
        run.log({"planner/policy": draw_policy(env.unwrapped, agent.values())})
    return run.result


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing: the same in every script. Nothing of Dyna-Q+ is below this line.
# ---------------------------------------------------------------------------------------------------------------------
SCRIPT, CHECKPOINT = "dyna_q_plus", "checkpoint.json"
CHANGEABLE = ["resume", "total_timesteps", "eval_every", "eval_episodes", "checkpoint_every", "capture_video"]


class Failure(Exception):
    """Something that the user can fix: `main` prints it as one line and exits with status 2."""


def seed_of(*key: int) -> int:
    """A seed for: the run's seed; 0 agent, 1 training, 2 evaluation, 3 acting in evaluation, 4 planning; a number."""
    return int(np.random.SeedSequence(key).generate_state(1)[0] >> 1)  # below 2**31: it fits a C int


def make_env(args: Args, **drawing: str) -> gym.Env:
    """The environment that `args` name; `drawing` is empty or a render_mode, which not every environment has."""
    try:
        return gym.make(args.env_id, **drawing, **args.env_kwargs)
    except Exception as error:
        raise Failure(f"cannot make {args.env_id}: {error!r}") from error


class Episode:
    """An environment, one episode after the other. Each has a seed of its own, so that a checkpoint needs no more than
    its number and the actions so far."""

    def __init__(self, env: gym.Env, *key: int):
        self.env, self.key, self.number = env, key, -1
        self.reset()

    def reset(self, number: int | None = None, actions: Sequence = ()) -> None:
        """Starts the next episode; or the one of this number, and repeats its actions."""
        self.number = self.number + 1 if number is None else number
        self.actions, self.episodic_return = [], 0.0
        obs, self.info = self.env.reset(seed=seed_of(*self.key, self.number))
        self.obs = copy.deepcopy(obs)  # some environments write the next one into the same array
        for action in actions:
            self.step(np.array(action, self.env.action_space.dtype)[()])

    def step(self, action: Any) -> tuple[Any, float, bool, bool]:
        """Returns next observation, reward, terminated, truncated; after one of the last two, call `reset`."""
        self.actions.append(np.asarray(action).tolist())
        obs, reward, terminated, truncated, self.info = self.env.step(copy.deepcopy(action))
        self.obs, number = copy.deepcopy(obs), np.asarray(reward)
        if number.size != 1 or number.dtype.kind not in "fiub" or not np.isfinite(number):
            raise Failure(f"step {len(self.actions)} of episode {self.number}: the reward is {reward}, not a number")
        self.episodic_return += float(number.item())
        return self.obs, float(number.item()), bool(terminated), bool(truncated)


class Run:
    """The run folder: TensorBoard events, progress, evaluations, checkpoints, exact resume."""

    def __init__(self, args: Args, agent: Agent, episodes: list[Episode], make: Callable[..., gym.Env]):
        self.args, self.agent, self.episodes, self.result, self.events = args, agent, episodes, {}, io.BytesIO()
        self.step, self.seconds, self.begun, logged = 0, 0.0, time.time(), 0
        self.eval_env = make(**({"render_mode": "rgb_array"} if args.capture_video else {}))
        if args.capture_video and self.eval_env.reset(seed=0) and np.ndim(self.eval_env.render()) != 3:
            raise Failure("--capture-video: render() of this environment gives no picture")
        name = re.sub("[/:]", "-", f"{args.env_id}__{SCRIPT}__{args.seed}__{datetime.now():%Y%m%dT%H%M%S.%f}")
        self.path = Path(args.evaluate or args.resume or Path(args.run_dir, name))
        if (self.path / CHECKPOINT).exists():  # a run that was killed before its first one begins anew
            state = restore(self.path, agent)
            (self.step, self.seconds, wall_seconds, logged), self.result = state["run"], state["result"]
            self.begun -= wall_seconds
            for episode, (number, actions) in zip(episodes, state["episodes"], strict=False):
                episode.env.unwrapped.steps_made = self.step // len(episodes) - len(actions)  # some worlds change
                episode.reset(number, actions)
        self.bar = tqdm(total=args.total_timesteps, initial=self.step, unit="step", disable=bool(args.evaluate) or None)
        if not args.evaluate:
            Run.latest = self.path  # for the message of a signal
            self.path.mkdir(parents=True, exist_ok=True)
            versions = {name: sys.modules[name].__version__ for name in ("gymnasium", "numpy")}
            self.write("args.json", {"script": SCRIPT, "args": vars(args) | {"resume": None}, "versions": versions})
            self.events = open(self.path / "events.out.tfevents.0", "ab", buffering=0)
            self.events.seek(self.events.truncate(logged))  # what was logged after the checkpoint comes again

    def steps(self, stride: int = 1) -> Iterator[int]:
        """Yields the number of each step that the caller makes; then logs, evaluates and saves what is due."""
        args, total = self.args, self.args.total_timesteps

        def due(every: int) -> bool:
            return self.step // every > (self.step - stride) // every or self.step >= total

        while self.step < total:
            begun = time.perf_counter()
            self.step += stride
            yield self.step
            self.seconds += time.perf_counter() - begun  # of training alone
            self.bar.update(stride)
            if due(max(1, total // 100)) or due(args.checkpoint_every):  # so that no checkpoint holds a NaN
                self.log({"charts/SPS": self.step / self.seconds, **self.agent.metrics()})
            if self.bar.disable and due(max(1, total // 10)):
                print(f"step {self.step} of {total}, {self.step / self.seconds:.4g} steps/s", flush=True)
            if due(args.eval_every):
                self.evaluate()
            if due(args.checkpoint_every):
                self.save()
        self.bar.close()
        print(f"run folder: {self.path}\ncurves:     tensorboard --logdir {self.path}")

    def log(self, values: dict[str, float | Image.Image]) -> None:
        """Writes scalars and pictures under their TensorBoard tags, x = environment steps."""
        event = Event(wall_time=time.time(), step=self.step)
        for tag, value in values.items():
            if isinstance(value, Image.Image):
                value.save(png := io.BytesIO(), "PNG")
                event.summary.value.add(tag=tag).image.encoded_image_string = png.getvalue()
            elif math.isfinite(value):
                event.summary.value.add(tag=tag, simple_value=value)
            else:
                raise Failure(f"step {self.step}: {tag} is {value}")
        RecordWriter(self.events).write(event.SerializeToString())

    def play(self) -> tuple[list[Episode], list[Image.Image]]:
        """Greedy episodes, always with the same seeds, and pictures of the first where they are wanted."""
        args, env, episodes, frames = self.args, self.eval_env, [], []
        limit = (env.spec and env.spec.max_episode_steps) or 1_000  # a greedy policy may walk in circles for ever
        for number in range(args.eval_episodes):
            self.bar.set_description_str(f"evaluating {number + 1}/{args.eval_episodes}")
            env.unwrapped.steps_made, done = self.step, False
            episode, policy = Episode(env, args.seed, 2, number), self.agent.greedy_policy(seed_of(args.seed, 3, number))
            while not done and len(episode.actions) < limit:
                if args.capture_video and number == 0:
                    frames.append(Image.fromarray(env.render()).quantize())
                done = any(episode.step(policy(episode.obs, episode.info))[2:])
            episodes.append(episode)
        self.bar.set_description_str("")
        return episodes, frames

    def evaluate(self) -> None:
        """Plays, and keeps, logs and prints the returns."""
        episodes, frames = self.play()
        returns, length = [e.episodic_return for e in episodes], float(np.mean([len(e.actions) for e in episodes]))
        mean, std, seconds = float(np.mean(returns)), float(np.std(returns)), time.time() - self.begun
        self.result = {"env_steps": self.step, "episodes": sum(e.number for e in self.episodes), "wall_seconds": seconds}
        self.result |= {"eval_return_mean": mean, "eval_return_std": std, "eval_episodes": len(returns)}
        self.log({"eval/episodic_return": mean, "eval/episodic_length": length})
        tqdm.write(f"step {self.step}: return {mean:.4g} +- {std:.4g} in {len(returns)} episodes of {length:.4g} steps")
        if frames:
            video, fps = self.path / f"step_{self.step}.gif", self.eval_env.metadata.get("render_fps", 30)
            frames[0].save(video, save_all=True, append_images=frames[1:], duration=1000 / fps, loop=0)

    def save(self) -> None:
        """Writes a checkpoint, and the result of the latest evaluation."""
        run = self.step, self.seconds, time.time() - self.begun, self.events.tell()
        state = {"run": run, "result": self.result, "episodes": [(e.number, e.actions) for e in self.episodes]}
        self.write(CHECKPOINT, state | {"agent": self.agent.state_dict()})
        self.write("result.json", self.result)

    def write(self, name: str, state: dict) -> None:
        """Writes a file of the run folder so that at every moment there is a whole one, the old or the new."""
        with open(self.path / f"new.{name}", "wb") as file:
            file.write(json.dumps(state, indent=None if name == CHECKPOINT else 2).encode())
        os.replace(self.path / f"new.{name}", self.path / name)


def saved_args(folder: str | Path) -> Args:
    """The arguments of a run."""
    try:
        saved = json.loads(Path(folder, "args.json").read_text())
        assert saved["script"] == SCRIPT, f"of {saved['script']}.py"
        return Args(**{name: tuple(x) if isinstance(x, list) else x for name, x in saved["args"].items()})
    except Exception as error:
        raise Failure(f"{folder} is not a run folder of {SCRIPT}.py: {error!r}") from error


def restore(folder: str | Path, agent: Agent) -> dict:
    """Brings an agent to a run's last checkpoint, which is returned; runs no code that may be in it."""
    try:
        state = json.loads(Path(folder, CHECKPOINT).read_text())
        agent.load_state_dict(state["agent"])
        return state
    except Exception as error:
        raise Failure(f"cannot restore {Path(folder, CHECKPOINT)}: {error!r}") from error


def load(folder: str | Path, *spaces: gym.Space, **changes: Any) -> Agent:
    """The agent of a run; `load(folder).greedy_policy(seed=0)` is a function from an observation to an action. Give the
    spaces of observations and actions where the environment is not registered. Changes are to the run's arguments."""
    args = dataclasses.replace(saved_args(folder), **changes)
    env = None if spaces else make_env(args)
    agent = Agent(*(spaces or (env.observation_space, env.action_space)), args)
    restore(folder, agent)
    return agent


def main() -> None:
    """The command line; what the user can fix is one line on stderr and status 2."""
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # Windows has no SIGHUP
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    sys.path.append(os.getcwd())  # where the module of `--env-id module:Name-v0` may be
    try:
        args = tyro.cli(Args)
        folder = args.resume if args.evaluate is None else args.evaluate
        preset = {"env_id": args.env_id} | PRESETS.get(args.env_id, {})
        default = Args(**preset) if folder is None else saved_args(folder)
        kwargs = default.env_kwargs | args.env_kwargs
        args = tyro.cli(Args, default=dataclasses.replace(default, env_kwargs={}))  # for what the command line says not
        args.env_kwargs = kwargs
        changed = [name for name, x in vars(args).items() if x != vars(default)[name] and name not in CHANGEABLE]
        if changed and args.resume is not None:
            raise Failure(f"--resume may change {', '.join(CHANGEABLE[1:])}, not {', '.join(changed)}")
        if args.evaluate is None:
            train(args)
        else:
            Run(args, load(args.evaluate, **vars(args)), [], functools.partial(make_env, args)).evaluate()
    except (Failure, OSError) as error:
        print(f"{SCRIPT}.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except SystemExit:
        if hasattr(Run, "latest"):  # otherwise it is --help, or an argument that tyro does not know
            print(f"\nstopped; to continue: python {sys.argv[0]} --resume {Run.latest}", file=sys.stderr)
        raise


# ---------------------------------------------------------------------------------------------------------------------
# The tabular scripts' own: states and actions that can be counted, the book's mazes, the picture of a policy.
# ---------------------------------------------------------------------------------------------------------------------
def check_spaces(observation_space: gym.Space, action_space: gym.Space) -> None:
    """Raises Failure for spaces of which there can be no table."""
    for part in observation_space if isinstance(observation_space, gym.spaces.Tuple) else [observation_space]:
        box = isinstance(part, gym.spaces.Box) and part.is_bounded() and math.prod(part.shape) <= 64
        if not box and not isinstance(part, gym.spaces.Discrete | gym.spaces.MultiDiscrete | gym.spaces.MultiBinary):
            others = "vectors: cem_mpc.py, mbpo.py; pictures: muzero.py, dreamer.py; Dict: dreamer.py"
            raise Failure(f"observations must be Discrete or small arrays that come back exactly, not {part}; {others}")
    if not isinstance(action_space, gym.spaces.Discrete):
        raise Failure(f"actions must be Discrete, not {action_space}; Box: cem_mpc.py, mbpo.py, dreamer.py")


def state_of(obs: Any, space: gym.Space) -> Hashable:
    """An observation as the key of a table: a number or a tuple, the same for equal observations of any type."""
    if isinstance(space, gym.spaces.Discrete):
        return int(obs)
    if isinstance(space, gym.spaces.Tuple):
        return tuple(state_of(part, part_space) for part, part_space in zip(obs, space, strict=True))
    return tuple(np.asarray(obs, space.dtype).ravel().tolist())


LAYOUTS = """
    .......#G   ........G   ........G   ........G
    ..#....#.   .........   .........   .........
    S.#....#.   .........   .........   .........
    ..#......   ########.   .########   .#######.
    .....#...   .........   .........   .........
    .........   ...S.....   ...S.....   ...S.....
"""
DYNA, RIGHT, LEFT, BOTH = map("".join, zip(*map(str.split, LAYOUTS.split("\n")[1:-1]), strict=True))


class Maze(gym.Env):
    """From S to G around the walls #, reward 1 on reaching G. Observation: 9 * row + column; actions: 0 up, 1 right,
    2 down, 3 left. After `change_at` steps, counted over all episodes, the second layout replaces the first one."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 8}
    observation_space, action_space, shape = gym.spaces.Discrete(54), gym.spaces.Discrete(4), (6, 9)

    def __init__(self, layouts: tuple[str, str], change_at: int = 0, render_mode: str | None = None):
        self.layouts, self.change_at, self.render_mode, self.steps_made = layouts, change_at, render_mode, 0

    @property
    def layout(self) -> str:
        return self.layouts[self.steps_made >= self.change_at]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        self.position = self.layout.index("S")
        return self.position, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        down, right = ((-1, 0), (0, 1), (1, 0), (0, -1))[action]
        row, column = self.position // 9 + down, self.position % 9 + right
        if 0 <= row < 6 and 0 <= column < 9 and self.layout[9 * row + column] != "#":
            self.position = 9 * row + column
        self.steps_made += 1
        at_goal = self.layout[self.position] == "G"
        return self.position, float(at_goal), at_goal, False, {}

    def render(self) -> np.ndarray:
        palette = np.array([(240, 240, 240), (90, 90, 90), (170, 210, 240), (250, 200, 60), (200, 60, 40)], np.uint8)
        marks = self.layout[: self.position] + "A" + self.layout[self.position + 1 :]
        return palette[[".#SGA".index(mark) for mark in marks]].reshape(6, 9, 3).repeat(32, 0).repeat(32, 1)


if "DynaMaze-v0" not in gym.registry:
    gym.register("DynaMaze-v0", Maze, kwargs={"layouts": (DYNA, DYNA)})
    gym.register("BlockingMaze-v0", Maze, kwargs={"layouts": (RIGHT, LEFT), "change_at": 1_000})
    gym.register("ShortcutMaze-v0", Maze, kwargs={"layouts": (LEFT, BOTH), "change_at": 3_000})


def draw_policy(world: gym.Env, values: dict[int, list[float]]) -> Image.Image:
    """Prints the best action of every state of a grid world where one is known; returns it over the states' values."""
    lake = isinstance(world, FrozenLakeEnv)
    (rows, columns), arrows = ((world.nrow, world.ncol), "←↓→↑") if lake else (world.shape, "↑→↓←")
    known = {state: arrows[row.index(max(row))] for state, row in values.items() if max(row) > min(row)}
    marks = [known.get(state, mark) for state, mark in enumerate(getattr(world, "layout", "." * (rows * columns)))]
    text = "\n".join(" ".join(marks[first : first + columns]) for first in range(0, rows * columns, columns))
    print(text if "utf" in (sys.stdout.encoding or "").lower() else text.translate(str.maketrans("↑→↓←", "^>v<")))
    image, highest = Image.new("RGB", (40 * columns, 40 * rows + 20), (90, 90, 90)), max(map(max, values.values()))
    draw = ImageDraw.Draw(image)
    for state, arrow in known.items():
        x, y, share = 40 * (state % columns), 40 * (state // columns), max(values[state]) / (highest or 1.0)
        draw.rectangle((x + 1, y + 1, x + 38, y + 38), (235 - int(150 * share), 240 - int(90 * share), 250))
        draw.regular_polygon((x + 20, y + 20, 12), 3, 90 * "↑←↓→".index(arrow), (20, 20, 60))
    draw.text((4, 40 * rows + 4), f"arrows: best action; the bluer, the higher its value, up to {highest:.3g}")
    return image


if __name__ == "__main__" and "__file__" in globals():  # which a notebook has not
    main()
