"""Parameter names of the published checkpoints, mapped to the names used here.

One table serves both the import of published weights and the conformance cases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

UNET_NAMES = (
    (r"^model\.", ""),
    (r"^time_mlp\.1\.", "embed.hidden."),
    (r"^time_mlp\.3\.", "embed.output."),
    (r"^downs\.(\d+)\.2\.conv\.", r"downsample.\1."),
    (r"^ups\.(\d+)\.2\.conv\.", r"upsample.\1."),
    (r"^downs\.", "down."),
    (r"^ups\.", "up."),
    (r"^mid_block1\.", "middle.0."),
    (r"^mid_block2\.", "middle.1."),
    (r"\.blocks\.0\.block\.0\.", ".block1.conv."),
    (r"\.blocks\.0\.block\.2\.", ".block1.norm."),
    (r"\.blocks\.1\.block\.0\.", ".block2.conv."),
    (r"\.blocks\.1\.block\.2\.", ".block2.norm."),
    (r"\.time_mlp\.1\.", ".time."),
    (r"\.residual_conv\.", ".residual."),
    (r"^final_conv\.0\.block\.0\.", "final_block.conv."),
    (r"^final_conv\.0\.block\.2\.", "final_block.norm."),
    (r"^final_conv\.1\.", "final_conv."),
)


def rename_unet(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters of a published `UNet_RL` (with or without the leading `model.`) to those of `UNet`."""
    renamed = {}
    for name, value in weights.items():
        for pattern, replacement in UNET_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed
