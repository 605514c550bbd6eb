"""The entry: `torchrun -m titan_fast.train [--config FILE] [--table.key VALUE ...]`. The run itself is in loop.py."""

import faulthandler
import gc
import os
import sys
from contextlib import suppress

import tomli_w

from titan_fast.config import parse, to_dict
from titan_fast.errors import command
from titan_fast.redaction import redacted
from titan_fast.start_times import StartTimes


@command
def main() -> None:
    if not faulthandler.is_enabled():
        with suppress(OSError):  # standard error is no file
            faulthandler.enable()  # so that a signal like SIGBUS, as of a mapped shard that is cut off, has a traceback
    start = StartTimes()
    config = parse(sys.argv[1:])
    if config.job.print_config:
        sys.stdout.write(tomli_w.dumps(redacted(to_dict(config))))
        return
    # Read when CUDA is first used. With expandable segments freed memory can be reused by tensors of another size.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # After parsing, so that --help and a wrong key are answered before the seconds that importing torch takes.
    if config.job.dry_run:
        from titan_fast.dry_run import dry_run

        dry_run(config)
    else:
        # Nothing that is imported is garbage. Looking for garbage takes a fifth of the import time; freezing spares
        # later collections the same objects.
        gc.disable()
        from titan_fast.loop import train

        gc.freeze()
        gc.enable()
        start.lap("imports")
        train(config, start)


if __name__ == "__main__":
    main()
