"""Which networks there are, how each is built, and which inputs it takes."""

import contextlib
import importlib
import inspect
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.survey.rows import one_line
from fused_resnet.system.environment import installed

PACKAGES = ("torchvision", "timm", "transformers")
BATCH = 4
SIZES = (32, 64, 96, 128, 160, 224)
FRAMES = 16
# the fewest models of a timm file, where it has so many
FEWEST = 3
PREFIXES = "(?:tf_|test_|legacy_|gluon_)?"  # of a timm family
# the words by which timm tells sizes; a name with none of them is between small and base
SMALL_TO_LARGE = (
    "test atto femto pico nano xxs xxt xxsmall xs xt xtiny x t ti tiny s mini lite micro small",
    "b base m medium",
    "l large xl xxl xxlarge xlarge 1b 3b so150m so400m 300m 412m 570m",
    "h huge giant gigantic enormous big 5b 7b",
)

# transformers: the tasks whose networks look at images or videos, and IMAGE, the headless ones
TASKS = (
    *("IMAGE_CLASSIFICATION", "BACKBONE", "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION", "UNIVERSAL_SEGMENTATION"),
    *("INSTANCE_SEGMENTATION", "DEPTH_ESTIMATION", "VIDEO_CLASSIFICATION", "IMAGE"),
)
# what the default config leaves out, and smaller networks of the same forward
CONFIGS: dict[str, dict[str, Any]] = {
    "EfficientNet": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 224},
    "TimmBackbone": {"backbone": "resnet18"},
    "Data2VecVision": {"num_hidden_layers": 12, "hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "DPT": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "image_size": 224},
}


def networks(packages: Iterable[str] = PACKAGES, *, everything: bool = False) -> list[str]:
    """Return the names, PACKAGE:NETWORK, of what is installed."""
    listing = {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}
    return [f"{p}:{name}" for p in packages if installed(p) is not None for name in listing[p](everything)]


def _torchvision(everything: bool) -> list[str]:
    import torchvision

    return list(torchvision.models.list_models())


def _timm(everything: bool) -> list[str]:
    """Return, of every file of timm, the smallest of each family, and the smallest until they are ``FEWEST``."""
    import timm

    if everything:
        return list(timm.list_models())
    chosen = []
    for file in timm.list_modules():
        names = sorted(timm.list_models(module=file), key=_timm_size)
        families = {_family(name): name for name in reversed(names)}
        taken = set(families.values())
        rest = [name for name in names if name not in taken][: max(0, FEWEST - len(taken))]
        chosen += sorted(taken | set(rest))
    return chosen


def _family(name: str) -> str:
    found = re.match(f"{PREFIXES}[a-z]+", name)
    return found.group() if found else name


def _timm_size(name: str) -> tuple[Any, ...]:
    """Return what a name is sorted by: the word for its size, then its numbers."""
    tokens = name.split("_")
    words = " ".join(SMALL_TO_LARGE).split()
    ranks = [words.index(token) for token in tokens if token in words]
    middle = len(SMALL_TO_LARGE[0].split()) - 0.5
    parts = [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]
    return (max(ranks) if ranks else middle, len(tokens), parts)


