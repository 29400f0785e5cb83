"""Kills, damaged checkpoints and long runs, a campaign that takes hours: `pytest -m slow tests/test_survival.py`."""

import importlib
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from conftest import (
    CORRIDOR,
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
)

pytestmark = pytest.mark.slow
KILLS, DAMAGES = 17, 170  # of each of the six scripts


def test_survival_of_kills(script: ModuleType, tmp_path, capsys):
    """Killed again and again, at any moment from before the first checkpoint on: while it acts, trains, evaluates, and
    writes a checkpoint, of which there are many."""
    rng = random.Random(f"kills {script.__name__}")
    long, often = (200_000, 200) if script.__name__ in TABULAR else (2_000, 20)
    args = ["--total-timesteps", long, "--checkpoint-every", often, "--eval-every", 2 * often, "--eval-episodes", 1]
    begun = time.time()
    assert start(script, *args, "--run-dir", tmp_path / "whole").returncode == 0
    whole, takes = only_run(tmp_path / "whole"), time.time() - begun

    def begin(*words: object) -> subprocess.Popen:
        return subprocess.Popen(command(script, *words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    run, kills, before_the_first, ended = None, 0, 0, 0
    process = begin(*args, "--run-dir", tmp_path / "killed")
    while kills < KILLS:
        try:
            process.wait(timeout=rng.uniform(0.2, 0.7) * takes)
            assert process.returncode == 0, process.stderr.read()
            ended += 1  # it was at its end already: once more, from a new beginning
            check(script, run, whole)
            run, number = None, ended
            process = begin(*args, "--run-dir", tmp_path / f"killed again {number}")
            continue
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        folder = tmp_path / ("killed" if not ended else f"killed again {ended}")
        found = [path.parent for path in folder.glob(f"*/*{script.CHECKPOINT}") if not path.name.startswith("new.")]
        if not found:  # nothing was there to go on from
            before_the_first += 1
            process = begin(*args, "--run-dir", folder)
            continue
        run = found[0]
        process = begin("--resume", run)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    if run is not None:
        check(script, run, whole)
    with capsys.disabled():
        print(f"\n{script.__name__}: {kills} kills, {before_the_first} before the first checkpoint, {ended + 1} runs")


def check(script: ModuleType, run, whole) -> None:
    """The same weights or tables, curves, evaluations and result as those of a run that was never killed."""
    assert learned(script, run) == learned(script, whole)
    assert scalars(run, "charts/SPS") == scalars(whole, "charts/SPS")
    assert result(run) == result(whole)


class Bomb:
    """What a pickle can do: it runs code where it is opened."""

    def __reduce__(self) -> tuple:
        return sys.modules["builtins"].exec, ("import conftest; conftest.exploded = True",)


@pytest.mark.parametrize("name", SCRIPTS)
def test_survival_of_damaged_checkpoints(name: str, tmp_path, capsys):
    """Cut, flipped, empty, foreign and hostile ones: each is refused with one line, or reads as what was written; no
    code runs, and the checkpoint before it stays as it is."""
    script = __import__(name)
    args = tiny_args(script, total_timesteps=300, checkpoint_every=100, eval_every=300, eval_episodes=1)
    script.train(script.dataclasses.replace(args, run_dir=str(tmp_path)))
    run = only_run(tmp_path)
    path, previous = run / script.CHECKPOINT, run / f"previous.{script.CHECKPOINT}"
    whole, older, wanted = path.read_bytes(), previous.read_bytes(), plain(script.read_checkpoint(path))
    rng, bomb, refused = random.Random(0), io.BytesIO(), 0
    with zipfile.ZipFile(bomb, "w") as archive:  # where torch.save would put it
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
        archive.writestr("archive/version", "3\n")
    hostile = [b"", pickle.dumps(Bomb()), pickle.dumps({"agent": Bomb()}, protocol=2), bomb.getvalue()]
    for number in range(DAMAGES):
        if number < len(hostile):
            damage = hostile[number]
        elif number % 2:
            damage = whole[: rng.randrange(len(whole))]
        else:
            flipped = bytearray(whole)
            for _ in range(rng.choice((1, 1, 10, 1_000))):
                flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            damage = bytes(flipped)
        path.write_bytes(damage)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{name}.py", "--evaluate", str(run)])
            status = 0
            try:
                script.main()
            except SystemExit as stop:
                status = stop.code
        lines = [line for line in capsys.readouterr().err.splitlines() if "WARN" not in line]
        if status:
            assert (status, len(lines)) == (2, 1), lines
            assert f"cannot restore {path}" in lines[0]
            refused += 1
        else:
            assert plain(script.read_checkpoint(path)) == wanted
        assert previous.read_bytes() == older
        assert not hasattr(sys.modules["conftest"], "exploded")
    assert refused > 0.9 * DAMAGES
    with capsys.disabled():
        print(f"\n{name}: {DAMAGES} damaged checkpoints, {refused} refused, the others read as they were written")


LONG = {
    "total_timesteps": 1_000_000,
    "updates_per_step": 0.02,
    "train_ratio": 0.01,
    "train_every": 1_000,
    "num_envs": 1,
}


def endure(name: str) -> None:
    """Steps of an agent, a million: prints steps a second and megabytes after 20,000 and at the end."""
    script = importlib.import_module(name)
    fields = {field: value for field, value in LONG.items() if hasattr(script.Args, field)}
    args = tiny_args(script, env_id=CORRIDOR.get(name, "Corridor-v0"), **fields)
    env = script.make_env(args)
    agent, episode, window = script.Agent(env.observation_space, env.action_space, args), script.Episode(env, 1), 10_000
    begun, seen = 0.0, []
    for step in range(args.total_timesteps):
        if step in (window, args.total_timesteps - window):
            begun = time.process_time()
        obs = episode.obs
        action = agent.act(obs)
        next_obs, reward, terminated, truncated = episode.step(action)
        agent.observe(obs, action, reward, next_obs, terminated, truncated)
        agent.update()
        if terminated or truncated or len(episode.actions) == 100:
            episode.reset()
        if step + 1 in (2 * window, args.total_timesteps):
            size = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            seen.append((window / (time.process_time() - begun), size))
    print(json.dumps(seen))


def test_a_million_steps_leave_time_and_memory_as_they_were(script, capsys):
    name = script.__name__
    done = subprocess.run(
        [sys.executable, "-c", f"import test_survival; test_survival.endure('{name}')"],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (early, small), (late, large) = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(
            f"\n{name}: {early:.0f} steps a second at 20,000 steps, {late:.0f} at the end; {small:.0f}, {large:.0f} MB"
        )
    assert late > early / 1.5
    assert large < small + 100
