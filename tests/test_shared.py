"""What holds for every script: the shared blocks, the command line, the run folder, exact resume, bad input."""

import ast
import dataclasses
import gzip
import importlib
import inspect
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from conftest import (
    CORRIDOR,
    NEURAL,
    ROOT,
    SCRIPTS,
    TABULAR,
    command,
    learned,
    only_run,
    plain,
    result,
    scalars,
    start,
    tiny_args,
    with_tiny,
)

SHARED_FIELDS = [
    "env_id",
    "env_kwargs",
    "total_timesteps",
    "seed",
    "device",
    "threads",
    "compile",
    "eval_every",
    "eval_episodes",
    "checkpoint_every",
    "run_dir",
    "resume",
    "evaluate",
    "capture_video",
]
SHARED_BLOCKS = [
    "Failure",
    "check_ranges",
    "memory_of",
    "Episode",
    "CHANGEABLE",
    "seed_of",
    "parse_args",
    "saved_args",
    "Run",
    "write_json",
    "provenance",
    "main",
]
FAMILY_BLOCKS = ["write_checkpoint", "read_checkpoint", "CHECKPOINT"]
VECTORS, IMAGES = ["cem_mpc", "mbpo", "muzero"], ["muzero", "dreamer"]
TABULAR_BLOCKS = ["Maze", "DYNA_MAZE", "table_key", "random_argmax", "draw_grid", "train"]
ENSEMBLE = ["cem_mpc", "mbpo"]
ENSEMBLE_BLOCKS = ["Layers", "Networks", "mlp", "Ensemble", "ensemble_losses", "ensemble_loss", "fit", "diagnose"]
ENSEMBLE_BLOCKS += ["Buffer", "load_function", "bounded", "Agent.relabel", "train"]
LITTLE = {"total_timesteps": 500, "eval_episodes": 2}
SMALL = ["--total-timesteps", "600", "--eval-every", "300", "--checkpoint-every", "200", "--eval-episodes", "2"]


def source(script: ModuleType, name: str) -> str:
    """The text of a top-level definition, of a method (`Agent.act`) or of the assignments to a name."""
    text = inspect.getsource(script)
    found = [ast.parse(text)]
    for part in name.split("."):
        found = [node for node in found[0].body if part in {getattr(node, "name", None), *targets(node)}]
        assert found, f"{script.__name__} has no {name}"
    return "\n".join(ast.get_source_segment(text, node) for node in found)


def targets(node: ast.stmt) -> set[str]:
    names = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {name.id for name in names if isinstance(name, ast.Name)}


BLOCKS = [(SCRIPTS, name) for name in SHARED_BLOCKS] + [(TABULAR, name) for name in TABULAR_BLOCKS]
BLOCKS += [(ENSEMBLE, name) for name in ENSEMBLE_BLOCKS]
BLOCKS += [(TABULAR + ENSEMBLE, "make_env"), (VECTORS, "check_observation"), (TABULAR, "check_observation")]
BLOCKS += [(IMAGES, name) for name in ("make_env", "wrap")] + [([*ENSEMBLE, *IMAGES], "find_device")]
BLOCKS += [(family, name) for family in (TABULAR, NEURAL) for name in FAMILY_BLOCKS]
# muzero.py plays the episodes of an evaluation side by side.
BLOCKS += [([*TABULAR, *ENSEMBLE, "dreamer"], name) for name in ("make_eval_envs", "greedy_episodes")]


@pytest.mark.parametrize(("scripts", "name"), BLOCKS)
def test_shared_blocks_are_equal_word_for_word(scripts, name):
    texts = {source(importlib.import_module(script), name) for script in scripts}
    if name in ("seed_of", "train"):  # their docstrings list the purposes, and name the algorithm
        texts = {re.sub('""".*?"""', "", text, flags=re.DOTALL) for text in texts}
    assert len(texts) == 1


def test_shared_fields_come_first_and_are_the_same(script):
    fields = dataclasses.fields(script.Args)
    names = [
        name for name in SHARED_FIELDS if script.__name__ not in TABULAR or name not in ("device", "threads", "compile")
    ]
    assert [field.name for field in fields[: len(names)]] == names
    first = {field.name: field for field in dataclasses.fields(importlib.import_module(SCRIPTS[0]).Args)}
    for field in fields[: len(names)]:
        if other := first.get(field.name):
            assert field.type == other.type
            assert (
                docs(script)[field.name].split(". Built in")[0] in docs(importlib.import_module(SCRIPTS[0]))[field.name]
            )
            if field.name not in ("env_id", "total_timesteps", "checkpoint_every"):
                assert field.default == other.default


