"""The endpoints: a path, what it is asked with, and which part of the service answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from tercet.server import requests as asked
from tercet.server.guard import Guard
from tercet.server.promises import Promise
from tercet.server.refusals import answer_errors
from tercet.server.rest import Rest
from tercet.server.service import Service
from tercet.server.wire import read_learn_request

PREFIX = "/api/v1"
SDK = "0.38"
CLIENT_CONFIG = {
    # One request per batch where the limits allow, and pieces one after another where they do not.
    "parallel_fwdbwd_chunks": False,
    "fwdbwd_max_chunk_len": 4096,
    "fwdbwd_max_chunk_bytes_count": 50_000_000,
    "proto_compress_fwdbwd": False,
    "sample_use_retrieve_futures": False,
    "sample_join_sampling_session": False,
    "custom_loss_server_side": False,
    # A machine with two cores may draw for longer than the hosted service ever does.
    "sample_enable_stuck_detection": False,
}


class Endpoints:
    """Translates between HTTP and the service."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def healthz(self) -> dict[str, Any]:
        """Whether the server answers."""
        return {"status": "ok"}

    async def client_config(self, request: asked.ClientConfig) -> Any:
        """How the client shall behave."""
        # Half of what a body may have: the SDK counts what it sends roughly.
        most = min(CLIENT_CONFIG["fwdbwd_max_chunk_bytes_count"], self.service.limits.body_mb * 500_000)
        return _other_sdk(request.sdk_version) or {**CLIENT_CONFIG, "fwdbwd_max_chunk_bytes_count": most}

    async def client_dynamic_config(self, request: asked.ClientConfig) -> dict[str, Any]:
        """What of that may change."""
        return {"refresh_interval_sec": 300, "sample_cancel_enabled": True, "sample_cancel_max_batch_size": 64}

    async def capabilities(self) -> dict[str, Any]:
        """The models."""
        served = self.service.served
        about = {"max_context_length": served.engine.context_tokens, "trainable": True, "sampleable": True}
        return {"supported_models": [{"model_name": name, **about} for name in served.names]}

    async def create_session(self, request: asked.CreateSession) -> Any:
        """A client arrives."""
        refused = _other_sdk(request.sdk_version)
        if refused is not None:
            return refused
        return {"session_id": self.service.open_session(request).session_id, "type": "create_session"}

    async def heartbeat(self, request: asked.SessionHeartbeat) -> dict[str, Any]:
        """A client lives."""
        self.service.heard(request.session_id)
        return {"type": "session_heartbeat"}

    async def finish(self, session_id: str, request: asked.FinishSession) -> Response:
        """A client leaves."""
        self.service.finish(session_id, request.reason.type)
        return Response(status_code=204)

    async def telemetry(self) -> dict[str, Any]:
        """Taken, and thrown away."""
        return {"status": "accepted"}

    async def create_model(self, request: asked.CreateModel) -> dict[str, Any]:
        """See `Service`."""
        return _promised(self.service.create_model(request))

    async def get_info(self, request: asked.GetInfo) -> dict[str, Any]:
        """What a client wants to know of its model."""
        model, served = self.service.model(request.model_id), self.service.served
        name = {"model_name": model.base_model}
        about = {"arch": served.architecture, "tokenizer_id": str(served.tokenizer), **name}
        lora = {"is_lora": True, "lora_rank": model.lora_rank}
        return {"type": "get_info", "model_data": about, "model_id": request.model_id, **lora, **name}

    async def load_weights(self, request: asked.LoadWeights) -> dict[str, Any]:
        """Into a model that is there, or as a new one."""
        make = self.service.load_in_place if request.session_id is None else self.service.create_model_from
        return _promised(make(request))

    async def forward_backward(self, request: Request) -> dict[str, Any]:
        """See `Service.learn`."""
        return _promised(self.service.learn(read_learn_request(await request.body())))

    async def optim_step(self, request: asked.OptimStep) -> dict[str, Any]:
        """See `Service`."""
        return _promised(self.service.optim_step(request))

    async def save_weights(self, request: asked.SaveWeights) -> dict[str, Any]:
        """To go on from."""
        return _promised(self.service.save(request, "weights"))

    async def save_weights_for_sampler(self, request: asked.SaveWeights) -> dict[str, Any]:
        """To sample from: under a name, or in memory."""
        if request.sampling_session_seq_id is not None:
            return _promised(self.service.save_sampler(request))
        return _promised(self.service.save(request, "sampler_weights"))

    async def create_sampling_session(self, request: asked.CreateSamplingSession) -> dict[str, Any]:
        """See `Service.open_sampler`."""
        entry = self.service.open_sampler(request)
        return {"type": "create_sampling_session", "sampling_session_id": entry.sampler_id}

    async def sampler(self, sampler_id: str) -> dict[str, Any]:
        """What a sampler draws from."""
        entry = self.service.entry(sampler_id)
        return {"sampler_id": sampler_id, "base_model": entry.base_model, "model_path": entry.model_path}

    async def asample(self, request: asked.Sample, http: Request) -> dict[str, Any]:
        """See `Service.sample`."""
        promise = self.service.sample(request, http.headers.get("x-idempotency-key"))
        # One for every sample; of a number that is refused, no more than could have been had.
        count = min(request.num_samples, self.service.limits.samples)
        names = [f"{promise.request_id}:{i}" for i in range(count)]
        return {**_promised(promise), "sample_sequence_ids": names}

    async def retrieve_future(self, request: asked.RetrieveFuture) -> Response:
        """An answer, as soon as it is there."""
        found = await self.service.retrieve(request.request_id)
        return Response(found.content, media_type=found.media_type)

    async def cancel_future(self, request: asked.RetrieveFuture) -> Response:
        """See `Service.cancel`."""
        self.service.cancel(request.request_id)
        return Response(status_code=204)


