"""Which replica draws an image. Ray loads this file where it routes; it imports nothing else of ours."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class WarmRouter(RequestRouter):  # type: ignore[misc]
    """First replicas with a free row that have the model and the size warm, then others with a free row, then all.

    Of those that are equal the one with the fewest images is taken.
    """

    def initialize_state(self, rows: int) -> None:
        """rows: images that a replica steps together."""
        self._rows = rows

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas by rank, the best ones first."""
        kind = ""
        if pending_request is not None:
            kind = pending_request.metadata.multiplexed_model_id
            pending_request.routing_context.should_backoff = True  # between turns in which all were full
        ranks: list[list[RunningReplica]] = [[], [], []]
        for replica in candidate_replicas:
            has_room = (self.replica_queue_len_cache.get(replica.replica_id) or 0) < self._rows
            is_warm = kind in replica.routing_stats.get("warm", ())
            ranks[(0 if is_warm else 1) if has_room else 2].append(replica)
        return ranks
