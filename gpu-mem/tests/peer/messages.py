"""The messages of the GPU memory service's first generation (spec/gpu-memory.md, section 4.3) for
msgspec, written from the specification and not from our Rust: the test's peer and the bench's
server on asyncio are made of them.
"""

from typing import List, Optional

import msgspec


class Tagged(msgspec.Struct, tag_field="type", kw_only=True):
    """A message; its tag travels in `type`."""


class HandshakeRequest(Tagged, tag="handshake_request"):
    lock_type: str
    timeout_ms: Optional[int] = None


class HandshakeResponse(Tagged, tag="handshake_response"):
    success: bool
    committed: bool
    granted_lock_type: Optional[str] = None


class CommitRequest(Tagged, tag="commit_request"):
    pass


class CommitResponse(Tagged, tag="commit_response"):
    success: bool


class CommitLayoutRequest(Tagged, tag="commit_layout_request"):
    pass


class CommitLayoutResponse(Tagged, tag="commit_layout_response"):
    success: bool
    memory_layout_hash: str = ""
    granted_lock_type: Optional[str] = None


class AllocateRequest(Tagged, tag="allocate_request"):
    size: int
    tag: str = "default"


class AllocateResponse(Tagged, tag="allocate_response"):
    allocation_id: str
    size: int
    aligned_size: int
    layout_slot: int


class ExportAllocationRequest(Tagged, tag="export_allocation_request"):
    allocation_id: str


class ExportAllocationResponse(Tagged, tag="export_allocation_response"):
    allocation_id: str
    size: int
    aligned_size: int
    tag: str
    layout_slot: int


class FreeAllocationRequest(Tagged, tag="free_allocation_request"):
    allocation_id: str


class FreeAllocationResponse(Tagged, tag="free_allocation_response"):
    success: bool


class GetAllocationResponse(Tagged, tag="get_allocation_response"):
    allocation_id: str
    size: int
    aligned_size: int
    tag: str
    layout_slot: int = 0


class ExportRequest(Tagged, tag="export_request"):
    allocation_id: str


class ListAllocationsRequest(Tagged, tag="list_allocations_request"):
    tag: Optional[str] = None


class ListAllocationsResponse(Tagged, tag="list_allocations_response"):
    allocations: List[GetAllocationResponse] = []


class MetadataPutRequest(Tagged, tag="metadata_put_request"):
    key: str
    allocation_id: str
    offset_bytes: int
    value: bytes


class MetadataPutResponse(Tagged, tag="metadata_put_response"):
    success: bool


class MetadataGetRequest(Tagged, tag="metadata_get_request"):
    key: str


class MetadataGetResponse(Tagged, tag="metadata_get_response"):
    found: bool
    allocation_id: Optional[str] = None
    offset_bytes: Optional[int] = None
    value: Optional[bytes] = None


class MetadataListRequest(Tagged, tag="metadata_list_request"):
    prefix: str = ""


class MetadataListResponse(Tagged, tag="metadata_list_response"):
    keys: List[str] = []


class RuntimeStateRequest(Tagged, tag="get_runtime_state_request"):
    pass


class RuntimeStateResponse(Tagged, tag="get_runtime_state_response"):
    state: str
    has_rw_session: bool
    ro_session_count: int
    waiting_writers: int
    committed: bool
    is_ready: bool
    allocation_count: int
    memory_layout_hash: str
    layout_committed: bool = False


class EventHistoryRequest(Tagged, tag="get_event_history_request"):
    pass


class Event(msgspec.Struct):
    kind: str
    allocation_count: int


class EventHistoryResponse(Tagged, tag="get_event_history_response"):
    events: List[Event] = []


class ErrorResponse(Tagged, tag="error_response"):
    error: str
    code: int = 0
