"""The record of a run: complete, readable, and never the reason a run dies."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from eqrl import tracking
from eqrl.tracking import (
    Console,
    Jsonl,
    Sample,
    StepTimer,
    StopRequest,
    Wandb,
    combine,
    draw_curve,
    exit_status,
    print_samples,
    read_jsonl,
    throughput,
    write_samples,
)


def _warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "eqrl"]


class _Memory:
    def __init__(self):
        self.seen = []

    def log(self, step, metrics):
        self.seen.append((step, dict(metrics)))

    def finish(self, status):
        self.seen.append(status)


class _Broken:
    calls = 0

    def log(self, step, metrics):
        self.calls += 1
        raise ConnectionError("gone")

    def finish(self, status):
        raise ConnectionError("gone")


def test_a_dead_tracker_is_dropped_and_the_others_go_on(caplog):
    before, dead, after = _Memory(), _Broken(), _Memory()
    tracker = combine(before, dead, after)
    for step in range(3):
        tracker.log(step, {"a": 1.0})
    tracker.finish("success")
    expected = [(0, {"a": 1.0}), (1, {"a": 1.0}), (2, {"a": 1.0}), "success"]
    assert before.seen == after.seen == expected
    assert dead.calls == 1
    (warning,) = _warnings(caplog)
    assert "_Broken failed (ConnectionError: gone)" in warning


def test_combine_lets_the_user_stop_the_run():
    class Interrupted(_Memory):
        def log(self, step, metrics):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        combine(Interrupted()).log(0, {})


def test_jsonl_is_strict_json_with_readable_infinities(tmp_path):
    log = Jsonl(tmp_path / "new" / "metrics.jsonl")
    log.log(3, {"a": 0.1, "count": 2**60, "bad": float("nan"), "worse": -float("inf")})
    # On disk before `finish`, and no NaN token that strict readers refuse.
    (line,) = log.path.read_text().splitlines()
    record = json.loads(line, parse_constant=pytest.fail)
    assert record["a"] == 0.1 and record["count"] == 2**60 and record["bad"] is None
    assert record["nonfinite"] == {"bad": "nan", "worse": "-inf"}
    log.finish("success")
    log.finish("success")


def test_resumed_jsonl_equals_an_uninterrupted_one(tmp_path):
    whole = Jsonl(tmp_path / "whole.jsonl")
    for step in range(6):
        whole.log(step, {"x": step / 7})
    whole.finish("success")
    first = Jsonl(tmp_path / "resumed.jsonl")
    for step in range(5):
        first.log(step, {"x": step / 7})
    first.finish("success")
    with first.path.open("a") as file:
        file.write('{"step": 5, "x": 0.')  # killed in the middle of a line
    resumed = Jsonl(tmp_path / "resumed.jsonl")
    resumed.truncate_after(2)
    for step in range(3, 6):
        resumed.log(step, {"x": step / 7})
    resumed.finish("success")
    assert resumed.path.read_bytes() == whole.path.read_bytes()


def test_reopened_jsonl_cuts_a_torn_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n{"ste')
    assert read_jsonl(path) == [{"step": 0}]
    log = Jsonl(path)
    log.log(1, {})
    log.finish("success")
    assert read_jsonl(path) == [{"step": 0}, {"step": 1}]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_one_warning_and_nothing_is_lost(tmp_path, caplog):
    full = tmp_path / "metrics.jsonl"
    full.symlink_to("/dev/full")
    log = Jsonl(full)
    log.log(0, {"x": 1.0})
    log.log(1, {"x": 2.0})
    (warning,) = _warnings(caplog)
    assert "No space left" in warning and "training goes on" in warning
    # The disk has room again: the lines that waited come first.
    full.unlink()
    log._file.close()
    log._open()
    log.log(2, {"x": 3.0})
    log.finish("success")
    assert [record["step"] for record in read_jsonl(full)] == [0, 1, 2]


def test_console_lines_and_notices():
    out = io.StringIO()
    console = Console(200, file=out, bar=False)
    console.log(7, {"reward/mean": 0.5, "policy/entropy": 1.25, "optim/grad_norm": 12345.0})
    console.log(
        7, {"eval/gsm8k/acc_strict": 0.25, "eval/gsm8k/pass@4": 0.5, "eval/reward/total/mean": 3.0}
    )
    console.log(8, {"unknown": 1.0})
    console.notice("ratio", "ratio is identically 1")
    console.notice("ratio", "ratio is identically 1")
    console.finish("success")
    assert out.getvalue().splitlines() == [
        "step   7/200  reward 0.500  entropy 1.250  grad 12345.0",
        "step   7/200  eval: gsm8k/acc_strict 0.250  gsm8k/pass@4 0.500",
        "notice: ratio is identically 1",
    ]


def test_console_bar_keeps_lines_on_stdout(capsys):
    pytest.importorskip("rich")
    console = Console(10, bar=True)
    console.log(1, {"reward/mean": 0.5})
    console.finish("success")
    assert capsys.readouterr().out == "step  1/10  reward 0.500\n"


def test_curve_of_a_partial_run(tmp_path):
    pytest.importorskip("matplotlib")
    log = Jsonl(tmp_path / "m.jsonl")
    draw_curve(log.path, tmp_path / "empty.png")
    for step in range(30):
        log.log(step, {"reward/mean": step / 30 if step != 4 else float("nan")})
    draw_curve(log.path, tmp_path / "reward.png")
    log.log(0, {"eval/gsm8k/acc_strict": 0.2})
    log.log(29, {"eval/gsm8k/acc_strict": 0.6})
    draw_curve(log.path, tmp_path / "plots" / "both.png", title="demo")
    log.finish("success")
    pictures = [tmp_path / n for n in ("empty.png", "reward.png", "plots/both.png")]
    contents = [picture.read_bytes() for picture in pictures]
    assert all(content.startswith(b"\x89PNG") for content in contents)
    assert len(set(contents)) == 3


_SAMPLES = [
    Sample("What is\n2|3?", "<answer>5</answer> [done]", "5", {"correct": 1.0, "format": 0.5}),
    Sample("long " * 50, "x", "7", {"correct": 0.0}),
]


def test_samples_as_markdown(tmp_path):
    write_samples(tmp_path / "samples.md", _SAMPLES)
    lines = (tmp_path / "samples.md").read_text().splitlines()
    assert lines[2] == "| prompt | completion | gold | correct | format |"
    row = r"| What is<br>2\|3? | &lt;answer&gt;5&lt;/answer&gt; [done] | 5 | 1 | 0.5 |"
    assert lines[4] == row
    assert lines[5].endswith("| x | 7 | 0 |  |")


def test_samples_at_the_terminal(capsys, monkeypatch):
    print_samples(_SAMPLES)
    assert "[done]" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.console", None)
    print_samples(_SAMPLES, limit=1, width=10)
    plain = capsys.readouterr().out.splitlines()
    assert plain[1] == "…t is 2|3? | …r> [done] | 5 | 1 | 0.5"


def _status(folder):
    return json.loads((folder / "exit_status.json").read_text())


def test_exit_status_of_success(tmp_path):
    with exit_status(tmp_path / "run") as status:
        assert _status(tmp_path / "run")["status"] == "running"
        assert _status(tmp_path / "run")["pid"] == os.getpid()
        status.step = 9
    found = _status(tmp_path / "run")
    assert (found["status"], found["step"], found["exit_code"]) == ("success", 9, 0)
    assert found["ended"] >= found["started"] and found["seconds"] >= 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("no"), {"status": "exception", "type": "ValueError", "message": "no"}),
        (KeyboardInterrupt(), {"status": "signal", "signal": "SIGINT", "exit_code": 130}),
        (KeyboardInterrupt("SIGTERM"), {"status": "signal", "signal": "SIGTERM"}),
        (SystemExit(0), {"status": "success", "exit_code": 0}),
        (SystemExit(3), {"status": "exception", "exit_code": 3}),
        (SystemExit("sentence"), {"status": "exception", "exit_code": 1, "message": "sentence"}),
    ],
)
def test_exit_status_of_every_exception(tmp_path, error, expected):
    with pytest.raises(type(error)), exit_status(tmp_path):
        raise error
    assert expected.items() <= _status(tmp_path).items()


def test_exit_status_after_a_stop_request(tmp_path):
    with exit_status(tmp_path) as status, StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        status.signal = stop.requested
    assert _status(tmp_path)["signal"] == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_full_disk_does_not_hide_how_the_run_ended(tmp_path, caplog):
    (tmp_path / "file").touch()  # a folder cannot be made below a file: every write is an OSError
    with pytest.raises(ZeroDivisionError), exit_status(tmp_path / "file"):
        raise ZeroDivisionError
    assert len(_warnings(caplog)) == 2


_RUN = """
import sys, time
from eqrl.tracking import StopRequest, exit_status
with exit_status(sys.argv[1]) as status:
    if sys.argv[2] == "bare":
        print("ready", flush=True)
        time.sleep(30)
    with StopRequest() as stop:
        print("ready", flush=True)
        while sys.argv[2] == "stubborn" or stop.requested is None:
            time.sleep(0.01)
        status.step, status.signal = 5, stop.requested
