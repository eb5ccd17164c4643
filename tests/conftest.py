"""What several tests share: hypothesis' profile, `r2` as a function, and one small network that is trained once."""

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run, and no clock, for machines that are shared.
settings.register_profile("gate", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("gate")


@dataclass(frozen=True)
class Ran:
    """A command's exit code and what it printed."""

    code: int
    out: str
    err: str


R2 = Callable[..., Ran]


@pytest.fixture
def r2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> R2:
    """Run `r2` with the given arguments in this process, through its error boundary."""
    from r2cli.cli.main import main

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["r2", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        code = exit_.value.code
        assert isinstance(code, int)
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-8 on digits at 8x8, four epochs, about 95 %. Copy it before a command writes beside it."""
    from r2cli.cli.main import invoke

    path = tmp_path_factory.mktemp("trained") / "model.safetensors"
    invoke(
        ["pretrain", "--model", "resnet8", "--size", "8", "--epochs", "4", "-o", str(path), "--device", "cpu", "--json"]
    )
    return path


@pytest.fixture
def quick_brecq(monkeypatch: pytest.MonkeyPatch) -> None:
    """BRECQ in 20 steps a block."""
    from r2cli.ptq import brecq
    from r2cli.ptq.ptq_method import PtqMethod

    rounds = functools.partial(brecq.round_network, settings=brecq.BrecqSettings(steps=20))
    monkeypatch.setattr(brecq, "METHOD", PtqMethod(whole=rounds))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread of torch: sums depend on the number, and threads wait long for each other on cores that are shared."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
