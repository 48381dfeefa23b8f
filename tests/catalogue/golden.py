"""Value and gradient norm of every case on a stored input: python tests/catalogue/golden.py adds what is missing.

A value that is there is never changed: delete it from the file first, and say why in the commit.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cases import CASES, answers, gradients, objective

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "losses.json"


def measure(variant: str) -> dict[str, float]:
    """The loss of a case in float64 and the norm of its gradient with respect to the student's answer."""
    term = objective(variant).double()
    student, teacher, labels = answers(seed=7)
    loss, _ = term(student, teacher, labels)
    norm = torch.cat([gradient.flatten() for gradient in gradients(loss, student)]).norm()
    return {"value": float(loss.detach()), "gradient_norm": float(norm)}


if __name__ == "__main__":
    stored = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    stored = {variant: stored.get(variant) or measure(variant) for variant in CASES}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(stored, indent=1) + "\n")
    print(f"{GOLDEN.name}: {len(stored)} cases")
