"""Vision models: images, accuracy, and what is checked before a model is loaded."""

from __future__ import annotations

import logging
import math
from typing import Any

from torch import Tensor, nn

from bc import vision
from bc.data import images
from bc.data.images import Draw
from bc.divergence import Divergence
from bc.errors import UserError
from bc.evaluation import evaluate_accuracy
from bc.pipeline import Engine
from bc.settings import SEARCH
from bc.vision.transforms import Preprocessing
from experiments import hub
from experiments.config import CellConfig
from experiments.data import ImageData
from experiments.tasks import Samples, Scores, SelectionScore

log = logging.getLogger(__name__)
TOLERANCE = 0.1  # percent of top-1 by which a float model may differ from its published value


def images_of(cell: CellConfig) -> ImageData:
    """The cell's images."""
    assert isinstance(cell.data, ImageData)
    return cell.data


class VisionTask:
    """See :class:`experiments.tasks.Task`."""

    def check(self, cell: CellConfig) -> None:
        """Images are there, the model is known and tells their classes apart, and a named checkpoint is there.

        Raises:
            UserError: The first thing that is wrong.
        """
        data = images_of(cell)
        if not cell.is_float:
            images.check(data.calibration.dataset, "calibration", data.paths)
        for dataset in data.evaluation.datasets:
            images.check(dataset, "test", data.paths)
        vision.check(cell.model.name, cell.model.path)
        for dataset in data.evaluation.datasets:
            check_classes(cell, "data.evaluation.datasets", dataset)
        if not cell.is_float and SEARCH in cell.bc.scope:  # labels of other training images are of no effect
            check_classes(cell, "data.calibration.dataset", data.calibration.dataset)
        if cell.model.attention != "auto":
            raise UserError(
                f"model.attention: {cell.model.attention!r} is for language models; a vision model's matmuls are "
                "always computed by themselves; set model.attention=auto"
            )
        repo, revision = on_hub(cell)
        if repo and not hub.has_weights(repo, revision):
            hub.require([f"the model {repo} (model.path)"])

    def samples(self, cell: CellConfig) -> Samples:
        """Decode the images that a cell needs; test images are decoded when they are scored."""
        data, prepare = images_of(cell), preprocessing(cell)
        out = Samples()
        if not cell.is_float:
            self._training(cell, data, prepare, out)
        e = data.evaluation
        for dataset in e.datasets:
            beside: dict[str, Any] = {"paths": data.paths, "cache": data.cache, "workers": data.workers}
            out.test[dataset] = images.test_batches(dataset, prepare, limit=e.limit, offset=e.offset, **beside)
        return out

    def _training(self, cell: CellConfig, data: ImageData, prepare: Preprocessing, out: Samples) -> None:
        dataset, paths, workers = data.calibration.dataset, data.paths, data.workers
        calibration, fit = (
            Draw(count, seed)
            for count, seed in zip(
                (data.calibration.samples, data.compensation.samples), data.with_seed(cell.seed), strict=True
            )
        )

        def draw(which: Draw) -> Tensor:
            return images.training_images(dataset, which.count, which.seed, prepare, paths, workers=workers)[0]

        out.calibration = draw(calibration)
        out.fit = draw(fit) if cell.bc.enabled else out.calibration
        if data.selection.samples:
            out.selection, out.labels = images.selection_images(
                dataset, data.selection.samples, cell.seed, prepare, (calibration, fit), paths, workers=workers
            )

    def load(self, cell: CellConfig) -> nn.Module:
        """The float model."""
        return vision.load(cell.model.name, cell.model.path, dtype=cell.model.dtype)

    def evaluate(self, model: nn.Module, samples: Samples, engine: Engine, cell: CellConfig) -> Scores:
        """Top-1 and top-5 of every test set, and whether each image was right."""
        scores = Scores()
        for dataset, test in samples.test.items():
            found = evaluate_accuracy(model, test, engine)
            if found.samples != test.count:
                raise RuntimeError(f"{dataset}: {found.samples} images were scored, not {test.count}")
            if left_out := len(test.left_out):
                log.warning(
                    "warning: %s: %d of %d images cannot be decoded and are left out; scores are of the other %d, and "
                    "shown as such in the table",
                    *(dataset, left_out, left_out + test.count, test.count),
                )
            for metric in ("top1", "top5"):
                value = getattr(found, metric)
                row = {"dataset": dataset, "metric": metric, "value": value, "test_samples": found.samples}
                scores.metrics.append(row)
            scores.outcomes[dataset] = "".join("01"[right] for right in found.right)
            if cell.is_float and dataset == "imagenet":
                compare_float(cell, found.top1, found.samples, whole=found.samples + left_out == images.IMAGENET_TEST)
        return scores

    def selection_score(self, model: nn.Module, samples: Samples, engine: Engine, cell: CellConfig) -> SelectionScore:
        """Minus the divergence from the float model on the selection images.

        Of the paper's search top-1 there, and, where two are equal, the lower cross-entropy.
        """
        selection, labels = samples.selection, samples.labels
        assert selection is not None and labels is not None
        if SEARCH not in cell.bc.scope:
            divergence = Divergence(model, selection, engine)
            return lambda twin: (-divergence(twin),)

        def accuracy(twin: nn.Module) -> tuple[float, ...]:
            pairs = zip(selection.split(engine.batch_size), labels.split(engine.batch_size), strict=True)
            found = evaluate_accuracy(twin, pairs, engine)
            return found.top1, -found.loss

        return accuracy


def on_hub(cell: CellConfig) -> tuple[str, str]:
    """Repository and revision of a model's weights on the hub; empty where they come from elsewhere."""
    from timm.models import get_pretrained_cfg

    source = vision.catalogue().get(cell.model.name)
    if cell.model.path is not None or (source is not None and source.embedded):
        return "", ""
    config = get_pretrained_cfg(cell.model.name if source is None else source.timm)
    repo, _, revision = ((config and config.hf_hub_id) or "").partition("@")
    return repo, revision or "main"


def preprocessing(cell: CellConfig) -> Preprocessing:
    """The model's evaluation transform, found without its weights."""
    return vision.preprocessing(cell.model.name)


def check_classes(cell: CellConfig, field: str, dataset: str) -> None:
    """Refuse a data set whose labels are not the model's classes.

    Raises:
        UserError: Their numbers differ.
    """
    labels, classes = images.CLASSES[dataset], vision.classes(cell.model.name)
    if labels != classes:
        raise UserError(
            f"{field}: {dataset!r} has {labels:,} classes and model {cell.model.name!r} tells {classes:,} apart; "
            f"choose a model of {labels:,} classes, or another data set"
        )


def compare_float(cell: CellConfig, top1: float, scored: int, *, whole: bool) -> None:
    """Say where the float model is not what was published, on which all that follows would stand.

    Args:
        cell: The float cell.
        top1: What it scored on ImageNet-1k, in percent.
        scored: On how many images.
        whole: All images of the validation set were asked for; else what the draw of a part may do is allowed for.
    """
    source = vision.catalogue().get(cell.model.name)
    if source is None or source.top1 is None:
        return
    difference, share = top1 - source.top1, source.top1 / 100
    allowed = TOLERANCE + (0 if whole else 4 * 100 * math.sqrt(share * (1 - share) / scored))
    part = "" if whole else f" (on a part: {scored:,} images)"
    line = f"  float top-1 of {cell.model.name}: {top1:.2f}{part}, published {source.top1:.2f}, {difference:+.2f}"
    if abs(difference) > allowed:
        log.warning("warning:%s; check the checkpoint and the images before trusting quantized scores", line)
    else:
        log.info("%s", line)
