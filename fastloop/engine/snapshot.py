"""A session as bytes: a digest, then one safetensors buffer whose metadata is the state machine.

Nothing is pickled, and one changed byte is enough for a refusal.

The prefix is not stored: its keys are a function of the model, the prompt and the number of dropped
positions, and the restoring engine shares it with its other sessions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as to_bytes
from torch import Tensor

from ..config import ConfigError, from_mapping
from ..errors import CapacityError, SnapshotError
from ..events import from_dict
from ..ops.rope_append import rotate
from ..options import DecisionPolicy, Sampling, SessionConfig
from ..text import TextStream

if TYPE_CHECKING:
    from ..checkpoint import Model
    from .session import Session

FORMAT = "fastloop-snapshot-1"
DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class SnapshotState:
    """A parsed snapshot: the session's configuration, plain state and tensors."""

    config: SessionConfig
    values: dict[str, Any]
    tensors: dict[str, Tensor]


def dump(session: Session) -> bytes:
    """Serialise a session that no step is touching."""
    engine, stream = session._engine, session.stream
    inbox, outbox = stream.inbox, stream.outbox
    with outbox.lock:
        said = {
            "events": [event.to_dict() for event in outbox.events],
            **{name: getattr(outbox, name) for name in _OUTBOX},
        }
    keys, values = stream.kv.export()
    pcm, queued = inbox.export()
    tensors = {"keys": keys, "values": values, "pcm": torch.from_numpy(pcm)}
    if stream.perceived:
        tensors["perceived"] = torch.stack([chunk.tokens for chunk in stream.perceived])
    if stream.clip is not None:
        tensors["clip"] = stream.clip
    slot = stream.slot
    tensors |= {f"mel.{name}": t for name, t in engine._mel.export(slot).items()}
    tensors["decision"] = engine._decisions.state[slot].clone()
    state = {
        "bare_keys": engine.cache.layout.bare_keys,
        "config": dataclasses.asdict(session.config),
        "stream": {name: _plain(getattr(stream, name)) for name in _STREAM},
        "text": stream.text.export() if stream.text else None,
        "outbox": said,
        "inbox": queued,
        "start": stream.kv.start,
    }
    header = {"format": FORMAT, "model": engine.model.fingerprint, "state": json.dumps(state)}
    body = to_bytes({name: t.contiguous() for name, t in tensors.items()}, metadata=header)
    return hashlib.sha256(body).digest() + body


_OUTBOX = ("seq", "epoch", "speaking", "started", "t")
_STREAM = (
    *("phase", "pending", "primed", "taken", "heard", "decided", "units", "epoch", "spoken"),
    "clip_complete",
)


def _turned_bias(model: Model, start: int, count: int) -> Tensor:
    """The K bias at positions start, start + 1, ...: float32 [L, count, G, K], what bare keys lack."""
    bias = model.decoder.key_bias()
    positions = torch.arange(start, start + count, device=bias.device)
    flat = bias.flatten(0, 1).expand(count, -1, -1)
    turned = rotate(flat, positions, model.decoder.inv_freq)
    return turned.unflatten(1, bias.shape[:2]).transpose(0, 1)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, deque) else value


def parse(data: bytes, model: Model) -> SnapshotState:
    """Read and check a snapshot; SnapshotError where it is damaged or belongs to another model."""
    digest, body = bytes(data[:DIGEST_BYTES]), bytes(data[DIGEST_BYTES:])
    if hashlib.sha256(body).digest() != digest:
        raise SnapshotError(
            f"restore: {len(data)} bytes, not a whole fastloop snapshot (its digest differs); take a new one"
        )
    try:
        size = int.from_bytes(body[:8], "little")
        header = json.loads(body[8 : 8 + size])["__metadata__"]
        tensors = parse_tensors(body)
        if header["format"] != FORMAT:
            raise SnapshotError(f"restore: format {header['format']!r}; this version reads {FORMAT!r}")
        if header["model"] != model.fingerprint:
            raise SnapshotError(
                f"restore: the snapshot belongs to model {header['model']}, this engine runs "
                f"{model.fingerprint}; restore it with the checkpoint it was taken from"
            )
        state = json.loads(header["state"])
        values = dict(state["config"])
        values["policy"] = from_mapping(DecisionPolicy, values["policy"])
        values["sampling"] = from_mapping(Sampling, values["sampling"])
        config = from_mapping(SessionConfig, values)
    except (SafetensorError, KeyError, TypeError, ValueError, ConfigError) as error:
        if isinstance(error, SnapshotError):
            raise
        raise SnapshotError(f"restore: not a whole fastloop snapshot ({error}); take a new one") from error
    return SnapshotState(config, state, tensors)


def fill(session: Session, state: SnapshotState) -> None:
    """Bring a freshly admitted session to the snapshot's state."""
    from .protocol import Chunk

    values, tensors = state.values, state.tensors
    engine, stream = session._engine, session.stream
    slot = stream.slot
    try:
        for name in _STREAM:
            value = values["stream"][name]
            setattr(stream, name, deque(value) if name == "units" else value)
        now = engine.clock()
        waiting = tensors.get("perceived", torch.empty(0))
        first = stream.heard - len(waiting)
        stream.perceived = deque(
            Chunk(first + i, tokens.to(engine.model.device), now) for i, tokens in enumerate(waiting)
        )
        stream.clip = tensors["clip"].to(engine.model.device) if "clip" in tensors else None
        if values["text"] is not None:
            stream.text = TextStream.restore(engine.model.tokenizer, values["text"])
        keys, content = tensors["keys"], tensors["values"]
        bare = engine.cache.layout.bare_keys
        if values.get("bare_keys", False) != bare:  # taken with pages of another precision
            bias = _turned_bias(engine.model, stream.kv.prefix_len + values["start"], keys.shape[1])
            keys = keys.float().to(bias.device) + (-bias if bare else bias)
        stream.kv.load(keys, content, values["start"], engine.model.decoder.inv_freq)
        prefix = "mel."
        engine._mel.load(
            slot, {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        )
        engine._decisions.state[slot] = tensors["decision"].to(engine.model.device)
        for name in _OUTBOX:
            setattr(stream.outbox, name, values["outbox"][name])
        stream.outbox.events = deque(from_dict(event) for event in values["outbox"]["events"])
        stream.inbox.restore(tensors["pcm"].numpy(), values["inbox"])
    except (CapacityError, SnapshotError):
        raise
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise SnapshotError(
            f"restore: the snapshot's content does not fit ({error}); take a new one"
        ) from error
