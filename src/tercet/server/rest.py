"""Training runs, checkpoints and sessions, to be looked at and cleared away."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query
from fastapi.responses import Response, StreamingResponse

from tercet.server import requests as asked
from tercet.server.refusals import Missing
from tercet.server.service import Service
from tercet.server.store import SCHEME, Checkpoint, Run, in_words

Count = Annotated[int, Query(ge=0)]


class Rest:
    """What the SDK's RestClient and its command line ask for."""

    def __init__(self, service: Service) -> None:
        self.service, self.store = service, service.store

    def training_runs(self, limit: Count = 20, offset: Count = 0) -> dict[str, Any]:
        """Runs, the newest first."""
        runs = self.store.runs()
        found = [self._run(run) for run in runs[offset : offset + limit]]
        return {"training_runs": found, "cursor": {"offset": offset, "limit": limit, "total_count": len(runs)}}

    def training_run(self, run_id: str) -> dict[str, Any]:
        """One run."""
        run = self.store.run(run_id)
        if run is None:
            raise Missing(f"there is no training run {run_id}")
        return self._run(run)

    def checkpoints_of(self, run_id: str) -> dict[str, Any]:
        """The checkpoints of a run."""
        return {"checkpoints": [each.as_json() for each in self.store.checkpoints(run_id)]}

    def checkpoints(self, limit: Count = 100, offset: Count = 0) -> dict[str, Any]:
        """Every checkpoint, the newest first."""
        found = self.store.checkpoints()
        return {
            "checkpoints": [each.as_json() for each in found[offset : offset + limit]],
            "cursor": {"offset": offset, "limit": limit, "total_count": len(found)},
        }

    def delete_checkpoint(self, run_id: str, kind: str, name: str) -> Response:
        """Remove a checkpoint."""
        self.store.delete(self._checkpoint(run_id, kind, name))
        return Response(status_code=204)

    def set_ttl(self, run_id: str, kind: str, name: str, request: asked.TimeToLive) -> Response:
        """Say when it expires."""
        self.store.expire_in(self._checkpoint(run_id, kind, name), request.ttl_seconds)
        return Response(status_code=204)

    def archive(self, run_id: str, kind: str, name: str) -> Response:
        """A checkpoint's files: an adapter in PEFT's layout, in a tar."""
        checkpoint = self._checkpoint(run_id, kind, name)
        headers = {"Content-Disposition": f'attachment; filename="{checkpoint.name}.tar"'}
        return StreamingResponse(self.store.archive(checkpoint), media_type="application/x-tar", headers=headers)

    def weights_info(self, request: asked.WeightsInfo) -> dict[str, Any]:
        """What one must know to load weights."""
        found = self.store.checkpoint(request.tinker_path)
        about = {"is_lora": True, "lora_rank": found.lora_rank, "train_unembed": False}
        return {"base_model": found.run.base_model, **about}

    async def sessions(self, limit: Count = 20, offset: Count = 0) -> dict[str, Any]:
        """Sessions, the newest first."""
        return {"sessions": list(reversed(self.service.sessions))[offset : offset + limit]}

    async def session(self, session_id: str) -> dict[str, Any]:
        """One session."""
        found = self.service.sessions.get(session_id)
        if found is None:
            raise Missing(f"there is no session {session_id}, or it ended long ago")
        return {
            "training_run_ids": found.models,
            "sampler_ids": list(found.samplers),
            "user_metadata": in_words(found.user_metadata),
            "display_name": found.display_name,
        }

    def _checkpoint(self, run_id: str, kind: str, name: str) -> Checkpoint:
        return self.store.checkpoint(f"{SCHEME}{run_id}/{kind}/{name}")

    def _run(self, run: Run) -> dict[str, Any]:
        saved, model = self.store.checkpoints(run.training_run_id), self.service.models.get(run.training_run_id)
        last = {
            kind: next((each for each in saved if each.kind == kind), None) for kind in ("weights", "sampler_weights")
        }
        return {
            "training_run_id": run.training_run_id,
            "base_model": run.base_model,
            "model_owner": "local",
            "is_lora": True,
            "lora_rank": run.lora_rank,
            "corrupted": False,
            "last_request_time": run.last_request_time if model is None else model.asked_at or run.last_request_time,
            "last_checkpoint": None if last["weights"] is None else last["weights"].as_json(),
            "last_sampler_checkpoint": None if last["sampler_weights"] is None else last["sampler_weights"].as_json(),
            "user_metadata": in_words(run.user_metadata),
        }
