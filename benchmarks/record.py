"""Results as JSON files that can be compared over time."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("results")
ROOT = Path(__file__).parent.parent


def commit() -> str:
    """The checkout's commit, "-dirty" added if files differ from it; else the variable FEDROT_COMMIT; else "unknown"."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found = ""
    return found or os.environ.get("FEDROT_COMMIT", "unknown")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, threads: {torch.get_num_threads()}"


def environment(device: torch.device) -> dict[str, Any]:
    """What a measurement depends on."""
    try:
        from triton import __version__ as triton  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        triton = None
    return {
        "device": device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def record_path(kind: str, environment: dict[str, Any], directory: Path) -> Path:
    """``directory``/kind-device-date-commit.json, the directory made."""
    directory.mkdir(parents=True, exist_ok=True)
    device = "".join(c if c.isalnum() else "-" for c in environment["device"].split(",")[0]).strip("-").lower()
    date = environment["date"][:19].replace("-", "").replace(":", "")
    return directory / f"{kind}-{device}-{date}-{environment['commit'][:10]}.json"


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record, whole or not at all: a run that is interrupted later keeps what it has."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)
