# SPDX-License-Identifier: Apache-2.0
"""Build the CPU image, and train the quickstart's recipe, shortened, in two of its containers on two hosts.

    make test-docker          as root; needs buildah, podman, mmdebstrap, iproute2, and data/wiki (make train)

The hosts are network namespaces joined by a cable; the containers have their own files, processes and address. The
two ranks are started in three ways: one DeepSpeed launcher in each container (--no_ssh), torchrun in each, and DeepSpeed's launcher
over pdsh and the containers' sshd. Every loss, and every tensor of the last checkpoint, must be bit for bit that of two
ranks on this machine without any container. What it needs on disk, some 4 GB, is removed at the end.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from cluster.engine import REPOSITORY, Engine, call
from launch import assert_same_run, losses

IMAGE = "localhost/merit-ds:cpu"
ADDRESSES = ("10.78.0.1", "10.78.0.2")
NODES = ("merit-node0", "merit-node1")
USER_ID = 10001  # docker/Dockerfile's UID
STEPS = 12
PATIENCE_SECONDS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", metavar="IMAGE", help="for BASE_IMAGE; none: Debian bookworm, made by mmdebstrap")
    parser.add_argument("--folder", type=Path, help="keep image and runs here, and use what an earlier test left")
    arguments = parser.parse_args()
    missing = what_is_missing()
    if missing:
        print(f"skipped: the containers' test needs {missing}")
        return
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(temporary_folder()))
        engine = Engine(folder)
        stack.callback(engine.close)
        build(engine, base=arguments.base)
        check_image(engine)
        runs = prepare_runs(folder)
        train_without_containers(runs)
        stack.enter_context(two_hosts())
        for name, start in {"no_ssh": start_no_ssh, "torchrun": start_torchrun}.items():
            with step(f"two containers, {name}, {STEPS} steps"):
                wait_for(start(engine, runs, f"runs/{name}"), log=runs / f"{name}.log")
                compare(runs, name)
        with step(f"two containers with sshd, a third that launches by pdsh, {STEPS} steps"):
            train_by_pdsh(engine, runs)
            compare(runs, "pdsh")
    print("all runs: the same losses, and the same final weights and optimizer state, bit for bit")


def what_is_missing() -> str | None:
    """What keeps this machine from running the test; None where nothing does."""
    if os.geteuid() != 0:
        return "root"
    for program in ("buildah", "podman", "mmdebstrap", "ip", "unshare"):
        if shutil.which(program) is None:
            return program
    if not (REPOSITORY / "data/wiki.json").exists():
        return "data/wiki: make train, or python -m merit_ds.training.data wiki --output data/wiki --tokenizer byte"
    if subprocess.run(["unshare", "-mn", "true"], capture_output=True).returncode:
        return "a kernel that allows mount and network namespaces"
    return None


@contextmanager
def temporary_folder() -> Iterator[str]:
    """Removed at the end, when nothing in it is mounted any more."""
    folder = tempfile.mkdtemp(prefix="merit-containers-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Say what is done, and how long it took."""
    print(f"{name} ... ", end="", flush=True)
    start = time.monotonic()
    yield
    print(f"{time.monotonic() - start:.0f} s", flush=True)


def build(engine: Engine, *, base: str | None) -> None:
    if base is None and not engine.exists("localhost/merit-base"):
        with step("a base image of Debian bookworm, by mmdebstrap"):
            engine.make_base()
    with step("the cpu target of docker/Dockerfile, by buildah"):
        engine.build(IMAGE, base=base or "localhost/merit-base:bookworm", log=engine.folder / "build.log")
    print(f"  {IMAGE}: {engine.size(IMAGE)}")


