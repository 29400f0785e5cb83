"""What holds for every script: its anatomy, the command line, exact resume, bad input, copies, loops of one's own."""

import ast
import copy
import dataclasses
import importlib
import inspect
import itertools
import json
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import tyro
from conftest import (
    CORRIDOR,
    NEURAL,
    ROOT,
    SCRIPTS,
    TABULAR,
    Corridor,
    checkpoint,
    command,
    complaint,
    corridor,
    full_disk,
    in_corridor,
    interrupted_at,
    learned,
    only_run,
    outcome,
    plain,
    result,
    run_script,
    scalars,
    start,
    tiny_args,
    with_tiny,
)

SHARED_FIELDS = ["env_id", "env_kwargs", "total_timesteps", "seed", "device", "threads", "compile", "eval_every"]
SHARED_FIELDS += ["eval_episodes", "checkpoint_every", "run_dir", "resume", "evaluate", "capture_video"]
OF_NETWORKS = ["device", "threads", "compile"]
BEGINNINGS = {  # of comments that go on in each script's own way
    "env_id": "Gymnasium id, or module:Name-v0",
    "total_timesteps": "environment steps to learn for",
    "compile": "",
}
SMALL = ["--total-timesteps", 600, "--eval-every", 300, "--checkpoint-every", 200, "--eval-episodes", 2]
SHORT = ["--total-timesteps", 100, "--checkpoint-every", 50, "--eval-episodes", 1]
LITTLE = {"total_timesteps": 200, "eval_every": 80, "checkpoint_every": 50, "eval_episodes": 2}


def little_args(script: ModuleType, folder: Path, **fields: Any) -> Any:
    return tiny_args(script, run_dir=str(folder), **LITTLE | fields)


def definitions(script: ModuleType) -> dict[str, ast.stmt]:
    """The top-level statements by the name that they define."""
    found = {}
    for node in ast.parse(inspect.getsource(script)).body:
        target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
        found.setdefault(getattr(node, "name", getattr(target, "id", node.lineno)), node)
    return found


def comments(script: ModuleType) -> dict[str, str]:
    """The comment of every field, each of which is one line."""
    lines = inspect.getsource(script).splitlines()
    fields = [node for node in definitions(script)["Args"].body if isinstance(node, ast.AnnAssign)]
    assert [(node.target.id, node.end_lineno - node.lineno) for node in fields if node.end_lineno > node.lineno] == []
    return {node.target.id: lines[node.lineno - 1].partition("  # ")[2] for node in fields}


# --- anatomy ----------------------------------------------------------------------------------------------------------
def test_the_algorithm_stands_first_and_the_plumbing_last(script):
    found = definitions(script)
    order = ["Args", "PRESETS", "Model", "Buffer", "Planner", "Agent", "train", "SCRIPT", "Failure", "Run", "main"]
    lines = [found[name].lineno for name in order if name in found]
    assert lines == sorted(lines)
    assert {"Args", "PRESETS", "Agent", "train"} < set(found)
    assert len(ast.get_docstring(ast.parse(inspect.getsource(script))).splitlines()) <= 45
    assert script.__name__ == script.SCRIPT


def test_shared_fields_come_first_and_are_the_same(script):
    dyna_q = importlib.import_module("dyna_q")
    fields = dataclasses.fields(script.Args)
    names = [name for name in SHARED_FIELDS if script.__name__ not in TABULAR or name not in OF_NETWORKS]
    assert [field.name for field in fields[: len(names)]] == names
    first = {field.name: field for field in dataclasses.fields(importlib.import_module("mbpo").Args)}
    first |= {field.name: field for field in dataclasses.fields(dyna_q.Args)}
    texts, own = comments(importlib.import_module("mbpo")) | comments(dyna_q), comments(script)
    for field in fields[: len(names)]:
        assert field.type == first[field.name].type
        if field.name in BEGINNINGS:
            assert own[field.name].startswith(BEGINNINGS[field.name])
        else:
            assert own[field.name] == texts[field.name]
        if field.name not in ("env_id", "total_timesteps", "eval_every", "checkpoint_every"):
            assert (field.default, field.default_factory) == (
                first[field.name].default,
                first[field.name].default_factory,
            )


