"""Imagenette (ten classes of ImageNet) at 96×96 pixels: MobileNetV2, fine-tuned from ImageNet's weights.

    export SLRC_DATA=~/data
    slrc compile examples/imagenette.py --pattern block:8x1 --sparsity 0.75 --epochs 6 --out build/mobilenet

`SLRC_DATA` names a folder with `imagenette2-160/` as https://github.com/fastai/imagenette packs it, or with
`imagenette96_train.npz` and `imagenette96_val.npz`, packs of JPEG files. The dense network is trained once and cached;
it starts from `$SLRC_DATA/weights/imagenet_mobilenet_v2.safetensors` if there is one: TensorFlow's MobileNetV2 with
batch norm folded, `00.weight` to `52.bias` in the network's order. Also read from the environment:

- `SLRC_CACHE`: where decoded images and dense networks are kept; `~/.cache/slrc` unless given.
- `SLRC_DENSE_EPOCHS`: epochs of dense training; 4 from a weights file and 30 from scratch unless given.
"""

import io
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import cifar10
import numpy as np
import torch
from cifar10 import ADAPT_EPOCHS, SCRATCH_EPOCHS, USUAL_LR, Batches, accuracy
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import datasets, models

import slrc
from slrc.errors import WorkloadError
from slrc.machine.cache import cache_folder

FOLDER = "imagenette2-160"
PACK = "imagenette96_{}.npz"
CLASSES = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
"""ImageNet's numbers of the ten classes, in the order of the folders' names."""
SIDE = 96
CALIBRATION_BATCHES = 8
FILTER_NORM, LEAST_NORM = 4.0, 1e-3
FINE_TUNING_LR = 0.01


def mobilenet_v2(width: float = 1.0) -> nn.Module:
    """Return torchvision's MobileNetV2 with ten outputs, padded at stride 2 as TensorFlow pads: right and below.

    Args:
        width: by what all numbers of channels are multiplied.
    """
    model = models.MobileNetV2(num_classes=len(CLASSES), width_mult=width)
    for layer in list(model.modules()):
        if isinstance(layer, nn.Sequential) and isinstance(conv := layer[0], nn.Conv2d) and conv.stride == (2, 2):
            conv.padding = (0, 0)
            layer[0] = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv)
    return model


NETWORKS = {"mobilenet_v2": mobilenet_v2}


def load_folded(model: nn.Module, file: Path, batches: Batches) -> None:
    """Load weights with batch norm folded into them, and set the model's own batch norm so that it changes nothing.

    Its statistics are those of some training batches. Filters are scaled to one norm, which it undoes: some are so
    small once folded that usual steps of training would be far too large for them.
    """
    weights = load_file(file)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    kept = [number + 1 for number in CLASSES]  # TensorFlow's first class is the background
    with torch.no_grad():
        model.classifier[1].weight.copy_(weights[f"{len(convs):02}.weight"][kept].flatten(1))
        model.classifier[1].bias.copy_(weights[f"{len(convs):02}.bias"][kept])
        for i, (conv, norm) in enumerate(zip(convs, norms, strict=True)):
            conv.weight.copy_(weights[f"{i:02}.weight"])
            norm.bias.copy_(weights[f"{i:02}.bias"])
            norm.weight.fill_((1 + norm.eps) ** 0.5)  # undoes a variance of 1
        seen: dict[nn.Module, list[Tensor]] = {norm: [] for norm in norms}
        hooks = [norm.register_forward_pre_hook(lambda norm, x: seen[norm].append(moments(x[0]))) for norm in norms]
        model.eval()
        for x, _ in itertools.islice(batches, CALIBRATION_BATCHES):
            model(x)
        for hook in hooks:
            hook.remove()
        for conv, norm in zip(convs, norms, strict=True):
            mean, square = torch.stack(seen[norm]).mean(0)
            size = conv.weight.flatten(1).norm(dim=1).clamp_min(LEAST_NORM) / FILTER_NORM
            conv.weight.div_(size[:, None, None, None])
            norm.running_mean.copy_(mean / size)
            norm.running_var.copy_((square - mean**2).clamp_min(0) / size**2)
            norm.weight.copy_((norm.running_var + norm.eps).sqrt() * size)
            norm.bias.add_(mean)


def moments(x: Tensor) -> Tensor:
    """Return the means of each channel of `(n, c, h, w)` and of its square: `(2, c)`."""
    return torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])


