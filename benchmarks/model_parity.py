"""The table of errors against transformers' PyTorch models, by family and case: what tests/models measures.

    python benchmarks/model_parity.py

Runs the parity and number-format tests (float32, random small checkpoints of both families with every parameter
perturbed) and prints what they measured; a failed test is named and ends with its exit code.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

FILES = ("tests/models/test_parity.py", "tests/models/test_properties.py")


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", f"--junitxml={report}", *FILES]
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        code = subprocess.run(command, cwd=root, env=environment, check=False).returncode
        cases = list(ElementTree.parse(report).iter("testcase"))
    print("| test | case | measured |")
    print("|---|---|---|")
    for case in cases:
        measured = [f"{p.get('name')} {p.get('value')}" for p in case.iter("property")]
        if measured:
            name, _, variant = case.get("name").partition("[")
            print(f"| {name.removeprefix('test_').replace('_', ' ')} | {variant[:-1]} | {', '.join(measured)} |")
    sys.exit(code)


if __name__ == "__main__":
    main()
