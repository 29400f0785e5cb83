"""Plays the agent of a tic-tac-toe run of `muzero.py` against every line of play that an opponent can choose.

The agent plays without noise, so its move in a position is always the same, and all games against it can be counted:
ply by ply, with each position searched once, together with all others of that ply.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

import muzero

Position = tuple[int, int]  # the stones of the player to move, and the other's, as KInARow keeps them
Policy = Callable[[list[Position]], list[int]]  # an action for each position


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
    args = muzero.saved_args(str(run))
    env = muzero.make_env(args)
    agent, game = muzero.Agent(env.observation_space, env.action_space, args), env.unwrapped
    agent.load_state_dict(muzero.read_checkpoint(run / muzero.CHECKPOINT)["agent"])

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
