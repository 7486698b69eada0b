"""Sweeps on real clusters of this machine, parts of which are lost: the numbers stay those of one process."""

import argparse
import contextlib
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from crash_test import everything

from delora.terminal import counted

DESCRIPTION = """Trains 24 tiny trials, dropout on, once in one process and once by the workers of a cluster that is
started for it, and compares all that they found, to the bit. While the cluster trains, workers are lost:
  slurm   a node is killed with all its processes, a job is preempted by another partition's, one is queued again by
          hand, and all run into their time limit
  ray     a raylet is killed with all its processes, a worker is killed
  local   two workers are killed
gpus trains a sweep of 16 fleets with MiniLM several times, by the whole command: on one GPU with one, two and three
workers, and on all GPUs that there are, with a worker on each. The runs on one GPU share the machine's GPUs out."""
WORDS = [
    "model=tiny",
    "data=synthetic",
    "data.rows.train=64",
    "data.rows.validation=40",
    "logger=none",
    "batch_size=16",
]
WORDS += [
    "max_length=64",
    "device=cpu",
    "log_every=4",
    "fleet.checkpoint_seconds=2",
    "method.dropout=0.1",
    "fleet.size=3",
]
WORDS += ["method=delora,lora", "lr_factor=0.5,1,2,4", "seed=1,2,3", "name=s"]
TRIALS, FLEETS = 24, 8
NODES = 4
SECONDS = 1200


class Skipped(Exception):
    """Why the test cannot run here."""


def main() -> int:
    parser = argparse.ArgumentParser("clusters", description=DESCRIPTION, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("cluster", choices=[*TESTS, "gpus"])
    parser.add_argument("--epochs", type=int, default=100, help="of the trials; they decide how long a fleet takes")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="change the sweep of gpus")
    options = parser.parse_args()
    if options.cluster == "gpus":
        return gpus(options.words)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="delora-cluster-") as folder:
        try:
            return TESTS[options.cluster](Path(folder), [*WORDS, f"epochs={options.epochs}"])
        except Skipped as why:
            print(f"skipped: {why}")
            return 0


def run(folder: Path, *words: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "delora.cli", "-m", *words]
    with (folder / "log.txt").open("w") as log:
        environment = {**os.environ, **(env or {})}
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, text=True)


def undisturbed(folder: Path, words: list[str]) -> dict:
    print("in one process ...", flush=True)
    begin = time.monotonic()
    process = run(folder / "here", *words, "engine=here")
    if process.wait():
        raise SystemExit((folder / "here" / "log.txt").read_text())
    print(f"  {time.monotonic() - begin:.0f} s")
    return everything(folder / "here" / "outputs" / "s")


def compare(folder: Path, process: subprocess.Popen[str], whole: dict, happened: dict[str, object]) -> int:
    """Waits for the sweep, compares and tells."""
    status = process.wait(SECONDS)
    root = folder / "cluster" / "outputs" / "s"
    found = everything(root)
    different = [name for name in whole if found.get(name) != whole[name]]
    left = sorted(path.name for path in root.glob(".fleets/*"))
    for what, often in happened.items():
        print(f"  {what}: {often}")
    same = f"{len(found)} of {TRIALS} trials, {len(different)} differ from one process's"
    print(f"exit status {status}, {same}, left behind: {left or 'nothing'}")
    if status or different or len(found) != TRIALS or left:
        print((folder / "cluster" / "log.txt").read_text())
        for log in [*root.glob(".fleets/logs/*.log"), *root.glob(".fleets/logs/*.out")]:
            print(f"--- {log}\n{log.read_text(errors='replace')[-600:]}")
        return 1
    return 0


def claims(folder: Path) -> dict[str, dict]:
    """Who trains which fleet, as its newest claim says."""
    found = {}
    for fleet in (folder / "cluster" / "outputs" / "s" / ".fleets").glob("[0-9a-f]" * 16):
        for path in sorted(fleet.glob(".claim-????")):
            with contextlib.suppress(OSError, ValueError):
                found[fleet.name] = json.loads(path.read_text())
    return found


