# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=2.0", "gymnasium>=1.2", "tyro>=0.9", "tensorboard>=2.18", "pillow>=10.1", "tqdm>=4.66"]
# ///
"""Dyna-Q+: Dyna-Q that keeps asking whether the world is still as its model says.

Planning sees a bonus on the reward, the larger the longer a state-action pair has not been tried in reality, and
carries it back to the states from which the pair can be reached: whole journeys of exploration are planned.

The algorithm (Sutton & Barto, Reinforcement Learning, 2nd edition, section 8.3), dyna_q.py's but for (e) and (f):

    Initialize Q(s, a) and Model(s, a) for all s, a
    Loop forever:
      (a) S <- current (nonterminal) state
      (b) A <- epsilon-greedy(S, Q), ties broken at random
      (c) Take action A; observe resultant reward R and state S'
      (d) Q(S, A) <- Q(S, A) + alpha [R + gamma max_a Q(S', a) - Q(S, A)]
      (e) Model(S, A) <- R, S';  tau(S, A) <- 0;  tau <- tau + 1 for all other pairs
      (f) Loop n times:
            S <- random previously observed state, A <- random action, tried in S or not
            R, S' <- Model(S, A), where an untried A leads back to S with reward 0
            Q(S, A) <- Q(S, A) + alpha [R + kappa sqrt(tau(S, A)) + gamma max_a Q(S', a) - Q(S, A)]

That untried actions take part in planning is a footnote of the book on which everything depends: without it the bonus
draws the agent only to what it knows. Evaluations act on values solved from the learned model without the bonus: a
policy that follows Q without learning would go to one wall over and over. So they tell what was explored.

Run:     python dyna_q_plus.py                               (a second: 16 steps, the shortest path)
         python dyna_q_plus.py --env-id ShortcutMaze-v0      (a second: 10 steps, the shortest path)
"""

import ast
import copy
import dataclasses
import functools
import io
import json
import math
import random
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
import tyro
from PIL import Image, ImageDraw
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm


@dataclasses.dataclass
class Args:
    """Tabular Dyna-Q+ (Sutton & Barto, section 8.3)."""

    env_id: str = "BlockingMaze-v0"  # Gymnasium id, or module:Name-v0; here also ShortcutMaze-v0, DynaMaze-v0
    env_kwargs: dict[str, bool | int | float | str] = dataclasses.field(default_factory=dict)  # gym.make's: name value
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
    gamma: float = 0.95  # discount factor
    epsilon: float = 0.1  # probability of a uniformly random action
    n_planning: int = 50  # planning updates per real step; 0 is Q-learning (the book compares 0, 5 and 50)
    kappa: float = 1e-3  # weight of the bonus kappa * sqrt(tau), tau in real steps (the book does not name its own)
    model: Literal["counts", "last"] = "last"  # all outcomes, counted; or the latest, for a world that changes

    def __post_init__(self):
        if not all(0 <= share <= 1 for share in (self.alpha, self.gamma, self.epsilon)):
            raise Failure("--alpha, --gamma and --epsilon must be from 0 to 1")
        if min(self.total_timesteps, self.eval_every, self.eval_episodes, self.checkpoint_every) < 1:
            raise Failure("--total-timesteps, --eval-every, --eval-episodes, --checkpoint-every must be at least 1")
        if min(self.seed, self.n_planning) < 0 or not 0 <= self.kappa < 1e9:
            raise Failure("--seed, --n-planning and --kappa must be at least 0")


PRESETS = {"FrozenLake-v1": {"total_timesteps": 20_000, "eval_episodes": 100, "gamma": 0.99, "model": "counts"}}


