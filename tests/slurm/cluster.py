"""A real SLURM cluster on this machine: munge, slurmctld and two slurmd from Debian's packages, on loopback, with fake GPUs.

It needs root and neither systemd nor cgroups. There is no accounting, as on many clusters, so what works here does not lean on `sacct`.

    with Cluster() as cluster: subprocess.run(["sinfo"], env=os.environ | cluster.env)
"""
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

NEEDS = ("munged", "munge", "slurmctld", "slurmd", "sinfo", "scontrol", "srun", "sbatch", "squeue", "scancel")
CONF = """
ClusterName=study
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=200000,bf_interval=1,sched_interval=1
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
OverTimeLimit=0
MinJobAge=20
MaxArraySize={array}
FirstJobId={first}
InactiveLimit=0
MailProg=/bin/true
GresTypes=gpu
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports}] CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=8000 Gres=gpu:{gpus}
PartitionName=gpu Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=short Nodes=n[1-2] MaxTime=30 State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
# Requeued jobs wait as long as credentials live: 120 s, and 5 s above. Signals go to preempted jobs too with preempt_send_user_signal.


def missing():
    """Say why there can be no cluster here, or nothing."""
    if os.getuid():
        return "needs root"
    lost = [name for name in NEEDS if not shutil.which(name, path=PATH)]
    return f"needs the Debian packages slurmctld, slurmd, slurm-client and munge ({', '.join(lost)} not found)" if lost else ""


PATH = f"/usr/sbin:/sbin:{os.environ['PATH']}"


class Cluster:
    def __init__(self, cpus=8, gpus=4, array=4):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-")) / "cluster"
        self.folder.parent.chmod(0o755)  # munge wants its socket where everybody may go
        self.cpus, self.gpus, self.array = cpus, gpus, array
        self.daemons, self.undo = [], []
        self.env = dict(SLURM_CONF=str(self.folder / "slurm.conf"), PATH=PATH, GLOO_SOCKET_IFNAME="lo")

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error):
        self.stop()

    def run(self, *words, check=True):
        """Run a command of SLURM and return what it prints."""
        return subprocess.run(words, env=os.environ | self.env, check=check, capture_output=True, text=True, timeout=60).stdout

    def start(self):
        self.write()
        self.daemon("munged", "--foreground", f"--key-file={self.folder}/munge.key", f"--socket={self.folder}/munge.sock", f"--pid-file={self.folder}/munged.pid",
                    f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munged.seed", "--num-threads=2")
        self.wait(lambda: self.answers("munge", "-n", f"--socket={self.folder}/munge.sock"), "munged")
        self.daemon("slurmctld", "-D")
        self.wait(lambda: "UP" in self.run("scontrol", "ping", check=False), "slurmctld")
        for node in ("n1", "n2"):
            self.daemon("slurmd", "-D", "-N", node)
        self.wait(lambda: self.run("sinfo", "-h", "-N", "-p", "gpu", "-t", "idle", "-o", "%N", check=False).split() == ["n1", "n2"], "the nodes")

    def write(self):
        for name in ("", "state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            (self.folder / name).chmod(0o755)
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(1024))
        (self.folder / "munge.key").chmod(0o400)
        self.name_host()
        first, host = free_ports(3), socket.gethostname().partition(".")[0]
        conf = CONF.format(folder=self.folder, host=host, port=first, ports=f"{first + 1}-{first + 2}", cpus=self.cpus, gpus=self.gpus, array=self.array,
                           first=int(time.time()) % 600000 * 100 + 1)  # an id that was used before would find old files
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # found by name, it needs no /sys/fs/cgroup
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={self.folder}/gpu[0-{self.gpus - 1}]\n")
        for k in range(self.gpus):
            device = self.folder / f"gpu{k}"
            try:
                os.mknod(device, 0o600 | 0o020000, os.makedev(1, 3))  # character devices: only for them CUDA_VISIBLE_DEVICES is set
            except PermissionError:
                device.touch()

    def name_host(self):
        """SLURM resolves this host's name to an IPv4 address, and none at all where all addresses are in 127/8; see that it can."""
        name = socket.gethostname()
        try:
            socket.getaddrinfo(name, None, socket.AF_INET)
        except OSError:
            hosts = Path("/etc/hosts")
            before = hosts.read_text()
            hosts.write_text(f"{before.rstrip()}\n127.0.0.1 {name} {name.partition('.')[0]}\n")
            self.undo.append(lambda: hosts.write_text(before))
        try:
            socket.getaddrinfo("127.0.0.1", None, socket.AF_INET, flags=socket.AI_ADDRCONFIG)
        except OSError:
            if shutil.which("ip") and not subprocess.run(["ip", "addr", "add", "192.0.2.77/32", "dev", "lo"], capture_output=True).returncode:
                self.undo.append(lambda: subprocess.run(["ip", "addr", "del", "192.0.2.77/32", "dev", "lo"], capture_output=True))

    def daemon(self, *words):
        log = open(self.folder / f"{words[0]}-{len(self.daemons)}.out", "w")
        self.daemons.append(subprocess.Popen(words, env=os.environ | self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True))
        log.close()

    def answers(self, *words):
        return not subprocess.run(words, env=os.environ | self.env, capture_output=True, timeout=10).returncode

    def wait(self, condition, what, seconds=60):
        until = time.monotonic() + seconds
        while not condition():
            dead = [d.args[0] for d in self.daemons if d.poll() is not None]
            if dead or time.monotonic() > until:
                logs = "\n".join(f"{p.name}: {p.read_text()[-600:]}" for p in sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("*.out")))
                raise RuntimeError(f"{what} did not come up; ended: {dead}\n{logs}")
            time.sleep(0.1)

    def stop(self):
        """End every job, then every daemon, and take back what was changed."""
        try:
            if len(self.daemons) > 1 and self.daemons[1].poll() is None:
                self.run("scancel", "--full", "--user=root", check=False)
                until = time.monotonic() + 20
                while self.run("squeue", "-h", check=False).strip() and time.monotonic() < until:
                    time.sleep(0.2)
        finally:
            for daemon in reversed(self.daemons):
                end(daemon)
            for undo in self.undo:
                undo()
            shutil.rmtree(self.folder.parent, ignore_errors=True)


def end(process, seconds=15):
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(seconds)


def free_ports(count):
    """Find consecutive ports that nobody listens on."""
    for first in random.sample(range(16000, 26000), 100):
        sockets = []
        try:
            for port in range(first, first + count):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
        finally:
            for s in sockets:
                s.close()
    raise RuntimeError("no free ports")
