"""What clusters do to sweeps and runs, done to real ones; scripts/clusters.sh starts what this needs and calls it.

    python scripts/cluster_cases.py {slurm,accounting,ray,postgresql,mariadb,torchrun} FOLDER

Each case is a row of a table: what was done, what is expected, what was seen. Trials train a model of the smoke scale
and rest in every step, so that there is time to disturb them. A trial is `whole` when it is done and its record holds
each of its steps once.
"""

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster_bench import CASES, ROOT, STEPS, Bench, Command, Unexpected, case, check, processes, run, until

TWO_NODES = ("strategy=ddp", "trainer.num_nodes=2", "trainer.devices=2")
SLURM = ("launcher=slurm", "launcher.cpus=2", "launcher.minutes=30")

# Slurm


def jobs(*fields: str) -> list[list[str]]:
    """Of the queue: number of each job (of each element of an array), and these fields of squeue's."""
    lines = run("squeue", "--noheader", "--array", f"--format={' '.join(['%i', *fields])}").splitlines()
    return [line.split(maxsplit=len(fields)) for line in lines]


def until_running(count: int = 1) -> list[str]:
    until(lambda: sum(job[1] == "RUNNING" for job in jobs("%T")) >= count, f"{count} jobs that run")
    return [job[0] for job in jobs("%T") if job[1] == "RUNNING"]


def until_queue_is_empty() -> None:
    until(lambda: not jobs(), "an empty queue")


@contextmanager
def busy_cluster(partition: str = "main") -> Iterator[str]:
    """Another job on all nodes."""
    job = run("sbatch", "--parsable", "-p", partition, "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 900")
    try:
        yield job.strip()
    finally:
        run("scancel", job.strip())


def progress_bar_alone(command: Command) -> None:
    """Nothing but its line, its bar and its end may be printed; a bar's line holds a share of trials."""
    bar = re.compile(r"\d+/\d+ trials|left|^\d*step|tokeni[sz]|documents|^$")
    other = [line for line in command.output.splitlines() if not bar.search(line)]
    check(len(other) <= 2, f"printed through the bar: {other}")


@case("slurm", "a sweep of two trials, `launcher=slurm`, no accounting", "whole; nothing printed through the bar")
@case("accounting", "the same with slurmdbd", "whole; nothing printed through the bar")
def sweep_on_slurm(bench: Bench) -> str:
    command = bench.sweep(*SLURM)
    command.end()
    progress_bar_alone(command)
    until_queue_is_empty()
    return bench.whole()


@case("slurm", "`scancel` of one job of two", "the other job does its trial as well; the command ends")
@case("accounting", "`scancel` of one job of two", "the other job does its trial as well; the command ends")
def cancel_one_job(bench: Bench) -> str:
    command = bench.sweep(*SLURM)
    first = until_running(2)[0]
    bench.until_trained()
    run("scancel", first)
    command.end()
    return bench.whole()


@case("slurm", "`scancel` of all jobs, then the same command", "ends in seconds, with a line; the second goes on")
@case("accounting", "`scancel` of all jobs, then the same command", "ends in seconds, with a line; the second goes on")
def cancel_all_jobs(bench: Bench) -> str:
    command = bench.sweep(*SLURM)
    until_running(2)
    bench.until_trained()
    began = time.monotonic()
    run("scancel", *{job[0].split("_")[0] for job in jobs()})
    said = command.end(code=1)
    seconds = time.monotonic() - began
    check("ended with 2 trials unfinished" in said, said)
    bench.sweep(*SLURM).end()
    return f"ended after {seconds:.0f} s: ended with 2 trials unfinished; then {bench.whole()}"


@case("slurm", "all nodes taken by another job", "the jobs are said to be queued; no trial counts as running")
def pending_jobs(bench: Bench) -> str:
    with busy_cluster() as other:
        until_running()
        command = bench.sweep(*SLURM)
        until(lambda: "0/2 trials" in command.output, "a bar")
        said = command.output
        check("0 workers running, 2 queued" in said and "0/2 trials, 0 running" in said, said)
        check([job for job in jobs() if job[0] != other], "no job in the queue")
    command.end()
    return f"0 workers running, 2 queued; 0/2 trials, 0 running; afterwards {bench.whole()}"


