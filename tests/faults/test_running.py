"""What goes wrong while training: signals, full disks, non-finite losses, lost ranks."""

import json
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from tiny import PRETRAIN, ROOT, SECONDS, SFT, free_port, read_jsonl, write_jsonl

from common.errors import RankError
from common.files import MARK, SCRATCH, TEMPORARY, lock_of, scratch_folder
from trainer.support.processes import Processes, wrap_line

pytest_plugins = ["tiny"]

STEPS = 14  # two epochs of 25 rows in steps of 4
FLAGS = ["--from_weight", "llm", "--epochs", 2, "--batch_size", 4, "--learning_rate", 1e-3, "--log_interval", 1]
# Executes `what` after a forward pass; `calls` counts them.
AT_FORWARD = """
import functools, os, signal, sys, threading, time, torch, model.model_vlm
forward, calls = model.model_vlm.MiniMindVLM.forward, []
@functools.wraps(forward)
def counted(*inputs, **named):
    calls.append(1)
    output = forward(*inputs, **named)
    {what}
    return output
model.model_vlm.MiniMindVLM.forward = counted
"""
SIGNALLED = "if len(calls) == {call} and os.environ.get('RANK', '0') == '{rank}': os.kill(os.getpid(), signal.{name})"
SPOILED = "if len(calls) in {calls}: output.loss = output.loss * float('{value}')"


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def run(world, out, *more, **how):
    return world.run(SFT, *world.files("sft", out), *FLAGS, *more, **how)


def losses(out, name="sft_vlm_32") -> list[float]:
    return [row["loss"] for row in read_jsonl(out / f"{name}.metrics.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    out = world.copy_of_out(tmp_path_factory.mktemp("undisturbed") / "out")
    run(world, out).passed()
    return out


def assert_same_weights(out, other):
    a, b = (load(folder / "sft_vlm_32.pth") for folder in (out, other))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_a_signal_finishes_the_step_and_saves_it(world, tmp_path, undisturbed):
    out = world.copy_of_out(tmp_path / "out")
    for name, status, call, step in (("SIGTERM", 143, 5, 5), ("SIGINT", 130, 4, 9), ("SIGHUP", 129, 2, 11)):
        hook = AT_FORWARD.format(what=SIGNALLED.format(call=call, rank=0, name=name))
        stopped = run(world, out, "--num_workers", 1, "--from_resume", 1, hook=hook)
        assert stopped.code == status
        assert f"{name}: finishing this step and saving" in stopped.err
        words = f"stopped after step {step} of 14, which is saved: the same command with --from_resume 1 resumes"
        assert words in stopped.out
        assert "Traceback" not in stopped.text
        assert load(out / "sft_vlm_32_resume.pth")["step"] == step
        assert len(losses(out)) == step
    run(world, out, "--from_resume", 1).passed()
    assert_same_weights(out, undisturbed)
    assert losses(out) == losses(undisturbed)


def test_a_signal_to_one_rank_stops_both_at_the_same_step(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    hook = AT_FORWARD.format(what=SIGNALLED.format(call=5, rank=1, name="SIGTERM"))
    stopped = run(world, out, "--batch_size", 2, ranks=2, hook=hook)
    assert stopped.code == 143
    assert "stopped after step 5 of 14" in stopped.out
    assert load(out / "sft_vlm_32_resume.pth")["step"] == 5
    run(world, out, "--batch_size", 2, "--from_resume", 1, ranks=2).passed()
    assert len(losses(out)) == STEPS


def test_a_second_signal_exits_immediately(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    again = "threading.Timer(2.3, os.kill, (os.getpid(), signal.SIGINT)).start()"
    what = f"if len(calls) == 5: os.kill(os.getpid(), signal.SIGTERM); {again}; time.sleep(60)"
    started = time.monotonic()
    left = run(world, out, "--save_interval", 2, hook=AT_FORWARD.format(what=what))
    assert time.monotonic() - started < 30
    assert left.code == 130
    assert "exited immediately; what was saved before is kept" in left.err
    assert load(out / "sft_vlm_32_resume.pth")["step"] == 4


def test_ctrl_c_before_the_first_step_prints_no_traceback(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    hook = "import trainer.setup\ndef interrupt(*a): raise KeyboardInterrupt\ntrainer.setup.load_data = interrupt"
    stopped = run(world, out, hook=hook)
    assert (stopped.code, stopped.err) == (130, "interrupted\n")
    command = [sys.executable, "-c", "import common.errors; raise KeyboardInterrupt"]  # while a script still imports
    assert subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True).stderr == "interrupted\n"


FULL_DISK = """
import errno, os, model.weights
flush, flushed = os.fsync, []
def full(number):
    flushed.append(number)
    if len(flushed) in {fails}:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    flush(number)
os.fsync = full
"""


def test_training_goes_on_after_a_failed_save(world, tmp_path, undisturbed):
    out = world.copy_of_out(tmp_path / "out")
    # Each save flushes three files and three times their folder, after two flushes of metrics.jsonl.
    done = run(world, out, "--save_interval", 3, hook=FULL_DISK.format(fails=range(9, 12))).passed()
    assert "warning: step 6 could not be saved, training continues: " in done.out
    assert "cannot be written: No space left on device" in done.out
    assert_same_weights(out, undisturbed)
    assert not any(path.suffix == ".tmp" for path in out.iterdir())


def test_a_failed_last_save_is_an_error_and_keeps_the_one_before(world, tmp_path):
    """A limit on the file size stands for a full disk: the kernel raises it."""
    out = world.copy_of_out(tmp_path / "out")
    run(world, out, "--epochs", 1).passed()
    before = {path.name: path.read_bytes() for path in out.glob("sft_vlm_32*") if path.is_file()}
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))"
    failed = run(world, out, "--cache_vision", "off", "--from_resume", 1, hook=limit)
    failed.refused("cannot be written: File too large")
    assert failed.out.count("could not be saved, training continues") == 0
    after = {path.name: path.read_bytes() for path in out.glob("sft_vlm_32*") if path.is_file()}
    assert {name for name in before if before[name] != after[name]} == {"sft_vlm_32.metrics.jsonl"}
    run(world, out, "--from_resume", 1).passed()


def test_a_failed_last_save_writes_the_weights_alone_where_these_fit(world, tmp_path, undisturbed):
    out = world.copy_of_out(tmp_path / "out")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))"
    failed = run(world, out, hook=limit)
    failed.refused("_resume.pth cannot be written: File too large; the weights of step", "alone were written")
    assert_same_weights(out, undisturbed)


