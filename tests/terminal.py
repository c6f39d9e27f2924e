"""A command on a pseudo-terminal, as a person sits at it: what is typed, and what appears."""

import os
import select
import signal
import subprocess
import sys


class Terminal:
    """`with Terminal("-m", "refimpl.chat") as t: t.until(">>>"); t.type("hello\\r")`."""

    def __init__(self, *command, env=None):
        import fcntl
        import pty
        import struct
        import termios

        self.leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 40, 100, 0, 0))
        self.seen = ""
        path = os.pathsep.join(p for p in sys.path if p)
        given = {"TERM": "xterm", "PYTHONPATH": path, "PROMPT_TOOLKIT_NO_CPR": "1"}

        def heed_ctrl_c():  # which a suite in the background of a shell ignores, and its children would too
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=os.environ | given | (env or {}),
            start_new_session=True,
            preexec_fn=heed_ctrl_c,
        )
        os.close(follower)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.kill()
        self.process.wait()
        os.close(self.leader)

    def until(self, text, seconds=90):
        """What appeared before `text`."""
        while text not in self.seen:
            ready = select.select([self.leader], [], [], seconds)[0]
            assert ready, f"{text!r} did not come after {self.seen!r}"
            self.seen += os.read(self.leader, 65536).decode("utf-8", "replace")
        before, self.seen = self.seen.split(text, 1)
        return before

    def type(self, text):
        os.write(self.leader, text.encode())

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)

    def end(self):
        """The exit code, when it has ended by itself; what it still says is in `seen`."""
        while True:
            assert select.select([self.leader], [], [], 60)[0], "it did not end"
            try:
                if not (said := os.read(self.leader, 65536)):
                    break
                self.seen += said.decode("utf-8", "replace")
            except OSError:  # Linux's word for the other side's end
                break
        return self.process.wait(timeout=60)
