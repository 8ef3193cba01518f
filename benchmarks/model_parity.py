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

import record
from absl import app

FILES = ("tests/models/test_parity.py", "tests/models/test_properties.py")


def figures(cases: list[ElementTree.Element]) -> dict:
    """Of all cases what the pages show: the worst by family and kind of prompts, a shared prompt, bfloat16."""
    measured: dict[str, list[tuple[str, str, str]]] = {}  # by test: (its case, what, value)
    for case in cases:
        name, _, variant = str(case.get("name")).partition("[")
        for one in case.iter("property"):
            measured.setdefault(name, []).append((variant[:-1], str(one.get("name")), str(one.get("value"))))
    parity = measured["test_logits_and_gradients_equal_transformers"]

    def worst(windowed: bool, what: str, kind: str) -> float:
        return max(
            float(value.split()[0])
            for variant, name, value in parity
            if name == what and variant.endswith(f"-{kind}") and variant.startswith("windowed") == windowed
        )

    kinds = {"text": "text", "image": "one image", "images": "batch"}
    said = {"logits": "logits, largest difference", "gradient": "gradient, worst tensor, relative L2"}
    shared = measured["test_a_prompt_computed_once_equals_full_sequences"]
    halves = sorted(measured["test_bfloat16_is_as_near_to_float32_as_transformers_is"])  # Qwen2.5-VL first
    return {
        "largest": [
            {"what": f"{family}, {said[what]}"} | {key: worst(windowed, what, kind) for key, kind in kinds.items()}
            for family, windowed in (("Qwen2.5-VL", True), ("Qwen3-VL", False))
            for what in said
        ],
        "shared_prompt": max(float(value.split()[0]) for _, _, value in shared),
        "bfloat16": {
            "ours": [float(value) for _, name, value in halves if name.startswith("ours, float32")],
            "transformers": [float(value) for _, name, value in halves if name == "transformers'"],
        },
    }


def main(_) -> None:
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
    if not code:
        record.write(figures(cases), ("capcur_jax/models/**",), ("torch", "transformers"))
    sys.exit(code)


if __name__ == "__main__":
    app.run(main)
