"""Adapter files: graftwork's own format and HF PEFT's."""
