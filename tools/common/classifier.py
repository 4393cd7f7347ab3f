"""A classifier ready for pictures, for the tools: model, preprocessing and class names from one set of flags.

From a run or checkpoint (--resume), a file of weights (--pretrained FILE with --cfg or --model; a DAT's file needs
neither), a Hugging Face folder (--pretrained FOLDER) or timm's own weights (--model NAME).
"""

import argparse
import copy
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.data import ImageNetInfo
from timm.models import PretrainedCfg
from torch import Tensor, nn
from yacs.config import CfgNode

import config
from analysis import imagenet
from engine import build, checkpoint
from engine.compilation import describe_error
from engine.hub_folder import (
    evaluation_values,
    hub_folder_of,
    is_hub_folder,
    read_hub_folder,
)
from engine.loop import autocast
from engine.pretrained import load_pretrained
from engine.provenance import find_provenance
from engine.weight_files import read_weights, warn_if_average_is_better
from models.identify import identify
from utils.download import download
from utils.errors import CheckpointError, ConfigError, DataError
from utils.logging import logger
from utils.text import format_size

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CONFIG_SUFFIXES = (".yaml", ".yml")


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model in evaluation mode and what its pictures and answers need.

    classes: folder names or ids, in the order of the logits.
    names: the same in words.
    title: the model and its weights, for people.
    """

    cfg: CfgNode
    model: nn.Module
    device: torch.device
    classes: list[str]
    names: list[str]
    title: str

    @property
    def transform(self) -> Callable[[Tensor], Tensor]:
        """From a picture's pixels to the model's, as in an evaluation."""
        return build.eval_transform(self.cfg, "own")

    @property
    def apply_exif(self) -> bool:
        """Whether pictures are turned as their EXIF data asks for."""
        return self.cfg.DATA.EXIF == "apply"

    def autocast(self) -> torch.autocast:
        """The precision of an evaluation."""
        return autocast(self.device, getattr(torch, self.cfg.AMP_DTYPE))


def log_to_stderr() -> None:
    """Log what happens to stderr: stdout is for the answers."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def add_arguments(parser: argparse.ArgumentParser, *, precision: bool = True) -> None:
    """The flags that say which classifier; without `precision`, it computes in float32."""
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--resume", default="", metavar="RUN", help="run (its best checkpoint) or checkpoint"
    )
    weights.add_argument(
        "--pretrained",
        default="",
        metavar="FILE",
        help="file of weights, Hugging Face folder, or https://…#sha256=…",
    )
    add_recipe_arguments(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    if not precision:
        parser.set_defaults(amp_dtype="float32")
        return
    parser.add_argument(
        "--amp-dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: the configuration's; float32 without one",
    )


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `add_arguments` beside those that name the weights, device and precision."""
    parser.add_argument("--ema", action="store_true", help="the average of the weights instead")
    recipe = parser.add_mutually_exclusive_group()
    recipe.add_argument("--cfg", default="", help="configuration of the weights in a file")
    recipe.add_argument(
        "--model",
        default="",
        metavar="NAME",
        help="a model of timm's; without a file of weights its own are downloaded",
    )
    parser.add_argument(
        "--opts", nargs="*", default=[], metavar="KEY VALUE", help="any key of the configuration"
    )
    parser.set_defaults(batch_size=0, workers=0)


def add_loader_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say how pictures are loaded, for tools that take many; after `add_arguments`."""
    parser.add_argument("--batch-size", type=int, default=0, help="default: TEST.BATCH_SIZE")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures")


def load_classifier(
    args: argparse.Namespace, names: str = "lemma", *, untrained: bool = False
) -> Classifier:
    """The classifier that the flags of `add_arguments` name.

    names: "lemma", "definition", "wnid" or a text file, a name a line. untrained: a configuration alone is enough, and
    has random weights, as the title says. Raises ConfigError, also for a flag that these weights cannot use,
    CheckpointError, DataError.
    """
    _refuse_unused(args)
    opts = [*args.opts]
    if args.amp_dtype:
        opts += ["AMP_DTYPE", args.amp_dtype]
    if args.batch_size:
        opts += ["TEST.BATCH_SIZE", str(args.batch_size)]
    opts += ["DATA.NUM_WORKERS", str(args.workers)]
    kind = args.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind)
    described = folder = None
    if args.pretrained and not (args.cfg or args.model):
        folder = hub_folder_of(Path(args.pretrained))
    if args.resume:
        cfg, model, classes, title = _load_run(Path(args.resume), args.ema, opts, device)
    elif folder:
        cfg, model, classes, described, title = _load_folder(folder, opts, device)
    elif args.pretrained:
        cfg, model, classes, title = _load_file(args, opts, device)
    elif args.model:
        cfg, model, classes, title = _load_timm(args.model, opts, device)
    elif args.cfg and untrained:
        cfg, model, classes, title = _build_untrained(args.cfg, opts, device)
    else:
        random = ", or --cfg FILE alone for random ones" if untrained else ""
        raise ConfigError(
            f"name the weights: --resume RUN, --pretrained FILE or --model NAME{random}"
        )
    count = len(classes)
    logger.info(f"{title}: {count} classes, {build.describe_preprocessing(cfg)}")
    words = choose_names(classes, described, names)
    return Classifier(
        build.prepare_device(cfg, device), model.eval(), device, classes, words, title
    )


