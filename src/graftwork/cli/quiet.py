"""What transformers says of itself on the terminal, turned down to errors."""

from __future__ import annotations

import logging


def quiet(level: int = logging.WARNING) -> None:
    """No weight-loading bars and no load reports: what matters in them is handled and told by our own log."""

    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # tells on import which kernels it lacks
    logging.basicConfig(format="%(message)s", level=level)
