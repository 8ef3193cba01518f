"""Folders as evaluations leave them."""

import json

from capcur_jax.evaluation.benchmarks.base import Reply, Row, Verdict
from capcur_jax.evaluation.folders import Answered, predictions_file, write_predictions


def answered(index, right, *, text="", finish="stop", tokens=10, gold="B", question="", cluster="", failed="", **facts):
    """A row, its reply, and the same verdict in both modes."""
    images = facts.pop("images", ())
    row = Row(str(index), question or f"Question {index}?", (gold,), images, {"A": "a", "B": "b"}, facts, cluster)
    verdict = Verdict(float(right), "rule", gold if right else None)
    reply = Reply(text or (gold if right else "A"), finish, tokens, failed=failed)
    return Answered(row, reply, {"official": verdict, "kit": verdict})


def folder(path, benchmarks, conditions=None, own=None):
    """Writes {benchmark: [Answered]} and scores.json, and returns the path."""
    scores = {"conditions": conditions or {}, "benchmarks": {}}
    for name, rows in benchmarks.items():
        write_predictions(predictions_file(path, name), rows)
        share = 100 * sum(one.verdicts["official"].credit for one in rows) / len(rows)
        scores["benchmarks"][name] = {
            "title": name, "rows": len(rows), "official": {"score": share}, "kit": {"score": share},
            "conditions": own or {},
        }  # fmt: skip
    (path / "scores.json").write_text(json.dumps(scores))
    return path
