"""Where a rank stands in Megatron's parallelism, and which layers and experts live there.

Source: megatron.core's get_transformer_layer_offset and parallel_state.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import FormatError


@dataclass(frozen=True)
class Placement:
    """Where a rank stands, in Megatron's terms; the default is alone.

    Attributes:
        tp_rank, tp_size: tensor parallelism.
        etp_rank, etp_size: expert tensor parallelism; as tp_… unless given.
        ep_rank, ep_size: expert parallelism.
        pp_rank, pp_size: pipeline parallelism.
        vp_size: model chunks of each pipeline rank (virtual pipeline).
        num_layers_in_first_pipeline_stage, num_layers_in_last_pipeline_stage: where those differ from the others.
        account_for_embedding_in_pipeline_split, account_for_loss_in_pipeline_split: whether each counts as a layer.
    """

    tp_rank: int = 0
    tp_size: int = 1
    etp_rank: int | None = None
    etp_size: int | None = None
    ep_rank: int = 0
    ep_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    vp_size: int = 1
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False

    def __post_init__(self) -> None:
        for kind in ("tp", "etp", "ep", "pp"):
            rank, size = getattr(self, f"{kind}_rank"), getattr(self, f"{kind}_size")
            if (rank is None) != (size is None) or (size is not None and not 0 <= rank < size):
                raise FormatError(f"{kind}_rank={rank}, {kind}_size={size}: give both, with 0 ≤ rank < size")

    def tensor(self, expert: bool) -> tuple[int, int]:
        """(rank, size) of the parallelism that cuts a parameter."""
        if expert and self.etp_rank is not None and self.etp_size is not None:
            return self.etp_rank, self.etp_size
        return self.tp_rank, self.tp_size

    def local_experts(self, experts: int) -> range:
        """Indices of the routed experts that live here.

        Raises:
            FormatError: they cannot be dealt out evenly.
        """
        if experts % self.ep_size:
            raise FormatError(f"ep_size={self.ep_size}: does not divide the {experts} experts")
        count = experts // self.ep_size
        return range(self.ep_rank * count, (self.ep_rank + 1) * count)

    def local_layers(self, layers: int, vp_stage: int = 0) -> range:
        """Indices of the decoder layers in one of this rank's model chunks.

        Megatron deals chunks out in the order chunk 0 of all pipeline ranks, chunk 1 of all, and so on.

        Raises:
            FormatError: the layers cannot be dealt out as asked.
        """
        if not 0 <= vp_stage < self.vp_size:
            raise FormatError(f"vp_stage={vp_stage}: must be from 0 to {self.vp_size - 1}")
        before = [(v, r) for v in range(vp_stage + 1) for r in range(self.pp_size) if (v, r) < (vp_stage, self.pp_rank)]
        first = sum(self._layers_in(layers, v, r) for v, r in before)
        return range(first, first + self._layers_in(layers, vp_stage, self.pp_rank))

    def _layers_in(self, layers: int, vp_stage: int, pp_rank: int) -> int:
        first, last = self.num_layers_in_first_pipeline_stage, self.num_layers_in_last_pipeline_stage
        is_first, is_last = pp_rank == 0, pp_rank == self.pp_size - 1
        if first is None and last is None:
            stages = self.pp_size
            total = layers + self.account_for_embedding_in_pipeline_split + self.account_for_loss_in_pipeline_split
        elif is_first and first is not None:
            stages, total = 1, first
        elif is_last and last is not None:
            stages, total = 1, last
        else:
            stages = self.pp_size - (first is not None) - (last is not None)
            total = layers - (first or 0) - (last or 0)
        if total < 0 or total % (stages * self.vp_size):
            raise FormatError(
                f"{total} layers cannot be dealt out evenly to {stages} pipeline stages of {self.vp_size} chunks; give "
                "num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage as the trainer has them"
            )
        embedding = self.account_for_embedding_in_pipeline_split and is_first and vp_stage == 0
        loss = self.account_for_loss_in_pipeline_split and is_last and vp_stage == self.vp_size - 1
        return total // (stages * self.vp_size) - embedding - loss