@pytest.mark.parametrize("cache", ["off", "features"], ids=["while training", "while encoding"])
def test_too_few_open_files_for_the_workers_end_the_run_in_words(world, tmp_path, cache):
    out = world.copy_of_out(tmp_path / "out")
    hook = (
        "import os; from resource import *; n = len(os.listdir('/proc/self/fd')) + 20; setrlimit(RLIMIT_NOFILE, (n, n))"
    )
    ended = run(world, out, "--num_workers", 4, "--cache_vision", cache, hook=hook)
    ended.refused("ulimit -n", "--num_workers 0 does without workers")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_bad_step_is_skipped_and_counted(world, tmp_path, value):
    out = world.copy_of_out(tmp_path / "out")
    done = run(world, out, hook=AT_FORWARD.format(what=SPOILED.format(calls=[1, 6], value=value))).passed()
    assert "by step 1 the loss or the gradient was not finite in 1 step(s) more: skipped" in done.out
    assert "by step 6 the loss or the gradient was not finite in 1 step(s) more: skipped" in done.out
    rows = read_jsonl(out / "sft_vlm_32.metrics.jsonl")
    assert [row["step"] for row in rows if row["loss"] is None] == [1, 6]
    assert [row["skipped_steps"] for row in rows] == [1] * 5 + [2] * (STEPS - 5)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in load(out / "sft_vlm_32.pth").values())
    state = load(out / "sft_vlm_32_resume.pth")
    assert {int(kept["step"]) for kept in state["optimizer"]["state"].values()} == {STEPS - 2}
    assert (state["step"], state["bad_steps"]) == (STEPS, [2, 0, 1])
    for line in (out / "sft_vlm_32.metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_bad_step_of_one_rank_is_skipped_by_both(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    what = "if len(calls) == 2 and os.environ['RANK'] == '1': output.loss = output.loss * float('nan')"
    run(world, out, "--batch_size", 2, ranks=2, hook=AT_FORWARD.format(what=what)).passed()
    assert [row["skipped_steps"] for row in read_jsonl(out / "sft_vlm_32.metrics.jsonl")][:3] == [0, 1, 1]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in load(out / "sft_vlm_32.pth").values())


