"""Names of sites in TransformerLens, which SAELens and Llamascopium use."""

import re
from typing import Any

from sae_train.formats.foreign import Origin

HOOKS = {"residual": "hook_resid_post", "mlp": "hook_mlp_out", "attention": "attn.hook_z"}
"""Names within a block, by kind of site."""


def hook_name(origin: Origin) -> str:
    """Return the hook of a site, such as 'blocks.2.hook_resid_post'."""
    return f"blocks.{origin.layer}.{HOOKS[origin.site]}"


def site_of_hook(hook: Any) -> str | None:
    """Return our label of a hook, such as 'residual2'. None for a hook of another kind, or what is no text."""
    parts = hook.split(".", 2) if isinstance(hook, str) else []
    sites = {name: site for site, name in HOOKS.items()}
    if len(parts) == 3 and parts[0] == "blocks" and re.fullmatch(r"\d{1,9}", parts[1]) and parts[2] in sites:
        return f"{sites[parts[2]]}{parts[1]}"
    return None
