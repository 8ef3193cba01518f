"""Worker processes: threads share them, they may die, they keep to limits, and they end with what started them."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from capcur_jax import workers

PROGRAM = "tests.scripted_worker"
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def workers_find_the_program(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def pool_of(count=1, program=PROGRAM, memory_mb=512, timeout_s=60.0, tries=1):
    return workers.Pool(count, program, memory_mb, timeout_s, name="the test's worker", remedy="Mend it", tries=tries)


def wait_for(condition, seconds=20.0):
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.02)
    return condition()


def gone(pid):
    """No such process, not even a zombie."""
    return not psutil.pid_exists(pid)


@pytest.fixture
def pool():
    """One worker."""
    pool = pool_of()
    yield pool
    pids = pool.processes()
    pool.close()
    assert all(map(gone, pids)) and not pool.processes()


def assert_works(pool, deaths):
    assert pool.ask({"say": "ä\ud800"}) == ({"said": "ä\ud800"}, None)
    assert pool.deaths == deaths


# ---------------------------------------------------------------------- asking


def test_threads_share_the_workers_and_each_gets_its_own_reply():
    pool = pool_of(2)
    assert not pool.processes()  # started when they are needed
    pool.ask({"say": 0})
    pool.ask({"say": 1})
    assert len(pool.processes()) == 1
    with ThreadPoolExecutor(5) as threads:
        replies = list(threads.map(lambda number: pool.ask({"say": number})[0]["said"], range(200)))
    assert replies == list(range(200)) and len(pool.processes()) == 2 and pool.deaths == 0
    pool.close()


def test_bytes_follow_their_reply(pool):
    for count in (0, 1, 256 * 7 + 3, 2**22):
        reply, payload = pool.ask({"bytes": count})
        assert reply["said"] == count == len(payload)
        assert payload == bytes(range(256)) * (count // 256) + bytes(count % 256)
        assert_works(pool, 0)


def test_what_a_library_prints_is_no_reply(pool):
    assert pool.ask({"print": '{"said": 1}\n'}) == ({"done": ["print"]}, None)
    assert_works(pool, 0)


# ---------------------------------------------------------------------- dying


@pytest.mark.parametrize("request_, words", [
    ({"signal": 9}, "ended by signal 9"), ({"pipe": ""}, "exit status 3"),
    ({"pipe": '{"said": '}, "exit status 3"), ({"pipe": '{"number": 2, "bytes": 9}\n1234'}, "exit status 3"),
    ({"pipe": "said\n"}, "no reply"), ({"pipe": "[1]\n"}, "no reply"), ({"pipe": "x" * 65537}, "no reply"),
    ({"hush": 60}, "closed its pipe"),
    ({"pipe": '{"number": 1}\n'}, "another request"), ({"pipe": '{"said": 1}\n'}, "another request"),
    ({"pipe": '{"number": 2}\n{"number": 2}\n'}, "more than its reply"),
    ({"pipe": '{"number": 2, "bytes": 1}\n12'}, "more than its reply"),
])  # fmt: skip
def test_a_worker_that_dies_is_replaced(pool, request_, words):
    pool.ask({"say": 0})
    before = pool.processes()
    with pytest.raises(workers.Died, match=words) as error:
        pool.ask(request_)
    assert not isinstance(error.value, workers.TimedOut)
    assert all(map(gone, before)) and not pool.processes()
    assert_works(pool, 1)


@pytest.mark.parametrize("request_", [{"sleep": 60}, {"spin": 1}, {"signal": int(signal.SIGSTOP)}])
def test_a_worker_that_takes_too_long_is_killed(request_):
    pool = pool_of(timeout_s=1.0)
    with pytest.raises(workers.TimedOut, match="took too long"):
        pool.ask(request_)
    assert not pool.processes()
    assert_works(pool, 1)
    pool.close()


def test_a_request_may_cost_as_many_workers_as_there_are_tries(tmp_path):
    pool = pool_of(tries=2)
    assert pool.ask({"once": str(tmp_path / "mark")}) == ({"done": ["once"]}, None)
    assert_works(pool, 1)
    with pytest.raises(workers.Died):
        pool.ask({"signal": 9})
    assert_works(pool, 3)
    pool.close()


def test_deaths_are_counted_over_all_threads():
    pool = pool_of(2)
    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(pool.ask, {"signal": 9} if number % 3 else {"say": 1}) for number in range(12)]
    assert [bool(future.exception()) for future in futures] == [bool(number % 3) for number in range(12)]
    assert_works(pool, 8)
    pool.close()


def test_a_worker_that_died_at_rest_is_no_request_s_fault(pool):
    pool.ask({"say": 0})
    (pid,) = pool.processes()
    os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    assert_works(pool, 0)
    assert pool.processes() != [pid] and gone(pid)


def test_a_worker_that_says_its_reply_is_the_last_is_replaced(pool):
    assert pool.ask({"last": False})[0] == {"last": False}
    (pid,) = pool.processes()
    assert pool.ask({"last": True})[0] == {"last": True}
    assert gone(pid) and not pool.processes()
    assert_works(pool, 0)


def test_an_interrupt_ends_the_worker_and_its_reply_answers_nothing_else(pool):
    pool.ask({"say": 0})
    (pid,) = pool.processes()
    threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        pool.ask({"sleep": 60})
    assert gone(pid)
    assert_works(pool, 0)


def test_what_a_worker_wrote_besides_its_reply_answers_nothing_else(pool):
    assert pool.ask({"late": '{"number": 2, "said": "stale"}\n'})[0] == {"done": ["late"]}
    (pid,) = pool.processes()
    assert wait_for(lambda: pool._slots[0].worker.left_over())
    assert_works(pool, 0)
    assert gone(pid)


def test_a_fork_that_comes_back_does_not_reply(pool):
    for number in range(3):
        assert pool.ask({"fork": number})[0] == {"forked": number}
        assert pool.ask({"say": number})[0] == {"said": number}
    assert pool.deaths == 0


def test_requests_are_out_of_reach_of_what_reads_stdin(pool):
    assert pool.ask({"read": 1})[0] == {"read": ["", ""]}
    assert_works(pool, 0)


def test_what_a_worker_started_ends_with_it_also_where_it_ended_itself(pool, tmp_path):
    file = tmp_path / "pid"
    with pytest.raises(workers.Died, match="exit status 4"):
        pool.ask({"leave": str(file)})
    pid = int(os.readlink(file))
    assert wait_for(lambda: gone(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_the_last_words_of_a_worker_are_told(monkeypatch, tmp_path):
    """Where it is trusted; those of the request that it died of, and no earlier ones."""
    (tmp_path / "program.py").write_text(
        "import os, sys\nfrom capcur_jax import workers\n"
        "def answer(request):\n    print(request['say'], file=sys.stderr)\n"
        "    return ({}, None) if request['say'] == 'before' else os._exit(5)\n"
        "workers.serve(answer, trusted=True)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pool = pool_of(program="program")
    pool.ask({"say": "before"})
    with pytest.raises(workers.Died, match=r"^exit status 5: out of luck$"):
        pool.ask({"say": "out of luck"})


def test_a_pool_may_start_before_it_is_asked(pool, monkeypatch):
    pool.start()
    pids = pool.processes()
    pool.start()
    assert_works(pool, 0)
    assert len(pids) == 1 and pool.processes() == pids


# ---------------------------------------------------------------------- limits


def test_memory_and_files_are_limited(pool, tmp_path):
    assert pool.ask({"memory": 100})[0] == {"done": ["memory"]}
    if sys.platform != "darwin":
        assert pool.ask({"memory": 600})[0] == {"error": "MemoryError"}
    assert pool.ask({"file": str(tmp_path / "a")})[0] == {"error": "File too large"}
    assert (tmp_path / "a").read_bytes() == b""
    assert_works(pool, 0)


def test_a_worker_has_a_session_of_its_own_and_no_secrets(pool, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    about, _ = pool.ask({"about": 1})
    assert about["session"] == pool.processes()[0] and about["core"] == 0
    assert "secret" not in json.dumps(about["environment"]) and about["environment"]["PATH"] == os.environ["PATH"]
    pool.ask({"last": True})
    assert pool.ask({"about": 1})[0]["hash"] == about["hash"]  # hashes, and sympy's order with them, are the same


PARENT = f"""
import os, signal, sys, threading, time
from capcur_jax.workers import Pool
pool = Pool(2, {PROGRAM!r}, 512, 1.0, name="it", remedy="Mend it")
pool.ask({{"say": 1}})
child = os.fork()
if not child:
    pool.close()  # they are the parent's
    os._exit(0)
