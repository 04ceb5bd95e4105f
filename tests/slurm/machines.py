"""Machines on loopback, as far as the kernel allows: for tests that need several hosts on one.

A machine is a program in UTS, mount and PID namespaces of its own: it has a hostname, an /etc/hosts that knows the
others, and all that it starts dies with it. So a machine is switched off by one SIGKILL, and nothing outlives a
test, even where the tests themselves are killed (PDEATHSIG). Nothing of the host's own /etc is touched.
"""

import os
import shutil
import subprocess
from pathlib import Path

NAMESPACES = "unshare --uts --mount --mount-proc --pid --fork --kill-child".split()


def unavailable(packages: tuple[str, ...], programs: tuple[str, ...]) -> str | None:
    """Why machines with these programs cannot be had here, or None; installs Debian packages where it can."""
    if os.geteuid() != 0:
        return "needs root"
    if not shutil.which("unshare") or subprocess.run([*NAMESPACES, "true"]).returncode:
        return "the kernel grants no namespaces here"
    absent = [name for name in programs if not shutil.which(name)]
    if absent and shutil.which("apt-get"):
        _install(packages)
        absent = [name for name in programs if not shutil.which(name)]
    return f"not installed, and not to be had by apt-get: {', '.join(absent)}" if absent else None


def _install(packages: tuple[str, ...]) -> None:
    policy = Path(
        "/usr/sbin/policy-rc.d"
    )  # Debian asks it whether a package's service may start: no
    mine = not policy.exists()
    if mine:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    get = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"]
    try:
        for command in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
            subprocess.run(
                get + command, env=environment, stdout=subprocess.DEVNULL, timeout=300, check=False
            )
    except subprocess.TimeoutExpired:
        pass
    finally:
        if mine:
            policy.unlink()


def start(
    name: str, program: list[str], log: Path, binds: dict[str, Path], environment: dict[str, str]
) -> "subprocess.Popen[bytes]":
    """Switch a machine on: ``program`` as the child of its first process, which reaps orphans.

    Args:
        binds: files and folders that the machine sees in other places, as {"/etc/hosts": Path(...)}.
    """
    mounts = "".join(f"mount --bind {source} {target}; " for target, source in binds.items())
    inside = f'hostname {name}; {mounts} "$@" & wait $!'
    with open(log, "ab") as output:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *NAMESPACES, "bash", "-c", inside, name, *program],
            env=environment,
            cwd=log.parent,
            start_new_session=True,  # Ctrl-C is for the tests: they switch machines off in order
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


def hosts(folder: Path, names: tuple[str, ...]) -> Path:
    """An /etc/hosts that puts these machines at 127.0.0.11, 127.0.0.12, ..."""
    lines = [f"127.0.0.1{number} {name}" for number, name in enumerate(names, 1)]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
    return folder / "hosts"
