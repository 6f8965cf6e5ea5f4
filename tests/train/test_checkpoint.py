"""Checkpoints: exact, whole or not there, and honest about damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import poetx
from builders import Tiny, descend, edit_tensors, rehash
from poetx import files
from poetx.errors import UserError
from poetx.runs.evaluate import evaluate_run
from poetx.runs.load import load_run
from poetx.train import checkpoint as ckpt
from poetx.train.run import train

CONFIG = poetx.PoetConfig(block_size=8, init="normalized", exclude_modules=("head",))


class Net(nn.Module):
    """Two linears, a norm, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.up, self.norm, self.down = nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 16, bias=False)
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.norm(self.up(self.embed(tokens)))))


def make() -> tuple[nn.Module, torch.optim.Optimizer, poetx.MergeHandle]:
    torch.manual_seed(0)
    model = Net()
    poetx.convert_(model, CONFIG)
    groups = poetx.param_groups(model, lr=1e-2, poet_lr=1e-2)
    built = torch.optim.AdamW(groups, lr=1e-2)
    return model, built, poetx.merge_every(built, model, steps=4)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
    tokens = torch.randint(0, 10, (8,), generator=torch.Generator().manual_seed(number))
    loss = nn.functional.cross_entropy(model(tokens), tokens.roll(1))
    descend(loss, optimizer)
    return float(loss.detach())


def save(run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer, number: int, keep: int = 9) -> Path:
    state = ckpt.TrainState(step=number, data_fingerprint="abc")
    return ckpt.save_checkpoint(
        run_dir, model=model, optimizer=optimizer, state=state, recipe_yaml="name: x\n", keep=keep
    )


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model, optimizer, _ = make()
    path = save(tmp_path, model, optimizer, 1)
    assert ckpt.read_state(path).aliases == {"head.weight": "embed.weight"}
    assert "head.weight" not in load_file(path / "model.safetensors")


def test_group_options_come_back_with_their_types(tmp_path: Path) -> None:
    model, optimizer, _ = make()
    optimizer.param_groups[0]["lr"] = 0.125
    path = save(tmp_path, model, optimizer, 1)
    fresh, second, _ = make()
    ckpt.load_optimizer(path, fresh, second)
    assert second.param_groups[0]["lr"] == 0.125
    assert second.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    assert isinstance(second.param_groups[0]["betas"], tuple)


def test_other_parameter_groups_are_refused(tmp_path: Path) -> None:
    model, optimizer, _ = make()
    path = save(tmp_path, model, optimizer, 1)
    other = torch.optim.AdamW([{"params": list(model.parameters()), "name": "all"}])
    with pytest.raises(UserError, match="parameter groups differ"):
        ckpt.load_optimizer(path, model, other)


def test_the_generator_state_comes_back(tmp_path: Path) -> None:
    model, optimizer, _ = make()
    torch.manual_seed(11)
    path = save(tmp_path, model, optimizer, 1)
    expected = torch.rand(4)
    torch.manual_seed(12)
    ckpt.load_rng(path)
    assert torch.equal(torch.rand(4), expected)


def test_only_the_newest_are_kept_and_nothing_is_pickled(tmp_path: Path) -> None:
    model, optimizer, _ = make()
    for number in (1, 2, 10):
        save(tmp_path, model, optimizer, number, keep=2)
    assert [ckpt.step_of(path) for path in ckpt.checkpoints(tmp_path)] == [2, 10]
    suffixes = {file.suffix for file in ckpt.checkpoint_dir(tmp_path).rglob("*") if file.is_file()}
    assert suffixes == {".safetensors", ".json", ".yaml"}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def holds(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text)