class Model:
    """`outcomes`: what followed each pair (s, a), counted. `pairs`: the same, ready for planning, as lists
    [row of s in Q, a, mean reward, [(gamma * p(s'|s,a), row of s' in Q), ...], time last tried]. The rows are the lists
    in Q themselves, so that to write to one is to write to Q. A terminal s' is left out, which gives it the value 0.
    An action untried in a state that was left is a pair, too: reward 0, back to s, last tried at time 0."""

    def __init__(self, q: dict[tuple, list[float]], args: Args):
        self.q, self.args, self.clock = q, args, 0  # real steps
        self.outcomes: dict[tuple, dict[tuple, tuple]] = {}  # (s, a) -> (s', terminated) -> count, sum of rewards
        self.pairs: list[list] = []
        self.index: dict[tuple, int] = {}  # s -> where its pairs begin in `pairs`, one for each action

    def update(self, state: tuple, action: int, reward: float, next_state: tuple, terminated: bool) -> None:
        """Counts one real transition."""
        self.clock += 1
        outcomes = self.outcomes.setdefault((state, action), {})
        if self.args.model == "last":
            outcomes.clear()
        count, reward_sum = outcomes.get((next_state, terminated), (0, 0.0))
        outcomes[next_state, terminated] = count + 1, reward_sum + reward
        self.write_pair(state, action, self.clock)

    def write_pair(self, state: tuple, action: int, last_tried: int) -> None:
        """Writes a pair's entry in `pairs` from the counts of its outcomes."""
        outcomes, row = self.outcomes[state, action], self.q[state]
        visits = sum(count for count, _ in outcomes.values())
        reward = sum(reward_sum for _, reward_sum in outcomes.values()) / visits
        nonterminal = [
            (next_state, count) for (next_state, terminated), (count, _) in outcomes.items() if not terminated
        ]
        successors = [(self.args.gamma * (count / visits), self.q[next_state]) for next_state, count in nonterminal]
        if state not in self.index:
            self.index[state] = len(self.pairs)
            self.pairs += [[row, untried, 0.0, [(self.args.gamma, row)], 0] for untried in range(len(row))]
        self.pairs[self.index[state] + action] = [row, action, reward, successors, last_tried]


class Agent:
    """Dyna-Q+: `act` is (b), `observe` is (d) and (e), `update` is (f). A row of Q is a plain list, [Q(s, 0), Q(s, 1),
    ...], which Python reads faster than single elements of an array."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        check_spaces(observation_space, action_space)
        self.args, self.key = args, functools.partial(state_of, observation_space)  # obs -> key of its row in Q
        self.first_action, self.num_actions = action_space.start, int(action_space.n)
        self.q = defaultdict(functools.partial(list, [0.0] * self.num_actions))
        self.model = Model(self.q, args)
        self.rng = random.Random(seed_of(args.seed, 0))
        self.td_error = 0.0  # moving average of absolute errors over about 100 steps, for the log

    def act(self, obs: Any) -> np.integer:
        """Epsilon-greedy action."""
        if self.rng.random() < self.args.epsilon:
            return self.first_action + self.rng.randrange(self.num_actions)
        return self.first_action + random_argmax(self.q[self.key(obs)], self.rng)

    def observe(self, obs: Any, action: int, reward: float, next_obs: Any, terminated: bool, truncated: bool) -> None:
        """Direct Q-learning and model learning; a truncated step keeps the value of its next state."""
        state, next_state, action = self.key(obs), self.key(next_obs), int(action - self.first_action)
        target = float(reward) + (0.0 if terminated else self.args.gamma * max(self.q[next_state]))
        error = target - self.q[state][action]
        self.q[state][action] += self.args.alpha * error
        self.td_error += 0.01 * (abs(error) - self.td_error)
        self.model.update(state, action, float(reward), next_state, bool(terminated))

    def update(self) -> None:
        """The planning updates that follow a real step: their innermost line runs millions of times a second."""
        alpha, kappa, clock = self.args.alpha, self.args.kappa, self.model.clock
        for row, action, reward, successors, last_tried in self.rng.choices(self.model.pairs, k=self.args.n_planning):
            target = reward + kappa * math.sqrt(clock - last_tried)
            for weight, next_row in successors:  # + gamma * sum over s' of p(s'|S,A) * max_a Q(s', a)
                target += weight * max(next_row)
            row[action] += alpha * (target - row[action])

    def greedy_policy(self, seed: int) -> Callable[..., np.integer]:
        """A policy (observation -> action) that changes nothing in the agent; ties are broken with `seed`."""
        rng, values, unknown = random.Random(seed), self.values(), [0.0] * self.num_actions
        return lambda obs, info=None: self.first_action + random_argmax(values.get(self.key(obs), unknown), rng)

    def values(self) -> dict[tuple, list[float]]:
        """State -> value of every action (untried: -inf) by the model without the bonus, found by value iteration."""
        solved = {id(row): [-math.inf] * self.num_actions for row in self.q.values()}
        tried = [pair[:4] for pair in self.model.pairs if pair[4] > 0]  # which know a state by its row of Q alone
        for row, action, _, _ in tried:
            solved[id(row)][action] = 0.0
        for _ in range(1_000):
            change = 0.0
            for row, action, reward, successors in tried:
                best = [(weight, max(solved[id(next_row)])) for weight, next_row in successors]
                value = reward + sum(weight * (v if v > -math.inf else 0.0) for weight, v in best)
                change = max(change, abs(value - solved[id(row)][action]) / max(abs(value), 1e-300))
                solved[id(row)][action] = value
            if change < 1e-6:  # relative, as values far away from any reward are tiny
                break
        return {state: solved[id(row)] for state, row in self.q.items()}

    def metrics(self) -> dict[str, float]:
        return {"losses/td_error": self.td_error, "model/state_action_pairs": len(self.model.outcomes)}

    def state_dict(self) -> dict:
        """All that the next step depends on; `ast.literal_eval(repr(state))` is the same again."""
        state = {"q": dict(self.q), "model": self.model.outcomes, "td_error": self.td_error, "rng": self.rng.getstate()}
        last_tried = [self.model.pairs[self.model.index[s] + a][4] for s, a in self.model.outcomes]
        return state | {"last_tried": last_tried, "clock": self.model.clock}

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` gave, into a newly made agent."""
        state = copy.deepcopy(state)
        self.q.update(state["q"])
        self.model, self.td_error = Model(self.q, self.args), state["td_error"]
        self.model.outcomes, self.model.clock = state["model"], state["clock"]
        for pair, last_tried in zip(self.model.outcomes, state["last_tried"], strict=True):
            self.model.write_pair(*pair, last_tried)
        self.rng.setstate(state["rng"])


