"""Compare our reader with other packages' on the same sequences, on this machine.

    bst bench data                       # ours, webdataset, litdata, mosaicml-streaming; 131 M tokens
    bst bench data --readers ours webdataset --sequences 4000
    bst bench data --mean-document 300   # documents as short as pages of the web: more places to read for a row
    bst bench data --cold                # each pass from the disk, its files out of the page cache

On first use the other packages are installed into their own environment, below --directory; the library never imports
them. Every measurement is a separate process, and the readers take turns, so that load on the machine affects all of
them. Columns: tokens per second and per CPU second over one pass; time from a saved state to the first batch in the
middle of a pass, and whether that batch is right; sequences lost or served twice when two ranks take over the state of
one, half a pass in; with --cold, bytes read from the disk per byte of tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from bst_base.arguments import at_least
from bst_base.errors import UserError
from bst_base.terminal import Sheet, print_table
from data_pipeline.bench.material import MEAN_DOCUMENT

PEERS = ("litdata==0.2.76", "mosaicml-streaming==0.13.0")
READERS = {
    "ours": "ours: batches for a trainer",
    "ours-as-stored": "ours: rows as stored",
    "litdata": "litdata",
    "webdataset": "webdataset, one member per sequence",
    "mosaicml": "mosaicml-streaming",
}
_ELASTIC_LIMIT_S = 300.0  # ends a rank that waits forever for the other one
_ISOLATED = ("litdata", "mosaicml")  # measured in their own environment
_DEFAULT = Path("~/.cache/bst/bench-data")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS), help="readers to measure")
    parser.add_argument(
        "--sequences", metavar="N", type=at_least(16), default=32_000, help="sequences of 4097 tokens in a pass"
    )
    parser.add_argument(
        "--repeats", metavar="N", type=at_least(1), default=5, help="measurements per reader; the median is reported"
    )
    parser.add_argument(
        "--mean-document",
        metavar="TOKENS",
        type=at_least(2),
        default=MEAN_DOCUMENT,
        help="mean length of our documents (default: %(default)s)",
    )
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each pass")
    parser.add_argument(
        "--directory",
        metavar="DIR",
        type=Path,
        default=_DEFAULT,
        help="where to keep the sequences and the other packages",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prepare, measure, print the table; return it with every single measurement."""
    console = Console()
    bench = _Bench(args.directory.expanduser().absolute(), args.sequences, args.mean_document, console)
    bench.prepare(args.readers)
    found: dict[str, dict[str, Any]] = {name: {"speed": [], "resume": []} for name in args.readers}
    for repeat in range(args.repeats):
        for name in args.readers:
            console.print(f"[dim]repeat {repeat + 1} of {args.repeats}: {name}[/]", highlight=False)
            found[name]["speed"].append(bench.measure(name, "speed", *(["--cold"] if args.cold else [])))
            found[name]["resume"].append(bench.measure(name, "resume"))
    for name in args.readers:
        console.print(f"[dim]one rank's state taken over by two: {name}[/]", highlight=False)
        found[name]["elastic"] = bench.elastic(name)
    report = {"machine": _machine(), "peers": list(PEERS), "sequences": args.sequences, "repeats": args.repeats}
    report |= {"mean_document": args.mean_document, "cold": args.cold}
    report["readers"] = {name: {**_summary(each), "measurements": each} for name, each in found.items()}
    _print(report)
    return report


