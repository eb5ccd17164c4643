"""Foreign weights: every form that trainers save, and everything that can be wrong with them."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from r2cli.errors import InputError
from r2cli.storage import foreign


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return Small().state_dict()


def saved(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def found_in(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    return foreign.fitted(foreign.read(path), str(path), Small(), "small")


def refused(path: Path) -> str:
    model = Small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        foreign.fitted(foreign.read(path), str(path), model, "small")
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


KEYS = [None, "state_dict", "model_state_dict", "model", "net", "anything"]


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod.", "student.backbone."])
@pytest.mark.parametrize(("suffix", "key"), [(".safetensors", None), (".pt", None), *((".pth", key) for key in KEYS)])
def test_prefixes_and_keys_are_understood(
    prefix: str, suffix: str, key: str | None, state: dict[str, Tensor], tmp_path: Path
) -> None:
    held = OrderedDict((f"{prefix}{name}", tensor) for name, tensor in state.items())
    content = {"epoch": 3, "optimizer": {"state": {}, "lr": 0.1}, key: held} if key else held
    found, beside = found_in(saved(tmp_path / f"net{suffix}", content))
    assert list(found) == list(state) and not beside
    assert all(tensor.equal(state[name]) for name, tensor in found.items())


def test_an_average_of_the_weights_is_preferred(state: dict[str, Tensor], tmp_path: Path) -> None:
    other = {name: tensor + 1 for name, tensor in state.items()}
    found, _ = found_in(saved(tmp_path / "n.pth", {"state_dict": other, "state_dict_ema": state}))
    assert found["conv.weight"].equal(state["conv.weight"])


def test_what_stands_beside_the_network_is_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    content = {f"model.{name}": tensor for name, tensor in state.items()} | {"loss.weight": torch.ones(2)}
    _, beside = found_in(saved(tmp_path / "n.pth", content))
    assert beside == ["loss.weight"]


def test_two_networks_in_one_file_are_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    content = {f"{own}.{name}": tensor for own in ("student", "teacher") for name, tensor in state.items()}
    message = refused(saved(tmp_path / "n.pth", content))
    assert "student." in message and "teacher." in message


def test_half_precision_becomes_the_network_s(state: dict[str, Tensor], tmp_path: Path) -> None:
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    found, _ = found_in(saved(tmp_path / "n.safetensors", half))
    assert found["head.weight"].dtype == torch.float32
    assert found["head.weight"].equal(half["head.weight"].float())


def test_an_older_batch_norm_kept_no_count(state: dict[str, Tensor], tmp_path: Path) -> None:
    del state["norm.num_batches_tracked"]
    found, _ = found_in(saved(tmp_path / "n.pth", state))
    assert int(found["norm.num_batches_tracked"]) == 0


def test_every_tensor_that_differs_is_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    state["head.weight"] = torch.zeros(5, 4)
    state["extra.weight"] = state.pop("conv.weight")
    del state["norm.bias"]
    message = refused(saved(tmp_path / "n.pth", state))
    for part in ("missing: 'conv.weight', 'norm.bias'", "left over: 'extra.weight'", "'head.weight' (5, 4) not (2, 4)"):
        assert part in message


def test_a_wholly_other_network_is_refused(tmp_path: Path) -> None:
    message = refused(saved(tmp_path / "n.pth", {f"layer{i}.weight": torch.ones(1) for i in range(40)}))
    assert "28 more" in message and "'conv.weight'" in message


class Trap:
    """Code that a pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("sprung"),))


def test_no_code_of_a_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(saved(tmp_path / "n.pth", {"state_dict": Trap()}))
    assert "run code" in message and not Path("sprung").exists()
    assert "run code" in refused(saved(tmp_path / "whole.pth", Small()))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"\x80\x02}", b"PK\x03\x04" + bytes(40)])
def test_what_is_no_file_of_weights_is_refused(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"n{suffix}"
    path.write_bytes(content)
    refused(path)


def test_a_file_cut_short_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    for suffix in (".pth", ".safetensors"):
        path = saved(tmp_path / f"n{suffix}", state)
        path.write_bytes(path.read_bytes()[:-200])
        refused(path)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], {"state_dict": {}}, torch.ones(3)])
def test_a_file_without_weights_is_refused(content: Any, tmp_path: Path) -> None:
    assert "state_dict" in refused(saved(tmp_path / "n.pth", content))


def test_what_is_not_there_or_a_folder_is_named(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "none.pth")
    assert "is a directory" in refused(tmp_path)


def test_nan_weights_are_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    state["head.bias"][1] = torch.nan
    assert "'head.bias' has 1 NaN or infinite values of 2" in refused(saved(tmp_path / "n.pth", state))


def test_which_of_several_networks_is_read_is_told(tmp_path: Path) -> None:
    path, told = tmp_path / "net.pth", list[str]()
    one, other = Small().state_dict(), Small().state_dict()
    torch.save({"model": one, "ema": {"state_dict": other}, "optimizer": {}, "epoch": 3}, path)
    held = foreign.read(path, told.append)
    assert all(tensor.equal(other[name]) for name, tensor in held.items())
    assert told == [f"{path} holds this network more than once: 'model' is not what is read"]
    torch.save({"state_dict": one, "weights": {"class": torch.ones(3)}}, path)
    foreign.read(path, told.append)
    assert len(told) == 1
