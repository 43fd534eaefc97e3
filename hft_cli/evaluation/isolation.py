"""Limits of Linux for a process that runs a program which nobody has read. Standard library only.

What the kernel refuses is left out: `isolate` says what it reached. Other systems have none of these limits.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

PROCESSES, NETWORK, FILES = "processes", "network", "files"  # what a program can be cut off from

FILE_SIZE = 2**20  # bytes of a written file

FOLDER_SIZE = 2**26  # bytes of all written files, where the program has a file system of its own

# linux/sched.h: new namespaces of mounts, hostnames, IPC, users, processes and networks
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
NAMESPACES = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET

# linux/prctl.h
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 36, 38
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000  # linux/mount.h

MOUNT_SETATTR, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, 0x8000, 1  # a system call with one number everywhere, Linux 5.12

CAPABILITY_VERSION = 0x20080522  # linux/capability.h, version 3

# linux/filter.h and linux/seccomp.h: load a word, jump if equal, jump if at least, return; allow, or fail with EPERM
LOAD, EQUAL, AT_LEAST, RETURN, ALLOW, REFUSE = 0x20, 0x15, 0x35, 0x06, 0x7FFF0000, 0x00050001

# System call that a program does not get -> its number on x86_64 and on aarch64; None: not there.
REFUSED = {
    "clone": (56, 220), "fork": (57, None), "vfork": (58, None), "clone3": (435, 435),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40),
}  # fmt: skip

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h; in the order of the columns of REFUSED

X32 = 0x40000000  # from here on, system calls of x86_64 under other numbers

_LIBC: Any = ctypes.CDLL(None, use_errno=True)


def isolate(folder: Path) -> list[str]:
    """Put this process and its children into namespaces of their own, in which only `folder` can be written.

    Its children are the first processes of the new namespace: when the first one ends, Linux ends the others.

    Returns:
        those of PROCESSES, NETWORK and FILES from which the children are cut off.
    """
    if sys.platform != "linux":
        return []
    reached = []
    if _new_namespaces():
        reached = [PROCESSES, NETWORK, *([FILES] if _write_only_below(folder) else [])]
    _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans become children of this process, which ends them
    _LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # processes of the same user cannot open its files or its memory
    return reached


def _new_namespaces() -> bool:
    user, group = os.getuid(), os.getgid()
    if _LIBC.unshare(NAMESPACES | CLONE_NEWUSER) != 0:
        return user == 0 and _LIBC.unshare(NAMESPACES) == 0
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path("/proc/self", name).write_text(text, encoding="utf-8")  # without a map of our user no file can be created
    with suppress(OSError):  # read-only in some containers
        # a user namespace inside would give rights again
        Path("/proc/sys/user/max_user_namespaces").write_text("0", encoding="utf-8")
    return True


def _write_only_below(folder: Path) -> bool:
    """Mount everything read-only in this namespace, and an empty file system in memory on the folder."""
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)
    if (
        _LIBC.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) != 0
        or _LIBC.syscall(MOUNT_SETATTR, -1, b"/", AT_RECURSIVE, attributes, len(attributes)) != 0
    ):
        return False
    size = b"size=%d" % FOLDER_SIZE
    _LIBC.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", MS_NOSUID | MS_NODEV, size)
    os.chdir(folder)
    return True


def hide_processes() -> None:
    """In the first process of new namespaces: mount a /proc without the other processes, if the kernel lets it."""
    _LIBC.unshare(CLONE_NEWNS)
    _LIBC.mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)


def limit(seconds: int, memory: int) -> None:
    """Limit this process for good: processor time in seconds, address space in bytes, files, processes and rights."""
    if sys.platform == "linux":
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _drop_capabilities()
        _refuse_calls()
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, FILE_SIZE),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(kind, (most, most))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # too large a file raises OSError instead of killing the program


def _drop_capabilities() -> None:
    """Root keeps its number and its files, and loses its rights; no program that it starts gets them back."""
    _LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for capability in range(64):
        _LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    _LIBC.capset(struct.pack("Ii", CAPABILITY_VERSION, 0), bytes(24))


def _refuse_calls() -> None:
    """Refuse new processes and threads (also to root, for which RLIMIT_NPROC does not hold), signals and namespaces."""
    if os.uname().machine not in MACHINES:
        return
    column = list(MACHINES).index(os.uname().machine)
    calls = [number for numbers in REFUSED.values() if (number := numbers[column]) is not None]
    # Each instruction: code, instructions to skip if the comparison is true, and if it is false, value.
    program = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, MACHINES[os.uname().machine]), (RETURN, 0, 0, REFUSE), (LOAD, 0, 0, 0)]
    program += [(AT_LEAST, len(calls) + 1, 0, X32)]
    program += [(EQUAL, len(calls) - index, 0, call) for index, call in enumerate(calls)]
    program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    pointer = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    _LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, pointer, 0, 0)


def end_children() -> None:
    """Kill the children of this process, and their orphans, until none is left."""
    while True:
        for child in _children():
            with suppress(OSError):
                os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    """The children of this process, from /proc: the fourth field of `stat`, behind the name in brackets."""
    own, children = os.getpid(), []
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if entry.isdigit():
            with suppress(OSError):
                stat = Path("/proc", entry, "stat").read_text(encoding="utf-8", errors="replace")
                if int(stat.rpartition(")")[2].split()[1]) == own:
                    children.append(int(entry))
    return children
