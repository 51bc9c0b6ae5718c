"""What a stranger's code may try in a sandbox; run as a program, it prints what it got.

The argument is a JSON object of what the other side offers: paths, a port, an abstract socket, and
its own namespaces. Each attempt ends as the text of the error that refused it, or as what it got.
Only the standard library, so that any Python can run it.

None of it may harm a machine, whatever is wrong with the sandbox:

* it does nothing at all in the namespaces of whoever started it (``confined``);
* calls that could change the system are made with arguments that the kernel takes for invalid, so
  they can end in "not permitted" or in "invalid" but never succeed;
* files are written below the folder of the test only; others are opened, and closed again.
"""

# ruff: noqa: PTH115, PTH116, PTH120, PTH123, PTH208, SIM115, T201  # as an attacker would write it
from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import signal
import socket
import stat
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
NEW_USER, NEW_NAMESPACE = 0x10000000, 0x00020000
X86_64 = os.uname().machine == "x86_64"


NAMESPACES = ("user", "mnt", "pid", "ipc")


def confined(given):
    """Whether this process has namespaces of its own, and no identity outside."""
    mine = {name: os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES}
    with open("/proc/self/uid_map") as file:
        identity = file.read().split() == ["0", "0", "4294967295"]
    return not identity and not any(mine[name] == given["namespaces"][name] for name in NAMESPACES)


def checked(status):
    if status < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return status


def syscall(x86_64, aarch64, *arguments):
    return checked(LIBC.syscall(x86_64 if X86_64 else aarch64, *arguments))


def judged(x86_64, aarch64, *arguments):
    """Make a call with arguments that are invalid: anything but a refusal got as far as those."""
    try:
        syscall(x86_64, aarch64, *arguments)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.ENOSYS}:
            return f"the kernel looked at its arguments: {error.strerror}"
        raise
    return "done"


def openable(path):
    """Open a file for writing and close it as it is."""
    os.close(os.open(path, os.O_WRONLY))
    return "could be written"


def writable(folder):
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, "read-only")
    return "could be written"


def read(path):
    with open(path, "rb") as file:
        return repr(file.read(60))


def write(path):
    with open(path, "a") as file:
        return f"wrote {file.write('forged')} bytes"


