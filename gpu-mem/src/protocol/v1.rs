//! The first generation's messages: D1 in full, and D0's own tags on the same socket
//! (`spec/gpu-memory.md` §4.3, §4.4, §4.6).
//!
//! Replies carry the union of both dialects' fields: decoders of either pass over what they do not
//! know. [`Extra`] fields are those that one dialect, or upstream altogether, lacks. Tags of the
//! unreleased third dialect (`claim_persistent_…`, `register_gpu_client_…`, `quiesce_gpu_cohort_…`)
//! are reserved: nothing of ours may use them, and a client that sends one is dropped as unknown.
//! Our own messages are called `corelane_…`, and a client that sends none is sent none.

pub use super::message::Bytes;
use super::message::{Extra, WireInt, direction, messages};
use crate::lock::{Grant, LockType, State};

messages! {
    /// Asks for the lock; the answer is the lock.
    "handshake_request" HandshakeRequest {
        /// What is wanted.
        lock_type: LockType,
        /// How long to wait, in milliseconds; none is for ever, zero and less is not at all.
        timeout_ms: Option<WireInt>,
    }
    /// Says whether the lock was granted.
    "handshake_response" HandshakeResponse {
        /// Whether it was.
        success: bool,
        /// Whether something is published, after the grant.
        committed: bool,
        /// What was granted.
        granted_lock_type: Option<Grant>,
    }
    /// Publishes the writer's work.
    "commit_request" CommitRequest {}
    /// The work is published; the server closes the connection.
    "commit_response" CommitResponse {
        /// Always true.
        success: bool,
    }
    /// Makes shape and pages durable while the writer stays.
    "commit_layout_request" CommitLayoutRequest {}
    /// The layout is durable.
    "commit_layout_response" CommitLayoutResponse {
        /// Always true.
        success: bool,
        /// The layout hash.
        memory_layout_hash: String = String::new(),
        /// What the writer holds from now on.
        granted_lock_type: Option<Grant>,
    }
    /// Asks for the lock's numbers, inside a session.
    "get_lock_state_request" GetLockStateRequest {}
    /// The lock's numbers.
    "get_lock_state_response" GetLockStateResponse {
        /// The derived state.
        state: State,
        /// Whether a writer is connected.
        has_rw_session: bool,
        /// How many readers are.
        ro_session_count: u64,
        /// How many waiters keep new readers out.
        waiting_writers: u64,
        /// Whether something is published.
        committed: bool,
        /// Published and not being rewritten.
        is_ready: bool,
        /// Whether a durable layout exists (D1).
        layout_committed: Extra<bool>,
    }
    /// Asks how much is allocated.
    "get_allocation_state_request" GetAllocationStateRequest {}
    /// How much is allocated.
    "get_allocation_state_response" GetAllocationStateResponse {
        /// Allocations in the pool.
        allocation_count: u64,
        /// Their aligned sizes together (D0).
        total_bytes: Extra<u64>,
    }
    /// Asks for memory.
    "allocate_request" AllocateRequest {
        /// Wanted bytes; rounded up to the granularity.
        size: WireInt,
        /// The engine's word for what it is for.
        tag: String = "default".to_owned(),
    }
    /// Memory was made.
    "allocate_response" AllocateResponse {
        /// Names it from now on; opaque.
        allocation_id: String,
        /// Wanted bytes.
        size: u64,
        /// Real bytes.
        aligned_size: u64,
        /// Its place in the order of allocation (D1).
        layout_slot: Extra<u64>,
    }
    /// Asks for a descriptor of an allocation (D1's tag).
    "export_allocation_request" ExportAllocationRequest {
        /// Which.
        allocation_id: String,
    }
    /// A descriptor comes with this frame's first byte.
    "export_allocation_response" ExportAllocationResponse {
        /// Which.
        allocation_id: String,
        /// Wanted bytes.
        size: u64,
        /// Real bytes.
        aligned_size: u64,
        /// The engine's word.
        tag: String,
        /// Its place in the order of allocation.
        layout_slot: Extra<u64>,
    }
    /// Asks for a descriptor of an allocation (D0's tag).
    "export_request" ExportRequest {
        /// Which.
        allocation_id: String,
    }
    /// Asks about one allocation.
    "get_allocation_request" GetAllocationRequest {
        /// Which.
        allocation_id: String,
    }
    /// One allocation. Also the answer to D0's export, with a descriptor.
    "get_allocation_response" GetAllocationResponse {
        /// Which.
        allocation_id: String,
        /// Wanted bytes.
        size: u64,
        /// Real bytes.
        aligned_size: u64,
        /// The engine's word.
        tag: String,
        /// Its place in the order of allocation (D1).
        layout_slot: Extra<u64>,
    }
    /// Asks about all allocations.
    "list_allocations_request" ListAllocationsRequest {
        /// Only those with this word.
        tag: Option<String>,
    }
    /// All allocations, by slot.
    "list_allocations_response" ListAllocationsResponse {
        /// Them.
        allocations: Vec<GetAllocationResponse>,
    }
    /// Gives memory back (D1's tag).
    "free_allocation_request" FreeAllocationRequest {
        /// Which.
        allocation_id: String,
    }
    /// Whether there was such memory.
    "free_allocation_response" FreeAllocationResponse {
        /// False for an unknown id.
        success: bool,
    }
    /// Gives memory back (D0's tag).
    "free_request" FreeRequest {
        /// Which.
        allocation_id: String,
    }
    /// Whether there was such memory (D0's tag).
    "free_response" FreeResponse {
        /// False for an unknown id.
        success: bool,
    }
    /// Gives everything back (D0).
    "clear_all_request" ClearAllRequest {}
    /// How much there was (D0).
    "clear_all_response" ClearAllResponse {
        /// Allocations that were released.
        cleared_count: u64,
    }
    /// Stores one entry of metadata, silently replacing another with its key.
    "metadata_put_request" MetadataPutRequest {
        /// The tensor's name, to the engine.
        key: String,
        /// The allocation that it lies in.
        allocation_id: String,
        /// Where in the allocation it starts.
        offset_bytes: WireInt,
        /// The engine's words about it; never interpreted.
        value: Bytes,
    }
    /// The entry is stored.
    "metadata_put_response" MetadataPutResponse {
        /// Always true.
        success: bool,
    }
    /// Asks for one entry.
    "metadata_get_request" MetadataGetRequest {
        /// Which.
        key: String,
    }
    /// One entry, if there is one.
    "metadata_get_response" MetadataGetResponse {
        /// Whether there is.
        found: bool,
        /// The allocation that it lies in.
        allocation_id: Option<String>,
        /// Where in the allocation it starts.
        offset_bytes: Option<u64>,
        /// The engine's words about it.
        value: Option<Bytes>,
    }
    /// Removes one entry.
    "metadata_delete_request" MetadataDeleteRequest {
        /// Which.
        key: String,
    }
    /// Whether there was one.
    "metadata_delete_response" MetadataDeleteResponse {
        /// Whether there was.
        deleted: bool,
    }
    /// Asks for all keys.
    "metadata_list_request" MetadataListRequest {
        /// Only those that start so.
        prefix: String = String::new(),
    }
    /// All keys, sorted by their bytes.
    "metadata_list_response" MetadataListResponse {
        /// Them.
        keys: Vec<String>,
    }
    /// Asks for the layout hash.
    "get_memory_layout_hash_request" GetMemoryLayoutHashRequest {}
    /// The layout hash.
    "get_memory_layout_hash_response" GetMemoryLayoutHashResponse {
        /// Empty until something is committed.
        memory_layout_hash: String,
        /// Ours: a digest of the same layout whose records cannot run together (hazard H9).
        layout_digest: Extra<String>,
    }
    /// Asks about the pool from outside; the first and only message of its connection.
    "get_runtime_state_request" GetRuntimeStateRequest {}
    /// The pool, seen from outside.
    "get_runtime_state_response" GetRuntimeStateResponse {
        /// The derived state.
        state: State,
        /// Whether a writer is connected.
        has_rw_session: bool,
        /// How many readers are.
        ro_session_count: u64,
        /// How many waiters keep new readers out.
        waiting_writers: u64,
        /// Whether something is published.
        committed: bool,
        /// Published and not being rewritten.
        is_ready: bool,
        /// Allocations in the pool.
        allocation_count: u64,
        /// The layout hash.
        memory_layout_hash: String,
        /// Whether a durable layout exists.
        layout_committed: Extra<bool>,
        /// Ours: the aligned sizes together.
        total_bytes: Extra<u64>,
        /// Ours: everybody who waits, readers too.
        waiting_clients: Extra<u64>,
    }
    /// Asks for the history; the first and only message of its connection.
    "get_event_history_request" GetEventHistoryRequest {}
    /// The last events, oldest first.
    "get_event_history_response" GetEventHistoryResponse {
        /// Them.
        events: Vec<EventRecord>,
    }
    /// One event of the history.
    "" EventRecord {
        /// What happened.
        kind: String,
        /// How many allocations it concerned.
        allocation_count: u64,
        /// Ours: when, in milliseconds since 1970.
        unix_ms: Extra<u64>,
        /// Ours: which session.
        session: Extra<u64>,
        /// Ours: the process behind it.
        pid: Extra<u64>,
    }
    /// Ours: a writer offers memory of its own by its CUDA IPC handle ([`crate::ipc`]). None of
    /// the `corelane_ipc_` messages is ever sent to a client that did not ask for it.
    "corelane_ipc_offer_request" IpcOfferRequest {
        /// The driver's handle, exactly [`crate::ipc::HANDLE_BYTES`].
        handle: Bytes,
        /// Bytes of the allocation that the handle opens.
        base_bytes: WireInt,
        /// Where in it the offered memory starts.
        offset_bytes: WireInt,
        /// Offered bytes.
        size: WireInt,
        /// The engine's word for what it is for.
        tag: String = "default".to_owned(),
        /// The engine's words about it; never interpreted.
        value: Bytes = Bytes::default(),
    }
    /// Ours: the memory is part of the layout.
    "corelane_ipc_offer_response" IpcOfferResponse {
        /// Names it from now on; opaque.
        allocation_id: String,
        /// Its place among what was offered.
        slot: u64,
        /// The service that knows it; random, one per service.
        server_nonce: String,
    }
    /// Ours: asks for the handle of offered memory, in order to open it.
    "corelane_ipc_open_request" IpcOpenRequest {
        /// Which.
        allocation_id: String,
    }
    /// Ours: the handle. It may be open for as long as the lock is held, and no longer.
    "corelane_ipc_open_response" IpcOpenResponse {
        /// What it opens.
        entry: IpcEntry,
        /// The driver's handle.
        handle: Bytes,
        /// The engine's words about it.
        value: Bytes,
    }
    /// Ours: asks what is offered.
    "corelane_ipc_list_request" IpcListRequest {
        /// Only what has this word.
        tag: Option<String>,
    }
    /// Ours: what is offered, by slot.
    "corelane_ipc_list_response" IpcListResponse {
        /// It.
        allocations: Vec<IpcEntry>,
    }
    /// One piece of offered memory.
    "" IpcEntry {
        /// Its name.
        allocation_id: String,
        /// Bytes of the allocation that its handle opens.
        base_bytes: u64,
        /// Where in it the offered memory starts.
        offset_bytes: u64,
        /// Offered bytes.
        size: u64,
        /// The engine's word.
        tag: String,
        /// Its place among what was offered.
        slot: u64,
        /// The process that owns the memory, as the service sees it.
        exporter_pid: u64,
    }
    /// Ours: the writer takes an offer back.
    "corelane_ipc_withdraw_request" IpcWithdrawRequest {
        /// Which.
        allocation_id: String,
    }
    /// Ours: whether there was such an offer.
    "corelane_ipc_withdraw_response" IpcWithdrawResponse {
        /// False for an unknown id.
        success: bool,
    }
    /// Ours: asks whether memory is still offered, so that nobody frees it under another; the
    /// first and only message of its connection.
    "corelane_ipc_state_request" IpcStateRequest {
        /// Which.
        allocation_id: String,
    }
    /// Ours: how offered memory stands.
    "corelane_ipc_state_response" IpcStateResponse {
        /// Whether it is part of the layout; while it is, it must not be freed.
        held: bool,
        /// Who may have it open now.
        holders: u64,
        /// The service that answers: another than the one that took the offer knows nothing.
        server_nonce: String,
    }
    /// The request was not done; the session goes on.
    "error_response" ErrorResponse {
        /// Why.
        error: String,
        /// Always zero in practice.
        code: i64 = 0,
    }
}

