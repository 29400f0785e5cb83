"""Makes the runs of a suite on a Ray cluster: one task a run, wherever there is a free core (or GPU).

Nodes need Python with the packages of the scripts, and nothing else: the repository is sent to them, and no file
system is shared. A task sends back its run folder whenever a checkpoint is written, so that the run of a node that is
lost goes on from there on another node, and ends as if nothing had happened.
"""

import contextlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import ray
from tqdm import tqdm

from .run import Job, jobs_of
from .suites import ROOT, Suite

KILLED = (128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL)  # exit statuses of a run that its node took along


def pack(root: Path, run: Path) -> bytes:
    """A run folder as a tar archive, with paths from `root` on. The run may go on meanwhile, so what says least comes
    first: the result is that of a checkpoint, and the events may be more than the checkpoint says."""
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            files = [path for path in run.rglob("*") if path.is_file() and not path.name.startswith("new.")]
            for path in sorted(files, key=lambda path: (path.name != "result.json", path.name)):
                with contextlib.suppress(FileNotFoundError):  # a checkpoint that is just being replaced
                    archive.add(path, path.relative_to(root))
        return buffer.getvalue()


def unpack(archive: bytes, root: Path) -> None:
    """The opposite; what was there is overwritten."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(root, filter="data")


def make_run(command: list[str], archive: bytes | None, every: float) -> Iterator[tuple[bytes | None, int | None, str]]:
    """Runs a command on a node. Yields the run folder after each checkpoint, and at the end with the exit status and
    the last lines that were printed. `archive`: what to continue from; `every`: seconds between two looks."""
    repository = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        root, sent = Path(folder), None
        if archive is not None:
            unpack(archive, root)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        script, *arguments = command
        process = subprocess.Popen(
            [sys.executable, str(repository / script), *arguments], cwd=root, env=environment, stdout=log, stderr=log
        )
        try:
            while process.poll() is None:
                time.sleep(every)
                found = list(root.rglob("checkpoint.*"))
                if found and (written := found[0].stat().st_mtime_ns) != sent:
                    sent = written
                    yield pack(root, found[0].parent), None, ""
        finally:
            process.terminate()
            process.wait()
        log.seek(0)
        runs = [path.parent for path in root.rglob("args.json")]
        yield (pack(root, runs[0]) if runs else None), process.returncode, "\n  ".join(log.read().splitlines()[-5:])


def run_on_cluster(suite: Suite, address: str, every: float = 2.0) -> int:
    """Makes the missing runs on the cluster at `address`, or on a small one on this machine (`local`); returns how many
    failed. A run whose node was lost is given to another."""
    excludes = [".git", ".venv", "runs", "benchmark/runs"]
    environment = {"working_dir": str(ROOT), "excludes": excludes, "env_vars": {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}}
    ray.init(None if address == "local" else address, runtime_env=environment, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the nodes need not know this module
    task = ray.remote(max_retries=0, num_returns="streaming")(make_run)
    jobs = jobs_of(suite)
    total, failed, running, losses = sum(entry.seeds for entry in suite.entries), 0, {}, Counter()

    def submit(job: Job) -> None:
        """Hands a job to the cluster; it waits there until a node has room for it."""
        archive = pack(ROOT, job.run) if job.run else None
        stream = task.options(num_cpus=1, num_gpus=job.entry.gpus).remote(job.command, archive, every)
        running[stream] = job

    def fail(job: Job, why: str) -> None:
        nonlocal failed
        failed += 1
        bar.update()
        bar.write(f"failed ({why}): {job}", sys.stderr)

    def submit_again(job: Job, why: str) -> None:
        """For a run whose node was lost; one that gets lost again and again may be the cause of it."""
        losses[str(job.log)] += 1
        if losses[str(job.log)] >= 10:
            return fail(job, f"lost 10 times, {why}")
        bar.write(f"lost ({why}), goes on elsewhere: {job}", sys.stderr)
        submit(job.continued())

    with tqdm(total=total, initial=total - len(jobs), desc=suite.name, unit="run") as bar:
        try:
            for job in jobs:
                submit(job)
            while running:
                ready, _ = ray.wait(list(running), timeout=1.0)
                for stream in ready:
                    job = running[stream]
                    try:
                        archive, status, last_lines = ray.get(next(stream))
                    except ray.exceptions.RayTaskError as error:  # an error of `make_run`, not of its node
                        fail(running.pop(stream), str(error))
                        continue
                    except (ray.exceptions.RayError, StopIteration) as error:
                        submit_again(running.pop(stream), type(error).__name__)
                        continue
                    if archive is not None:
                        unpack(archive, ROOT)
                    if status is None:
                        continue
                    del running[stream]
                    if status in KILLED:
                        submit_again(job, f"status {status}")
                    elif status:
                        fail(job, f"status {status}: {last_lines}")
                    else:
                        bar.update()
        finally:
            for stream in running:
                ray.cancel(stream)
            ray.shutdown()
    return failed
