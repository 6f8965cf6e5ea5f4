"""What `poetx data` takes of a large text: tokens a second, and the largest memory, which must not grow with the text.

python -m benchmarks.prepare_speed [--mb 1000] [--vocab 32000]

The text is the Python source on this machine, over and over, as one JSONL file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.record import RESULTS, append, provenance


def write_text(path: Path, megabytes: float) -> int:
    """Documents of at most 20,000 characters; how many were written."""
    files = [p for root in (Path(os.__file__).parent, Path(torch.__file__).parent) for p in sorted(root.rglob("*.py"))]
    written, count = 0, 0
    with path.open("w", encoding="utf-8") as out:
        for file in itertools.cycle(files):
            line = json.dumps({"text": f"# {count}\n" + file.read_text(encoding="utf-8", errors="ignore")[:20_000]})
            out.write(line + "\n")
            written, count = written + len(line), count + 1
            if written >= megabytes * 1e6:
                return count
    return count


def main() -> None:
    """Prepare the text in a process of its own and append a row to benchmarks/results/prepare_speed.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=float, default=1000)
    parser.add_argument("--vocab", type=int, default=32000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        text, tokens = Path(directory) / "text.jsonl", Path(directory) / "tokens"
        documents = write_text(text, arguments.mb)
        command = ["-m", "poetx", "data", str(text), str(tokens), f"data.vocab_size={arguments.vocab}"]
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True)
        seconds, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        meta = json.loads((tokens / "meta.json").read_text())
    count = meta["train_tokens"] + meta["validation_tokens"]
    row = {
        "megabytes": arguments.mb,
        "documents": documents,
        "vocab_size": meta["vocab_size"],
        "tokens": count,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "tokens_per_second": round(count / seconds),
        "tokens_per_cpu_second": round(count / (used.ru_utime + used.ru_stime)),
        "peak_mib": round(used.ru_maxrss / 1024, 1),
    }
    append(RESULTS / "prepare_speed.jsonl", [row | provenance(torch.device("cpu"))])
    print(row)


if __name__ == "__main__":
    main()
