"""Invalid config files and command lines: exit code 2, one message, and nothing is started."""

from __future__ import annotations

import os
import random
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dist_train.training.run  # noqa: F401 - a later import would change the environment in the middle of a test
from dist_train.cli import main
from dist_train.config.loading import bundled_configs, load_config, to_yaml
from dist_train.config.schema import Config, section_of
from support.processes import DIST_TRAIN
from support.settings import put

TABLE = "damaged checkpoints and mutated input"
COLUMNS = ("fault", "cases", "outcome")

BUNDLED = {name: path.read_text() for name, path in bundled_configs().items()}
LONG = "x" * 300


@dataclass
class Shell:
    """Runs the command line in this process and its own folder. Trainings are recorded instead of started."""

    folder: Path
    started: list[str] = field(default_factory=list)
    written: bytes = b""

    def type(self, *argv: str) -> Result:
        self.started.clear()
        result = CliRunner().invoke(main, argv, prog_name="dist-train")
        error, what = result.exception, self._describe(argv)
        assert error is None or isinstance(error, SystemExit), f"{what}: a traceback: {type(error).__name__}: {error}"
        assert "Traceback" not in result.output, what
        # 1: the settings are valid, but no net or data set has that name.
        assert result.exit_code in (0, 1, 2), f"{what}: exit code {result.exit_code}: {result.output}"
        return result

    def is_refused(self, *argv: str, named: str) -> None:
        result, what = self.type(*argv), self._describe(argv)
        assert result.exit_code == 2, f"{what}: exit code {result.exit_code}, {result.output}"
        assert named in result.stderr, f"{what}: {named} is not in: {result.stderr}"
        assert result.stderr.lower().count("error: ") == 1, f"{what}: {result.stderr}"
        assert result.stdout == "", what
        assert (self.started, [path.name for path in self.folder.iterdir() if path.is_dir()]) == ([], []), what

    def _describe(self, argv: tuple[str, ...]) -> str:
        return f"{' '.join(argv)!a} with {self.written[:600]!r}"

    def write(self, content: str | bytes) -> str:
        self.written = content if isinstance(content, bytes) else content.encode()
        (self.folder / "mutated.yaml").write_bytes(self.written)
        return "mutated.yaml"


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    shell = Shell(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command line adds the current folder
    monkeypatch.setattr("dist_train.training.run.run_training", lambda *_: shell.started.append("training"))
    monkeypatch.setattr("dist_train.launch.jobs.start_ranks", lambda *_: shell.started.append("ranks"))
    return shell


# --- invalid values --------------------------------------------------------------------------------------------------


def leaves(section: type[Any] = Config, prefix: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        inner = section_of(info.annotation)
        yield from leaves(inner, f"{prefix}{name}.") if inner else [prefix + name]


NUMBERS = ["many", "-1", ".nan", ".inf", "-.inf", "[1, 2]", "{a: 1}", "yes", "2026-01-01", "12:30", "'1,5'", "5 apples"]
WORDS = ["nonsense", "7", "[cpu]", "{a: 1}", "1.5", "''"]
# kind: (settings, values that are invalid for all of them)
KINDS: dict[str, tuple[list[str], list[str]]] = {
    "integers": (
        ["seed", "global_batch_size", "per_device_batch_size", "keep_last", "keep_best", "data.val_examples",
         "data.num_workers", "data.image_size", "data.augment.shift", "data.augment.cutout", "early_stop.patience",
         "optimizer.lr_base_batch_size", "schedule.t_mult"],
        [*NUMBERS, "1.5", "1e-3"],
    ),
    "positive integers": (
        ["global_batch_size", "per_device_batch_size", "keep_last", "data.image_size", "early_stop.patience",
         "optimizer.lr_base_batch_size", "schedule.t_mult"],
        ["0", "-0", "0.0"],
    ),
    "integers with an upper bound": (
        ["seed", "global_batch_size", "per_device_batch_size", "data.num_workers"],
        [str(2**63), f"1{'0' * 40}", f"1{'0' * 4000}", "1e300"],
    ),
    "numbers": (
        ["optimizer.lr", "optimizer.weight_decay", "optimizer.eps", "max_grad_norm", "label_smoothing", "ema_decay",
         "stall_timeout_s", "setup_timeout_s", "schedule.final_ratio", "schedule.gamma", "schedule.power",
         "optimizer.layer_decay", "early_stop.min_delta", "tracking.timeout_s", "data.augment.brightness",
         "data.augment.contrast", "data.augment.saturation", "data.augment.mixup_alpha", "data.augment.cutmix_alpha"],
        [*NUMBERS, "1e-3x", "1/3", "1e999", f"1{'0' * 400}"],
    ),
    "positive numbers": (
        ["optimizer.lr", "optimizer.eps", "max_grad_norm", "ema_decay", "stall_timeout_s", "setup_timeout_s",
         "tracking.timeout_s", "schedule.gamma", "schedule.power", "optimizer.layer_decay"],
        ["0", "0.0", "1e-400"],
    ),
    "numbers below 1": (
        ["label_smoothing", "ema_decay", "schedule.final_ratio", "schedule.gamma"], ["1", "1.0", "3", "1e30"],
    ),
    "numbers of single optimizers": (
        ["optimizer.alpha", "optimizer.rho", "optimizer.momentum", "optimizer.dampening"],
        [value for value in NUMBERS if value != "-1"],
    ),
    "durations": (
        ["train_for", "eval_every", "log_every", "save_every", "keep_every", "schedule.warmup", "schedule.step_size",
         "schedule.t_0", "model.freeze_until"],
        ["5 weeks", "epochs", "-1 epochs", "1e3 steps", "0.5 steps", "3 epochs 2", "[5, epochs]", "{epochs: 5}",
         ".nan", ".inf", "yes", "1:30", "five epochs", "5 Epochs", "5 min", f"{'9' * 400} epochs", "5,5 epochs"],
    ),
    "durations in steps or epochs": (
        ["train_for", "eval_every", "log_every", "keep_every", "schedule.warmup", "schedule.step_size", "schedule.t_0",
         "model.freeze_until"],
        ["30 s", "1 sec", "0.5 seconds"],
    ),
    "enumerations": (
        ["mixed_precision", "dtype", "device", "step_mode", "preempt_signal", "optimizer.name", "optimizer.lr_scaling",
         "schedule.name", "tracking.wandb", "data.sampling", "data.augment.padding_mode", "data.tta", "data.decoder",
         "optimizer.no_decay", "task", "loss", "best_mode"],
        [*WORDS, "Nonsense", "yes"],
    ),
    "booleans": (
        ["final_train_eval", "ddp.find_unused_parameters", "ddp.sync_batchnorm", "tf32", "tracking.tensorboard",
         "tracking.pictures", "tracking.artifact", "data.augment.flip",
         "data.resident", "optimizer.nesterov", "optimizer.amsgrad", "optimizer.centered"],
        ["maybe", "2", "[yes]", "{a: 1}", "0.5", "ja", "''"],
    ),
    "steps to trace": (
        ["profile"],
        [*WORDS, "20", "20 steps", "20 epochs from 100", "0 steps from 1", "101 steps from 1", "-1 steps from 1",
         "1.5 steps from 1", "5 steps from -1", f"{'9' * 400} steps from 1", "yes", "[20, 100]"],
    ),
    "strings": (
        ["data.name", "data.split", "model.name", "tracking.project", "tracking.entity", "tracking.name",
         "tracking.group", "tracking.job_type"],
        ["5", "[a]", "{a: b}", "yes", "1.5", "2026-01-01"],
    ),
    "paths": (
        ["data.root", "data.val_root", "data.bundle", "data.val_bundle", "model.bundle", "model.weights",
         "data.sample_weights", "runs_dir"],
        ["5", "[a]", "{a: b}", "yes", '"a\\0b"'],
    ),
    "lists": (
        ["data.normalize.mean", "data.normalize.std", "tracking.tags", "optimizer.betas", "schedule.milestones",
         "data.augment.scale", "data.augment.ratio", "data.transforms", "model.freeze", "optimizer.groups",
         "class_weights"],
        ["words", "5", "{a: 1}", "[[1]]", "[{}]"],
    ),
    "names of metrics": (
        ["metrics"],
        ["f1", "[F1]", "[top1]", "[top]", "[top1000]", "[5]", "[mean]", "[[f1]]", "{f1: 1}"],
    ),
    "deciding metrics": (["best_by"], ["psnr", "val/", "''", "5", "[f1]", "{f1: max}"]),
    "labels": (["ignore_index"], ["words", "1.5", "[1]", "yes", "1e-3"]),
    "arguments": (
        ["data.args", "model.args", "optimizer.args"],
        ["words", "5", "[1]", "{1: 2}", "{a: .nan}", "{a: 2026-01-01}"],
    ),
    "sections": (
        ["data", "model", "optimizer", "schedule", "ddp", "tracking", "data.augment", "early_stop"],
        ["words", "5", "[1, 2]", "yes", "1.5", "[{}]", "{1: 2}", "{nonsense: 1}"],
    ),
    "settings that cannot be empty": (
        ["seed", "train_for", "global_batch_size", "per_device_batch_size", "dtype", "device", "step_mode",
         "label_smoothing", "log_every", "eval_every", "save_every", "keep_last", "keep_best", "keep_every",
         "stall_timeout_s", "setup_timeout_s", "preempt_signal", "final_train_eval", "data", "data.name",
         "data.val_examples", "data.sampling", "data.decoder", "data.num_workers", "data.args", "model", "model.name",
         "model.args", "optimizer", "optimizer.name", "optimizer.lr", "optimizer.args", "schedule", "schedule.name",
         "schedule.warmup", "ddp", "tracking"],
        ["", "~", "null"],
    ),
}  # fmt: skip


def test_every_setting_is_mutated() -> None:
    mutated = {key for keys, _ in KINDS.values() for key in keys}
    assert sorted(set(leaves()) - mutated) == []


def with_value(rng: random.Random, key: str, text: str) -> tuple[str, list[str]]:
    """Set `key` to this text in a bundled config. Return the file's content and further arguments."""
    base = BUNDLED[rng.choice(sorted(BUNDLED))]
    if rng.random() < 0.4:
        return base, rng.choice([["-o", f"{key}={text}"], [f"{key}={text}"]])
    tree = yaml.safe_load(base)
    put(tree, key, "HERE")
    return yaml.safe_dump(tree, sort_keys=False).replace("HERE", text), []


def random_start_options(rng: random.Random) -> list[str]:
    return rng.choice([[], ["--dry-run"], ["--nproc", "2"], ["-q"]])


@pytest.mark.parametrize("kind", KINDS)
def test_invalid_values_are_refused(
    kind: str, shell: Shell, count: Callable[[int], int], row: Callable[..., None]
) -> None:
    keys, values = KINDS[kind]
    cases = [(key, value) for key in keys for value in values]
    random.Random(kind).shuffle(cases)
    cases = cases[: count(len(cases))]
    for number, (key, value) in enumerate(cases):
        rng = random.Random(f"{kind} {number}")
        text, arguments = with_value(rng, key, value)
        shell.is_refused("train", "-c", shell.write(text), *arguments, *random_start_options(rng), named=key)
    row(f"invalid values: {kind}", len(cases), "exit code 2, setting named")


# --- unknown settings ------------------------------------------------------------------------------------------------

SECTIONS = ["", "data.", "model.", "optimizer.", "schedule.", "ddp.", "tracking.", "data.augment.", "early_stop."]


def legal_in(prefix: str) -> list[str]:
    section: Any = Config
    for part in prefix.split(".")[:-1]:
        section = section_of(section.model_fields[part].annotation)
    return list(section.model_fields)


def misspelled(rng: random.Random, word: str) -> str:
    at = rng.randrange(len(word) - 1)
    return rng.choice([
        word[:at] + word[at + 1 :],  # a letter is missing
        word[:at] + word[at] + word[at:],  # doubled
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],  # swapped with the next one
        word[:at] + rng.choice(string.ascii_lowercase) + word[at + 1 :],
        word.upper(), word.replace("_", "-"), word.replace("_", ""), word + "s", f"{word}_",
    ])  # fmt: skip


def test_unknown_and_misspelled_settings_are_refused(
    shell: Shell, count: Callable[[int], int], row: Callable[..., None]
) -> None:
    tried = 0
    for number in range(count(200)):
        rng = random.Random(f"unknown {number}")
        prefix = rng.choice(SECTIONS)
        legal = legal_in(prefix)
        word = rng.choice([
            misspelled(rng, rng.choice([name for name in legal if len(name) > 2])),
            "".join(rng.choices(string.ascii_letters + "_", k=rng.randrange(1, 12))),
            rng.choice(list(leaves())).rpartition(".")[2],  # a setting of another section
        ])  # fmt: skip
        if word in legal:
            continue
        text, arguments = with_value(rng, prefix + word, rng.choice(["1", "words", "[1]", "{a: 1}", "", "yes"]))
        shell.is_refused("train", "-c", shell.write(text), *arguments, named=f"Unknown setting {prefix}{word}.")
        tried += 1
    row("unknown and misspelled settings, settings of another section", tried, "exit code 2, setting named")


# --- invalid files ---------------------------------------------------------------------------------------------------

APPENDED_LINES = [
    "seed: [1", "seed: {a: 1", "seed: '1", 'seed: "1', "seed: 1: 2", "seed: @1", "seed: `1`", "seed: *nowhere",
    "seed: !!nonsense 1", "seed: !!python/object:os.system ls", "seed: &a [*a", "seed", "seed = 1", "   seed: 1",
    "\tseed: 1", "- seed: 1", "--- \nseed: 1", "%YAML 9.9", "]", "}", "seed: 1\n\tlr: 1", "seed: 'a'b", "? [a]\n: 1",
    "<<: 1", "seed: \0", "seed: \x07", "seed: \x1b[0m", "seed: 2026-13-45", "seed: !!int x", "seed: 0b_", "{{",
    "&a &b seed: 1", "seed: |x", "seed: >-9 a", "!<", "seed: " + "[" * 3000, "\ud800",
    f"seed: 1{'0' * 5000}", f"seed: 0x{'f' * 4000}",
]  # fmt: skip
WHOLE_FILES: list[str | bytes] = [
    "- 1\n- 2", "5", "words", "[]", "'quoted'", "1.5", "yes", "seed", "train", b"\xff\xfe\x00\x01",
    b"\x1f\x8b\x08\x00\x9f", b"\x89PNG\r\n\x1a\n", b"\x00" * 100, "train_for: 5 epochs\n".encode("utf-32"),
    "é".encode("latin-1"), b"\x7fELF\x02", b"PK\x03\x04\x14", b"%PDF-1.4\n%\xe2\xe3",
    "global_batch_size: 64\n" * 2, '{"seed": 1', "<config/>", "seed=1",
]  # fmt: skip


def test_files_that_are_not_configs_are_refused(
    shell: Shell, count: Callable[[int], int], row: Callable[..., None]
) -> None:
    contents = [text.encode() if isinstance(text, str) else text for text in WHOLE_FILES]
    for number, line in enumerate(APPENDED_LINES):
        base = BUNDLED[random.Random(number).choice(sorted(BUNDLED))]
        contents.append(f"{base}{line}\n".encode(errors="surrogatepass"))
    for number in range(60):  # a duplicated line of a config, or garbage in place of a part
        rng = random.Random(f"files {number}")
        content = BUNDLED[rng.choice(sorted(BUNDLED))].encode()
        lines = [line for line in content.splitlines(keepends=True) if not line.startswith((b"#", b" "))]
        if number % 2:
            contents.append(content + rng.choice([line for line in lines if not line.endswith(b":\n")]))
        else:
            at = rng.randrange(len(content))
            garbage = bytes(rng.choice([0, 0xC0, 0xFF, 0xFE, 0x80]) for _ in range(rng.randrange(1, 30)))
            contents.append(content[:at] + garbage + content[at + rng.randrange(30) :])
    random.Random("files").shuffle(contents)
    contents = contents[: count(len(contents))]
    for number, content in enumerate(contents):
        rng = random.Random(f"start {number}")
        shell.is_refused("train", "-c", shell.write(content), *random_start_options(rng), named="mutated.yaml ")
    row(
        "files that are not configs: syntax errors, tabs, duplicate keys, garbage",
        len(contents),
        "exit code 2, file named",
    )


# --- command lines ---------------------------------------------------------------------------------------------------

FLAGS = sorted(
    {flag for option in main.commands["train"].params for flag in option.opts if isinstance(option, click.Option)}
)
COMMAND_LINES: list[tuple[list[str], str]] = [
    (["train"], "No config."),
    (["train", "smoke"], "No config. Did you mean -c smoke?"),
    (["trian", "-c", "smoke"], "No such command 'trian'"),
    (["train", "-c"], "'-c'"),
    (["train", "-c", "smoke", "-o"], "'-o'"),
    (["train", "-c", "smoke", "--run-name"], "'--run-name'"),
    (["train", "-c", "smoke", "train"], '"train" is not a setting'),
    *(
        (["train", "-c", name], "No config file")
        for name in ("smok", "smoke.yml", "nowhere.yaml", "a/b/c.yaml", ".", "/", "", "~", LONG, "/dev/null/x", "-")
    ),
    *(
        (["train", "-c", "smoke", "-o", override], f'"{override}" is not a setting')
        for override in ("lr", "", "=", "=3", "optimizer..lr=3", ".lr=3", "optimizer.=3", " =1", "lr:1", "--lr", "seed")
    ),
    *(
        (["train", "-c", "smoke", override], f'"{override}" is not YAML')
        for override in ("seed=[", "seed={", "seed='", "seed=!!bool x", "seed=@", "seed=a: b: c", "seed=*a", "seed=%")
    ),
    *(
        (["train", "-c", "smoke", flag, value], f"'{flag}'")
        for flag, values in (
            ("--nproc", ("0", "-1", "two", "1.5", "", "1e3", "nan", "0x2")),
            ("--simulate-world-size", ("0", "-1", "4097", "two", "")),
        )
        for value in values
    ),
    *(
        (["train", "-c", "smoke", "--nproc", number], f"global_batch_size=96 is not a multiple of world_size={number}")
        for number in ("5", "7", "97", "9" * 20)
    ),
    *(
        (["train", "--resume", folder], "has no config.yaml, so it is not a run")
        for folder in ("nowhere", ".", "/", "/dev/null", LONG, "Never", "")
    ),
    (["train", "-c", "smoke", "--resume", "somewhere", "--run-name", "r"], "--run-name=r"),
    (["train", "-c", "smoke", "--dry-run=yes"], "--dry-run"),
    (["launch", "-c", "smoke"], "'--nproc'"),
    (["launch", "-c", "smoke", "--nproc", "2", "--nnodes", "2"], "--nnodes=2 needs --rdzv-endpoint"),
    (["launch", "-c", "smoke", "--nproc", "2", "--max-restarts", "-1"], "'--max-restarts'"),
    *(
        (["launch", "-c", "smoke", "--nproc", "2", "--run-name", "r", "--rdzv-endpoint=localhost", f"--nnodes={nodes}"],
         f"--nnodes={nodes} is not a number of machines")
        for nodes in ("0", "x", "2:1", "1:", ":2", "1:2:3", "-1", "1.5", "")
    ),
]  # fmt: skip


def test_invalid_command_lines_are_refused(shell: Shell, count: Callable[[int], int], row: Callable[..., None]) -> None:
    lines = [*COMMAND_LINES]
    for number in range(40):
        rng = random.Random(f"flag {number}")
        flag = misspelled(rng, rng.choice([flag for flag in FLAGS if flag.startswith("--")]).removeprefix("--"))
        if f"--{flag}" not in FLAGS and flag.strip("-"):
            lines.append((["train", "-c", "smoke", f"--{flag}", *rng.choice([[], ["1"]])], f"--{flag}"))
    random.Random("lines").shuffle(lines)
    lines = lines[: count(len(lines))]
    for argv, named in lines:
        shell.is_refused(*argv, named=named)
    row("invalid command lines", len(lines), "exit code 2, option or setting named")


# --- random input ----------------------------------------------------------------------------------------------------

odd_text = st.sampled_from([
    "\t", "\n", ": ", "- ", "[", "]", "{", "}", "'", '"', "#", "&a ", "*a", "!!", "| ", "> ", "%", "@", "`", "? ",
    "<<: ", "\r", "\u2028", "\ufeff", "\x00", "\x85", ".nan", "-1", "0", "1e999", "~", "yes", "null", "seed: 1\n",
    "---\n", "...\n",
]) | st.text(max_size=4)  # fmt: skip
edits = st.lists(
    st.tuples(st.sampled_from(["insert", "replace", "line"]), st.floats(0, 1, exclude_max=True), odd_text),
    min_size=1, max_size=4,
)  # fmt: skip
sensible = st.sampled_from([
    ["-q"], ["-v"], ["--nproc", "2"], ["-o", "seed=1"], ["--run-name", "r"], ["--resume", "auto"], ["--resume=never"],
    ["--fast-dev-run"], ["optimizer.lr=0.1"], ["--simulate-world-size", "3"], ["--init-from", "r"], ["--nproc=3"],
])  # fmt: skip
odd = (
    st.sampled_from([*FLAGS, "2", "auto", "never", "--", "-", "=", "mutated.yaml", "-c", "-o"])
    | st.tuples(st.sampled_from([*leaves(), *SECTIONS, "a"]), odd_text).map("=".join)
    | st.text(max_size=6)
).map(lambda text: [text.replace("\0", "")])  # an argument cannot contain NUL
arguments = st.lists(sensible | sensible | odd, max_size=5).map(
    lambda groups: [text for part in groups for text in part]
)
configs = st.sampled_from([["-c", "smoke"], ["-c", "smoke"], ["-c", "mutated.yaml"], []])


def edited(text: str, changes: list[tuple[str, float, str]]) -> bytes:
    for kind, where, new in changes:
        at = int(where * len(text))
        if kind == "line":  # move a line
            lines = text.splitlines(keepends=True)
            moved = lines.pop(int(where * len(lines))) if lines else ""
            lines.insert(len(new) * 3 % (len(lines) + 1), moved)
            text = "".join(lines)
        else:
            text = text[:at] + new + text[at + (len(new) if kind == "replace" else 0) :]
    return text.encode(errors="surrogatepass")


def anything(how_many: int) -> Callable[..., Any]:
    # The examples are the same each time, and fewer are a part of them: conftest.py sets derandomize.
    return settings(max_examples=how_many, suppress_health_check=list(HealthCheck))


def test_edited_config_is_valid_or_refused(shell: Shell, count: Callable[[int], int], row: Callable[..., None]) -> None:
    codes = []

    @anything(count(400))
    @given(st.sampled_from(sorted(BUNDLED)), edits)
    def check(name: str, changes: list[tuple[str, float, str]]) -> None:
        path = shell.write(edited(BUNDLED[name], changes))
        found = shell.type("train", "-c", path, "--dry-run")
        codes.append(found.exit_code)
        if found.exit_code:
            assert found.stderr.startswith("error: ")
        else:
            assert found.stdout.startswith(to_yaml(load_config(path)))
        assert shell.started == []

    check()
    row(
        "configs with 1 to 4 random edits",
        len(codes),
        f"{codes.count(0)} still valid, {len(codes) - codes.count(0)} refused",
    )


def test_random_command_line_is_valid_or_refused(
    shell: Shell, count: Callable[[int], int], row: Callable[..., None]
) -> None:
    shell.write("seed: 3\n")
    codes = []

    @anything(count(400))
    @given(configs, arguments)
    def check(config: list[str], argv: list[str]) -> None:
        found = shell.type("train", "--dry-run", *config, *argv)
        codes.append(found.exit_code)
        assert found.exit_code == 0 or found.stderr.lower().count("error: ") == 1
        assert shell.started == []

    check()
    row("random command lines", len(codes), f"{codes.count(0)} valid, {len(codes) - codes.count(0)} refused")


# --- in separate processes -------------------------------------------------------------------------------------------


def test_invalid_input_in_separate_processes(
    tmp_path: Path, count: Callable[[int], int], row: Callable[..., None]
) -> None:
    (tmp_path / "garbage.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "tabs.yaml").write_text("optimizer:\n\tlr: 1\n")
    lines = [
        (["-c", "smoke", "-o", "optimizer.lr=fast"], "error: optimizer.lr=fast: input should be a valid number"),
        (["-c", "garbage.yaml", "--nproc", "2"], "error: garbage.yaml cannot be read: 'utf-8' codec can't decode"),
        (["-c", "tabs.yaml"], "error: tabs.yaml is not YAML: "),
        (["-c", "smoke", os.fsdecode(b"seed=\xff")], 'error: The value of "seed=?" is not YAML'),
        (["-c", "smoke", "--nprocs", "2"], "Error: No such option '--nprocs'"),
    ]
    lines = lines[: count(len(lines))]
    for argv, message in lines:
        done = subprocess.run([*DIST_TRAIN, "train", *argv], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, ""), argv
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "runs").exists()
    row("some of these in separate processes", len(lines), "exit code 2, one message, no run directory")