def connect(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as stream:
        stream.settimeout(2)
        stream.connect(address)
    return "connected"


def in_child(action):
    """Do something that may hurt in a child; returns what it wrote."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            said = str(action())
        except OSError as error:
            said = f"refused {error.strerror}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(pid, 0)
    if said.startswith("refused"):
        raise OSError(errno.EPERM, said)
    return said or "died"


def environments_of_others():
    mine = {str(os.getpid())}
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            text = open(f"/proc/{pid}/environ", "rb").read()
            if pid not in mine and b"SECRET" in text:
                found.append(pid)
    if not found:
        raise PermissionError(errno.EACCES, "no secret in any environment")
    return found


def regular_files_behind_descriptors():
    """Descriptors of files that can be reopened for writing, of any process."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    path = f"/proc/{pid}/fd/{fd}"
                    if stat.S_ISREG(os.stat(path).st_mode):
                        os.close(os.open(path, os.O_RDWR))
                        found.append(os.readlink(path))
    if not found:
        raise PermissionError(errno.EACCES, "no descriptor of a file")
    return found


def inherited_sockets():
    known = {0, 1, 2}
    found = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if fd not in known and stat.S_ISSOCK(os.fstat(fd).st_mode):
                found.append(fd)
    if not found:
        raise PermissionError(errno.EACCES, "no socket")
    return found


def clone_with_namespace():
    flags = NEW_USER | signal.SIGCHLD
    pid = syscall(56, 220, flags, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return "cloned"


def shared_memory_without_a_file():
    with mmap.mmap(-1, 2**20) as memory:
        memory[0] = 1
    return "mapped"


def zero_device():
    with open("/dev/zero", "r+b", buffering=0) as device, mmap.mmap(device.fileno(), 2**20) as m:
        m[0] = 1
    return "mapped"


def type_into_terminal():
    reading, writing = os.openpty()
    try:
        fcntl.ioctl(writing, 0x5412, b"x")
    finally:
        os.close(reading)
        os.close(writing)
    return "typed"


def kill_outside(pid):
    os.kill(pid, 0)
    return "it is there"


def attempts(given):
    outside = given["outside"]
    return {
        "read passwd": lambda: read("/etc/passwd"),
        "read the database": lambda: read(given["database"]),
        "see the database": lambda: os.stat(given["database"]).st_size,
        "read another job": lambda: read(given["other_job"]),
        "read a home": lambda: read("/root/.bashrc"),
        "write outside": lambda: write(outside),
        "change Python": lambda: openable(os.__file__),
        "write to Python": lambda: writable(os.path.dirname(os.__file__)),
        "write to the root": lambda: writable("/"),
        "write to the devices": lambda: writable("/dev"),
        "change an input": lambda: write(given["input"]),
        "secrets in my environment": lambda: os.environ["BITQUOTA_SECRET"],
        "environments of others": environments_of_others,
        "forge the log": regular_files_behind_descriptors,
        "inherited sockets": inherited_sockets,
        "connect to loopback": lambda: connect(socket.AF_INET, ("127.0.0.1", given["port"])),
        "abstract socket": lambda: connect(socket.AF_UNIX, "\0" + given["abstract"]),
        "unix socket": lambda: connect(socket.AF_UNIX, given["unix"]),
        "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close() or "open",
        "virtual machine socket": lambda: socket.socket(40, socket.SOCK_STREAM).close() or "open",
        "see the parent": lambda: kill_outside(given["pid"]),
        "status of the parent": lambda: read(f"/proc/{given['pid']}/status"),
        "ptrace": lambda: in_child(lambda: checked(LIBC.ptrace(0, 0, 0, 0)) or "traced"),
        "new user namespace": lambda: in_child(lambda: checked(LIBC.unshare(NEW_USER)) or "new"),
        "clone a user namespace": lambda: in_child(clone_with_namespace),
        "clone3": lambda: judged(435, 435, 0, 0),
        "mount": lambda: judged(165, 40, 0, 0, 0, 0, 0),
        "unmount": lambda: judged(166, 39, 0, 0x4000_0000),
        "change the root": lambda: judged(161, 51, 0),
        "pivot the root": lambda: judged(155, 41, 0, 0),
        "enter a namespace": lambda: judged(308, 268, -1, 0x4000_0000),
        "open a file system": lambda: judged(430, 430, 0, 0x4000_0000),
        "keyctl": lambda: judged(250, 219, -1, 0, 0),
        "bpf": lambda: judged(321, 280, -1, 0, 0),
        "io_uring": lambda: judged(425, 425, 0, 0),
        "userfaultfd": lambda: judged(323, 282, 0x4000_0000),
        "perf events": lambda: judged(298, 241, 0, 0, -1, -1, 0),
        "personality": lambda: checked(LIBC.personality(0x0040000)) or "changed",
        "file handles": lambda: judged(303, 264, -100, 0, 0, 0, 0),
        "read memory of others": lambda: judged(310, 270, os.getpid(), 0, 0, 0, 0, 1),
        "memory in no file system": lambda: syscall(319, 279, b"x", 0),
        "system v memory": lambda: checked(LIBC.shmget(0, 4096, 0o1600)),
        "shared memory without a file": shared_memory_without_a_file,
        "zero device": zero_device,
        "unknown call": lambda: syscall(500, 500),
        "type into a terminal": type_into_terminal,
        "become root": lambda: os.setuid(0) or "root",
    }  # fmt: skip


def main():
    given = json.loads(sys.argv[-1])
    if not confined(given):
        sys.exit("these are attempts to break out; they are made in a sandbox only")
    results = {}
    for name, attempt in attempts(given).items():
        try:
            results[name] = {"got": repr(attempt())}
        except (OSError, KeyError) as error:
            results[name] = {"refused": f"{type(error).__name__}: {error}"}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