def wait_for(what: str, condition: Callable[[], object], process: subprocess.Popen[str]) -> object:
    end = time.monotonic() + SECONDS
    while not (found := condition()):
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"the sweep ended, or it took too long, before {what}")
        time.sleep(0.3)
    return found


def training(folder: Path, least: int = 1) -> dict[str, dict]:
    """Who trains the fleets that have saved a state, if there are so many."""
    fleets = folder / "cluster" / "outputs" / "s" / ".fleets"
    found = {name: claim for name, claim in claims(folder).items() if (fleets / name / "state.safetensors").exists()}
    return found if len(found) >= least else {}


# --- SLURM


def slurm(folder: Path, words: list[str]) -> int:
    for command in ("munged", "slurmctld", "slurmd", "sbatch"):
        if not shutil.which(command, path=f"{os.environ['PATH']}:/usr/sbin"):
            raise Skipped(f"{command} is not installed: apt-get install munge slurmctld slurmd slurm-client")
    if os.geteuid():
        raise Skipped("SLURM's daemons are started by root alone")
    whole = undisturbed(folder, words)
    with slurm_cluster(folder) as cluster:
        options = ["engine=slurm", "engine.workers=3", "engine.partition=low", "engine.minutes=2", "engine.notice=50"]
        process = run(folder / "cluster", *words, *options)
        happened: dict[str, object] = {}
        wait_for("three jobs train", lambda: training(folder, 3), process)
        nodes = cluster.nodes_at_work()
        cluster.kill(nodes[0])
        happened["killed"] = f"node {nodes[0]} with all its processes"
        preempting = ["sbatch", "-p", "high", "-w", nodes[1], "--exclusive", "--wrap", "sleep 5", "-o", "/dev/null"]
        subprocess.run(preempting, check=True, capture_output=True)
        happened["preempted"] = f"the job on node {nodes[1]}"
        wait_for("a job trains", lambda: training(folder), process)
        [*_, job] = cluster.jobs("RUNNING")
        subprocess.run(["scontrol", "requeue", job], check=True)
        happened["queued again by hand"] = f"job {job}"
        limits: set[tuple[str, int]] = set()  # by log and place in it: the logs go when the sweep has ended well

        def ended() -> bool:
            for path in (folder / "cluster" / "outputs" / "s" / ".fleets" / "logs").glob("*_log.out"):
                with contextlib.suppress(OSError):
                    said = path.read_text(errors="replace")
                    limits.update((path.name, at) for at in range(said.count("this job is timed-out")))
            return process.poll() is not None

        while not ended():
            time.sleep(0.5)
        log = (folder / "slurm" / "ctl.log").read_text()
        happened["preemptions in the controller's log"] = log.count("preempted JobId")
        happened["requeues in the controller's log"] = log.count("requeu")
        happened["time limits in the jobs' logs"] = len(limits)
        happened["nodes lost in the controller's log"] = log.count("not responding, setting DOWN")
        return compare(folder, process, whole, happened)


class SlurmCluster:
    """A controller and nodes on this machine, with munge; all its files in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def nodes_at_work(self) -> list[str]:
        return subprocess.check_output(["squeue", "-h", "-t", "RUNNING", "-o", "%N"], text=True).split()

    def jobs(self, state: str) -> list[str]:
        return subprocess.check_output(["squeue", "-h", "-r", "-t", state, "-o", "%i"], text=True).split()

    def kill(self, node: str) -> None:
        """Kills a node's daemon with all that it started."""
        daemon = int((self.folder / f"{node}.pid").read_text())
        steps = subprocess.run(["pgrep", "-f", "slurmstepd"], capture_output=True, text=True, check=False).stdout
        os.kill(daemon, signal.SIGKILL)
        for step in map(int, steps.split()):
            with contextlib.suppress(OSError):
                open_files = [os.readlink(f) for f in Path(f"/proc/{step}/fd").iterdir()]
                if any(f"/{node}" in name for name in open_files):
                    for pid in (*children_of(step), step):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)


