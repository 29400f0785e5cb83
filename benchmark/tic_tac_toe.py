"""Opponents that look ahead, for the boards of `muzero.py`; games against its agent in the terminal; and all games that
an opponent can choose against the agent of a tic-tac-toe run.

python muzero.py --env-id TicTacToe-v0 --eval-env-kwargs opponent benchmark.tic_tac_toe:perfect
python -m benchmark play RUN
python -m benchmark games RUN

The agent plays without noise, so its move in a position is always the same, and all games against it can be counted:
ply by ply, with each position searched once, together with all others of that ply.
"""

import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import muzero

Position = tuple[int, int]  # the stones of the player to move, and the other's, as KInARow keeps them
Policy = Callable[[list[Position]], list[int]]  # an action for each position
REMEMBERED: dict[tuple, float] = {}  # what `foresee` found out, for all boards of the same kind


def foresee(game: muzero.KInARow, own: int, other: int, plies: int) -> float:
    """What the player to move gets at best within so many moves; 0 where that is open. Soon is better than late."""
    if not plies:
        return 0.0
    key = game.rows, game.columns, game.k, game.gravity, own, other, plies
    if key not in REMEMBERED:
        moves = game.moves(own, other)
        values = (1.0 if won else -0.99 * foresee(game, other, after, plies - 1) for _, after, won in moves)
        value = max(values, default=0.0)
        if len(REMEMBERED) > 2**18:
            REMEMBERED.clear()
        REMEMBERED[key] = value
    return REMEMBERED[key]


def look_ahead(game: muzero.KInARow, plies: int) -> int:
    """One of the best moves that are foreseen within so many."""
    values = {
        action: 1.0 if won else -foresee(game, game.other, after, plies - 1)
        for action, after, won in game.moves(game.own, game.other)
    }
    best = [action for action, value in values.items() if value == max(values.values())]
    return best[game.np_random.integers(len(best))]


perfect = functools.partial(look_ahead, plies=9)  # on a board as small as 3 x 3
four_ahead = functools.partial(look_ahead, plies=4)


def count_games(game: muzero.KInARow, policy: Policy, first: bool) -> tuple[np.ndarray, np.ndarray]:
    """Of all games against `policy`, which begins them or does not: how many it wins, draws and loses, (3,), and the
    probabilities (3,) of that against uniformly random moves."""
    counts, probabilities = np.zeros(3, np.int64), np.zeros(3)
    positions: dict[Position, tuple[int, float]] = {(0, 0): (1, 1.0)}  # lines that lead there, and their probability
    for ply in range(game.rows * game.columns):
        following: dict[Position, tuple[int, float]] = {}
        to_move = (ply % 2 == 0) == first
        actions = policy(list(positions)) if to_move else [None] * len(positions)
        for ((own, other), (count, probability)), chosen in zip(positions.items(), actions, strict=True):
            moves = [move for move in game.moves(own, other) if chosen is None or move[0] == chosen]
            for _, after, won in moves:
                share = probability / len(moves)
                if won or ply == game.rows * game.columns - 1:
                    result = 1 if not won else 0 if to_move else 2
                    counts[result] += count
                    probabilities[result] += share
                else:
                    before = following.get((other, after), (0, 0.0))
                    following[other, after] = before[0] + count, before[1] + share
        positions = following
    return counts, probabilities


def policies_of(run: Path) -> tuple[muzero.KInARow, dict[str, Policy]]:
    """The game of a run, and its agent's policies: with the search of evaluations, and that of the network alone."""
    args, agent = muzero.saved_args(run), muzero.load(run, device="cpu")
    game = muzero.make_env(args).unwrapped

    def with_search(positions: list[Position], searched: bool = True) -> list[int]:
        rows, masks = [], []
        for game.own, game.other in positions:
            obs, info = game.observation()
            rows.append(agent.row(obs))
            masks.append(agent.legal(info))
        legal = np.stack(masks)
        _, actions, _, tree = agent.plan(np.stack(rows), legal, None)
        if not searched:
            actions = np.where(legal, tree.logits[tree.roots], -np.inf).argmax(1)
        return actions.tolist()

    return game, {"search": with_search, "network alone": lambda positions: with_search(positions, False)}


