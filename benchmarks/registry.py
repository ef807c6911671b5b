"""Every record in `results/`, and the commands that make it again."""

from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"


class Record(NamedTuple):
    """A file of measurements."""

    name: str  # of `results/NAME.jsonl`, `.md` and, where there is one, `.png`
    title: str
    page: str  # of `docs/`, where its numbers are spoken of
    commands: tuple[str, ...]  # scripts of this folder with their options; data folder and output are added
    folder: bool = True  # whether it reads `--data-dir`

    def lines(self, data_dir: str, out: str) -> list[list[str]]:
        """Arguments of each command."""
        added = [*(["--data-dir", data_dir] if self.folder else []), "--json", out]
        return [[*command.split(), *added] for command in self.commands]


SHORT = "--batch-size 128 --learning-rate 0.05 --decay cosine"
VGG = f"pai.py --dataset cifar10 --network vgg-slim --image-size 16 --examples 16000 --epochs 3 {SHORT}"
RESNET = "pai.py --dataset cifar10 --network resnet20 --masks-only"

RECORDS = (
    Record(
        "one_shot_mlpnet",
        "One-shot, MLPNet on MNIST",
        "one_shot",
        ("one_shot.py --network mlpnet --seeds 0,1,2,3,4",),
    ),
    Record(
        "one_shot_resnet20",
        "One-shot, ResNet-20 on CIFAR-10",
        "one_shot",
        (
            "one_shot.py --network resnet20 --seeds 0,1,2"
            " --methods magnitude diagonal woodfisher woodfisher-staged joint joint-staged",
        ),
    ),
    Record(
        "limited_data", "One-shot with few examples and without labels", "one_shot", ("limited_data.py --seeds 0,1,2",)
    ),
    Record(
        "gradual_lenet",
        "Gradual, LeNet-300-100 on MNIST",
        "gradual",
        ("gradual.py --dataset mnist --seeds 0,1,2",),
    ),
    Record("gradual_resnet20", "Gradual, ResNet-20 on CIFAR-10", "gradual", ("gradual.py --dataset cifar10",)),
    Record(
        "transform_overhead", "A training step with `prune_transform`", "gradual", ("transform_overhead.py",), False
    ),
    Record(
        "pai_lenet",
        "At initialization, LeNet-300-100 on MNIST",
        "at_init",
        (
            f"pai.py --dataset mnist --network lenet-300-100 --epochs 5 {SHORT} --warm-up off --dense"
            " --criterion random magnitude snip grasp synflow fisher-pruner hutchinson-diagonal hessian-pruner"
            " --seeds 0,1,2",
        ),
    ),
    Record(
        "pai_vgg_slim",
        "At initialization, slim VGG on CIFAR-10",
        "at_init",
        (
            f"{VGG} --dense --criterion random synflow hutchinson-diagonal snip magnitude hessian-pruner --seeds 0,1,2",
            f"{VGG} --shuffled --criterion hutchinson-diagonal synflow snip --sparsity 0.98 --seeds 0,1,2",
            f"{VGG} --masks-only --warm-up both",
        ),
    ),
    Record(
        "pai_resnet20",
        "At initialization, masks of ResNet-20",
        "at_init",
        (
            f"{RESNET} --warm-up off",
            f"{RESNET} --warm-up on --criterion random magnitude snip synflow hutchinson-diagonal hessian-pruner grasp"
            " fisher-pruner",
        ),
    ),
    Record(
        "pai_vit_nano",
        "At initialization, a small ViT on CIFAR-10",
        "at_init",
        (
            f"pai.py --dataset cifar10 --network vit-nano --image-size 16 --examples 8000 --epochs 4 {SHORT} --dense"
            " --warm-up off --criterion random magnitude snip hutchinson-diagonal --sparsity 0.9 0.98",
        ),
    ),
    Record("diagonals", "Diagonals of the Hessian", "at_init", ("diagonals.py --quick",), False),
    Record(
        "at_init_cost",
        "Cost of scores at initialization",
        "at_init",
        ("at_init_cost.py --criterion snip synflow fisher-diagonal grasp hessian-diagonal",),
        False,
    ),
    Record("structured", "Structured, ResNet-20 on CIFAR-10, and a zoo", "structured", ("structured.py",)),
    Record(
        "inverse_quality",
        "Every curvature against the Hessian",
        "inverse_quality",
        ("inverse_quality.py --seeds 0,1,2",),
        False,
    ),
    Record("engines", "Curvature engines and their floors", "curvature", ("engines.py",)),
    Record("scale", "Many devices", "scale", ("scale.py",), False),
    Record("robustness", "Bad arguments", "robustness", ("robustness.py --quick",), False),
    Record("language_model", "Layer by layer, a language model", "language_models", ("language_model.py",), False),
)
BY_NAME = {record.name: record for record in RECORDS}
