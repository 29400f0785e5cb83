"""How fast muzero.py is: simulations of its searches, with DeepMind's mctx beside them, and updates.

A checkout that is given as `--peer` is measured, too: updates of werner-duvaud/muzero-general, or searches of
opendilab/LightZero, whose tree is in C++ (build it there: `python setup.py build_ext --inplace`).

The network is muzero.py's own, of its default sizes, for 4 numbers and 2 actions (CartPole) and for 18 numbers and 9
actions in a game of two players (tic-tac-toe); the others search with the very same weights, LightZero's tree with the
network in PyTorch, called once a simulation. (LightZero itself calls it twice and uses the second answer.) Everything
runs in this process on one thread; the contestants of a row take turns for several rounds, and medians of rates per
second of processor time are compared. The trees are random ones, as the weights are. The peer's updates are those of
its trainer and its replay, without Ray between them, with networks of the same sizes, on as many positions of games as
long.
"""

import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch

import muzero

SIMULATIONS, ROOTS = 50, (1, 8, 64, 256)
POSITIONS, LENGTH = 2_000, 20  # of the replay that updates draw from, and of each game in it
TASKS = {"2 actions": (4, 2, 0.997), "9 actions, two players": (18, 9, -1.0)}  # numbers, actions, discount
Work = Callable[[], None]


def make_agent(obs_size: int, actions: int, discount: float, **options: float) -> muzero.Agent:
    options |= {"support": 10, "num_simulations": SIMULATIONS, "reanalyze_ratio": 0.0}
    args = muzero.Args(device="cpu", gamma=discount, **options)
    space = gym.spaces.Box(-np.inf, np.inf, (obs_size,), np.float32)
    return muzero.Agent(space, gym.spaces.Discrete(actions), args)


def our_searches(agent: muzero.Agent, obs: np.ndarray) -> dict[str, Work]:
    """Both searches from the states of these observations."""
    latent, logits, value = agent.predict(obs)
    legal = np.ones(logits.shape, bool)
    gumbel = agent.rng.gumbel(size=legal.shape)

    def run(search: Callable, *more: object) -> None:
        search(agent.recurrent, muzero.Tree(latent, logits, value, legal, agent.args.gamma, SIMULATIONS), *more)

    return {
        "muzero.py, pUCT": lambda: run(muzero.muzero_search),
        "muzero.py, Gumbel": lambda: run(muzero.gumbel_search, gumbel, 16),
    }


def mctx_searches(agent: muzero.Agent, obs: np.ndarray) -> dict[str, Work]:
    """The same by mctx, compiled beforehand."""
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp
    import mctx

    weights = {name: jnp.asarray(array) for name, array in agent.view.items()}
    discount, bins = agent.args.gamma, jnp.arange(-agent.args.support, agent.args.support + 1, dtype=jnp.float32)

    def dense(name: str, x: jax.Array) -> jax.Array:
        return x @ weights[f"{name}_weight"] + weights[f"{name}_bias"]

    def expectation(logits: jax.Array) -> jax.Array:
        y = jax.nn.softmax(logits) @ bins
        return jnp.sign(y) * (((jnp.sqrt(1 + 0.004 * (jnp.abs(y) + 1.001)) - 1) / 0.002) ** 2 - 1)

    def recurrent(_: None, key: jax.Array, action: jax.Array, latent: jax.Array) -> tuple:
        weight, size = weights["step_weight"], latent.shape[-1]
        hidden = jax.nn.relu(latent @ weight[:size] + weight[size:][action] + weights["step_bias"])
        latent = latent + dense("next_latent", hidden)
        low, high = latent.min(-1, keepdims=True), latent.max(-1, keepdims=True)
        latent = (latent - low) / jnp.maximum(high - low, 1e-5)
        reward, value, policy = (dense(name, jax.nn.relu(dense(f"{name}_hidden", latent))) for name in muzero.HEADS)
        reward, value = expectation(reward), expectation(value)
        parts = {"reward": reward, "discount": jnp.full_like(reward, discount), "prior_logits": policy, "value": value}
        return mctx.RecurrentFnOutput(**parts), latent

    latent, logits, value = agent.predict(obs)
    root = mctx.RootFnOutput(prior_logits=jnp.asarray(logits), value=jnp.asarray(value), embedding=jnp.asarray(latent))
    common, key = {"recurrent_fn": recurrent, "num_simulations": SIMULATIONS}, jax.random.PRNGKey(0)
    puct = jax.jit(lambda key: mctx.muzero_policy(None, key, root, dirichlet_fraction=0.0, **common).action_weights)
    gumbel = jax.jit(lambda key: mctx.gumbel_muzero_policy(None, key, root, **common).action_weights)
    searches = {"mctx, pUCT": lambda: puct(key).block_until_ready()}
    searches["mctx, Gumbel"] = lambda: gumbel(key).block_until_ready()
    for search in searches.values():
        search()
    return searches