def without(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        manifest = json.loads(path.read_text())
        del manifest["files"][name]
        path.write_text(json.dumps(manifest))

    return damage


MANIFESTS = [
    *("null", "3", '"x"', "[]", "[" * 100_000, '{"format": 1, "files": {"state.json": {"size": ' + "9" * 5000 + "}}}"),
    *('{"format": null, "files": {}}', '{"format": 1, "files": null}', '{"format": 1, "files": ["state.json"]}'),
    *('{"format": 1, "files": {"state.json": null}}', '{"format": 1, "files": {"state.json": [1, 2]}}'),
    *('{"format": [1], "files": {}}', '{"format": 1e999, "files": {}}'),
]
DAMAGES = [(truncate, "bytes instead of"), (Path.unlink, "missing"), (flip, "contents have changed")]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        *(
            (name, *damage)
            for name in ("model.safetensors", "optimizer.safetensors", "state.json")
            for damage in DAMAGES
        ),
        *(
            ("manifest.json", damage, "missing or unreadable")
            for damage in (truncate, Path.unlink, *map(holds, MANIFESTS))
        ),
        ("manifest.json", holds('{"format": 1, "files": {}}'), "does not list model.safetensors"),
        *(
            ("manifest.json", without(name), f"does not list {name}")
            for name in ("model.safetensors", "rng.safetensors", "recipe.yaml")
        ),
    ],
)
def test_damage_is_found_and_the_one_before_is_taken(tmp_path: Path, name: str, damage, message: str) -> None:
    model, optimizer, _ = make()
    old, new = save(tmp_path, model, optimizer, 1), save(tmp_path, model, optimizer, 2)
    damage(new / name)
    found, problems = ckpt.find_checkpoint(tmp_path)
    assert found == old
    assert len(problems) == 1
    assert str(new / name) in problems[0]
    assert message in problems[0]
    shutil.rmtree(old)
    with pytest.raises(UserError, match=rf"no whole checkpoint in .*{name}"):
        ckpt.find_checkpoint(tmp_path)


def edit_state(path: Path, change: Callable[[dict], object]) -> None:
    state = json.loads((path / "state.json").read_text())
    change(state)
    (path / "state.json").write_text(json.dumps(state))
    rehash(path, "state.json")


EDITS: list[tuple[Callable[[dict], object], str]] = [
    (lambda state: state["train"].update(momentum_steps=3), r"state\.json: train\.momentum_steps: unknown key"),
    (lambda state: state.update(version="2"), r"state\.json: version: unknown key"),
    (lambda state: state["train"].update(skipped_steps="none"), r"train\.skipped_steps: .*integer"),
    (lambda state: state["train"].update(step=True), r"train\.step: .*integer"),
    (lambda state: state["train"].update(bad_steps_in_a_row=-1), r"bad_steps_in_a_row: .*greater than or equal to 0"),
    (lambda state: state["train"].update(aliases=["head.weight"]), r"train\.aliases: .*dictionary"),
    (
        lambda state: state["train"]["aliases"].update({"head.weight": "tail.weight"}),
        r"aliases name tail\.weight, which",
    ),
    (lambda state: state.pop("train"), r"train: Field required"),
    (lambda state: state["optimizer"].pop("values"), r"optimizer\.values: Field required"),
    (lambda state: state["optimizer"]["groups"][0].pop("names"), r"optimizer\.groups\.0\.names: Field required"),
    (lambda state: state["optimizer"]["groups"][0]["options"].update(merges=-2), r"0\.options\.merges: .*greater"),
    (lambda state: state["optimizer"]["groups"][0]["options"].pop("steps_since_merge"), r"saved without .*merge_every"),
    (lambda state: state["optimizer"]["values"].update(gone={"step": 1}), r"a state of the optimizer for gone, which"),
    (lambda state: state["train"].update(step=3), r"holds step 3 .* call it step-00000003 again, or remove it"),
]


@pytest.mark.parametrize(("change", "message"), EDITS)
def test_a_state_of_another_form_is_refused_in_one_line(
    tmp_path: Path, change: Callable[[dict], object], message: str
) -> None:
    model, optimizer, _ = make()
    save(tmp_path, model, optimizer, 1)
    edit_state(save(tmp_path, model, optimizer, 2), change)
    with pytest.raises(UserError, match=rf"step-00000002.*{message}") as caught:
        ckpt.load_optimizer(ckpt.find_checkpoint(tmp_path)[0], model, optimizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("model.safetensors", {"norm.bias": None}, r"does not fit .* Missing key\(s\) in state_dict: \"norm\.bias\""),
        ("model.safetensors", {"norm.bias": torch.ones(3)}, r"does not fit .* size mismatch for norm\.bias"),
        ("model.safetensors", {"norm.bias": torch.full((24,), float("nan"))}, r"NaN or infinity in norm\.bias; remove"),
        ("model.safetensors", {f"x{i}": torch.ones(1) for i in range(99)}, r"does not fit .* Unexpected key.{,400}…$"),
        ("optimizer.safetensors", {"tail.weight//step": torch.ones(())}, r"a state of the optimizer for tail\.weight"),
        ("rng.safetensors", {"cpu": None, "x": torch.ones(1)}, r"generator states cannot be restored"),
        ("rng.safetensors", {"cpu": torch.zeros(5, dtype=torch.uint8)}, r"generator states cannot be restored"),
        ("rng.safetensors", {"cpu": torch.zeros(5)}, r"generator states cannot be restored"),
        *(
            (f"{name}.safetensors", None, rf"{name}\.safetensors: cannot be read")
            for name in ("model", "optimizer", "rng")
        ),
    ],
)
def test_tensors_of_another_form_are_refused_in_one_line(tmp_path: Path, name: str, changes, message: str) -> None:
    model, optimizer, _ = make()
    step(model, optimizer, 0)
    path = save(tmp_path, model, optimizer, 1)
    if changes is None:
        (path / name).write_bytes(b"\x10" + bytes(7) + b'{"a": ')
        rehash(path, name)
    else:
        edit_tensors(path, name, changes)

    def restore() -> None:
        ckpt.find_checkpoint(tmp_path)
        ckpt.load_model(path, model)
        ckpt.load_optimizer(path, model, optimizer)
        ckpt.load_rng(path)

    with pytest.raises(UserError, match=rf"step-00000001.*{message}") as caught:
        restore()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [lambda run: load_run(str(run)), lambda run: evaluate_run(str(run), data=None)])