def test_help_says_what_every_field_is_for(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as stop:
        tyro.cli(script.Args, args=["--help"])
    assert stop.value.code == 0
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for name, comment in comments(script).items():
        assert len(comment) >= 15, name
        assert f"--{name.replace('_', '-')}" in shown
        assert comment in shown


def test_header_names_exactly_what_the_script_imports(script):
    text = inspect.getsource(script)
    (block,) = re.findall(r"^# /// script\n(.*?)^# ///$", text, re.MULTILINE | re.DOTALL)
    header = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.MULTILINE))
    declared = {re.split(r"[><=\[]", package)[0] for package in header["dependencies"]}
    assert all(">=" in package for package in header["dependencies"])
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    third_party = {"pillow" if name == "PIL" else name for name in imported - set(sys.stdlib_module_names)}
    assert declared - {"mujoco", "ale-py"} == third_party


@pytest.mark.parametrize("name", TABULAR)
def test_a_tabular_script_does_not_load_torch(name):
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_pasted_into_a_notebook_it_defines_everything_and_starts_nothing(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["notebook", "--nonsense"])
    cell = {"__name__": "__main__"}
    exec(compile(inspect.getsource(script), "<cell>", "exec"), cell)
    args = dataclasses.replace(cell["Args"](), **vars(little_args(script, tmp_path, total_timesteps=60)))
    cell["train"](args, make=corridor(script))
    assert result(only_run(tmp_path))["env_steps"] == 60


def test_every_setting_by_environment_is_a_valid_one(script):
    for env_id, preset in script.PRESETS.items():
        assert script.Args(env_id=env_id, **preset).env_id == env_id


# --- a run ------------------------------------------------------------------------------------------------------------
def test_copied_alone_to_an_empty_folder_it_runs(script, tmp_path):
    shutil.copy(ROOT / f"{script.__name__}.py", tmp_path)
    words = [sys.executable, f"{script.__name__}.py", *map(str, with_tiny(script.__name__, SMALL))]
    process = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    run = only_run(tmp_path / "runs")
    assert f"tensorboard --logdir {run.relative_to(tmp_path)}" in process.stdout
    assert re.fullmatch(rf"\w+-v\d__{script.__name__}__1__\d{{8}}T\d{{6}}\.\d+", run.name)
    files = {file.name for file in run.iterdir() if file.suffix != ".png"}
    assert files == {"args.json", script.CHECKPOINT, "events.out.tfevents.0", "result.json"}
    saved = json.loads((run / "args.json").read_text())
    assert (saved["script"], saved["args"]["total_timesteps"]) == (script.__name__, 600)
    assert list(saved["versions"]) == ["gymnasium", "numpy", *(["torch"] if script.__name__ in NEURAL else [])]
    found, points = result(run), scalars(run)
    assert (found["env_steps"], found["eval_episodes"]) == (600, 2)
    lengths = [value for tag, _, value in points if tag == "charts/episodic_length"]
    assert len(lengths) == sum(tag == "charts/episodic_return" for tag, _, _ in points) == found["episodes"]
    assert sum(lengths) <= 600
    assert [step for tag, step, _ in points if tag == "eval/episodic_return"] == [300, 600]
    last = [value for tag, _, value in points if tag == "eval/episodic_return"][-1]
    assert last == pytest.approx(found["eval_return_mean"], rel=1e-6)  # events are in single precision
    tags = {tag for tag, _, _ in points}
    assert {"charts/SPS", "eval/episodic_length"} < tags
    assert all(tag.split("/")[0] in ("charts", "eval", "losses", "model", "planner") for tag in tags), tags


