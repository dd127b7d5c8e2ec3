"""Lines of other libraries that would only puzzle a student, each named here and filtered by its words. Nothing else is muted."""

from __future__ import annotations

import logging
import warnings

# bitsandbytes looks for an optional accelerated kernel at import and works without it.
_BITSANDBYTES = "Failed to load CPU gemm_4bit_forward"
# peft asks transformers 5 by a name that transformers 5 has renamed.
_PEFT = "`is_gradient_checkpointing` is deprecated"


def quiet_libraries():
    """Filter the two lines above, and transformers' progress bar for reading a checkpoint of a few megabytes."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_wanted)
    warnings.filterwarnings("ignore", message=_PEFT, category=FutureWarning)


def _is_wanted(record):
    return _BITSANDBYTES not in record.getMessage()