def check_image(engine: Engine) -> None:
    """What the image promises, asked of a container: no root, no keys, no compiler, and kernels that are there."""
    config = engine.inspect(IMAGE)
    assert config["User"] == str(USER_ID) and config["Healthcheck"]["Test"] == ["CMD", "/opt/merit/docker/health.sh"]
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"

    def inside(script: str, *options: str) -> subprocess.CompletedProcess:
        command = engine.run(*options, "--network", "none", IMAGE, "bash", "-c", script)
        return subprocess.run(command, text=True, capture_output=True, env=engine.environment)

    assert inside("id -u").stdout.strip() == str(USER_ID)
    keys = "find / -xdev -name 'ssh_host_*' -o -xdev -name 'id_*' -path '*ssh*'; grep -rlsE 'BEGIN .*PRIVATE KEY' /etc /home /opt/merit"
    assert inside(keys).stdout == ""
    assert inside("find / -xdev -type f -perm /6000").stdout == ""
    assert inside("command -v cc c++ gcc g++").returncode != 0
    assert inside("touch /opt/merit/pretrain_gpt.py && echo x >> /opt/merit/pretrain_gpt.py").returncode != 0
    built = inside("python -m merit_ds.training.cpu_comm && python -m merit_ds.doctor").stdout
    assert "ready" in built and "prebuilt, runs as" in built, built
    print(f"  user {USER_ID}, no set-uid programs, no keys, no compiler, kernels built ahead of time")
    stale = "touch -d '1 hour ago' /tmp/metrics.jsonl; docker/health.sh"
    assert inside(stale, "--env", "HEALTH_FILE=/tmp/metrics.jsonl").returncode == 1
    assert inside(stale, "--env", "HEALTH_FILE=/tmp/metrics.jsonl", "--env", "HEALTH_SECONDS=7200").returncode == 0
    assert inside("docker/health.sh").returncode == 0
    print("  its health check: 1 for a run that stands still, 0 for one that moves")
    refused = inside("docker/entrypoint.sh sshd")
    assert refused.returncode == 1 and "mount the public key" in refused.stderr


def prepare_runs(folder: Path) -> Path:
    """What is mounted as /opt/merit/runs: the recipe's JSON for fewer steps, the hostfile, the keys; runs follow."""
    runs = folder / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    (runs / "keys").mkdir(parents=True)
    recipe = json.loads((REPOSITORY / "configs/quickstart.json").read_text())
    recipe["scheduler"]["params"] |= {"total_num_steps": STEPS, "warmup_num_steps": 2}
    (runs / "short.json").write_text(json.dumps(recipe))
    (runs / "hostfile").write_text("".join(f"{node} slots=1\n" for node in NODES))
    for key in ("launcher", "stranger"):
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", runs / "keys" / key)
    for path in (runs, *runs.rglob("*")):
        os.chown(path, USER_ID, USER_ID)
    return runs


def trainer(save: str, deepspeed_config: str) -> list[str]:
    """The quickstart, shortened: the arguments of pretrain_gpt.py, with it."""
    tokens = STEPS * 32 * 256
    changes = [f"--set=run.train_tokens={tokens}", "--set=run.eval_interval=6", "--set=run.log_interval=1"]
    recipe = ["--config", "configs/quickstart.yaml", "--deepspeed_config", deepspeed_config]
    return ["pretrain_gpt.py", *recipe, *changes, "--save", save, "--set=run.sample_tokens=0"]


def train_without_containers(runs: Path) -> None:
    with step(f"the reference: two ranks on this machine, no container, {STEPS} steps"):
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        launcher = Path(sys.executable).with_name("deepspeed")
        arguments = trainer(str(runs / "reference"), str(runs / "short.json"))
        command = [str(launcher), "--num_gpus", "2", "--master_port", "29511", *arguments]
        with (runs / "reference.log").open("w") as log:
            process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
        wait_for([process], log=runs / "reference.log")


@contextmanager
def two_hosts() -> Iterator[None]:
    """Two network namespaces, with a cable from one's eth0 to the other's."""

    def remove() -> None:
        for node in NODES:
            subprocess.run(["ip", "netns", "del", node], capture_output=True)

    remove()
    try:
        for node in NODES:
            call("ip", "netns", "add", node)
        call(*f"ip link add eth0 netns {NODES[0]} type veth peer name eth0 netns {NODES[1]}".split())
        for node, address in zip(NODES, ADDRESSES, strict=True):
            call(*f"ip -n {node} addr add {address}/24 dev eth0".split())
            for link in ("lo", "eth0"):
                call(*f"ip -n {node} link set {link} up".split())
        yield
    finally:
        remove()


