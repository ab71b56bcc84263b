"""Routers: functions of a forward's arguments that decide which adapters serve it (`gw.route(..., by=router)`)."""

from graftwork.routing.by_token import ByToken
from graftwork.routing.x_lora import XLoRA

__all__ = ["ByToken", "XLoRA"]
