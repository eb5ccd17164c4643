"""The campaign in the gate: the known cases, some damaged files, a kill of each command. R2_FUZZ_MINUTES is for more.

    R2_FUZZ_MINUTES=60 pytest tests/fuzz -s

The counts of a long run are in benchmarks/trust.md.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import campaign
import mutations
import pytest
from campaign import Input
from cases import CASES
from valid_files import Reader

HERE = Path(__file__).parent
MINUTES = float(os.environ.get("R2_FUZZ_MINUTES", "0"))


@pytest.mark.slow
def test_no_file_and_no_kill_misses_a_goal(tmp_path: Path) -> None:
    """In a process of its own, which may fork: it has one thread."""
    counts = tmp_path / "counts.json"
    asked = {"inputs": 10**9 if MINUTES else 60, "kills": 300 if MINUTES else 6, "minutes": MINUTES or 1}
    line = [sys.executable, str(HERE / "campaign.py"), "--counts", str(counts)]
    line += [part for name, value in asked.items() for part in (f"--{name}", str(value))]
    paths = os.pathsep.join([str(HERE.parent.parent), str(HERE.parent)])
    done = subprocess.run(
        line, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stdout
    found = json.loads(counts.read_text())
    assert not found["wrong"] and found["known cases"] == len(CASES)
    assert not found["faults"] and not found["faults of kills"], done.stdout
    assert found["inputs"] >= (1 if MINUTES else 60) and found["kills"] == asked["kills"]


CONTENT = {
    "a.json": b'{"weight_map": {"a": "b"}}',
    "a.toml": b"a = 1\nb = 2\n",
    "a.tsv": b"label\ttext\na\tb\n",
    "a.other": bytes(range(64)),
}


@pytest.mark.parametrize("name", CONTENT)
def test_a_mutation_is_fixed_by_its_seed_and_changes_something(name: str) -> None:
    many = [mutations.mutated(CONTENT[name], name, random.Random(seed)) for seed in range(20)]
    again = [mutations.mutated(CONTENT[name], name, random.Random(seed)) for seed in range(20)]
    assert many == again and len(set(many) - {CONTENT[name]}) > 5


@pytest.mark.parametrize(
    ("code", "said", "writes", "fault"),
    [
        (3, "r2: internal error (KeyError: 'a')\n", "", "exit 3"),
        (2, "r2: a\nr2: b\n", "", "not one sentence"),
        (2, "r2: bad\x1b[31m name\n", "", "control characters"),
        (2, "r2: [enforce fail] can't allocate memory\n", "", "out of memory"),
        (2, "x.py:3: UserWarning: y\nr2: a\n", "", "a warning of a library"),
        (0, "", "elsewhere.txt", "wrote ['elsewhere.txt']"),
        (0, "", "PWNED", "code ran"),
        (2, "r2: a\n", "out.txt", ""),
    ],
)
def test_a_missed_goal_is_seen(
    code: int, said: str, writes: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, valid = tmp_path / "here", tmp_path / "valid"
    for folder in (here, valid):
        folder.mkdir()
        (folder / "a.txt").write_bytes(b"valid")

    def ran(line: list[str]) -> tuple[int, str, str]:
        assert line == ["read", "a.txt"] and (here / "a.txt").read_bytes() == b"damaged"
        if writes:
            (here / writes).write_text("")
        return code, "", said

    monkeypatch.setattr(campaign, "ran", ran)
    given = Input("a", Reader("a.txt", (), ("out",)), b"damaged", ("read", "FILE"))
    faults = campaign.judged(given, here).faults
    assert (fault in faults) if fault else not faults
    assert sorted(path.name for path in here.iterdir()) == ["a.txt"] and (here / "a.txt").read_bytes() == b"valid"