def lightzero_searches(path: Path, agent: muzero.Agent, obs: np.ndarray) -> dict[str, Work]:
    """The same by the C++ tree of LightZero, driven as its `MuZeroMCTSCtree.search` does."""
    (library,) = path.glob("lzero/mcts/ctree/ctree_muzero/mz_tree*.so")
    spec = importlib.util.spec_from_file_location("mz_tree", library)
    tree = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tree)
    latent, logits, _ = agent.predict(obs)
    count, actions = logits.shape
    players, discount = [-1 if agent.args.gamma > 0 else 1] * count, abs(agent.args.gamma)

    @torch.inference_mode()
    def recurrent(latent: np.ndarray, action: list[int]) -> tuple:
        turns = agent.args.gamma < 0
        latent = muzero.dynamics(agent.parameters, torch.from_numpy(latent), torch.tensor(action), turns)
        reward, value, policy = muzero.predict(agent.parameters, latent)
        reward, value = muzero.expectation(torch.stack([reward, value]), not turns)
        return latent.numpy(), reward.tolist(), value.tolist(), policy.tolist()

    def work() -> None:
        roots = tree.Roots(count, [list(range(actions))] * count)
        roots.prepare_no_noise([0.0] * count, logits.tolist(), players)
        ranges, latents = tree.MinMaxStatsList(count), [latent]
        ranges.set_delta(0.01)
        for index in range(1, SIMULATIONS + 1):
            results = tree.ResultsWrapper(num=count)
            settings = 19_652, 1.25, discount, ranges, results, list(players)
            depth, row, action, to_play = tree.batch_traverse(roots, *settings)
            leaf = np.asarray([latents[i][j] for i, j in zip(depth, row, strict=True)])
            following, *found = recurrent(leaf, action)
            latents.append(following)
            tree.batch_backpropagate(index, discount, *found, ranges, results, to_play)

    return {"LightZero's C++ tree, pUCT": work}


def updates(agent: muzero.Agent) -> Work:
    """One update of the network, with its batch, as in training."""
    rng = np.random.default_rng(0)
    agent.args.updates_per_step, agent.args.learning_starts = 1.0, 1
    for step in range(POSITIONS):
        obs = rng.normal(size=agent.obs_shape).astype(np.float32)
        agent.found = [(np.full(agent.num_actions, 1 / agent.num_actions), 0.0, np.ones(agent.num_actions, bool))]
        agent.observe(obs, int(rng.integers(agent.num_actions)), 1.0, obs, step % LENGTH == LENGTH - 1)

    def work() -> None:
        agent.updates = agent.steps - agent.args.learning_starts - 1
        agent.update()

    return work


