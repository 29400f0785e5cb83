"""What an agent of td_mpc2.py foresaw along an episode, and what came: python -m benchmark foresight RUN."""

from pathlib import Path

import numpy as np
import torch

import td_mpc2
from td_mpc2 import from_bins


@torch.no_grad()
def foreseen(agent: td_mpc2.Agent, env: td_mpc2.gym.Env) -> dict[str, np.ndarray]:
    """Of each step of one greedy episode: the reward that came, and as the model expected it H - 1 steps before, along
    the actions that were taken; the discounted return that came, with the value of the last state behind it, and the
    value of the state, by the mean of all Qs at the policy's mean action."""
    policy, model, horizon = agent.greedy_policy(seed=0), agent.model, agent.args.horizon
    (obs, info), done, observations, actions, rewards = env.reset(seed=0), False, [], [], []
    while not done:
        observations.append(agent.flat(obs))
        action = policy(obs, info)
        obs, reward, terminated, truncated, info = env.step(action)
        actions.append(agent.from_env(action))
        rewards.append(float(reward))
        done = terminated or truncated
    z = model.encoder(torch.stack([*observations, agent.flat(obs)]))
    mean_action = model.pi(z, torch.zeros(len(z), agent.action_size))[1]
    value = torch.stack([from_bins(q(torch.cat([z, mean_action], dim=-1))) for q in model.qs]).mean(0).squeeze(-1)
    state, taken = z[: len(rewards) - horizon + 1], torch.stack(actions)
    for step in range(horizon):
        x = torch.cat([state, taken[step : step + len(state)]], dim=-1)
        expected, state = from_bins(model.reward(x)).squeeze(-1), model.dynamics(x)
    came = [0.0 if terminated else value[-1].item()]
    for reward in reversed(rewards):
        came.append(reward + agent.gamma * came[-1])
    return {
        "reward": np.array(rewards),
        "expected": expected.numpy(),
        "return": np.array(came[:0:-1]),
        "value": value[:-1].numpy(),
    }


def draw(run: str, path: Path) -> None:
    """Writes the picture."""
    from matplotlib import pyplot, rc_context

    from .plot import COLOURS, GREY, STYLE

    args, agent = td_mpc2.saved_args(run), td_mpc2.load(run, device="cpu")
    found = foreseen(agent, td_mpc2.make_env(args))
    late = len(found["reward"]) - len(found["expected"])
    with rc_context(STYLE):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3), layout="constrained")
        for axes, name, x in ((left, "expected", late), (right, "value", 0)):
            truth = {"expected": "reward", "value": "return"}[name]
            axes.plot(found[truth], color=GREY, label=f"the {truth} that came")
            axes.plot(np.arange(len(found[name])) + x, found[name], color=COLOURS[0], label="as foreseen")
            axes.set(xlabel="step of the episode", title=f"{truth}{f', {late} steps before' if late and x else ''}")
        right.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})
    print(path)
