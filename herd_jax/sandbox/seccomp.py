"""The filter of system calls of a sandbox, as bubblewrap is given it: a program of classic BPF.

It takes away what could go round the other limits (new namespaces with mounts of their own, memory that belongs to no process) and what ordinary programs do
without (tracing, keys, BPF, io_uring). Method: seccomp(2); the numbers are the kernel's.
"""

import errno
import platform
import struct

# AUDIT_ARCH_*, and the numbers of the system calls that are refused.
ARCHITECTURES = {
    "x86_64": (
        0xC000003E,
        56,  # clone
        435,  # clone3
        {
            "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155,
            "fsopen": 430, "fsmount": 432, "open_tree": 428, "move_mount": 429, "mount_setattr": 442, "memfd_create": 319, "memfd_secret": 447, "shmget": 29,
            "semget": 64, "msgget": 68, "mq_open": 240, "add_key": 248, "request_key": 249, "keyctl": 250, "bpf": 321, "perf_event_open": 298,
            "userfaultfd": 323, "io_uring_setup": 425, "init_module": 175, "finit_module": 313, "kexec_load": 246, "reboot": 169, "swapon": 167,
        },
    ),
    "aarch64": (
        0xC00000B7,
        220,
        435,
        {
            "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "pivot_root": 41,
            "fsopen": 430, "fsmount": 432, "open_tree": 428, "move_mount": 429, "mount_setattr": 442, "memfd_create": 279, "memfd_secret": 447, "shmget": 194,
            "semget": 190, "msgget": 186, "mq_open": 180, "add_key": 217, "request_key": 218, "keyctl": 219, "bpf": 280, "perf_event_open": 241,
            "userfaultfd": 282, "io_uring_setup": 425, "init_module": 105, "finit_module": 273, "kexec_load": 104, "reboot": 142, "swapon": 224,
        },
    ),
}  # fmt: skip
NEW_NAMESPACES = 0x7E020080  # CLONE_NEW{TIME, NS, CGROUP, UTS, IPC, USER, PID, NET} of clone's flags
LOAD, JUMP_EQUAL, JUMP_ABOVE, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000


def system_call_filter() -> bytes:
    """Returns the program for this machine, whose processor is one of ARCHITECTURES."""
    architecture, clone, clone3, refused = ARCHITECTURES[platform.machine()]
    steps = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (JUMP_ABOVE, 0, 1, 0x40000000),  # the numbers of x32
        (RETURN, 0, 0, REFUSE | errno.ENOSYS),
        (JUMP_EQUAL, 0, 1, clone3),  # whose flags a filter cannot read: the C library then takes clone
        (RETURN, 0, 0, REFUSE | errno.ENOSYS),
    ]
    for number in refused.values():
        steps += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE | errno.EPERM)]
    steps += [
        (JUMP_EQUAL, 0, 3, clone),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (JUMP_ANY_BIT, 0, 1, NEW_NAMESPACES),
        (RETURN, 0, 0, REFUSE | errno.EPERM),
        (RETURN, 0, 0, ALLOW),
    ]
    return b"".join(struct.pack("<HBBI", *step) for step in steps)