def test_a_renamed_checkpoint_is_not_taken_for_the_step_in_its_name(tiny: Tiny, read: Callable[[Path], object]) -> None:
    recipe = tiny("train.steps=3", "train.checkpoint_every=1", "train.export=false")
    run = train(recipe).run_dir
    (run / "checkpoints" / "step-00000002").rename(run / "checkpoints" / "step-00000040")
    for reader in (read, lambda run: train(recipe, resume=True)):
        with pytest.raises(UserError, match="step-00000040: holds step 2 by its state"):
            reader(run)


def test_none_at_all_and_a_newer_format(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoints yet; train it"):
        ckpt.find_checkpoint(tmp_path)
    model, optimizer, _ = make()
    save(tmp_path, model, optimizer, 1)
    manifest = save(tmp_path, model, optimizer, 2) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": ckpt.FORMAT + 1}))
    with pytest.raises(UserError, match=r"format 2, this poetx reads up to 1; update poetx"):
        ckpt.find_checkpoint(tmp_path)


@pytest.mark.parametrize("full_at", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_full_disk_leaves_earlier_checkpoints_and_no_rubbish(tmp_path: Path, monkeypatch, full_at: str) -> None:
    model, optimizer, _ = make()
    old = save(tmp_path, model, optimizer, 1)
    sync, write_text = files.sync_to_disk, Path.write_text

    def full_sync(path: Path) -> None:
        if path.name == full_at:
            raise OSError(28, "No space left on device")
        sync(path)

    def full_write(path: Path, *args, **kwargs) -> int:
        if path.name == full_at:
            raise OSError(28, "No space left on device")
        return write_text(path, *args, **kwargs)

    monkeypatch.setattr(files, "sync_to_disk", full_sync)
    monkeypatch.setattr(Path, "write_text", full_write)
    with pytest.raises(UserError, match=r"step-00000002: .*No space left.*--resume"):
        save(tmp_path, model, optimizer, 2)
    monkeypatch.undo()
    assert list(ckpt.checkpoint_dir(tmp_path).iterdir()) == [old]
    ckpt.verify(old)


def test_a_file_size_limit_inside_safetensors_is_a_clear_error_too(tmp_path: Path) -> None:
    """The Rust writer reports a failed write with its own exception type."""
    resource = pytest.importorskip("resource")
    import signal

    model, optimizer, _ = make()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match="could not be written"):
            save(tmp_path, model, optimizer, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert list(ckpt.checkpoint_dir(tmp_path).iterdir()) == []


def test_an_old_checkpoint_that_is_a_link_or_a_file_is_removed_and_nothing_else(tmp_path: Path) -> None:
    model, optimizer, _ = make()
    kept = tmp_path / "kept"
    shutil.move(save(tmp_path, model, optimizer, 1), kept)
    (ckpt.checkpoint_dir(tmp_path) / "step-00000001").symlink_to(kept)
    (ckpt.checkpoint_dir(tmp_path) / "step-00000002").write_text("a file")
    newest = save(tmp_path, model, optimizer, 3, keep=1)
    assert list(ckpt.checkpoint_dir(tmp_path).iterdir()) == [newest]
    ckpt.verify(kept)


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_run(tmp_path: Path, monkeypatch, caplog) -> None:
    def stays(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    model, optimizer, _ = make()
    save(tmp_path, model, optimizer, 1)
    monkeypatch.setattr(ckpt, "remove_at_once", stays)
    ckpt.verify(save(tmp_path, model, optimizer, 2, keep=1))
    assert "step-00000001: could not be removed (Permission denied)" in caplog.text
