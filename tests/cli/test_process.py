"""`fastloop` as a process of its own: pipes, Ctrl-C, terminals, what is flushed when."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fastloop import __version__
from fastloop.testing.cases import random_sound
from fastloop.testing.records import parse

FASTLOOP = (sys.executable, "-m", "fastloop")
LIMIT_S = 120  # only a hang reaches it
CONTROL = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]")


def run(*arguments: object, stdin: bytes = b"", **options: object) -> subprocess.CompletedProcess[bytes]:
    given = [*FASTLOOP, *map(str, arguments)]
    return subprocess.run(given, input=stdin, capture_output=True, timeout=LIMIT_S, **options)  # type: ignore[call-overload]


def as_int16(pcm: np.ndarray) -> bytes:
    return np.round(pcm * 32767).astype("<i2").tobytes()


def test_version_and_module() -> None:
    result = run("--version")
    assert result.returncode == 0 and result.stdout.decode() == f"fastloop {__version__}\n"


def test_importing_fastloop_is_light() -> None:
    """And so is its command line, so that `--help` and a wrong option are answered at once."""
    code = (
        "import sys, fastloop; assert 'torch' not in sys.modules and 'numpy' not in sys.modules; "
        "import fastloop.cli; assert 'torch' not in sys.modules; "
        "assert fastloop.SessionConfig and fastloop.Engine and 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT_S)


def test_a_pipe(model_dir: Path) -> None:
    pcm = as_int16(random_sound(1.2, seed=4))
    result = run("listen", "-", "--model", model_dir, "--json", "--threshold", 1, stdin=pcm)
    assert (result.returncode, result.stderr) == (0, b"")
    records = parse(result.stdout.decode())
    assert [r["type"] for r in records] == ["decision"] * 3 + ["summary"]
    assert (records[-1]["file"], records[-1]["audio_s"]) == ("-", 1.2)


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_it_ends_with_what_was_heard(
    model_dir: Path, tmp_path: Path, stop: signal.Signals, code: int
) -> None:
    """Also: a line is there as soon as it is said, long before the stream ends."""
    soundfile.write(tmp_path / "long.wav", random_sound(60), 16_000)
    options = ("--realtime", "--model", str(model_dir), "--json", "--threshold", "1")
    process = subprocess.Popen(
        [*FASTLOOP, "listen", str(tmp_path / "long.wav"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    assert process.poll() is None
    process.send_signal(stop)
    rest, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == code and errors == ""
    records = parse(first + rest)
    assert records[0]["type"] == "decision" and records[-1]["type"] == "summary"
    assert 0 < records[-1]["audio_s"] < 60


def test_ctrl_c_while_waiting_for_a_pipe(model_dir: Path) -> None:
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [*FASTLOOP, "listen", "-", "--model", str(model_dir), "--json"],
        stdin=reading,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(reading)
    os.write(writing, as_int16(random_sound(0.4)))
    assert process.stdout is not None and '"decision"' in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=LIMIT_S)
    os.close(writing)
    assert process.returncode == 130 and errors == ""
    assert '"summary"' in rest.splitlines()[-1]


def test_a_reader_that_leaves_is_no_traceback(model_dir: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "sound.wav", random_sound(20), 16_000)
    process = subprocess.Popen(
        [*FASTLOOP, "listen", str(tmp_path / "sound.wav"), "--model", str(model_dir), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(LIMIT_S) != 0


def test_a_name_and_a_terminal_that_are_not_unicode(model_dir: Path, tmp_path: Path) -> None:
    odd = tmp_path / "b\udcfcro\n\x1b[31m.wav"  # a byte that is no UTF-8, a line feed, an escape
    soundfile.write(odd.open("wb"), random_sound(0.4), 16_000, format="WAV")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    plain = run("listen", odd, "--model", model_dir, "--threshold", 0, env=environment)
    assert (plain.returncode, plain.stderr) == (0, b"")
    assert plain.stdout.isascii() and plain.stdout.count(b"\n") == 2 and b"\x1b" not in plain.stdout
    json = run("listen", odd, "--model", model_dir, "--json", env=environment)
    assert parse(json.stdout.decode())[-1]["file"] == str(odd)


def on_terminal(*arguments: object, term: str = "xterm-256color") -> tuple[int, bytes]:
    """Run on a pseudo-terminal: exit code and everything written to it."""
    main, side = pty.openpty()
    process = subprocess.Popen(
        [*FASTLOOP, *map(str, arguments)],
        stdin=side,
        stdout=side,
        stderr=side,
        env={**os.environ, "TERM": term, "COLUMNS": "90", "PYTHONIOENCODING": "utf-8"},
    )
    os.close(side)
    written = b""
    while select.select([main], [], [], LIMIT_S)[0]:
        try:
            block = os.read(main, 65_536)
        except OSError:  # the other side is closed
            break
        if not block:
            break
        written += block
    os.close(main)
    return process.wait(LIMIT_S), written


def test_the_live_view_on_a_terminal(model_dir: Path, sounds: dict[str, Path]) -> None:
    options = ("--model", model_dir, "--threshold", 0, "--min-gap", 3.5)
    code, written = on_terminal("listen", sounds["whole"], *options)
    assert code == 0 and b"\x1b[?25l" in written and written.count(b"\x1b[?25h") == 1  # the cursor comes back
    text = " ".join(CONTROL.sub(b"", written).decode().split())
    shown = ("whole.wav", "/ 0:04.8", "level", " dB", "p(respond)", "0:00.4", "0:04.4")
    for part in (*shown, "12 chunks, 2 responses"):
        assert part in text


@pytest.mark.parametrize(("json", "term"), [(True, "xterm-256color"), (False, "dumb")])
def test_no_control_characters_where_they_are_not_wanted(
    model_dir: Path, sounds: dict[str, Path], json: bool, term: str
) -> None:
    code, written = on_terminal(
        "listen", sounds["part"], "--model", model_dir, *(["--json"] if json else []), term=term
    )
    assert code == 0 and b"\x1b" not in written and written.count(b"\n") >= 1


def test_raw_pcm_is_not_read_from_a_terminal(model_dir: Path) -> None:
    code, written = on_terminal("listen", "-", "--model", model_dir)
    assert code == 2 and b"terminal" in written
