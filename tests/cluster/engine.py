# SPDX-License-Identifier: Apache-2.0
"""buildah and podman as root, in a storage of their own, where no daemon and no registry is at hand."""

import json
import os
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = "localhost/merit-base:bookworm"
BASE_PACKAGES = "python3,python3-venv,ca-certificates"


def call(*command: str | Path, **options) -> str:
    """Run a command that must succeed; returns what it printed."""
    done = subprocess.run([str(part) for part in command], text=True, capture_output=True, **options)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(map(str, command))}: {done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout.strip()


class Engine:
    """Builds images and runs containers.

    Args:
        folder: its storage, some 4 GB, and its temporary files.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.storage = ["--root", str(folder / "storage"), "--runroot", str(folder / "run")]
        self.environment = os.environ | {"STORAGE_DRIVER": "overlay", "TMPDIR": str(folder)}

    def buildah(self, *arguments: str | Path, **options) -> str:
        return call("buildah", *self.storage, *arguments, env=self.environment, **options)

    def exists(self, image: str) -> bool:
        return bool(self.buildah("images", "--quiet", "--filter", f"reference={image}"))

    def make_base(self) -> str:
        """Debian bookworm with its Python 3.11 as an image, out of Debian's packages; returns its name."""
        archive = self.folder / "base.tar"
        call("mmdebstrap", "--variant=apt", f"--include={BASE_PACKAGES}", "bookworm", archive)
        container = self.buildah("from", "scratch")
        self.buildah("add", "--quiet", container, archive, "/")
        self.buildah("config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
        self.buildah("commit", "--quiet", "--rm", container, BASE)
        archive.unlink()
        return BASE

    def build(self, image: str, *, base: str, log: Path) -> None:
        """The cpu target of docker/Dockerfile; what buildah prints goes to `log`."""
        command = ["buildah", *self.storage, "bud", "--format", "docker", "--isolation", "chroot", "--network", "host"]
        command += ["--layers", *pip_mounts(self.folder), "--build-arg", f"BASE_IMAGE={base}", "--target", "cpu"]
        command += ["--file", "docker/Dockerfile", "--tag", image, "."]
        with log.open("w") as output:
            failed = subprocess.run(
                command, cwd=REPOSITORY, env=self.environment, stdout=output, stderr=output
            ).returncode
        if failed:
            raise SystemExit(f"error: the image does not build; the end of {log}:\n{log.read_text()[-3000:]}")

    def inspect(self, image: str) -> dict:
        """The image's configuration: user, entry point, labels, health check."""
        return json.loads(self.buildah("inspect", "--type", "image", image))["Docker"]["config"]

    def size(self, image: str) -> str:
        return self.buildah("images", "--format", "{{.Size}}", image)

    def close(self) -> None:
        """Unmount what is mounted in its folder, so that this can be removed."""
        self.buildah("rm", "--all")
        mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for path in sorted((path for path in mounted if path.startswith(f"{self.folder}/")), reverse=True):
            call("umount", path)

    def run(self, *arguments: str | Path) -> list[str]:
        """The command that runs a container by podman.

        podman wants cgroups of the second version, so it gets a mount namespace in which they are, and uses none.
        """
        prepare = "mount --make-rprivate / && umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup"
        podman = ["podman", *self.storage, "--cgroup-manager", "cgroupfs", "run", "--cgroups=disabled", "--rm"]
        # The health check is systemd's to call, and podman's own limits may be above what this machine allows.
        podman += ["--no-healthcheck", "--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096"]
        return ["unshare", "-m", "sh", "-c", f'{prepare} && exec "$@"', "podman", *podman, *map(str, arguments)]


def pip_mounts(folder: Path) -> list[str]:
    """What makes pip work in the build as it does on this machine: its configuration, and the folders named in it."""
    settings: dict[str, str] = {}
    for line in call("python3", "-m", "pip", "config", "list").splitlines():
        key, _, value = line.partition("=")
        settings[key.rpartition(".")[2]] = value.strip("'\"")
    configuration = folder / "pip.conf"
    configuration.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
    words = [word for value in settings.values() for word in value.split()]
    # The pages of a package index name files that lie beside its folder.
    paths = {Path(word.removeprefix("file://")).parent if word.startswith("file://") else Path(word) for word in words}
    mounted = sorted(path for path in paths if path.is_absolute() and path.exists())
    return [f"--volume={configuration}:/etc/pip.conf:ro", *(f"--volume={path}:{path}:ro" for path in mounted)]
