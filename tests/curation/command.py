"""A data command as its tests call it, and rows for it."""

import json

from capcur_jax.data import __main__ as data_command


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(capsys, *arguments):
    code = data_command.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]) if out else None, err
