"""The connections between the processes of an engine: what arrives, who is let in and missed."""

import queue
import socket
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer import channel
from hunyuan_jax.infer.channel import Kind
from support import paths, processes

HERE = "127.0.0.1"
PROGRAM = """
import sys
from hunyuan_jax.infer import channel
address, process = sys.argv[1:]
follower = channel.Follower(address, int(process), 3)
for message in follower.messages():
    follower.compiled(message.name, message.size)
sys.exit(follower.status)
"""
LEADER = """
import sys
from hunyuan_jax.infer import channel
leader = channel.Leader("127.0.0.1", 2)
print(leader.address, flush=True)
leader.accept()
sys.stdin.read()
"""


class Ends:
    """Records the lines and statuses with which an end would leave the process."""

    def __init__(self):
        self._queue = queue.Queue()

    def __call__(self, *end):
        self._queue.put(end)

    def get(self):
        return self._queue.get(timeout=processes.PATIENCE)

    def is_empty(self):
        return self._queue.empty()


def test_messages_arrive_in_order_and_whole():
    ends = Ends()
    leader = channel.Leader(HERE, 3, ends)
    others = [channel.Follower(leader.address, process, 3, ends) for process in (1, 2)]
    leader.accept()
    arrays = [
        np.int32(-7),
        np.zeros(0, np.int32),
        np.array([True, False]),
        np.arange(200_000, dtype=np.float32).reshape(2, -1),
    ]
    received = [[], []]

    def follow(place):
        for message in others[place].messages():
            received[place].append(message)
            if message.kind == Kind.COMPILE:
                others[place].compiled(message.name, message.size)

    threads = [threading.Thread(target=follow, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for size in (4, 1):
        leader.compile("decode", size)
        leader.wait_compiled("decode", size)
    leader.call("decode", 4, arrays)
    leader.call("admit", 0, [])
    leader.stop(3)
    for thread in threads:
        thread.join(processes.PATIENCE)
    for messages, follower in zip(received, others, strict=True):
        assert [message[:3] for message in messages] == [
            (Kind.COMPILE, "decode", 4),
            (Kind.COMPILE, "decode", 1),
            (Kind.CALL, "decode", 4),
            (Kind.CALL, "admit", 0),
        ]
        for found, array in zip(
            channel.from_bytes(arrays, messages[2].payload), arrays, strict=True
        ):
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(found, array)
        with pytest.raises(ValueError, match="0 bytes came for arrays of 800006"):
            channel.from_bytes(arrays, messages[3].payload)
        assert follower.status == 3
    assert ends.is_empty()


def test_others_may_end_in_a_pause_but_are_missed_after_it():
    ends, ends_of_other = Ends(), Ends()
    leader = channel.Leader(HERE, 2, ends)
    follower = channel.Follower(leader.address, 1, 2, ends_of_other)
    leader.accept()
    for size in (1, 2):
        leader.call("decode", size, [])
        leader.pause()
        assert [message.size for message in follower.messages()] == [size]
    follower._connection.close()
    time.sleep(0.1)  # process 0 has seen it by now
    assert ends.is_empty() and ends_of_other.is_empty()
    leader.call("decode", 3, [])
    assert ends.get()[0].startswith("error: process 1 of 2 is gone; ")


def test_strangers_are_turned_away():
    ends = Ends()
    leader = channel.Leader(HERE, 2, ends)
    port, token = int(leader.address.split()[1]), bytes.fromhex(leader.address.split()[2])
    hellos = (b"GET / HTTP/1.1\r\n\r\n", bytes(16) + struct.pack("!I", 1), b"")
    hellos += (token + struct.pack("!I", 2), token + struct.pack("!I", 0))
    strangers = [socket.create_connection((HERE, port)) for _ in hellos]
    for stranger, hello in zip(strangers, hellos, strict=True):
        stranger.sendall(hello)
        stranger.shutdown(socket.SHUT_WR)
    follower = channel.Follower(leader.address, 1, 2, ends)
    leader.accept()
    for stranger in strangers:
        with stranger:
            assert stranger.recv(1) == b""
    leader.stop(0)
    assert list(follower.messages()) == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HERE, port))


def test_whoever_does_not_come_is_named():
    leader = channel.Leader(HERE, 3)
    host, port, _ = leader.address.split()
    with pytest.raises(
        ConfigError, match=rf"processes \[1, 2\] of 3 .* {host} port {port} within"
    ):
        leader.accept(seconds=0.05)
    with pytest.raises(ConfigError, match=f"process 1 of 3 cannot connect to .* port {port}"):
        channel.Follower(leader.address, 1, 3)
    with pytest.raises(ConfigError, match=r"process 0 cannot listen on 192\.0\.2\.1"):
        channel.Leader("192.0.2.1", 2)


def run(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=paths.ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_process_ends_all_others_in_one_line():
    ends = Ends()
    leader = channel.Leader(HERE, 3, ends)
    killed, other = (run(PROGRAM, leader.address, str(process)) for process in (1, 2))
    leader.accept()
    leader.compile("chunk", 1)
    leader.wait_compiled("chunk", 1)
    killed.kill()
    line, status = ends.get()
    assert status == 1
    assert line.startswith("error: process 1 of 3 is gone; ")
    assert other.communicate(timeout=processes.PATIENCE) == ("", f"{line}\n")
    assert other.returncode == 1
    killed.communicate()
    with pytest.raises(ConnectionError, match="process 1 of 3 is gone"):
        leader.wait_compiled("chunk", 2)


def test_without_process_0_the_others_end():
    ends = Ends()
    first = run(LEADER)
    follower = channel.Follower(first.stdout.readline().strip(), 1, 2, ends)
    thread = threading.Thread(target=list, args=(follower.messages(),), daemon=True)
    thread.start()
    first.kill()
    line, status = ends.get()
    assert status == 1 and line.startswith("error: process 0 of 2 is gone; ")
    first.communicate()


def pair(ends, ends_of_other):
    """A leader, and a follower whose messages are read in a thread."""
    leader = channel.Leader(HERE, 2, ends)
    follower = channel.Follower(leader.address, 1, 2, ends_of_other)
    leader.accept()
    threading.Thread(target=list, args=(follower.messages(),), daemon=True).start()
    return leader, follower


def test_a_failure_is_told_to_process_0(monkeypatch, capsys):
    monkeypatch.setattr(channel, "_REASON_SECONDS", 0.0)
    ends, ends_of_other = Ends(), Ends()
    _, follower = pair(ends, ends_of_other)
    try:
        raise RuntimeError("out of memory")
    except RuntimeError as e:
        follower.failed(e)
    line, status = ends.get()
    assert status == 1
    assert line.startswith("error: process 1 of 2 has failed: RuntimeError: out of memory; ")
    lines = sorted(ends_of_other.get()[0] for _ in range(2))
    assert lines[0].startswith("error: process 0 of 2 is gone; ")
    assert lines[1].startswith("error: process 1 of 2 has failed; ")
    assert "out of memory" in capsys.readouterr().err


def test_process_0_ends_the_others_at_once():
    ends, ends_of_other = Ends(), Ends()
    leader, _ = pair(ends, ends_of_other)
    leader.stop(0, at_once=True)
    assert ends_of_other.get() == ("", 0)
    assert ends.is_empty()