def _transformers(everything: bool) -> list[str]:
    """Return the classes for images; a headless one only where its kind has no other, or with ``everything``."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    classes: dict[str, None] = {}
    kinds: set[str] = set()
    for task in TASKS:
        for kind, found in getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}).items():
            if task != "IMAGE" or everything or kind not in kinds:
                classes.update(dict.fromkeys([found] if isinstance(found, str) else found))
            kinds.add(kind)
    return list(classes)


# --- building one, and its input


def build(name: str) -> nn.Module:
    """Build a network with random weights."""
    package, _, network = name.partition(":")
    module = importlib.import_module(package)
    if package == "torchvision":
        given = inspect.signature(module.models.get_model_builder(network)).parameters
        keywords = {"weights_backbone": None} if "weights_backbone" in given else {}
        built = module.models.get_model(network, weights=None, **keywords)
    elif package == "timm":
        built = module.create_model(network, pretrained=False)
    else:
        module.logging.set_verbosity_error()
        cls = getattr(module, network)
        changes = next((config for start, config in CONFIGS.items() if network.startswith(start)), {})
        built = cls(cls.config_class(**changes))
    return built


def too_large(name: str, limit: float) -> str:
    """Say where a network has more parameters than a limit, without their memory."""
    with contextlib.suppress(Exception), torch.device("meta"):
        count = sum(p.numel() for p in build(name).parameters())
        if count > limit:
            return f"{count / 1e6:.0f} M parameters, more than {limit / 1e6:.0f} M"
    return ""


class Detector(nn.Module):
    """torchvision's detector without what chooses by rank: its backbone, and its heads on fixed boxes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list[Any]:
        model: Any = self.model
        features = model.backbone(images)
        if not hasattr(model, "rpn"):
            return [model.head(list(features.values()))]
        size = float(images.shape[-1])
        boxes = [images.new_tensor([[0, 0, size, size], [size / 4, 0, size, size / 2]])] * len(images)
        shapes = [(images.shape[-2], images.shape[-1])] * len(images)
        heads = model.roi_heads
        outputs = [model.rpn.head(list(features.values()))]
        outputs.append(heads.box_predictor(heads.box_head(heads.box_roi_pool(features, boxes, shapes))))
        if getattr(heads, "mask_head", None) is not None:
            outputs.append(heads.mask_head(heads.mask_roi_pool(features, boxes, shapes)))
        if getattr(heads, "keypoint_head", None) is not None:
            outputs.append(heads.keypoint_head(heads.keypoint_roi_pool(features, boxes, shapes)))
        return outputs


def callable_model(model: nn.Module) -> nn.Module:
    """Return what verify is given of a model."""
    return Detector(model) if type(model).__module__.startswith("torchvision.models.detection") else model


def input_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Yield shapes of a model's input, the smallest images first, its own size last."""
    config = getattr(model, "config", None)
    own: Any = getattr(config, "image_size", None)
    channels = getattr(config, "num_channels", 3)
    if hasattr(model, "pretrained_cfg"):  # timm
        channels, *own = model.pretrained_cfg.get("input_size", (3, 224, 224))  # type: ignore[union-attr, operator]
    pair = tuple(own) if isinstance(own, (tuple, list)) else (own or SIZES[-1],) * 2
    for size in dict.fromkeys([*((size, size) for size in SIZES), pair]):
        if type(model).__module__.startswith("torchvision.models.video"):
            yield (BATCH, channels, FRAMES, *size)
        elif "ForVideo" in type(model).__name__:
            yield (BATCH, getattr(config, "num_frames", FRAMES), channels, *size)
        else:
            yield (BATCH, channels, *size)


def model_input(model: nn.Module, shape: tuple[int, ...], seed: int = 1) -> tuple[Tensor, ...]:
    """Return what a model is called with: images, or two for optical flow."""
    generator = torch.Generator().manual_seed(seed)
    frames = 2 if type(model).__name__ == "RAFT" else 1
    return tuple(torch.randn(shape, generator=generator) for _ in range(frames))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of an output."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(inner)


def find_input(model: nn.Module, network: nn.Module) -> tuple[tuple[Tensor, ...], float] | str:
    """Return the smallest input that a network takes in training, with the seconds of its forward; or why none."""
    said = ""
    for shape in input_shapes(model):
        inputs = model_input(model, shape)
        start = time.perf_counter()
        try:
            with torch.no_grad():
                outputs = list(tensors_in(network(*inputs)))
        except Exception as error:
            said = one_line(error)
            continue
        if outputs and all(t.isfinite().all() and t.numel() for t in outputs):
            return inputs, time.perf_counter() - start
        said = "stock's own output is empty or not finite"
    return f"stock takes none of the inputs tried: {said}"