def normalize(pixels: Tensor) -> Tensor:
    """Turn uint8 `(n, h, w, 3)` into float32 `(n, 3, h, w)` between -1 and 1, channels last in memory."""
    return (pixels / 127.5 - 1).permute(0, 3, 1, 2)


def load_images(split: str) -> tuple[Tensor, Tensor]:
    """Return the images of `train` or `val`, decoded once: uint8 `(n, 96, 96, 3)` and int64 labels `(n,)` from 0 to 9.

    Raises:
        WorkloadError: there are none.
    """
    cached = cache_folder() / f"imagenette{SIDE}-{find_data().name.partition('_')[0]}-{split}.npz"
    if not cached.exists():
        pairs = list(read_images(find_data(), split))
        cached.parent.mkdir(parents=True, exist_ok=True)
        aside = cached.with_name(f"{cached.stem}.{os.getpid()}.npz")
        np.savez(aside, pixels=np.stack([pixels for pixels, _ in pairs]), labels=np.array([y for _, y in pairs]))
        aside.replace(cached)
    with np.load(cached) as pack:
        return torch.from_numpy(pack["pixels"]), torch.from_numpy(pack["labels"].astype(np.int64))


def find_data() -> Path:
    """Return the folder of images, or the pack of the training images.

    Raises:
        WorkloadError: there is neither.
    """
    folder = os.environ.get("SLRC_DATA")
    for name in (FOLDER, PACK.format("train")):
        if folder and (found := Path(folder).expanduser() / name).exists():
            return found
    raise WorkloadError(
        f"no Imagenette in `SLRC_DATA={folder}`: expected `{FOLDER}` there"
        if folder
        else "no Imagenette: `SLRC_DATA` is not set",
        hint=f"download {FOLDER}.tgz from https://github.com/fastai/imagenette and unpack it; then set SLRC_DATA to "
        f"the folder that holds `{FOLDER}`",
    )


def read_images(data: Path, split: str) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the images of a split, uint8 `(96, 96, 3)`, cut to a square, and their classes from 0 to 9."""
    if data.is_dir():
        files = datasets.ImageFolder(str(data / split)).samples
        yield from ((square(Image.open(file)), label) for file, label in files)
    else:
        pack = np.load(data.with_name(PACK.format(split)))
        parts, bounds = pack["data"], itertools.pairwise(pack["offset"])
        for (start, end), label in zip(bounds, pack["label"], strict=True):
            yield square(Image.open(io.BytesIO(parts[start:end].tobytes()))), CLASSES.index(label)


def square(image: Image.Image) -> np.ndarray:
    """Return the pixels of an image's largest centred square, scaled to 96×96."""
    return np.asarray(ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.BILINEAR))


def weights_file() -> Path:
    """Return where ImageNet's weights are looked for."""
    return find_data().parent / "weights" / "imagenet_mobilenet_v2.safetensors"


def train_dense(model: nn.Module, batches: Batches, epochs: int) -> None:
    """Train in place, from ImageNet's weights where they are found."""
    adapts = weights_file().exists()
    if adapts:
        load_folded(model, weights_file(), batches)
    cifar10.train_dense(model, batches, FINE_TUNING_LR if adapts else USUAL_LR, epochs, "mobilenet_v2")


def usual_epochs() -> int:
    """Return for how many epochs the dense network is trained unless somebody says otherwise."""
    return ADAPT_EPOCHS if weights_file().exists() else SCRATCH_EPOCHS


def workload() -> slrc.Workload:
    """Return MobileNetV2's workload, its dense weights trained or taken from the cache."""
    batches, test = Batches(*load_images("train"), scale=normalize), load_images("val")
    epochs = int(os.environ.get("SLRC_DENSE_EPOCHS", usual_epochs()))
    dense = cache_folder() / f"imagenette{SIDE}-mobilenet_v2-{epochs}epochs.safetensors"
    with torch.random.fork_rng():  # what compile draws must not depend on whether the cache was filled
        torch.manual_seed(0)
        model = slrc.cached_weights(mobilenet_v2(), dense, lambda m: train_dense(m, batches, epochs))
    return slrc.Workload(
        model=model,
        example_inputs=(normalize(test[0][:1]).contiguous(),),
        train_batches=batches,
        evaluate=lambda model: {"accuracy": accuracy(model, *test, scale=normalize)},
        name="imagenette-mobilenet_v2",
    )
