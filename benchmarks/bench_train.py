"""Whole training steps on one GPU: this project, its switches, its peers, and the device's limits.

    python benchmarks/bench_train.py                 the table, planned for under 25 minutes on an H100
    python benchmarks/bench_train.py --plan          what would run, and how long each part should take
    python benchmarks/bench_train.py --parts single,peers
    python benchmarks/bench_train.py --smoke         a rehearsal of every part on the CPU, at tiny sizes

A step is data, forward, loss over the full vocabulary, backward, clipping and AdamW, on random tokens. Each model runs
in its own process, its variants timed in turn. Results are written to OUT/train-DEVICE-PART.json as soon as they are
known; if a part is run again, its rows replace equal ones. `python -m benchmarks.train_table` turns them into tables.
"""

import os
import sys
from pathlib import Path


def main() -> int:
    if not __package__:  # started as a script, so this folder is on the path instead of the checkout
        root = Path(__file__).resolve().parents[1]
        sys.path[:1] = [str(root), str(root / "kernels")]
    if "--smoke" in sys.argv:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are imported
    from benchmarks import train_suite
    from titan_fast.errors import reported

    with reported():
        return train_suite.main(__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
