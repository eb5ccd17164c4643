"""What several tests share: hypothesis' profile, `r2` as a function, and one small network that is trained once."""

import faulthandler
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import settings

# The same examples in every run, and no clock, for machines that are shared.
settings.register_profile("gate", derandomize=True, deadline=None, database=None, max_examples=60)
settings.register_profile("quick", settings.get_profile("gate"), max_examples=10)

ROOT = Path(__file__).parent.parent
# What only a process of its own runs, and what needs a library of an extra that is not installed.
APART = {"r2cli.__main__"}
if find_spec("ai_edge_litert") is None:
    APART |= {f"r2cli.deploy.{path.stem}" for path in (ROOT / "r2cli/deploy").glob("tflite_*.py")}
    APART |= {"r2cli.deploy.vela"}


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("quick" if _is_quick(config) else "gate")


def _is_quick(config: pytest.Config) -> bool:
    return config.option.markexpr == "not slow"


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """All of the quick tests leave no module of r2cli out, or the run fails and names it."""
    option, reached = session.config.option, modules() & sys.modules.keys()
    if hasattr(session.config, "workeroutput"):  # one of several processes: the first one adds up
        session.config.workeroutput["reached"] = sorted(reached)
        return
    is_named = session.config.args_source is pytest.Config.ArgsSource.ARGS
    is_whole = not (is_named or option.keyword or option.collectonly)
    if exitstatus == pytest.ExitCode.OK and _is_quick(session.config) and is_whole:
        elsewhere = session.config.stash.get(REACHED, set[str]())
        session.config.stash[LEFT_OUT] = left = sorted(modules() - APART - reached - elsewhere)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED if left else exitstatus


def pytest_sessionstart(session: pytest.Session) -> None:
    """A process of pytest-xdist that crashes writes where to a file, which `pytest_testnodedown` shows."""
    given = getattr(session.config, "workerinput", None)
    if given:
        session.config.stash[CRASH] = _crash_file(given["testrunuid"], given["workerid"]).open("w")
        faulthandler.enable(session.config.stash[CRASH])


def _crash_file(run: str, worker: str) -> Path:
    return Path(tempfile.gettempdir(), f"r2-tests-{run}-{worker}.txt")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A process of pytest-xdist ended: keep what its tests reached and, where it died, tell of what."""
    node.config.stash.setdefault(REACHED, set()).update(getattr(node, "workeroutput", {}).get("reached", ()))
    crash = _crash_file(getattr(node, "workerinput", {}).get("testrunuid", ""), node.gateway.id)
    told = crash.read_text() if crash.exists() else ""
    crash.unlink(missing_ok=True)
    if error:
        node.config.get_terminal_writer().line(f"\n{told}")
        with suppress(AttributeError, subprocess.TimeoutExpired):  # it is no process of this machine, or it lives
            code = node.gateway._io.popen.wait(5)
            node.config.get_terminal_writer().line(
                f"\n{node.gateway.id} ended with {code} (-9: it was killed by signal 9)"
            )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name in config.stash.get(LEFT_OUT, []):
        terminalreporter.write_line(f"no quick test reaches {name}: every module has one that is not marked slow")


CRASH = pytest.StashKey[IO[str]]()
LEFT_OUT = pytest.StashKey[list[str]]()
REACHED = pytest.StashKey[set[str]]()


def modules() -> set[str]:
    """The full names of all modules of r2cli."""
    files = (ROOT / "r2cli").rglob("*.py")
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files}


@dataclass(frozen=True)
class Ran:
    """A command's exit code and what it printed."""

    code: int
    out: str
    err: str


R2 = Callable[..., Ran]
StoppedAt = Callable[[int], AbstractContextManager[None]]


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


@pytest.fixture(autouse=True)
def quick_proofs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proofs are quick: files run in ONNX Runtime only, or with `every_engine` in all that are installed; and their
    speed is said to be half of float's time, or with `clock` measured."""
    engines, speed = (sys.modules.get(f"r2cli.deploy.{name}") for name in ("engines", "speed"))
    if engines is not None and "every_engine" not in request.fixturenames:
        only = {"onnxruntime": engines.ENGINES["onnxruntime"]}
        monkeypatch.setattr(engines, "USUAL", only)
    if speed is not None and "clock" not in request.fixturenames:
        monkeypatch.setattr(speed, "of_checkpoint", lambda *given: speed.Speed(1.0, 2.0, {}))


Forget = Callable[..., None]


@pytest.fixture
def forget_modules() -> Iterator[Forget]:
    """Import modules of these names, and of their packages, anew in a test, and leave none of them behind. All others
    stay: compiled ones, as SciPy's, cannot be imported twice."""
    names: set[str] = set()

    def forget(*given: str) -> None:
        names.update(given)
        for name in [name for name in sys.modules if name.split(".")[0] in names]:
            del sys.modules[name]

    yield forget
    forget()


@pytest.fixture
def clock() -> None:
    """The proofs of a test measure speed."""


@pytest.fixture
def every_engine() -> None:
    """The proofs of a test run in every runtime that is installed."""


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
def one_thread() -> Iterator[None]:
    """One thread of torch: sums depend on the number, and threads wait long for each other on cores that are shared."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def stopped_at() -> StoppedAt:
    """Ctrl-C at a step of a training run in this process; steps count from 0 over all epochs."""
    from r2cli.train import loop

    rate = loop.learning_rate

    @contextmanager
    def stop(step: int) -> Iterator[None]:
        def stopping(number: int, total: int, warmup: float) -> float:
            if number == step:
                raise KeyboardInterrupt
            return rate(number, total, warmup)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "learning_rate", stopping)
            yield

    return stop