def state_of(space: gym.Space, obs: Any) -> tuple:
    """An observation as the key of a table, the same for equal observations of any type."""
    if isinstance(space, gym.spaces.Tuple):
        return tuple(map(state_of, space, obs))
    return tuple(np.asarray(obs, space.dtype).ravel().tolist())


def random_argmax(row: list[float], rng: random.Random) -> int:
    """Index of the largest value; among equal ones a random one (always the first would walk into walls for ever)."""
    best = max(row)
    return rng.choice([action for action, value in enumerate(row) if value == best])


def train(args: Args, make: Callable[..., gym.Env] | None = None) -> dict:
    """Dyna-Q+ as in the box on top. `make(render_mode=None)` makes an environment that is not registered."""
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
    if hasattr(env.unwrapped, "layout"):  # one of the mazes below
        draw_policy(env.unwrapped, agent.values(), run.path / "policy.png")
    return run.result


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing: the same in every script. Nothing of Dyna-Q+ is below this line.
# ---------------------------------------------------------------------------------------------------------------------
SCRIPT, CHECKPOINT = "dyna_q_plus", "checkpoint.txt"
MUTABLE = "total_timesteps, eval_every, eval_episodes, checkpoint_every, capture_video, device, threads, compile"


class Failure(Exception):
    """Something that the user can fix: `main` prints it as one line and exits with status 2."""


def seed_of(*key: int) -> int:
    """A seed of (the run's seed, purpose, number); purposes: 0 agent, 1 training, 2 evaluation, 3 acting in it."""
    return int(np.random.SeedSequence(key).generate_state(1)[0] >> 1)  # below 2**31: it fits a C int


def make_env(args: Args, **drawing: str) -> gym.Env:
    """The environment that `args` name; `drawing` is empty or a render_mode, which not every environment has."""
    return gym.make(args.env_id, **drawing, **args.env_kwargs)


