"""A worker program that does to itself what it is told: `tests/test_workers.py` asks it."""

import os
import resource
import signal
import subprocess
import sys
import time

from capcur_jax import workers

PIPE = os.dup(1)  # past `serve`, which has replies alone go this way


def do(request):
    """Each key of the request is something to do; the reply names it and what came of it."""
    match request:
        case {"say": text}:
            return {"said": text}, None
        case {"bytes": count}:
            return {"said": count}, bytes(range(256)) * (count // 256) + bytes(count % 256)
        case {"print": text}:
            os.write(1, text.encode())
            print(text, flush=True)
            print(text, file=sys.stderr, flush=True)
        case {"pipe": text}:
            os.write(PIPE, text.encode())
            os._exit(3)
        case {"late": text}:
            if not os.fork():
                time.sleep(0.3)
                os.write(PIPE, text.encode())
                os._exit(0)
        case {"fork": number}:
            os.fork()
            return {"forked": number}, None
        case {"read": _}:
            return {"read": [sys.stdin.read(), subprocess.run(["cat"], capture_output=True, text=True).stdout]}, None
        case {"leave": path}:  # ends, and leaves behind what it has started
            child = subprocess.Popen(["sleep", "60"])
            os.symlink(str(child.pid), path)  # no file may be written
            os._exit(4)
        case {"signal": number}:
            os.kill(os.getpid(), number)
        case {"once": path}:  # the worker that makes the file dies; an empty file is allowed
            if not os.path.exists(path):
                os.close(os.open(path, os.O_CREAT))
                os.kill(os.getpid(), signal.SIGKILL)
        case {"hush": seconds}:
            os.closerange(3, 20)
            time.sleep(seconds)
        case {"sleep": seconds}:
            time.sleep(seconds)
        case {"spin": _}:
            while True:
                pass
        case {"memory": megabytes}:
            try:
                bytearray(megabytes * 2**20)
            except MemoryError:
                return {"error": "MemoryError"}, None
        case {"file": path}:
            try:
                with open(path, "w") as file:
                    file.write("x")
            except OSError as error:
                return {"error": error.strerror}, None
        case {"last": last}:
            return {"last": last}, None
        case {"about": _}:
            about = {"session": os.getsid(0), "core": resource.getrlimit(resource.RLIMIT_CORE)[1]}
            return about | {"environment": dict(os.environ), "hash": hash("text")}, None
    return {"done": list(request)}, None


if __name__ == "__main__":
    workers.serve(do)
