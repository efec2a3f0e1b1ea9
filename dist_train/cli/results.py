"""`evaluate`, `predict` and `export`: for runs that have a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dist_train.cli.options import RunPath, end_rank, print_table

if TYPE_CHECKING:
    from dist_train.inference.evaluate_run import EvaluationResult

_MATRIX_UP_TO = 12  # classes; more fit on no screen
_checkpoint = click.option("--checkpoint", default="last", show_default=True, metavar="last|best|STEP")


@click.command()
@click.argument("run", type=RunPath())
@_checkpoint
@click.option("--split", default="test", show_default=True, type=click.Choice(["val", "test"]))
@click.option("--json", "as_json", is_flag=True, help="One line of JSON.")
def evaluate(run: Path, checkpoint: str, split: str, as_json: bool) -> None:
    """Print loss, accuracy and other metrics of a checkpoint, with every example counted once.

    On several processes: torchrun --standalone --nproc-per-node 2 -m dist_train evaluate RUN
    """
    from dist_train.inference.evaluate_run import evaluate_run

    found = evaluate_run(run, checkpoint, split)
    if found is not None:
        _print_json(found) if as_json else _print(found, f"{run}, checkpoint at step {found.step}, {split} split")
    end_rank()


def _print(found: EvaluationResult, what: str) -> None:
    from dist_train.models.tasks.confusion import accuracy_by_class
    from dist_train.runs.accuracy_text import IS_OWN

    click.echo(f"{what}: {found.metrics['seen']} examples")
    for name in sorted(found.metrics.keys() - {"seen", IS_OWN}):
        click.echo(f"{name} {found.metrics[name]:.6f}")
    if found.confusion is None:
        return
    counts = found.confusion.tolist()
    accuracies = ["-" if each is None else f"{each:.2%}" for each in accuracy_by_class(found.confusion)]
    click.echo()
    if len(counts) <= _MATRIX_UP_TO:
        cells = zip(found.classes, accuracies, counts, strict=True)
        rows = [[name, accuracy, *map(str, row)] for name, accuracy, row in cells]
        print_table(["class", "accuracy", *(f"as {name}" for name in found.classes)], rows)
    else:
        print_table(["class", "accuracy"], list(zip(found.classes, accuracies, strict=True)))


def _print_json(found: EvaluationResult) -> None:
    from dist_train.models.tasks.confusion import accuracy_by_class

    line: dict[str, Any] = {"step": found.step, **found.metrics}
    if found.confusion is not None:
        line |= {"classes": found.classes, "accuracy_by_class": accuracy_by_class(found.confusion)}
        line["confusion"] = found.confusion.tolist()
    click.echo(json.dumps(line))


@click.command()
@click.argument("run", type=RunPath())
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE...")
@_checkpoint
@click.option("--invert", is_flag=True, help="Invert the pictures: dark on bright, unlike MNIST.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON for each picture.")
def predict(run: Path, images: tuple[Path, ...], checkpoint: str, invert: bool, as_json: bool) -> None:
    """Show a run's net pictures: the three most probable classes or labels, or the numbers that it predicts.

    Reads PNG, JPEG and what else PIL reads.
    """
    from dist_train.inference.predict import predict as ask
    from dist_train.inference.trained_net import TrainedNet

    for found in ask(TrainedNet.open(run, checkpoint), images, invert=invert):
        if found.classes:
            pairs = list(zip(found.classes, found.values, strict=True))
            answer: dict[str, Any] = {"classes": dict(pairs)}
            texts = [f"{name} {value:.1%}" for name, value in pairs]
        else:
            answer, texts = {"numbers": found.values}, [f"{value:.4g}" for value in found.values]
        click.echo(
            json.dumps({"image": str(found.image), **answer}) if as_json else f"{found.image}: {', '.join(texts)}"
        )


@click.command()
@click.argument("run", type=RunPath())
@click.argument("out", type=click.Path(path_type=Path))
@_checkpoint
@click.option("--format", "form", type=click.Choice(["torch", "onnx"]), show_default="by the name OUT")
def export(run: Path, out: Path, checkpoint: str, form: str | None) -> None:
    """Write a run's net to a new folder OUT: its weights, and a program that needs only torch.

    With --format onnx, or a name that ends in .onnx, write an ONNX file. With a name that ends in .pth, write the
    weights alone, for torch.load and load_state_dict.
    """
    from dist_train.inference.export import export as write
    from dist_train.inference.export import export_weights
    from dist_train.inference.trained_net import TrainedNet

    if (form or out.suffix.removeprefix(".")) == "onnx":
        from dist_train.inference.onnx_file import export_onnx

        difference = export_onnx(TrainedNet.open(run, checkpoint), out)
        same = "not compared: no onnxruntime here" if difference is None else f"logits as torch's to {difference:.1e}"
        click.echo(f"written: {out} ({same})")
    elif out.suffix == ".pth":
        click.echo(f"written: {export_weights(run, checkpoint, out)}")
    else:
        for path in write(TrainedNet.open(run, checkpoint), out):
            click.echo(f"written: {path}")
