"""What one layer computes: token order, block mask, pooled tail, precision."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from diffsparse.block_mask import BlockMask
from diffsparse.kernels.block_sparse import block_sparse_attention
from diffsparse.permutation import Permutation


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Everything that a layer needs to run sparse attention, until it is planned again.

    Attributes:
        permutation: the order of the tokens, per head; None keeps the order.
        mask: which key blocks each query block sees, in that order.
        tail: [B|1, H|1] bool, heads whose skipped key blocks enter as their pooled mean; None for no head.
        classes: [H] int64 of `HeadClass`, for the report; None where the strategy does not class heads.
        key_permutation: the order of keys and values where it is not that of the queries; None where it is. Padded
            text stays last in both.
        skipped: [H] bool, heads whose output is 0; None for no head.
        precision: what the kernel computes in, one of `PRECISIONS`; "native" is the dtype of the inputs.
        lasts: whether it serves all steps to come of a generation, whatever the config says of replanning.
    """

    permutation: Permutation | None
    mask: BlockMask
    tail: Tensor | None = None
    classes: Tensor | None = None
    key_permutation: Permutation | None = None
    skipped: Tensor | None = None
    precision: str = "native"
    lasts: bool = False

    def of_first_queries(self, num_queries: int) -> AttentionPlan:
        """The plan of a sequence of which the first tokens alone are queries: those of the video, with the text last.

        Every order has the text last, so these are the first in it.
        """
        return replace(
            self,
            permutation=None if self.permutation is None else self.permutation.of_first(num_queries),
            key_permutation=self.permutation if self.key_permutation is None else self.key_permutation,
            mask=self.mask.of_first_queries(num_queries),
        )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_length: Tensor | None = None,
        scale: float | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Sparse attention of query, key, value, each [B, H, S, D] in the tokens' own order: [B, H, S, D].

        Query has fewer tokens than key and value where the plan is `of_first_queries`.

        Args:
            key_length: [B] int32, keys at or beyond it do not exist (padded text at the end of the sequence).
            scale: factor on the scores, D ** -0.5 if None.
            backend: the kernel's implementation; the best one that can run if None.
        """
        query_order = None if self.permutation is None else self.permutation.order
        key_order = query_order if self.key_permutation is None else self.key_permutation.order
        output = block_sparse_attention(
            query,
            key,
            value,
            self.mask.lists(),
            self.mask.counts,
            query_block_size=self.mask.query_block_size,
            key_block_size=self.mask.key_block_size,
            key_length=key_length,
            tail=self.tail,
            query_order=query_order,
            key_order=key_order,
            schedule=self.mask.schedule(*query.shape[:2]),
            scale=scale,
            precision=self.precision,
            backend=backend,
            validate=False,
        )
        assert isinstance(output, Tensor)
        if self.skipped is not None:
            output.masked_fill_(self.skipped[:, None, None], 0.0)
        return output