def test_same_seed_same_run_other_seed_other_run(script, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        script.train(little_args(script, tmp_path / name, seed=seed), make=corridor(script))
    first, second, other = (outcome(script, only_run(tmp_path / name)) for name in "abc")
    assert first == second
    assert first[0]["agent"] != other[0]["agent"]
    assert first[1] != other[1]


def test_evaluation_does_not_touch_learning(script, tmp_path):
    for name, fields in {"often": {"eval_every": 20, "eval_episodes": 3}, "once": {"eval_every": 10**6}}.items():
        script.train(little_args(script, tmp_path / name, **fields), make=corridor(script))
    often, once = (learned(script, only_run(tmp_path / name)) for name in ("often", "once"))
    assert often["agent"] == once["agent"]
    assert often["episodes"] == once["episodes"]


def test_stopped_anywhere_and_resumed_it_ends_as_if_never_stopped(script, tmp_path, monkeypatch):
    script.train(little_args(script, tmp_path / "whole"), make=corridor(script))
    for call in (128, 200):
        with monkeypatch.context() as patch:
            interrupted_at(script, patch, call)
            with pytest.raises(KeyboardInterrupt):
                script.train(little_args(script, tmp_path / str(call)), make=corridor(script))
        run = only_run(tmp_path / str(call))
        script.train(dataclasses.replace(script.saved_args(run), resume=str(run)), make=corridor(script))
        assert outcome(script, run) == outcome(script, only_run(tmp_path / "whole"))


def test_killed_at_a_random_moment_and_resumed_it_ends_as_if_never_killed(script, tmp_path, monkeypatch):
    long, often = (12_000, 100) if script.__name__ in TABULAR else (300, 20)
    args = ["--total-timesteps", long, "--checkpoint-every", often, "--eval-every", 5 * often, "--eval-episodes", 1]
    run_script(script, monkeypatch, *args, "--run-dir", tmp_path / "whole")
    words = command(script, *args, "--run-dir", tmp_path / "killed")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not list((tmp_path / "killed").glob(f"*/{script.CHECKPOINT}")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(random.uniform(0.0, 0.4))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run = only_run(tmp_path / "killed")
    resumed = start(script, "--resume", run)
    assert resumed.returncode == 0, resumed.stderr
    assert outcome(script, run) == outcome(script, only_run(tmp_path / "whole"))


def test_killed_before_its_first_checkpoint_it_begins_anew(script, tmp_path, monkeypatch):
    script.train(little_args(script, tmp_path / "whole"), make=corridor(script))
    interrupted = little_args(script, tmp_path / "killed")
    with monkeypatch.context() as patch:
        interrupted_at(script, patch, 40)
        with pytest.raises(KeyboardInterrupt):
            script.train(interrupted, make=corridor(script))
    run = only_run(tmp_path / "killed")
    assert not (run / script.CHECKPOINT).exists()
    with pytest.raises(FileNotFoundError):
        script.load(run, *spaces(script))
    script.train(dataclasses.replace(interrupted, resume=str(run)), make=corridor(script))
    assert outcome(script, run) == outcome(script, only_run(tmp_path / "whole"))


def spaces(script: ModuleType) -> tuple[gym.Space, gym.Space]:
    env = corridor(script)()
    return env.observation_space, env.action_space


def test_a_run_can_be_made_longer_and_is_then_as_one_long_run(script, tmp_path, monkeypatch):
    args = [*in_corridor(script), "--eval-every", 10**6, "--eval-episodes", 1]
    run_script(script, monkeypatch, *args, "--total-timesteps", 150, "--run-dir", tmp_path / "a")
    run = only_run(tmp_path / "a")
    run_script(script, monkeypatch, "--resume", run, "--total-timesteps", 260)
    run_script(script, monkeypatch, *args, "--total-timesteps", 260, "--run-dir", tmp_path / "b")
    longer, whole = learned(script, run), learned(script, only_run(tmp_path / "b"))
    assert result(run) == result(only_run(tmp_path / "b"))
    assert longer["episodes"] == whole["episodes"]
    assert script.saved_args(run).total_timesteps == 260
    curves = [
        [point for point in scalars(folder) if point[0].startswith("charts/epi")]
        for folder in (run, only_run(tmp_path / "b"))
    ]
    assert curves[0] == curves[1]
    assert any(step > 150 for _, step, _ in curves[0])


def test_a_finished_run_is_not_changed_by_resuming_nor_by_evaluating_it(script, tmp_path, monkeypatch, capsys):
    run_script(script, monkeypatch, *in_corridor(script), *SMALL, "--run-dir", tmp_path)
    run = only_run(tmp_path)
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    (mean,) = re.findall("step 600: (return .*)", capsys.readouterr().out)
    run_script(script, monkeypatch, "--evaluate", run)
    assert f"step 600: {mean}\n" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before
    run_script(script, monkeypatch, "--evaluate", run, "--eval-episodes", 1, "--capture-video")
    after = {file.name: file.read_bytes() for file in run.iterdir()}
    assert after.pop("step_600.gif")[:3] == b"GIF"
    assert after == before
    (run / "step_600.gif").unlink()
    kept = outcome(script, run)
    run_script(script, monkeypatch, "--resume", run)
    assert outcome(script, run) == kept
    assert {file.name for file in run.iterdir()} == set(before)


def test_capture_video_records_the_first_episode_as_a_gif(script, tmp_path):
    from PIL import Image

    script.train(little_args(script, tmp_path, capture_video=True, eval_every=200), make=corridor(script))
    video = Image.open(only_run(tmp_path) / "step_200.gif")
    assert video.size == (80, 16)
    assert video.n_frames > 1


def test_what_is_logged_is_new(script, tmp_path):
    script.train(little_args(script, tmp_path, total_timesteps=400, eval_every=10**6), make=corridor(script))
    points = scalars(only_run(tmp_path), "model/state_action_pairs")
    for tag in {tag for tag, _, _ in points if tag.startswith(("losses/", "model/"))}:
        series = [(step, value) for name, step, value in points if name == tag]
        assert len({step for step, _ in series}) == len(series)
        again = [two for one, two in itertools.pairwise(series) if one[1] == two[1] and one[1] % 1]  # counts may be
        assert len(again) <= len(series) // 3, (tag, series)


def test_a_full_disk_keeps_the_last_checkpoint(script, tmp_path, monkeypatch, capsys):
    words = [*in_corridor(script), "--total-timesteps", 120, "--checkpoint-every", 40]
    words += ["--eval-every", 10**6, "--eval-episodes", 1]
    run_script(script, monkeypatch, *words, "--run-dir", tmp_path / "whole")
    with monkeypatch.context() as patch:
        full_disk(script, patch, 2)
        line = complaint(script, patch, capsys, *words, "--run-dir", tmp_path / "full")
    assert "No space left on device" in line
    run = only_run(tmp_path / "full")
    assert checkpoint(script, run)["run"][0] == 40
    run_script(script, monkeypatch, "--resume", run)
    assert outcome(script, run) == outcome(script, only_run(tmp_path / "whole"))


# --- what was trained -------------------------------------------------------------------------------------------------
def test_a_run_is_loaded_as_the_agent_that_it_ended_with(script, tmp_path):
    changes = {"device": "cpu"} if script.__name__ in NEURAL else {"seed": 5}
    script.train(little_args(script, tmp_path), make=corridor(script))
    run = only_run(tmp_path)
    agent = script.load(str(run), *spaces(script), **changes)
    assert plain(agent.state_dict()) == learned(script, run)["agent"]
    assert {name: getattr(agent.args, name) for name in changes} == changes
    env = corridor(script)()
    for episode in range(2):
        obs, info = env.reset(seed=episode)
        policy = agent.greedy_policy(seed=episode)
        for _ in range(4):
            action = policy(obs, info) if episode else policy(obs)
            assert action in env.action_space
            obs, _, _, _, info = env.step(action)


def own_loop(script: ModuleType, agent: Any, env: gym.Env, obs: Any, steps: int) -> tuple[list, Any]:
    """A loop of one's own; returns the actions taken and the last observation."""
    actions = []
    for _ in range(steps):
        actions.append(action := agent.act(obs))
        next_obs, reward, terminated, truncated, _ = env.step(action)
        agent.observe(obs, action, reward, next_obs, terminated, truncated)
        agent.update()
        obs = env.reset()[0] if terminated or truncated else next_obs
    return actions, obs


def agent_and_world(script: ModuleType, **fields: Any) -> tuple[Any, gym.Env]:
    fields |= {"num_envs": 1} if hasattr(script.Args(), "num_envs") else {}
    env = corridor(script)()
    return script.Agent(env.observation_space, env.action_space, tiny_args(script, **fields)), env


def test_an_agent_can_be_driven_from_a_loop_of_ones_own(script):
    agent, env = agent_and_world(script, seed=3)
    actions, obs = own_loop(script, agent, env, env.reset(seed=0)[0], 500 if script.__name__ in TABULAR else 200)
    assert len({np.asarray(action).tobytes() for action in actions}) > 1
    policy = agent.greedy_policy(seed=0)
    if script.__name__ in TABULAR:
        assert [policy(state) for state in range(4)] == [1, 1, 1, 1]
    assert policy(obs) in env.action_space
    assert all(np.isfinite(value) for value in agent.metrics().values() if np.ndim(value) == 0)


def deep_copy(agent: Any) -> Any:
    return copy.deepcopy(agent)


def pickled(agent: Any) -> Any:
    return pickle.loads(pickle.dumps(agent))


@pytest.mark.parametrize("twin", [deep_copy, pickled])
def test_a_copy_of_an_agent_goes_on_like_the_original(script, twin):
    agent, env = agent_and_world(script, seed=3)
    _, obs = own_loop(script, agent, env, env.reset(seed=0)[0], 130)
    other, other_env = twin(agent), copy.deepcopy(env)
    before = plain(other.state_dict())
    actions, _ = own_loop(script, agent, env, obs, 60)
    assert plain(other.state_dict()) == before  # it shares nothing with the original
    other_actions, _ = own_loop(script, other, other_env, obs, 60)
    np.testing.assert_equal(other_actions, actions)
    assert plain(other.state_dict()) == plain(agent.state_dict()) != before


def test_the_state_of_an_agent_is_saved_and_loaded_in_two_lines(script, tmp_path):
    agent, env = agent_and_world(script, seed=3)
    _, obs = own_loop(script, agent, env, env.reset(seed=0)[0], 130)
    other, _ = agent_and_world(script, seed=3)
    if script.__name__ in TABULAR:
        (tmp_path / "agent.txt").write_text(repr(agent.state_dict()))
        other.load_state_dict(ast.literal_eval((tmp_path / "agent.txt").read_text()))
    else:
        import torch

        torch.save(agent.state_dict(), tmp_path / "agent.pt")
        other.load_state_dict(torch.load(tmp_path / "agent.pt", weights_only=True))
    other_env = copy.deepcopy(env)
    np.testing.assert_equal(own_loop(script, other, other_env, obs, 60)[0], own_loop(script, agent, env, obs, 60)[0])
    assert plain(other.state_dict()) == plain(agent.state_dict())


def test_what_an_agent_keeps_is_a_copy(script):
    """An environment may write every observation into the same array, and the loop reuse its action."""
    kept = []
    for reuse in (False, True):
        agent, env = agent_and_world(script, seed=3)
        array, action_array = np.zeros(1), np.zeros(1, np.float32)
        obs, _ = env.reset(seed=0)
        for _ in range(130):
            if reuse and script.__name__ in CORRIDOR:
                array[:] = obs
                action_array[:] = agent.act(array)
                next_obs, reward, terminated, truncated, _ = env.step(action_array)
                agent.observe(array.copy(), action_array, reward, following := next_obs.copy(), terminated, truncated)
                following[:] = action_array[:] = 7
            else:
                action = agent.act(obs)
                next_obs, reward, terminated, truncated, _ = env.step(action)
                agent.observe(obs, action, reward, next_obs, terminated, truncated)
            agent.update()
            obs = env.reset()[0] if terminated or truncated else next_obs
        kept.append(plain(agent.state_dict()))
    assert kept[0] == kept[1]


# --- bad input: one line, status 2 ------------------------------------------------------------------------------------
BAD_ARGS = {
    "": [
        ("--env-id Nope-v0", "Nope.*doesn't exist"),
        ("--env-id FrozenLake-v9", "v9"),
        ("--env-id no_such_package:Nope-v0", "no_such_package"),
        ("--env-id Nowhere/Pong-v5", "Namespace Nowhere not found"),
        ("--env-kwargs nonsense 1", "nonsense"),
        ("--total-timesteps -1", "--total-timesteps"),
        ("--seed -1", "--seed"),
        ("--eval-every 0", "--eval-every"),
        ("--eval-episodes 0", "--eval-episodes"),
        ("--checkpoint-every 0", "--checkpoint-every"),
        ("--run-dir /dev/null/runs", "Not a directory"),
        ("--resume /no/such/folder", "/no/such/folder"),
        ("--evaluate /no/such/folder", "/no/such/folder"),
        ("--gamma 1.5", "--gamma"),
        ("--gamma nan", "--gamma"),
    ],
    "dyna_q dyna_q_plus": [
        ("--env-id Pendulum-v1", "Box.*cem_mpc.py"),
        ("--env-id CartPole-v1", "Box.*muzero.py"),
        ("--total-timesteps 0", "--total-timesteps"),
        ("--alpha nan", "--alpha"),
        ("--alpha 2", "--alpha"),
        ("--epsilon -0.1", "--epsilon"),
        ("--n-planning -1", "--n-planning"),
    ],
    "dyna_q_plus": [("--kappa -1", "--kappa"), ("--kappa nan", "--kappa")],
    "cem_mpc mbpo muzero dreamer": [
        ("--device mps", "there is none that PyTorch can use|mps"),
        ("--threads 0", "--threads"),
    ],
    "cem_mpc mbpo": [
        ("--env-id FrozenLake-v1", "must be a Box.*dyna_q.py"),
        ("--num-elites 4", "--num-elites must be from 1 to 3"),
        ("--hidden 16", "--weight-decay needs one value more"),
        ("--hidden 16 0", "at least 1"),
        ("--model-lr nan", "--model-lr"),
        ("--ensemble-size 0", "--(ensemble-size|num-elites)"),
        ("--reward-fn nonsense", "No module named 'nonsense'"),
        ("--reward-fn math:nonsense", "'math' has no attribute 'nonsense'"),
        ("--termination-fn no_such_module:f", "No module named 'no_such_module'"),
    ],
    "cem_mpc": [
        ("--env-id CartPole-v1 --planner icem", "--planner must be cem"),
        ("--horizon 0", "--horizon"),
        ("--num-best 9", "--num-best must be from 1 to 8"),
        ("--particles 3", "multiple of --num-elites"),
        ("--init-from /no/such/folder", "/no/such/folder"),
    ],
    "mbpo": [
        ("--env-id CartPole-v1", "must be a bounded Box.*cem_mpc.py"),
        ("--total-timesteps 0", "--total-timesteps"),
        ("--real-ratio 1.5", "--real-ratio"),
        ("--batch-size 0", "--batch-size"),
        ("--tau nan", "--tau"),
        ("--target-entropy nan", "--target-entropy"),
        ("--critic-dropout 1", "--critic-dropout"),
        ("--policy-hidden 16 0", "--policy-hidden"),
        ("--rollout-schedule 10 5 1 1", "the second one later"),
        ("--rollout-schedule 0 1 2 1", "two lengths from 1"),
        ("--rollouts 0", "--rollouts"),
        ("--max-disagreement 0", "--max-disagreement"),
    ],
    "muzero": [
        ("--total-timesteps 0", "--total-timesteps"),
        ("--gamma -0.5", "--gamma must be -1 in self-play"),
        ("--eval-env-kwargs no_such_option 1", "no_such_option"),
        ("--env-id Pendulum-v1", "actions must be Discrete.*cem_mpc.py"),
        ("--env-id Blackjack-v1", "must be Discrete, a picture .* not Tuple"),
        ("--network conv", "--network conv is for observations .height, width, channels."),
        ("--consistency-weight -1", "--consistency-weight"),
        ("--reanalyze-ratio nan", "--reanalyze-ratio"),
        ("--td-steps 100000", "--td-steps"),
        ("--num-envs 0", "--num-envs"),
        ("--num-simulations 0", "--num-simulations"),
        ("--temperature 0", "--temperature"),
        ("--unroll-steps -1", "--unroll-steps"),
        ("--support 0", "--support"),
        ("--learning-rate nan", "--learning-rate"),
    ],
    "dreamer": [
        ("--total-timesteps 0", "--total-timesteps"),
        ("--env-id Blackjack-v1", "observations must be .* not Tuple"),
        ("--horizon 0", "--horizon"),
        ("--batch-length 0", "--batch-length"),
        ("--train-ratio nan", "--train-ratio"),
        ("--entropy-scale -1", "--entropy-scale"),
        ("--replay-size 8", "more than one sequence of each environment"),
    ],
}


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [(name, *case) for scripts, cases in BAD_ARGS.items() for case in cases for name in scripts.split() or SCRIPTS],
)
def test_bad_arguments_are_one_line_and_leave_no_folder(name, monkeypatch, capsys, tmp_path, args, expected):
    script = importlib.import_module(name)
    line = complaint(script, monkeypatch, capsys, "--run-dir", tmp_path, *args.split())
    assert re.search(expected, line), line
    assert not list(tmp_path.iterdir())


def test_where_nothing_is_drawn_it_is_told_before_the_training(script, monkeypatch, capsys, tmp_path):
    words = ["--env-id", "Blind-v0", "--env-kwargs", "box", script.__name__ in CORRIDOR, "--capture-video"]
    line = complaint(script, monkeypatch, capsys, "--run-dir", tmp_path, *words)
    assert "picture" in line
    assert not list(tmp_path.iterdir())


class Blind(Corridor):
    def render(self) -> None:
        return None


gym.register("Blind-v0", entry_point=Blind, disable_env_checker=True)


def test_folders_that_cannot_be_used_are_one_line(script, monkeypatch, capsys, tmp_path):
    run_script(script, monkeypatch, *in_corridor(script), *SHORT, "--run-dir", tmp_path)
    run = only_run(tmp_path)
    args = run / "args.json"
    text = args.read_text()
    assert "--resume may change total_timesteps, eval_every" in complaint(
        script, monkeypatch, capsys, "--resume", run, "--gamma", 0.5
    )
    assert "not evaluate" in complaint(script, monkeypatch, capsys, "--resume", run, "--evaluate", run)
    other_fields = text.replace('"gamma"', '"gama"')
    other_value = text.replace('"seed": 1', '"seed": -1')
    other_script = text.replace(f'"script": "{script.__name__}"', '"script": "other"')
    for damaged in ("", "{", "[]", "{}", "null", f'{{"script": "{script.__name__}"}}', other_fields, other_value):
        args.write_text(damaged)
        for option in ("--resume", "--evaluate"):
            assert str(run) in complaint(script, monkeypatch, capsys, option, run)
        assert args.read_text() == damaged
    args.write_text(other_script)
    assert "of other.py" in complaint(script, monkeypatch, capsys, "--evaluate", run)
    for option in ("--resume", "--evaluate"):
        for folder in (tmp_path, ""):  # a variable of the shell that is not set
            assert "args.json" in complaint(script, monkeypatch, capsys, option, folder)


class Bomb:
    """What a pickle can do: it runs code where it is opened."""

    def __reduce__(self) -> tuple:
        return exec, ("import conftest; conftest.exploded = True",)


def damages(whole: bytes, rng: random.Random) -> list[bytes]:
    """Cut, empty, foreign, hostile, and with a bit or many flipped."""
    found = [b"", b"not a checkpoint", b"[]", b"{}", whole[:-1], whole[: len(whole) // 2], whole[: len(whole) // 50]]
    found += [pickle.dumps(Bomb()), pickle.dumps({"agent": Bomb()}, protocol=2), torch_bomb()]
    found += [b"__import__('conftest').__setattr__('exploded', True)", b"{'agent': exec('import conftest')}"]
    for count in 16 * [1] + [10, 1_000]:
        flipped = bytearray(whole)
        for _ in range(count):
            flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        found.append(bytes(flipped))
    return found


def torch_bomb() -> bytes:
    """A pickle where `torch.save` would put it."""
    import io
    import zipfile

    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def test_damaged_and_hostile_checkpoints_are_one_line_or_load_and_run_no_code(script, tmp_path, monkeypatch, capsys):
    run_script(script, monkeypatch, *in_corridor(script), *SHORT, "--run-dir", tmp_path)
    run = only_run(tmp_path)
    path, refused = run / script.CHECKPOINT, []
    for damage in damages(path.read_bytes(), random.Random(0)):
        path.write_bytes(damage)
        try:
            script.load(run)
        except Exception:
            refused.append(damage)
            complaint(script, monkeypatch, capsys, ("--resume", "--evaluate")[len(refused) % 2], run)
        assert path.read_bytes() == damage
        assert not hasattr(sys.modules["conftest"], "exploded")
    assert len(refused) >= 12
