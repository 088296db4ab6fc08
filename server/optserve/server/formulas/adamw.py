"""AdamW, as torch.optim.AdamW: Adam whose weight decay shrinks the parameter and leaves the gradient alone.

    p_t = (1 - γλ) p_{t-1} - (Adam's step)

Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019. The formula is Adam's; only defaults differ.
"""

from __future__ import annotations

from dataclasses import replace

from optserve.server.formulas.adam import ADAM

ADAMW = replace(ADAM, name="AdamW", defaults={**ADAM.defaults, "weight_decay": 1e-2, "decoupled_weight_decay": True})