@case("slurm", "the time limit (three minutes) of a trial that needs longer", "saved, queued again, continued")
def time_limit(bench: Bench) -> str:
    bench.arms = 1
    command = bench.sweep("launcher=slurm", "launcher.cpus=2", "launcher.minutes=3", rest=4.5)
    command.end()
    log = "".join(path.read_text() for path in bench.folder.glob("runs/*/slurm/*_log.*"))
    check("USR2" in log, "no signal came")
    return f"{bench.whole()}; queued again {log.count('Requeued job')} times"


@case("slurm", "preemption with a grace time of 60 s", "saved; the nodes are free within seconds; continued")
def preemption(bench: Bench) -> str:
    command = bench.sweep(*SLURM)
    until_running(2)
    bench.until_trained()
    began = time.monotonic()
    with busy_cluster("urgent") as other:
        until(lambda: [other, "RUNNING"] in jobs("%T"), "the other job")
        seconds = time.monotonic() - began
    command.end()
    check(seconds < 45, f"the other job began after {seconds:.0f} s")
    return f"the other job began after {seconds:.0f} s; {bench.whole()}"


@case("slurm", "SIGTERM as soon as a job's step runs, before Python does", "queued again; whole")
def early_signal(bench: Bench) -> str:
    command = bench.sweep(*SLURM)
    until(lambda: processes("submitit.core._submit", str(bench.folder)), "a step")
    job = until_running()[0]
    run("scancel", "--signal=TERM", job)
    until(lambda: [job, "RUNNING"] not in jobs("%T"), "the end of the job")
    check([found for found in jobs() if found[0] == job], "the job was not queued again")
    command.end()
    return bench.whole()


@case("slurm", "a node drained while its job runs", "its job ends its trials, none begins there; the sweep ends")
def drain(bench: Bench) -> str:
    bench.arms = 3
    command = bench.sweep("launcher=slurm", "launcher.cpus=4", "launcher.minutes=30")
    until_running(2)
    bench.until_trained()
    run("scontrol", "update", "nodename=n1", "state=drain", "reason=case")
    try:
        command.end()
    finally:
        run("scontrol", "update", "nodename=n1", "state=resume")
    return bench.whole()


@case("slurm", "a node set down while its job runs", "the job is queued again; another worker takes its trial over")
def node_down(bench: Bench) -> str:
    command = bench.sweep("launcher=slurm", "launcher.cpus=4", "launcher.minutes=30")
    until_running(2)
    bench.until_trained()
    run("scontrol", "update", "nodename=n1", "state=down", "reason=case")
    until(lambda: any(state != "RUNNING" for _, state in jobs("%T")), "the job that ran there in the queue")
    command.end()
    run("scontrol", "update", "nodename=n1", "state=resume")
    return bench.whole()


@case("slurm", "`kill -9` of a worker", "its trial ends with it, and another worker goes on with it")
def kill_worker(bench: Bench) -> str:
    command = bench.sweep(*SLURM)
    until_running(2)
    bench.until_trained()
    os.kill(workers(bench)[0], signal.SIGKILL)
    command.end()
    return bench.whole()


def workers(bench: Bench) -> list[int]:
    """Processes of `sweep work` in this case's folder."""
    found = processes("moepp.cli", "sweep work")
    return [process for process in found if Path(f"/proc/{process}/cwd").resolve() == bench.folder.resolve()]


def ranks(bench: Bench) -> list[int]:
    """Processes that train in this case's folder and have loaded torch: the youngest of each kind."""
    found = processes("moepp.cli", "trial", "config.yaml") + processes("run.py", "train", f"data.cache={bench.cache}")
    here = [p for p in found if Path(f"/proc/{p}/cwd").resolve() == bench.folder.resolve()]
    return [p for p in here if "python" in Path(f"/proc/{p}/exe").resolve().name]