def container(engine: Engine, runs: Path, node: int, *command: str, options: tuple[str, ...] = ()) -> list[str]:
    """The command that runs one on a host, with data and runs as its volumes."""
    mounts = ["--volume", f"{REPOSITORY / 'data'}:/opt/merit/data:ro", "--volume", f"{runs}:/opt/merit/runs"]
    settings = ["--env", "GLOO_SOCKET_IFNAME=eth0", "--env", "OMP_NUM_THREADS=1"]
    place = ["--network", f"ns:/run/netns/{NODES[node]}", "--hostname", NODES[node]]
    # As a cluster's DNS or a Docker network would: torchrun looks its own host's name up.
    place += [f"--add-host={name}:{address}" for name, address in zip(NODES, ADDRESSES, strict=True)]
    return engine.run(*place, *mounts, *settings, *options, IMAGE, *command)


def start(command: list[str], engine: Engine, log: Path) -> subprocess.Popen:
    with log.open("a") as output:
        return subprocess.Popen(command, env=engine.environment, stdout=output, stderr=output)


def start_no_ssh(engine: Engine, runs: Path, save: str) -> list[subprocess.Popen]:
    """The same command in each container, which differs in its rank alone."""
    launcher = ["deepspeed", "--hostfile", "runs/hostfile", "--no_ssh", "--master_addr", NODES[0]]
    return [
        start(
            container(engine, runs, node, *launcher, "--node_rank", str(node), *trainer(save, "runs/short.json")),
            engine,
            runs / "no_ssh.log",
        )
        for node in range(2)
    ]


def start_torchrun(engine: Engine, runs: Path, save: str) -> list[subprocess.Popen]:
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{NODES[0]}:29400", "--rdzv-id", "quickstart"]
    launcher = ["torchrun", "--nnodes", "2", "--nproc-per-node", "1", *meeting]
    return [
        start(
            container(engine, runs, node, *launcher, *trainer(save, "runs/short.json")), engine, runs / "torchrun.log"
        )
        for node in range(2)
    ]


def train_by_pdsh(engine: Engine, runs: Path) -> None:
    """sshd in a container on each host, and a launcher that holds the private key; a stranger's key is refused."""
    public = ("--volume", f"{runs / 'keys/launcher.pub'}:/run/secrets/authorized_keys:ro")
    log = runs / "pdsh.log"
    servers = [start(container(engine, runs, node, "sshd", options=public), engine, log) for node in range(2)]
    try:
        wait_for_sshd(log, servers)

        def from_first(key: str, *command: str) -> list[str]:
            private = ("--volume", f"{runs / 'keys' / key}:/run/secrets/ssh_key:ro")
            return container(engine, runs, 0, *command, options=private)

        knock = ["ssh", "-o", "BatchMode=yes", NODES[1], "true"]
        assert (
            subprocess.run(from_first("launcher", *knock), env=engine.environment, capture_output=True).returncode == 0
        )
        stranger = subprocess.run(
            from_first("stranger", *knock), env=engine.environment, capture_output=True, text=True
        )
        assert stranger.returncode == 255 and "Permission denied" in stranger.stderr
        launcher = ["deepspeed", "--hostfile", "runs/hostfile", "--master_addr", NODES[0]]
        command = from_first("launcher", *launcher, *trainer("runs/pdsh", "runs/short.json"))
        wait_for([start(command, engine, log)], log=log)
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait()


def wait_for_sshd(log: Path, servers: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 30
    while len(re.findall("Server listening on", log.read_text())) < len(servers):
        if time.monotonic() > deadline or any(server.poll() is not None for server in servers):
            raise SystemExit(f"error: sshd did not start:\n{log.read_text()}")
        time.sleep(0.1)


def wait_for(processes: list[subprocess.Popen], *, log: Path) -> None:
    """All must end well; where one does not, the rest are stopped and the end of their log is shown."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    try:
        for process in processes:
            if process.wait(timeout=max(1, deadline - time.monotonic())):
                raise SystemExit(f"error: status {process.returncode}; the end of {log}:\n{log.read_text()[-4000:]}")
    except subprocess.TimeoutExpired:
        raise SystemExit(
            f"error: not done in {PATIENCE_SECONDS} s; the end of {log}:\n{log.read_text()[-4000:]}"
        ) from None
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait()


def compare(runs: Path, name: str) -> None:
    assert len(losses(runs / name)) == STEPS
    assert_same_run(runs / name, runs / "reference")


if __name__ == "__main__":
    main()
