"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
import torch

from poetx.cli import main
from poetx.errors import UserError
from poetx.planner.reach import Link

RECIPE = """
name: small
model: {hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2}
data: {vocab_size: 300, seq_len: 8, validation_fraction: 0.5}
poet: {block_size: 8, init: normalized, merge_every: 2}
train: {steps: 3, batch_size: 2, eval_every: 2, eval_windows: 2, checkpoint_every: 2, log_every: 1, device: cpu}
"""


def prepare(directory: Path) -> None:
    lines = "".join(f"{number} little words in a row\n" for number in range(3000))
    (directory / "text.txt").write_text(lines, encoding="utf-8")
    (directory / "small.yaml").write_text(RECIPE, encoding="utf-8")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe, ``small.yaml``, and its text."""
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that a training leaves behind, the cache of its text and its recipe included."""
    directory = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        prepare(directory)
        assert main(["train", "small.yaml", "data.train=text.txt"]) == 0
    return directory


@pytest.fixture
def trained(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run in ``runs/small``."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs" / "small"


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``fails(*argv)``: the one line on stderr of a command that must exit with 2."""

    def run(*argv: str) -> str:
        assert main(list(argv)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    return run


@pytest.mark.parametrize(
    "command", ["train", "export", "generate", "eval", "spectrum", "report", "env", "memory", "chat", "recipes"]
)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"poetx {command}" in " ".join(capsys.readouterr().out.split("Example")[-1].split())


def test_version_and_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("poetx ")
    assert main(["env", "--measure"]) == 0
    out = capsys.readouterr().out
    link = Link.parse(out.split("--link ")[1].split()[0])
    assert link.bandwidth > 1e8
    assert link.flops > 1e8
    assert "torch " in out
    assert "device " in out


def test_train_tells_what_happened_and_what_to_do_next(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "small.yaml", "data.train=text.txt", "train.steps=4"]) == 0
    out = capsys.readouterr().out
    for expected in ("step 4/4", "tokens/s", "validation perplexity", "the model continues", "runs/small/export"):
        assert expected in out
    assert "poetx generate runs/small" in out
    assert (place / "runs" / "small" / "export" / "config.json").is_file()


def test_generate_eval_and_export(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "runs/small", "--prompt", "little", "--max-new-tokens", "5", "--seed", "3"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert first.startswith("little")
    assert main(arguments) == 0
    assert capsys.readouterr().out == first
    assert main(["eval", "runs/small"]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main(["export", "runs/small", "out/model"]) == 0
    capsys.readouterr()
    assert main(["eval", "out/model", "--data", "text.txt", "--seq-len", "4"]) == 0
    assert "windows of 4" in capsys.readouterr().out
    arguments[1] = "out/model"
    assert main(arguments) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize("error", [UserError("the model's output is not finite"), IndexError(3)])
def test_a_finished_run_without_a_sample_is_no_failure(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from poetx.runs import generate

    def fail(*args: object, **options: object) -> str:
        raise error

    monkeypatch.setattr(generate, "generate_text", fail)
    assert main(["train", "small.yaml", "data.train=text.txt", "train.steps=1"]) == 0
    out = capsys.readouterr().out
    assert f"no sample: {error if isinstance(error, UserError) else repr(error)}" in out
    words = re.search(r"poetx generate runs/small --prompt '(.*)'", out)
    assert words
    assert words[1] in (place / "text.txt").read_text()


@pytest.mark.parametrize(("rate", "code"), [("1e-3", 0), ("30", 3)])
def test_a_run_that_diverged_has_an_exit_code_of_its_own(
    rate: str, code: int, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data.train=text.txt", "train.steps=6", "optimizer.clip=null", f"optimizer.lr={rate}"]
    assert main(["train", "small.yaml", *words]) == code
    assert ("error: the run diverged: " in capsys.readouterr().err) == bool(code)
    assert (place / "runs/small/export/config.json").is_file()


def test_a_fault_of_ours_keeps_its_traceback_and_says_what_is_saved(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from poetx.train.progress import PlainReporter

    def step(self: PlainReporter, entry: dict) -> None:
        if entry["step"] in fails_at:
            raise ZeroDivisionError("ours")

    monkeypatch.setattr(PlainReporter, "step", step)
    fails_at = set()
    for at, said in ((1, "nothing saved yet"), (3, "lost: runs/small/checkpoints/step-00000002")):
        fails_at.clear()
        fails_at.add(at)
        assert main(["train", "small.yaml", "data.train=text.txt"]) == 1
        captured = capsys.readouterr()
        assert 'raise ZeroDivisionError("ours")' in captured.err
        assert said in captured.out
    assert "continue with: poetx train runs/small --resume" in captured.out


def test_a_run_goes_on_when_nobody_reads_what_it_says(place: Path) -> None:
    command = [sys.executable, "-m", "poetx", "train", "small.yaml", "data.train=text.txt"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None
        run.stdout.readline()
        run.stdout.close()  # as head does
        assert run.wait() == 0
    assert (place / "runs/small/export/config.json").is_file()


def test_a_run_goes_on_when_what_it_says_cannot_be_written(place: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    command = [sys.executable, "-m", "poetx", "train", "small.yaml", "data.train=text.txt"]
    with open("/dev/full", "w") as full:  # noqa: PTH123
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 0
    assert run.stderr.count("standard output cannot be written (No space left on device): training goes on") == 1
    assert (place / "runs/small/export/config.json").is_file()


@pytest.mark.parametrize("words", ["env", "recipes demo", "report runs/small", "--version"])
def test_what_cannot_be_written_is_said(words: str, trained: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:  # noqa: PTH123
        assert in_a_child(words, full) == (
            *(2, "error: standard output: could not be written (No space left on device); free some space\n"),
        )


def test_a_run_goes_on_where_the_shell_has_closed_its_streams(place: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m poetx train small.yaml data.train=text.txt train.export=false"
    assert subprocess.run(f"{command} <&- >&- 2>&-", shell=True).returncode == 0
    lines = (place / "runs/small/metrics.jsonl").read_text().splitlines()
    assert all(line.startswith('{"event"') for line in lines)


def in_a_child(words: str, stdout: IO[str]) -> tuple[int, str]:
    """Exit code and standard error of a command, run by a copy of this process, which has everything loaded."""
    with tempfile.TemporaryFile() as error:
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.dup2(stdout.fileno(), 1)
                os.dup2(error.fileno(), 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                code = main(words.split())
                sys.stderr.flush()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        error.seek(0)
        return code, error.read().decode()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "a/b"), "a/b: Permission denied; make the place readable and writ"),
        (IsADirectoryError(21, "Is a directory", "a/b"), "a/b: Is a directory; move what is there away, or choose"),
        (OSError(36, "File name too long", "a/b"), "a/b: File name too long; choose another place"),
        (OSError(24, "Too many open files"), "Too many open files; raise the limit on open files"),
        (MemoryError(), "out of memory (MemoryError); use a smaller train.micro_batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory (CUDA out of memory. Tried); use"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory ([enforce fail]"),
    ],
)
@pytest.mark.parametrize("command", ["report", "train"])
def test_an_error_of_the_system_has_a_remedy(
    command: str,
    error: Exception,
    message: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[..., str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("poetx.runs.report.write_report", fail)
    monkeypatch.setattr("poetx.train.run.train", fail)
    words = ["report", "runs/small"] if command == "report" else ["train", "small.yaml", "data.train=text.txt"]
    assert fails(*words).startswith(f"error: {message}")


def test_overwrite_empties_what_a_link_points_to(trained: Path) -> None:
    checkpoints, disk = Path("runs/small/checkpoints"), Path("disk")
    checkpoints.rename(disk)
    checkpoints.symlink_to(disk.absolute())
    assert main(["train", "runs/small", "--overwrite", "train.seed=4", "train.steps=1"]) == 0
    assert checkpoints.is_symlink()
    assert [path.name for path in disk.iterdir()] == ["step-00000001"]


def test_a_report_replaces_pages_only(trained: Path, fails: Callable[..., str]) -> None:
    for name in ("recipe.yaml", "metrics.jsonl", "checkpoints/step-00000003/model.safetensors"):
        before = (trained / name).read_bytes()
        assert "no HTML page" in fails("report", "runs/small", "-o", str(trained / name))
        assert (trained / name).read_bytes() == before
    for _ in range(2):
        assert main(["report", "runs/small", "-o", "page"]) == 0


def test_characters_that_the_terminal_lacks_are_replaced(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["generate", "runs/small", "--prompt", "日本", "--max-new-tokens", "2"]) == 0
    terminal.flush()
    assert terminal.buffer.getvalue()[:2] == b"??"  # type: ignore[attr-defined]


def test_resume_and_overwrite(trained: Path, fails: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--resume" in fails("train", "small.yaml", "data.train=text.txt")
    assert main(["train", "runs/small", "--resume"]) == 0
    assert "continuing from runs/small/checkpoints/step-00000003" in capsys.readouterr().out
    assert "train.steps (3 -> 5)" in fails("train", "runs/small", "train.steps=5", "--resume")
    assert main(["train", "small.yaml", "data.train=text.txt", "train.steps=1", "--overwrite"]) == 0
    assert [path.name for path in (trained / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_signal_ends_with_its_code_and_says_how_to_go_on(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from poetx.train.progress import PlainReporter

    original = PlainReporter.step

    def step(self: PlainReporter, entry: dict) -> None:
        original(self, entry)
        if entry["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(PlainReporter, "step", step)
    assert main(["train", "small.yaml", "data.train=text.txt"]) == 143
    out = capsys.readouterr().out
    assert "stopped by SIGTERM after step 1 of 3; saved runs/small/checkpoints/step-00000001" in out
    assert "continue with: poetx train runs/small --resume" in out
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert main(["train", "runs/small", "--resume"]) == 0


BAD = {
    "unknown key": (["poet.blok_size=4"], "poet.blok_size: unknown key; did you mean 'block_size'?"),
    "no text": (["data.train=nowhere.txt"], "nowhere.txt: no such file or directory"),
    "empty text": (["data.train=empty.txt"], "empty.txt: empty"),
    "no layer": (["poet.target_modules=[q_porj]"], "q_porj"),
    "block size 0": (["poet.block_size=0"], "poet.block_size=0"),
    "block size -8": (["poet.block_size=-8"], "poet.block_size=-8"),
    "float16": (["train.dtype=float16"], "use bfloat16"),
    "device": (["train.device=gpu"], "train.device=gpu"),
    "no such device": (["train.device=cuda:99"], "train.device=cuda:99"),
    "no window": (["data.seq_len=100000"], "fewer than one window"),
    "no tokenizer": (["data.tokenizer=/nowhere"], "data.tokenizer=/nowhere: no such file or directory"),
    "resume nothing": (["--resume"], "no checkpoints yet; train it"),
    "two ways at once": (["--resume", "--overwrite"], "exclude each other"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_in_train(place: Path, fails: Callable[..., str], case: str) -> None:
    (place / "empty.txt").write_text("")
    arguments, message = BAD[case]
    assert message in fails("train", "small.yaml", "data.train=text.txt", *arguments)
    assert not (place / "runs" / "small").exists()


def test_a_broken_checkpoint_is_passed_over_or_named(
    trained: Path, fails: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = sorted((trained / "checkpoints").iterdir())
    with (new / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    assert main(["generate", "runs/small", "--prompt", "x", "--max-new-tokens", "1"]) == 0
    assert "step-00000003/model.safetensors: 100 bytes instead of" in capsys.readouterr().err
    (old / "optimizer.safetensors").unlink()
    error = fails("train", "runs/small", "--resume")
    assert "no whole checkpoint in runs/small/checkpoints" in error
    assert "model.safetensors" in error


def test_mistakes_in_the_other_commands(trained: Path, fails: Callable[..., str]) -> None:
    assert "no such directory" in fails("generate", "runs/nothing", "--prompt", "x")
    assert "neither a run" in fails("eval", "runs")
    assert "has no validation text of its own" in fails("eval", "runs/small/export")
    assert "no such file" in fails("eval", "runs/small", "--data", "nowhere.txt")
    assert "not a run directory" in fails("export", "runs/small/export", "x")
    assert "exists and is not an empty directory" in fails("export", "runs/small", "runs")
    assert "no such recipe" in fails("train", "nothing.yaml")


def test_the_demo_finds_a_place_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from poetx.cli import train as cli
    from poetx.recipe import load_recipe

    monkeypatch.chdir(tmp_path)
    assert load_recipe().name == "demo-single-step"  # what `poetx train` runs
    recipe = load_recipe("demo")

    def place(resume: bool) -> str | None:
        return cli._place_demo(recipe, resume=resume).run_dir

    assert place(False) == place(True) == "runs/demo"
    (tmp_path / "runs/demo/checkpoints/step-00000100").mkdir(parents=True)
    assert place(False) == "runs/demo-2"
    assert place(True) == "runs/demo"
    (tmp_path / "runs/demo-2/checkpoints/step-00000100").mkdir(parents=True)
    assert place(False) == "runs/demo-3"
    assert place(True) == "runs/demo-2"