"""


@pytest.mark.parametrize(
    ("kind", "signals", "returncode", "expected"),
    [
        ("bare", [signal.SIGTERM], 143, {"signal": "SIGTERM", "exit_code": 143}),
        ("polite", [signal.SIGINT], 0, {"signal": "SIGINT", "step": 5}),
        ("stubborn", [signal.SIGTERM, signal.SIGTERM], 1, {"signal": "SIGTERM", "step": None}),
    ],
)
def test_exit_status_after_real_signals(tmp_path, root, kind, signals, returncode, expected):
    child = subprocess.Popen(
        [sys.executable, "-c", _RUN, str(tmp_path), kind],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    assert _status(tmp_path)["status"] == "running"
    for number in signals:
        child.send_signal(number)
        time.sleep(0.2)
    _, stderr = child.communicate(timeout=20)
    # Python ends by SIGINT itself after an uncaught KeyboardInterrupt.
    assert child.returncode == (-signal.SIGINT if kind == "stubborn" else returncode)
    found = _status(tmp_path)
    assert found["status"] == "signal" and expected.items() <= found.items()
    assert (kind == "bare") != ("finishing this step" in stderr)


def test_stop_request_asks_then_insists_then_restores(capfd):
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGINT"
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err.count("press again to quit at once") == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_step_time_excludes_evaluation_and_averages_the_last_ten():
    now = [0.0]
    timer = StepTimer(clock=lambda: now[0])
    for step in range(12):
        with timer.step():
            for _ in range(2):
                with timer("rollout"):
                    now[0] += step
            with timer.excluded("eval"):
                now[0] += 1000.0
            now[0] += 0.5
    now[0] += 77.0  # between steps
    assert timer.metrics() == {
        "time/train/rollout_s": 22.0,
        "time/train/step_s": 22.5,
        "time/eval_s": 1000.0,
        "time/train/step_avg_last10_s": 2 * 6.5 + 0.5,
    }
    assert timer.seconds("rollout") == 22.0 and timer.seconds("update") == 0.0
    assert throughput(10, 4) == 2.5 and throughput(10, 0) == 0.0


def test_code_version_in_and_outside_git(monkeypatch, tmp_path):
    from eqrl.tracking import version

    found = version.code_version()
    assert found["jax"] and found["python"] and found["device_count"] >= 1
    monkeypatch.setattr(version, "_SOURCE", tmp_path)
    outside = version.code_version(devices=False)
    assert outside["git_commit"] is None and outside["git_dirty"] is None
    assert "device" not in outside
    (tmp_path / "__init__.py").touch()
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True)
    inside = version.code_version(devices=False)
    assert len(inside["git_commit"]) == 40 and inside["git_dirty"] is False
    (tmp_path / "__init__.py").write_text("changed")
    assert version.code_version(devices=False)["git_dirty"] is True


def test_tracking_imports_nothing_heavy(root):
    code = (
        "import sys, eqrl.tracking, eqrl.checkpoint; "
        "heavy = {'wandb', 'rich', 'matplotlib', 'orbax', 'torch'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_disabled_wandb_is_not_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = Wandb(mode="disabled")
    run.log(0, {"a": 1.0})
    run.finish("success")
    assert run.where is None
    with pytest.raises(ValueError, match="wandb is not installed"):
        Wandb(mode="offline")


# wandb starts threads and a service process: in a process of its own, as a user's run would.
_WANDB = """
import logging, sys, time
from eqrl.tracking import Wandb
logging.basicConfig(level=logging.WARNING, format="LOG %(name)s %(message)s")
for mode in sys.argv[2:]:
    start = time.time()
    folder = sys.argv[1] + "/" + mode
    run = Wandb(mode=mode, project="t", config={"lr": 0.25}, folder=folder, timeout=1)
    run.log(1, {"reward/mean": 0.123})
    run.log(1, {"eval/acc_strict": 0.5})
    where, used = run.where, run.mode
    run.finish("success")
    print(used, where, round(time.time() - start, 1))
