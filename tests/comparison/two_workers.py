"""Two workers that save when they are asked to end; run as a program, ended with its process group."""

import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lightning_kd.comparison.workers import Workers


def save_when_asked(words, left):
    asked = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    Path(f"begun_{words[0]}").touch()
    limit = time.monotonic() + 120
    while not asked and time.monotonic() < limit:
        time.sleep(0.02)
    time.sleep(1)  # the rest of its step
    left.write_text("saved")


def main():
    workers = Workers(save_when_asked, "json")
    with workers.listening(), ThreadPoolExecutor(2) as pool:
        running = [
            pool.submit(workers.run, [name], Path(f"left_{name}"), Path("log.txt")) for name in "ab"
        ]
        while not all(future.done() for future in running):
            time.sleep(0.05)
    codes = [future.result() for future in running]
    sys.exit(f"exit codes {codes}" if any(codes) else 128 + workers.received)


if __name__ == "__main__":
    main()
