"""The weights of a model before it was quantised, for what starts from the difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from graftwork.engine import channels
from graftwork.errors import BadOption, UnknownName, nearest
from graftwork.reference.site import Site


class Originals:
    """A model in full precision, or its state dict, read where a site asks.

    Attributes:
        used: whether any site has asked.
    """

    def __init__(self, source: nn.Module | Mapping[str, Tensor]) -> None:
        self.tensors = dict(source.state_dict(keep_vars=True) if isinstance(source, nn.Module) else source)
        self.used = False

    def reader(self, site: Site) -> Callable[[], Tensor]:
        """Access to the site's own weight as (..., O, I), fp32 or better, on the site's device."""

        def read() -> Tensor:
            self.used = True
            key = f"{site.module}.{site.parameter}" if site.module else site.parameter
            if key not in self.tensors:
                raise UnknownName(f"originals hold no {key!r}. {nearest(key, self.tensors)}")
            whole = self.tensors[key].detach().to(site.device)
            whole = whole.flatten(1) if site.kernel else whole
            own = whole if site.channels is None else channels.take(whole, site.channels, -2)
            if tuple(own.shape) != site.shape or not own.is_floating_point():
                raise BadOption(
                    f"originals: {key} is {tuple(whole.shape)} in {whole.dtype}, expected floating point values of "
                    f"shape {site.shape} at {site.key}: give the model as it was before quantisation"
                )
            return own.float() if own.element_size() < 4 else own

        return read