def measure(runs: list[Path]) -> str:
    """Markdown table of all games of the agents of some runs."""
    lines = [
        "| run | moves by | begins | games won | drawn | lost | wins against random moves |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        try:
            game, policies = policies_of(run)
        except muzero.Failure as error:
            raise FileNotFoundError(str(error)) from error
        if not isinstance(game, muzero.KInARow) or game.rows * game.columns > 9:
            raise FileNotFoundError(f"{run} is not a run of TicTacToe-v0")
        for name, policy in policies.items():
            for first in (True, False):
                (won, drawn, lost), (wins, _, _) = count_games(game, policy, first)
                side = "agent" if first else "opponent"
                lines.append(f"| {run.name} | {name} | {side} | {won} | {drawn} | {lost} | {100 * wins:.1f} % |")
    return "\n".join(lines)


def tree_text(agent: muzero.Agent, obs: Any, info: dict | None, levels: int = 3) -> str:
    """What a search without noise finds: for each action visits, prior, Q and the reward foreseen, and behind it the
    same for the actions of the state that it leads to."""
    _, action, value, tree = agent.plan(agent.row(obs)[None], agent.legal(info)[None], None)
    chosen = f"value {value[0]:.3g}, action {action[0] + agent.first_action}"
    lines = [f"search of {agent.args.num_simulations} simulations: {chosen}"]

    def describe(node: int, level: int) -> None:
        for edge in np.argsort(-tree.edge_visits[node], kind="stable"):
            visits, q, reward, prior = (a[node, edge] for a in (tree.edge_visits, tree.q, tree.reward, tree.prior))
            if visits:
                found = f"{visits} visits, Q {q:.3g}, reward {reward:.3g}, prior {prior:.2f}"
                lines.append(f"{'    ' * level}{edge + agent.first_action}: {found}")
                if level < levels:
                    describe(tree.child[node, edge], level + 1)

    describe(0, 1)
    return "\n".join(lines)


def ask(allowed: np.ndarray) -> int | None:
    """A move that the player types, asked for until it is one of those allowed; None: nothing was typed."""
    while True:
        print("Your move: ", end="", flush=True)
        text = sys.stdin.readline().strip()
        if not text:
            return None
        if text.isdecimal() and int(text) in allowed:
            return int(text)
        print(f"Allowed are {', '.join(map(str, allowed))}.")


def play(run: str) -> None:
    """Games in the terminal against the agent of a run, who searches as in evaluations and shows its best lines.

    Args:
        run: Run folder of muzero.py, of a board game and self-play.
    """
    args, agent = muzero.saved_args(run), muzero.load(run, device="cpu")
    env = muzero.make_env(args)
    if not isinstance(env.unwrapped, muzero.KInARow) or env.unwrapped.opponent is not None:
        raise muzero.Failure(f"{run} is not a run of a board game in self-play")
    env = muzero.make_env(args, render_mode="ansi")
    policy, results = agent.greedy_policy(args.seed), {"won": 0, "lost": 0, "drawn": 0}
    for number in itertools.count():
        (obs, info), done = env.reset(), False
        print(f"You are {'XO'[number % 2]}; moves are counted from 0, from left and top. Enter alone ends the game.")
        while not done:
            print(f"{env.render()}\n")
            yours = env.unwrapped.turns % 2 == number % 2
            action = ask(info["action_mask"].nonzero()[0]) if yours else policy(obs, info)
            if action is None:
                print(f"You have won {results['won']}, lost {results['lost']}, drawn {results['drawn']}.")
                return
            if not yours:
                print(f"{tree_text(agent, obs, info, levels=2)}\nMy move: {action}")
            obs, reward, done, _, info = env.step(action)
        result = "drawn" if not reward else "won" if yours else "lost"
        results[result] += 1
        print(f"{env.render()}\n\nYou have {result}.\n" if reward else f"{env.render()}\n\nA draw.\n")