def peer_updates(path: Path, obs_size: int, actions: int, discount: float) -> Work:
    """The same of muzero-general."""
    sys.modules["ray"] = SimpleNamespace(remote=lambda kind: kind)  # its classes as they are, in this process
    sys.path.insert(0, str(path))
    models, trainer, replay_buffer, self_play = (
        importlib.import_module(name) for name in ("models", "trainer", "replay_buffer", "self_play")
    )
    config = SimpleNamespace(seed=0, observation_shape=(1, 1, obs_size), action_space=list(range(actions)))
    config.network, config.stacked_observations, config.train_on_gpu = "fullyconnected", 0, False
    config.encoding_size, config.support_size = muzero.Args.latent_size, 10
    for name in ("representation", "dynamics", "reward", "value", "policy"):
        setattr(config, f"fc_{name}_layers", [muzero.Args.hidden_size])
    config.batch_size, config.num_unroll_steps = muzero.Args.batch_size, muzero.Args.unroll_steps
    config.td_steps, config.discount, config.value_loss_weight = muzero.Args.td_steps, discount, 1.0
    config.optimizer, config.lr_init, config.weight_decay = "Adam", 1e-3, 1e-4
    config.PER, config.PER_alpha, config.replay_buffer_size = True, 0.5, POSITIONS
    replay = replay_buffer.ReplayBuffer({"num_played_games": 0, "num_played_steps": 0}, {}, config)
    rng = np.random.default_rng(0)
    for _ in range(POSITIONS // LENGTH):
        game = self_play.GameHistory()
        game.observation_history = list(rng.normal(size=(LENGTH + 1, 1, 1, obs_size)).astype(np.float32))
        game.action_history = [0, *rng.integers(actions, size=LENGTH).tolist()]
        game.reward_history, game.to_play_history = [0.0, *[1.0] * LENGTH], [0] * (LENGTH + 1)
        game.child_visits, game.root_values = [[1 / actions] * actions] * LENGTH, [0.0] * LENGTH
        replay.save_game(game)
    weights = models.MuZeroNetwork(config).get_weights()
    learner = trainer.Trainer({"weights": weights, "training_step": 0, "optimizer_state": None}, config)

    def work() -> None:
        where, batch = replay.get_batch()
        replay.update_priorities(learner.update_weights(batch)[0], where)

    return work


def rate(work: Work, seconds: float = 0.5) -> float:
    """How often it is done in a second of processor time."""
    count, start = 0, time.process_time()
    while (elapsed := time.process_time() - start) < seconds:
        work()
        count += 1
    return count / elapsed


def measure(peer: Path | None, rounds: int) -> str:
    """Markdown tables of the medians."""
    torch.set_num_threads(1)
    beside = importlib.util.find_spec("mctx") is not None
    lightzero = peer is not None and (peer / "lzero").exists()
    lines = [
        f"Thousands of simulations per second of processor time, {SIMULATIONS} to a search, medians of {rounds}:",
        "",
    ]
    lines += ["|  | " + " | ".join(f"{roots} root{'s' * (roots > 1)}" for roots in ROOTS) + " |"]
    lines += ["|---|" + "---|" * len(ROOTS)]
    for task, settings in TASKS.items():
        agent, cells = make_agent(*settings), {}
        for roots in ROOTS:
            obs = np.random.default_rng(1).normal(size=(roots, settings[0])).astype(np.float32)
            searches = our_searches(agent, obs) | (mctx_searches(agent, obs) if beside else {})
            searches |= lightzero_searches(peer, agent, obs) if lightzero else {}
            rates = {name: [] for name in searches}
            for _ in range(rounds):
                for name, search in searches.items():
                    rates[name].append(rate(search) * roots * SIMULATIONS / 1_000)
            for name, values in rates.items():
                cells.setdefault(name, []).append(f"{median(values):,.1f}")
        lines += [f"| {name}, {task} | {' | '.join(row)} |" for name, row in cells.items()]
    task = TASKS["2 actions"]
    contestants = {"muzero.py": updates(make_agent(*task))}
    contestants["muzero.py, without consistency loss and follow, with priorities"] = updates(
        make_agent(*task, consistency_weight=0.0, follow=0.0, priority_exponent=0.5)
    )
    if peer and not lightzero:
        contestants["muzero-general"] = peer_updates(peer, *task)
    rates = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            rates[name].append(rate(work, 2.0))
    batch = f"batch {muzero.Args.batch_size}, {muzero.Args.unroll_steps} steps unrolled"
    lines += ["", f"Updates of the network per second of processor time ({batch}):", ""]
    lines += ["|  | updates per second |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {median(values):.1f} |" for name, values in rates.items())])
