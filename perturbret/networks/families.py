"""Network families by the name that notebook 04 takes as `encoder`; all other encoders are simple opponents.

A family is a line here and a room of its own, imported when it is asked for: whoever fits a simple opponent never waits
for torch.
"""

import importlib
from dataclasses import dataclass

_PACKAGE = __package__.partition(".")[0]


@dataclass(frozen=True)
class Family:
    """Where a family's code is.

    Attributes
    ----------
    title : str
        Its name in sentences.
    settings_at, backbone_at : str
        `room.module:Class` of its `perturbret.networks.settings.Settings`, which need no torch, and of its
        `perturbret.networks.backbone.Backbone`.

    Examples
    --------
    >>> NETWORKS["scgpt"].settings.model_fields["checkpoint"].default
    'small'
    """

    title: str
    settings_at: str
    backbone_at: str

    @property
    def settings(self) -> type:
        """The class of its settings."""
        return _import(self.settings_at)

    @property
    def backbone(self) -> type:
        """The class of its backbone; imports torch."""
        return _import(self.backbone_at)


def _import(place: str) -> type:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"{_PACKAGE}.{module}"), name)


NETWORKS = {
    "scgpt": Family("scGPT", "scgpt.settings:ScGPTSettings", "scgpt.backbone:ScGPTBackbone"),
}