def with_weights(args: argparse.Namespace, path: Path) -> argparse.Namespace:
    """`args` for one path: a run or checkpoint, a configuration, a file of weights or a Hugging Face folder."""
    one = copy.copy(args)
    if path.suffix in CONFIG_SUFFIXES:
        one.cfg = str(path)
    elif path.is_dir() and not is_hub_folder(path):
        one.resume = str(path)
    else:
        one.pretrained = str(path)
    return one


def _refuse_unused(args: argparse.Namespace) -> None:
    """Raise ConfigError for a flag that the weights of `args` cannot use."""
    if args.ema and not args.resume:
        raise ConfigError("--ema belongs to --resume; other weights are loaded as they are")
    if args.resume or is_hub_folder(args.pretrained):
        for flag, value in (("--cfg", args.cfg), ("--model", args.model)):
            if value:
                raise ConfigError(
                    f"{flag} {value}: a run or folder of weights has its own configuration; remove {flag}, or change "
                    "keys with --opts"
                )


def at_size(classifier: Classifier, size: int) -> Classifier:
    """`classifier` for pictures of `size` pixels, 0: as it is; a DAT's bias tables keep the size of its training.

    Raises ConfigError where the weights are for one size.
    """
    if size in (0, classifier.cfg.DATA.IMG_SIZE):
        return classifier
    cfg = build.at_size(classifier.cfg, size)
    model = build.build_model(cfg, len(classifier.classes), classifier.device).eval()
    try:
        model.load_state_dict(classifier.model.state_dict())
    except RuntimeError as error:
        own = format_size(classifier.cfg.DATA.IMG_SIZE)
        raise ConfigError(
            f"--size {size}: {cfg.MODEL.NAME} has weights for {own} px alone; leave --size out"
        ) from error
    return dataclasses.replace(classifier, cfg=cfg, model=model)


def choose_names(classes: list[str], described: dict[str, str] | None, source: str) -> list[str]:
    """The names of `classes` that `source` asks for: those of a file, or of WordNet where they are wnids.

    described: names that came with the weights. Raises DataError for a file of another length.
    """
    if source not in ("lemma", "definition", "wnid"):
        try:
            lines = Path(source).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--names {source}: cannot be read ({error})") from error
        names = [line.strip() for line in lines if line.strip()]
        if len(names) != len(classes):
            raise DataError(
                f"--names {source}: {len(names)} names, the model has {len(classes)} classes; expected a name a line"
            )
        return names
    if source == "wnid":
        return classes
    if described is not None:
        return [described.get(name, name) for name in classes]
    info = ImageNetInfo("imagenet-22k")
    try:
        detailed = source == "definition"
        return [info.label_name_to_description(name, detailed=detailed) for name in classes]
    except KeyError:
        return classes


def default_classes(count: int) -> list[str]:
    """The classes of weights that do not name theirs."""
    if count == 1000:
        logger.info("The weights name no classes: 1000 outputs are taken as ImageNet-1k's")
        return imagenet.wnids()
    logger.info(f"The weights name no classes: they are numbered from 0 to {count - 1}")
    return [str(number) for number in range(count)]


# --- Sources --------------------------------------------------------------------------------------


