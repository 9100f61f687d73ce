"""Networks and data of `run.py`: a dense start, training batches, a validation split and test images.

Classification is here, the other tasks are in `other_tasks.py`.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import datasets, transforms

import slrc
from slrc.load_workload import load_workload
from slrc.machine.cache import cache_folder

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import cifar10
import digits
import fashion_mnist
import imagenette

CIFAR_SCRATCH_EPOCHS = 10
"""Of a dense start on CIFAR-10 without weights: a third of what the example takes."""
CACHE = cache_folder()
OTHERS = ("camvid", "coco", "scenes")
"""Data of tasks that are not classification."""
Images = Iterable[tuple[Tensor, Tensor]]
"""Batches `(x, y)` that can be read again and again."""


@dataclass(frozen=True)
class Task:
    """What a row trains and measures on.

    `validation` is a part of the training images that no training sees; `test` only ever reports.
    """

    make: Callable[[], nn.Module]
    """Returns the dense start, the same each time."""
    example: tuple[Tensor, ...]
    """The inputs of one call."""
    batches: Iterable[Any]
    validation: Any
    test: Any
    bfloat16: bool = False
    """Whether training computes in bfloat16, by autocast, with channels last."""
    peak_lr: float | None = None
    """The highest learning rate of all methods, where what suits Fashion-MNIST is none for this task's loss."""
    metric: str = "accuracy"
    evaluate: Callable[[nn.Module, Any], float] | None = None
    """What is measured of a network on a split, in percent; by itself the share of the images that it gets right."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """Of the workload, such as its loss."""

    def measure(self, model: nn.Module, split: Any) -> float:
        """Return the metric on `validation` or `test`, in percent."""
        training = model.training
        model.eval()
        with torch.no_grad():
            found = (self.evaluate or share_right)(model, split)
        model.train(training)
        return round(found, 3)

    def workload(self, model: nn.Module, *, watched: bool = False) -> slrc.Workload:
        """Return the workload of a network on this task; `watched`, it is measured after each epoch."""
        evaluate = (lambda m: {self.metric: self.measure(m, self.validation)}) if watched else None
        return slrc.Workload(model, self.example, self.batches, evaluate=evaluate, **self.others)


def share_right(model: nn.Module, images: Images) -> float:
    """Return the share of images whose greatest output is their label's, in percent."""
    device, right, seen = next(model.parameters()).device, 0, 0
    for x, y in images:
        right += int((model(x.to(device)).argmax(1).cpu() == y).sum())
        seen += len(y)
    return 100 * right / seen


@lru_cache(maxsize=1)
def load_task(network: str) -> Task:
    """Return the task of a network, such as `fashion-resnet`, `cifar-resnet20` or `images-torchvision:resnet50`."""
    data, name = network.split("-", 1)
    if data in OTHERS:
        import other_tasks

        return other_tasks.make_task(data, name)
    makers = {
        "digits": digits_task,
        "fashion": fashion_task,
        "cifar": cifar_task,
        "imagenette": imagenette_task,
        "images": images_task,
    }
    return makers[data](name)