def test_ten_bad_steps_in_a_row_are_an_error(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    spoiled = SPOILED.format(calls=range(4, 99), value="nan")
    ended = run(world, out, "--save_interval", 3, hook=AT_FORWARD.format(what=spoiled))
    ended.refused("10 steps in a row, up to step 13", "--learning_rate", "--grad_clip", "dataset.check")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in load(out / "sft_vlm_32.pth").values())


def test_four_ranks_give_the_losses_of_one(world, tmp_path, undisturbed):
    """25 rows, a fifth of them without an image, in steps of 4: in the last step three ranks have no row."""
    out = world.copy_of_out(tmp_path / "out")
    run(world, out, "--batch_size", 1, ranks=4).passed()
    assert losses(out) == pytest.approx(losses(undisturbed), rel=1e-5)


def test_a_rank_with_only_a_broken_picture_gives_the_losses_of_one(world, tmp_path):
    """Steps of two rows, one per rank: a broken image leaves its rank an empty batch."""
    rows = [row for row in read_jsonl(world.root / "sft.jsonl") if "," not in row.get("image", "")][:9]
    bad = shutil.copytree(world.images, tmp_path / "images")
    for name in ("2.jpg", "4.jpg"):
        (bad / name).write_bytes(b"no picture")
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = []
    for ranks in (1, 2):
        out = world.copy_of_out(tmp_path / f"out_{ranks}")
        files = ["--data_path", data, "--images_path", bad, "--batch_size", 2 // ranks]
        run(world, out, *files, ranks=ranks).passed()
        metrics = read_jsonl(out / "sft_vlm_32.metrics.jsonl")
        assert metrics[-1]["skipped_pictures"] >= 2
        found.append([row["loss"] for row in metrics])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


# A script for torchrun: runs the hook on rank 1, then the training script.
WRAPPED = """
import os, runpy, sys
sys.path.insert(0, {root!r})
rank, restart = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
if rank == "1":
    exec({hook!r}, {{"restart": restart}})
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def wrapped(world, tmp_path, script, what: str):
    path = tmp_path / "wrapped.py"
    root = str(script.parents[1])
    path.write_text(WRAPPED.format(root=root, hook=AT_FORWARD.format(what=what), script=str(script)))
    return path


def torchrun(*flags) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *map(str, flags)]


def started(world, cwd, *command) -> subprocess.Popen:
    """Starts a command in a process group of its own, as a terminal does."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*map(str, command)], env=world.environment, cwd=cwd, start_new_session=True, **pipes)


def test_torchrun_restarts_after_a_killed_rank_and_ctrl_c_saves(world, tmp_path):
    """Rank 1 is killed; after the restart Ctrl-C reaches torchrun, which signals its ranks, and rank 1."""
    out = world.copy_of_out(tmp_path / "out")
    script = wrapped(
        world,
        tmp_path,
        PRETRAIN,
        "if len(calls) == 6 and restart == '0': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    if len(calls) == 5 and restart == '1': [os.killpg(group, signal.SIGINT) for group in (os.getppid(), 0)]",
    )
    flags = ["--epochs", 2, "--batch_size", 2, "--save_interval", 2, "--log_interval", 1, "--from_resume", 1]
    command = torchrun("--nproc_per_node", 2, "--master_port", free_port(), "--max-restarts", 1, script)
    process = started(world, tmp_path, *command, *world.files("pretrain", out), *flags, "--num_workers", 1)
    printed, errors = process.communicate(timeout=SECONDS)
    assert "so this run starts from the beginning" in printed
    assert "resumes      after step 4, 10 to go" in printed
    assert "another process of this run has ended or does not answer" in errors
    assert process.returncode != 0
    assert "which is saved: the same command with --from_resume 1 resumes" in printed
    step = load(out / "pretrain_vlm_32_resume.pth")["step"]
    assert 9 <= step < STEPS
    assert [row["step"] for row in read_jsonl(out / "pretrain_vlm_32.metrics.jsonl")] == list(range(1, step + 1))


def test_two_agents_train_together_until_one_is_silent(world, tmp_path):
    """Two torchrun agents, as on two machines; a rank is stopped, not killed, as when a machine loses power."""
    together, alone = (world.copy_of_out(tmp_path / name / "out") for name in ("together", "alone"))
    script = wrapped(world, tmp_path, PRETRAIN, "if len(calls) == 3: os.kill(os.getpid(), signal.SIGSTOP)")
    meeting = ["--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d", "--rdzv_id", "tiny"]
    meeting += ["--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--local_addr", "127.0.0.1"]
    flags = [*world.files("pretrain", together), "--batch_size", 2, "--log_interval", 1, "--timeout_minutes", 0.1]
    agents = [started(world, tmp_path, *torchrun(*meeting, script), *flags) for _ in range(2)]
    since = time.monotonic()
    try:
        while all(agent.poll() is None for agent in agents) and time.monotonic() - since < 90:
            time.sleep(0.2)
        [ended] = [agent for agent in agents if agent.poll() is not None]  # either may get rank 1
        _, errors = ended.communicate(timeout=10)
        assert ended.returncode != 0
        assert "error (process 0): another process of this run has ended or does not answer" in errors
        assert "--from_resume 1 resumes from there" in errors
    finally:
        # The ranks are in groups of their own.
        subprocess.run(["pkill", "-9", "-f", str(script)], check=False)
        for agent in agents:
            agent.communicate(timeout=10)
    world.run(PRETRAIN, *world.files("pretrain", alone), "--batch_size", 4, "--log_interval", 1).passed()
    found, expected = (losses(out, "pretrain_vlm_32") for out in (together, alone))
    assert len(found) == 2 and found == pytest.approx(expected[:2], rel=1e-5)


IN_A_GROUP = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", value) for value in ("x", "", "-1", "2", "1.0")]
    + [("WORLD_SIZE", value) for value in ("0", "two", "1e9", "9" * 30)]
    + [("LOCAL_RANK", "5"), ("LOCAL_RANK", "x"), ("LOCAL_WORLD_SIZE", "3"), ("LOCAL_WORLD_SIZE", "0")]
    + [("MASTER_PORT", value) for value in ("0", "99999", "http", "")]
    + [("MASTER_ADDR", "")],
)
def test_an_odd_variable_of_torchrun_is_named(monkeypatch, name, value):
    for variable, usual in (IN_A_GROUP | {name: value}).items():
        monkeypatch.setenv(variable, usual)
    with pytest.raises(RankError, match=rf"{name} is .*torchrun sets it"):
        Processes.start("cpu")