def children_of(pid: int) -> list[int]:
    """All processes below a process, the lowest first."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return [below for child in map(int, found) for below in (*children_of(child), child)]


CONFIG = """
ClusterName=delora
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/ctl.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/ctl.log
SlurmdLogFile={folder}/%n.log
SlurmctldPort={port}
SlurmctldDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=0
SlurmdTimeout=10
KillWait=5
MessageTimeout=10
OverTimeLimit=0
SchedulerParameters=sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
NodeName=n[0-{last}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first_port}-{last_port}] CPUs=1 RealMemory=2000
PartitionName=low Nodes=n[0-{last}] Default=YES PriorityTier=1 MaxTime=INFINITE State=UP
PartitionName=high Nodes=n[0-{last}] PriorityTier=10 MaxTime=INFINITE State=UP
"""


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    place = folder / "slurm"
    for name in ("state", "spool"):
        (place / name).mkdir(parents=True)
    port = free_ports(NODES + 1)
    numbers = {"port": port, "first_port": port + 1, "last_port": port + NODES, "last": NODES - 1}
    config = place / "slurm.conf"
    config.write_text(CONFIG.format(folder=place, host=socket.gethostname(), **numbers))
    os.environ["SLURM_CONF"] = str(config)
    os.environ["PATH"] += ":/usr/sbin"
    (place / "munge.key").write_bytes(os.urandom(128))
    (place / "munge.key").chmod(0o600)
    options = [f"--{name}={place}/munge.{end}" for name, end in MUNGE.items()]
    daemons = [subprocess.Popen(["munged", "--force", "--foreground", *options], stderr=subprocess.DEVNULL)]
    try:
        time.sleep(1)
        daemons.append(subprocess.Popen(["slurmctld", "-D", "-f", config], stderr=subprocess.DEVNULL))
        for node in range(NODES):
            (place / "spool" / f"n{node}").mkdir()
            command = ["slurmd", "-D", "-f", str(config), "-N", f"n{node}"]
            daemons.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        end = time.monotonic() + 30
        while subprocess.run(["srun", "-N", str(NODES), "true"], capture_output=True, check=False).returncode:
            if time.monotonic() > end:
                raise SystemExit((place / "ctl.log").read_text()[-3000:])
            time.sleep(1)
        yield SlurmCluster(place)
    finally:
        subprocess.run(["scancel", "-u", "root"], capture_output=True, check=False)
        time.sleep(1)
        for daemon in daemons[::-1]:
            daemon.terminate()
        for daemon in daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)


MUNGE = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody uses."""
    for first in range(17000, 30000, 50):
        with contextlib.ExitStack() as opened:
            try:
                for port in range(first, first + count):
                    opened.enter_context(socket.socket()).bind(("127.0.0.1", port))
                return first
            except OSError:
                continue
    raise SystemExit("no free ports")


# --- Ray


def ray(folder: Path, words: list[str]) -> int:
    try:
        from ray.cluster_utils import Cluster
    except ImportError:
        raise Skipped("Ray is not installed: pip install 'delora[ray]'") from None
    whole = undisturbed(folder, words)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
        options = ["engine=ray", f"engine.address={cluster.address}", "engine.workers=3", "engine.gpus=0"]
        process = run(folder / "cluster", *words, *options)
        happened: dict[str, object] = {}
        wait_for("three workers train", lambda: training(folder, 3), process)
        workers = {pid: node for node in nodes for pid in children_of(raylet_of(node))}
        lost = [fleet for fleet, claim in claims(folder).items() if workers.get(claim["pid"]) is nodes[0]]
        below = children_of(raylet_of(nodes[0]))
        cluster.remove_node(nodes[0], allow_graceful=False)
        for pid in below:  # a node that is gone takes all its processes with it
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        happened["killed"] = f"a raylet with all its processes, which trained {', '.join(lost)}"
        cluster.add_node(num_cpus=1)
        wait_for("three workers train", lambda: training(folder, 3), process)
        name, claim = next(iter(training(folder).items()))
        os.kill(claim["pid"], signal.SIGKILL)
        happened["killed too"] = f"the worker that trained {name}"
        return compare(folder, process, whole, happened)
    finally:
        cluster.shutdown()