@dataclass(frozen=True)
class Normalized:
    """Images kept as bytes, normalised batch by batch."""

    pixels: Tensor
    labels: Tensor
    normalize: Callable[[Tensor], Tensor]
    batch_size: int = 500

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(self.pixels.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            yield self.normalize(x), y


def start_of(network: Callable[[], nn.Module], name: str, train: Callable[[nn.Module], None]) -> nn.Module:
    """Return a network with dense weights, trained once and cached."""
    torch.manual_seed(0)
    return slrc.cached_weights(network(), CACHE / f"convergence-{name}.safetensors", train)


def digits_task(name: str) -> Task:
    """scikit-learn's digits, always at hand: a small network that is trained in a second."""
    train, test = digits.data()
    x, y = train.tensors
    batches = DataLoader(TensorDataset(x[200:], y[200:]), 32, shuffle=True, drop_last=True)
    images = Normalized(*test.tensors, lambda x: x)
    return Task(
        make=lambda: start_of(
            lambda: digits.DigitsNet(width=8), f"digits-{name}", lambda m: digits.train_dense(m, batches)
        ),
        example=(x[:1],),
        batches=batches,
        validation=Normalized(x[:200], y[:200], lambda x: x),
        test=images,
    )


def fashion_task(name: str) -> Task:
    """Fashion-MNIST: 10,000 training images and 5,000 for validation; dense networks train for 40 epochs."""
    train, epochs = 10_000, 40
    pixels, labels = fashion_mnist.load_images("train")
    batches = fashion_mnist.Batches(pixels[:train], labels[:train])
    test = Normalized(*fashion_mnist.load_images("test"), fashion_mnist.normalize)

    def make() -> nn.Module:
        cached = f"fashion-{name}-{train}-{epochs}epochs"
        return start_of(fashion_mnist.NETWORKS[name], cached, lambda m: fashion_mnist.train_dense(m, batches, epochs))

    return Task(
        make=make,
        example=(fashion_mnist.normalize(test.pixels[:1]),),
        batches=batches,
        validation=Normalized(pixels[-5_000:], labels[-5_000:], fashion_mnist.normalize),
        test=test,
    )


def cifar_task(name: str) -> Task:
    """CIFAR-10. A name that ends in `@random` starts without training.

    Else the dense start comes from `$SLRC_DATA/weights/cifar10_NAME.safetensors` where there is one, and then has seen
    the validation images.
    """
    name, _, start = name.partition("@")
    data, variant = cifar10.find_data()
    weights = data.parent / "weights" / f"cifar10_{name}.safetensors"
    adapts = weights.exists()
    epochs, lr = CIFAR_SCRATCH_EPOCHS, cifar10.SCRATCH_LR.get(name, cifar10.USUAL_LR)
    if adapts:
        epochs, lr = cifar10.ADAPT_EPOCHS, cifar10.ADAPT_LR

    def make(batches: cifar10.Batches) -> nn.Module:
        def train(model: nn.Module) -> None:
            if adapts:
                load_model(model, str(weights))
            cifar10.train_dense(model, batches, lr, epochs, name)

        if start == "random":
            return cifar10.NETWORKS[name]()
        return start_of(cifar10.NETWORKS[name], f"cifar-{variant}-{name}-{epochs}epochs", train)

    return validated_task(make, cifar10.load_images("train"), cifar10.load_images("test"), cifar10.normalize)


def imagenette_task(name: str) -> Task:
    """Imagenette at 96×96 pixels."""
    epochs = imagenette.usual_epochs()

    def make(batches: cifar10.Batches) -> nn.Module:
        cached = f"imagenette-{name}-{epochs}epochs"
        return start_of(imagenette.NETWORKS[name], cached, lambda m: imagenette.train_dense(m, batches, epochs))

    return validated_task(make, imagenette.load_images("train"), imagenette.load_images("val"), imagenette.normalize)


def validated_task(
    make: Callable[[cifar10.Batches], nn.Module],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    normalize: Callable[[Tensor], Tensor],
) -> Task:
    """Return a task on pixels and labels; every tenth training image is for validation. `make` gets the others."""
    pixels, labels = train
    held = torch.arange(len(labels)) % 10 == 9
    batches = cifar10.Batches(pixels[~held], labels[~held], scale=normalize)
    images = Normalized(*test, normalize)
    return Task(
        make=lambda: make(batches),
        example=(normalize(images.pixels[:1]).contiguous(),),
        batches=batches,
        validation=Normalized(pixels[held], labels[held], normalize),
        test=images,
        bfloat16=cifar10.has_bfloat16(),
    )


def images_task(name: str) -> Task:
    """A network of `torchvision:NAME` or `timm:NAME`, pretrained unless it ends in `@random`, on folders of images.

    `$SLRC_IMAGES` holds `train` and `val`, with a folder for every class in the order of the network's outputs; every
    50th training image is for validation.
    """
    workload = load_workload(name)
    example = workload.example_inputs[0][:1]
    side = example.shape[-1]
    scale = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    still = transforms.Compose([transforms.Resize(side * 8 // 7), transforms.CenterCrop(side), *scale])
    moved = transforms.Compose([transforms.RandomResizedCrop(side), transforms.RandomHorizontalFlip(), *scale])

    def loader(split: str, transform: Any, keep: Callable[[int], bool], *, shuffle: bool = False) -> DataLoader[Any]:
        folder = datasets.ImageFolder(str(Path(os.environ["SLRC_IMAGES"]) / split), transform)
        kept = [i for i in range(len(folder)) if keep(i)]
        return DataLoader(Subset(folder, kept), 64, shuffle=shuffle, num_workers=2, drop_last=shuffle)

    return Task(
        make=lambda: copy.deepcopy(workload.model),
        example=(example,),
        batches=loader("train", moved, lambda i: i % 50 != 49, shuffle=True),
        validation=loader("train", still, lambda i: i % 50 == 49),
        test=loader("val", still, lambda i: True),
        bfloat16=cifar10.has_bfloat16(),
    )
