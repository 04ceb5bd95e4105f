"""``deepspeed --hostfile``: two hosts on loopback, each with an sshd of its own, joined by pdsh."""

import os
import pwd
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sltrain_dist.parallel.mesh import free_port
from tests.launcher import tiny
from tests.slurm import machines

NAMES = ("host1", "host2")
SSHD = """
ListenAddress 127.0.0.1{number}
Port {port}
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PidFile none
"""


@pytest.fixture
def shell(tmp_path):
    """Runs a command on the first of two hosts that let each other in."""
    packages = ("pdsh", "openssh-server", "openssh-client")
    if reason := machines.unavailable(packages, ("pdsh", "sshd", "ssh-keygen")):
        print(f"no two hosts: {reason}")
        pytest.skip(f"no two hosts: {reason}")
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")], check=True
    )
    port = free_port()
    config = f"Host *\nPort {port}\nIdentityFile {tmp_path}/key\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
    (tmp_path / "ssh").mkdir()
    (tmp_path / "ssh" / "config").write_text(config)
    Path("/run/sshd").mkdir(exist_ok=True)
    home = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".ssh"  # ssh asks for no HOME
    home.mkdir(mode=0o700, exist_ok=True)
    binds = {"/etc/hosts": machines.hosts(tmp_path, NAMES), str(home): tmp_path / "ssh"}
    (tmp_path / "environment").write_text("OMP_NUM_THREADS=1")  # all that deepspeed hands on
    running = []

    def start(name: str, command: list[str]) -> "subprocess.Popen[bytes]":
        environment = os.environ | {"DS_ENV_FILE": str(tmp_path / "environment")}
        running.append(machines.start(name, command, tmp_path / f"{name}.log", binds, environment))
        return running[-1]

    for number, name in enumerate(NAMES, 1):
        (tmp_path / f"{name}.conf").write_text(
            SSHD.format(number=number, folder=tmp_path, port=port)
        )
        start(name, ["/usr/sbin/sshd", "-D", "-e", "-f", str(tmp_path / f"{name}.conf")])
    for number in range(1, len(NAMES) + 1):
        _wait_for(f"127.0.0.1{number}", port)
    yield lambda command: start("login", command)
    for process in running:
        process.kill()
        process.wait()


def _wait_for(address: str, port: int, seconds: float = 30) -> None:
    """Until somebody listens there."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((address, port), timeout=1).close()
        except OSError:
            assert time.monotonic() < deadline, f"nobody listens at {address}:{port}"
            time.sleep(0.1)


def test_two_hosts_train_like_one(shell, tmp_path):
    tiny.write_inputs(tmp_path)
    alone = tiny.launch(
        [sys.executable, "launcher/pretrain.py", *tiny.flags(tmp_path, tmp_path / "one")]
    )
    assert alone.returncode == 0, alone.stderr
    (tmp_path / "hostfile").write_text("".join(f"{name} slots=1\n" for name in NAMES))
    command = [
        *("env", "-C", str(tiny.REPOSITORY), f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}"),
        *("deepspeed", "--hostfile", str(tmp_path / "hostfile")),
        *("--master_addr", "127.0.0.11", "--master_port", str(free_port())),
        *("launcher/pretrain.py", "--ds_config", "ds_configs/zero2.json"),
        *tiny.flags(tmp_path, tmp_path / "two"),
    ]  # fmt: skip
    launched = shell(command)
    code = launched.wait(timeout=400)
    log = "\n".join(path.read_text(errors="replace") for path in sorted(tmp_path.glob("*.log")))
    assert code == 0, log
    assert "host1: " in log
    assert "host2: " in log
    one, two = tiny.losses(tmp_path / "one"), tiny.losses(tmp_path / "two")
    assert two == pytest.approx(one, abs=1e-4)
