"""How many planning updates and real steps a second dyna_q.py makes, against plainer ways to write the same.

Everything runs in this process on one thread, on the Dyna maze with the parameters of Figure 8.2. The contestants take
turns for several rounds, so that a machine that is busy for a while slows all of them, and medians are compared.
"""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import dyna_q

ALPHA, GAMMA, EPSILON = 0.1, 0.95, 0.1
EPISODES = 30
N_PLANNING = 50


class Plain:
    """dyna_q.py: its training loop without the run folder."""

    name = "dyna_q.py"

    def __init__(self, seed: int):
        self.seed = seed
        self.learn(N_PLANNING)

    def learn(self, n_planning: int) -> int:
        """Learns from nothing for `EPISODES` episodes; returns the number of real steps."""
        args = dyna_q.Args(seed=self.seed, alpha=ALPHA, gamma=GAMMA, epsilon=EPSILON, n_planning=n_planning)
        env = dyna_q.make_env(args)
        self.agent = agent = dyna_q.Agent(env.observation_space, env.action_space, args)
        episode = dyna_q.Episode(env, args.seed, 1)
        episode.reset(0)
        steps = 0
        while episode.number < EPISODES:
            obs = episode.obs
            action = agent.act(obs)
            next_obs, reward, terminated, truncated = episode.step(action)
            agent.observe(obs, action, reward, next_obs, terminated, truncated)
            agent.update()
            steps += 1
            if terminated or truncated:
                episode.reset()
        return steps

    def plan(self) -> int:
        """The planning updates of one step, by the agent that learned last; returns their number."""
        self.agent.update()
        return N_PLANNING


class Textbook:
    """Dyna-Q as one would write it down first: an array for Q, a dictionary for the model, a draw for every update."""

    name = "textbook (NumPy table, dict model)"

    def __init__(self, seed: int):
        self.seed = seed
        self.learn(N_PLANNING)

    def learn(self, n_planning: int) -> int:
        env = dyna_q.make_env(dyna_q.Args())
        self.rng = np.random.default_rng(self.seed)
        self.q = np.zeros((env.observation_space.n, env.action_space.n))
        self.model: dict[tuple[int, int], tuple[float, int, bool]] = {}
        self.pairs: list[tuple[int, int]] = []
        steps = 0
        for _ in range(EPISODES):
            state, _ = env.reset()
            done = False
            while not done:
                action = self.act(state)
                next_state, reward, terminated, truncated, _ = env.step(action)
                self.update(state, action, reward, next_state, terminated)
                if (state, action) not in self.model:
                    self.pairs.append((state, action))
                self.model[state, action] = reward, next_state, terminated
                self.plan(n_planning)
                state, done = next_state, terminated or truncated
                steps += 1
        return steps

    def act(self, state: int) -> int:
        if self.rng.random() < EPSILON:
            return int(self.rng.integers(self.q.shape[1]))
        best = np.flatnonzero(self.q[state] == self.q[state].max())
        return int(self.rng.choice(best))

    def update(self, state: int, action: int, reward: float, next_state: int, terminated: bool) -> None:
        target = reward if terminated else reward + GAMMA * np.max(self.q[next_state])
        self.q[state, action] += ALPHA * (target - self.q[state, action])

    def plan(self, n_planning: int = N_PLANNING) -> int:
        for _ in range(n_planning):
            state, action = self.pairs[self.rng.integers(len(self.pairs))]
            reward, next_state, terminated = self.model[state, action]
            self.update(state, action, reward, next_state, terminated)
        return n_planning


def peer_contestant(path: Path) -> type:
    """The contestant that drives ShangtongZhang's chapter08/maze.py, found at or under `path`."""
    candidates = [path, path / "chapter08" / "maze.py", path / "maze.py"]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"there is no maze.py and no chapter08/maze.py in {path}")
    spec = importlib.util.spec_from_file_location("peer_maze", file)
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)

    class Peer:
        name = "ShangtongZhang, chapter08"

        def __init__(self, seed: int):
            np.random.seed(seed)
            self.learn(N_PLANNING)

        def learn(self, n_planning: int) -> int:
            maze, parameters = peer.Maze(), peer.DynaParams()
            parameters.alpha, parameters.gamma, parameters.epsilon = ALPHA, GAMMA, EPSILON
            parameters.planning_steps = n_planning
            self.q, self.model = np.zeros(maze.q_size), peer.TrivialModel()
            return sum(peer.dyna_q(self.q, self.model, maze, parameters) for _ in range(EPISODES))

        def plan(self) -> int:
            for _ in range(N_PLANNING):
                state, action, next_state, reward = self.model.sample()
                target = reward + GAMMA * np.max(self.q[*next_state])
                self.q[*state, action] += ALPHA * (target - self.q[*state, action])
            return N_PLANNING

    return Peer


def per_second(work: Callable[[], int], seconds: float = 0.5) -> float:
    """Calls `work`, which returns how much it did, for at least so many seconds; returns how much it did in one."""
    amount, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        amount += work()
    return amount / elapsed


def rates_of(learner: Any) -> tuple[float, float, float]:
    """Updates a second in planning alone, updates a second in the whole loop, real steps a second without planning."""
    return (
        per_second(learner.plan),
        per_second(lambda: N_PLANNING * learner.learn(N_PLANNING)),
        per_second(lambda: learner.learn(0)),
    )


def measure(peer: Path | None, rounds: int) -> str:
    """Markdown table of the medians; in brackets how many times as much dyna_q.py does."""
    contestants = [Plain, Textbook, *([peer_contestant(peer)] if peer else [])]
    rates: dict[str, list[tuple[float, float, float]]] = {contestant.name: [] for contestant in contestants}
    for seed in range(rounds):
        for contestant in contestants:
            rates[contestant.name].append(rates_of(contestant(seed)))
    medians = {name: [median(column) for column in zip(*rows, strict=True)] for name, rows in rates.items()}
    lines = [
        f"| medians of {rounds} rounds, per second | planning alone: updates | whole loop, n={N_PLANNING}: updates "
        "| whole loop, n=0: real steps |",
        "|---|---|---|---|",
    ]
    for name, values in medians.items():
        pairs = zip(values, medians[Plain.name], strict=True)
        cells = [f"{value:,.0f} ({ours / value:.1f}x)" for value, ours in pairs]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