os.waitpid(child, 0)
if sys.argv[1] == "spin":
    threading.Thread(target=pool.ask, args=({{"spin": 1}},)).start()
    time.sleep(0.2)
try:
    print(*pool.processes(), flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print(pool.ask({{"say": "as before"}}), *pool.processes(), flush=True)
"""


@pytest.mark.parametrize("way, doing", [(signal.SIGKILL, "rest"), (signal.SIGKILL, "spin"), (signal.SIGINT, "rest")])
def test_workers_end_with_their_parent_and_not_with_ctrl_c(way, doing):
    """One that is busy when its parent is killed ends by its limit of CPU time."""
    command = [sys.executable, "-c", PARENT, doing]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert pids and not any(map(gone, pids))
        os.killpg(parent.pid, way)
        output, errors = parent.communicate(timeout=60)
    if way == signal.SIGINT:  # as a terminal sends it, to the whole group
        said = f"({{'said': 'as before'}}, None) {pids[0]}\n"
        assert (output, errors, parent.returncode) == (said, "", 0)
    assert wait_for(lambda: all(gone(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid in pids))


# ---------------------------------------------------------------------- starting and closing


@pytest.mark.parametrize("program, words", [
    ("raise ImportError('broken for the test')", "ImportError: broken for the test"),
    ("import sys\nsys.exit(4)", "exit status 4"),
    ("print('hello')", "wrote what is no reply"),
    ("import time\ntime.sleep(60)", "no sign of life in 1 s"),
    ("from capcur_jax import workers\ndef prepare(): bytearray(600 * 2**20)\nworkers.serve(None, prepare)",
     "MemoryError"),
])  # fmt: skip
def test_a_worker_that_can_t_start_says_why_and_is_no_request_s_fault(monkeypatch, tmp_path, program, words):
    (tmp_path / "program.py").write_text(program + "\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    if "sleep" in program:
        monkeypatch.setattr(workers, "START_TIMEOUT_S", 1.0)
    pool = pool_of(program="program", tries=2)
    message = rf"(?s)the test's worker \(.* -m program\) can't start: .*{words}.*\. Mend it"
    with pytest.raises(RuntimeError, match=message):
        pool.ask({"say": 1})
    assert not pool.processes() and pool.deaths == 0


def test_a_python_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    with pytest.raises(RuntimeError, match=r"can't start: .*No such file"):
        pool_of().ask({"say": 1})


def test_closing_ends_the_workers_and_who_is_waiting_hears_of_it():
    pool, errors, asked = pool_of(2), queue.Queue(), []

    def work():
        try:
            while True:
                asked.append(pool.ask({"bytes": 2**22})[0])
        except RuntimeError as error:
            errors.put(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert wait_for(lambda: len(pool.processes()) == 2 and len(asked) > 8)
    pids = pool.processes()
    pool.close()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert [errors.get() for _ in threads] == ["the test's workers were closed"] * 4 and all(map(gone, pids))
    assert pool.deaths == 0
    pool.close()
    with pytest.raises(RuntimeError, match="were closed"):
        pool.ask({"say": 1})


def test_a_worker_that_starts_while_the_pool_closes_does_not_stay(monkeypatch):
    start, started, closed = workers.Worker.__init__, [], threading.Event()

    def slow(worker, *arguments):
        started.append(True)
        closed.wait(20)
        start(worker, *arguments)
        started.append(worker.process.pid)

    monkeypatch.setattr(workers.Worker, "__init__", slow)
    monkeypatch.setattr(workers, "CLOSE_TIMEOUT_S", 0.3)
    pool = pool_of()
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(pool.ask, {"say": 1})
        assert wait_for(lambda: started)
        pool.close()  # gives up waiting for the one that starts
        closed.set()
        assert str(asked.exception(30)) == "the test's workers were closed"
    assert gone(started[1]) and not pool.processes()


def test_closing_does_not_wait_for_a_slow_start(monkeypatch, tmp_path):
    (tmp_path / "program.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pool = pool_of(program="program")
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(pool.ask, {"say": 1})
        assert wait_for(pool.processes)
        (pid,) = pool.processes()
        pool.close()
        assert gone(pid) and str(asked.exception(30)) == "the test's workers were closed"


def test_a_worker_that_reads_nothing_costs_its_time_however_large_the_request():
    """More than a pipe holds waits for a reader."""
    pool = pool_of(timeout_s=2.0)
    assert_works(pool, 0)
    (pid,) = pool.processes()
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(workers.TimedOut):
        pool.ask({"say": "x" * 10**6})
    assert time.monotonic() - started < 20 and gone(pid)
    assert_works(pool, 1)
    pool.close()
