# SPDX-License-Identifier: Apache-2.0
"""Build the CPU image, and train the quickstart's recipe, shortened, in two of its containers on two hosts.

    make test-docker      as root; needs buildah, podman, mmdebstrap, what tests/cluster/hosts.py needs, and data/wiki

Three ways: launch/nossh.sh and launch/torchrun.sh in a container on each host, and launch/multinode.sh in a third
container, over pdsh to the sshd of the two. Every loss, and every tensor of the last checkpoint, must be bit for bit
that of two ranks on this machine without any container. It needs some 4 GB of disk, which it gives back.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import yaml
from engine import REPOSITORY, Engine, call
from hosts import Hosts, missing
from launch import assert_same_run, losses
from ranks import free_port

IMAGE = "localhost/merit-ds:cpu"
USER_ID = 10001  # docker/Dockerfile's MERIT_UID
STEPS = 12
WAYS = {"nossh": " in each", "torchrun": " in each", "multinode": " in a third over ssh"}
CONTAINER_SSH_PORT = 2200  # the hosts have an sshd of their own on 2222
PATIENCE_SECONDS = 600  # DeepSpeed may first build its CPU op for the run without containers


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
        hosts = stack.enter_context(Hosts(fresh(folder / "hosts"), 2))
        shutil.copy(hosts.hostfile, runs)
        give_away(runs)
        for name, way in WAYS.items():
            with step(f"two containers, launch/{name}.sh{way}, {STEPS} steps"):
                train = train_by_pdsh if name == "multinode" else partial(train_without_ssh, name=name)
                train(engine, hosts, runs)
                compare(runs, name)
    print("all runs: the same losses, and the same final weights and optimizer state, bit for bit", flush=True)


def what_is_missing() -> str | None:
    """What keeps this machine from running the test; None where nothing does."""
    if os.geteuid() != 0:
        return "root"
    for program in ("buildah", "podman", "mmdebstrap"):
        if shutil.which(program) is None:
            return program
    if not (REPOSITORY / "data/wiki.json").exists():
        return "data/wiki: make train, or python -m merit_ds.training.data wiki --output data/wiki --tokenizer byte"
    lacking = missing()
    return None if lacking is None else f"namespaces: {lacking}"


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

    unwanted = {
        "keys": "find / -xdev -path '*ssh*' -name '*_key' -o -xdev -path '*ssh/id_*'",
        "private keys": "grep -rlsE 'BEGIN .*PRIVATE KEY' /etc /home /opt/merit",
        "set-uid programs": "find / -xdev -type f -perm /6000",
        "compilers": "command -v cc c++ gcc g++ clang",
        "trainer's files that may be changed": "find /opt/merit -type f -writable",
    }
    assert inside("id -u").stdout.strip() == str(USER_ID)
    for what, search in unwanted.items():
        found = inside(f"{search}; echo searched")
        assert found.stdout == "searched\n", f"{what}: {found.stdout}{found.stderr}"
    built = inside("python -m merit_ds.training.cpu_comm && python -m merit_ds.doctor").stdout
    assert "ready" in built and "prebuilt, runs as" in built, built
    print(f"  user {USER_ID}, no keys, no set-uid programs, no compiler, kernels built ahead of time")
    stale = "touch -d '1 hour ago' /tmp/metrics.jsonl; docker/health.sh"
    assert inside(stale, "--env", "HEALTH_FILE=/tmp/metrics.jsonl").returncode == 1
    assert inside(stale, "--env", "HEALTH_FILE=/tmp/metrics.jsonl", "--env", "HEALTH_SECONDS=7200").returncode == 0
    assert inside("docker/health.sh").returncode == 0
    print("  its health check: 1 for a run that stands still, 0 for one that moves")
    refused = inside("docker/entrypoint.sh sshd")
    assert refused.returncode == 1 and "mount the public key" in refused.stderr


def prepare_runs(folder: Path) -> Path:
    """What is mounted as /opt/merit/runs: a recipe for each way, and the keys. The runs come to lie beside them."""
    runs = fresh(folder / "runs")
    (runs / "keys").mkdir()
    recipe = yaml.safe_load((REPOSITORY / "configs/quickstart.yaml").read_text())
    deepspeed = json.loads((REPOSITORY / "configs/quickstart.json").read_text())
    tokens = STEPS * deepspeed["train_batch_size"] * recipe["model"]["seq_length"]
    recipe["run"] |= {"train_tokens": tokens, "eval_interval": STEPS // 2, "log_interval": 1, "sample_tokens": 0}
    deepspeed["scheduler"]["params"] |= {"total_num_steps": STEPS, "warmup_num_steps": 2}
    (runs / "quickstart.json").write_text(json.dumps(deepspeed))
    for name in ("local", *WAYS):
        (runs / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    for key in ("launcher", "stranger"):
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", runs / "keys" / key)
    return runs


def train_without_containers(runs: Path) -> None:
    with step(f"the reference: two ranks on this machine, no container, {STEPS} steps"):
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        saving = ["--save", str(runs / "local"), "--load", str(runs / "local")]
        arguments = [str(runs / "local.yaml"), "--ranks", "2", "--master-port", str(free_port()), *saving]
        with (runs / "local.log").open("w") as log:
            command = [str(REPOSITORY / "launch/local.sh"), *arguments]
            process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
        wait_for([process], log=runs / "local.log")


def container(
    engine: Engine, hosts: Hosts, runs: Path, host: int, *command: str, options: tuple[str, ...] = ()
) -> list[str]:
    """The command that runs one on a host, with data and runs as its volumes."""
    mounts = ["--volume", f"{REPOSITORY / 'data'}:/opt/merit/data:ro", "--volume", f"{runs}:/opt/merit/runs"]
    settings = ["--env", "GLOO_SOCKET_IFNAME=eth0", "--env", "OMP_NUM_THREADS=1"]
    place = ["--network", f"ns:{hosts.namespace(host)}", "--hostname", hosts.names[host]]
    # As a cluster's DNS would: torchrun looks its own host's name up.
    names = [f"--add-host={name}:{address}" for name, address in zip(hosts.names, hosts.addresses, strict=True)]
    return engine.run(*place, *names, *mounts, *settings, *options, IMAGE, *command)


def start(command: list[str], engine: Engine, log: Path) -> subprocess.Popen:
    with log.open("a") as output:
        return subprocess.Popen(command, env=engine.environment, stdout=output, stderr=output)


def train_without_ssh(engine: Engine, hosts: Hosts, runs: Path, name: str) -> None:
    """launch/`name`.sh in a container on each host at once."""
    arguments = [f"runs/{name}.yaml", "--nodes", "2", "--master-addr", hosts.names[0], "--ranks-per-node", "1"]
    log = runs / f"{name}.log"
    started = []
    for host in range(2):
        rank = ["--node-rank", str(host)] if name == "nossh" else []  # torchrun numbers the hosts itself
        command = container(engine, hosts, runs, host, f"launch/{name}.sh", *arguments, *rank)
        started.append(start(command, engine, log))
    wait_for(started, log=log)


def train_by_pdsh(engine: Engine, hosts: Hosts, runs: Path) -> None:
    """sshd in a container on each host, and a launcher that holds the private key; a stranger's key is refused."""
    port = ("--env", f"SSHD_PORT={CONTAINER_SSH_PORT}")
    public = ("--volume", f"{runs / 'keys/launcher.pub'}:/run/secrets/authorized_keys:ro", *port)
    log = runs / "multinode.log"
    servers = [start(container(engine, hosts, runs, host, "sshd", options=public), engine, log) for host in range(2)]

    def launcher(key: str, *command: str) -> list[str]:
        private = ("--volume", f"{runs / 'keys' / key}:/run/secrets/ssh_key:ro")
        return container(engine, hosts, runs, 0, *command, options=private)

    def knock(key: str) -> subprocess.CompletedProcess:
        command = [
            "ssh",
            "-p",
            str(CONTAINER_SSH_PORT),
            "-o",
            "BatchMode=yes",
            hosts.names[1],
            "/opt/merit/docker/health.sh",
        ]
        return subprocess.run(launcher(key, *command), env=engine.environment, capture_output=True, text=True)

    try:
        wait_for_sshd(log, servers)
        known, stranger = knock("launcher"), knock("stranger")
        assert known.returncode == 0, known.stderr
        assert stranger.returncode == 255 and "Permission denied" in stranger.stderr
        arguments = ["runs/multinode.yaml", "--hostfile", "runs/hostfile", "--ssh-port", str(CONTAINER_SSH_PORT)]
        wait_for([start(launcher("launcher", "launch/multinode.sh", *arguments), engine, log)], log=log)
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


def fresh(folder: Path) -> Path:
    """An empty one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def give_away(folder: Path) -> None:
    """To the image's user: in a volume, files belong to whom they belong to outside."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, USER_ID, USER_ID)


def compare(runs: Path, name: str) -> None:
    assert len(losses(runs / name)) == STEPS
    assert_same_run(runs / name, runs / "local")


if __name__ == "__main__":
    main()
