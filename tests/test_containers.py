# SPDX-License-Identifier: Apache-2.0
"""docker/: linted, and held to what it promises. `make test-docker` builds the CPU image and trains in it."""

import fnmatch
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from launch import REPOSITORY
from packaging.requirements import Requirement

DOCKER = REPOSITORY / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
SCRIPTS = sorted(DOCKER.glob("*.sh"))


def tool(name: str, *arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run one of the programs that came with the `dev` extra."""
    program = Path(sys.executable).with_name(name)
    return subprocess.run([program, *arguments], capture_output=True, text=True, cwd=REPOSITORY, **options)  # type: ignore[call-overload]


def instructions(text: str) -> list[str]:
    """Of a Dockerfile: one each, without comments, in one line."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return [" ".join(line.split()) for line in "\n".join(lines).replace("\\\n", "").splitlines() if line.strip()]


def stage(name: str) -> list[str]:
    """The instructions of a stage of the Dockerfile, after its FROM."""
    found = re.split(r"^FROM .*? AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    return instructions(dict(zip(found[1::2], found[2::2], strict=True))[name])


def test_dockerfile_lint() -> None:
    found = tool("hadolint", "--failure-threshold", "style", "docker/Dockerfile")
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_lint(script: Path) -> None:
    found = tool("shellcheck", script)
    assert found.returncode == 0, found.stdout
    assert os.access(script, os.X_OK)


def compose(*profile: str) -> dict[str, dict[str, object]]:
    found = tool("docker-compose", "--file", "docker/compose.yaml", *profile, "config", "--format", "json")
    assert found.returncode == 0 and not found.stderr, found.stderr
    services: dict[str, dict[str, object]] = json.loads(found.stdout)["services"]
    return services


def test_compose_is_valid() -> None:
    nodes = compose()
    assert nodes.keys() == {"data", "node0", "node1"}
    ranks = {name: node["command"] for name, node in nodes.items() if name != "data"}
    assert [command[command.index("--node-rank") + 1] for command in ranks.values()] == ["0", "1"]  # type: ignore[attr-defined,index]
    gpu, infiniband = (compose("--profile", name)[name] for name in ("gpu", "gpu-ib"))
    assert gpu["ipc"] == "host" and gpu["ulimits"]["memlock"] == -1  # type: ignore[index]
    every = [*nodes.values(), gpu, infiniband]
    assert not any(service.keys() & {"ports", "expose", "privileged", "cap_add", "user"} for service in every)
    assert infiniband.pop("devices") and infiniband.pop("profiles") == ["gpu-ib"] and gpu.pop("profiles") == ["gpu"]
    assert infiniband == gpu  # without the devices, which a machine may lack


def test_compose_names_no_interface_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the host's network it is the shell's variables that go in, and none where they are not set."""
    names = dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA"))
    for name in [*names, "NCCL_DEBUG"]:
        monkeypatch.delenv(name, raising=False)
    assert compose("--profile", "gpu")["gpu"]["environment"] == names | {"NCCL_DEBUG": "WARN"}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "bond0")
    given = compose("--profile", "gpu")["gpu"]["environment"]
    assert given == names | {"NCCL_DEBUG": "WARN", "GLOO_SOCKET_IFNAME": "bond0"}


def sent(path: str) -> bool:
    """Whether .dockerignore lets a file into the build: the last pattern that fits it or a folder above decides."""
    parts = path.split("/")
    above = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    decided = True
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        names = above if not pattern.startswith("**/") else parts
        if line and not line.startswith("#") and any(fnmatch.fnmatch(x, pattern.removeprefix("**/")) for x in names):
            decided = line.startswith("!")
    return decided


def test_only_what_is_copied_is_sent() -> None:
    copied = [line.split()[1:-1] for line in instructions(DOCKERFILE) if re.match(r"COPY (?!--from)", line)]
    sources = {source for sources in copied for source in sources}
    assert {"pretrain_gpt.py", "configs", "launch", "merit_ds", "constraints.txt"} <= sources
    for source in sources:
        assert (REPOSITORY / source).exists() and sent(source), source
    private = "data/wiki_train.bin runs/a/run.json .venv/bin/python .git/config .deepspeed_env id_ed25519 docs/gpu.md"
    built = "merit_ds/ops/lib/merit_cpu.so merit_ds/__pycache__/a.pyc merit_ds/ops/__pycache__/a.pyc build/x tests/a.py"
    assert [path for path in f"{private} {built}".split() if sent(path)] == []
    assert sent("merit_ds/csrc/merit_math.h") and sent("launch/nossh.sh")


def test_nothing_is_fetched_or_baked_in_that_should_not_be() -> None:
    text = "".join(path.read_text() for path in DOCKER.iterdir())
    assert "PRIVATE KEY" not in text and not re.search("ssh-(rsa|ed25519) AAAA", text)
    assert not re.search(r"^\s*ADD\b|https?://|\bcurl\b|\bwget\b|:latest\b", DOCKERFILE, re.MULTILINE)
    assert "ssh-keygen" not in DOCKERFILE
    for target in ("cpu", "gpu"):
        assert "/etc/ssh/ssh_host_*" in next(line for line in stage(target) if "openssh-server" in line)


def test_the_two_images_end_alike() -> None:
    """But for their names and NVIDIA's entry point, which goes before ours."""

    def ending(target: str) -> list[str]:
        lines = stage(target)
        lines = lines[lines.index("COPY --from=files /opt/merit /opt/merit") :]
        lines = [line for line in lines if not line.startswith("ENV PATH")]
        return [re.sub(r'(title|description)="[^"]*"|"/opt/nvidia/nvidia_entrypoint.sh", ', "", line) for line in lines]

    assert ending("cpu") == ending("gpu")
    assert "USER ${MERIT_UID}" in ending("cpu") and "ARG MERIT_UID=10001" in ending("cpu")
    # After all that costs time to build, and where merit_ds/training/report.py looks for it.
    assert ending("cpu")[-3:-1] == ["ARG REVISION=unknown", "ENV MERIT_DS_REVISION=${REVISION}"]


def test_no_argument_is_one_that_could_not_be_given() -> None:
    """A base image's ENV goes before an ARG of the same name, and bash does not let UID be set."""
    taken = {"TORCH_CUDA_ARCH_LIST", "UID", "EUID", "PPID"}
    assert not taken & set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    lines = stage("gpu-builder")
    assert 'ARG CUDA_ARCHS="8.0 9.0 10.0"' in lines
    wheel = next(line for line in lines if "pip wheel" in line)
    assert wheel.startswith('RUN TORCH_CUDA_ARCH_LIST="${CUDA_ARCHS}" ') and "MERIT_BUILD_CUDA=1" in wheel


def test_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert re.findall(r'image\.version="(.*?)"', DOCKERFILE) == [project["version"]] * 2
    pins = dict(re.findall(r"^(\S+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
    named = re.search(r"megatron-core ([\d.]+\d)", DOCKERFILE)
    assert named is not None and named[1] == pins["megatron-core"] == importlib.metadata.version("megatron-core")
    engine = re.search(r"Transformer Engine ([\d.]+\d)", DOCKERFILE)
    wanted = [Requirement(line) for line in importlib.metadata.requires("megatron-core") or []]
    wanted = [one for one in wanted if one.name == "transformer-engine"]
    assert engine is not None and len(wanted) == 1 and engine[1] in wanted[0].specifier


def test_the_gpu_image_makes_the_data_that_its_commands_train_on() -> None:
    extras = re.search(r"merit_ds-\*\.whl\)\[(.*?)\]", " ".join(stage("gpu")))
    assert extras is not None and extras[1].split(",") == ["train", "openwebtext"]
    for path in (REPOSITORY / "docs/containers.md", DOCKER / "compose.yaml"):
        text = path.read_text()
        made = re.search(r"merit_ds\.training\.data openwebtext --output (\S+) --tokenizer gpt2", text)
        trained = list(re.finditer(r"launch/\w+\.sh,? (gpt2_\w+)", text))
        assert made is not None and trained
        for command in trained:
            recipe = yaml.safe_load((REPOSITORY / f"configs/{command[1]}.yaml").read_text())
            assert recipe["data"]["prefix"] == made[1] and made.start() < command.start(), command[0]


def healthy(home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), **variables}
    return subprocess.run([DOCKER / "health.sh"], env=environment, capture_output=True, text=True, timeout=30)


def test_health_follows_the_run(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert healthy(tmp_path).returncode == 0
    assert "is not there" in healthy(tmp_path, HEALTH_FILE=str(metrics)).stdout
    metrics.touch()
    assert healthy(tmp_path, HEALTH_FILE=str(metrics)).returncode == 0
    hour_ago = time.time() - 3600
    os.utime(metrics, (hour_ago, hour_ago))
    stale = healthy(tmp_path, HEALTH_FILE=str(metrics))
    assert stale.returncode == 1 and "has not grown for 360" in stale.stdout
    assert healthy(tmp_path, HEALTH_FILE=str(metrics), HEALTH_SECONDS="7200").returncode == 0


def test_health_asks_sshd_where_it_should_run(tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/host_key").touch()
    assert healthy(tmp_path, SSHD_PORT="1").returncode == 1
    serve = "import socket, sys; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)\n"
    serve += "while True: s.accept()[0].sendall(sys.argv[1].encode())"
    for banner, status in (("SSH-2.0-OpenSSH_9.2\r\n", 0), ("HTTP/1.1 400\r\n", 1)):
        server = subprocess.Popen([sys.executable, "-c", serve, banner], stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        try:
            assert healthy(tmp_path, SSHD_PORT=server.stdout.readline().strip()).returncode == status
        finally:
            server.kill()
            server.wait()


def test_entrypoint_runs_the_command_and_refuses_sshd_without_a_key(tmp_path: Path) -> None:
    def enter(*command: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "AUTHORIZED_KEYS": str(tmp_path / "none")}
        return subprocess.run([DOCKER / "entrypoint.sh", *command], env=environment, capture_output=True, text=True)

    assert enter("sh", "-c", "echo $1; exit 3", "sh", "a b").args and enter("sh", "-c", "exit 3").returncode == 3
    assert enter("echo", "a  b").stdout == "a  b\n"
    refused = enter("sshd")
    assert refused.returncode == 1 and refused.stderr.startswith("error: ") and "mount the public key" in refused.stderr
    assert list(tmp_path.iterdir()) == []
