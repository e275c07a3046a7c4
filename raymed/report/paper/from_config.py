"""What the config of a classifier's run says of its methods, as parts of a `PaperRecord`.

The config is plain data (`to_dict`, or config.json of a finished run). A field that it lacks, as an older or another
recipe's may, is None: a blank in the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raymed.report.paper.record import Model, Phase, Preprocessing, Training

_SUPCON = "supcon_"
_LOSSES = {
    "ce": "cross-entropy",
    "focal": "focal loss",
    "asl": "asymmetric loss",
    "poly": "poly loss",
    "supcon": "supervised contrastive loss",
}
_OPTIMISERS = {"adamw": "AdamW", "sgd": "SGD with Nesterov momentum"}


def config_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `PaperRecord` that follow from the config of a classifier's job:
    `PaperRecord(**config_facts(config), cohort=..., ...)`.

    Args:
        config: with `recipe` (`ClassifierRecipe` as plain data) and `seeds`.
    """
    recipe = config.get("recipe", {})
    data, model = recipe.get("data", {}), recipe.get("model", {})
    preprocess = data.get("preprocess", {})
    method = recipe.get("method")
    return {
        "positive": data.get("positive"),
        "preprocessing": Preprocessing(
            preprocess.get("size"), preprocess.get("fit"), preprocess.get("channels"), preprocess.get("normalisation")
        ),
        "model": Model(model.get("backbone"), weights=_weights(model.get("weights"))),
        "training": Training(
            _phases(recipe, method) if method else (),
            recipe.get("augment"),
            "AUPRC" if method else None,
            tuple(config.get("seeds", ())),
        ),
    }


def _phases(recipe: Mapping[str, Any], method: str) -> tuple[Phase, ...]:
    """The contrastive phase and the head's, or the single one."""
    loss = method.removeprefix(_SUPCON)
    settings = recipe.get("losses", {}).get(loss, {})
    if not method.startswith(_SUPCON):
        return (_phase("single", recipe.get("single", {}), loss, settings),)
    stage = recipe.get("supcon", {})
    contrastive = _phase("supcon", stage, "supcon", stage.get("loss", {}))
    head = _phase("head", recipe.get("head", {}), loss, settings, frozen="encoder")
    return (head,) if stage.get("encoder_from") else (contrastive, head)


def _phase(
    name: str, stage: Mapping[str, Any], loss: str, settings: Mapping[str, Any], frozen: str | None = None
) -> Phase:
    optim = stage.get("optim", {})
    return Phase(
        name,
        _LOSSES.get(loss, loss),
        {
            key: value
            for key, value in settings.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        },
        frozen,
        stage.get("steps"),
        stage.get("batch_size"),
        stage.get("balanced"),
        _OPTIMISERS.get(optim.get("name"), optim.get("name")),
        optim.get("lr"),
        optim.get("weight_decay"),
        optim.get("schedule"),
        stage.get("ema_decay"),
    )


def _weights(weights: str | None) -> str | None:
    """What the text says of them: of a file its name alone, since its folder is one machine's."""
    if weights is None or weights == "none":
        return weights
    return "the pretrained weights of timm" if weights == "pretrained" else f"the file {weights.split('/')[-1]}"
