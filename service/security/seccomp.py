"""The system calls that code in a sandbox may not make, as a filter that the kernel applies.

The filter is a list of what is refused: torch, numba and onnxruntime use hundreds of calls that
differ between versions, while what lets a process out of its namespaces, look into another one or
hide memory from its limits is known. Refused calls fail as on a kernel without them, so libraries
fall back; a call of a foreign architecture, whose numbers mean something else, kills the process.

The assembler is our own because libseccomp, which the Python bindings load, is missing from the
smallest images; the program is one comparison for each call. Numbers are those of the kernel's
``arch/x86/entry/syscalls/syscall_64.tbl`` and ``include/uapi/asm-generic/unistd.h``.

Design: docs/design/sandbox.md
"""

from __future__ import annotations

import errno
import platform
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitquota.canonical import JsonObject

# The program sees ``struct seccomp_data``: number, architecture, instruction pointer, arguments.
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
# Opcodes of classic BPF: load a 32-bit word; jump if equal, greater, or any bit set; and; return.
_LOAD, _EQUAL, _GREATER, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x54, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000

_LAST_KNOWN = 462
"""``mseal`` of Linux 6.10; numbers above it are the same everywhere, and not reviewed."""

_NEW_NAMESPACE = 0x7E020000
"""The ``CLONE_NEW*`` flags that ``clone`` takes."""
_TERMINAL_INJECTION = (0x5412, 0x541C)
"""``TIOCSTI`` and ``TIOCLINUX``, which type into a terminal."""
_MAP_TYPE, _MAP_ANONYMOUS = 0x0F, 0x20
_SHARED_TYPES = (1, 3)
"""``MAP_SHARED`` and ``MAP_SHARED_VALIDATE``."""
_AF_UNIX = 1

# name: number on x86_64, number on aarch64 (or None where there is no such call), in groups.
_REFUSED: dict[str, tuple[int, int | None]] = {
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    # keys that are kept by the kernel
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    # mechanisms with a long history of holes
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "vmsplice": (278, 75), "fanotify_init": (300, 262), "lookup_dcookie": (212, 18),
    # namespaces, mounts and roots
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "setns": (308, 268), "unshare": (272, 97), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "statmount": (457, 457), "listmount": (458, 458),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
    # the machine
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60),
    "quotactl_fd": (443, 443), "syslog": (103, 116), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "sethostname": (170, 161), "setdomainname": (171, 162), "iopl": (172, None),
    "ioperm": (173, None), "modify_ldt": (154, None), "personality": (135, 92),
    "uselib": (134, None), "ustat": (136, None), "sysfs": (139, None), "nfsservctl": (180, 42),
    "vhangup": (153, 58),
}  # fmt: skip
MAKE_A_SANDBOX = frozenset({"mount", "umount2", "pivot_root", "unshare"})
"""What bubblewrap calls itself, before the filter is in force."""
_ABSENT: dict[str, tuple[int, int | None]] = {
    # Memory that no process has mapped, so that nobody would count it.
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    # Its flags lie in memory, where a filter cannot look; the C library falls back to clone.
    "clone3": (435, 435),
}  # fmt: skip
_LOOKED_INTO = {"clone": (56, 220), "ioctl": (16, 29), "socket": (41, 198), "mmap": (9, 222)}


@dataclass(frozen=True, slots=True)
class _Architecture:
    column: int
    audit: int
    """``AUDIT_ARCH_*`` of the kernel."""


_ARCHITECTURES = {
    "x86_64": _Architecture(0, 0xC000003E),
    "aarch64": _Architecture(1, 0xC00000B7),
}


def refused_calls() -> dict[str, tuple[int, int | None]]:
    """Return name and numbers (x86_64, aarch64) of every call that is refused whatever it asks."""
    return _REFUSED | _ABSENT


def container_profile() -> JsonObject:
    """Return a profile for Docker and Podman under which a server can make such sandboxes.

    It refuses what a sandbox refuses, but for the calls that make one.
    """
    names = sorted(_REFUSED.keys() - MAKE_A_SANDBOX)
    refused = {"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": errno.EPERM}
    return {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [refused]}


def filter_program(machine: str | None = None, *, shared_memory: bool = False) -> bytes | None:
    """Return a seccomp filter for ``bwrap --seccomp``, or ``None`` where none is known.

    Args:
        machine: As ``platform.machine`` names it; by default this one.
        shared_memory: Whether anonymous shared memory may be mapped. CUDA needs it for pinned
            memory; it can be hidden from a supervisor that sums what processes have mapped.
    """
    known = _ARCHITECTURES.get(platform.machine() if machine is None else machine)
    if known is None:
        return None

    def number(call: tuple[int, int | None]) -> int | None:
        return call[known.column]

    def fail(code: int) -> bytes:
        return _step(_RETURN, _ERRNO | code)

    # What is called most comes first: allocation and threads.
    code = _step(_LOAD, _ARCHITECTURE) + _step(_EQUAL, known.audit, 1, 0) + _step(_RETURN, _KILL)
    code += _step(_LOAD, _NUMBER)
    if not shared_memory:
        shared = _step(_AND, _MAP_TYPE) + b"".join(
            _step(_EQUAL, kind, 0, 1) + fail(errno.EPERM) for kind in _SHARED_TYPES
        )
        anonymous = _step(_ANY_BIT, _MAP_ANONYMOUS, 0, len(shared) // _STEP_BYTES) + shared
        code += _if_call(number(_LOOKED_INTO["mmap"]), _if_argument(3, anonymous))
    code += _if_call(
        number(_LOOKED_INTO["ioctl"]),
        _if_argument(
            1, b"".join(_step(_EQUAL, k, 0, 1) + fail(errno.EPERM) for k in _TERMINAL_INJECTION)
        ),
    )
    code += _if_call(
        number(_LOOKED_INTO["clone"]),
        _if_argument(0, _step(_ANY_BIT, _NEW_NAMESPACE, 0, 1) + fail(errno.EPERM)),
    )
    code += _if_call(
        number(_LOOKED_INTO["socket"]),
        _if_argument(0, _step(_EQUAL, _AF_UNIX, 1, 0) + fail(errno.EAFNOSUPPORT)),
    )
    for calls, refusal in ((_REFUSED, errno.EPERM), (_ABSENT, errno.ENOSYS)):
        for call in calls.values():
            code += _if_call(number(call), fail(refusal))
    return code + _step(_GREATER, _LAST_KNOWN, 0, 1) + fail(errno.ENOSYS) + _step(_RETURN, _ALLOW)


def _step(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """Return one ``struct sock_filter``; the last two say how many instructions to skip."""
    return struct.pack("=HBBI", operation, if_true, if_false, value)


_STEP_BYTES = len(_step(0, 0))


def _if_call(number: int | None, then: bytes) -> bytes:
    if number is None:
        return b""
    return _step(_EQUAL, number, 0, len(then) // _STEP_BYTES) + then


def _if_argument(index: int, then: bytes) -> bytes:
    """Return ``then`` with the low half of an argument at hand, and the number again after it.

    The kernel itself reads only 32 bits of each argument that is looked at here.
    """
    return _step(_LOAD, _ARGUMENTS + 8 * index) + then + _step(_LOAD, _NUMBER)
