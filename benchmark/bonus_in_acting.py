"""Dyna-Q+ whose bonus counts in the choice of actions and not in planning (Sutton & Barto, exercise 8.4): actions are
chosen by Q(s, a) + kappa sqrt(tau); untried actions take part in planning all the same.

    python benchmark/bonus_in_acting.py --env-id ShortcutMaze-v0 --kappa 1e-3
"""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dyna_q_plus
from dyna_q_plus import PRESETS, Args, random_argmax

__all__ = ["PRESETS", "Agent", "Args"]


class Agent(dyna_q_plus.Agent):
    """Dyna-Q+ with the bonus elsewhere."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        super().__init__(observation_space, action_space, replace(args, kappa=0.0))
        self.kappa = args.kappa

    def act(self, obs: Any) -> np.integer:
        """Epsilon-greedy action by Q and the bonus, which is 0 in states that were never left."""
        if self.rng.random() < self.args.epsilon:
            return self.first_action + self.rng.randrange(self.num_actions)
        row = self.q[self.key(obs)]
        values = list(row)
        for of_state, action, *_, last_tried in self.model.pairs:
            if of_state is row:
                values[action] += self.kappa * math.sqrt(self.model.clock - last_tried)
        return self.first_action + random_argmax(values, self.rng)


if __name__ == "__main__":
    dyna_q_plus.SCRIPT, dyna_q_plus.Agent = Path(__file__).stem, Agent
    dyna_q_plus.main()
