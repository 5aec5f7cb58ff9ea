"""Make `.venv` and install the project into it, with one line that shows how far it is.

    python3 install.py [extra]      extra: study (default) or dev

It uses the standard library only and does nothing when settings.ini has not changed since the last time.
"""
import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENV = HERE / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
EXTRAS = ("study", "dev")  # each holds the ones before it


def fail(message):
    sys.exit(f"install: {message}")


def show(text):
    """Renew one line on a terminal; elsewhere print at most a line every ten seconds."""
    now = time.monotonic()
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:110]}", end="", file=sys.stderr, flush=True)
    elif now - show.last > 10:
        show.last = now
        print(text, file=sys.stderr, flush=True)


show.last = 0.0


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def installed():
    return len(list(VENV.glob("lib/python*/site-packages/*.dist-info"))) + len(list(VENV.glob("Lib/site-packages/*.dist-info")))


def pip(*args):
    """Run pip; its many lines become one that counts packages and time."""
    log, start = VENV / "install.log", time.monotonic()
    before, found, total, phase = installed(), 0, 0, 0.0
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-compile", "--progress-bar", "off", *args]
    with open(log, "w", encoding="utf-8") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, cwd=HERE, stdin=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            time.sleep(0.5)
            text = log.read_text(encoding="utf-8", errors="replace")
            last = re.findall(r"^(?:Collecting|Installing collected packages:) (.*)$", text, re.M)
            listed = re.search(r"^Installing collected packages: (.*)$", text, re.M)
            if listed:
                total, phase = listed[1].count(",") + 1, phase or time.monotonic()
                done = max(0, installed() - before)
                spent = time.monotonic() - phase
                left = f", {clock(spent / done * (total - done))} left" if 0 < done < total else ""
                show(f"installing: {done} of {total} packages, {clock(time.monotonic() - start)} so far{left}")
            elif last:
                found = text.count("\nCollecting ")
                show(f"finding packages: {found} so far, now {last[-1].split(' ')[0]}, {clock(time.monotonic() - start)}")
    except KeyboardInterrupt:
        process.terminate()
        fail("interrupted; run it again to go on")
    if process.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        fail(f"pip failed (whole log: {log.relative_to(HERE)})\n{tail}")
    show(f"installed in {clock(time.monotonic() - start)}")
    if sys.stderr.isatty():
        print(file=sys.stderr)


def main(extra="study"):
    if extra not in EXTRAS:
        fail(f"unknown extra {extra!r}; known: {', '.join(EXTRAS)}")
    if not (3, 10) <= sys.version_info < (3, 14):
        fail(f"Python {sys.version.split()[0]} is not supported; run it with Python 3.10 to 3.13, for instance `make PYTHON=python3.12`")
    wanted = hashlib.sha256((HERE / "settings.ini").read_bytes() + (HERE / "setup.py").read_bytes()).hexdigest()
    for name in EXTRAS[EXTRAS.index(extra):]:
        stamp = VENV / f"installed-{name}"
        if PYTHON.exists() and stamp.exists() and stamp.read_text() == wanted:
            return
    if not PYTHON.exists():
        show("making .venv")
        made = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True)
        if made.returncode:
            version = "{}.{}".format(*sys.version_info)
            fail(f"could not make .venv; on Debian or Ubuntu first `apt-get install python{version}-venv`\n{made.stdout}{made.stderr}")
    pip("-e", f".[{extra}]")
    (VENV / f"installed-{extra}").write_text(wanted)


if __name__ == "__main__":
    main(*sys.argv[1:])