def make_app(service: Service, *, token: str | None, local_only: bool) -> FastAPI:
    """The application.

    Args:
        service: Does the work.
        token: What every request must carry as X-API-Key; None asks for none.
        local_only: Whether it is meant for programs of this machine alone.
    """

    @asynccontextmanager
    async def working(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(service.run())
        # Whatever ends it must be seen: without it nothing is answered.
        task.add_done_callback(lambda done: None if done.cancelled() else done.result())
        yield
        task.cancel()

    endpoints, rest = Endpoints(service), Rest(service)
    app = FastAPI(lifespan=working, openapi_url=None, redirect_slashes=False)
    run, checkpoint = "/training_runs/{run_id}", "/training_runs/{run_id}/checkpoints/{kind}/{name}"
    for method, path, answer in (
        ("GET", "/healthz", endpoints.healthz),
        ("POST", "/client/config", endpoints.client_config),
        ("POST", "/client/dynamic_config", endpoints.client_dynamic_config),
        ("GET", "/get_server_capabilities", endpoints.capabilities),
        ("POST", "/create_session", endpoints.create_session),
        ("POST", "/session_heartbeat", endpoints.heartbeat),
        ("POST", "/sessions/{session_id}/finish", endpoints.finish),
        ("POST", "/telemetry", endpoints.telemetry),
        ("POST", "/create_model", endpoints.create_model),
        ("POST", "/get_info", endpoints.get_info),
        ("POST", "/load_weights", endpoints.load_weights),
        ("POST", "/forward_backward", endpoints.forward_backward),
        ("POST", "/optim_step", endpoints.optim_step),
        ("POST", "/save_weights", endpoints.save_weights),
        ("POST", "/save_weights_for_sampler", endpoints.save_weights_for_sampler),
        ("POST", "/create_sampling_session", endpoints.create_sampling_session),
        ("GET", "/samplers/{sampler_id}", endpoints.sampler),
        ("POST", "/asample", endpoints.asample),
        ("POST", "/retrieve_future", endpoints.retrieve_future),
        ("POST", "/cancel_future", endpoints.cancel_future),
        ("GET", "/training_runs", rest.training_runs),
        ("GET", run, rest.training_run),
        ("GET", f"{run}/checkpoints", rest.checkpoints_of),
        ("DELETE", checkpoint, rest.delete_checkpoint),
        ("PUT", f"{checkpoint}/ttl", rest.set_ttl),
        ("GET", f"{checkpoint}/archive", rest.archive),
        ("GET", "/checkpoints", rest.checkpoints),
        ("POST", "/weights_info", rest.weights_info),
        ("GET", "/sessions", rest.sessions),
        ("GET", "/sessions/{session_id}", rest.session),
    ):
        app.add_api_route(PREFIX + path, answer, methods=[method], response_model=None)
    answer_errors(app)
    app.add_middleware(Guard, token=token, local_only=local_only, most_bytes=service.limits.body_mb * 1_000_000)
    return app


def _promised(promise: Promise) -> dict[str, Any]:
    return {"request_id": promise.request_id}


def _other_sdk(version: str) -> JSONResponse | None:
    """A refusal of another protocol than ours, in words."""
    if version == SDK or version.startswith(f"{SDK}."):
        return None
    return JSONResponse(
        {
            "detail": f"this server speaks the protocol of tinker {SDK}, and the client is tinker "
            f"{version or 'of an unknown version'}: pip install 'tinker=={SDK}.0'"
        },
        400,
    )