def raylet_of(node: object) -> int:
    return node.all_processes["raylet"][0].process.pid  # type: ignore[attr-defined]


# --- This machine


def local(folder: Path, words: list[str]) -> int:
    whole = undisturbed(folder, words)
    process = run(folder / "cluster", *words, "engine=local", "engine.workers=3")
    happened: dict[str, object] = {}
    for turn in range(2):
        running = wait_for("three workers train", lambda: training(folder, 3), process)
        assert isinstance(running, dict)
        name, claim = sorted(running.items())[turn]
        os.kill(claim["pid"], signal.SIGKILL)
        happened[f"killed, {turn + 1}"] = f"the worker that trained {name}"
        time.sleep(3)
    return compare(folder, process, whole, happened)


# --- How fast several GPUs are

GPU_SWEEP = ["task=mrpc", "model=minilm", "precision=bfloat16", "logger=none", "fleet.size=16", "name=s"]
METHODS, MANY = "method=lora,delora,dora,ether", ["lr_factor=0.25,0.5,1,2,4,8,16,32", "seed=range(4)"]


def gpus(words: list[str]) -> int:
    """Times whole commands; each has a folder of its own, so that nothing is done already."""
    found = subprocess.check_output(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], text=True).split()
    with tempfile.TemporaryDirectory(prefix="delora-gpus-") as place:
        folder = Path(place)

        def timed(name: str, on: str, *options: str) -> tuple[str, float]:
            begin = time.monotonic()
            process = run(folder / name, *GPU_SWEEP, METHODS, *options, *words, env={"CUDA_VISIBLE_DEVICES": on})
            if process.wait():
                print((folder / name / "log.txt").read_text()[-3000:], flush=True)
                raise SystemExit(f"{name}: failed")
            print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
            return name, time.monotonic() - begin

        timed("caches", ",".join(found), "lr_factor=1", "seed=range(16)", "epochs=1")
        waiting = queue.SimpleQueue[tuple[str, list[str]]]()
        for many in (1, 2, 3):
            options = ["engine=local", f"engine.workers={many}", f"engine.per_gpu={many}"] if many > 1 else []
            waiting.put((f"{counted(many, 'worker')} on one GPU", options))
        times: dict[str, float] = {}

        def work(gpu: str) -> None:
            with contextlib.suppress(queue.Empty):
                while True:
                    name, options = waiting.get_nowait()
                    times.update([timed(name, gpu, *MANY, *options)])

        threads = [threading.Thread(target=work, args=(gpu,)) for gpu in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(found) > 1:
            times.update([timed(f"a worker on each of {len(found)} GPUs", ",".join(found), *MANY)])
        for name, seconds in times.items():
            print(f"{name:32} {seconds:6.0f} s  {times['1 worker on one GPU'] / seconds:5.2f} times one worker")
            print("  " + ", ".join(sorted(set(re.findall("workers share.*", (folder / name / "log.txt").read_text())))))
        kept = [everything(folder / name / "outputs" / "s") for name in times]
        scores = [{trial: one[0]["best"] for trial, one in found.items()} for found in kept]
        same = [
            sum(ours == theirs for ours, theirs in zip(scores[0].values(), s.values(), strict=True)) for s in scores
        ]
        print(f"trials whose best scores are those of one worker's, of {len(scores[0])}: {same}")
    return 0


TESTS = {"slurm": slurm, "ray": ray, "local": local}

if __name__ == "__main__":
    sys.exit(main())