class _Bench:
    """The benchmark's sequences, the environment of the other packages, and the processes that measure."""

    def __init__(self, directory: Path, sequences: int, mean_document: int, console: Console) -> None:
        self._material = directory / f"sequences-{sequences}-documents-{mean_document}"
        self._mean_document = mean_document
        self._environment = directory / "peers"
        self._sequences = str(sequences)
        self._console = console

    def prepare(self, readers: list[str]) -> None:
        """Install the other packages and write every reader's copy of the sequences, unless they exist."""
        self._material.mkdir(parents=True, exist_ok=True)
        if any(name in _ISOLATED for name in readers) and not (self._environment / "installed").exists():
            self._install()
        for name in dict.fromkeys(["ours", *readers]):
            self._console.print(f"[dim]material of {name}[/]", highlight=False)
            self.measure(name, "make", "--mean-document", str(self._mean_document))

    def measure(self, name: str, job: str, *extra: str) -> dict[str, Any]:
        """Run one job of one reader, and wait for its end."""
        return self._result(name, job, self._start(name, job, *extra))

    def elastic(self, name: str) -> dict[str, Any]:
        """Read half a pass on one rank and the rest on two; return how many sequences were served twice or never."""
        with tempfile.TemporaryDirectory() as directory:
            state = ("--state", str(Path(directory) / "state.json"))
            first = self.measure(name, "half", *state)
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            ranks = [self._start(name, "rest", *state, ranks=(rank, 2, port)) for rank in range(2)]
            rest = [self._result(name, "rest", process, limit_s=_ELASTIC_LIMIT_S) for process in ranks]
        errors = [each["error"] for each in (first, *rest) if "error" in each]
        if errors:
            return {"error": errors[0]}
        served = Counter(sequence for each in (first, *rest) for sequence in each["names"])
        twice = sum(count - 1 for count in served.values())
        return {"lost": int(self._sequences) - len(served), "repeated": twice}

    def _start(
        self, name: str, job: str, *extra: str, ranks: tuple[int, int, int] | None = None
    ) -> subprocess.Popen[str]:
        python = self._environment / "bin" / "python" if name in _ISOLATED else Path(sys.executable)
        command = [str(python), "-m", "data_pipeline.bench.readers", name, job, str(self._material)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        if ranks:
            rank, world, port = ranks
            environment |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
            environment |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return subprocess.Popen(
            [*command, "--sequences", self._sequences, *extra],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def _result(
        self, name: str, job: str, process: subprocess.Popen[str], limit_s: float | None = None
    ) -> dict[str, Any]:
        try:
            output, errors = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return {"error": f"no end within {limit_s:.0f} s"}
        if process.returncode:
            raise UserError(f"measuring {name} ({job}) failed:\n{errors.strip()[-2000:]}")
        return json.loads(output.strip().splitlines()[-1])

    def _install(self) -> None:
        """Create an environment with the other packages that also sees this environment's packages."""
        self._console.print(Text(f"installing {', '.join(PEERS)} into {self._environment}", "dim"), soft_wrap=True)
        venv.create(self._environment, with_pip=True, clear=True)
        python = str(self._environment / "bin" / "python")
        ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        site = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
        (site / "base.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        torch = f"torch=={version('torch').partition('+')[0]}"  # the installed version, not another gigabyte
        done = subprocess.run(
            [python, "-m", "pip", "install", "-q", *PEERS, torch], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UserError(f"the peers cannot be installed: {done.stderr.strip()[-2000:]}")
        (self._environment / "installed").touch()


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    """Return the medians and ranges of one reader's measurements."""
    speeds = [each["tokens"] / each["time_s"] for each in found["speed"]]
    per_cpu = [each["tokens"] / each["cpu_s"] for each in found["speed"]]
    resumes = [each["time_s"] for each in found["resume"] if "time_s" in each]
    return {
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_cpu_s": statistics.median(per_cpu),
        "tokens_per_cpu_s_range": [min(per_cpu), max(per_cpu)],
        "resume_s": statistics.median(resumes) if resumes else None,
        "resume_s_range": [min(resumes), max(resumes)] if resumes else None,
        "disk_bytes_per_byte": statistics.median(each["disk_bytes"] / each["tokens"] / 2 for each in found["speed"]),
        "resume_exact": all(each.get("exact", False) for each in found["resume"]),
        "elastic": found["elastic"],
    }


def _print(report: dict[str, Any]) -> None:
    rows = []
    litdata = report["readers"].get("litdata", {}).get("tokens_per_cpu_s")
    for name, each in report["readers"].items():
        low, high = each["tokens_per_cpu_s_range"]
        resume = each["resume_s"]
        rows.append(
            [
                READERS[name],
                f"{each['tokens_per_s'] / 1e6:.0f}",
                f"{each['tokens_per_cpu_s'] / 1e6:.0f} ({low / 1e6:.0f}-{high / 1e6:.0f})",
                f"{each['tokens_per_cpu_s'] / litdata:.2f}" if litdata else "-",
                f"{resume * 1e3:,.0f} ms" if resume is not None else "-",
                "yes" if each["resume_exact"] else "no",
                _verdict(each["elastic"]),
                *([f"{each['disk_bytes_per_byte']:.2f}"] if report["cold"] else []),
            ]
        )
    columns = ["reader", "Mtok/s", "Mtok per CPU-s", "of litdata's", "resume", "right", "one rank to two"]
    print_table(
        Sheet((*columns, *(["bytes read per byte served"] if report["cold"] else [])), rows),
        f"{report['sequences']:,} sequences of 4,097 tokens, batches of 8, no workers; documents of "
        f"{report['mean_document']:,} tokens on average, {'from the disk' if report['cold'] else 'in the page cache'}",
        f"{report['machine']['cpu']}, {report['machine']['cpus']} CPUs; median of {report['repeats']} (range)",
    )


def _verdict(elastic: dict[str, Any]) -> str:
    if "error" in elastic:
        return elastic["error"].partition(":")[0]
    if not elastic["lost"] and not elastic["repeated"]:
        return "exact"
    return f"{elastic['lost']:,} lost, {elastic['repeated']:,} twice"


def _machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    packages = ("numpy", "torch", "webdataset")
    return {"cpu": cpu, "cpus": os.cpu_count(), "versions": {name: version(name) for name in packages}}
