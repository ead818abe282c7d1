"""Times programs in turn within one process, so that changes in the machine's speed affect all of them alike."""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler warns of a missing GPU

import torch
import torchvision

CPU = torch.device("cpu")


def make_parser(description: str, repeats: int) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads on the CPU")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the flags, set torch's threads accordingly, and seed it."""
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


def timed(program: Callable[[], object], device: torch.device = CPU) -> float:
    """The seconds that a program takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    program()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(programs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device = CPU) -> dict[str, float]:
    """Median seconds of each program; all run in turn `repeats` times, after one warm-up round."""
    rounds = [{name: timed(program, device) for name, program in programs.items()} for _ in range(repeats + 1)]
    return {name: statistics.median(seconds[name] for seconds in rounds[1:]) for name in programs}


def peak_memory(program: Callable[[], object], device: torch.device) -> int:
    """The largest growth of torch's allocations while a program runs, bytes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        program()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        program()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    events = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    totals = [event["args"]["Total Allocated"] for event in events]
    return max(totals) - (totals[0] - events[0]["args"]["Bytes"])


def report(
    title: str, seconds: Mapping[str, float], bounds: Mapping[tuple[str, str], float], as_json: bool, **extra: float
) -> None:
    """Print medians, and ratios with their bounds.

    Args:
        title: what was measured.
        seconds: time of each program.
        bounds: (program, reference) -> the ratio of their times that should not be exceeded.
        as_json: print JSON instead of a table.
        **extra: further numbers by name.
    """
    ratios = {f"{one} / {other}": seconds[one] / seconds[other] for one, other in bounds}
    if as_json:
        machine = {"machine": processor(), "torch": torch.__version__, "torchvision": torchvision.__version__}
        print(json.dumps({"title": title, **machine, "seconds": seconds, "ratios": ratios, **extra}))
        return
    print(f"{title} ({processor()}, torch {torch.__version__}, torchvision {torchvision.__version__})")
    for name, value in seconds.items():
        print(f"  {name:50} {value * 1000:10.1f} ms")
    for (name, ratio), bound in zip(ratios.items(), bounds.values(), strict=True):
        print(f"  {name:50} {ratio:10.3f}    (aim: <= {bound:g})")
    for name, value in extra.items():
        print(f"  {name:50} {value:10.3f}")


def processor() -> str:
    """A description of the GPU or CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
