"""A compiler launcher: runs the command that follows, and keeps what it says beside the object it makes."""

import subprocess
import sys
from pathlib import Path

command = sys.argv[1:]
done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
if "-o" in command:
    Path(command[command.index("-o") + 1] + ".log").write_text(done.stderr)
notes = [line for line in done.stderr.splitlines() if not line.startswith(("ptxas info", "    0 bytes stack"))]
print("\n".join(notes), file=sys.stderr, end="\n" if notes else "")
sys.exit(done.returncode)
