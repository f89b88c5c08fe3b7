"""Processes that submit to a ledger as fast as they can: `python -m tests.submissions.miners LEDGER`.

Each line of standard input, `FIRST COUNT`, starts a process (a fork, so that a hundred of them cost no imports): 16
threads that share the blocks FIRST..FIRST+COUNT-1, each of one hotkey. It prints `started PID`, then one line for each
answer after it has it, `BLOCK SUBMISSION_ID`, or `BLOCK -` for a refusal; when it is gone the parent prints `ended`.
"""

from __future__ import annotations

import os
import sys
import threading

from bzstream.submissions.database import Database
from bzstream.submissions.ledger import Ledger
from bzstream.submissions.types import Admitted
from tests.submissions.values import HOTKEYS, candidate


def say(text: str) -> None:
    # One write a line, which a pipe takes whole or not at all (pipe(7), PIPE_BUF): a kill cuts no line.
    os.write(1, f"{text}\n".encode())


def submit(where: str, first: int, count: int) -> None:
    ledger = Ledger.open(where)
    blocks = iter(range(first, first + count))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                block = next(blocks, None)
            if block is None:
                return
            outcome = ledger.accept(candidate(HOTKEYS[block % len(HOTKEYS)], block, limit=10**9))
            say(f"{block} {outcome.submission_id if isinstance(outcome, Admitted) else '-'}")

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ledger.close()


def main(where: str) -> None:
    Database(where).close()  # imports the driver, before the forks
    say("ready")
    for line in sys.stdin:
        first, count = map(int, line.split())
        pid = os.fork()
        if pid == 0:
            say(f"started {os.getpid()}")
            submit(where, first, count)
            os._exit(0)
        os.waitpid(pid, 0)
        say("ended")


if __name__ == "__main__":
    main(sys.argv[1])
