"""Where low-rank factors start: at random, out of the weight they update, or out of data.

An initialiser answers with factors; where it takes something out of the weight, the module keeps that product beside
them as a frozen pair that is subtracted. So the base keeps every bit, several such adapters share one base, and what
was learned leaves as an ordinary update of twice the rank.
"""

from __future__ import annotations

from collections.abc import Mapping

from graftwork.initialisers.of_data import eva, input_directions, lora_ga, shared_out, weight_gradient
from graftwork.initialisers.of_error import loftq
from graftwork.initialisers.of_weight import kasa, olora, pissa
from graftwork.initialisers.plain import gaussian, given, kaiming
from graftwork.initialisers.start import Initialiser

__all__ = ["INITIALISERS", "Initialiser"]

INITIALISERS: Mapping[str, Initialiser] = {
    "kaiming": Initialiser(kaiming, stored="kaiming"),
    "gaussian": Initialiser(gaussian, stored="gaussian"),
    "pissa": Initialiser(pissa, stored="given"),
    "olora": Initialiser(olora, stored="given"),
    "kasa": Initialiser(kasa, stored="given", identity=False),
    "eva": Initialiser(eva, stored="kaiming", gathers=input_directions, shares=shared_out),
    "lora-ga": Initialiser(lora_ga, stored="given", gathers=weight_gradient),
    "loftq": Initialiser(loftq, stored="kaiming", identity=False, corrects=True),
    "given": Initialiser(given, stored="given"),
}