class Episode:
    """An environment, episode after episode, each with a seed of its own: its number and its actions bring it back."""

    def __init__(self, env: gym.Env, *key: int):
        self.env, self.key, self.number = env, key, -1

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
        self.args, self.agent, self.episodes, self.events = args, agent, episodes, io.BytesIO()
        self.eval_env = make(**({"render_mode": "rgb_array"} if args.capture_video else {}))
        if args.capture_video and self.eval_env.reset(seed=0) and np.ndim(self.eval_env.render()) != 3:
            raise Failure("--capture-video: render() of this environment gives no picture")
        name = f"{args.env_id}__{SCRIPT}__{args.seed}__{datetime.now():%Y%m%dT%H%M%S.%f}".replace("/", "-")
        self.path = folder = Path(args.evaluate or args.resume or Path(args.run_dir, name.replace(":", "-")))
        state = {"run": (0, 0.0, 0.0, 0), "result": {}, "episodes": [(0, ())] * len(episodes)}
        if (folder / CHECKPOINT).exists():  # killed before its first checkpoint, it begins anew
            state = ast.literal_eval(Path(folder, CHECKPOINT).read_text())
            agent.load_state_dict(state["agent"])
        (self.step, self.seconds, wall_seconds, logged), self.result = state["run"], state["result"]
        self.begun = time.time() - wall_seconds
        self.bar = tqdm(total=args.total_timesteps, initial=self.step, unit="step", disable=bool(args.evaluate) or None)
        if not args.evaluate:
            self.path.mkdir(parents=True, exist_ok=True)
            versions = {name: sys.modules[name].__version__ for name in ("gymnasium", "numpy")}
            self.write("args.json", {"script": SCRIPT, "args": vars(args) | {"resume": None}, "versions": versions})
            self.events = open(self.path / "events.out.tfevents.0", "ab", buffering=0)
            self.events.seek(self.events.truncate(logged))  # what was logged after the checkpoint comes again
        Run.resumable = None if args.evaluate else self.path  # for the message when a signal stops it
        for episode, (number, actions) in zip(episodes, state["episodes"], strict=False):
            episode.env.unwrapped.steps_made = self.step // len(episodes) - len(actions)  # the mazes change with it
            episode.reset(number, actions)

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
            if due(max(1, total // 100)) or due(args.checkpoint_every):  # a checkpoint holds no NaN
                self.log({"charts/SPS": self.step / self.seconds, **self.agent.metrics()})
            if self.bar.disable and due(max(1, total // 10)):
                print(f"step {self.step} of {total}, {self.step / self.seconds:.4g} steps/s", flush=True)
            if due(args.eval_every):
                self.evaluate()
            if due(args.checkpoint_every):
                self.save()
        self.bar.close()
        self.write("result.json", self.result)
        print(f"run folder: {self.path}\ncurves:     tensorboard --logdir {self.path}")

    def log(self, values: dict[str, float]) -> None:
        """Writes scalars under their TensorBoard tags, x = environment steps."""
        if wrong := [f"{tag} is {value}" for tag, value in values.items() if not np.isfinite(value)]:
            raise Failure(f"step {self.step}: {', '.join(wrong)}")
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        event = Event(wall_time=time.time(), step=self.step, summary=summary)
        RecordWriter(self.events).write(event.SerializeToString())

    def play(self) -> tuple[list[Episode], list[Image.Image]]:
        """Greedy episodes, always with the same seeds, and pictures of the first where they are wanted."""
        args, env, episodes, frames = self.args, self.eval_env, [], []
        limit = (env.spec and env.spec.max_episode_steps) or 1_000  # a greedy policy may walk in circles for ever
        for number in range(args.eval_episodes):
            self.bar.set_description_str(f"evaluating {number + 1}/{args.eval_episodes}")
            policy = self.agent.greedy_policy(seed_of(args.seed, 3, number))
            episodes.append(episode := Episode(env, args.seed, 2, number))
            env.unwrapped.steps_made, done = self.step, False
            episode.reset()
            while not done and len(episode.actions) < limit:
                if args.capture_video and number == 0:
                    frames.append(Image.fromarray(env.render()).quantize())
                done = any(episode.step(policy(episode.obs, episode.info))[2:])
        return episodes, frames

    def evaluate(self) -> None:
        """Plays, and keeps, logs and prints the returns."""
        episodes, frames = self.play()
        self.bar.set_description_str("")
        returns, length = [e.episodic_return for e in episodes], float(np.mean([len(e.actions) for e in episodes]))
        mean, std = float(np.mean(returns)), float(np.std(returns))
        self.result = {"env_steps": self.step, "episodes": sum(episode.number for episode in self.episodes)}
        self.result |= {"wall_seconds": time.time() - self.begun, "eval_episodes": len(returns)}
        self.result |= {"eval_return_mean": mean, "eval_return_std": std}
        self.log({"eval/episodic_return": mean, "eval/episodic_length": length})
        tqdm.write(f"step {self.step}: return {mean:.4g} +- {std:.4g} in {len(returns)} episodes of {length:.4g} steps")
        if frames:
            video, fps = self.path / f"step_{self.step}.gif", self.eval_env.metadata.get("render_fps", 30)
            frames[0].save(video, save_all=True, append_images=frames[1:], duration=1000 / fps, loop=0)

    def save(self) -> None:
        """Writes a checkpoint."""
        state = {"run": (self.step, self.seconds, time.time() - self.begun, self.events.tell()), "result": self.result}
        state |= {"episodes": [(e.number, e.actions) for e in self.episodes], "agent": self.agent.state_dict()}
        self.write(CHECKPOINT, state)

    def write(self, name: str, state: dict) -> None:
        """Writes a file of the run folder so that at every moment there is a whole one, the old or the new."""
        with open(self.path / f"new.{name}", "wb") as file:
            file.write((repr(state) if name == CHECKPOINT else json.dumps(state, indent=2)).encode())
        Path(self.path, f"new.{name}").replace(self.path / name)


def saved_args(folder: str | Path) -> Args:
    """The arguments of a run."""
    saved = json.loads(Path(folder, "args.json").read_text())
    if saved["script"] != SCRIPT:
        raise Failure(f"this is a run of {saved['script']}.py, not of {SCRIPT}.py")
    return Args(**{name: tuple(x) if isinstance(x, list) else x for name, x in saved["args"].items()})


def load(folder: str | Path, *spaces: gym.Space, **changes: Any) -> Agent:
    """The agent of a run; `load(folder).greedy_policy(seed=0)` is a function from an observation to an action. Give the
    spaces of observations and actions where the environment is not registered. Changes are to the run's arguments."""
    args = dataclasses.replace(saved_args(folder), **changes)
    env = None if spaces else make_env(args)
    agent = Agent(*(spaces or (env.observation_space, env.action_space)), args)
    agent.load_state_dict(ast.literal_eval(Path(folder, CHECKPOINT).read_text())["agent"])
    return agent


def main() -> None:
    """The command line; what the user can fix is one line on stderr and status 2."""
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # Windows has no SIGHUP
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    sys.path.append(str(Path.cwd()))  # where the module of `--env-id module:Name-v0` may be
    folder = None
    try:
        given = tyro.cli(Args)
        folder = given.resume if given.evaluate is None else given.evaluate
        default = Args(env_id=given.env_id, **PRESETS.get(given.env_id, {})) if folder is None else saved_args(folder)
        args = tyro.cli(Args, default=dataclasses.replace(default, env_kwargs={}))  # once more, for what was not given
        args.env_kwargs = default.env_kwargs | given.env_kwargs
        other = {name for name, x in vars(args).items() if x != vars(default)[name]} - {"resume", *MUTABLE.split(", ")}
        if other and args.resume is not None:
            raise Failure(f"--resume may change {MUTABLE}, not {', '.join(sorted(other))}")
        if args.evaluate is None:
            train(args)
        else:
            Run(args, load(args.evaluate, **vars(args)), [], functools.partial(make_env, args)).evaluate()
    except Exception as error:
        if hasattr(Run, "resumable") and not isinstance(error, Failure | OSError):
            raise  # the run had begun: it comes from the environment or from this script, whose author needs to see it
        text = " ".join(f"{type(error).__name__}: {error} {folder or ''}".split())
        print(f"{SCRIPT}.py: error: {text.removeprefix('Failure: ')}", file=sys.stderr)
        sys.exit(2)
    except SystemExit:
        if path := getattr(Run, "resumable", None):  # otherwise it is --help, or an argument that tyro does not know
            print(f"\nstopped; to continue: python {sys.argv[0]} --resume {path}", file=sys.stderr)
        raise


def check_spaces(space: gym.Space, action_space: gym.Space) -> None:
    """Raises Failure where there can be no table: observations have to come back, to the last digit."""
    for part in space if isinstance(space, gym.spaces.Tuple) else [space]:
        large = isinstance(part, gym.spaces.Box) and not (part.is_bounded() and np.prod(part.shape) <= 64)
        if large or isinstance(part, gym.spaces.Dict) or not isinstance(action_space, gym.spaces.Discrete):
            raise Failure(f"no table of {space}, {action_space}: try cem_mpc.py, mbpo.py, muzero.py, dreamer.py")


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
    observation_space, action_space = gym.spaces.Discrete(54), gym.spaces.Discrete(4)

    def __init__(self, layouts: tuple[str, str], change_at: int = 0, render_mode: str | None = None):
        self.layouts, self.change_at, self.render_mode, self.steps_made = layouts, change_at, render_mode, 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        self.layout = self.layouts[self.steps_made >= self.change_at]
        self.position = self.layout.index("S")
        return self.position, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        d_row, d_column = ((-1, 0), (0, 1), (1, 0), (0, -1))[action]
        row, column = self.position // 9 + d_row, self.position % 9 + d_column
        if 0 <= row < 6 and 0 <= column < 9 and self.layout[9 * row + column] != "#":
            self.position = 9 * row + column
        at_goal = self.layout[self.position] == "G"
        self.steps_made += 1
        self.layout = self.layouts[self.steps_made >= self.change_at]
        return self.position, float(at_goal), at_goal, False, {}

    def render(self) -> np.ndarray:
        palette = np.array([(240, 240, 240), (90, 90, 90), (170, 210, 240), (250, 200, 60), (200, 60, 40)], np.uint8)
        marks = self.layout[: self.position] + "A" + self.layout[self.position + 1 :]
        return palette[[".#SGA".index(mark) for mark in marks]].reshape(6, 9, 3).repeat(32, 0).repeat(32, 1)


if "DynaMaze-v0" not in gym.registry:
    gym.register("DynaMaze-v0", Maze, kwargs={"layouts": (DYNA, DYNA)})
    gym.register("BlockingMaze-v0", Maze, kwargs={"layouts": (RIGHT, LEFT), "change_at": 1_000})
    gym.register("ShortcutMaze-v0", Maze, kwargs={"layouts": (LEFT, BOTH), "change_at": 3_000})


def draw_policy(maze: Maze, q: dict[tuple, list[float]], path: Path) -> None:
    """Prints the best action of each state where one is better; draws it, the bluer the higher its value."""
    free = [(state, row) for (state,), row in q.items() if max(row) > min(row) and maze.layout[state] != "#"]
    known = {state: (max(row), row.index(max(row))) for state, row in free}
    image, marks = Image.new("RGB", (360, 240), (90, 90, 90)), list(maze.layout)
    draw, highest = ImageDraw.Draw(image), max(1e-9, *(value for value, _ in known.values()), 0.0)
    for state, (value, action) in known.items():
        x, y, marks[state] = 40 * (state % 9), 40 * (state // 9), "↑→↓←"[action]
        draw.rectangle((x + 1, y + 1, x + 38, y + 38), (int(235 - 150 * max(0.0, value / highest)), 240, 250))
        draw.regular_polygon((x + 20, y + 20, 12), 3, (0, 270, 180, 90)[action], (20, 20, 60))
    image.save(path)
    text = "\n".join(" ".join(marks[first : first + 9]) for first in range(0, 54, 9))
    text = text if "utf" in (sys.stdout.encoding or "").lower() else text.translate(str.maketrans("↑→↓←", "^>v<"))
    print(f"{text}\ndrawn, the bluer the higher a state's value: {path}")


if __name__ == "__main__" and "__file__" in globals():  # which a notebook has not
    main()
