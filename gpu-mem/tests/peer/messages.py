"""The messages of the GPU memory service's first generation (spec/gpu-memory.md, section 4.3) for
msgspec, written from the specification and not from our Rust: the test's peer and the bench's
server on asyncio are made of them.
"""

from typing import List, Optional

import msgspec


class Tagged(msgspec.Struct, tag_field="type"):
    """A message; its tag travels in `type`."""


def message(tag, /, *, strict=False, **fields):
    """A message of that tag. A field is its type, or a pair of its type and its default; a strict
    message refuses fields that it does not name."""
    pairs = [(name, *(of if isinstance(of, tuple) else (of,))) for name, of in fields.items()]
    name = "".join(word.capitalize() for word in tag.split("_"))
    return msgspec.defstruct(name, pairs, bases=(Tagged,), tag=tag, forbid_unknown_fields=strict)


NAME = {"allocation_id": str}
SIZES = {**NAME, "size": int, "aligned_size": int}
TEXT_OR_NONE = (Optional[str], None)

HandshakeRequest = message("handshake_request", lock_type=str, timeout_ms=(Optional[int], None))
HandshakeResponse = message(
    "handshake_response", success=bool, committed=bool, granted_lock_type=TEXT_OR_NONE
)
CommitRequest = message("commit_request")
CommitResponse = message("commit_response", success=bool)
CommitLayoutRequest = message("commit_layout_request")
CommitLayoutResponse = message(
    "commit_layout_response",
    success=bool,
    memory_layout_hash=(str, ""),
    granted_lock_type=TEXT_OR_NONE,
)
AllocateRequest = message("allocate_request", size=int, tag=(str, "default"))
AllocateResponse = message("allocate_response", **SIZES, layout_slot=int)
ExportAllocationRequest = message("export_allocation_request", **NAME)
ExportAllocationResponse = message(
    "export_allocation_response", **SIZES, tag=str, layout_slot=int
)
FreeAllocationRequest = message("free_allocation_request", **NAME)
FreeAllocationResponse = message("free_allocation_response", success=bool)
GetAllocationResponse = message("get_allocation_response", **SIZES, tag=str, layout_slot=(int, 0))
ExportRequest = message("export_request", **NAME)
ListAllocationsRequest = message("list_allocations_request", tag=TEXT_OR_NONE)
ListAllocationsResponse = message(
    "list_allocations_response", allocations=(List[GetAllocationResponse], [])
)
MetadataPutRequest = message(
    "metadata_put_request", key=str, **NAME, offset_bytes=int, value=bytes
)
MetadataPutResponse = message("metadata_put_response", success=bool)
MetadataGetRequest = message("metadata_get_request", key=str)
MetadataGetResponse = message(
    "metadata_get_response",
    found=bool,
    allocation_id=TEXT_OR_NONE,
    offset_bytes=(Optional[int], None),
    value=(Optional[bytes], None),
)
MetadataListRequest = message("metadata_list_request", prefix=(str, ""))
MetadataListResponse = message("metadata_list_response", keys=(List[str], []))
RuntimeStateRequest = message("get_runtime_state_request")
RuntimeStateResponse = message(
    "get_runtime_state_response",
    state=str,
    has_rw_session=bool,
    ro_session_count=int,
    waiting_writers=int,
    committed=bool,
    is_ready=bool,
    allocation_count=int,
    memory_layout_hash=str,
    layout_committed=(bool, False),
)
EventHistoryRequest = message("get_event_history_request")


class Event(msgspec.Struct):
    """One line of the history."""

    kind: str
    allocation_count: int


EventHistoryResponse = message("get_event_history_response", events=(List[Event], []))
ErrorResponse = message("error_response", error=str, code=(int, 0))
