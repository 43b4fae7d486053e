"""The stack traces that are written when a rank hangs."""

import _thread
import threading

from bst_dist.faults.stacks import STACKS, stacks_of_threads, write_stacks


def test_the_main_thread_is_told_first_however_many_threads_there_are(tmp_path):
    end, threads = threading.Event(), []
    for number in range(150):  # faulthandler stops at 100
        threads.append(threading.Thread(target=end.wait, name=f"reader {number}", daemon=True))
        threads[-1].start()
    try:
        write_stacks(tmp_path / STACKS, 3)
        told = (tmp_path / STACKS / "rank-00003.txt").read_text()
    finally:
        end.set()
        for thread in threads:
            thread.join()
    head, main, *others = told.split("\n\n")
    assert head.startswith("rank 3 on ")
    first, newest, *_ = main.splitlines()
    assert first == f"thread MainThread (0x{threading.main_thread().ident:x}), most recent call first:"
    assert newest.endswith(" in stacks_of_threads")
    assert f'  File "{__file__}", line ' in main
    assert "test_the_main_thread_is_told_first" in main
    for number in range(150):
        assert any(other.startswith(f"thread reader {number} (") and "in Event.wait" in other for other in others)


def test_a_thread_that_threading_does_not_know_is_told_too():
    begun, end, ended = _thread.allocate_lock(), _thread.allocate_lock(), _thread.allocate_lock()
    for lock in (begun, end, ended):
        lock.acquire()

    def wait() -> None:
        begun.release()
        end.acquire()
        ended.release()

    _thread.start_new_thread(wait, ())
    assert begun.acquire(timeout=60)
    told = stacks_of_threads()
    end.release()
    assert ended.acquire(timeout=60)
    assert "thread without a name (0x" in told
    assert " in test_a_thread_that_threading_does_not_know_is_told_too.<locals>.wait" in told
