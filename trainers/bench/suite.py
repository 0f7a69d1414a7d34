"""`pcpo bench --suite`: the families at the sizes that people train, one table and one file."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ..config.train_config import ConfigError, read_preset
from ..families.registry import spec_of_source
from ..job.files import write_json
from ..job.folder import JobFolder
from ..memory.devices import device_label, device_of
from ..profile.watch import product_rate
from ..reading import check_target
from .case import Case, measure_case

Measure = Callable[[Case, str], dict[str, Any]]

SIZES = (
    *(("sd15-8gb", 512), ("sd35-16gb", 512), ("flux-24gb", 512), ("sdxl-24gb", 1024)),
    *(("zimage-16gb", 512), ("klein-16gb", 512), ("flux-24gb", 720)),
)
BASES = ("fp8", "nf4")


def cases() -> tuple[Case, ...]:
    """All cases, in the order of what most people ask: what is not reached is told."""
    plain = [Case(preset, side) for preset, side in SIZES]
    packable = [case for case in plain if _takes_base(case.preset)]
    return (
        *plain,
        *(replace(case, update="two_pass") for case in plain),
        *(replace(case, base=base) for base in BASES for case in packable),
        *(replace(case, update="two_pass", compile=True) for case in plain),
    )


def _takes_base(preset: str) -> bool:
    spec = spec_of_source(read_preset(preset).model.source)
    return spec is not None and "base" in spec.options


class Worker:
    """A process that measures, and is replaced if it dies: another one's memory is whole."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, case: Case, device: str) -> dict[str, Any]:
        pool = self._pool = self._pool or ProcessPoolExecutor(1, get_context("spawn"))
        try:
            return pool.submit(measure_case, case, device).result()
        except BrokenProcessPool:
            self.close()
            why = "the process died, as it does without enough main memory"
            return asdict(case) | {"error": why}

    def close(self) -> None:
        """End the process."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None


def run_suite(
    device_name: str,
    minutes: float,
    file: str | None,
    *,
    is_tiny: bool,
    measure: Measure | None = None,
) -> None:
    """Measure, print a row as each case ends, and keep all in a file if one is given.

    A file of the same device is continued: what was measured is not measured again.

    Args:
        minutes: no case begins after them.
        is_tiny: small networks of the same kinds, for a CPU.
        measure: measures a case; in a process of its own if None.

    Raises:
        ConfigError: if the file cannot be written or is of another device, or if the published
            sizes are asked for on a CPU.
    """
    device, started = device_of(device_name), time.monotonic()
    if device.type == "cpu" and not is_tiny:
        raise ConfigError(
            "--suite measures models of billions of weights, and no GPU is there; "
            "--size tiny runs small networks of the same kinds on a CPU"
        )
    report = _begun(device, file)
    known = {row["name"] for row in report["cases"] if "error" not in row}
    worker = Worker()
    print(heading(report))
    for case in cases():
        case = replace(case, is_tiny=is_tiny)
        if case.name in known:
            continue
        if time.monotonic() - started > 60 * minutes:
            found = asdict(case) | {"error": f"not reached in {minutes:g} minutes"}
        else:
            found = (measure or worker)(case, device.type)
        rows = [row for row in report["cases"] if row["name"] != case.name]
        report["cases"] = [*rows, {"name": case.name, **found}]
        print(line_of(report["cases"][-1], report["matmul_tflops"]), flush=True)
        if file is not None:
            write_json(Path(file), report)
    worker.close()


def _begun(device: torch.device, file: str | None) -> dict[str, Any]:
    """The report of before, or a new one."""
    about = {"device": device_label(device), "torch": torch.__version__}
    if file is not None:
        check_target(file, "--json", is_folder=False)
        if Path(file).exists():
            report = JobFolder(Path(file).parent).read(Path(file).name)
            if {k: report.get(k) for k in about} != about:
                raise ConfigError(
                    f"--json is {file}, which is no report of this device with this version of "
                    "torch; name a new file"
                )
            return report
    peak = product_rate(device, torch.bfloat16, time.perf_counter)
    return about | {"matmul_tflops": peak / 1e12, "cases": []}


def heading(report: Mapping[str, Any]) -> str:
    """What is measured, and the columns of the table."""
    columns = ("rollout", "update", "all", "GiB", "estimate", "of peak", "|log ratio|")
    return (
        f"{report['device']}, torch {report['torch']}: {report['matmul_tflops']:.3g} TFLOP/s in a "
        "large bfloat16 product\n"
        "seconds an image, of one pass with its gradients in the rollout; GiB at the worst moment\n"
        f"{'':44}" + "".join(f"{name:>{max(9, len(name) + 2)}}" for name in columns)
    )


def line_of(row: Mapping[str, Any], peak: float) -> str:
    """A row of the table."""
    if "error" in row:
        return f"{row['name']:44}  {row['error']}"
    seconds = row["seconds_per_image"]
    cells = [f"{seconds[name]:9.3f}" for name in ("rollout", "update", "iteration")]
    guess, rate = row.get("estimated_gib"), row.get("tflops")
    cells += [f"{row['memory_gib']:9.2f}", " " * 10 if guess is None else f"{guess:10.2f}"]
    cells += [" " * 9 if rate is None else f"{rate / peak:9.0%}"]
    return f"{row['name']:44}" + "".join(cells) + f"{row['log_ratio_max_on_policy']:13.1e}"