def test_an_odd_variable_ends_the_script_in_words(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    for env in (IN_A_GROUP | {"LOCAL_RANK": "x"}, {"RANK": "1"}):  # the second would train and write nothing
        ended = run(world, out, env=env)
        assert (ended.code, "Traceback" in ended.text) == (1, False), ended.text
        assert "error (process " in ended.err and "torchrun sets it" in ended.err


@pytest.mark.parametrize(("rank", "is_taken"), [("0", True), ("0", False), ("1", False)])
def test_ranks_that_do_not_meet_end_in_words_within_the_timeout(world, tmp_path, rank, is_taken):
    """The port is another program's, or the other rank is missing."""
    out = world.copy_of_out(tmp_path / "out")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if is_taken:
            other.listen()
        port = str(other.getsockname()[1]) if is_taken else str(free_port())
        env = IN_A_GROUP | {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
        ended = run(world, out, "--timeout_minutes", 0.02, env=env)
    assert (ended.code, "Traceback" in ended.text) == (1, False), ended.text
    assert f"did not find each other at 127.0.0.1:{port}" in ended.err and "--master_port" in ended.err


def test_a_second_run_of_the_same_name_is_refused(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    held = lock_of(out / "sft_vlm_32")
    held.acquire()
    run(world, out).refused("another process is training sft_vlm_32", "--save_weight or --save_dir")
    run(world, out, "--save_weight", "other").passed()
    held.release()
    run(world, out).passed()


def test_a_run_removes_its_own_leftovers_only(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    dies = "import common.files, os\ncommon.files.flush = lambda _: os.kill(os.getpid(), 9)"
    assert run(world, out, hook=dies).code == -9
    [left] = out.glob(".*")
    mine = [".sft_vlm_32.pth.1.tmp", ".writable.0", f"{SCRATCH}mine{TEMPORARY}", f"{SCRATCH}link{TEMPORARY}"]
    for name in mine[:2]:
        (out / name).touch()
    shutil.copytree(left, out / mine[2])
    (out / mine[2] / MARK).write_text("not the mark", encoding="utf-8")
    (out / mine[3]).symlink_to(shutil.copytree(left, tmp_path / "linked"))
    with scratch_folder(out) as alive:
        run(world, out, "--epochs", 1).passed()
        assert {path.name for path in out.glob(".*")} == {*mine, alive.parent.name}
    assert (tmp_path / "linked" / MARK).is_file()


@pytest.mark.parametrize("where", ["full disk", "lost reader"])
def test_training_goes_on_if_stdout_cannot_be_written(world, tmp_path, undisturbed, where):
    """As `train >/dev/full` and `train | head -1`; the note goes to stderr."""
    out = world.copy_of_out(tmp_path / "out")
    if where == "full disk":  # in a process of its own: at its end Python writes its buffers once more
        code = "import os, runpy, trainer.report.watcher as watcher\nwatcher.LONGEST = 8\n"
        code += f"os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\nrunpy.run_path({str(SFT)!r}, run_name='__main__')"
        errors = world.start("-c", code, *world.files("sft", out), *FLAGS, cwd=ROOT).passed().err
    else:
        hook = "import os, sys\nreader, writer = os.pipe()\nos.close(reader)\nsys.stdout = open(writer, 'w')"
        errors = run(world, out, hook=hook).passed().err
    assert "note: stdout could not be written" in errors
    assert "Traceback" not in errors and "Exception ignored" not in errors
    assert_same_weights(out, undisturbed)
    assert losses(out) == losses(undisturbed)


def test_if_every_picture_is_broken_nothing_is_saved_and_it_is_an_error(world, tmp_path):
    out, images = world.copy_of_out(tmp_path / "out"), shutil.copytree(world.images, tmp_path / "images")
    for path in images.iterdir():
        path.write_bytes(b"no picture")
    result = world.run(PRETRAIN, *world.files("pretrain", out), "--epochs", 1, "--images_path", images)
    result.refused("nothing was learned in ", "pictures so far can be read", "--pictures says why")
    assert not list(out.glob("pretrain_vlm_32*.pth"))
    assert result.out.count("skipped a sample, its picture cannot be read: ") <= 20
    assert len(set((out / "pretrain_vlm_32.bad_rows.txt").read_text().splitlines())) == 12  # each picture once


def test_lines_are_wrapped_for_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    line, log = "next: python eval_vlm.py --weight my_photos --chat", Processes(0, 1, torch.device("cpu")).log
    log(line)  # not to a terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    log(line)
    log(line, wraps=False)
    assert capsys.readouterr().out.count(line) == 2
    assert wrap_line("") == "" and wrap_line("a short line") == "a short line"
    assert wrap_line("  starts from  out/llm_32.pth (a language model)") == (
        "  starts from  out/llm_32.pth (a\n               language model)"
    )
    assert wrap_line("a sentence of rather more than forty characters") == (
        "a sentence of rather more than forty\ncharacters"
    )