def docs(script: ModuleType) -> dict[str, str]:
    """The docstring of every field."""
    (args,) = (node for node in ast.parse(inspect.getsource(script)).body if getattr(node, "name", "") == "Args")
    body = [node for node in args.body if not isinstance(node, ast.FunctionDef)][1:]
    assert len(body) % 2 == 0
    return {field.target.id: doc.value.value.rstrip(".") for field, doc in zip(body[::2], body[1::2], strict=True)}


def test_sections_stand_in_the_same_order(script):
    banners = re.findall(r"^# -+\n# (\w+)\n# -+$", inspect.getsource(script), re.MULTILINE)
    order = ["Args", "Environment", "Model", "Buffer", "Planner", "Agent", "Run", "Train"]
    assert banners == [name for name in order if name in banners]
    assert {"Args", "Environment", "Model", "Planner", "Agent", "Run", "Train"} <= set(banners)


def test_every_field_has_a_docstring(script):
    texts = docs(script)
    assert list(texts) == [field.name for field in dataclasses.fields(script.Args)]
    assert all(len(text) > 20 for text in texts.values())


def test_header_names_exactly_what_the_script_imports(script):
    text = inspect.getsource(script)
    (block,) = re.findall(r"^# /// script\n(.*?)^# ///$", text, re.MULTILINE | re.DOTALL)
    header = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.MULTILINE))
    declared = {re.split(r"[><=\[]", package)[0] for package in header["dependencies"]}
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    third_party = {"pillow" if name == "PIL" else name for name in imported - set(sys.stdlib_module_names)}
    assert declared == third_party


@pytest.mark.parametrize("name", TABULAR)
def test_a_tabular_script_does_not_load_torch(name):
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_copied_alone_to_an_empty_folder_it_runs(script, tmp_path):
    shutil.copy(ROOT / f"{script.__name__}.py", tmp_path)
    words = [sys.executable, f"{script.__name__}.py", *with_tiny(script.__name__, SMALL)]
    process = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    run = only_run(tmp_path / "runs")
    assert f"tensorboard --logdir {run.relative_to(tmp_path)}" in process.stdout
    assert re.fullmatch(rf"\w+-v\d__{script.__name__}__1__\d{{8}}T\d{{6}}\.\d+", run.name)
    saved = json.loads((run / "args.json").read_text())
    assert saved["args"]["total_timesteps"] == 600
    assert [made["versions"]["numpy"] for made in saved["made_with"]] == [np.__version__]
    outcome = result(run)
    assert outcome["env_steps"] == 600
    assert outcome["eval_episodes"] == 2
    points = scalars(run)
    for tag in ("charts/episodic_return", "charts/episodic_length"):
        assert sum(name == tag for name, _, _ in points) == outcome["episodes"]
    assert sum(value for tag, _, value in points if tag == "charts/episodic_length") <= 600
    assert [step for tag, step, _ in points if tag == "eval/episodic_return"] == [300, 600]
    last = [value for tag, _, value in points if tag == "eval/episodic_return"][-1]
    assert last == pytest.approx(outcome["eval_return_mean"], rel=1e-6)  # events are in single precision
    assert {"charts/SPS", "eval/episodic_length"} < {tag for tag, _, _ in points}


def test_same_seed_same_run_other_seed_other_run(script, tmp_path):
    runs = []
    for number, seed in enumerate((1, 1, 2)):
        script.train(tiny_args(script, run_dir=str(tmp_path / str(number)), **LITTLE, eval_every=250, seed=seed))
        runs.append(only_run(tmp_path / str(number)))
    first, second, other = ((learned(script, run), scalars(run, "charts/SPS"), result(run)) for run in runs)
    assert first == second
    assert first[0]["agent"] != other[0]["agent"]


def test_evaluation_does_not_touch_learning(script, tmp_path):
    for number, every in enumerate((100, 10_000)):
        script.train(tiny_args(script, run_dir=str(tmp_path / str(number)), **LITTLE, eval_every=every))
    often, once = (learned(script, only_run(tmp_path / str(number))) for number in (0, 1))
    assert often["agent"] == once["agent"]
    assert often["episodes"] == once["episodes"]