@case("slurm", "Ctrl-C of the waiting command, then the same command", "the jobs go on, and are found again")
def leave_and_return(bench: Bench) -> str:
    command = bench.sweep(*SLURM)
    until_running(2)
    bench.until_trained()
    command.process.send_signal(signal.SIGINT)
    said = command.end(code=130)
    before = {job[0] for job in jobs()}
    again = bench.sweep(*SLURM)
    again.end()
    check(len({path.name.split("_")[0] for path in bench.folder.glob("runs/*/slurm/*_submitted.pkl")}) == 1, said)
    return f"{len(before)} jobs went on, none was added; {bench.whole()}"


@case("slurm", "`launcher.minutes=1`; `launcher.gpus=1` on nodes without GPUs", "refused, with the key to set")
def refusals(bench: Bench) -> str:
    minutes = bench.sweep("launcher=slurm", "launcher.minutes=1").end(code=2)
    gpus = bench.sweep("launcher=slurm", "launcher.gpus=1").end(code=1)
    check("set it to 2 at least" in minutes and "set launcher.gpus=0" in gpus, f"{minutes} {gpus}")
    return f"{minutes[:60]}...; ...{gpus[-60:]}"


@case("slurm", "trials over two nodes (`trainer.num_nodes=2 trainer.devices=2`)", "srun inside the job; whole")
def two_nodes(bench: Bench) -> str:
    command = bench.sweep(*SLURM, *TWO_NODES)
    command.end()
    return bench.whole()


@case("slurm", "the same, a rank killed by `kill -9`, then the signal of a time limit", "continued each time")
def two_nodes_disturbed(bench: Bench) -> str:
    bench.arms = 1
    command = bench.sweep(*SLURM, *TWO_NODES)
    bench.until_trained()
    os.kill(ranks(bench)[-1], signal.SIGKILL)
    until(lambda: bench.records[0].crashes, "a crash in the record")
    bench.until_trained(steps=bench.steps() + 6)
    run("scancel", "--signal=USR2", until_running()[0])
    command.end()
    log = "".join(path.read_text() for path in bench.folder.glob("runs/*/slurm/*_log.*"))
    return f"{len(bench.records[0].crashes)} crash; queued again {log.count('Requeued job')} times; {bench.whole()}"


@case("slurm", "`train` by srun over two nodes (docs/multinode.md), SIGTERM", "all save; 130; requeued; continued")
def train_by_srun(bench: Bench) -> str:
    command = " ".join([sys.executable, str(ROOT / "run.py"), "train", *bench.settings(), "strategy=ddp"])
    (bench.folder / "job.sh").write_text(
        "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=2 --requeue --output=job.txt --open-mode=append\n"
        f'srun --kill-on-bad-exit=1 {command}\ncode=$?\necho "code $code"\n'
        '[ $code -eq 130 ] && scontrol requeue "$SLURM_JOB_ID"\nexit $code\n'
    )
    job = run("sbatch", "--parsable", f"--chdir={bench.folder}", str(bench.folder / "job.sh")).strip()
    bench.until_trained()
    run("scancel", "--signal=TERM", job)
    until_queue_is_empty()
    said = (bench.folder / "job.txt").read_text()
    check("code 130" in said and "code 0" in said, said)
    return f"codes 130, then 0; {bench.whole()}"


# Ray


def ray_words() -> list[str]:
    return ["launcher=ray", f"launcher.address=127.0.0.1:{os.environ['RAY_PORT']}"]


@case("ray", "a head on this machine, `launcher.address=127.0.0.1:PORT`", "whole")
def sweep_on_ray(bench: Bench) -> str:
    command = bench.sweep(*ray_words())
    command.end()
    return bench.whole()


@case("ray", "`kill -9` of Ray's process that runs a worker", "Ray starts the worker again; its trial continues")
def kill_ray_worker(bench: Bench) -> str:
    bench.arms = 1
    command = bench.sweep(*ray_words(), "--workers", "1")
    bench.until_trained()
    worker = workers(bench)[0]
    os.kill(int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)
    command.end()
    return bench.whole()


@case("ray", "a second node lost (`kill -9` of its raylet)", "its worker starts elsewhere; whole")
def lose_ray_node(bench: Bench) -> str:
    command = bench.sweep(*ray_words(), "--workers", "2")
    bench.until_trained()
    raylets = processes("raylet/raylet", f":{os.environ['RAY_PORT']}")
    check(len(raylets) == 2, f"{len(raylets)} nodes")
    os.kill(raylets[-1], signal.SIGKILL)
    command.end()
    return bench.whole()


