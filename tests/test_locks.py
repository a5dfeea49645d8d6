"""One command at a time in a run folder; what a killed one leaves is taken over."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest

from bdclean.errors import BdcleanError, ConfigError, FileError
from bdclean.files import replacing, write_text
from bdclean.locks import NAME, PATIENCE, Holder, RunLock, require_held, started


@pytest.fixture
def other():
    """A process that lives as long as the test."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture(autouse=True)
def _no_job(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def write(folder, holder, age=0.0):
    """A lock as another process has left it."""
    folder.mkdir(exist_ok=True)
    text = holder if isinstance(holder, str) else json.dumps(asdict(holder))
    (folder / NAME).write_bytes(text.encode(errors="surrogateescape"))
    then = time.time() - age
    os.utime(folder / NAME, (then, then))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_is_made_and_goes_again_if_nothing_was_written(tmp_path):
    run = tmp_path / "deep" / "run"
    with RunLock(run):
        assert names(run) == [NAME]
        assert json.loads((run / NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "deep").exists()
    with RunLock(run):
        (run / "config.yaml").write_text("")
    assert names(run) == ["config.yaml"]
    (run / "config.yaml").unlink()
    with RunLock(run):
        pass
    assert run.is_dir()  # it was there before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_it_is_given_back_whatever_happens(tmp_path, error):
    with pytest.raises(error), RunLock(tmp_path / "run"):
        raise error
    assert names(tmp_path) == []


def test_a_second_command_is_refused_and_touches_nothing(tmp_path, other):
    mine = Holder.here()
    write(tmp_path, replace(mine, pid=other.pid, started=started(other.pid)))
    before = (tmp_path / NAME).read_text(), (tmp_path / NAME).stat().st_mtime_ns
    told = (
        f"^{tmp_path}: another command works in this folder since {mine.since} "
        rf"\(process {other.pid} on {mine.host}\); let it end, or name another folder with --run\.$"
    )
    with pytest.raises(ConfigError, match=told), RunLock(tmp_path):
        pass
    with pytest.raises(ConfigError, match=told):
        RunLock(tmp_path).refuse_if_held()
    assert ((tmp_path / NAME).read_text(), (tmp_path / NAME).stat().st_mtime_ns) == before
    assert names(tmp_path) == [NAME]


GONE = {
    "its process ended": ({"pid": 2**22 + 1}, 0.0),
    "its number belongs to a later process": ({"started": "1"}, 0.0),
    "another machine that went silent": ({"host": "elsewhere"}, PATIENCE + 5),
    "another container that went silent": ({"space": "pid:[1]"}, PATIENCE + 5),
}


@pytest.mark.parametrize("case", GONE)
def test_the_lock_of_a_command_that_is_gone_is_taken_over(tmp_path, other, case):
    facts, age = GONE[case]
    lives = replace(Holder.here(), pid=other.pid, started=started(other.pid))
    write(tmp_path, replace(lives, **facts), age)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
        assert names(tmp_path) == [NAME]
    assert names(tmp_path) == []


@pytest.mark.parametrize("facts", [{"host": "elsewhere"}, {"space": "pid:[1]"}])
def test_another_machine_that_renews_its_lock_lives(tmp_path, facts):
    write(tmp_path, replace(Holder.here(), **facts, pid=1), PATIENCE - 30)
    with pytest.raises(ConfigError, match="another command works"), RunLock(tmp_path):
        pass


ODD = {
    "nothing": "",
    "half a lock": "{",
    "a list": "[]",
    "few keys": '{"host": "a"}',
    "deep brackets": "[" * 100_000,
    "deep keys": '{"a":' * 100_000,
    "no UTF-8": "\udcff",
    "no start": {"started": None, "pid": 2**22 + 1},
    "a text for a number": {"pid": "1"},
    "no number": {"pid": None},
    "true for a number": {"pid": True},
    "all processes": {"pid": -1},
    "no process": {"pid": 0},
    "a huge number": {"pid": 10**30},
    "a number for a text": {"host": 1, "space": 2},
    "more keys": {"more": 1},
}


def text_of(odd):
    facts = asdict(Holder.here()) | odd if isinstance(odd, dict) else None
    return odd if facts is None else json.dumps(facts)


@pytest.mark.parametrize("text", [text_of(odd) for odd in ODD.values()], ids=ODD)
def test_a_lock_that_is_not_whole_counts_for_a_while(tmp_path, text):
    write(tmp_path, text)
    with pytest.raises(ConfigError, match="another command works in this folder; let"):
        RunLock(tmp_path).__enter__()
    write(tmp_path, text, PATIENCE + 5)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_time_that_is_yet_to_come_does_not_count_for_ever(tmp_path):
    for holder in (replace(Holder.here(), host="elsewhere"), ""):
        write(tmp_path, holder, -PATIENCE + 30)  # a clock that is a little fast
        with pytest.raises(ConfigError, match="another command works"), RunLock(tmp_path):
            pass
        write(tmp_path, holder, -PATIENCE - 30)
        with RunLock(tmp_path):
            assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def pipe(place):
    os.mkfifo(place)


def link_to_a_file(place):
    place.with_name("mine.txt").write_text("mine")
    place.symlink_to("mine.txt")


NO_FILE = {
    "a folder": lambda place: place.mkdir(),
    "a pipe": pipe,
    "a link to nowhere": lambda place: place.symlink_to("nowhere"),
    "a link to a device": lambda place: place.symlink_to("/dev/zero"),
    "a link to itself": lambda place: place.symlink_to(place.name),
    "a link to a file": link_to_a_file,
}


@pytest.mark.parametrize("case", NO_FILE)
def test_what_is_no_file_is_refused_at_once_and_never_written_through(tmp_path, case):
    NO_FILE[case](tmp_path / NAME)
    before = names(tmp_path)
    told = rf"^{tmp_path}/\.lock is no plain file, as a lock is; remove it, or name another"
    with pytest.raises(FileError, match=told):
        RunLock(tmp_path).__enter__()
    with pytest.raises(FileError, match=told):
        RunLock(tmp_path).refuse_if_held()
    assert names(tmp_path) == before
    if "mine.txt" in before:
        assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_lock_of_a_killed_command_is_stale_at_once(tmp_path):
    script = "import sys, time, pathlib; from bdclean.locks import RunLock\n"
    script += "RunLock(pathlib.Path(sys.argv[1])).__enter__(); print('held', flush=True)\n"
    script += "time.sleep(600)"
    run = tmp_path / "run"
    words = [sys.executable, "-c", script, str(run)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another command works"):
            RunLock(run).refuse_if_held()
        process.kill()
    assert names(run) == [NAME]
    with RunLock(run):
        pass
    assert names(run) == []


# ---------------------------------------------------------------------- a lock that is lost


def remove_the_file(run):
    (run / NAME).unlink()


def remove_the_folder(run):
    shutil.rmtree(run)


def give_it_to_another(run):
    write(run, replace(Holder.here(), pid=1))


def begin_anew(run):
    shutil.rmtree(run)
    write(run, replace(Holder.here(), pid=1))


def put_a_link(run):
    (run / NAME).rename(run / "moved")
    (run / NAME).symlink_to("moved")


LOST = [remove_the_file, remove_the_folder, give_it_to_another, begin_anew, put_a_link]
GONE_NOW = "run: the lock of this command is gone, so that another one may work in the folder; this"


@pytest.mark.parametrize("lose", LOST)
def test_nothing_is_written_once_the_lock_is_lost(tmp_path, lose):
    run = tmp_path / "run"
    with RunLock(run):
        write_text(run / "config.yaml", "mine")
        lose(run)
        before = sorted(map(str, tmp_path.rglob("*")))
        for name in ("config.yaml", "checkpoints/last.ckpt"):
            with pytest.raises(ConfigError, match=GONE_NOW):
                write_text(run / name, "mine as well")
        write_text(tmp_path / "elsewhere.txt", "is free")
        (tmp_path / "elsewhere.txt").unlink()
        with pytest.raises(ConfigError, match=GONE_NOW):  # from now on it is known
            require_held()
    assert sorted(map(str, tmp_path.rglob("*"))) == before
    require_held(run / "config.yaml")  # nothing is held any more
    require_held()


def wait_until_it_is_noticed():
    for _ in range(1000):
        require_held()
        time.sleep(0.01)


@pytest.mark.parametrize("lose", LOST)
def test_a_renewal_notices_and_does_not_renew_for_another(tmp_path, monkeypatch, lose):
    monkeypatch.setattr("bdclean.locks.BEAT", 0.02)
    run = tmp_path / "run"
    with RunLock(run):
        require_held()
        lose(run)
        if (run / NAME).exists():
            os.utime(run / NAME, (1, 1))
        with pytest.raises(ConfigError, match=GONE_NOW):
            wait_until_it_is_noticed()
        time.sleep(0.1)
        assert not (run / NAME).exists() or (run / NAME).stat().st_mtime == 1


def write_while_it_is_lost(run):
    with replacing(run / "a") as place:
        begin_anew(run)
        place.write_text("mine")


def test_a_lock_that_was_lost_while_a_file_was_written_keeps_the_file_away(tmp_path):
    run = tmp_path / "run"
    with RunLock(run), pytest.raises(BdcleanError):
        write_while_it_is_lost(run)
    assert names(run) == [NAME]


def test_a_job_that_was_moved_to_another_machine_finds_its_own_lock(tmp_path, monkeypatch, other):
    before = replace(Holder.here(), host="elsewhere", job="7")
    write(tmp_path, before)
    for job in ("8", None):
        if job:
            monkeypatch.setenv("SLURM_JOB_ID", job)
        with pytest.raises(ConfigError), RunLock(tmp_path):
            pass
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with RunLock(tmp_path):
        pass
    # two commands of one allocation are two commands
    write(tmp_path, replace(Holder.here(), pid=other.pid, started=started(other.pid)))
    with pytest.raises(ConfigError), RunLock(tmp_path):
        pass


def test_of_many_at_once_one_gets_it(tmp_path):
    write(tmp_path, replace(Holder.here(), pid=2**22 + 1))  # all of them see a stale one
    inside, most, refused, barrier = [], [], [], threading.Barrier(8)
    guard = threading.Lock()

    def run():
        barrier.wait()
        try:
            with RunLock(tmp_path):
                with guard:
                    inside.append(1)
                    most.append(len(inside))
                time.sleep(0.3)
                with guard:
                    inside.pop()
        except ConfigError:
            refused.append(1)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(most) + len(refused) == 8
    assert names(tmp_path) == []


def test_a_holder_renews_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr("bdclean.locks.BEAT", 0.02)
    with RunLock(tmp_path):
        os.utime(tmp_path / NAME, (1, 1))
        deadline = time.monotonic() + 10
        while (tmp_path / NAME).stat().st_mtime < 1000:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"run/\.lock cannot be written: Not a directory\."):
        RunLock(tmp_path / "file" / "run").__enter__()


def test_only_a_process_that_lives_has_begun(other):
    assert started(os.getpid()) == started(os.getpid()) is not None
    other.kill()
    while started(other.pid) is not None:  # until it is a zombie, which holds nothing
        time.sleep(0.01)
    other.wait()
    assert started(other.pid) is None