"""


def _wandb(root, folder, *modes, **variables):
    pytest.importorskip("wandb")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {"HOME": str(folder), "NETRC": str(folder / "none")} | variables
    done = subprocess.run(
        [sys.executable, "-c", _WANDB, str(folder), *modes],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    runs = [line.split() for line in done.stdout.splitlines()]
    records = [
        b"".join(p.read_bytes() for p in (folder / mode).glob("wandb/offline-run-*/*.wandb"))
        for mode in modes
    ]
    return runs, records, done.stderr.splitlines()


def test_offline_wandb_and_online_without_a_key(tmp_path, root):
    runs, records, stderr = _wandb(root, tmp_path, "offline", "online")
    for (mode, where, _), record, asked in zip(runs, records, ("offline", "online"), strict=True):
        assert mode == "offline" and where.startswith(str(tmp_path / asked))
        for content in (b"reward/mean", b"0.123", b"eval/acc_strict", b"lr", b"git_commit"):
            assert content in record
        assert (tmp_path / asked / "wandb_id").read_text().strip().encode() in record
    (line,) = stderr
    assert line.startswith("LOG eqrl wandb: no API key") and "wandb sync" in line


def test_online_wandb_without_a_server_goes_offline_in_bounded_time(tmp_path, root):
    nowhere = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    ((mode, _, seconds),), (record,), (line,) = _wandb(root, tmp_path, "online", **nowhere)
    assert mode == "offline" and b"0.123" in record and float(seconds) < 30
    assert line.startswith("LOG eqrl wandb: online mode failed") and "wandb sync" in line


def test_public_names_are_documented():
    for name in tracking.__dict__:
        member = getattr(tracking, name)
        if not name.startswith("_") and callable(member):
            assert member.__doc__, name