@pytest.mark.parametrize("kills", [1, 3])
def test_killed_at_random_moments_and_resumed_it_ends_as_if_never_killed(script, tmp_path, kills):
    long, often = (12_000, 100) if script.__name__ in TABULAR else (500, 20)
    args = ["--total-timesteps", long, "--checkpoint-every", often, "--eval-every", 5 * often, "--eval-episodes", 1]
    assert start(script, *args, "--run-dir", tmp_path / "whole").returncode == 0
    process = subprocess.Popen(
        command(script, *args, "--run-dir", tmp_path / "killed"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for _ in range(kills):
        while not list((tmp_path / "killed").glob(f"*/{script.CHECKPOINT}")):
            time.sleep(0.01)
        time.sleep(random.uniform(0.0, 0.8))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        run = only_run(tmp_path / "killed")
        process = subprocess.Popen(
            command(script, "--resume", run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    whole = only_run(tmp_path / "whole")
    assert learned(script, run) == learned(script, whole)
    assert scalars(run, "charts/SPS") == scalars(whole, "charts/SPS")
    assert result(run) == result(whole)


@pytest.mark.parametrize("name", ["muzero", "dreamer"])
def test_games_of_atari_have_the_limit_that_the_emulator_has(name, monkeypatch):
    script, asked = importlib.import_module(name), {}

    def make(env_id: str, **kwargs: object) -> None:
        asked.update(kwargs)
        raise gym.error.Error("enough")

    monkeypatch.setattr(script.gym, "make", make)
    with pytest.raises(script.Failure, match="enough"):
        script.make_env(script.Args(env_id="ALE/Pong-v5", atari=True))
    assert asked == {"frameskip": 1, "max_episode_steps": 108_000}


def test_a_checkpoint_holds_no_nan_though_logs_are_further_apart(script, tmp_path):
    class Agent:
        def metrics(self) -> dict:
            return {"losses/loss": math.nan}

        def state_dict(self) -> dict:
            return {}

    args = tiny_args(script, total_timesteps=1_000, checkpoint_every=5, eval_every=10**6, run_dir=str(tmp_path))
    run = script.Run(args, Agent(), [])
    with pytest.raises(script.Failure, match="losses/loss is nan"):
        for _ in run.steps():
            pass
    assert run.step == 5
    assert not list(tmp_path.glob("*/*checkpoint*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_the_command_to_continue(script, tmp_path, number):
    long = 20_000 if script.__name__ in TABULAR else 500
    args = ["--total-timesteps", long, "--checkpoint-every", 10**9, "--eval-every", 10**9, "--eval-episodes", 1]
    process = subprocess.Popen(
        command(script, *args, "--run-dir", tmp_path / "a"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not list((tmp_path / "a").glob("*/events*")):
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    run = only_run(tmp_path / "a")
    assert process.returncode == 128 + number, stderr
    assert f"python {script.__name__}.py --resume {run}" in stdout
    assert "stopping after this step" in stderr
    assert 0 < script.read_checkpoint(run / script.CHECKPOINT)["step"] < long
    assert start(script, "--resume", run).returncode == 0
    assert start(script, *args, "--run-dir", tmp_path / "b").returncode == 0
    assert learned(script, run) == learned(script, only_run(tmp_path / "b"))


def test_stopped_at_once_it_says_where_it_goes_on(script, monkeypatch, capsys):
    def interrupted(args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "train", interrupted)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 130
    assert "--resume goes back to the run's last checkpoint" in capsys.readouterr().err


def test_a_checkpoint_soon_after_resuming_knows_where_the_events_end(script, tmp_path, monkeypatch):
    script.train(tiny_args(script, run_dir=str(tmp_path), **LITTLE))
    run, save = only_run(tmp_path), script.Run.save
    with open(run / "events.out.tfevents.0", "ab") as file:
        file.write(bytes(100))  # logged after the checkpoint, before it was killed

    def stop(self: Any) -> None:
        save(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(script.Run, "save", stop)
    fields = script.saved_args(str(run))
    longer = {"resume": str(run), "total_timesteps": 10**6, "checkpoint_every": 1, "eval_every": 10**6}
    with pytest.raises(KeyboardInterrupt):
        script.train(dataclasses.replace(fields, **longer))
    assert script.read_checkpoint(run / script.CHECKPOINT)["events"] == (run / "events.out.tfevents.0").stat().st_size


def test_a_run_can_be_made_longer(script, tmp_path, monkeypatch):
    run_script(script, monkeypatch, "--total-timesteps", 700, "--run-dir", tmp_path / "a")
    run = only_run(tmp_path / "a")
    run_script(script, monkeypatch, "--resume", run, "--total-timesteps", 1_500)
    run_script(script, monkeypatch, "--total-timesteps", 1_500, "--run-dir", tmp_path / "b")
    longer, whole = learned(script, run), learned(script, only_run(tmp_path / "b"))
    assert longer["agent"] == whole["agent"]
    assert longer["returns"] == whole["returns"]


def test_a_run_says_all_that_it_was_made_with(script, tmp_path, monkeypatch):
    run_script(script, monkeypatch, *SMALL, "--run-dir", tmp_path)
    run = only_run(tmp_path)
    first = json.loads((run / "args.json").read_text())["made_with"]
    run_script(script, monkeypatch, "--resume", run)
    assert json.loads((run / "args.json").read_text())["made_with"] == first
    monkeypatch.setattr(script, "provenance", lambda: {"versions": {}, "git_commit": "another"})
    run_script(script, monkeypatch, "--resume", run)
    assert json.loads((run / "args.json").read_text())["made_with"] == [*first, script.provenance()]


def test_resuming_a_finished_run_changes_nothing(script, tmp_path, monkeypatch):
    run_script(script, monkeypatch, *SMALL, "--run-dir", tmp_path)
    run = only_run(tmp_path)
    state = script.read_checkpoint(run / script.CHECKPOINT)
    script.write_checkpoint(run / script.CHECKPOINT, state | {"seconds": 1_000.0})
    before = learned(script, run), scalars(run), result(run)
    run_script(script, monkeypatch, "--resume", run)
    assert (learned(script, run), scalars(run), result(run)) == before
    assert json.loads((run / "result.json").read_text())["wall_seconds"] > 1_000  # the time of all its parts


def test_evaluate_changes_nothing_in_the_folder(script, tmp_path, monkeypatch, capsys):
    run_script(script, monkeypatch, *SMALL, "--run-dir", tmp_path)
    run = only_run(tmp_path)
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    capsys.readouterr()
    run_script(script, monkeypatch, "--evaluate", run, "--eval-episodes", 2)
    mean = result(run)["eval_return_mean"]
    assert f"evaluation return {mean:.4g}" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before


def test_capture_video_records_a_gif(script, tmp_path):
    from PIL import Image

    fields = {"env_id": CORRIDOR.get(script.__name__, "Corridor-v0"), "total_timesteps": 200, "eval_every": 200}
    script.train(tiny_args(script, run_dir=str(tmp_path), capture_video=True, **fields))
    video = Image.open(only_run(tmp_path) / "videos" / "step_200.gif")
    assert video.n_frames >= 4
    assert video.size == (80, 16)


# --- bad input: one line, status 2 -----------------------------------------------------------------------------------
def run_script(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    """The command line without a process of its own."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, with_tiny(script.__name__, args))])
    script.main()


def complaint(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *args: object) -> str:
    """Runs a command that has to fail as bad input has to; returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_script(script, monkeypatch, *args)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "WARN" not in line and "logger." not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{script.__name__}.py: error: ")
    return lines[0]


BAD_ARGS = {
    "": [
        ("--env-id Nope-v0", "`Nope` doesn't exist.*module:Name-v0"),
        ("--env-id FrozenLake-v9", "version `v9`"),
        ("--env-id no_such_package:Nope-v0", "no_such_package"),
        ("--env-id Nowhere/Pong-v5", "Namespace Nowhere not found"),
        ("--env-id Taxi-v3", "Taxi-v4"),
        ("--env-kwargs slippery", "name=value, not slippery"),
        ("--env-kwargs nonsense=1", "nonsense"),
        ("--total-timesteps -1", "--total-timesteps must be at least 0"),
        ("--seed -1", "--seed must be"),
        ("--eval-every 0", "--eval-every must be"),
        ("--eval-episodes 0", "--eval-episodes must be"),
        ("--checkpoint-every 0", "--checkpoint-every must be"),
        ("--run-dir /dev/null/runs", "Not a directory"),
        ("--resume /no/such/folder", "/no/such/folder is not a run folder"),
        ("--evaluate /no/such/folder", "/no/such/folder is not a run folder"),
    ],
    "dyna_q dyna_q_plus cem_mpc mbpo muzero": [
        ("--gamma 1.5", "--gamma must be from (0|-1) to 1, not 1.5"),
        ("--gamma nan", "--gamma must be from (0|-1) to 1, not nan"),
    ],
    "dyna_q dyna_q_plus": [
        ("--env-id Pendulum-v1", "Discrete.*cem_mpc.py"),
        ("--env-id CartPole-v1", "small bounded Box, not .*muzero.py"),
        ("--alpha 0", "--alpha must be from"),
        ("--alpha nan", "--alpha must be from"),
        ("--epsilon -0.1", "--epsilon must be"),
        ("--n-planning -1", "--n-planning must be"),
        ("--initial-q inf", "--initial-q must be"),
    ],
    "dyna_q_plus": [("--kappa -1", "--kappa must be")],
    "cem_mpc": [
        ("--env-id FrozenLake-v1", "must be a Box.*dyna_q.py"),
        ("--env-id CartPole-v1 --planner icem", "icem is not for Discrete.*random_shooting, cem"),
        ("--device mps", "there is none that PyTorch can use"),
        ("--threads 0", "--threads must be"),
        ("--horizon 0", "--horizon must be"),
        ("--num-best 9", "--num-best must be from 1 to 8"),
        ("--num-elites 4", "--num-elites must be from 1 to 3"),
        ("--particles 3", "multiple of --num-elites"),
        ("--hidden 16", "--weight-decay needs one value more"),
        ("--hidden 16 0", "at least 1"),
        ("--model-lr nan", "--model-lr must be"),
        ("--temperature 0", "--temperature must be"),
        ("--reward-fn nonsense", "module:function"),
        ("--reward-fn math:nonsense", "math:nonsense"),
        ("--termination-fn no_such_module:f", "no_such_module"),
        ("--init-from /no/such/folder", "/no/such/folder is not a run folder"),
    ],
    "muzero": [
        ("--gamma -0.5", "--gamma must be -1 in self-play"),
        ("--eval-env-kwargs no_such_option=1", "no_such_option"),
        ("--env-id Pendulum-v1", "actions must be Discrete.*cem_mpc.py"),
        ("--env-id Blackjack-v1", "must be Discrete, an image .* not Tuple"),
        ("--network conv", "--network conv is for observations .height, width, channels."),
        ("--consistency-weight -1", "--consistency-weight must be"),
        ("--reanalyze-ratio nan", "--reanalyze-ratio must be"),
        ("--td-steps 201", "--td-steps must be"),
        ("--play /no/such/folder", "/no/such/folder is not a run folder"),
        ("--num-envs 0", "--num-envs must be"),
        ("--num-simulations 0", "--num-simulations must be"),
        ("--temperature 0", "--temperature must be"),
        ("--unroll-steps -1", "--unroll-steps must be"),
        ("--support 0", "--support must be"),
        ("--learning-rate nan", "--learning-rate must be"),
        ("--env-id TicTacToe-v0 --env-kwargs opponent=9", "--gamma must be -1 in self-play, and from 0 on with"),
        ("--env-id TicTacToe-v0 --gamma 0.99", "--gamma must be -1 in self-play"),
    ],
    "dreamer": [
        ("--env-id Blackjack-v1", "observations must be .* not Tuple"),
        ("--horizon 0", "--horizon must be"),
        ("--batch-length 0", "--batch-length must be"),
        ("--train-ratio nan", "--train-ratio must be"),
        ("--entropy-scale -1", "--entropy-scale must be"),
        ("--replay-size 8", "more than one sequence of each environment"),
        ("--device mps", "there is none that PyTorch can use"),
    ],
    "mbpo": [
        ("--env-id FrozenLake-v1", "must be a Box.*dyna_q.py"),
        ("--env-id CartPole-v1", "must be a bounded Box.*cem_mpc.py"),
        ("--device mps", "there is none that PyTorch can use"),
        ("--threads 0", "--threads must be"),
        ("--real-ratio 1.5", "--real-ratio must be from 0 to 1"),
        ("--batch-size 0", "--batch-size must be"),
        ("--tau nan", "--tau must be"),
        ("--target-entropy nan", "--target-entropy must be a number"),
        ("--critic-dropout 1", "--critic-dropout must be"),
        ("--policy-hidden 16 0", "--policy-hidden needs values of at least 1"),
        ("--rollout-schedule 10 5 1 1", "the second one later"),
        ("--rollout-schedule 0 1 2 1", "two lengths from 1 to 1000"),
        ("--rollouts 0", "--rollouts must be"),
        ("--max-disagreement 0", "--max-disagreement must be above 0"),
        ("--num-elites 4", "--num-elites must be from 1 to 3"),
        ("--hidden 16", "--weight-decay needs one value more"),
        ("--model-lr nan", "--model-lr must be"),
        ("--reward-fn nonsense", "module:function"),
    ],
}


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [(name, *case) for scripts, cases in BAD_ARGS.items() for case in cases for name in scripts.split() or SCRIPTS],
)
def test_bad_arguments(name, monkeypatch, capsys, tmp_path, args, expected):
    script = importlib.import_module(name)
    line = complaint(script, monkeypatch, capsys, "--run-dir", tmp_path, *args.split())
    assert re.search(expected, line), line
    assert not list(tmp_path.iterdir())  # no folder of a run that never began


def test_a_module_that_cannot_be_imported_is_told(tmp_path, monkeypatch):
    script = importlib.import_module("mbpo")
    (tmp_path / "broken_module.py").write_text("def reward(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(script.Failure, match=r"cannot load broken_module:reward.*invalid syntax"):
        script.load_function("broken_module:reward")


def test_every_number_has_a_range(script):
    """NaN and what is below every range are refused by name."""
    for field in dataclasses.fields(script.Args):
        numbers = {int, float} & {field.type, *typing.get_args(field.type)}
        for value in (math.nan, -math.inf) if numbers and not isinstance(field.default, tuple) else ():
            with pytest.raises(script.Failure, match=f"--{field.name.replace('_', '-')} must be"):
                script.Args(**{field.name: value})


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("reset raises", "reset of episode 1: RuntimeError: the door is locked"),
        ("step raises", r"step \d+ of episode \d+: RuntimeError: the floor is wet"),
        ("obs nan", r"observation (nan is not in Discrete|array\(\[nan\]\) is not an array)"),
        ("obs inf", r"observation (inf is not in Discrete|array\(\[inf\]\) is not an array)"),
        ("obs huge", r"observation (1e\+20 is not in Discrete|array\(\[1.e\+20\]\) is not an array.* below 1e15)"),
        ("obs shape", "is not in Discrete|is not an array of shape"),
        ("obs dtype", "observation 'here' is not (in Discrete|an array)"),
        ("obs outside", "observation 5 is not (in Discrete|an array)"),
        ("reward nan", "reward is nan"),
        ("reward inf", "reward is inf"),
        ("reward huge", r"reward is 1e\+20, not a number below 1e15"),
    ],
)
def test_an_environment_that_breaks(script, monkeypatch, capsys, tmp_path, fault, expected):
    env_id = CORRIDOR.get(script.__name__, "Corridor-v0")
    args = ["--env-id", env_id, "--env-kwargs", f"fault={fault}", "--run-dir", tmp_path, "--checkpoint-every", 2]
    line = complaint(script, monkeypatch, capsys, *args)
    assert re.search(expected, line), line
    if fault != "reset raises":  # which may happen before the first checkpoint
        step = script.read_checkpoint(only_run(tmp_path) / script.CHECKPOINT)["step"]
        assert 0 < step <= 6 * getattr(tiny_args(script), "num_envs", 1)


def test_folders_that_cannot_be_resumed(script, monkeypatch, capsys, tmp_path):
    def refuses(*args: object) -> str:
        return complaint(script, monkeypatch, capsys, *args)

    assert "not a run folder" in refuses("--resume", tmp_path)
    assert "not a run folder" in refuses("--resume", "")  # a variable of the shell that is not set
    run_script(script, monkeypatch, *SMALL, "--run-dir", tmp_path)
    run = only_run(tmp_path)
    assert "started with another gamma" in refuses("--resume", run, "--gamma", 0.5)
    assert "started with another env_id, seed" in refuses("--evaluate", run, "--seed", 7, "--env-id", "Taxi-v4")
    assert "exclude each other" in refuses("--resume", run, "--evaluate", run)
    with pytest.raises(script.Failure, match="started with another"):  # nor do those that call `train` by themselves
        script.train(tiny_args(script, resume=str(run), seed=7))
    args = run / "args.json"
    text = args.read_text()
    assert "has 600 steps already" in refuses("--resume", run, "--total-timesteps", 300)
    assert args.read_text() == text
    for damaged in (
        "",
        "{",
        "[]",
        "{}",
        f'{{"script": "{script.__name__}", "args": {{"gamma": "x"}}}}',
        text.replace('"gamma"', '"gama"'),
    ):
        args.write_text(damaged)
        assert "not a run folder" in refuses("--resume", run)
    args.write_text(text.replace(f'"script": "{script.__name__}"', '"script": "other"').replace('"gamma"', '"other"'))
    assert "written by other.py" in refuses("--evaluate", run)


def test_an_environment_may_change_the_action_that_it_is_given(script):
    class Halves(gym.Env):
        observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,))

        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
            return np.zeros(1, np.float32), {}

        def step(self, action: np.ndarray) -> tuple:
            action *= 0.5
            return np.asarray(action, np.float32), 0.0, False, False, {}

    episode, action = script.Episode(Halves(), 1), np.ones(1, np.float32)
    assert episode.step(action)[0] == 0.5
    assert (action, episode.actions) == (1, [1])


def test_the_memory_of_an_environment_is_not_shared_with_it(script):
    class Remembers(gym.Env):
        def __init__(self):
            self.notes = {"steps": [1]}

        def state_dict(self) -> dict:
            return self.notes

        def load_state_dict(self, state: dict) -> None:
            self.notes = state

    env = Remembers()
    memory = script.memory_of(env)
    env.notes["steps"].append(2)
    assert memory == {"steps": [1]}


def test_the_memory_of_an_environment_must_be_what_a_checkpoint_can_hold(script):
    class Remembers(gym.Env):
        def state_dict(self) -> dict:
            return {"walls": np.zeros(3)}

        def load_state_dict(self, state: dict) -> None:
            raise AssertionError

    with pytest.raises(script.Failure, match=r"ndarray.*plain numbers"):
        script.memory_of(Remembers())


def test_damaged_checkpoints_are_refused_and_the_older_one_is_kept_and_named(script, monkeypatch, capsys, tmp_path):
    run_script(script, monkeypatch, *SMALL, "--run-dir", tmp_path)
    run = only_run(tmp_path)
    path, previous = run / script.CHECKPOINT, run / f"previous.{script.CHECKPOINT}"
    whole, older, wanted = path.read_bytes(), previous.read_bytes(), plain(script.read_checkpoint(path))
    damages = [
        b"",
        b"not a checkpoint",
        whole[: len(whole) // 2],
        whole[:-1],
        gzip.compress(b"[]"),
        gzip.compress(b"{}"),
    ]
    rng = random.Random(0)
    for _ in range(60):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        damages.append(bytes(flipped))
    refused = 0
    for damage in damages:
        path.write_bytes(damage)
        try:
            assert (
                plain(script.read_checkpoint(path)) == wanted
            )  # flipped where it does not matter, as in the time of the file
            continue
        except Exception:
            refused += 1
        line = complaint(script, monkeypatch, capsys, "--resume", run)
        assert f"cannot restore {path}" in line
        assert f"the checkpoint before it is {previous}" in line
        assert previous.read_bytes() == older
    assert refused > 50
    path.unlink()  # killed between the two renames that make a checkpoint the last one
    run_script(script, monkeypatch, "--resume", run)
    assert learned(script, run)["step"] == wanted["step"]
    assert plain(script.read_checkpoint(path))["agent"] == wanted["agent"]


def test_a_full_disk_keeps_the_last_checkpoint(script, monkeypatch, capsys, tmp_path):
    write, calls = script.write_checkpoint, []

    def full(path: Path, state: dict) -> None:
        calls.append(state["step"])
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(path, state)

    monkeypatch.setattr(script, "write_checkpoint", full)
    line = complaint(script, monkeypatch, capsys, *SMALL, "--run-dir", tmp_path)
    run = only_run(tmp_path)
    assert "No space left on device" in line
    assert f"--resume {run}" in line
    assert script.read_checkpoint(run / script.CHECKPOINT)["step"] == calls[0]
    assert not list(run.glob("new.*"))


def test_a_loss_that_is_not_finite_stops_the_run(script, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(script.Agent, "metrics", lambda self: {"losses/td_error": float("nan")})
    line = complaint(script, monkeypatch, capsys, *SMALL, "--run-dir", tmp_path)
    assert re.search(r"step 6: losses/td_error is nan", line)


# --- episodes ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "Blackjack-v1", "CliffWalking-v1", "CartPole-v1", "Pendulum-v1"])
def test_a_restored_episode_continues_as_the_original(script, monkeypatch, env_id):
    monkeypatch.setattr(script, "check_observation", lambda obs, space: None)
    envs = [script.make_env(script.Args(env_id=env_id)) for _ in range(2)]
    space = envs[0].action_space
    space.seed(0)

    def random_action() -> Any:
        return int(space.sample()) if isinstance(space, gym.spaces.Discrete) else space.sample()

    original = script.Episode(envs[0], 5, 1)
    for _ in range(300):
        _, _, terminated, truncated = original.step(random_action())
        if terminated or truncated:
            original.reset()
    restored = script.Episode(envs[1], 5, 1)
    restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
    for _ in range(300):
        action = random_action()
        one, two = original.step(action), restored.step(action)
        np.testing.assert_equal(one, two)
        assert original.episodic_return == restored.episodic_return
        if one[2] or one[3]:
            original.reset()
            restored.reset()
            np.testing.assert_equal(original.obs, restored.obs)


def test_observations_stay_as_they_were_when_an_environment_reuses_its_array(script, monkeypatch):
    monkeypatch.setattr(script, "check_observation", lambda obs, space: None)

    class Reuses(gym.Env):
        observation_space, action_space, array = gym.spaces.Box(0, 9, (1,)), gym.spaces.Discrete(2), np.zeros(1)

        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
            self.array[:] = 0
            return self.array, {}

        def step(self, action: int) -> tuple:
            self.array += 1
            return self.array, 0.0, False, False, {}

    episode = script.Episode(Reuses(), 1)
    first = episode.obs
    second = episode.step(0)[0]
    third = episode.step(0)[0]
    assert [float(obs[0]) for obs in (first, second, third)] == [0, 1, 2]


class Undrawn(gym.Env):
    observation_space, action_space = gym.spaces.Discrete(2), gym.spaces.Discrete(2)


gym.register("Undrawn-v0", entry_point=Undrawn)


def test_an_environment_that_cannot_be_drawn_needs_no_render_mode(script):
    assert isinstance(script.make_env(script.Args(env_id="Undrawn-v0")).unwrapped, Undrawn)
    with pytest.raises(script.Failure, match="render_mode"):
        script.make_env(script.Args(env_id="Undrawn-v0"), "rgb_array")


def test_seeds_of_different_purposes_differ(script):
    seeds = {script.seed_of(seed, purpose, index) for seed in range(5) for purpose in range(5) for index in range(50)}
    assert len(seeds) == 5 * 5 * 50
    assert max(seeds) < 2**31


def test_policy_and_agent_can_be_driven_from_a_loop_of_ones_own(script):
    env = gym.make(CORRIDOR.get(script.__name__, "Corridor-v0"), max_episode_steps=50)
    agent = script.Agent(env.observation_space, env.action_space, tiny_args(script, seed=3))
    obs, _ = env.reset(seed=0)
    for _ in range(500 if script.__name__ in TABULAR else 300):
        action = agent.act(obs)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        agent.observe(obs, action, reward, next_obs, terminated, truncated)
        agent.update()
        obs = env.reset()[0] if terminated or truncated else next_obs
    policy = agent.greedy_policy(seed=0)
    if script.__name__ in TABULAR:
        assert [policy(state) for state in range(4)] == [1, 1, 1, 1]
    else:
        assert policy(obs) in env.action_space


def test_settings_by_environment_are_defaults_that_the_command_line_overrides(script, monkeypatch, capsys):
    preset = {"total_timesteps": 7, "eval_episodes": 9}
    monkeypatch.setitem(script.PRESETS, "Some-v0", preset)
    for words, steps in ((["--env-id", "Some-v0"], 7), (["--env_id=Some-v0", "--total-timesteps", "8"], 8)):
        monkeypatch.setattr(sys, "argv", [script.__name__, *words])
        args = script.parse_args()
        assert (args.env_id, args.total_timesteps, args.eval_episodes) == ("Some-v0", steps, 9)
        assert f"settings for Some-v0: total_timesteps={steps}, eval_episodes=9" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [script.__name__])
    assert script.parse_args() == script.Args()


def test_every_setting_by_environment_is_a_valid_one(script):
    for env_id, preset in script.PRESETS.items():
        script.Args(env_id=env_id, **preset)