def _load_run(path: Path, ema: bool, opts: list[str], device: torch.device) -> tuple:
    step = checkpoint.resolve(path, best=True)
    metadata = checkpoint.read_metadata(step)
    cfg = config.load_values(metadata["config"], str(step / "state.json"), opts)
    classes = metadata["classes"]
    file = step / f"{'ema' if ema else 'model'}.safetensors"
    if not file.exists():
        raise CheckpointError(f"{step} has no EMA: its run had TRAIN.EMA_DECAY 0")
    if not ema:
        warn_if_average_is_better(step, "--ema takes it")
    model = build.build_model(cfg, len(classes), device)
    checkpoint.load_strictly(model, file)
    return cfg, model, classes, f"{cfg.MODEL.NAME}, {file}"


def _build_untrained(file: str, opts: list[str], device: torch.device) -> tuple:
    cfg = config.load(file, opts)
    classes = build.class_list(cfg) or default_classes(cfg.MODEL.NUM_CLASSES or 1000)
    model = build.build_model(cfg, len(classes), device)
    return cfg, model, classes, f"{cfg.MODEL.NAME}, untrained, random weights"


def _load_file(args: argparse.Namespace, opts: list[str], device: torch.device) -> tuple:
    path = download(args.pretrained)
    if args.cfg:
        cfg = config.load(args.cfg, opts)
    elif args.model:
        cfg = _timm_config(args.model, opts)
    else:
        cfg = _identified_config(path, opts)
    named, known = build.class_list(cfg), find_provenance(path)
    if known and (known.step or named is None):
        named = known.classes
    classes = named or default_classes(cfg.MODEL.NUM_CLASSES or 1000)
    model = build.build_model(cfg, len(classes), device)
    load_pretrained(model, path, strict=True)
    return cfg, model, classes, f"{cfg.MODEL.NAME}, {path}"


def _identified_config(path: Path, opts: list[str]) -> CfgNode:
    """The shipped configuration of the DAT whose weights `path` holds."""
    found = identify(read_weights(path))
    file = CONFIGS / f"{found.variant}.yaml" if found else None
    if file is None or not file.exists():
        raise ConfigError(
            f"{path} is no released DAT: say with --cfg or --model what it was made for"
        )
    logger.info(f"{path} is {found}: configured by {file}")
    return config.load(str(file), opts)


def _load_folder(folder: Path, opts: list[str], device: torch.device) -> tuple:
    found = read_hub_folder(folder)
    count = found.num_classes
    args = {k: v for k, v in found.model_args.items() if k not in config.OWNED_ARGS}
    cfg = _config_of(found.name, found.settings, args, count, str(folder), opts)
    model = build.build_model(cfg, count, device)
    load_pretrained(model, folder, strict=True)
    classes = found.classes or default_classes(count)
    return cfg, model, classes, found.descriptions, f"{found.name}, {folder}"


def _load_timm(name: str, opts: list[str], device: torch.device) -> tuple:
    cfg, settings = _timm_config(name, opts), timm.get_pretrained_cfg(name)
    args = {"in_chans": cfg.DATA.IN_CHANS, **cfg.MODEL.ARGS}
    if settings.fixed_input_size and build.input_shape(cfg)[1:] != settings.input_size[1:]:
        args["img_size"] = cfg.DATA.IMG_SIZE
    try:
        model = timm.create_model(name, pretrained=True, **args)
    except (OSError, RuntimeError) as error:  # no such weights, no network, weights of other shapes
        raise CheckpointError(
            f"--model {name}: its weights cannot be had, or do not fit what --opts changes "
            f"({describe_error(error)}); give others with --pretrained"
        ) from error
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"--model {name} cannot be built with what --opts changes ({describe_error(error)}): leave that out"
        ) from error
    classes = default_classes(model.num_classes)
    return cfg, model.to(device), classes, f"{name}, timm's weights"


def _timm_config(name: str, opts: list[str]) -> CfgNode:
    settings = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    if settings is None:
        raise ConfigError(
            f"--model {name}: timm does not know how its pictures are prepared; use --cfg"
        )
    return _config_of(name, settings, {}, settings.num_classes, f"--model {name}", opts)


def _config_of(
    name: str, settings: PretrainedCfg, args: dict, count: int, where: str, opts: list[str]
) -> CfgNode:
    """A configuration from what timm keeps beside a model; `where` names it in errors."""
    values = {
        "AMP_DTYPE": "float32",
        "MODEL": {"NAME": name, "NUM_CLASSES": count, "ARGS": args},
        **evaluation_values(settings),
    }
    return config.load_values(values, where, opts)