# MLflow on a database


@case("postgresql", "two workers, MLflow on PostgreSQL, killed for ten seconds", "whole; MLflow has each step once")
@case("mariadb", "two workers, MLflow on MariaDB, killed for ten seconds", "whole; MLflow has each step once")
def tracked(bench: Bench) -> str:
    words = ["tracking=mlflow", f"tracking.uri={os.environ['TRACKER']}"]
    both = [bench.sweep(*words, action="work") for _ in range(2)]
    bench.until_trained()
    run(os.environ["TRACKER_RESTART"])
    for command in both:
        command.end()
    run(sys.executable, str(ROOT / "run.py"), "sync", f"runs={bench.folder / 'runs'}", *words)
    whole = bench.whole()
    found = histories(os.environ["TRACKER"])
    check(sorted(found) == [list(range(1, STEPS + 1))] * bench.arms, f"histories {found}")
    return f"{whole}; {len(found)} runs in MLflow, each with {STEPS} steps"


def histories(uri: str) -> list[list[int]]:
    """The steps of each run's losses; nothing else is in the store."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    logged = [client.get_metric_history(run.info.run_id, "train/loss") for run in runs]
    return [[metric.step for metric in history] for history in logged if history]


# torchrun


def torchrun(port: int, node: int | None = None, nodes: str = "2") -> list[str]:
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2"]
    if node is None:
        return [*program, "--standalone"]
    return [
        *program, f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=case",
        *(["--rdzv-conf=is_host=true"] if node == 0 else ["--rdzv-conf=is_host=false"]),
    ]  # fmt: skip


@case("torchrun", "`torchrun --max-restarts=2`, a rank killed by `kill -9`", "started again; continued")
def restart_one_node(bench: Bench) -> str:
    command = bench.train("strategy=ddp", by=torchrun(0))
    bench.until_trained(12)
    kill_a_rank(bench)
    command.end()
    return bench.whole()


@case("torchrun", "the same on two nodes, killed once on each", "all ranks start again, and meet; continued")
def restart_two_nodes(bench: Bench) -> str:
    port = free_port()
    nodes = [bench.train("strategy=ddp", by=torchrun(port, node)) for node in range(2)]
    for steps, node in ((12, nodes[1]), (24, nodes[0])):
        bench.until_trained(steps)
        kill_a_rank(bench, node.process.pid)
    for command in nodes:
        command.end()
    return bench.whole()


@case("torchrun", "`--nnodes=1:2`, the second node lost for good", "the first goes on with the whole batch")
def go_on_with_fewer_nodes(bench: Bench) -> str:
    port = free_port()
    nodes = [bench.train("strategy=ddp", by=torchrun(port, node, "1:2")) for node in range(2)]
    bench.until_trained(12)
    kill_a_rank(bench, nodes[1].process.pid)
    nodes[1].process.kill()
    nodes[0].end()
    return bench.whole()


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def kill_a_rank(bench: Bench, agent: int | None = None) -> None:
    found = [p for p in ranks(bench) if "torch.distributed.run" not in Path(f"/proc/{p}/cmdline").read_text()]
    if agent:
        found = [p for p in found if f" {agent} " in Path(f"/proc/{p}/stat").read_text().rpartition(")")[2][:20]]
    os.kill(found[-1], signal.SIGKILL)


def main(group: str, folder: Path, *chosen: str) -> int:
    """Adds the rows to table.md in the folder; the exit code is the number of cases that were seen otherwise."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through what ends the commands of a case
    failures = 0
    for name, done, expected, function in CASES:
        if name != group or (chosen and function.__name__ not in chosen):
            continue
        bench = Bench(folder / group / function.__name__)
        try:
            seen = function(bench)
        except (Unexpected, IndexError, ValueError, OSError) as error:
            seen, failures = f"**otherwise**: {error}", failures + 1
        finally:
            bench.close()
        row = f"| {done} | {expected} | {' '.join(seen.split())} |"
        print(row, flush=True)
        with open(folder / "table.md", "a") as table:
            table.write(row.replace(str(folder), "FOLDER") + "\n")
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]).resolve(), *sys.argv[3:]))
