"""SetRank (Pang et al., SIGIR 2020): self-attention over the candidates as a set, so their order does not matter.

Stacked multi-head self-attention blocks (MSAB): x = norm(x + attention(x)); x = norm(x + feed_forward(x)); then an MLP per
candidate. Differences from the paper: no ordinal (position) embedding, which it adds for lists that are already ranked, and
no induced blocks (IMSAB); the head is KAR's 200-80. The loss is the paper's attention rank: the softmax cross-entropy
between labels and scores. KAR's form of it maps every score <= 0 to zero and so has no gradient there: more than half of
its seeds never learn.
"""

from __future__ import annotations

from dpo4rec_ray.rerankers.prm import PRM


class SetRank(PRM):
    """PRM's layers and head, without positions: `num_layers` blocks of `num_heads` heads."""

    loss = "listwise_softmax"
    order_matters = False