direction! {
    /// What a client sends.
    Request, strict = false, {
        Handshake(HandshakeRequest),
        Commit(CommitRequest),
        CommitLayout(CommitLayoutRequest),
        LockState(GetLockStateRequest),
        AllocationState(GetAllocationStateRequest),
        Allocate(AllocateRequest),
        ExportAllocation(ExportAllocationRequest),
        Export(ExportRequest),
        GetAllocation(GetAllocationRequest),
        ListAllocations(ListAllocationsRequest),
        FreeAllocation(FreeAllocationRequest),
        Free(FreeRequest),
        ClearAll(ClearAllRequest),
        MetadataPut(MetadataPutRequest),
        MetadataGet(MetadataGetRequest),
        MetadataDelete(MetadataDeleteRequest),
        MetadataList(MetadataListRequest),
        LayoutHash(GetMemoryLayoutHashRequest),
        RuntimeState(GetRuntimeStateRequest),
        EventHistory(GetEventHistoryRequest),
        IpcOffer(IpcOfferRequest),
        IpcOpen(IpcOpenRequest),
        IpcList(IpcListRequest),
        IpcWithdraw(IpcWithdrawRequest),
        IpcState(IpcStateRequest),
    }
}

direction! {
    /// What a server sends.
    Reply, strict = false, {
        Handshake(HandshakeResponse),
        Commit(CommitResponse),
        CommitLayout(CommitLayoutResponse),
        LockState(GetLockStateResponse),
        AllocationState(GetAllocationStateResponse),
        Allocate(AllocateResponse),
        ExportAllocation(ExportAllocationResponse),
        GetAllocation(GetAllocationResponse),
        ListAllocations(ListAllocationsResponse),
        FreeAllocation(FreeAllocationResponse),
        Free(FreeResponse),
        ClearAll(ClearAllResponse),
        MetadataPut(MetadataPutResponse),
        MetadataGet(MetadataGetResponse),
        MetadataDelete(MetadataDeleteResponse),
        MetadataList(MetadataListResponse),
        LayoutHash(GetMemoryLayoutHashResponse),
        RuntimeState(GetRuntimeStateResponse),
        EventHistory(GetEventHistoryResponse),
        IpcOffer(IpcOfferResponse),
        IpcOpen(IpcOpenResponse),
        IpcList(IpcListResponse),
        IpcWithdraw(IpcWithdrawResponse),
        IpcState(IpcStateResponse),
        Error(ErrorResponse),
    }
}
